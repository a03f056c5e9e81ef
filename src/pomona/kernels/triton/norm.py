"""RMS norm on a GPU: one program per row, which stays in registers between the two passes."""

import torch
from torch import Tensor

from pomona.kernels.reference import norm as reference
from pomona.kernels.triton.configs import config_for
from pomona.kernels.triton.launch import Launch
from pomona.kernels.triton.row_kernels import rms_norm_kernel


def norm_launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Launch:
    """One norm of all rows.

    Args:
        x: [num_outer, features] or [num_outer, num_inner, features], features dense.
        residual: [num_outer, features], contiguous, changed in place; None for none.
        weight: [features].
        eps: added to the mean square.
        out: like x, contiguous; may be x.
    """
    features = x.shape[-1]
    num_inner = x.shape[1] if x.dim() == 3 else 1
    config = config_for("norm", x.device, features=features)
    return Launch(
        kernel=rms_norm_kernel,
        grid=(x.shape[0] * num_inner,),
        args=(
            *(x, out if residual is None else residual, weight, out),
            *(num_inner, x.stride(0), x.stride(1) if x.dim() == 3 else 0, eps),
        ),
        constants={
            "FEATURES": features,
            "BLOCK": 1 << (features - 1).bit_length(),
            "HAS_RESIDUAL": residual is not None,
        },
        num_warps=config["num_warps"],
        num_stages=1,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kernels.norm.rms_norm``."""
    if x.dim() not in (2, 3) or not weight.is_contiguous():
        return reference.rms_norm(x, weight, eps)
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_launch(x, None, weight, eps, out).run()
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``kernels.norm.add_rms_norm``. Overwrites both: x with the normalized rows, residual with the sum."""
    if x.dim() != 2 or not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()):
        return reference.add_rms_norm(x, residual, weight, eps)
    assert residual.dtype is x.dtype
    assert residual.shape == x.shape
    norm_launch(x, residual, weight, eps, x).run()
    return x, residual
