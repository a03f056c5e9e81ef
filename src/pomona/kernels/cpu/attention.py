"""Paged attention by the compiled kernels.

A row's result is the same, bit for bit, whichever rows and sequences share its step, however its prompt was cut into
chunks, and on any number of threads.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.kernels.attention import AttentionBatch, DecodeShape
from pomona.kernels.cpu import binding
from pomona.kernels.reference import attention as reference

_ROWS_PER_ITEM, _ROWS_PER_SMALL_ITEM = 192, 64
"""Query rows times heads of a group that are attended to together: each item lays out keys and values for itself. The
second where the first would leave threads without work. Results do not depend on it."""
_ITEMS_PER_THREAD = 4


@dataclass(frozen=True, eq=False)
class _Step:
    """A batch as the library reads it."""

    struct: binding.AttentionStep
    address: int
    blocks: NDArray[np.int32]
    """[num_blocks, 4]: sequence, first row, rows, first position. Owned here because the struct only points to it."""
    num_tokens: int


def _cut(batch: AttentionBatch, rows_per_block: int) -> NDArray[np.int32]:
    """Runs of at most ``rows_per_block`` rows of one sequence, longest context first."""
    query_lens = np.array(batch.host_query_lens, dtype=np.int32)
    context_lens = np.array(batch.host_context_lens, dtype=np.int32)
    first_rows = np.cumsum(query_lens) - query_lens
    counts = -(-query_lens // rows_per_block)
    sequences = np.repeat(np.arange(len(query_lens)), counts)
    within = (np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows_per_block
    num_rows = np.minimum(query_lens[sequences] - within, rows_per_block)
    positions = (context_lens - query_lens)[sequences] + within
    blocks = np.stack([sequences, first_rows[sequences] + within, num_rows, positions], axis=1).astype(np.int32)
    return np.ascontiguousarray(blocks[np.argsort(-positions, kind="stable")])


def _step_of(batch: AttentionBatch, rows_per_block: int) -> _Step:
    """The batch's plan, made at its first use and kept with it."""
    plans: dict[int, _Step] = batch.__dict__.setdefault("_cpu_steps", {})
    step = plans.get(rows_per_block)
    if step is None:
        tables = batch.block_tables
        assert tables.dtype is torch.int32
        assert tables.is_contiguous()
        blocks = _cut(batch, rows_per_block)
        struct = binding.AttentionStep(
            blocks=blocks.ctypes.data,
            block_tables=tables.data_ptr(),
            num_blocks=len(blocks),
            max_blocks=tables.shape[1],
            max_context=max(batch.host_context_lens),
        )
        step = _Step(struct, binding.address_of(struct), blocks, sum(batch.host_query_lens))
        plans[rows_per_block] = step
    return step


def refresh(recorded: AttentionBatch, batch: AttentionBatch) -> None:
    """Put ``batch`` in place of ``recorded`` for native calls that were recorded with it."""
    steps: dict[int, _Step] = recorded.__dict__["_cpu_steps"]
    for rows_per_block, step in steps.items():
        new = _step_of(batch, rows_per_block)
        assert new.num_tokens == step.num_tokens
        ctypes.memmove(step.address, new.address, ctypes.sizeof(step.struct))


def _is_dense_block(cache: Tensor) -> bool:
    _, _, num_kv_heads, head_dim = cache.shape
    return cache.stride()[1:] == (num_kv_heads * head_dim, head_dim, 1)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See ``kernels.attention.write_kv``."""
    dtype = binding.DTYPES.get(key.dtype)
    num_tokens, num_kv_heads, head_dim = key.shape
    key_strides, value_strides = key.stride(), value.stride()
    if dtype is None or key_strides[1:] != (head_dim, 1) or value_strides[1:] != (head_dim, 1):
        reference.write_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    assert _is_dense_block(key_cache)
    assert _is_dense_block(value_cache)
    assert key.dtype is value.dtype is key_cache.dtype is value_cache.dtype
    assert slot_mapping.dtype is torch.int64
    assert slot_mapping.is_contiguous()
    binding.library().pomona_rope(
        *(dtype, torch.get_num_threads(), None, key.data_ptr(), value.data_ptr()),
        *(key_cache.data_ptr(), value_cache.data_ptr(), None, slot_mapping.data_ptr(), None),
        *(num_tokens, 0, num_kv_heads, head_dim, 0, key_strides[0], value_strides[0]),
        *(key_cache.stride(0), value_cache.stride(0), key_cache.shape[1]),
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """See ``kernels.attention.paged_attention``."""
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    query_strides, key_strides, value_strides = query.stride(), key_cache.stride(), value_cache.stride()
    dtype = binding.DTYPES.get(query.dtype)
    if dtype is None or head_dim > binding.MAX_HEAD_DIM or query_strides[2] != 1:
        return reference.paged_attention(
            query, key_cache, value_cache, batch, scale=scale, sliding_window=sliding_window
        )
    width = num_kv_heads * head_dim
    assert key_strides[1:] == value_strides[1:] == (width, head_dim, 1), "a block must be dense"
    assert query.dtype is key_cache.dtype is value_cache.dtype
    group = num_heads // num_kv_heads
    assert group * num_kv_heads == num_heads
    num_threads = torch.get_num_threads()
    has_many_items = num_tokens * num_heads >= _ROWS_PER_ITEM * _ITEMS_PER_THREAD * num_threads
    step = _step_of(batch, max(1, (_ROWS_PER_ITEM if has_many_items else _ROWS_PER_SMALL_ITEM) // group))
    assert step.num_tokens == num_tokens
    out = binding.empty((num_tokens, num_heads, head_dim), query.dtype)
    binding.library().pomona_attention(
        *(dtype, num_threads, step.address, query.data_ptr(), query_strides[0], query_strides[1]),
        *(num_heads, key_cache.data_ptr(), value_cache.data_ptr(), key_strides[0], value_strides[0]),
        *(block_size, num_kv_heads, head_dim, sliding_window or 0, scale, out.data_ptr()),
    )
    return out


def reserve(batch: AttentionBatch, shape: DecodeShape, max_kv_tokens: int) -> None:
    """See ``kernels.attention.reserve``. Nothing to do: contexts are planned when a batch is first used."""


def carry_plan(batch: AttentionBatch, renewed: AttentionBatch) -> None:
    """See ``kernels.attention.renew``. Nothing to do, likewise."""
