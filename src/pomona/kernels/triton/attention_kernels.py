"""Paged attention as two Triton kernels: attend over a range of a sequence's KV, then merge the ranges of a row.

One program works on one *item*, a block of query rows of one sequence and a range of its KV, for one kv head. The query
heads that share the kv head lie beside each other in the tile's rows (lane = row * GROUP + head of the group), so each
key is read once per block whatever the group. Softmax is online, in float32 and base 2 (arXiv 2205.14135; splitting KV
as in Flash-Decoding). Items are int32 [num_items, 8]: sequence, first row, rows, position of the first row, first and
end position of the KV range, partial slot or -1 if the range is the only one, unused. No rows: nothing to do.
"""

# ruff: noqa: ANN001, ANN201 (kernels are written in Triton's language, whose arguments have no Python types)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from pomona.kernels.triton.numerics import dot, round_to


@triton.jit(
    do_not_specialize=("max_blocks", "window", "num_lanes"),
    do_not_specialize_on_alignment=("items_ptr", "block_tables_ptr"),
)
def attend_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM], first stride free
    key_ptr,  # [num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM], first stride free
    value_ptr,
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    partial_ptr,  # float32 [num_partials, num_kv_heads, num_lanes, HEAD_DIM], not normalized
    stats_ptr,  # float32 [num_partials, num_kv_heads, num_lanes, 2]: maximum and sum of the softmax
    items_ptr,
    block_tables_ptr,  # int32 [num_seqs, max_blocks]
    scale_log2,
    window,
    query_stride,
    key_block_stride,
    value_block_stride,
    max_blocks,
    num_lanes,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (item, kv head). ``window`` counts positions up to and including a row's own."""
    item_ptr = items_ptr + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    num_rows = tl.load(item_ptr + 2)
    if num_rows == 0:
        return
    seq = tl.load(item_ptr)
    first_row = tl.load(item_ptr + 1)
    first_position = tl.load(item_ptr + 3)
    kv_start = tl.load(item_ptr + 4)
    kv_end = tl.load(item_ptr + 5)
    partial = tl.load(item_ptr + 6)

    lanes = tl.arange(0, BLOCK_M)
    is_lane = lanes < num_rows * GROUP
    d = tl.arange(0, BLOCK_D)
    is_d = d < HEAD_DIM
    rows = (first_row + lanes // GROUP).to(tl.int64)
    head_offsets = (kv_head * GROUP + lanes % GROUP) * HEAD_DIM
    is_query = is_lane[:, None] if BLOCK_D == HEAD_DIM else is_lane[:, None] & is_d[None, :]
    query = tl.load(
        query_ptr + rows[:, None] * query_stride + head_offsets[:, None] + d[None, :], mask=is_query, other=0.0
    )
    positions = first_position + lanes // GROUP

    block_table_ptr = block_tables_ptr + seq.to(tl.int64) * max_blocks
    kv_offset = kv_head * HEAD_DIM
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    # Tiles begin at multiples of BLOCK_N, so that a row sums in the same order whatever the range begins with.
    for first in range(kv_start // BLOCK_N * BLOCK_N, kv_end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        is_n = (n >= kv_start) & (n < kv_end)
        blocks = tl.load(block_table_ptr + n // BLOCK_SIZE, mask=is_n, other=0).to(tl.int64)
        in_block = (n % BLOCK_SIZE) * (NUM_KV_HEADS * HEAD_DIM) + kv_offset
        keys = key_ptr + (blocks * key_block_stride + in_block)[None, :] + d[:, None]
        key = tl.load(keys, mask=is_n[None, :] if BLOCK_D == HEAD_DIM else is_n[None, :] & is_d[:, None], other=0.0)
        scores = dot(query, key, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION) * scale_log2
        is_seen = is_n[None, :] & (n[None, :] <= positions[:, None])
        if HAS_WINDOW:
            is_seen &= n[None, :] > positions[:, None] - window
        scores = tl.where(is_seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no maximum to subtract: -inf - -inf is not a number.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, axis=1)
        maximum = new_maximum
        values = value_ptr + (blocks * value_block_stride + in_block)[:, None] + d[None, :]
        value = tl.load(values, mask=is_n[:, None] if BLOCK_D == HEAD_DIM else is_n[:, None] & is_d[None, :], other=0.0)
        acc = dot(round_to(weights, value.dtype), value, acc * decay[:, None], PRECISION)

    if partial < 0:
        attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out = out_ptr + rows[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM) + head_offsets[:, None] + d[None, :]
        tl.store(out, round_to(attended, out_ptr.dtype.element_ty), mask=is_query)
    else:
        slots = (partial.to(tl.int64) * NUM_KV_HEADS + kv_head) * num_lanes + lanes
        tl.store(partial_ptr + slots[:, None] * HEAD_DIM + d[None, :], acc, mask=is_query)
        tl.store(stats_ptr + slots * 2, maximum, mask=is_lane)
        tl.store(stats_ptr + slots * 2 + 1, total, mask=is_lane)


@triton.jit(
    do_not_specialize=("num_lanes",),
    do_not_specialize_on_alignment=("merges_ptr",),
)
def merge_kernel(
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    partial_ptr,  # as attend_kernel leaves them
    stats_ptr,
    merges_ptr,  # int32 [num_merges, 4]: first partial slot, slots, first row, rows
    num_lanes,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (merge, kv head, lane): partials scaled to the common maximum, added, over the sum of sums."""
    merge_ptr = merges_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    lane = tl.program_id(2)
    num_rows = tl.load(merge_ptr + 3)
    if lane >= num_rows * GROUP:
        return
    first_slot = tl.load(merge_ptr)
    num_slots = tl.load(merge_ptr + 1)
    first_row = tl.load(merge_ptr + 2)
    d = tl.arange(0, BLOCK_D)
    is_d = d < HEAD_DIM
    maximum = float("-inf")
    for first in range(0, num_slots, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        slots = ((first_slot + s).to(tl.int64) * NUM_KV_HEADS + kv_head) * num_lanes + lane
        maxima = tl.load(stats_ptr + slots * 2, mask=s < num_slots, other=float("-inf"))
        maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
    total = 0.0
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, num_slots, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        is_s = s < num_slots
        slots = ((first_slot + s).to(tl.int64) * NUM_KV_HEADS + kv_head) * num_lanes + lane
        maxima = tl.load(stats_ptr + slots * 2, mask=is_s, other=float("-inf"))
        totals = tl.load(stats_ptr + slots * 2 + 1, mask=is_s, other=0.0)
        weights = tl.exp2(maxima - maximum)
        partials = tl.load(
            partial_ptr + slots[:, None] * HEAD_DIM + d[None, :], mask=is_s[:, None] & is_d[None, :], other=0.0
        )
        total += tl.sum(totals * weights, axis=0)
        acc += tl.sum(partials * weights[:, None], axis=0)
    row = (first_row + lane // GROUP).to(tl.int64)
    head = kv_head * GROUP + lane % GROUP
    out = out_ptr + (row * (NUM_KV_HEADS * GROUP) + head) * HEAD_DIM + d
    tl.store(out, round_to(acc / total, out_ptr.dtype.element_ty), mask=is_d)


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))
def write_kv_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, head_dim], first stride free
    value_ptr,
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, num_kv_heads, head_dim], first stride free
    value_cache_ptr,
    slots_ptr,  # int64 [num_tokens]; a negative one stores nothing (padding rows of a captured batch)
    key_stride,
    value_stride,
    key_block_stride,
    value_block_stride,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Program (token): WIDTH = num_kv_heads * head_dim elements to its slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    in_block = (slot % BLOCK_SIZE) * WIDTH
    w = tl.arange(0, BLOCK_W)
    is_w = w < WIDTH
    key = tl.load(key_ptr + row * key_stride + w, mask=is_w)
    value = tl.load(value_ptr + row * value_stride + w, mask=is_w)
    block = slot // BLOCK_SIZE
    tl.store(key_cache_ptr + block * key_block_stride + in_block + w, key, mask=is_w)
    tl.store(value_cache_ptr + block * value_block_stride + in_block + w, value, mask=is_w)
