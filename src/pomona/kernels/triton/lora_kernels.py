"""Segmented LoRA as two Triton kernels: shrink into float32 partial sums, expand onto the base product.

One program works on one *chunk*, a run of at most BLOCK_M rows of one segment (SGLang's chunked SGMV). Chunks are int32
[num_chunks, 4]: segment, first row, rows, unused; a chunk of no rows ends its program at once. K is split over
programs, each with its own partial sums, which expand adds up in order: no atomics, equal inputs give equal bits.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (kernels are written in Triton's language, whose arguments have no Python types)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from pomona.kernels.triton.numerics import dot, dot_wide, round_to


@triton.jit
def _rank_rows(pages_ptr, page_stride, page_table_ptr, rows, is_row, features, ROWS_PER_PAGE: tl.constexpr):
    """Pointers to rank rows of one adapter, through its page table."""
    pages = tl.load(page_table_ptr + rows // ROWS_PER_PAGE, mask=is_row, other=0)
    return pages_ptr + pages.to(tl.int64) * page_stride + (rows % ROWS_PER_PAGE) * features


# What changes from step to step is not specialized on: a new adapter must never compile a new kernel.
@triton.jit(
    do_not_specialize=("num_segments", "max_pages", "max_rank", "tiles_per_split"),
    do_not_specialize_on_alignment=("ranks_ptr", "page_tables_ptr", "chunks_ptr"),
)
def shrink_kernel(
    x_ptr,  # [num_tokens, in_features]
    v_ptr,  # float32 [num_splits, num_slices, num_tokens, at least max_rank]
    a_ptrs,  # per slice: [num_pages, ROWS_PER_PAGE, in_features]
    a_page_strides,
    ranks_ptr,  # int32 [num_slices, num_segments]
    page_tables_ptr,  # int32 [num_segments, max_pages]
    chunks_ptr,
    in_features,
    num_segments,
    max_pages,
    max_rank,
    x_stride,
    v_stride,
    v_slice_stride,
    v_split_stride,
    tiles_per_split,
    NUM_SLICES: tl.constexpr,
    ROWS_PER_PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_EVEN_K: tl.constexpr,
    IS_PADDED: tl.constexpr,  # rows of v have room for whole tiles of BLOCK_R
    PRECISION: tl.constexpr,
):
    """Program (chunk, split and rank tile, slice): v[split, slice, chunk, tile] = x[chunk, split] @ A[tile, split]."""
    chunk = tl.program_id(0)
    slice_index = tl.program_id(2)
    num_rank_tiles = tl.cdiv(max_rank, BLOCK_R)
    split = tl.program_id(1) // num_rank_tiles
    first_rank = tl.program_id(1) % num_rank_tiles * BLOCK_R
    segment = tl.load(chunks_ptr + chunk * 4)
    first_row = tl.load(chunks_ptr + chunk * 4 + 1)
    num_rows = tl.load(chunks_ptr + chunk * 4 + 2)
    lora_rank = tl.load(ranks_ptr + slice_index * num_segments + segment)
    if (num_rows == 0) | (first_rank >= lora_rank):
        return
    a_ptr = a_ptrs[0]
    a_page_stride = a_page_strides[0]
    for i in tl.static_range(1, NUM_SLICES):
        if slice_index == i:
            a_ptr = a_ptrs[i]
            a_page_stride = a_page_strides[i]

    rows = tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    ranks = first_rank + tl.arange(0, BLOCK_R)
    is_rank = ranks < lora_rank
    token_rows = (first_row + rows).to(tl.int64)
    x_rows = x_ptr + token_rows * x_stride
    a_rows = _rank_rows(
        a_ptr, a_page_stride, page_tables_ptr + segment * max_pages, ranks, is_rank, in_features, ROWS_PER_PAGE
    )
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(in_features, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for tile in range(first_tile, last_tile):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        if IS_EVEN_K:
            x = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None], other=0.0)
            a = tl.load(a_rows[None, :] + k[:, None], mask=is_rank[None, :], other=0.0)
        else:
            is_k = k < in_features
            x = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            a = tl.load(a_rows[None, :] + k[:, None], mask=is_rank[None, :] & is_k[:, None], other=0.0)
        acc = dot(x, a, acc, PRECISION)
    v_rows = v_ptr + split * v_split_stride + slice_index * v_slice_stride + token_rows * v_stride
    is_v = is_row[:, None] if IS_PADDED else is_row[:, None] & is_rank[None, :]
    tl.store(v_rows[:, None] + ranks[None, :], acc, mask=is_v)


@triton.jit(
    do_not_specialize=("num_segments", "max_pages"),
    do_not_specialize_on_alignment=("ranks_ptr", "scalings_ptr", "page_tables_ptr", "chunks_ptr"),
)
def expand_kernel(
    v_ptr,  # float32 [NUM_SPLITS, num_slices, num_tokens, at least max_rank]
    out_ptr,  # [num_tokens, sum of widths]
    b_ptrs,  # per slice: [num_pages, ROWS_PER_PAGE, width]
    b_page_strides,
    widths,
    ranks_ptr,  # int32 [num_slices, num_segments]
    scalings_ptr,  # float32 [num_slices, num_segments]
    page_tables_ptr,  # int32 [num_segments, max_pages]
    chunks_ptr,
    num_segments,
    max_pages,
    out_stride,
    v_stride,
    v_slice_stride,
    v_split_stride,
    NUM_SLICES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ROWS_PER_PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_EVEN_N: tl.constexpr,
    IS_PADDED: tl.constexpr,  # as in shrink_kernel
    PRECISION: tl.constexpr,
):
    """Program (chunk, column tile): out[chunk, tile] += scaling * v[chunk] @ B[:, tile]; tiles do not cross slices."""
    chunk = tl.program_id(0)
    tile = tl.program_id(1)
    segment = tl.load(chunks_ptr + chunk * 4)
    first_row = tl.load(chunks_ptr + chunk * 4 + 1)
    num_rows = tl.load(chunks_ptr + chunk * 4 + 2)
    b_ptr = b_ptrs[0]
    b_page_stride = b_page_strides[0]
    width = widths[0]
    slice_index = tile * 0
    first_tile = tile * 0
    slice_column = width * 0
    tiles_before = tl.cdiv(widths[0], BLOCK_N)
    columns_before = widths[0]
    for i in tl.static_range(1, NUM_SLICES):
        if tile >= tiles_before:
            b_ptr = b_ptrs[i]
            b_page_stride = b_page_strides[i]
            width = widths[i]
            slice_index = tile * 0 + i
            first_tile = tiles_before
            slice_column = columns_before
        tiles_before += tl.cdiv(widths[i], BLOCK_N)
        columns_before += widths[i]
    lora_rank = tl.load(ranks_ptr + slice_index * num_segments + segment)
    if (num_rows == 0) | (lora_rank == 0):
        return

    rows = tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    token_rows = (first_row + rows).to(tl.int64)
    columns = (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < width
    page_table_ptr = page_tables_ptr + segment * max_pages
    v_rows = v_ptr + slice_index * v_slice_stride + token_rows * v_stride
    # Read before the loop: in a decode, what counts is how many memory latencies follow each other.
    targets = out_ptr + token_rows[:, None] * out_stride + slice_column + columns[None, :]
    is_target = is_row[:, None] if IS_EVEN_N else is_row[:, None] & is_column[None, :]
    base = tl.load(targets, mask=is_target, other=0.0)
    scaling = tl.load(scalings_ptr + slice_index * num_segments + segment)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_rank in range(0, lora_rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        is_rank = ranks < lora_rank
        b_rows = _rank_rows(b_ptr, b_page_stride, page_table_ptr, ranks, is_rank, width, ROWS_PER_PAGE)
        is_b = is_rank[:, None] if IS_EVEN_N else is_rank[:, None] & is_column[None, :]
        b = tl.load(b_rows[:, None] + columns[None, :], mask=is_b, other=0.0)
        is_v = is_row[:, None] if IS_PADDED else is_row[:, None] & is_rank[None, :]
        v = tl.load(v_rows[:, None] + ranks[None, :], mask=is_v, other=0.0)
        for split in tl.static_range(1, NUM_SPLITS):
            v += tl.load(v_rows[:, None] + split * v_split_stride + ranks[None, :], mask=is_v, other=0.0)
        v = tl.where(is_rank[None, :], v, 0.0)
        acc = dot_wide(v, b, acc, PRECISION)
    tl.store(targets, round_to(base.to(tl.float32) + scaling * acc, out_ptr.dtype.element_ty), mask=is_target)
