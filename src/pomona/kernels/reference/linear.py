"""Dense layers in plain torch: nothing is laid out anew."""

from torch import Tensor
from torch.nn import functional

from pomona.kernels.linear import PackedWeight, dense, unpack


def pack(weight: Tensor) -> PackedWeight:
    """See ``kernels.linear.pack``."""
    return dense(weight)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See ``kernels.linear.packed_linear``. A layout of another backend is undone first: right, but slow."""
    return functional.linear(x, unpack(packed), bias)
