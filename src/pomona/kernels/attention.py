"""Attention over a paged KV cache: every row attends to its own sequence's blocks, prompt chunks and decodes alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pomona.kernels.dispatch import backend_for


@dataclass(frozen=True)
class AttentionBatch:
    """Who attends to what; built once per step and used by every layer.

    Sequence s owns rows [query_starts[s], query_starts[s + 1]); they are its *latest* tokens: row j of n has position
    context_lens[s] - n + j.
    """

    query_starts: Tensor
    """int32 [num_seqs + 1]."""
    context_lens: Tensor
    """int32 [num_seqs]: tokens with KV once this step's have been written."""
    block_tables: Tensor
    """int32 [num_seqs, max_blocks]; entries past a sequence's last block are 0 and never read."""
    slot_mapping: Tensor
    """int64 [num_tokens]: KV slot (block_id * block_size + offset) that each row's key and value go to."""
    host_query_lens: tuple[int, ...]
    host_context_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What the launches of a layer's attention depend on besides the batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sliding_window: int | None


def reserve(batch: AttentionBatch, shape: DecodeShape, max_kv_tokens: int) -> None:
    """Give a batch of decodes a plan with room for any contexts. To be called for every shape of layer before their
    attention is captured into a graph.

    Args:
        batch: one row per sequence; its tensors are the ones that will be captured.
        shape: of the layers.
        max_kv_tokens: most tokens that the contexts of a step may have together.
    """
    backend_for("attention", batch.block_tables.device).reserve(batch, shape, max_kv_tokens)


def renew(batch: AttentionBatch, host_context_lens: Sequence[int]) -> AttentionBatch:
    """The same tensors as another step's contexts. Plans that were reserved are filled in anew, in place and in stream
    order, so that a replayed graph works on the new contexts; the tensors themselves are for the caller to refill.

    Args:
        batch: reserved, or renewed since.
        host_context_lens: tokens per sequence.
    """
    renewed = replace(batch, host_context_lens=tuple(host_context_lens))
    backend_for("attention", batch.block_tables.device).carry_plan(batch, renewed)
    return renewed


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store this step's keys and values: ``cache[slot] = row``.

    Args:
        key: [num_tokens, num_kv_heads, head_dim], rotated. ``value`` has the same shape.
        value: see key.
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], changed in place; the block stride is free.
        value_cache: like key_cache.
        slot_mapping: int64 [num_tokens], no slot twice.
    """
    backend_for("attention", key.device).write_kv(key, value, key_cache, value_cache, slot_mapping)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of each row to its sequence's tokens up to itself.

    Args:
        query: [num_tokens, num_heads, head_dim]; num_heads is a multiple of num_kv_heads (query head h reads
            kv head h * num_kv_heads // num_heads).
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], this step's keys already written.
        value_cache: like key_cache.
        batch: the step's sequences.
        scale: factor on the scores, usually head_dim ** -0.5.
        sliding_window: attend to this many latest tokens only, the row's own included.

    Returns:
        [num_tokens, num_heads, head_dim], query's dtype; softmax in float32.
    """
    backend = backend_for("attention", query.device)
    result: Tensor = backend.paged_attention(
        query, key_cache, value_cache, batch, scale=scale, sliding_window=sliding_window
    )
    return result
