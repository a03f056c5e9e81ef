"""RMS norm by the compiled kernels: one pass that adds and squares, one that scales."""

import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.norm.rms_norm``."""
    dtype = binding.DTYPES.get(x.dtype)
    if dtype is None or x.dim() not in (2, 3):
        return reference.rms_norm(x, weight, eps)
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    assert weight.dtype is x.dtype
    assert weight.is_contiguous()
    shape = x.shape
    out = binding.empty(shape, x.dtype)
    is_3d = len(shape) == 3
    binding.library().pomona_norm(
        dtype,
        torch.get_num_threads(),
        x.data_ptr(),
        None,
        weight.data_ptr(),
        out.data_ptr(),
        shape[0],
        shape[1] if is_3d else 1,
        strides[0],
        strides[1] if is_3d else 0,
        shape[-1],
        eps,
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.norm.add_rms_norm``. Overwrites both: x with the normalized rows, residual with the sum."""
    dtype = binding.DTYPES.get(x.dtype)
    if dtype is None or x.dim() != 2 or not (x.is_contiguous() and residual.is_contiguous()):
        return reference.add_rms_norm(x, residual, weight, eps)
    assert residual.dtype is x.dtype
    assert residual.shape == x.shape
    assert weight.dtype is x.dtype
    assert weight.is_contiguous()
    num_tokens, features = x.shape
    address = x.data_ptr()
    binding.library().pomona_norm(
        dtype,
        torch.get_num_threads(),
        address,
        residual.data_ptr(),
        weight.data_ptr(),
        address,
        num_tokens,
        1,
        features,
        0,
        features,
        eps,
    )
    return x, residual
