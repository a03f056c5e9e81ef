"""Dense layers by the compiled kernels, over weights in the grouped layout.

Each output is summed over the inputs in order, whatever the number of rows: a row's result is the same, bit for bit,
in any batch and on any number of threads. Over int8 weights it is so on any instruction set too: sums of integers.
"""

import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.host_memory import new_on_huge_pages
from pomona.kernels.linear import GROUP, Layout, PackedWeight, QuantizedWeight
from pomona.kernels.reference import linear as reference

_UNIT_BYTES = 4
_INT8_PER_UNIT = 2


def pack(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """See ``kernels.linear.pack``."""
    dtype = weight.dtype
    if dtype not in binding.DTYPES:
        return reference.pack(weight)
    if isinstance(weight, Tensor):
        out_features, in_features = weight.shape
        data = _grouped(weight, _UNIT_BYTES // dtype.itemsize)
        return PackedWeight(data, Layout.GROUPED, in_features, out_features, dtype)
    out_features, in_features = weight.values.shape
    data = _grouped(weight.values, _INT8_PER_UNIT)
    scales = weight.scales.new_zeros(data.shape[0] * GROUP)
    scales[:out_features] = weight.scales
    return PackedWeight(data, Layout.GROUPED, in_features, out_features, dtype, scales)


def _grouped(weight: Tensor, per_unit: int) -> Tensor:
    """[out_features, in_features] in the grouped layout."""
    out_features, in_features = weight.shape
    groups, units = -(-out_features // GROUP), -(-in_features // per_unit)
    padded = weight
    if (out_features, in_features) != (groups * GROUP, units * per_unit):
        padded = weight.new_zeros((groups * GROUP, units * per_unit))
        padded[:out_features, :in_features] = weight
    data = new_on_huge_pages((groups, units, GROUP, per_unit), weight.dtype)
    return data.copy_(padded.view(groups, GROUP, units, per_unit).permute(0, 2, 1, 3))


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``kernels.linear.packed_linear``."""
    if packed.layout is not Layout.GROUPED:
        return reference.packed_linear(x, packed, bias, out_dtype=out_dtype)
    x = x if x.stride()[1] == 1 else x.contiguous()
    out = binding.empty((x.shape[0], packed.out_features), out_dtype or x.dtype)
    if x.shape[0]:
        binding.library().pomona_gemm(*gemm_arguments(out, x, packed, bias), out_dtype is torch.float32)
    return out


def gemm_arguments(out: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> tuple[int | None, ...]:
    """What native products take first: dtype, threads, x, its rows and stride, weights, scales, bias, out, sizes."""
    dtype = x.dtype
    assert bias is None or (bias.dtype is dtype and bias.is_contiguous())
    return (
        *(binding.DTYPES[dtype], torch.get_num_threads(), x.data_ptr(), x.shape[0], x.stride()[0]),
        *(packed.data.data_ptr(), None if packed.scales is None else packed.scales.data_ptr()),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), packed.in_features, packed.out_features),
    )


def gather_rows(packed: PackedWeight, row_ids: Tensor) -> Tensor:
    """See ``kernels.linear.gather_rows``."""
    dtype = binding.DTYPES.get(packed.dtype)
    if dtype is None or not packed.data.is_contiguous():
        return reference.gather_rows(packed, row_ids)
    assert row_ids.dtype is torch.int64
    assert row_ids.is_contiguous()
    out = binding.empty((row_ids.shape[0], packed.in_features), packed.dtype)
    binding.library().pomona_gather(
        *(dtype, torch.get_num_threads(), packed.data.data_ptr()),
        *(None if packed.scales is None else packed.scales.data_ptr(), row_ids.data_ptr(), out.data_ptr()),
        *(out.shape[0], packed.in_features, packed.layout is Layout.GROUPED),
    )
    return out
