"""Dense layers in plain torch: nothing is laid out anew."""

import torch
from torch import Tensor
from torch.nn import functional

from pomona.kernels.linear import GROUP, Layout, PackedWeight, QuantizedWeight, dense, unpack


def pack(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """See ``kernels.linear.pack``."""
    return dense(weight)


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``kernels.linear.packed_linear``. A layout of another backend is undone first: right, but slow.

    Torch has no product of another dtype than its inputs': a wider result is rounded to x's dtype all the same, unless
    the weight is quantized. Then it is dequantized, in every call, and all is computed in float32.
    """
    weight = unpack(packed)
    if packed.scales is not None:
        wide = functional.linear(x.float(), weight, None if bias is None else bias.float())
        return wide.to(out_dtype or x.dtype)
    out = functional.linear(x, weight, bias)
    return out if out_dtype is None else out.to(out_dtype)


def gather_rows(packed: PackedWeight, row_ids: Tensor) -> Tensor:
    """See ``kernels.linear.gather_rows``. Any layout."""
    if packed.layout is Layout.DENSE:
        rows = functional.embedding(row_ids, packed.data)
    else:
        grouped = packed.data[row_ids // GROUP, :, row_ids % GROUP].flatten(1)
        rows = grouped[:, : packed.in_features].contiguous()
    if packed.scales is None:
        return rows
    return (rows * packed.scales[row_ids].unsqueeze(1)).to(packed.dtype)
