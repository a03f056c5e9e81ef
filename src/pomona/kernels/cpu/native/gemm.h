// Dense layers over packed weights: out = x * W^T + bias. Included by isa.cpp.
//
// Packed weights stand in groups of 16 outputs: [groups][units][16 outputs], zero-filled past the last output and the
// last input. A thread takes a few groups for a run of rows, so weights are read from memory once per run of rows, and
// while the sums of one item run the next item's weights are fetched.
//
// With narrow vectors a thread's items stand side by side: it reads weights on from one to the next, and two threads do
// not store into one cache line, which an item of 16 outputs fills half of.
#pragma once
#include "fused.h"
#include "lora_pages.h"
#include "rows.h"
#include "work.h"

namespace {

constexpr int64_t kRowsPerItem = 256;
constexpr int64_t kMostFetchingRows = 64;  // with more, reading an adapter is little beside using it
constexpr int64_t kFewestBytesPerStep = 32;  // of a page: a step that asks for a line once more costs as much
constexpr int64_t kFewBytes = 16384;     // of a group's weights
constexpr int64_t kUnitsPerPass = 2048;  // 3 groups of that many units are 384 KiB: they stay in a core's L2 cache

// Pages of adapters that are wanted next, fetched beside a product that computes longer than it reads: each by the
// thread that will want it.
struct PageFetch {
  const char** pages = nullptr;    // those of the first thread, then of the next
  int64_t* first_page = nullptr;   // [num_threads + 1]
  int64_t num_threads, num_lines;  // lines of each page

  PageFetch(const pomona::GemmCall& call, int64_t element_bytes, int threads) : num_threads(threads) {
    if (call.adapters == nullptr || call.num_rows == 1 || call.num_rows > kMostFetchingRows) return;
    const pomona::LoraCall& lora = *call.adapters;
    const pomona::LoraStep& step = *lora.step;
    const SitePages site(*lora.site, element_bytes);
    num_lines = ceil_div(site.num_bytes, 64);
    const int64_t most_pages = step.num_blocks * step.max_pages;
    first_page = static_cast<int64_t*>(
        pomona::scratch(pomona::kPages, (num_threads + 1) * sizeof(int64_t) + most_pages * sizeof(char*)));
    pages = reinterpret_cast<const char**>(first_page + num_threads + 1);
    int64_t num_pages = 0;
    for (int64_t thread = 0; thread < num_threads; thread++) {
      first_page[thread] = num_pages;
      const bool is_shared = call.is_block_shared;
      const int64_t first_block = is_shared ? 0 : thread, block_step = is_shared ? 1 : num_threads;
      const int64_t first_page_of_block = is_shared ? thread : 0, page_step = is_shared ? num_threads : 1;
      int32_t last_segment = -1;
      for (int64_t block = first_block; block < step.num_blocks; block += block_step) {
        const int32_t segment = step.blocks[block].segment;
        if (segment == last_segment) continue;
        last_segment = segment;
        int64_t most_ranks = 0;
        for (int64_t slice = 0; slice < lora.site->num_slices; slice++)
          most_ranks = max64(most_ranks, lora.ranks[slice * step.num_segments + segment]);
        for (int64_t i = first_page_of_block; i * lora.site->rows_per_page < most_ranks; i += page_step) {
          const int64_t page = segment * step.max_pages + i;
          pages[num_pages++] = shifted(step, page, site.first_byte + step.page_tables[page] * site.page_bytes);
        }
      }
    }
    first_page[num_threads] = num_pages;
  }

  // What the slot-th of an item's tiles that have no weights to fetch fetches over so many steps: a piece of one page.
  // Narrow vectors have no time to look for the next page, and fetch enough with a step or nothing.
  Ahead piece(int64_t column, int64_t num_columns, int64_t slot, int64_t num_slots, int64_t num_steps) const {
    if (pages == nullptr || slot < 0) return {};
    const int64_t turn = turn_of(column, num_columns, num_threads), thread = turn % num_threads;
    const int64_t num_pages = first_page[thread + 1] - first_page[thread];
    if (num_pages == 0) return {};
    const int64_t all_slots = ceil_div(num_columns - thread, num_threads) * num_slots;
    const int64_t most_pieces = num_lines * 64 / (num_steps * kFewestBytesPerStep);
    const int64_t pieces = max64(1, min64(all_slots / num_pages, most_pieces));
    const int64_t index = turn / num_threads * num_slots + slot;
    const int64_t lines = ceil_div(num_lines, pieces), first = index % pieces * lines;
    if (index >= num_pages * pieces || first >= num_lines) return {};
    const int64_t bytes = min64(lines, num_lines - first) * 64;
    const char* at = pages[first_page[thread] + index / pieces] + first * 64;
    return {at, at + bytes, ceil_div(bytes, num_steps)};
  }

  // A tile's share in the lines of its thread's pages, over so many steps. Threads take columns in turn.
  AheadPages share(int64_t column, int64_t num_columns, int64_t tile, int64_t num_tiles, int64_t num_steps) const {
    if (pages == nullptr) return {};
    const int64_t thread = column % num_threads;
    const int64_t all = (first_page[thread + 1] - first_page[thread]) * num_lines;
    const int64_t lines = ceil_div(all, ceil_div(num_columns - thread, num_threads) * num_tiles);
    const int64_t first = (column / num_threads * num_tiles + tile) * lines;
    if (first >= all) return {};
    AheadPages share{pages + first_page[thread] + first / num_lines, num_lines, min64(lines, all - first),
                     ceil_div(lines, num_steps)};
    share.turn(first % num_lines);
    return share;
  }
};

template <class T>
struct AddToProduct;

// A call, its inputs as rows of whole units.
template <class T>
struct GemmWork {
  using Elem = typename T::Elem;
  const pomona::GemmCall& call;
  const char* x;
  int64_t x_stride_bytes, num_units, num_groups;
  bool is_plain;  // sums become outputs as they are

  explicit GemmWork(const pomona::GemmCall& gemm_call)
      : call(gemm_call),
        x(static_cast<const char*>(call.x)),
        x_stride_bytes(call.x_stride * static_cast<int64_t>(sizeof(Elem))),
        num_units(ceil_div(call.in_features, T::kPerUnit)),
        num_groups(ceil_div(call.out_features, kGroup)),
        is_plain(call.scales == nullptr && call.bias == nullptr && !call.is_out_float) {
    if (call.in_features % T::kPerUnit == 0) return;
    x_stride_bytes = num_units * 4;  // half a unit at each row's end: copy, so that it is a zero
    char* rows = static_cast<char*>(pomona::scratch(pomona::kRows, call.num_rows * x_stride_bytes));
    for (int64_t row = 0; row < call.num_rows; row++) {
      char* copy = rows + row * x_stride_bytes;
      memset(copy + x_stride_bytes - 4, 0, 4);
      memcpy(copy, static_cast<const Elem*>(call.x) + row * call.x_stride, call.in_features * sizeof(Elem));
    }
    x = rows;
  }

  TileA inputs(int64_t row, int64_t unit) const { return {x + row * x_stride_bytes + unit * 4, x_stride_bytes}; }

  // What the sums of n columns are once scaled and biased.
  INLINE vf finish(const float* sums, int64_t column, int n) const {
    vf value = load_floats(sums);
    if (call.scales) value *= load_floats(call.scales + column);
    if (call.bias) value += load_one<T>(static_cast<const Elem*>(call.bias) + column, n);
    return value;
  }

  // Rows by NG groups from `group` on, with the adapters' part of those that get theirs now.
  template <int NG>
  void store_rows(const float* sums, int64_t stride, int64_t row, int num_rows, int64_t group,
                  FusedColumns<T, NG>* fused) const {
    if (fused == nullptr) {
      const bool is_whole = (group + NG) * kGroup <= call.out_features;
      if (is_whole && is_plain) return store_whole<NG, true>(sums, stride, row, num_rows, group);
      if (is_whole && !call.is_out_float) return store_whole<NG, false>(sums, stride, row, num_rows, group);
      for (int m = 0; m < num_rows; m++) store(sums + m * stride, row + m, group, NG);
      return;
    }
    const int32_t* segments = call.long_runs->segments + row;
    for (int first = 0, end; first < num_rows; first = end) {
      for (end = first + 1; end < num_rows && segments[end] == segments[first];) end++;
      if (segments[first] < 0) {
        for (int m = first; m < end; m++) store(sums + m * stride, row + m, group, NG);
        continue;
      }
      fused->keep(segments[first]);
      const float* product = sums + first * stride;
      fused->multiply(
          row + first, end - first,
          [&](int g) {
            return AddToProduct<T>{*this, product + g * kGroup, stride, row + first, (group + g) * kGroup,
                                   splat(fused->scalings[g])};
          },
          [&](int g) {
            for (int m = 0; m < end - first; m++)
              store(product + m * stride + g * kGroup, row + first + m, group + g, 1);
          });
    }
  }

  // Whole groups, of the outputs' dtype.
  template <int NG, bool kIsPlain>
  void store_whole(const float* sums, int64_t stride, int64_t row, int num_rows, int64_t group) const {
    constexpr int kStep = min64(2 * W, kGroup);
    Elem* out = static_cast<Elem*>(call.out) + row * call.out_stride + group * kGroup;
    for (int m = 0; m < num_rows; m++, sums += stride, out += call.out_stride)
#pragma GCC unroll 6
      for (int i = 0; i < NG * kGroup; i += kStep) {
        vf part[2];
#pragma GCC unroll 2
        for (int j = 0; j < kStep; j += W)
          part[j / W] = kIsPlain ? load_floats(sums + i + j) : finish(sums + i + j, group * kGroup + i + j, W);
        kStep > W ? T::store_next(out + i, part[0], part[1]) : T::store(out + i, part[0]);
      }
  }

  void store(const float* sums, int64_t row, int64_t group, int groups) const {
    const int64_t first = group * kGroup;
    const int64_t width = min64(groups * kGroup, call.out_features - first);
    const int64_t at = row * call.out_stride + first;
    for (int64_t i = 0; i < width; i += W) {
      const int n = static_cast<int>(min64(W, width - i));
      const vf value = finish(sums + i, first + i, n);
      if (call.is_out_float)
        store_one<Float32>(static_cast<float*>(call.out) + at + i, value, n);
      else
        store_one<T>(static_cast<Elem*>(call.out) + at + i, value, n);
    }
  }

  // `ahead`: what the following item will read, as f.run takes it.
  template <int NG, class F, class Next>
  void run_columns(const F& f, int64_t row, int64_t num_rows, int64_t group, int64_t groups_ahead, Next ahead) const {
    if (call.long_runs == nullptr) return f.template run<NG>(row, num_rows, group, ahead, nullptr);
    FusedColumns<T, NG> fused(call, group, groups_ahead);
    f.template run<NG>(row, num_rows, group, ahead, &fused);
  }

  // run<NG>(row, num_rows, group, next, fused) for every run of rows by NG groups; the next item reads weights from
  // `next`. All are given to `share`.
  template <int NG, class F, class S>
  void run_groups(int64_t group_bytes, int num_threads, const F& f, const S& share) const {
    const int64_t num_columns = ceil_div(num_groups, NG);
    const int64_t num_runs = ceil_div(call.num_rows, kRowsPerItem);
    share(num_columns * num_runs, num_threads, [&](int64_t item) {
      const int64_t row = item / num_columns * kRowsPerItem, column = item % num_columns;
      const int64_t group = (W < 16 ? side_by_side(column, num_columns, num_threads) : column) * NG;
      const int64_t num_rows = min64(kRowsPerItem, call.num_rows - row);
      const int64_t groups_ahead = W < 16 ? NG : NG * num_threads, ahead = group + groups_ahead;
      // One row alone streams as fast without: the processor foresees a few long runs by itself, but not short ones.
      const bool is_foreseen = num_rows == 1 && group_bytes > kFewBytes;
      const char* next = item + num_threads < num_columns && ahead + NG <= num_groups && !is_foreseen
                             ? static_cast<const char*>(call.packed) + ahead * group_bytes
                             : nullptr;
      if (group + NG <= num_groups) return run_columns<NG>(f, row, num_rows, group, groups_ahead, next);
      for (int64_t last = group; last < num_groups; last++) run_columns<1>(f, row, num_rows, last, 0, nullptr);
    });
  }

  // Weights of group_bytes per group; the cycles of one row, and of reading the weights, decide about threads.
  template <class F, class S>
  void run(int64_t group_bytes, int num_threads, const F& f, const S& share) const {
    const int64_t cycles = call.num_rows * num_units * num_groups * kGroupVectors / 2 + num_units * num_groups;
    const int threads = threads_for(num_threads, cycles);
    if (call.num_rows == 1)
      run_groups<2 * kTileGroups>(group_bytes, threads, f, share);
    else
      run_groups<kTileGroups>(group_bytes, threads, f, share);
  }
};

// What an adapter adds to a product that has not been stored: that is rounded as if it had been, and read again.
template <class T>
struct AddToProduct {
  const GemmWork<T>& work;
  const float* product;
  int64_t stride, row, column;
  vf scaling;

  INLINE void operator()(TileC, int m, int v, vf sum) const {
    const float* from = product + m * stride + v * W;
    const vf value = T::round(work.is_plain ? load_floats(from) : work.finish(from, column + v * W, W));
    typename T::Elem* out = static_cast<typename T::Elem*>(work.call.out) + (row + m) * work.call.out_stride;
    T::store(out + column + v * W, fma(scaling, sum, value));
  }

  // The same for a group's columns of some rows, of sums that were kept.
  void rows(int num_rows, const float* sums) const {
    work.is_plain ? rows<true>(num_rows, sums) : rows<false>(num_rows, sums);
  }
  template <bool kIsPlain>
  INLINE void rows(int num_rows, const float* sums) const {
    typename T::Elem* out = static_cast<typename T::Elem*>(work.call.out) + row * work.call.out_stride + column;
    const float* from = product;
    for (int m = 0; m < num_rows; m++, out += work.call.out_stride, from += stride, sums += kGroup)
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; i += 2 * W) {
        vf two[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          const int at = i + j * W;
          const vf value = kIsPlain ? load_floats(from + at) : work.finish(from + at, column + at, W);
          two[j] = fma(scaling, load_floats(sums + at), T::round(value));
        }
        T::store_next(out + i, two[0], two[1]);
      }
  }
};

// A call's inputs, rows of whole units, of T::Row: where that is not T, each is widened once here and not for every
// column.
template <class T>
struct ProductRows {
  const char* rows;
  int64_t stride_bytes;

  ProductRows(const GemmWork<T>& work, int num_threads) : rows(work.x), stride_bytes(work.x_stride_bytes) {
    if constexpr (T::Row::kPerUnit < T::kPerUnit) {
      const int64_t num_inputs = work.num_units * T::kPerUnit;
      stride_bytes = (ceil_div(num_inputs * 4, 64) | 1) * 64;  // odd: rows do not crowd out each other
      char* to = static_cast<char*>(pomona::scratch(pomona::kWideRows, work.call.num_rows * stride_bytes));
      const char* from = rows;
      const int64_t from_stride = work.x_stride_bytes, to_stride = stride_bytes;
      for_rows(work.call.num_rows, num_inputs / 4, num_threads, [&](int64_t row) {
        const auto* x = reinterpret_cast<const typename T::Elem*>(from + row * from_stride);
        auto* wide = reinterpret_cast<float*>(to + row * to_stride);
        for (int64_t i = 0; i < num_inputs; i += W)
          store_floats(wide + i, load_one<T>(x + i, static_cast<int>(min64(W, num_inputs - i))));
      });
      rows = to;
    }
  }

  TileA from(int64_t row, int64_t unit) const {
    constexpr int64_t kUnitBytes = T::kPerUnit / T::Row::kPerUnit * 4;
    return {rows + row * stride_bytes + unit * kUnitBytes, stride_bytes};
  }
};

template <class T>
struct Gemm {
  GemmWork<T> work;
  ProductRows<T> inputs;
  PageFetch beside;

  // Rows [row, row + num_rows) by NG groups. `next` is what the following item will read.
  template <int NG>
  void run(int64_t row, int64_t num_rows, int64_t group, const char* next, FusedColumns<T, NG>* fused) const {
    const int64_t num_units = work.num_units;
    const uint32_t* weights = static_cast<const uint32_t*>(work.call.packed) + group * num_units * kGroup;
    const bool is_one_pass = num_units <= kUnitsPerPass;
    const int64_t stride = NG * kGroup;
    float one_tile[kTileRows * NG * kGroup];
    float* sums = is_one_pass ? one_tile : static_cast<float*>(pomona::scratch(pomona::kSums, num_rows * stride * 4));
    const int64_t next_bytes = NG * num_units * 64, num_columns = ceil_div(work.num_groups, NG);
    const int64_t num_tiles = ceil_div(num_rows, kTileRows);
    // The next weights are fetched beside the first tiles: beside more of them memory is asked less at a time.
    const int64_t num_fetching = min64(num_tiles, max64(NG, 2)), bytes_per_step = NG * 64 / num_fetching;
    for (int64_t unit = 0; unit < num_units; unit += kUnitsPerPass) {
      const int64_t units = min64(kUnitsPerPass, num_units - unit);
      for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int64_t r = tile * num_rows / num_tiles;  // tiles of nearly as many rows each: those of few are slow
        const int rows = static_cast<int>((tile + 1) * num_rows / num_tiles - r);
        float* some_sums = is_one_pass ? sums : sums + r * stride;
        const int64_t fetched = tile * units * bytes_per_step;
        const bool is_fetching = next && is_one_pass && fetched < next_bytes;
        Ahead ahead;
        AheadPages pages;
        if (is_fetching) ahead = {next + fetched, next + next_bytes, bytes_per_step};
        if (unit == 0 && W == 16) pages = beside.share(group / NG, num_columns, tile, num_tiles, units);
        if (unit == 0 && W < 16 && !is_fetching)
          ahead = beside.piece(group / NG, num_columns, tile - num_fetching, num_tiles - num_fetching, units);
        tile_rows<T, NG, typename T::Row>(rows, units, inputs.from(row + r, unit),
                                          {weights + unit * kGroup, num_units * kGroup, kGroup},
                                          {some_sums, stride, unit > 0}, ahead, pages);
        if (unit + units == num_units) work.store_rows(some_sums, stride, row + r, rows, group, fused);
      }
    }
  }
};

// share(num_items, num_threads, f) runs f(item) for all items, whatever else it does.
template <class T, class S>
void gemm(const pomona::GemmCall& call, int num_threads, const S& share) {
  const GemmWork<T> work(call);
  const Gemm<T> gemm{work, ProductRows<T>(work, num_threads), PageFetch(call, sizeof(typename T::Elem), num_threads)};
  gemm.work.run(gemm.work.num_units * kGroup * 4, num_threads, gemm, share);
}

struct OnlyItems {
  template <class F>
  void operator()(int64_t num_items, int num_threads, const F& f) const {
    for_items(num_items, num_threads, f);
  }
};

template <class T>
void gemm(const pomona::GemmCall& call, int num_threads) {
  gemm<T>(call, num_threads, OnlyItems{});
}

}  // namespace
