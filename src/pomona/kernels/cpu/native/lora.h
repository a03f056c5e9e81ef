// The adapters' part of a projection: shrink (x * A^T) and expand (v * B), for rows of many adapters. Included by isa.cpp.
//
// Work is shared in items of (run of rows of one segment, slice, tile of rank rows or of columns): one long segment
// makes as many items as many short ones. Each rank row is read once per run of rows. Sums run in one fixed order per
// element, so a row's result does not depend on what shares its batch.
#pragma once
#include "vec.h"
#include "work.h"

namespace {

constexpr int kRankTile = 8;
constexpr int64_t kMaxRank = 1024;
#if defined(__AVX512F__)
constexpr int kShrinkRows = 3, kExpandRows = 6, kExpandVectors = 4;
constexpr int64_t kColumnTile = 512;
#else
constexpr int kShrinkRows = 1, kExpandRows = 2, kExpandVectors = 4;
constexpr int64_t kColumnTile = 256;
#endif

// MR rows by 8 rank rows, summed over the input features.
template <class T, int MR>
INLINE void shrink_tile(int64_t in_features, const typename T::Elem* x, int64_t x_stride, const char* const* rank_rows,
                        float (*sums)[kRankTile]) {
  constexpr int kBytes = W * 4;
  const int64_t num_bytes = in_features * sizeof(typename T::Elem);
  vf totals[MR][kRankTile] = {};
  const auto step = [&](int64_t at, auto load) {
    vu row[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) row[m] = load(reinterpret_cast<const char*>(x + m * x_stride) + at);
#pragma GCC unroll 8
    for (int j = 0; j < kRankTile; j++) {
      const vu weights = load(rank_rows[j] + at);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) totals[m][j] = T::mul_add(totals[m][j], row[m], weights);
    }
  };
  int64_t at = 0;
  for (; at + kBytes <= num_bytes; at += kBytes) step(at, [](const char* p) { return load_units(p); });
  if (at < num_bytes) step(at, [&](const char* p) { return load_units_part(p, num_bytes - at); });
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) fold_sum8(totals[m], sums[m]);
}

// out[MR rows, NV vectors of columns] += scaling * v * B, B's rows given one by one.
template <class T, int MR, int NV>
INLINE void expand_tile(int64_t lora_rank, const float* v, int64_t v_stride, const char* const* rank_rows,
                        int64_t column, float scaling, typename T::Elem* out, int64_t out_stride) {
  using Elem = typename T::Elem;
  vf sums[MR][NV] = {};
  for (int64_t j = 0; j < lora_rank; j++) {
    const Elem* row = reinterpret_cast<const Elem*>(rank_rows[j]) + column;
    vf weights[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) weights[n] = T::load(row + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vf value = splat(v[m * v_stride + j]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) sums[m][n] = fma(value, weights[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) {
      Elem* to = out + m * out_stride + n * W;
      T::store(to, fma(splat(scaling), sums[m][n], T::load(to)));
    }
}

// The same for one row and fewer columns than a vector holds.
template <class T>
void expand_rest(int64_t lora_rank, const float* v, const char* const* rank_rows, int64_t column, int num_columns,
                 float scaling, typename T::Elem* out) {
  using Elem = typename T::Elem;
  vf sums = {};
  for (int64_t j = 0; j < lora_rank; j++)
    sums = fma(splat(v[j]), load_part<T>(reinterpret_cast<const Elem*>(rank_rows[j]) + column, num_columns), sums);
  store_part<T>(out, fma(splat(scaling), sums, load_part<T>(out, num_columns)), num_columns);
}

template <class T>
struct Lora {
  using Elem = typename T::Elem;
  const pomona::LoraCall& call;
  const pomona::LoraSite& site;
  const pomona::LoraStep& step;

  int64_t rank_of(int64_t slice, int64_t segment) const { return call.ranks[slice * step.num_segments + segment]; }

  // Addresses of rank rows [first, first + n) of a segment.
  void find_rows(const void* pool, int64_t page_stride, int64_t width, int64_t segment, int64_t first, int64_t n,
                 const char** rows) const {
    const int32_t* pages = step.page_tables + segment * step.max_pages;
    int64_t page = first / site.rows_per_page, within = first % site.rows_per_page;
    for (int64_t j = 0; j < n; j++) {
      rows[j] = reinterpret_cast<const char*>(static_cast<const Elem*>(pool) + pages[page] * page_stride + within * width);
      if (++within == site.rows_per_page) within = 0, page++;
    }
  }

  void shrink(const pomona::RowBlock& block, int64_t slice, int64_t first_rank) const {
    const int64_t lora_rank = rank_of(slice, block.segment);
    const int64_t num_ranks = min64(kRankTile, lora_rank - first_rank);
    if (num_ranks <= 0) return;
    const char* rows[kRankTile];
    find_rows(site.a[slice], site.a_page_stride[slice], site.in_features, block.segment, first_rank, num_ranks, rows);
    for (int64_t j = num_ranks; j < kRankTile; j++) rows[j] = rows[0];  // computed and not kept
    for (int64_t r = 0; r < block.num_rows;) {
      const int64_t row = block.start + r;
      const Elem* x = static_cast<const Elem*>(call.x) + row * call.x_stride;
      float sums[kShrinkRows][kRankTile];
      int num_rows = 1;
      if (kShrinkRows > 1 && block.num_rows - r >= kShrinkRows) {
        num_rows = kShrinkRows;
        shrink_tile<T, kShrinkRows>(site.in_features, x, call.x_stride, rows, sums);
      } else {
        shrink_tile<T, 1>(site.in_features, x, call.x_stride, rows, sums);
      }
      for (int m = 0; m < num_rows; m++)
        memcpy(call.v + (slice * step.num_tokens + row + m) * step.max_rank + first_rank, sums[m], num_ranks * 4);
      r += num_rows;
    }
  }

  template <int MR>
  void expand_rows(int64_t lora_rank, const float* v, const char* const* rows, int64_t column, int64_t end,
                   float scaling, Elem* out) const {
    constexpr int kWide = kExpandVectors * W;
    const int64_t v_stride = step.max_rank, stride = call.out_stride;
    int64_t c = column;
    for (; c + kWide <= end; c += kWide)
      expand_tile<T, MR, kExpandVectors>(lora_rank, v, v_stride, rows, c, scaling, out + c, stride);
    for (; c + W <= end; c += W) expand_tile<T, MR, 1>(lora_rank, v, v_stride, rows, c, scaling, out + c, stride);
    if (c < end)
      for (int m = 0; m < MR; m++)
        expand_rest<T>(lora_rank, v + m * v_stride, rows, c, static_cast<int>(end - c), scaling, out + m * stride + c);
  }

  void expand(const pomona::RowBlock& block, int64_t slice, int64_t column) const {
    const int64_t lora_rank = rank_of(slice, block.segment);
    const int64_t width = site.out_features[slice];
    if (lora_rank == 0 || column >= width) return;
    const char* rows[kMaxRank];
    find_rows(site.b[slice], site.b_page_stride[slice], width, block.segment, 0, lora_rank, rows);
    const float scaling = call.scalings[slice * step.num_segments + block.segment];
    int64_t first_column = 0;
    for (int64_t i = 0; i < slice; i++) first_column += site.out_features[i];
    const int64_t end = min64(column + kColumnTile, width);
    for (int64_t r = 0; r < block.num_rows;) {
      const int64_t row = block.start + r;
      const float* v = call.v + (slice * step.num_tokens + row) * step.max_rank;
      Elem* out = static_cast<Elem*>(call.out) + row * call.out_stride + first_column;
      if (block.num_rows - r >= kExpandRows) {
        expand_rows<kExpandRows>(lora_rank, v, rows, column, end, scaling, out);
        r += kExpandRows;
      } else {
        expand_rows<1>(lora_rank, v, rows, column, end, scaling, out);
        r += 1;
      }
    }
  }
};

// phases: 1 shrink, 2 expand, 3 both.
template <class T>
void lora(const pomona::LoraCall& call, int num_threads, int phases) {
  const pomona::LoraSite& site = *call.site;
  const pomona::LoraStep& step = *call.step;
  const Lora<T> work{call, site, step};
  const int64_t num_pairs = step.num_blocks * site.num_slices;
  const int64_t rank_tiles = ceil_div(step.max_rank, kRankTile);
  int64_t widest = 0, all_columns = 0;
  for (int64_t i = 0; i < site.num_slices; i++)
    widest = max64(widest, site.out_features[i]), all_columns += site.out_features[i];
  const int64_t column_tiles = ceil_div(widest, kColumnTile);
  const auto shrink = [&](int64_t item) {
    const int64_t pair = item / rank_tiles;
    work.shrink(step.blocks[pair / site.num_slices], pair % site.num_slices, item % rank_tiles * kRankTile);
  };
  const auto expand = [&](int64_t item) {
    const int64_t pair = item / column_tiles;
    work.expand(step.blocks[pair / site.num_slices], pair % site.num_slices, item % column_tiles * kColumnTile);
  };
  const int64_t num_shrinks = phases & 1 ? num_pairs * rank_tiles : 0;
  const int64_t num_expands = phases & 2 ? num_pairs * column_tiles : 0;
  const int64_t features = (phases & 1 ? site.num_slices * site.in_features : 0) + (phases & 2 ? all_columns : 0);
  const int threads = threads_for(num_threads, step.num_blocks * step.max_rank * features / (2 * W));
  for_items_twice(num_shrinks, num_expands, threads, shrink, expand);
}

}  // namespace
