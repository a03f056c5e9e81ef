"""RMS norm in plain torch, with the rounding order of Hugging Face's Llama."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.norm.rms_norm``."""
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse_rms).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.norm.add_rms_norm``."""
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual
