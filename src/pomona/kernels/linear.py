"""Dense layers over weights that a backend has laid out for itself, once, when the model was loaded.

``packed = pack(weight)``, then the unpacked copy may be freed, then ``packed_linear(x, packed, bias)`` in every step.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from pomona.kernels.dispatch import backend_for

GROUP = 16
"""Outputs side by side in the grouped layout."""


class Layout(Enum):
    """How ``PackedWeight.data`` holds the weight."""

    DENSE = "dense"
    """[out_features, in_features], as given."""
    GROUPED = "grouped"
    """[groups of 16 outputs, units, 16, elements per unit]: a unit is the 4 bytes that one multiply-add instruction
    takes (one float32 or two bfloat16). Zeros past the last output and the last input."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A dense layer's weight in its backend's layout."""

    data: Tensor
    layout: Layout
    in_features: int
    out_features: int

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype; inputs must have the same."""
        return self.data.dtype

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.data.numel() * self.data.element_size()


def pack(weight: Tensor) -> PackedWeight:
    """Lay a weight out for the backend of its device. A one-time cost of about two copies.

    Args:
        weight: [out_features, in_features]; not changed. The dense layout shares its memory, others do not.
    """
    assert weight.dim() == 2
    assert weight.numel() > 0
    result: PackedWeight = backend_for("linear", weight.device).pack(weight)
    return result


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Semantics: ``x @ weight.T + bias``, accumulated in float32, rounded once.

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
    assert out_dtype in (None, x.dtype, torch.float32)
    result: Tensor = backend_for("linear", x.device).packed_linear(x, packed, bias, out_dtype=out_dtype)
    return result


def dense(weight: Tensor) -> PackedWeight:
    """Wrap a weight [out_features, in_features] as it is."""
    return PackedWeight(weight, Layout.DENSE, in_features=weight.shape[1], out_features=weight.shape[0])


def gather_rows(packed: PackedWeight, row_ids: Tensor) -> Tensor:
    """Semantics: ``weight[row_ids]``, such as the embeddings of tokens.

    Args:
        packed: a weight [out_features, in_features].
        row_ids: int64 [num_rows].

    Returns:
        [num_rows, in_features], freshly allocated.
    """
    if packed.layout is Layout.DENSE:
        return functional.embedding(row_ids, packed.data)
    rows = packed.data[row_ids // GROUP, :, row_ids % GROUP].flatten(1)
    return rows[:, : packed.in_features].contiguous()


def unpack(packed: PackedWeight) -> Tensor:
    """The weight as it was given to ``pack``: [out_features, in_features], bit for bit."""
    if packed.layout is Layout.DENSE:
        return packed.data
    groups, units, _, per_unit = packed.data.shape
    rows = packed.data.permute(0, 2, 1, 3).reshape(groups * GROUP, units * per_unit)
    return rows[: packed.out_features, : packed.in_features].contiguous()
