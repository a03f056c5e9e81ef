// The adapters' part of a projection: shrink (x * A^T), expand (v * B), for rows of many adapters. Included by isa.cpp.
//
// Work is shared in items of (run of rows of one segment, slice, tile of rank rows or of columns): one long segment
// makes as many items as many short ones. Each rank row is read from memory once per run of rows. Sums run in one fixed
// order per element, so a row's result does not depend on what shares its batch.
#pragma once
#include "amx.h"
#include "lora_pages.h"
#include "shrink.h"
#include "transpose.h"
#include "work.h"

namespace {

constexpr int kRankPart = W == 16 ? 16 : 8;  // ranks in one item
constexpr int64_t kMaxRank = 1024;
// Blocks of up to so many rows are short runs (lora_short.h).
template <class T>
constexpr int kFewRows = kUsesTiles<T> ? 16 : 8;
#if defined(__AVX512F__)
constexpr int kExpandRows = 6, kExpandVectors = 4;
#elif defined(__AVX2__)
constexpr int kExpandRows = 2, kExpandVectors = 4;
#else
constexpr int kExpandRows = 1, kExpandVectors = 4;
#endif

constexpr int64_t kColumnStep = kExpandVectors * W;  // columns that are summed at once

// W floats, rounded to the dtype, as elements of T::Row.
template <class T>
INLINE void store_row(typename T::Row::Elem* to, vf v) {
  if constexpr (T::Row::kPerUnit == T::kPerUnit)
    T::store(to, v);
  else
    T::Row::store(to, T::round(v));
}

// Floats as units of T::Row, an odd number filled up with a zero.
template <class T>
INLINE void put_units(const float* v, int64_t count, uint32_t* units) {
  using Elem = typename T::Row::Elem;
  auto* to = reinterpret_cast<Elem*>(units);
  for (int64_t j = 0; j < count; j += W) {
    const int n = static_cast<int>(min64(W, count - j));
    Elem rounded[W];
    store_row<T>(rounded, load_one<Float32>(v + j, n));
    memcpy(to + j, rounded, n * sizeof(Elem));
  }
  if (count % T::kPerUnit) to[count] = 0;
}

// The first num_ranks of 8 floats as units of T::Row, zeros after them. Reads W floats if that is more.
template <class T>
INLINE void put_rank_tile(float* v, int64_t num_ranks, uint32_t* units) {
  for (int64_t j = num_ranks; j < kRankTile; j++) v[j] = 0;
  typename T::Row::Elem rounded[kRankTile + W];
  for (int i = 0; i < kRankTile; i += W) store_row<T>(rounded + i, load_floats(v + i));
  memcpy(units, rounded, kRankTile * sizeof *rounded);
}

// out[MR rows, kColumnStep columns] += scaling * v * B, over units of two rank rows (or one: float32). v is of T::Row,
// whose units v_stride counts. B's units are those of pair_two, so its columns and the sums stand in the order of
// load_two.
template <class T, int MR>
INLINE void expand_tile(int64_t num_units, const uint32_t* v, int64_t v_stride, const uint32_t* b, float scaling,
                        typename T::Elem* out, int64_t out_stride) {
  vf sums[MR][kExpandVectors] = {};
  for (int64_t k = 0; k < num_units; k++)
#pragma GCC unroll 2
    for (int half = 0; half < T::kHalves; half++) {
      typename T::Factor weights[kExpandVectors];
#pragma GCC unroll 8
      for (int n = 0; n < kExpandVectors; n++)
        weights[n] = T::half_lean(load_units(b + (k * kExpandVectors + n) * W), half);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const auto row = (typename T::Factor)splat_unit(v + m * v_stride + k * T::kHalves + half);
#pragma GCC unroll 8
        for (int n = 0; n < kExpandVectors; n++) T::add(sums[m][n], row, weights[n]);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < kExpandVectors; n += 2) {
      typename T::Elem* to = out + m * out_stride + n * W;
      vf two[2];
      T::load_two(to, two);
      two[0] = fma(splat(scaling), sums[m][n], two[0]);
      two[1] = fma(splat(scaling), sums[m][n + 1], two[1]);
      T::store_two(to, two);
    }
}

// Not inlined: each number of rows is compiled once.
template <class T>
__attribute__((noinline)) void expand_rows(int64_t num_rows, int64_t num_units, const uint32_t* v, int64_t v_stride,
                                           const uint32_t* b, float scaling, typename T::Elem* out,
                                           int64_t out_stride) {
  static_assert(kExpandRows <= 6);
  for (; num_rows >= kExpandRows; num_rows -= kExpandRows) {
    expand_tile<T, kExpandRows>(num_units, v, v_stride, b, scaling, out, out_stride);
    v += kExpandRows * v_stride, out += kExpandRows * out_stride;
  }
  switch (num_rows) {
    case 1: return expand_tile<T, 1>(num_units, v, v_stride, b, scaling, out, out_stride);
#if defined(__AVX512F__)
    case 2: return expand_tile<T, 2>(num_units, v, v_stride, b, scaling, out, out_stride);
    case 3: return expand_tile<T, 3>(num_units, v, v_stride, b, scaling, out, out_stride);
    case 4: return expand_tile<T, 4>(num_units, v, v_stride, b, scaling, out, out_stride);
    case 5: return expand_tile<T, 5>(num_units, v, v_stride, b, scaling, out, out_stride);
#endif
  }
}

// Addresses of rank rows [first, first + n) of a segment: of A or B of one slice, `width` elements each.
template <class T>
void find_rows(const pomona::LoraSite& site, const pomona::LoraStep& step, const void* pool, int64_t page_stride,
               int64_t width, int64_t segment, int64_t first, int64_t n, const char** rows) {
  using Elem = typename T::Elem;
  int64_t page = segment * step.max_pages + first / site.rows_per_page, within = first % site.rows_per_page;
  for (int64_t j = 0; j < n; page++, within = 0) {
    const Elem* start = static_cast<const Elem*>(pool) + step.page_tables[page] * page_stride;
    const char* row = shifted(step, page, reinterpret_cast<const char*>(start + within * width));
    for (const int64_t end = min64(n, j + site.rows_per_page - within); j < end; j++, row += width * sizeof(Elem))
      rows[j] = row;
  }
}

// Rank rows [first, first + n) of B of one slice, and after an odd last one, zeros that fill its unit up.
template <class T>
void find_b_rows(const pomona::LoraSite& site, const pomona::LoraStep& step, int64_t slice, int64_t segment,
                 int64_t first, int64_t n, const char** rows) {
  int64_t widest = site.in_features;  // of all sides: zeros stay where they are until more of them are asked for
  for (int64_t i = 0; i < site.num_slices; i++) widest = max64(widest, site.out_features[i]);
  find_rows<T>(site, step, site.b[slice], site.b_page_stride[slice], site.out_features[slice], segment, first, n, rows);
  if (n % T::kPerUnit) rows[n] = static_cast<const char*>(pomona::zeros(widest * sizeof(typename T::Elem)));
}

// Units (of T::Row) of a row of v: of whole tiles of ranks, the rest zeros.
template <class T>
int64_t row_units_of(const pomona::LoraStep& step) {
  constexpr int64_t kUnits = kUsesTiles<T> ? kStepUnits : kRankTile / T::Row::kPerUnit;
  return ceil_div(step.max_rank, kUnits * T::Row::kPerUnit) * kUnits;
}

#if defined(__AMX_BF16__)
// Up to 16 rank rows as columns of units, zeros after the last rank and the last input; fetch() is called now and then.
template <class F>
INLINE const uint32_t* lay_out_columns(const char* const* rank_rows, int64_t num_ranks, int64_t num_bytes,
                                       const F& fetch) {
  const int64_t num_units = ceil_div(num_bytes, 64) * kStepUnits;
  auto* columns = static_cast<uint32_t*>(pomona::scratch(pomona::kAdapterPanel, num_units * kRankPart * 4));
  const char* rows[kRankPart];
  for (int64_t j = 0; j < kRankPart; j++)
    rows[j] = j < num_ranks ? rank_rows[j] : static_cast<const char*>(pomona::zeros(num_bytes));
  lay_out_units(rows, num_bytes, columns, kRankPart, fetch);
  return columns;
}
#endif

template <class T>
struct Lora {
  using Elem = typename T::Elem;
  const pomona::LoraCall& call;
  const pomona::LoraSite& site;
  const pomona::LoraStep& step;
  int threads;
  int64_t num_long;                                          // blocks
  int64_t num_pairs, rank_parts, column_tile, column_tiles;  // pairs: (block, slice)
  // Of T::Row [num_slices, num_tokens, row_units], if both halves are done here; else call.v has floats.
  uint32_t* v_units;

  int64_t row_units() const { return row_units_of<T>(step); }
  int64_t rank_of(int64_t slice, int64_t segment) const { return call.ranks[slice * step.num_segments + segment]; }

  // Where there are enough blocks, an item is all of one, and a thread has those side by side: their rows are read
  // once, and are near for the product that comes next.
  bool has_whole_blocks() const { return num_long >= 2 * threads; }
  int64_t num_shrinks() const { return has_whole_blocks() ? num_long : num_pairs * rank_parts; }
  void shrink(int64_t item) const {
    const int64_t parts_of_block = site.num_slices * rank_parts, parts = has_whole_blocks() ? parts_of_block : 1;
    const int64_t first = has_whole_blocks() ? side_by_side(item, num_long, threads) * parts : item;
    const pomona::RowBlock& block = step.blocks[first / parts_of_block];
    ShrinkInputs<T> inputs(static_cast<const Elem*>(call.x) + block.start * call.x_stride, call.x_stride,
                           site.in_features);
    for (int64_t part = first; part < first + parts; part++)
      shrink_part(block, part / rank_parts % site.num_slices, part % rank_parts * kRankPart, inputs);
  }

  // Some ranks of one slice for a block's rows.
  void shrink_part(const pomona::RowBlock& block, int64_t slice, int64_t first_rank, ShrinkInputs<T>& inputs) const {
    const int64_t num_ranks = min64(kRankPart, rank_of(slice, block.segment) - first_rank);
    if (num_ranks <= 0) return;
    const char* rows[kRankPart];
    find_rows<T>(site, step, site.a[slice], site.a_page_stride[slice], site.in_features, block.segment, first_rank,
                 num_ranks, rows);
#if defined(__AMX_BF16__)
    if constexpr (kUsesTiles<T>) return shrink_tiles(block, slice, first_rank, num_ranks, rows);
#endif
    for (int64_t j = num_ranks; j < kRankPart; j++) rows[j] = rows[0];  // computed and not kept
    inputs.prepare(block.num_rows);
    for_shrink_tiles(block.num_rows, [&](int64_t row, int num_rows) {
      for (int64_t j = 0; j < num_ranks; j += kRankTile) {
        const int64_t n = min64(kRankTile, num_ranks - j);
        float sums[kShrinkRows + W / kRankTile][kRankTile] = {};  // and what put_rank_tile reads past the last
        inputs.shrink(row, num_rows, rows + j, sums);
        for (int m = 0; m < num_rows; m++) {
          const int64_t at = slice * step.num_tokens + block.start + row + m;
          if (v_units)
            put_rank_tile<T>(sums[m], n, v_units + at * row_units() + (first_rank + j) / T::Row::kPerUnit);
          else
            memcpy(call.v + at * step.max_rank + first_rank + j, sums[m], n * 4);
        }
      }
    });
  }

#if defined(__AMX_BF16__)
  // The same by tile registers: rank rows become columns. v is scaled here: what it becomes is added to the product's
  // own sums, before these are rounded.
  void shrink_tiles(const pomona::RowBlock& block, int64_t slice, int64_t first_rank, int64_t num_ranks,
                    const char* const* rows) const {
    const int64_t num_bytes = site.in_features * sizeof(Elem);
    const auto* columns = lay_out_columns(rows, num_ranks, num_bytes, [] {});
    const vf scaling = splat(v_units ? call.scalings[slice * step.num_segments + block.segment] : 1.0f);
    const bool is_half = first_rank % (2 * kRankPart) == 0 && first_rank + num_ranks == rank_of(slice, block.segment);
    for (int64_t r = 0; r < block.num_rows; r += kMostTileRows) {
      const int num_rows = static_cast<int>(min64(kMostTileRows, block.num_rows - r));
      const char* x = reinterpret_cast<const char*>(static_cast<const Elem*>(call.x) +
                                                    (block.start + r) * call.x_stride);
      const TileA inputs{x, call.x_stride * static_cast<int64_t>(sizeof(Elem))};
      alignas(64) float sums[kMostTileRows][kRankPart];
      NextRows next;
      tile_product<1>(num_rows, {inputs, {columns, 0, kRankPart}, ceil_div(num_bytes, 4), num_bytes}, nullptr,
                      {sums[0], kRankPart, false}, next);
      for (int m = 0; m < num_rows; m++) {
        const int64_t at = slice * step.num_tokens + block.start + r + m;
        if (v_units == nullptr) {
          memcpy(call.v + at * step.max_rank + first_rank, sums[m], num_ranks * 4);
          continue;
        }
        auto* v = reinterpret_cast<Elem*>(v_units + at * row_units()) + first_rank;
        T::store(v, scaling * load_floats(sums[m]));
        if (is_half) memset(v + kRankPart, 0, kRankPart * sizeof(Elem));
      }
    }
  }
#endif

  // Columns [column, end) of one slice for a block's rows. B's columns are put side by side once, for all rows.
  void expand(int64_t item) const {
    const int64_t pair = item / column_tiles, column = item % column_tiles * column_tile;
    const pomona::RowBlock& block = step.blocks[pair / site.num_slices];
    const int64_t slice = pair % site.num_slices, width = site.out_features[slice];
    const int64_t end = min64(column + column_tile, width), lora_rank = rank_of(slice, block.segment);
    if (lora_rank == 0 || column >= end) return;
    const int64_t num_units = ceil_div(lora_rank, T::kPerUnit);
    const char* rows[kMaxRank + 1];
    find_b_rows<T>(site, step, slice, block.segment, 0, lora_rank, rows);
    const bool is_scaled = kUsesTiles<T> && v_units;
    const float scaling = is_scaled ? 1.0f : call.scalings[slice * step.num_segments + block.segment];
    int64_t v_stride = num_units * T::kPerUnit / T::Row::kPerUnit;
    const int64_t scratch_units = num_units * kColumnStep + block.num_rows * v_stride;
    auto* b = static_cast<uint32_t*>(pomona::scratch(pomona::kRows, scratch_units * 4));
    const int64_t first_row = slice * step.num_tokens + block.start;
    uint32_t* v = b + num_units * kColumnStep;
    if (v_units)
      v = v_units + first_row * row_units(), v_stride = row_units();
    else
      for (int64_t r = 0; r < block.num_rows; r++)
        put_units<T>(call.v + (first_row + r) * step.max_rank, lora_rank, v + r * v_stride);
    Elem* out = static_cast<Elem*>(call.out) + block.start * call.out_stride;
    for (int64_t i = 0; i < slice; i++) out += site.out_features[i];
    for (int64_t c = column; c < end; c += kColumnStep) {
      const int64_t num_columns = min64(kColumnStep, end - c);
      for (int64_t k = 0; k < num_units; k++) {
        const Elem* row = reinterpret_cast<const Elem*>(rows[k * T::kPerUnit]) + c;
        const Elem* other = reinterpret_cast<const Elem*>(rows[k * T::kPerUnit + T::kPerUnit - 1]) + c;
        if (c + kColumnStep < end) prefetch(row + kColumnStep), prefetch(other + kColumnStep);
        for (int64_t i = 0; i < kColumnStep; i += 2 * W)
          pair_some<T>(row + i, other + i, max64(0, min64(2 * W, num_columns - i)), b + k * kColumnStep + i);
      }
      if (num_columns == kColumnStep)
        expand_rows<T>(block.num_rows, num_units, v, v_stride, b, scaling, out + c, call.out_stride);
      else
        expand_rest(block.num_rows, num_units, v, v_stride, b, scaling, out + c, num_columns);
    }
  }

  // Fewer columns than a step: through a copy of each row.
  void expand_rest(int64_t num_rows, int64_t num_units, const uint32_t* v, int64_t v_stride, const uint32_t* b,
                   float scaling, Elem* out, int64_t num_columns) const {
    for (int64_t r = 0; r < num_rows; r++) {
      Elem row[kColumnStep] = {};
      memcpy(row, out + r * call.out_stride, num_columns * sizeof(Elem));
      expand_rows<T>(1, num_units, v + r * v_stride, 0, b, scaling, row, 0);
      memcpy(out + r * call.out_stride, row, num_columns * sizeof(Elem));
    }
  }
};

// How a call's blocks are shared. They stand in order of falling length: the first num_long go the long way (lora.h),
// the others, of up to few_rows, are short runs, which are cut into slices where there are too few of them to keep the
// threads busy.
struct Shares {
  int threads;
  int64_t num_long, num_cuts;
  bool is_idle;
};

inline Shares share_blocks(const pomona::LoraCall& call, int num_threads, int few_rows) {
  const pomona::LoraSite& site = *call.site;
  const pomona::LoraStep& step = *call.step;
  int64_t num_ranks = 0, most_ranks = 0;  // of all segments, of one
  for (int64_t segment = 0; segment < step.num_segments; segment++) {
    int64_t ranks = 0;
    for (int64_t i = 0; i < site.num_slices; i++) ranks += call.ranks[i * step.num_segments + segment];
    num_ranks += ranks, most_ranks = max64(most_ranks, ranks);
  }
  int64_t features = site.num_slices * site.in_features, num_rows = 0;
  for (int64_t i = 0; i < site.num_slices; i++) features += site.out_features[i];
  for (int64_t i = 0; i < step.num_blocks; i++) num_rows += step.blocks[i].num_rows;
  // A weight takes a quarter of a cycle to arrive, and a vector of them a cycle or two for each row.
  const int64_t cycles = step.max_rank * features * (step.num_blocks / 4 + num_rows * 3 / (2 * W) + 1);
  const int threads = threads_for(num_threads, cycles);
  int64_t num_long = step.num_blocks;
  while (num_long > 0 && step.blocks[num_long - 1].num_rows <= few_rows) num_long--;
  const int64_t num_short = step.num_blocks - num_long;
  const bool is_cut = threads > 1 && (num_short < 2 * threads || 2 * most_ranks * threads > 3 * num_ranks);
  // Left to the long way where even cutting keeps too few threads busy.
  if (is_cut && num_short * site.num_slices * 2 < threads) num_long = step.num_blocks;
  return {threads, num_long, is_cut ? site.num_slices : 1, num_ranks == 0};
}

// The long blocks' work; nothing of it is done yet.
template <class T>
Lora<T> long_work(const pomona::LoraCall& call, const Shares& shares, uint32_t* v_units) {
  const pomona::LoraSite& site = *call.site;
  int64_t widest = 0;
  for (int64_t i = 0; i < site.num_slices; i++) widest = max64(widest, site.out_features[i]);
  // Columns are cut only where there are few rows to share. No result depends on the cut.
  const int64_t num_pairs = shares.num_long * site.num_slices;
  const int64_t cuts =
      max64(1, min64(ceil_div(8 * shares.threads, max64(1, num_pairs)), ceil_div(widest, 4 * kColumnStep)));
  const int64_t column_tile =
      shares.threads == 1 ? widest : ceil_div(ceil_div(widest, cuts), kColumnStep) * kColumnStep;
  return {call, site, *call.step, shares.threads, shares.num_long, num_pairs, ceil_div(call.step->max_rank, kRankPart),
          column_tile, ceil_div(widest, max64(1, column_tile)), v_units};
}

// Room for v as units, for all rows.
template <class T>
uint32_t* new_v(const pomona::LoraCall& call) {
  const int64_t num_rows = call.site->num_slices * call.step->num_tokens;
  return static_cast<uint32_t*>(pomona::scratch(pomona::kShrunk, num_rows * row_units_of<T>(*call.step) * 4));
}

}  // namespace
