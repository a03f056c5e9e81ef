// Both halves of LoRA for short runs of rows (decodes), and the entry that shares all runs among threads. isa.cpp only.
//
// A short run does little with each weight, so memory sets the pace: an adapter's pages are read once, from end to end,
// A and B of every slice as they lie beside each other, and a fixed distance ahead of the computation they are fetched
// into the cache, across the gap to the next page and to the next run. The sums are those of lora.h, in the same order.
#pragma once
#include "lora.h"

namespace {

constexpr int kFewRows = W == 16 ? 8 : W == 8 ? 4 : 2;
constexpr int kRanksAtOnce = 4;
constexpr int64_t kFetchAhead = 8192;

// Fetches one page's bytes of a site after the other, a few cache lines whenever it is asked to.
struct Fetcher {
  const char *at, *end;
  const int32_t *page, *last_page, *next_run;
  const char* first_byte;  // of the site's part of page 0
  int64_t page_bytes, site_bytes;

  INLINE void fetch(int num_lines) {
    for (int i = 0; i < num_lines; i++) prefetch(at + 64 * i);
    at += 64 * num_lines;
    if (at >= end) turn();
  }
  void turn() {
    if (page < last_page)
      page++;
    else if (next_run)
      page = last_page = next_run, next_run = nullptr;
    at = first_byte + *page * page_bytes;
    end = at + site_bytes;
  }
};

// MR rows by NJ rank rows that follow each other.
template <class T, int MR, int NJ>
INLINE void shrink_run(int64_t in_features, const typename T::Elem* x, int64_t x_stride, const char* rank_row,
                       vf (*totals)[kRankTile], int first, Fetcher& fetcher) {
  constexpr int64_t kBytes = W * 4;
  const int64_t num_bytes = in_features * sizeof(typename T::Elem);
  vf sums[MR][NJ] = {};
  int64_t at = 0;
  for (; at + kBytes <= num_bytes; at += kBytes) {
    if (W == 16 || at % 64 == 0) fetcher.fetch(NJ);
    vu weights[NJ];
#pragma GCC unroll 4
    for (int j = 0; j < NJ; j++) weights[j] = load_units(rank_row + j * num_bytes + at);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vu row = load_units(reinterpret_cast<const char*>(x + m * x_stride) + at);
#pragma GCC unroll 4
      for (int j = 0; j < NJ; j++) sums[m][j] = T::mul_add(sums[m][j], row, weights[j]);
    }
  }
  if (at < num_bytes)
#pragma GCC unroll 4
    for (int j = 0; j < NJ; j++) {
      const vu weights = load_units_part(rank_row + j * num_bytes + at, num_bytes - at);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const char* row = reinterpret_cast<const char*>(x + m * x_stride) + at;
        sums[m][j] = T::mul_add(sums[m][j], load_units_part(row, num_bytes - at), weights);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int j = 0; j < NJ; j++) totals[m][first + j] = sums[m][j];
}

// sums[MR rows, columns] += v * B for NJ rank rows that follow each other. `sums` is in the order of load_two.
template <class T, int MR, int NJ>
INLINE void expand_run(int64_t num_columns, const float (*v)[kRankTile], int first, const typename T::Elem* rank_row,
                       float* sums, int64_t sums_stride, Fetcher& fetcher) {
  constexpr int64_t kBytes = 2 * W * sizeof(*rank_row);
  for_lanes(num_columns, LANES {
    if (kBytes >= 64 || i * static_cast<int64_t>(sizeof(*rank_row)) % 64 == 0) 
      fetcher.fetch(NJ * static_cast<int>(max64(1, kBytes / 64)));
    vf weights[NJ][2];
#pragma GCC unroll 4
    for (int j = 0; j < NJ; j++) load_some<T>(rank_row + j * num_columns + i, n, weights[j]);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      float* at = sums + m * sums_stride + i;
      vf low = load_floats(at), high = load_floats(at + W);
#pragma GCC unroll 4
      for (int j = 0; j < NJ; j++) {
        const vf factor = splat(v[m][first + j]);
        low = fma(factor, weights[j][0], low);
        high = fma(factor, weights[j][1], high);
      }
      store_floats(at, low);
      store_floats(at + W, high);
    }
  });
}

template <class T>
struct ShortRuns {
  using Elem = typename T::Elem;
  const Lora<T>& work;
  const pomona::LoraCall& call;
  const pomona::LoraSite& site;
  const pomona::LoraStep& step;
  const char* first_byte;
  int64_t page_bytes, site_bytes;

  const int32_t* pages_of(const pomona::RowBlock& block) const {
    return step.page_tables + block.segment * step.max_pages;
  }

  Fetcher fetcher(const pomona::RowBlock& block, int64_t most_ranks, const pomona::RowBlock* following) const {
    const int32_t* pages = pages_of(block);
    const char* start = first_byte + pages[0] * page_bytes;
    return {start + min64(kFetchAhead, site_bytes / 2), start + site_bytes, pages,
            pages + (most_ranks - 1) / site.rows_per_page, following ? pages_of(*following) : nullptr, first_byte,
            page_bytes, site_bytes};
  }

  template <int MR>
  void run(const pomona::RowBlock& block, const pomona::RowBlock* following, int64_t first_slice,
           int64_t end_slice) const {
    int64_t most_ranks = 0, all_columns = 0, starts[pomona::kMaxSlices];
    for (int64_t slice = first_slice; slice < end_slice; slice++) {
      most_ranks = max64(most_ranks, work.rank_of(slice, block.segment));
      starts[slice] = all_columns;
      all_columns += ceil_div(site.out_features[slice], 2 * W) * 2 * W;
    }
    if (most_ranks == 0) return;
    auto* sums = static_cast<float*>(pomona::scratch(1, MR * all_columns * 4));
    memset(sums, 0, MR * all_columns * 4);
    Fetcher ahead = fetcher(block, most_ranks, following);
    const int32_t* pages = pages_of(block);
    for (int64_t first = 0; first < most_ranks; first += site.rows_per_page)
      for (int64_t slice = first_slice; slice < end_slice; slice++) {
        const int64_t end = min64(site.rows_per_page, work.rank_of(slice, block.segment) - first);
        for (int64_t row = 0; row < end; row += kRankTile)
          ranks<MR>(block, slice, pages[first / site.rows_per_page], row, min64(kRankTile, end - row),
                    sums + starts[slice], all_columns, ahead);
      }
    Elem* out = static_cast<Elem*>(call.out) + block.start * call.out_stride;
    for (int64_t slice = 0; slice < first_slice; slice++) out += site.out_features[slice];
    for (int64_t slice = first_slice; slice < end_slice; slice++) {
      const float scaling = call.scalings[slice * step.num_segments + block.segment];
      if (work.rank_of(slice, block.segment) > 0)
        for (int64_t m = 0; m < MR; m++)
          add(site.out_features[slice], sums + m * all_columns + starts[slice], scaling, out + m * call.out_stride);
      out += site.out_features[slice];
    }
  }

  // Both halves for up to 8 rank rows of one page.
  template <int MR>
  void ranks(const pomona::RowBlock& block, int64_t slice, int64_t page, int64_t row, int64_t num_ranks, float* sums,
             int64_t sums_stride, Fetcher& ahead) const {
    const int64_t in = site.in_features, width = site.out_features[slice];
    const Elem* x = static_cast<const Elem*>(call.x) + block.start * call.x_stride;
    const Elem* a = static_cast<const Elem*>(site.a[slice]) + page * site.a_page_stride[slice] + row * in;
    const Elem* b = static_cast<const Elem*>(site.b[slice]) + page * site.b_page_stride[slice] + row * width;
    vf totals[MR][kRankTile] = {};
    float v[MR][kRankTile];
    int j = 0;
    for (; j + kRanksAtOnce <= num_ranks; j += kRanksAtOnce)
      shrink_run<T, MR, kRanksAtOnce>(in, x, call.x_stride, reinterpret_cast<const char*>(a + j * in), totals, j,
                                      ahead);
    for (; j < num_ranks; j++)
      shrink_run<T, MR, 1>(in, x, call.x_stride, reinterpret_cast<const char*>(a + j * in), totals, j, ahead);
    for (int m = 0; m < MR; m++) fold_sum8(totals[m], v[m]);
    for (j = 0; j + kRanksAtOnce <= num_ranks; j += kRanksAtOnce)
      expand_run<T, MR, kRanksAtOnce>(width, v, j, b + j * width, sums, sums_stride, ahead);
    for (; j < num_ranks; j++) expand_run<T, MR, 1>(width, v, j, b + j * width, sums, sums_stride, ahead);
  }

  void add(int64_t num_columns, const float* sums, float scaling, Elem* out) const {
    for_lanes(num_columns, LANES {
      vf two[2];
      load_some<T>(out + i, n, two);
      two[0] = fma(splat(scaling), load_floats(sums + i), two[0]);
      two[1] = fma(splat(scaling), load_floats(sums + i + W), two[1]);
      store_some<T>(out + i, two, n);
    });
  }

  // All slices of a block, or one.
  void operator()(int64_t index, int64_t following, int64_t slice) const {
    const pomona::RowBlock* next = following < step.num_blocks ? step.blocks + following : nullptr;
    const pomona::RowBlock& block = step.blocks[index];
    const int64_t first = slice < 0 ? 0 : slice, end = slice < 0 ? site.num_slices : slice + 1;
    switch (block.num_rows) {
      case 1: return run<1>(block, next, first, end);
      case 2: return run<2>(block, next, first, end);
#if defined(__AVX2__)
      case 3: return run<3>(block, next, first, end);
      case 4: return run<4>(block, next, first, end);
#endif
#if defined(__AVX512F__)
      case 5: return run<5>(block, next, first, end);
      case 6: return run<6>(block, next, first, end);
      case 7: return run<7>(block, next, first, end);
      case 8: return run<8>(block, next, first, end);
#endif
    }
  }
};

template <class T>
ShortRuns<T> short_runs(const Lora<T>& work) {
  const pomona::LoraSite& site = work.site;
  const int64_t bytes = sizeof(typename T::Elem);
  const char *low = static_cast<const char*>(site.a[0]), *high = low;
  for (int64_t i = 0; i < site.num_slices; i++) {
    const char *a = static_cast<const char*>(site.a[i]), *b = static_cast<const char*>(site.b[i]);
    low = a < low ? a : low;
    low = b < low ? b : low;
    const char* a_end = a + site.rows_per_page * site.in_features * bytes;
    const char* b_end = b + site.rows_per_page * site.out_features[i] * bytes;
    high = a_end > high ? a_end : high;
    high = b_end > high ? b_end : high;
  }
  return {work, work.call, site, work.step, low, site.a_page_stride[0] * bytes, high - low};
}

// phases: 1 shrink, 2 expand, 3 both.
template <class T>
void lora(const pomona::LoraCall& call, int num_threads, int phases) {
  const pomona::LoraSite& site = *call.site;
  const pomona::LoraStep& step = *call.step;
  bool is_idle = true;
  for (int64_t i = 0; i < site.num_slices * step.num_segments; i++) is_idle &= call.ranks[i] == 0;
  if (is_idle) return;
  int64_t widest = 0, all_columns = 0;
  for (int64_t i = 0; i < site.num_slices; i++)
    widest = max64(widest, site.out_features[i]), all_columns += site.out_features[i];
  const int64_t features = (phases & 1 ? site.num_slices * site.in_features : 0) + (phases & 2 ? all_columns : 0);
  int64_t num_rows = 0;
  for (int64_t i = 0; i < step.num_blocks; i++) num_rows += step.blocks[i].num_rows;
  // A weight takes a quarter of a cycle to arrive, and a vector of them a cycle or two for each row.
  const int64_t cycles = step.max_rank * features * (step.num_blocks / 4 + num_rows * 3 / (2 * W) + 1);
  const int threads = threads_for(num_threads, cycles);
  // Blocks stand in order of falling length. Short ones are done in one go where there are enough of them to share.
  int64_t num_long = step.num_blocks;
  if (phases == 3)
    while (num_long > 0 && step.blocks[num_long - 1].num_rows <= kFewRows) num_long--;
  // Few short runs are cut into slices, and left to the other way where even that keeps too few threads busy.
  const bool is_cut = threads > 1 && step.num_blocks - num_long < 2 * threads;
  if (is_cut && (step.num_blocks - num_long) * site.num_slices * 2 < threads) num_long = step.num_blocks;
  const int64_t cut = is_cut ? site.num_slices : 1, num_few = (step.num_blocks - num_long) * cut;
  // Columns are cut only where there are few rows to share. No result depends on the cut.
  const int64_t num_pairs = num_long * site.num_slices;
  const int64_t cuts = max64(1, min64(ceil_div(8 * threads, max64(1, num_pairs)), ceil_div(widest, 4 * kColumnStep)));
  const int64_t column_tile = threads == 1 ? widest : ceil_div(ceil_div(widest, cuts), kColumnStep) * kColumnStep;
  const Lora<T> work{call, site, step, num_pairs, ceil_div(step.max_rank, kRankTile), column_tile,
                     ceil_div(widest, max64(1, column_tile))};
  const ShortRuns<T> few = short_runs(work);
  const int64_t num_shrinks = phases & 1 ? num_pairs * work.rank_tiles : 0;
  for_items_twice(
      num_shrinks + num_few, phases & 2 ? num_pairs * work.column_tiles : 0, threads,
      [&](int64_t item) {
        if (item < num_shrinks) return work.shrink(item, item + threads);
        const int64_t index = item - num_shrinks;
        few(num_long + index / cut, num_long + (index + threads) / cut, is_cut ? index % cut : -1);
      },
      [&](int64_t item) { work.expand(item); });
}

}  // namespace
