// The adapters' part of a projection: shrink (x * A^T), expand (v * B), for rows of many adapters. Included by isa.cpp.
//
// Work is shared in items of (run of rows of one segment, slice, tile of rank rows or of columns): one long segment
// makes as many items as many short ones. Each rank row is read once per run of rows, and fetched while the item before
// it is computed: an adapter's pages lie anywhere, so the processor's own prefetching sees too little of each. Sums run
// in one fixed order per element, so a row's result does not depend on what shares its batch.
#pragma once
#include "vec.h"
#include "work.h"

namespace {

constexpr int kRankTile = 8;
constexpr int64_t kMaxRank = 1024;
#if defined(__AVX512F__)
constexpr int kShrinkRows = 3, kExpandRows = 6, kExpandVectors = 4;
#elif defined(__AVX2__)
constexpr int kShrinkRows = 1, kExpandRows = 2, kExpandVectors = 4;
#else
constexpr int kShrinkRows = 1, kExpandRows = 1, kExpandVectors = 4;
#endif

constexpr int64_t kColumnStep = kExpandVectors * W;  // columns that are summed at once

// Rank rows of a segment, as addresses, one after the other in memory only by chance.
struct RankRows {
  const char* const* rows;
  int64_t num_rows;
};

// MR rows by 8 rank rows, summed over the input features. Meanwhile, if asked, what comes next is fetched: the rows'
// own later parts, then the rows of the following tile.
template <class T, int MR, bool kIsFetching>
INLINE void shrink_tile(int64_t in_features, const typename T::Elem* x, int64_t x_stride, const char* const* rank_rows,
                        RankRows next, float (*sums)[kRankTile]) {
  constexpr int64_t kBytes = W * 4, kAhead = 5 * 64;
  const int64_t num_bytes = in_features * sizeof(typename T::Elem);
  vf totals[MR][kRankTile] = {};
  int64_t at = 0;
  for (; at + kBytes <= num_bytes; at += kBytes) {
    if (kIsFetching && at + kAhead < num_bytes) {
#pragma GCC unroll 8
      for (int j = 0; j < kRankTile; j++) prefetch(rank_rows[j] + at + kAhead);
    } else if (kIsFetching) {
      for (int64_t j = 0; j < next.num_rows; j++) prefetch(next.rows[j] + at + kAhead - num_bytes);
    }
    vu row[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) row[m] = load_units(reinterpret_cast<const char*>(x + m * x_stride) + at);
#pragma GCC unroll 8
    for (int j = 0; j < kRankTile; j++) {
      const vu weights = load_units(rank_rows[j] + at);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) totals[m][j] = T::mul_add(totals[m][j], row[m], weights);
    }
  }
  if (at < num_bytes)
#pragma GCC unroll 8
    for (int j = 0; j < kRankTile; j++) {
      const vu weights = load_units_part(rank_rows[j] + at, num_bytes - at);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const char* row = reinterpret_cast<const char*>(x + m * x_stride) + at;
        totals[m][j] = T::mul_add(totals[m][j], load_units_part(row, num_bytes - at), weights);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) fold_sum8(totals[m], sums[m]);
}

// out[MR rows, 2 NP vectors of columns] += scaling * v * B; B's columns are given as floats, in the order of load_two.
template <class T, int MR, int NP>
INLINE void expand_tile(int64_t lora_rank, const float* v, int64_t v_stride, const float* b, float scaling,
                        typename T::Elem* out, int64_t out_stride) {
  constexpr int NV = 2 * NP;
  vf sums[MR][NV] = {};
  for (int64_t j = 0; j < lora_rank; j++) {
    vf weights[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) weights[n] = load_floats(b + (j * NV + n) * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vf factor = splat(v[m * v_stride + j]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) sums[m][n] = fma(factor, weights[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n += 2) {
      typename T::Elem* to = out + m * out_stride + n * W;
      vf two[2];
      T::load_two(to, two);
      two[0] = fma(splat(scaling), sums[m][n], two[0]);
      two[1] = fma(splat(scaling), sums[m][n + 1], two[1]);
      T::store_two(to, two);
    }
}

template <class T>
struct Lora {
  using Elem = typename T::Elem;
  const pomona::LoraCall& call;
  const pomona::LoraSite& site;
  const pomona::LoraStep& step;
  int64_t num_pairs, rank_tiles, column_tile, column_tiles;  // pairs: (run of rows, slice)

  int64_t rank_of(int64_t slice, int64_t segment) const { return call.ranks[slice * step.num_segments + segment]; }

  // Addresses of rank rows [first, first + n) of a segment.
  void find_rows(const void* pool, int64_t page_stride, int64_t width, int64_t segment, int64_t first, int64_t n,
                 const char** rows) const {
    const int32_t* pages = step.page_tables + segment * step.max_pages;
    int64_t page = first / site.rows_per_page, within = first % site.rows_per_page;
    for (int64_t j = 0; j < n; j++) {
      const Elem* start = static_cast<const Elem*>(pool) + pages[page] * page_stride;
      rows[j] = reinterpret_cast<const char*>(start + within * width);
      if (++within == site.rows_per_page) within = 0, page++;
    }
  }

  struct ShrinkItem {
    const pomona::RowBlock* block;
    int64_t slice, first_rank, num_ranks;
  };

  ShrinkItem shrink_item(int64_t item) const {
    const int64_t pair = item / rank_tiles, first_rank = item % rank_tiles * kRankTile;
    const pomona::RowBlock* block = step.blocks + pair / site.num_slices;
    const int64_t slice = pair % site.num_slices;
    return {block, slice, first_rank, max64(0, min64(kRankTile, rank_of(slice, block->segment) - first_rank))};
  }

  void find_shrink_rows(const ShrinkItem& it, const char** rows) const {
    find_rows(site.a[it.slice], site.a_page_stride[it.slice], site.in_features, it.block->segment, it.first_rank,
              it.num_ranks, rows);
  }

  // `following` is the item that this thread will most likely take next.
  void shrink(int64_t item, int64_t following) const {
    const ShrinkItem it = shrink_item(item);
    if (it.num_ranks == 0) return;
    const char *rows[kRankTile], *next_rows[kRankTile];
    find_shrink_rows(it, rows);
    for (int64_t j = it.num_ranks; j < kRankTile; j++) rows[j] = rows[0];  // computed and not kept
    RankRows next{next_rows, 0};
    if (following < num_pairs * rank_tiles) {
      const ShrinkItem after = shrink_item(following);
      find_shrink_rows(after, next_rows);
      next.num_rows = after.num_ranks;
    }
    for (int64_t r = 0; r < it.block->num_rows;) {
      const int64_t row = it.block->start + r, left = it.block->num_rows - r;
      const Elem* x = static_cast<const Elem*>(call.x) + row * call.x_stride;
      const int num_rows = left >= kShrinkRows ? kShrinkRows : 1;
      float sums[kShrinkRows][kRankTile];
      if (left >= kShrinkRows)
        shrink_tile<T, kShrinkRows, false>(site.in_features, x, call.x_stride, rows, next, sums);
      else
        shrink_tile<T, 1, true>(site.in_features, x, call.x_stride, rows, next, sums);
      for (int m = 0; m < num_rows; m++)
        memcpy(call.v + (it.slice * step.num_tokens + row + m) * step.max_rank + it.first_rank, sums[m],
               it.num_ranks * 4);
      r += num_rows;
    }
  }

  // Columns [column, end) of one slice for a block's rows. B's columns are widened once, side by side, for all rows.
  void expand(int64_t item) const {
    const int64_t pair = item / column_tiles, column = item % column_tiles * column_tile;
    const pomona::RowBlock& block = step.blocks[pair / site.num_slices];
    const int64_t slice = pair % site.num_slices, width = site.out_features[slice];
    const int64_t end = min64(column + column_tile, width), lora_rank = rank_of(slice, block.segment);
    if (lora_rank == 0 || column >= end) return;
    const char* rows[kMaxRank];
    find_rows(site.b[slice], site.b_page_stride[slice], width, block.segment, 0, lora_rank, rows);
    const float scaling = call.scalings[slice * step.num_segments + block.segment];
    const float* v = call.v + (slice * step.num_tokens + block.start) * step.max_rank;
    Elem* out = static_cast<Elem*>(call.out) + block.start * call.out_stride;
    for (int64_t i = 0; i < slice; i++) out += site.out_features[i];
    float* b = static_cast<float*>(pomona::scratch(1, lora_rank * kColumnStep * 4));
    for (int64_t c = column; c < end; c += kColumnStep) {
      const int64_t num_columns = min64(kColumnStep, end - c);
      for (int64_t j = 0; j < lora_rank; j++)
        for (int64_t i = 0; i < kColumnStep; i += 2 * W) {
          vf two[2] = {};
          const Elem* from = reinterpret_cast<const Elem*>(rows[j]) + c + i;
          if (i + 2 * W <= num_columns)
            T::load_two(from, two);
          else if (i < num_columns)
            load_two_part<T>(from, num_columns - i, two);
          memcpy(b + j * kColumnStep + i, two, sizeof two);
          if (c + i + kColumnStep < end) prefetch(from + kColumnStep);
        }
      if (num_columns == kColumnStep)
        expand_columns(block.num_rows, lora_rank, v, b, scaling, out + c, call.out_stride);
      else
        expand_rest(block.num_rows, lora_rank, v, b, scaling, out + c, num_columns);
    }
  }

  void expand_columns(int64_t num_rows, int64_t lora_rank, const float* v, const float* b, float scaling, Elem* out,
                      int64_t stride) const {
    int64_t r = 0;
    for (; r + kExpandRows <= num_rows; r += kExpandRows)
      expand_tile<T, kExpandRows, kExpandVectors / 2>(lora_rank, v + r * step.max_rank, step.max_rank, b, scaling,
                                                      out + r * stride, stride);
    for (; r < num_rows; r++)
      expand_tile<T, 1, kExpandVectors / 2>(lora_rank, v + r * step.max_rank, 0, b, scaling, out + r * stride, 0);
  }

  // Fewer columns than a step: through a copy of each row.
  void expand_rest(int64_t num_rows, int64_t lora_rank, const float* v, const float* b, float scaling, Elem* out,
                   int64_t num_columns) const {
    for (int64_t r = 0; r < num_rows; r++) {
      Elem row[kColumnStep] = {};
      memcpy(row, out + r * call.out_stride, num_columns * sizeof(Elem));
      expand_columns(1, lora_rank, v + r * step.max_rank, b, scaling, row, 0);
      memcpy(out + r * call.out_stride, row, num_columns * sizeof(Elem));
    }
  }
};

}  // namespace
