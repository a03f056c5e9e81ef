"""Segmented LoRA in plain torch: one small product per segment and slice, never per row."""

import torch
from torch import Tensor

from pomona.kernels.linear import PackedWeight, packed_linear
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices
from pomona.kernels.lora import lora as add_lora


def _rank_rows(pages: Tensor, batch: LoraBatch, segment: int, lora_rank: int) -> Tensor:
    """The segment's rank rows as float32 [lora_rank, features]: a view where pages stand side by side in memory."""
    rows_per_page = pages.shape[1]
    num_pages = -(-lora_rank // rows_per_page)
    page_ids = batch.host_pages[segment][:num_pages]
    assert len(page_ids) == num_pages, f"rank {lora_rank} needs {num_pages} pages, segment {segment} has {page_ids}"
    first = page_ids[0]
    if num_pages == 1:
        return pages[first, :lora_rank].float()
    if page_ids == tuple(range(first, first + num_pages)):
        rows = pages[first : first + num_pages]
    else:
        rows = pages.index_select(0, batch.page_tables[segment, :num_pages])
    return rows.flatten(0, 1)[:lora_rank].float()


def lora_shrink(x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> Tensor:
    """See ``kernels.lora.lora_shrink``."""
    assert batch.page_shifts is None, "pages elsewhere are for compiled kernels"
    v = x.new_empty((len(slices.a), x.shape[0], batch.max_rank), dtype=torch.float32)
    for segment, (start, end) in enumerate(batch.host_rows):
        if not any(of_slice[segment] for of_slice in ranks.host_ranks):
            continue
        rows = x[start:end].float()
        for index, pages in enumerate(slices.a):
            lora_rank = ranks.host_ranks[index][segment]
            if lora_rank > 0:
                v[index, start:end, :lora_rank] = rows @ _rank_rows(pages, batch, segment, lora_rank).T
    return v


def lora_expand(v: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch, out: Tensor) -> None:
    """See ``kernels.lora.lora_expand``."""
    column = 0
    for index, pages in enumerate(slices.b):
        width = pages.shape[2]
        for segment, (start, end) in enumerate(batch.host_rows):
            lora_rank = ranks.host_ranks[index][segment]
            if lora_rank == 0:
                continue
            target = out[start:end, column : column + width]
            shrunk = v[index, start:end, :lora_rank]
            expanded = _rank_rows(pages, batch, segment, lora_rank)
            scaling = ranks.host_scalings[index][segment]
            if out.dtype == torch.float32:
                target.addmm_(shrunk, expanded, alpha=scaling)
            else:
                target.copy_(torch.addmm(target.float(), shrunk, expanded, alpha=scaling))
        column += width


def lora(out: Tensor, x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> None:
    """See ``kernels.lora.lora``."""
    assert out.shape == (x.shape[0], sum(b.shape[2] for b in slices.b)), "out must hold all slices"
    if any(any(of_slice) for of_slice in ranks.host_ranks):
        lora_expand(lora_shrink(x, slices, ranks, batch), slices, ranks, batch, out)


def adapted_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch
) -> Tensor:
    """See ``kernels.lora.adapted_linear``: one after the other, each by its own backend."""
    out = packed_linear(x, packed, bias)
    add_lora(out, x, slices, ranks, batch)
    return out


def can_shift_pages(pool: Tensor) -> bool:
    """See ``kernels.lora.can_shift_pages``."""
    return False


def reserve(batch: LoraBatch, num_tokens: int) -> None:
    """See ``kernels.lora.reserve``. Nothing to do: segments are read from the host numbers."""


def carry_plan(batch: LoraBatch, renewed: LoraBatch) -> None:
    """See ``kernels.lora.renew``. Nothing to do, likewise."""
