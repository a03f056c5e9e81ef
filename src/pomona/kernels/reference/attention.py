"""Paged attention in plain torch: KV rows are gathered, then torch's fused attention runs on them.

Decodes of similar context length share one padded call; each prompt chunk has its own. Padding repeats a token of the
same sequence and is masked, so nothing outside a sequence's own context is ever read: a NaN that a former owner left
in a block cannot reach anyone else.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from pomona.kernels.attention import AttentionBatch, DecodeShape

_SMALLEST_BUCKET = 64


@dataclass(frozen=True, slots=True)
class _Decodes:
    """One-row sequences that share a call."""

    rows: Tensor
    """int64 [num_seqs]: their rows in the batch."""
    kv_rows: Tensor
    """int64 [num_seqs * span]: cache rows to gather."""
    span: int
    mask: Tensor | None
    """bool [num_seqs, 1, 1, span], False on padding; None if there is none."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several rows of one sequence."""

    start: int
    end: int
    kv_rows: Tensor
    """int64 [span]."""
    mask: Tensor | None
    """bool [end - start, span]; None if the plain causal triangle will do."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How block ids become rows of the cache, seen as a matrix [rows, num_kv_heads * head_dim]."""

    block_size: int
    rows_per_block: int
    width: int
    """num_kv_heads * head_dim."""
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Plan:
    """The calls of one layer, and where they gather keys and values: memory that is touched once per step, not once
    per layer."""

    calls: list[_Decodes | _Chunk]
    key_scratch: Tensor
    value_scratch: Tensor


# A batch's plan is the same for all layers of equal window; it lives as long as the batch does.
_plans: "WeakKeyDictionary[AttentionBatch, dict[tuple[_Layout, int | None], _Plan]]" = WeakKeyDictionary()


def _layout_of(cache: Tensor) -> _Layout:
    _, block_size, num_kv_heads, head_dim = cache.shape
    width = num_kv_heads * head_dim
    assert cache.stride()[1:] == (width, head_dim, 1), "a block must be dense"
    assert cache.stride(0) % width == 0, "the block stride must be a multiple of a token's keys"
    return _Layout(block_size, cache.stride(0) // width, width, cache.dtype)


def _as_rows(cache: Tensor, layout: _Layout) -> Tensor:
    """The cache as a matrix [rows, num_kv_heads * head_dim] without copying."""
    num_rows = (cache.shape[0] - 1) * layout.rows_per_block + layout.block_size
    return cache.as_strided((num_rows, layout.width), (layout.width, 1), cache.storage_offset())


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See ``kernels.attention.write_kv``."""
    for source, cache in ((key, key_cache), (value, value_cache)):
        layout = _layout_of(cache)
        rows = slot_mapping
        if layout.rows_per_block != layout.block_size:
            blocks = slot_mapping.div(layout.block_size, rounding_mode="floor")
            rows = slot_mapping + blocks * (layout.rows_per_block - layout.block_size)
        _as_rows(cache, layout).index_copy_(0, rows, source.flatten(1))


def _kv_rows(batch: AttentionBatch, seqs: Tensor, positions: Tensor, layout: _Layout) -> Tensor:
    """Cache rows of token ``positions`` [num_seqs, span] of the sequences ``seqs`` [num_seqs, 1]."""
    blocks = batch.block_tables[seqs, positions // layout.block_size].long()
    return (blocks * layout.rows_per_block + positions % layout.block_size).flatten()


def _plan_decodes(
    batch: AttentionBatch, seqs: list[int], first_rows: list[int], layout: _Layout, window: int | None
) -> _Decodes:
    device = batch.block_tables.device
    ends = [batch.host_context_lens[seq] for seq in seqs]
    spans = [end if window is None else min(end, window) for end in ends]
    span = max(spans)
    end = torch.tensor(ends, device=device).unsqueeze(1)
    length = torch.tensor(spans, device=device).unsqueeze(1)
    offsets = torch.arange(span, device=device)
    positions = torch.minimum(end - length + offsets, end - 1)
    return _Decodes(
        rows=torch.tensor([first_rows[seq] for seq in seqs], device=device),
        kv_rows=_kv_rows(batch, torch.tensor(seqs, device=device).unsqueeze(1), positions, layout),
        span=span,
        mask=None if min(spans) == span else (offsets < length)[:, None, None, :],
    )


def _plan_chunk(batch: AttentionBatch, seq: int, start: int, layout: _Layout, window: int | None) -> _Chunk:
    device = batch.block_tables.device
    num_rows, end = batch.host_query_lens[seq], batch.host_context_lens[seq]
    first_position = end - num_rows
    first_read = 0 if window is None else max(0, first_position - window + 1)
    positions = torch.arange(first_read, end, device=device)
    kv_rows = _kv_rows(batch, torch.tensor([[seq]], device=device), positions.unsqueeze(0), layout)
    mask = None
    if first_position > 0 or (window is not None and window < num_rows):
        query_positions = positions[first_position - first_read :].unsqueeze(1)
        mask = positions <= query_positions
        if window is not None:
            mask &= positions > query_positions - window
    return _Chunk(start, start + num_rows, kv_rows, mask)


def _plan(batch: AttentionBatch, layout: _Layout, window: int | None) -> _Plan:
    plans = _plans.setdefault(batch, {})
    if (layout, window) not in plans:
        calls: list[_Decodes | _Chunk] = []
        first_rows: list[int] = []
        buckets: dict[int, list[int]] = {}
        row = 0
        for seq, (num_rows, context_len) in enumerate(zip(batch.host_query_lens, batch.host_context_lens, strict=True)):
            assert 1 <= num_rows <= context_len
            first_rows.append(row)
            if num_rows == 1:
                span = context_len if window is None else min(context_len, window)
                buckets.setdefault(max(span, _SMALLEST_BUCKET).bit_length(), []).append(seq)
            else:
                calls.append(_plan_chunk(batch, seq, row, layout, window))
            row += num_rows
        calls += [_plan_decodes(batch, seqs, first_rows, layout, window) for seqs in buckets.values()]
        shape = (max(call.kv_rows.numel() for call in calls), layout.width)
        device = batch.block_tables.device
        scratch = [torch.empty(shape, dtype=layout.dtype, device=device) for _ in range(2)]
        plans[layout, window] = _Plan(calls, *scratch)
    return plans[layout, window]


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
    num_kv_heads = key_cache.shape[2]
    layout = _layout_of(key_cache)
    assert _layout_of(value_cache) == layout
    assert num_heads % num_kv_heads == 0
    assert num_tokens == sum(batch.host_query_lens)
    keys, values = _as_rows(key_cache, layout), _as_rows(value_cache, layout)
    group = num_heads // num_kv_heads
    out = query.new_empty((num_tokens, num_kv_heads, group, head_dim))
    query = query.view(num_tokens, num_kv_heads, group, head_dim)
    plan = _plan(batch, layout, sliding_window)
    for call in plan.calls:
        num_kv_rows = call.kv_rows.numel()
        key = torch.index_select(keys, 0, call.kv_rows, out=plan.key_scratch[:num_kv_rows])
        value = torch.index_select(values, 0, call.kv_rows, out=plan.value_scratch[:num_kv_rows])
        if isinstance(call, _Decodes):
            # The heads of a group take the place of query rows: each key is read once and never repeated.
            shape = (-1, call.span, num_kv_heads, head_dim)
            attended = functional.scaled_dot_product_attention(
                query.index_select(0, call.rows),
                key.view(shape).transpose(1, 2),
                value.view(shape).transpose(1, 2),
                attn_mask=call.mask,
                scale=scale,
            )
            out.index_copy_(0, call.rows, attended)
        else:
            shape = (num_kv_heads, group, -1, head_dim)
            key, value = (part.view(-1, num_kv_heads, 1, head_dim).permute(1, 2, 0, 3) for part in (key, value))
            attended = functional.scaled_dot_product_attention(
                query[call.start : call.end].permute(1, 2, 0, 3),
                key.expand(shape),
                value.expand(shape),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                scale=scale,
            )
            out[call.start : call.end] = attended.permute(2, 0, 1, 3)
    return out.flatten(1, 2)


def reserve(batch: AttentionBatch, shape: DecodeShape, max_kv_tokens: int) -> None:
    """See ``kernels.attention.reserve``. Nothing to do: contexts are planned when a batch is first used."""


def carry_plan(batch: AttentionBatch, renewed: AttentionBatch) -> None:
    """See ``kernels.attention.renew``. Nothing to do, likewise."""
