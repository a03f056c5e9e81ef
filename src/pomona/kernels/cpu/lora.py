"""The adapters' part of a projection by the compiled kernels.

A row's result is the same, bit for bit, whatever shares its batch and on any number of threads.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.kernels.cpu import binding, linear
from pomona.kernels.linear import Layout, PackedWeight
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices
from pomona.kernels.reference import lora as reference

_ROWS_PER_ITEM, _ROWS_PER_SHORT_ITEM = 36, 8
"""Rows of a segment that one thread takes at a time: multiples of the kernels' register blocks; of a short segment no
more than make a short run (kFewRows, native/lora.h)."""
_MOST_SHORT_ROWS = 64
"""Segments of more rows go the long way (native/lora.h): for fewer, what is shared with the product is not worth it."""
_ROWS_PER_TILED_ITEM, _ROWS_PER_SHORT_TILED_ITEM, _MOST_SHORT_TILED_ROWS = 128, 16, 31
"""The same where tile registers do the work: laying the rank rows out as columns is an item's first cost, and rows that
fill a tile of the product are best multiplied there."""

_SHRINK, _EXPAND, _BOTH = 1, 2, 3


@dataclass(frozen=True, eq=False)
class _Site:
    """A site's pages as the library reads them."""

    struct: binding.LoraSite
    address: int
    dtype: int
    num_slices: int
    in_features: int
    out_features: int


@dataclass(frozen=True, eq=False)
class _Step:
    """A step's segments as the library reads them."""

    struct: binding.LoraStep
    address: int
    dtype: int
    blocks: NDArray[np.int32]
    """[num_blocks, 4]: segment, first row, rows, padding; longest first. Owned here, the struct only points to it."""


@dataclass(frozen=True, eq=False)
class _Ranks:
    """Addresses of a site's ranks and scalings."""

    ranks: int
    scalings: int
    is_idle: bool
    """No segment adapts this site."""


def _plan_site(slices: LoraSlices) -> _Site | None:
    """None if the kernels do not do this dtype."""
    first = slices.a[0]
    dtype = binding.DTYPES.get(first.dtype)
    if dtype is None or len(slices.a) > binding.MAX_SLICES:
        return None
    for pages in (*slices.a, *slices.b):
        assert pages.dtype is first.dtype
        assert pages.shape[1] == first.shape[1]
        assert pages.stride()[1:] == (pages.shape[2], 1), "the rank rows of a page must be dense"
    assert all(pages.shape[2] == first.shape[2] for pages in slices.a)
    struct = binding.LoraSite(num_slices=len(slices.a), in_features=first.shape[2], rows_per_page=first.shape[1])
    for index, (a, b) in enumerate(zip(slices.a, slices.b, strict=True)):
        struct.out_features[index] = b.shape[2]
        struct.a[index], struct.b[index] = a.data_ptr(), b.data_ptr()
        struct.a_page_stride[index], struct.b_page_stride[index] = a.stride(0), b.stride(0)
    out_features = sum(pages.shape[2] for pages in slices.b)
    return _Site(struct, binding.address_of(struct), dtype, len(slices.a), first.shape[2], out_features)


def _site_of(slices: LoraSlices) -> _Site | None:
    """The site's plan, made at its first use and kept with it: pages never move."""
    known = slices.__dict__
    if "_cpu_site" not in known:
        known["_cpu_site"] = _plan_site(slices)
    site: _Site | None = known["_cpu_site"]
    return site


def _plan_step(batch: LoraBatch, num_tokens: int, dtype: int) -> _Step:
    is_tiled = binding.uses_tiles(dtype)
    long_item = _ROWS_PER_TILED_ITEM if is_tiled else _ROWS_PER_ITEM
    short_item = _ROWS_PER_SHORT_TILED_ITEM if is_tiled else _ROWS_PER_SHORT_ITEM
    most_short_rows = _MOST_SHORT_TILED_ROWS if is_tiled else _MOST_SHORT_ROWS
    rows = np.array(batch.host_rows, dtype=np.int32).reshape(-1, 2)
    lengths = rows[:, 1] - rows[:, 0]
    sizes = np.where(lengths > most_short_rows, long_item, short_item)
    counts = -(-lengths // sizes)
    segments = np.repeat(np.arange(len(rows)), counts)
    within = (np.arange(len(segments)) - np.repeat(np.cumsum(counts) - counts, counts)) * sizes[segments]
    starts = rows[segments, 0] + within
    num_rows = np.minimum(rows[segments, 1] - starts, sizes[segments])
    blocks = np.stack([segments, starts, num_rows, np.zeros_like(starts)], axis=1).astype(np.int32)
    blocks = np.ascontiguousarray(blocks[np.argsort(-num_rows, kind="stable")])
    tables = batch.page_tables
    assert tables.dtype is torch.int32
    assert tables.is_contiguous()
    assert not len(rows) or 0 <= rows[0, 0] <= rows[-1, 1] <= num_tokens
    shifts = batch.page_shifts
    assert shifts is None or (shifts.dtype is torch.int64 and shifts.is_contiguous() and shifts.shape == tables.shape)
    struct = binding.LoraStep(
        num_segments=len(rows),
        num_blocks=len(blocks),
        max_pages=tables.shape[1] if tables.dim() == 2 else 0,
        max_rank=batch.max_rank,
        num_tokens=num_tokens,
        blocks=blocks.ctypes.data,
        page_tables=tables.data_ptr(),
        page_shifts=None if shifts is None else shifts.data_ptr(),
    )
    return _Step(struct, binding.address_of(struct), dtype, blocks)


def _step_of(batch: LoraBatch, num_tokens: int, dtype: int) -> _Step:
    """The batch's plan, made at its first use and kept with it."""
    step: _Step | None = batch.__dict__.get("_cpu_step")
    if step is None:
        step = batch.__dict__["_cpu_step"] = _plan_step(batch, num_tokens, dtype)
    assert step.struct.num_tokens == num_tokens
    return step


def _ranks_of(ranks: LoraRanks) -> _Ranks:
    """The addresses, looked up at the first use and kept with the ranks."""
    known: _Ranks | None = ranks.__dict__.get("_cpu_ranks")
    if known is None:
        assert ranks.ranks.dtype is torch.int32
        assert ranks.ranks.is_contiguous()
        assert ranks.scalings.dtype is torch.float32
        assert ranks.scalings.is_contiguous()
        assert max((max(of_slice, default=0) for of_slice in ranks.host_ranks), default=0) <= binding.MAX_RANK
        is_idle = not any(any(row) for row in ranks.host_ranks)
        known = _Ranks(ranks.ranks.data_ptr(), ranks.scalings.data_ptr(), is_idle)
        ranks.__dict__["_cpu_ranks"] = known
    return known


def _dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def lora(out: Tensor, x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> None:
    """See ``kernels.lora.lora``: both halves in one call, the intermediate in a buffer that lives on."""
    site, known = _site_of(slices), _ranks_of(ranks)
    if known.is_idle and not binding.is_recording():
        return
    out_strides = out.stride()
    if site is None or out_strides[1] != 1:
        assert batch.page_shifts is None, "only the compiled kernels follow pages elsewhere"
        reference.lora(out, x, slices, ranks, batch)
        return
    x = _dense_rows(x)
    num_tokens, in_features = x.shape
    assert in_features == site.in_features
    assert out.shape == (num_tokens, site.out_features)
    assert binding.DTYPES.get(x.dtype) == binding.DTYPES.get(out.dtype) == site.dtype
    step = _step_of(batch, num_tokens, site.dtype)
    binding.library().pomona_lora(
        *(site.dtype, torch.get_num_threads(), _BOTH, site.address, step.address, known.ranks, known.scalings),
        *(x.data_ptr(), x.stride(0), out.data_ptr(), out_strides[0], None),
    )


def adapted_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch
) -> Tensor:
    """See ``kernels.lora.adapted_linear``: both parts in one native call."""
    site, known = _site_of(slices), _ranks_of(ranks)
    if known.is_idle and not binding.is_recording():
        return linear.packed_linear(x, packed, bias)
    if site is None or packed.layout is not Layout.GROUPED:
        return reference.adapted_linear(x, packed, bias, slices, ranks, batch)
    x = _dense_rows(x)
    num_tokens, in_features = x.shape
    assert in_features == site.in_features
    assert packed.out_features == site.out_features
    assert binding.DTYPES.get(x.dtype) == site.dtype
    out = binding.empty((num_tokens, site.out_features), x.dtype)
    if num_tokens:
        binding.library().pomona_adapted_gemm(
            *linear.gemm_arguments(out, x, packed, bias),
            *(site.address, _step_of(batch, num_tokens, site.dtype).address, known.ranks, known.scalings),
        )
    return out


def lora_shrink(x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> Tensor:
    """See ``kernels.lora.lora_shrink``."""
    site = _site_of(slices)
    if site is None:
        return reference.lora_shrink(x, slices, ranks, batch)
    x = _dense_rows(x)
    num_tokens, in_features = x.shape
    assert in_features == site.in_features
    assert binding.DTYPES.get(x.dtype) == site.dtype
    step, known = _step_of(batch, num_tokens, site.dtype), _ranks_of(ranks)
    v = torch.empty((site.num_slices, num_tokens, batch.max_rank), dtype=torch.float32)
    binding.library().pomona_lora(
        *(site.dtype, torch.get_num_threads(), _SHRINK, site.address, step.address, known.ranks, known.scalings),
        *(x.data_ptr(), x.stride(0), None, 0, v.data_ptr()),
    )
    return v


def lora_expand(v: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch, out: Tensor) -> None:
    """See ``kernels.lora.lora_expand``."""
    site = _site_of(slices)
    if site is None or out.stride(1) != 1:
        reference.lora_expand(v, slices, ranks, batch, out)
        return
    num_tokens = out.shape[0]
    assert v.dtype is torch.float32
    assert v.is_contiguous()
    assert v.shape == (site.num_slices, num_tokens, batch.max_rank)
    assert binding.DTYPES.get(out.dtype) == site.dtype
    assert out.shape[1] == site.out_features
    step, known = _step_of(batch, num_tokens, site.dtype), _ranks_of(ranks)
    binding.library().pomona_lora(
        *(site.dtype, torch.get_num_threads(), _EXPAND, site.address, step.address, known.ranks, known.scalings),
        *(None, 0, out.data_ptr(), out.stride(0), v.data_ptr()),
    )


def reserve(batch: LoraBatch, num_tokens: int) -> None:
    """See ``kernels.lora.reserve``. Nothing to do: segments are planned when a batch is first used."""


def carry_plan(batch: LoraBatch, renewed: LoraBatch) -> None:
    """See ``kernels.lora.renew``. Nothing to do, likewise."""


def can_shift_pages(pool: Tensor) -> bool:
    """See ``kernels.lora.can_shift_pages``."""
    return pool.dtype in binding.DTYPES


def refresh(recorded: LoraBatch, batch: LoraBatch) -> None:
    """Put ``batch`` in place of ``recorded`` for native calls that were recorded with it."""
    step: _Step = recorded.__dict__["_cpu_step"]
    ctypes.memmove(
        step.address, _step_of(batch, step.struct.num_tokens, step.dtype).address, ctypes.sizeof(step.struct)
    )


def addresses(ranks: Sequence[LoraRanks]) -> Iterator[int]:
    """Where the ranks and the scalings of each are, one after the other."""
    for one in ranks:
        known = _ranks_of(one)
        yield known.ranks
        yield known.scalings
