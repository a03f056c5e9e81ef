"""An adapter pays for its own rank: what a rank-128 adapter costs beside rank-4 ones, counted in rank rows and FLOPs.

The reference's FLOPs are counted by torch. What Triton's kernels read is counted under its interpreter, load by load.
The compiled CPU kernels read whatever they read without being seen: there, rows past an adapter's rank and pages of
other adapters are NaN, in ``test_lora_grid``; the time it takes is in ``benchmarks.step`` ("r128 among r4").
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import SequenceWork, lora_cost, step_cost
from benchmarks.shapes import TINY
from pomona.kernels.dispatch import backends_of, use_backend
from pomona.kernels.lora import lora
from pomona.kernels.triton.configs import use_configs
from support.kernel_cases import Adapters, Segment, make_adapters

IN_FEATURES, WIDTH = 32, 16
ROWS_PER_PAGE = 4
SMALL, LARGE = [4] * 4, [128] + [4] * 3
TILES = {
    "lora": {"rows_per_chunk": 16},
    "lora_shrink": {"block_k": 32, "max_block_r": 16, "max_splits": 1, "num_warps": 4, "num_stages": 1},
    "lora_expand": {"block_n": 16, "max_block_r": 16, "num_warps": 4, "num_stages": 1},
}


def _case(ranks: list[int]) -> tuple[Adapters, list[Segment]]:
    """One row for each adapter."""
    adapters = make_adapters([[r] for r in ranks], in_features=IN_FEATURES, widths=[WIDTH], rows_per_page=ROWS_PER_PAGE)
    return adapters, [Segment(row, row + 1, row) for row in range(len(ranks))]


def _run(adapters: Adapters, segments: list[Segment]) -> None:
    x, out = torch.randn(len(segments), IN_FEATURES), torch.randn(len(segments), WIDTH)
    batch, ranks = adapters.batch(segments)
    lora(out, x, adapters.slices, ranks, batch)


def _addmm_flops(out: Sequence[int], a: Sequence[int], b: Sequence[int], **options: object) -> int:
    """Of shapes; torch counts addmm but not its in-place form."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("ranks", [SMALL, LARGE, [128] * 4], ids=str)
def test_the_reference_computes_what_the_formula_says_and_no_more(ranks: list[int]) -> None:
    adapters, segments = _case(ranks)
    in_place = {torch.ops.aten.addmm_: _addmm_flops}
    with use_backend("reference"), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        _run(adapters, segments)
    assert counter.get_total_flops() == lora_cost([(1, r) for r in ranks], IN_FEATURES, WIDTH).flops


@contextmanager
def _counting_loads(pool: Tensor) -> Iterator[list[int]]:
    """Count the elements of a page pool that interpreted kernels load; one entry per load that touches it."""
    from triton.runtime.interpreter import InterpreterBuilder

    first, counts = pool.untyped_storage().data_ptr(), list[int]()
    end = first + pool.untyped_storage().nbytes()
    original = InterpreterBuilder.create_masked_load

    def load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        addresses = pointers.data[mask.data.astype(bool)]
        counts.append(int(((addresses >= first) & (addresses < end)).sum()))
        return original(builder, pointers, mask, *rest, **named)

    InterpreterBuilder.create_masked_load = load
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load = original


@pytest.mark.skipif("triton" not in backends_of("lora"), reason="no Triton here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels cannot be watched")
@pytest.mark.parametrize("ranks", [SMALL, LARGE], ids=str)
def test_triton_reads_each_adapter_s_own_rank_rows_once(ranks: list[int]) -> None:
    adapters, segments = _case(ranks)
    with use_backend("triton"), use_configs(**TILES), _counting_loads(adapters.slices.a[0]) as counts:
        _run(adapters, segments)
    assert sum(counts) == sum(ranks) * (IN_FEATURES + WIDTH)


def test_adapters_take_pages_for_their_own_rank() -> None:
    """128 + 3 * 4 rank rows, not 4 * 128: what a step can read at most."""
    adapters, segments = _case(LARGE)
    batch, _ = adapters.batch(segments)
    assert [len(pages) * ROWS_PER_PAGE for pages in batch.host_pages] == LARGE


def test_the_formula_of_a_step_counts_the_same_rank_rows() -> None:
    def extra(ranks: list[int]) -> float:
        sequences = [SequenceWork(1, 160, adapter) for adapter in range(len(ranks))]
        with_adapters, base = step_cost(TINY, sequences, ranks), step_cost(TINY, [SequenceWork(1, 160)] * len(ranks))
        return (with_adapters - base).bytes

    of_one_row = 2 * TINY.lora_parameters(1)
    assert extra([4] * 32) == 32 * 4 * of_one_row
    assert extra([128] + [4] * 31) - extra([4] * 32) == (128 - 4) * of_one_row
