"""Dense layers in plain torch: nothing is laid out anew."""

import torch
from torch import Tensor
from torch.nn import functional

from pomona.kernels.linear import PackedWeight, dense, unpack


def pack(weight: Tensor) -> PackedWeight:
    """See ``kernels.linear.pack``."""
    return dense(weight)


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``kernels.linear.packed_linear``. A layout of another backend is undone first: right, but slow.

    Torch has no product of another dtype than its inputs': a wider result is rounded to x's dtype all the same.
    """
    out = functional.linear(x, unpack(packed), bias)
    return out if out_dtype is None else out.to(out_dtype)
