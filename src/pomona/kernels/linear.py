"""Dense layers over weights that a backend has laid out for itself, once, when the model was loaded.

``packed = pack(weight)``, then the unpacked copy may be freed, then ``packed_linear(x, packed, bias)`` in every step.
``pack(quantize(weight))`` stores a byte per weight instead; inputs and outputs keep their dtype.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from pomona.kernels.dispatch import backend_for

GROUP = 16
"""Outputs side by side in the grouped layout."""
INT8_MAX = 127
"""Largest magnitude of a quantized weight; -128 is not used, so that the range is symmetric."""

_ROWS_AT_ONCE = 4096
"""Rows of a weight that are quantized or compared at a time: bounds the float32 copies."""


class Layout(Enum):
    """How ``PackedWeight.data`` holds the weight."""

    DENSE = "dense"
    """[out_features, in_features], as given."""
    GROUPED = "grouped"
    """[groups of 16 outputs, units, 16, elements per unit]: a unit is the 4 bytes that one multiply-add instruction
    takes (one float32 or two bfloat16), or two int8, which become two int16. Zeros past the last output and the last
    input."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """int8 values with one scale per output: the weight is ``values * scales[:, None]``, exactly, in float32."""

    values: Tensor
    """int8 [out_features, in_features], from -127 to 127."""
    scales: Tensor
    """float32 [out_features]."""
    dtype: torch.dtype
    """Of the weight it was made from, hence of inputs and outputs."""

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features]: the weights that are served."""
        return self.values.float().mul_(self.scales.unsqueeze(1))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A dense layer's weight in its backend's layout."""

    data: Tensor
    layout: Layout
    in_features: int
    out_features: int
    dtype: torch.dtype
    """Of inputs; ``data`` is of the same, or int8."""
    scales: Tensor | None = None
    """float32, one per output (and zeros up to a whole group in the grouped layout) if ``data`` is int8; else None."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def quantize(weight: Tensor) -> QuantizedWeight:
    """Round a weight to int8, symmetrically, with a scale per output.

    Semantics: ``scale = max |row| / 127``; ``value = row / scale``, rounded to the nearest. No weight moves by more
    than half its scale. A row that is not finite has a scale that is not, and is served so.

    Args:
        weight: [out_features, in_features], float32, float16 or bfloat16; not changed.
    """
    assert weight.dim() == 2
    assert weight.numel() > 0
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE].float()
        scale = (rows.abs().amax(1) / INT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (rows / scale.unsqueeze(1)).round_().nan_to_num_(0.0).clamp_(-INT8_MAX, INT8_MAX)
        values[start : start + _ROWS_AT_ONCE] = rounded
        scales[start : start + _ROWS_AT_ONCE] = scale
    return QuantizedWeight(values, scales, weight.dtype)


def pack(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """Lay a weight out for the backend of its device. A one-time cost of about two copies.

    Args:
        weight: [out_features, in_features]; not changed. The dense layout shares its memory, others do not.
    """
    matrix = weight.values if isinstance(weight, QuantizedWeight) else weight
    assert matrix.dim() == 2
    assert matrix.numel() > 0
    result: PackedWeight = backend_for("linear", matrix.device).pack(weight)
    return result


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Semantics: ``x @ weight.T + bias``, accumulated in float32, rounded once.

    Quantized: ``(x @ values.T) * scales + bias``. In the grouped layout x is rounded to fixed point, in blocks of 256
    inputs: a bfloat16 that is less than 1/128 of its block's largest magnitude moves by at most 2^-15 of that, a
    float32 less than 1/64 by at most 2^-30, others do not move (blocks below 2^-96 count as if they were that large).
    Sums of a block are exact. A row with a NaN or an infinity gives values that are not finite.

    Args:
        x: [num_rows, in_features], packed.dtype.
        packed: of any layout that ``pack`` makes.
        bias: [out_features], packed.dtype.
        out_dtype: float32 for results that need not be rounded to x's dtype, such as logits (a backend may round them
            all the same); None is x's dtype.

    Returns:
        [num_rows, out_features], contiguous.
    """
    assert x.shape[1] == packed.in_features
    assert x.dtype is packed.dtype
    assert out_dtype in (None, x.dtype, torch.float32)
    result: Tensor = backend_for("linear", x.device).packed_linear(x, packed, bias, out_dtype=out_dtype)
    return result


def dense(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """Wrap a weight [out_features, in_features] as it is."""
    scales = None
    data = weight
    if isinstance(weight, QuantizedWeight):
        data, scales = weight.values, weight.scales
    assert isinstance(data, Tensor)
    return PackedWeight(data, Layout.DENSE, data.shape[1], data.shape[0], weight.dtype, scales)


def gather_rows(packed: PackedWeight, row_ids: Tensor) -> Tensor:
    """Semantics: ``weight[row_ids]``, such as the embeddings of tokens; quantized ones are rounded to packed.dtype.

    Args:
        packed: a weight [out_features, in_features].
        row_ids: int64 [num_rows].

    Returns:
        [num_rows, in_features], packed.dtype, freshly allocated.
    """
    result: Tensor = backend_for("linear", row_ids.device).gather_rows(packed, row_ids)
    return result


def unpack(packed: PackedWeight, rows: slice = slice(None)) -> Tensor:
    """The weight as it was given to ``pack``: [out_features, in_features], bit for bit; or consecutive rows of it.

    Of a quantized weight, what is served instead of the original: float32, dequantized.
    """
    matrix = _matrix(packed, rows)
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


def _matrix(packed: PackedWeight, rows: slice) -> Tensor | QuantizedWeight:
    """Rows of what was given to ``pack``."""
    start, stop, _ = rows.indices(packed.out_features)
    if packed.layout is Layout.DENSE:
        matrix = packed.data[start:stop]
    else:
        first = start // GROUP
        data = packed.data[first : -(-stop // GROUP)]
        units = data.view(torch.int16 if packed.scales is not None else torch.int32).squeeze(3)
        in_order = units.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1).view(data.dtype)
        matrix = in_order[start - first * GROUP : stop - first * GROUP, : packed.in_features].contiguous()
    if packed.scales is None:
        return matrix
    return QuantizedWeight(matrix, packed.scales[start:stop], packed.dtype)


def is_served_as(weight: Tensor, packed: PackedWeight) -> bool:
    """True if ``packed`` is what this weight [out_features, in_features] becomes in the same precision."""
    for start in range(0, packed.out_features, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = weight[rows].to(device=packed.data.device, dtype=packed.dtype)
        if not torch.equal(part if packed.scales is None else quantize(part).dequantize(), unpack(packed, rows)):
            return False
    return True
