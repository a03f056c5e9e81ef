"""Paged attention against a float64 loop over rows and heads, in a cache where everything unused is NaN."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.kernels.attention import AttentionBatch, paged_attention, write_kv
from pomona.kernels.dispatch import backends_of, use_backend
from support.tolerances import TOLERANCES, assert_close

NAN = float("nan")


@pytest.fixture(params=backends_of("attention"), autouse=True, scope="module")
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


@dataclass
class Case:
    query: Tensor
    keys: list[Tensor]
    """Per sequence [context_len, num_kv_heads, head_dim], the truth."""
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    batch: AttentionBatch

    def expected(self, scale: float, window: int | None) -> Tensor:
        rows = []
        for seq, (num_rows, end) in enumerate(
            zip(self.batch.host_query_lens, self.batch.host_context_lens, strict=True)
        ):
            for position in range(end - num_rows, end):
                first = 0 if window is None else max(0, position - window + 1)
                rows.append(self._row(len(rows), self.keys[seq][first : position + 1], self.values[seq][first:], scale))
        return torch.stack(rows)

    def _row(self, row: int, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        num_heads, num_kv_heads = self.query.shape[1], keys.shape[1]
        heads = []
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = keys[:, kv_head].double() @ self.query[row, head].double() * scale
            heads.append(scores.softmax(0) @ values[: len(keys), kv_head].double())
        return torch.stack(heads)


def _poisoned_caches(shape: tuple[int, ...], dtype: torch.dtype, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:  # keys and values of a block side by side
        both = torch.full((shape[0], 2, *shape[1:]), NAN, dtype=dtype)
        return both[:, 0], both[:, 1]
    return torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype)


def make_case(
    seqs: list[tuple[int, int]],
    *,
    heads: tuple[int, int, int] = (4, 2, 16),
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
) -> Case:
    """``seqs`` lists (rows in the batch, context length)."""
    num_heads, num_kv_heads, head_dim = heads
    query_lens, context_lens = (tuple(column) for column in zip(*seqs, strict=True))
    num_blocks_of = [-(-end // block_size) for end in context_lens]
    num_blocks = sum(num_blocks_of) + 2
    order = (torch.randperm(num_blocks - 1) + 1).int()  # block 0 stays poisoned
    tables = torch.zeros(len(seqs), max(num_blocks_of) + 2, dtype=torch.int32)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    key_cache, value_cache = _poisoned_caches(shape, dtype, interleaved=interleaved)
    keys, values, slots, used = [], [], [], 0
    for seq, (num_rows, end) in enumerate(seqs):
        tables[seq, : num_blocks_of[seq]] = order[used : used + num_blocks_of[seq]]
        used += num_blocks_of[seq]
        keys.append((2 * torch.randn(end, num_kv_heads, head_dim)).to(dtype))
        values.append(torch.randn(end, num_kv_heads, head_dim).to(dtype))
        positions = torch.arange(end)
        blocks, offsets = tables[seq, positions // block_size].long(), positions % block_size
        key_cache[blocks, offsets], value_cache[blocks, offsets] = keys[-1], values[-1]
        slots.append((blocks * block_size + offsets)[end - num_rows :])
    batch = AttentionBatch(
        query_starts=torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        host_query_lens=query_lens,
        host_context_lens=context_lens,
    )
    query = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    return Case(query, keys, values, key_cache, value_cache, batch)


def _check(case: Case, window: int | None) -> None:
    scale = case.query.shape[2] ** -0.5
    attended = paged_attention(
        case.query, case.key_cache, case.value_cache, case.batch, scale=scale, sliding_window=window
    )
    assert attended.dtype == case.query.dtype
    assert_close(attended, case.expected(scale, window))


MIXES = {
    "one new token": [(1, 1)],
    "decodes of very different lengths": [(1, 1), (1, 300), (1, 2), (1, 64), (1, 65), (1, 33)],
    "whole prompts": [(5, 5), (17, 17), (2, 2)],
    "later chunks": [(5, 9), (16, 70), (2, 3)],
    "chunks between decodes": [(1, 12), (6, 6), (1, 40), (9, 30), (1, 1), (1, 130)],
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 16), (6, 1, 24), (3, 3, 7)], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_every_row_attends_to_its_own_context_up_to_itself(
    mix: str, heads: tuple[int, int, int], window: int | None, *, interleaved: bool
) -> None:
    _check(make_case(MIXES[mix], heads=heads, interleaved=interleaved), window)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("mix", MIXES)
def test_every_dtype_is_accurate(mix: str, window: int | None, dtype: torch.dtype) -> None:
    _check(make_case(MIXES[mix], heads=(4, 2, 32), dtype=dtype), window)


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 80)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16]),
    window=st.none() | st.integers(1, 90),
)
def test_any_mix_of_sequences_is_right(lens: list[tuple[int, int]], block_size: int, window: int | None) -> None:
    seqs = [(num_rows, num_rows + before) for num_rows, before in lens]
    _check(make_case(seqs, heads=(2, 1, 8), block_size=block_size), window)


def test_tokens_that_left_the_window_of_every_row_are_not_read() -> None:
    case = make_case([(1, 30), (4, 30), (1, 3)])
    for seq, first_read in enumerate([30 - 5, 26 - 5 + 1, 0]):
        positions = torch.arange(first_read)
        blocks, offsets = case.batch.block_tables[seq, positions // 4].long(), positions % 4
        case.key_cache[blocks, offsets] = NAN
        case.value_cache[blocks, offsets] = NAN
    _check(case, 5)


def test_layers_with_different_windows_and_caches_share_a_batch() -> None:
    case = make_case(MIXES["chunks between decodes"])
    other = make_case(MIXES["chunks between decodes"], interleaved=True)
    other.batch = case.batch
    shape = case.key_cache.shape
    other.key_cache, other.value_cache = _poisoned_caches(shape, torch.float32, interleaved=True)
    other.key_cache.copy_(case.key_cache)
    other.value_cache.copy_(case.value_cache)
    other.keys, other.values = case.keys, case.values
    for window in (None, 5, None, 3):
        _check(case, window)
        _check(other, window)


def test_extreme_scores_do_not_overflow() -> None:
    case = make_case([(1, 9), (4, 9)], dtype=torch.float16)
    case.query *= 200
    _check(case, None)


@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_write_kv_stores_each_row_in_its_slot_and_touches_no_other(dtype: torch.dtype, *, interleaved: bool) -> None:
    case = make_case([(3, 9), (1, 6)], dtype=dtype, interleaved=interleaved)
    fused = torch.randn(4, 8, 16).to(dtype)
    key, value = fused[:, 4:6], fused[:, 6:]
    expected = [case.key_cache.clone(), case.value_cache.clone()]
    for row, slot in enumerate(case.batch.slot_mapping.tolist()):
        expected[0][slot // 4, slot % 4] = key[row]
        expected[1][slot // 4, slot % 4] = value[row]
    write_kv(key, value, case.key_cache, case.value_cache, case.batch.slot_mapping)
    for actual, wanted in zip((case.key_cache, case.value_cache), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
