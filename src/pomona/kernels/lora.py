"""The adapters' part of a projection, for rows of many adapters and of none, at each adapter's own rank.

    out[rows of segment s, slice i] += scaling[i, s] * (x[rows] @ A[i, s].T) @ B[i, s]

A *segment* is a run of rows that use the same adapter; rows outside every segment use none and are never touched.
A *slice* is one target of a fused projection (q, k, v side by side in ``out``). A and B live in *pages*: fixed numbers
of rank rows, so an adapter of rank r occupies ceil(r / rows_per_page) pages anywhere in the pool (Punica's SGMV
contract, arXiv 2310.18547 section 4, widened by S-LoRA's own-rank paging, arXiv 2311.03285 section 5).

Sums are float32 in both halves. Between them a backend may round ``x @ A.T`` to the model's dtype, once, as peft does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pomona.kernels.dispatch import backend_for
from pomona.kernels.linear import PackedWeight


@dataclass(frozen=True)
class LoraBatch:
    """Segments of one step, built once and used by every layer.

    Host copies stand beside device tensors so that neither planning nor a backend's loop ever reads the device.
    """

    starts: Tensor
    """int32 [num_segments]: first row."""
    ends: Tensor
    """int32 [num_segments]: one past the last row; segments are ordered and do not overlap."""
    page_tables: Tensor
    """int32 [num_segments, max_pages]: the adapter's pages in order; padding is 0 and never read."""
    host_rows: tuple[tuple[int, int], ...]
    """(start, end) per segment."""
    host_pages: tuple[tuple[int, ...], ...]
    """Pages per segment, without padding."""
    max_rank: int
    """Largest rank of any segment and slice; the width of the intermediate."""
    page_shifts: Tensor | None = None
    """int64 [num_segments, max_pages]: how many bytes from each page of the tables it is read instead, A and B of every
    slice alike; 0 for where it is. None: all are. Made by ``shift_pages``."""


@dataclass(frozen=True)
class LoraSlices:
    """Adapter weights of one site: views into the page pool, one entry per slice.

    ``a[i]`` is [num_pages, rows_per_page, in_features] and ``b[i]`` [num_pages, rows_per_page, out_features_i]; both
    may have any page stride; the last two dimensions are dense.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]


@dataclass(frozen=True)
class LoraRanks:
    """Rank and scaling of every segment at one site."""

    ranks: Tensor
    """int32 [num_slices, num_segments]; 0 where the adapter does not adapt this slice."""
    scalings: Tensor
    """float32 [num_slices, num_segments]."""
    host_ranks: tuple[tuple[int, ...], ...]
    """[num_slices][num_segments], the same numbers."""
    host_scalings: tuple[tuple[float, ...], ...]


def reserve(batch: LoraBatch, num_tokens: int) -> None:
    """Give the batch's plan room for any segments of so many rows. To be called before its ops are captured into a
    graph; with the host ranks of every site above 0, and ``max_rank`` and the page tables as wide as they may get.

    Args:
        batch: its tensors are the ones that will be captured.
        num_tokens: rows of every step that will replay the graph.
    """
    backend_for("lora", batch.page_tables.device).reserve(batch, num_tokens)


def renew(batch: LoraBatch, host_rows: Sequence[tuple[int, int]], host_pages: Sequence[tuple[int, ...]]) -> LoraBatch:
    """The same tensors as another step's segments. A plan that was reserved is filled in anew, in place and in stream
    order, so that a replayed graph works on the new segments; the tensors themselves are for the caller to refill.

    Args:
        batch: reserved, or renewed since.
        host_rows: (start, end) per row of the page tables; those without a segment are empty and come last.
        host_pages: pages per row of the page tables.
    """
    renewed = replace(batch, host_rows=tuple(host_rows), host_pages=tuple(host_pages))
    backend_for("lora", batch.page_tables.device).carry_plan(batch, renewed)
    return renewed


def can_shift_pages(pool: Tensor) -> bool:
    """True if ``shift_pages`` may be used for this pool: its backend reads the memory of the host."""
    result: bool = backend_for("lora", pool.device).can_shift_pages(pool)
    return result


def shift_pages(batch: LoraBatch, pool: Tensor, instead: Sequence[Tensor | None]) -> LoraBatch:
    """The same segments, some of whose pages are read elsewhere.

    Args:
        batch: segments of the pool.
        pool: [num_pages, page_elems], of which all slices are views; ``can_shift_pages``.
        instead: per segment, pages [n, page_elems] laid out like those of the pool, at least as many as the segment
            has; None for the pool's own. The caller keeps them while the result is used.
    """
    shifts = np.zeros(tuple(batch.page_tables.shape), dtype=np.int64)
    page_bytes, elem_bytes = pool.stride(0) * pool.element_size(), pool.element_size()
    for segment, pages in enumerate(instead):
        if pages is None or not batch.host_pages[segment]:
            continue
        assert pages.dtype is pool.dtype
        assert pages.shape[1] == pool.shape[1]
        assert pages.stride(1) == pool.stride(1) == 1
        page_ids = np.array(batch.host_pages[segment], dtype=np.int64)
        assert len(page_ids) <= pages.shape[0]
        there = pages.data_ptr() + np.arange(len(page_ids)) * (pages.stride(0) * elem_bytes)
        shifts[segment, : len(page_ids)] = there - (pool.data_ptr() + page_ids * page_bytes)
    return replace(batch, page_shifts=torch.from_numpy(shifts))


def lora_shrink(x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> Tensor:
    """Semantics: ``v[i, row, :r] = x[row] @ A[i, s].T`` for the row's segment s and its rank r.

    Args:
        x: [num_tokens, in_features], the model's dtype.
        slices: pages of A (and B) for this site, same dtype as x.
        ranks: rank per slice and segment.
        batch: the step's segments.

    Returns:
        float32 [num_slices, num_tokens, batch.max_rank]. Entries outside a segment, or at or past its rank, are
        unspecified: expand never reads them.
    """
    result: Tensor = backend_for("lora", x.device).lora_shrink(x, slices, ranks, batch)
    return result


def lora_expand(v: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch, out: Tensor) -> None:
    """Semantics: ``out[row, slice i] += scaling[i, s] * v[i, row, :r] @ B[i, s]``, accumulated in float32.

    Args:
        v: the result of ``lora_shrink`` with the same batch.
        slices: pages of B for this site.
        ranks: rank and scaling per slice and segment.
        batch: the step's segments.
        out: [num_tokens, sum of out_features], changed in place; rows outside segments are not touched.
    """
    backend_for("lora", out.device).lora_expand(v, slices, ranks, batch, out)


def lora(out: Tensor, x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> None:
    """Shrink then expand: ``out += lora(x)`` in place. Does nothing for a site that no segment adapts."""
    backend_for("lora", out.device).lora(out, x, slices, ranks, batch)


def adapted_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch
) -> Tensor:
    """Semantics: ``lora(packed_linear(x, packed, bias), x, ...)``; a backend may overlap the two. Bit for bit, but with
    tile registers (``kernels.cpu``, instruction set ``amx``), which add the adapters' part before they round.

    Args:
        x: [num_tokens, in_features], packed.dtype.
        packed: the base's weight.
        bias: the base's [sum of out_features], or None.
        slices: pages of the site that ``packed`` is the base of.
        ranks: rank and scaling per slice and segment.
        batch: the step's segments.

    Returns:
        [num_tokens, sum of out_features], contiguous.
    """
    result: Tensor = backend_for("lora", x.device).adapted_linear(x, packed, bias, slices, ranks, batch)
    return result
