"""Pages read elsewhere give what the pool's own would, bit for bit; the pool's are poisoned, and not read."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import use_backend
from pomona.kernels.linear import pack
from pomona.kernels.lora import (
    LoraBatch,
    LoraRanks,
    LoraSlices,
    adapted_linear,
    can_shift_pages,
    lora,
    lora_expand,
    lora_shrink,
    shift_pages,
)

NAN = float("nan")
IN_FEATURES, WIDTHS, ROWS_PER_PAGE = 48, (32, 16), 4
PAGE_ELEMS = ROWS_PER_PAGE * (len(WIDTHS) * IN_FEATURES + sum(WIDTHS))
NUM_PAGES = 20
PAGES = ((7, 3, 4), (9,), (1, 2))
RANKS = ((9, 4, 8), (12, 3, 0))
needs_kernels = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)


def slices_of(pages: Tensor) -> LoraSlices:
    views: list[list[Tensor]] = [[], []]
    offset = pages.storage_offset()
    for width in WIDTHS:
        for side, features in enumerate((IN_FEATURES, width)):
            shape = (pages.shape[0], ROWS_PER_PAGE, features)
            views[side].append(pages.as_strided(shape, (pages.stride(0), features, 1), offset))
            offset += ROWS_PER_PAGE * features
    return LoraSlices(a=tuple(views[0]), b=tuple(views[1]))


def make_step(lengths: tuple[int, int, int]) -> tuple[LoraBatch, LoraRanks]:
    """Three segments, with a row of the base after each."""
    starts = [0, lengths[0] + 1, lengths[0] + lengths[1] + 2]
    rows = tuple((start, start + length) for start, length in zip(starts, lengths, strict=True))
    tables = torch.zeros(3, 4, dtype=torch.int32)
    for segment, page_ids in enumerate(PAGES):
        tables[segment, : len(page_ids)] = torch.tensor(page_ids)
    bounds = torch.tensor(rows, dtype=torch.int32)
    batch = LoraBatch(bounds[:, 0].contiguous(), bounds[:, 1].contiguous(), tables, rows, PAGES, max_rank=12)
    scalings = ((0.5, 1.0, 2.0), (1.5, -1.0, 1.0))
    return batch, LoraRanks(torch.tensor(RANKS, dtype=torch.int32), torch.tensor(scalings), RANKS, scalings)


@needs_kernels
@pytest.mark.parametrize("isa", binding.available_isas())
@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 9, 3), (14, 40, 7), (100, 1, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_elsewhere_are_read_instead_of_the_pool_s(dtype, lengths, isa):
    num_tokens = sum(lengths) + 3
    pool = (torch.randn(NUM_PAGES, PAGE_ELEMS + 5) / 4).to(dtype)[:, 2 : 2 + PAGE_ELEMS]
    # One segment in a tensor as it comes, one in a wider one with a page to spare, one in the pool.
    hosts = (pool[list(PAGES[0])].clone(), torch.full((2, PAGE_ELEMS + 9), NAN, dtype=dtype)[:, 9:], None)
    hosts[1][:1] = pool[list(PAGES[1])]
    poisoned = pool.clone()
    poisoned[list(PAGES[0] + PAGES[1])] = NAN
    x = torch.randn(num_tokens, IN_FEATURES).to(dtype)
    packed = pack(torch.randn(sum(WIDTHS), IN_FEATURES).to(dtype))
    batch, ranks = make_step(lengths)
    results = []
    with binding.use_isa(isa):
        for pages, instead in ((pool, None), (poisoned, hosts)):
            step = replace(batch) if instead is None else shift_pages(batch, pages, instead)
            slices, added = slices_of(pages), torch.ones(num_tokens, sum(WIDTHS), dtype=dtype)
            lora(added, x, slices, ranks, step)
            in_halves = torch.ones_like(added)
            lora_expand(lora_shrink(x, slices, ranks, step), slices, ranks, step, in_halves)
            results.append((added, in_halves, adapted_linear(x, packed, None, slices, ranks, step)))
    for expected, found in zip(*results, strict=True):
        assert not torch.equal(expected[0], expected[lengths[0]]), "the adapters do something"
        assert torch.equal(found, expected)


@needs_kernels
def test_only_compiled_kernels_read_elsewhere():
    assert can_shift_pages(torch.zeros(1, 8))
    assert not can_shift_pages(torch.zeros(1, 8, dtype=torch.float16))
    with use_backend("reference"):
        assert not can_shift_pages(torch.zeros(1, 8))
        batch, ranks = make_step((1, 1, 1))
        pool = torch.randn(NUM_PAGES, PAGE_ELEMS)
        shifted = shift_pages(batch, pool, (pool.clone(), None, None))
        with pytest.raises(AssertionError, match="compiled kernels"):
            lora(torch.zeros(6, sum(WIDTHS)), torch.ones(6, IN_FEATURES), slices_of(pool), ranks, shifted)
