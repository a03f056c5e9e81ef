"""Paged attention in Triton: tilings, KV splits and their merge, and launches that outlive a step's sequences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernels.test_attention import MIXES, Case, make_case
from pomona.kernels.attention import AttentionBatch, paged_attention, write_kv
from pomona.kernels.dispatch import use_backend
from pomona.kernels.triton.attention import attention_launches
from pomona.kernels.triton.attention_plan import HeadShape, cut_sequences, plans_of, refresh_plan, reserve_plan
from pomona.kernels.triton.configs import use_configs
from support.tolerances import assert_close

TILES = {"block_m": 16, "block_n": 16, "split_tokens": 32, "num_warps": 4, "num_stages": 2}
MERGE = {"block_splits": 2, "num_warps": 4}


@pytest.fixture(autouse=True)
def _triton_in_poisoned_memory():
    """What the backend allocates starts as NaN, so that anything it reads without having written it shows."""
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def _attend(case: Case, window: int | None = None) -> torch.Tensor:
    scale = case.query.shape[2] ** -0.5
    return paged_attention(case.query, case.key_cache, case.value_cache, case.batch, scale=scale, sliding_window=window)


def _check(case: Case, window: int | None = None) -> None:
    assert_close(_attend(case, window), case.expected(case.query.shape[2] ** -0.5, window))


@pytest.mark.parametrize("changes", [{}, {"split_tokens": 0}, {"block_n": 32}, {"block_m": 64}], ids=str)
@pytest.mark.parametrize("window", [None, 5, 40])
def test_no_tiling_changes_the_result(changes: dict[str, int], window: int | None) -> None:
    case = make_case([(1, 12), (9, 70), (1, 130), (1, 32), (1, 33)], heads=(3, 1, 8))
    with use_configs(attention={**TILES, **changes}, attention_merge=MERGE):
        _check(case, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_accurate_across_splits(dtype: torch.dtype) -> None:
    with use_configs(attention=TILES, attention_merge=MERGE):
        _check(make_case([(1, 100), (3, 70)], heads=(4, 1, 16), dtype=dtype))


def test_extreme_scores_do_not_overflow_across_splits() -> None:
    case = make_case([(1, 100)], heads=(2, 1, 16))
    case.query *= 200
    with use_configs(attention=TILES, attention_merge=MERGE):
        _check(case)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(9, 3, 64), (14, 2, 64), (32, 8, 128)], ids=str)
def test_real_heads_and_long_contexts(heads: tuple[int, int, int], window: int | None) -> None:
    _check(make_case([(1, 1500), (130, 700), (1, 513), (4, 512)], heads=heads, block_size=16), window)


def test_a_group_larger_than_the_tile_gets_a_larger_tile() -> None:
    with use_configs(attention=TILES, attention_merge=MERGE):
        _check(make_case([(1, 40), (3, 5)], heads=(20, 1, 8)))


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_alone_gets_the_same_bits_as_in_company(window: int | None) -> None:
    case = make_case([(1, 12), (6, 70), (1, 90)], heads=(2, 1, 16), dtype=torch.bfloat16)
    with use_configs(attention=TILES, attention_merge=MERGE):
        together = _attend(case, window)
        first = 0
        for seq, (num_rows, context_len) in enumerate(
            zip(case.batch.host_query_lens, case.batch.host_context_lens, strict=True)
        ):
            batch = AttentionBatch(
                query_starts=torch.tensor([0, num_rows], dtype=torch.int32),
                context_lens=case.batch.context_lens[seq : seq + 1],
                block_tables=case.batch.block_tables[seq : seq + 1],
                slot_mapping=case.batch.slot_mapping[first : first + num_rows],
                host_query_lens=(num_rows,),
                host_context_lens=(context_len,),
            )
            rows = slice(first, first + num_rows)
            alone = _attend(replace(case, query=case.query[rows], batch=batch), window)
            assert torch.equal(alone, together[rows])
            first += num_rows


@pytest.mark.parametrize("window", [None, 20])
def test_chunks_of_one_class_give_the_same_bits_however_a_prompt_is_cut(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU sums every row of a tile alike, the BLAS of the interpreter only on some machines: sum in order instead.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: (a[:, :, None] * b).sum(axis=1, dtype=dtype))
    case = make_case([(6, 70)], heads=(2, 1, 16))
    with use_configs(attention=TILES, attention_merge=MERGE):
        whole = _attend(case, window)
        for first, last in ((0, 1), (1, 4), (4, 6)):
            batch = replace(case.batch, host_query_lens=(last - first,), host_context_lens=(64 + last,))
            part = _attend(replace(case, query=case.query[first:last], batch=batch), window)
            assert torch.equal(part, whole[first:last])


def test_captured_launches_serve_later_contexts() -> None:
    """One set of launches, as a CUDA graph keeps it, for steps of other lengths and fewer sequences."""
    heads = HeadShape(group=2, head_dim=16, element_bytes=4, window=None)
    steps = [make_case([(1, length) for length in lengths]) for lengths in ((5, 100, 31), (120, 1, 64), (33, 90))]
    batch = AttentionBatch(
        query_starts=torch.zeros(4, dtype=torch.int32),
        context_lens=torch.zeros(3, dtype=torch.int32),
        block_tables=torch.zeros((3, 40), dtype=torch.int32),
        slot_mapping=torch.zeros(3, dtype=torch.int64),
        host_query_lens=(1, 1, 1),
        host_context_lens=(1, 1, 1),
    )
    query, out = torch.zeros(3, 4, 16), torch.zeros(3, 4, 16)
    caches = (torch.zeros(80, 4, 2, 16), torch.zeros(80, 4, 2, 16))
    with use_configs(attention=TILES, attention_merge=MERGE):
        plan = reserve_plan(batch, heads, max_kv_tokens=200)
        launches = attention_launches(query, caches, out, batch, scale=0.25, sliding_window=None)
        for case in steps:
            num_seqs = len(case.batch.host_query_lens)
            for mine, theirs in zip(caches, (case.key_cache, case.value_cache), strict=True):
                mine[: len(theirs)] = theirs
            batch.block_tables[:num_seqs, : case.batch.block_tables.shape[1]] = case.batch.block_tables
            query[:num_seqs] = case.query
            refresh_plan(plan, case.batch, heads)
            for launch in launches:
                launch.run()
            assert_close(out[:num_seqs], case.expected(0.25, None))


def test_padding_rows_store_no_keys() -> None:
    case = make_case([(3, 9)])
    before = case.key_cache.clone(), case.value_cache.clone()
    write_kv(case.query[:, :2], case.query[:, 2:], case.key_cache, case.value_cache, torch.full((3,), -1))
    torch.testing.assert_close((case.key_cache, case.value_cache), before, rtol=0, atol=0, equal_nan=True)


def test_sequences_of_a_class_share_a_launch_and_only_split_contexts_are_merged() -> None:
    scale = {"scale": 1.0, "sliding_window": None}
    short, long = make_case(MIXES["chunks between decodes"]), make_case([(1, 600), (1, 9)])
    for case, expected in ((short, ["attend_kernel"] * 2), (long, ["attend_kernel", "merge_kernel"])):
        launches = attention_launches(
            case.query, (case.key_cache, case.value_cache), torch.empty_like(case.query), case.batch, **scale
        )
        assert [launch.kernel.__name__ for launch in launches] == expected


def test_the_plan_is_made_once_per_step_and_window() -> None:
    batch = make_case([(1, 9)]).batch
    heads = HeadShape(group=2, head_dim=16, element_bytes=4, window=None)
    assert plans_of(batch, heads) is plans_of(batch, heads)
    assert plans_of(batch, heads) is not plans_of(batch, replace(heads, window=5))


@settings(deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=5),
    rows_per_block=st.sampled_from([1, 5, 16]),
    split_tokens=st.sampled_from([0, 32, 64]),
    window=st.none() | st.integers(1, 100),
)
def test_items_cover_what_each_row_may_see_once(
    lens: list[tuple[int, int]], rows_per_block: int, split_tokens: int, window: int | None
) -> None:
    query_lens = tuple(num_rows for num_rows, _ in lens)
    context_lens = tuple(num_rows + before for num_rows, before in lens)
    batch = replace(make_case([(1, 1)]).batch, host_query_lens=query_lens, host_context_lens=context_lens)
    items, merges = cut_sequences(batch, np.arange(len(lens)), rows_per_block, split_tokens, window)
    seen: dict[int, list[int]] = {row: [] for row in range(sum(query_lens))}
    partials: dict[int, int] = {}
    for _, first_row, num_rows, position, kv_start, kv_end, partial, _ in items.tolist():
        assert 1 <= num_rows <= rows_per_block
        assert kv_start < kv_end
        assert not split_tokens or kv_start // split_tokens == (kv_end - 1) // split_tokens
        if partial >= 0:
            partials[partial] = first_row
        for row in range(num_rows):
            first_seen = 0 if window is None else max(0, position + row - window + 1)
            seen[first_row + row] += range(max(kv_start, first_seen), min(kv_end, position + row + 1))
    row = 0
    for num_rows, before in lens:
        for position in range(before, before + num_rows):
            first_seen = 0 if window is None else max(0, position - window + 1)
            assert seen[row] == list(range(first_seen, position + 1))
            row += 1
    merged = {first + i: first_row for first, count, first_row, _ in merges.tolist() for i in range(count)}
    assert merged == partials
