"""Segmented LoRA in Triton: every tiling, chunks and splits, and launches that outlive the adapters of a step."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels import test_lora
from kernels.test_lora import IN_FEATURES, WIDTHS, Case, make_case
from pomona.kernels.dispatch import use_backend
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices, lora, lora_expand, lora_shrink
from pomona.kernels.triton.configs import use_configs
from pomona.kernels.triton.lora import plan_launches
from pomona.kernels.triton.lora_plan import cut_segments, max_chunks, plan_of, refresh_plan, reserve_plan
from support.tolerances import assert_close

SMALL_TILES = {
    "lora": {"rows_per_chunk": 16},
    "lora_shrink": {"block_k": 16, "max_block_r": 16, "max_splits": 2, "num_warps": 4, "num_stages": 2},
    "lora_expand": {"block_n": 16, "max_block_r": 16, "num_warps": 4, "num_stages": 1},
}


def _tiles(**changes: dict[str, int]) -> dict[str, dict[str, int]]:
    return {op: {**config, **changes.get(op, {})} for op, config in SMALL_TILES.items()}


@pytest.fixture(autouse=True)
def _triton_in_poisoned_memory():
    """What the backend allocates starts as NaN, so that anything it reads without having written it shows."""
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def _check(case: Case) -> Tensor:
    out = torch.randn(case.x.shape[0], sum(WIDTHS)).to(case.x.dtype)
    expected = case.expected(out)
    lora(out, case.x, case.slices, case.ranks, case.batch)
    assert_close(out, expected)
    return out


@pytest.mark.parametrize(
    "tiles",
    [
        {},
        {"lora_shrink": {"max_splits": 1}},
        {"lora_shrink": {"max_splits": 64}},
        {"lora_shrink": {"block_k": 32, "max_block_r": 64}, "lora_expand": {"block_n": 32, "max_block_r": 64}},
        {"lora_shrink": {"max_block_r": 64}},
        {"lora_expand": {"max_block_r": 32}},
        {"lora_expand": {"max_block_r": 64}},
        {"lora": {"rows_per_chunk": 32}},
    ],
    ids=str,
)
@pytest.mark.parametrize("rank_kind, num_rows", [("mixed", 7), (20, 36)], ids=str)
def test_no_tiling_changes_the_result(tiles: dict[str, dict[str, int]], rank_kind: int | str, num_rows: int) -> None:
    case = make_case(rank_kind=rank_kind, num_rows=num_rows, popularity="skewed", base_rows="none")
    with use_configs(**_tiles(**tiles)):
        _check(case)


@pytest.mark.parametrize("max_splits", [1, 2, 3])
def test_features_that_are_multiples_of_the_tiles_need_no_masks(
    max_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_lora, "IN_FEATURES", 48)
    monkeypatch.setattr(test_lora, "WIDTHS", (48, 16, 32))
    case = make_case(rank_kind=20, num_rows=7, popularity="skewed")
    whole = torch.randn(9, 100)
    before, out = whole.clone(), whole[1:8, :96]
    expected = case.expected(out)
    with use_configs(**_tiles(lora_shrink={"max_splits": max_splits})):
        for launch in plan_launches(out, case.x, case.slices, case.ranks, case.batch):
            assert launch.constants.get("IS_EVEN_K", launch.constants.get("IS_EVEN_N"))
            launch.run()
    assert_close(out, expected)
    whole[1:8, :96] = before[1:8, :96]
    assert torch.equal(whole, before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows, popularity", [(256, "distinct"), (1024, "zipf"), (1024, "identical")])
def test_large_batches_of_up_to_256_adapters(num_rows: int, popularity: str, dtype: torch.dtype) -> None:
    _check(make_case(dtype=dtype, rank_kind="mixed", num_rows=num_rows, popularity=popularity))


def test_splits_of_the_standalone_shrink_are_added_up() -> None:
    case = make_case(rank_kind="mixed", num_rows=5, popularity="distinct")
    out = torch.randn(5, sum(WIDTHS))
    expected = case.expected(out)
    with use_configs(**SMALL_TILES):
        v = lora_shrink(case.x, case.slices, case.ranks, case.batch)
        assert v.shape == (len(WIDTHS), 5, case.batch.max_rank)
        lora_expand(v, case.slices, case.ranks, case.batch, out)
    assert_close(out, expected)


def test_rows_of_x_and_out_may_lie_apart_or_across() -> None:
    case = make_case(rank_kind=4, num_rows=5, popularity="distinct")
    apart = torch.full((5, 2 * case.x.shape[1]), float("nan"))
    apart[:, : case.x.shape[1]] = case.x
    for x in (apart[:, : case.x.shape[1]], case.x.T.contiguous().T):
        for out in (torch.randn(5, sum(WIDTHS) + 3)[:, :-3], torch.randn(sum(WIDTHS), 5).T):
            expected = case.expected(out)
            lora(out, x, case.slices, case.ranks, case.batch)
            assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_gets_the_same_bits_as_in_company(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, rank_kind=20, num_rows=6, popularity="skewed", base_rows="none")
    together = torch.randn(6, sum(WIDTHS)).to(dtype)
    alone = together.clone()
    with use_configs(**_tiles(lora_shrink={"max_splits": 3})):
        lora(together, case.x, case.slices, case.ranks, case.batch)
        for segment, row in ((0, 0), (1, 3), (2, 5)):
            batch = LoraBatch(
                starts=torch.tensor([0], dtype=torch.int32),
                ends=torch.tensor([1], dtype=torch.int32),
                page_tables=case.batch.page_tables[segment : segment + 1].clone(),
                host_rows=((0, 1),),
                host_pages=(case.batch.host_pages[segment],),
                max_rank=case.batch.max_rank,
            )
            ranks = replace(
                case.ranks,
                ranks=case.ranks.ranks[:, segment : segment + 1].clone(),
                scalings=case.ranks.scalings[:, segment : segment + 1].clone(),
                host_ranks=tuple((of_slice[segment],) for of_slice in case.ranks.host_ranks),
                host_scalings=tuple((of_slice[segment],) for of_slice in case.ranks.host_scalings),
            )
            lora(alone[row : row + 1], case.x[row : row + 1], case.slices, ranks, batch)
            assert torch.equal(alone[row], together[row])


class Captured:
    """What a CUDA graph keeps: launches with the tensors they were given. Filled in and run for step after step."""

    def __init__(self, num_tokens: int, pool: LoraSlices, max_pages: int) -> None:
        shape = (len(WIDTHS), num_tokens)
        self.batch = LoraBatch(
            starts=torch.zeros(num_tokens, dtype=torch.int32),
            ends=torch.zeros(num_tokens, dtype=torch.int32),
            page_tables=torch.zeros((num_tokens, max_pages), dtype=torch.int32),
            host_rows=(),
            host_pages=(),
            max_rank=64,
        )
        self.ranks = LoraRanks(
            ranks=torch.zeros(shape, dtype=torch.int32),
            scalings=torch.zeros(shape),
            host_ranks=((64,),) * len(WIDTHS),
            host_scalings=((1.0,),) * len(WIDTHS),
        )
        self.x, self.out = torch.zeros(num_tokens, IN_FEATURES), torch.zeros(num_tokens, sum(WIDTHS))
        self.plan = reserve_plan(self.batch, num_tokens)
        self.launches = plan_launches(self.out, self.x, pool, self.ranks, self.batch)

    def step(self, case: Case, out: Tensor) -> None:
        num_segments, num_pages = case.batch.page_tables.shape
        self.batch.page_tables[:num_segments, :num_pages] = case.batch.page_tables
        self.ranks.ranks[:, :num_segments] = case.ranks.ranks
        self.ranks.scalings[:, :num_segments] = case.ranks.scalings
        refresh_plan(self.plan, case.batch.host_rows)
        self.x.copy_(case.x)
        self.out.copy_(out)
        for launch in self.launches:
            launch.run()


def test_captured_launches_serve_adapters_that_came_later_and_any_number_of_them() -> None:
    steps = [
        make_case(rank_kind="mixed", num_rows=8, popularity=popularity, base_rows=base_rows)
        for popularity, base_rows in (("identical", "none"), ("distinct", "none"), ("zipf", "some"), ("uniform", "all"))
    ]
    # All steps read one pool: each case's pages are copied into it, as if its adapters had just been loaded.
    largest = max(steps, key=lambda case: case.slices.a[0].shape[0]).slices
    pool = LoraSlices(a=tuple(map(torch.clone, largest.a)), b=tuple(map(torch.clone, largest.b)))
    captured = Captured(8, pool, max_pages=17)
    for case in steps:
        for mine, theirs in zip((*pool.a, *pool.b), (*case.slices.a, *case.slices.b), strict=True):
            mine[: len(theirs)] = theirs
        out = torch.randn(8, sum(WIDTHS))
        captured.step(case, out)
        assert_close(captured.out, case.expected(out))


def test_a_site_costs_two_launches_and_a_site_that_nobody_adapts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from pomona.kernels.triton.launch import Launch

    grids = []
    monkeypatch.setattr(Launch, "run", lambda launch: grids.append(launch.grid))
    for popularity, base_rows, expected in (("distinct", "none", 2), ("identical", "some", 2), ("zipf", "all", 0)):
        case = make_case(num_rows=16, popularity=popularity, base_rows=base_rows)
        grids.clear()
        lora(torch.zeros(16, sum(WIDTHS)), case.x, case.slices, case.ranks, case.batch)
        assert len(grids) == expected


def test_the_plan_is_made_once_per_step() -> None:
    case = make_case(num_rows=7)
    assert plan_of(case.batch, 7) is plan_of(case.batch, 7)


SEGMENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 70)), max_size=12)


@settings(deadline=None)
@given(gaps_and_lengths=SEGMENTS, rows=st.sampled_from([16, 32, 64]))
def test_chunks_cover_every_row_of_every_segment_once_and_fit_the_reserved_room(
    gaps_and_lengths: list[tuple[int, int]], rows: int
) -> None:
    host_rows, end = [], 0
    for gap, length in gaps_and_lengths:
        host_rows.append((end + gap, end + gap + length))
        end += gap + length
    chunks = cut_segments(host_rows, rows)
    covered = [(int(segment), int(first) + i) for segment, first, count, _ in chunks for i in range(count)]
    assert covered == [(segment, row) for segment, (start, stop) in enumerate(host_rows) for row in range(start, stop)]
    assert all(1 <= count <= rows for count in chunks[:, 2])
    assert len(chunks) <= max_chunks(end, rows)
    assert len(chunks) <= max_chunks(end, rows, sum(length > 0 for _, length in gaps_and_lengths))


@settings(deadline=None)
@given(num_tokens=st.integers(1, 5000), rows=st.sampled_from([16, 32, 64]))
def test_skew_costs_no_more_chunks_than_there_are_segments_more(num_tokens: int, rows: int) -> None:
    alone = len(cut_segments([(0, num_tokens)], rows))
    split = len(cut_segments([(0, 1), (1, num_tokens)], rows))
    assert split <= alone + 1
