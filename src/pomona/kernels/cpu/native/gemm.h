// Dense layers over packed weights: out = x * W^T + bias. Included by isa.cpp.
//
// Packed weights stand in groups of 16 outputs: [groups][units][16 outputs], zero-filled past the last output and the
// last input. A thread takes a few groups for a run of rows, so weights are read from memory once per run of rows, and
// while the sums of one item run the next item's weights are fetched.
#pragma once
#include "tile.h"
#include "work.h"

namespace {

constexpr int64_t kRowsPerItem = 256;
constexpr int64_t kUnitsPerPass = 2048;  // 3 groups of that many units are 384 KiB: they stay in a core's L2 cache

// A call, its inputs as rows of whole units.
template <class T>
struct GemmWork {
  using Elem = typename T::Elem;
  const pomona::GemmCall& call;
  const char* x;
  int64_t x_stride_bytes, num_units, num_groups;

  explicit GemmWork(const pomona::GemmCall& gemm_call)
      : call(gemm_call),
        x(static_cast<const char*>(call.x)),
        x_stride_bytes(call.x_stride * static_cast<int64_t>(sizeof(Elem))),
        num_units(ceil_div(call.in_features, T::kPerUnit)),
        num_groups(ceil_div(call.out_features, kGroup)) {
    if (call.in_features % T::kPerUnit == 0) return;
    x_stride_bytes = num_units * 4;  // half a unit at each row's end: copy, so that it is a zero
    char* rows = static_cast<char*>(pomona::scratch(1, call.num_rows * x_stride_bytes));
    for (int64_t row = 0; row < call.num_rows; row++) {
      char* copy = rows + row * x_stride_bytes;
      memset(copy + x_stride_bytes - 4, 0, 4);
      memcpy(copy, static_cast<const Elem*>(call.x) + row * call.x_stride, call.in_features * sizeof(Elem));
    }
    x = rows;
  }

  TileA inputs(int64_t row, int64_t unit) const { return {x + row * x_stride_bytes + unit * 4, x_stride_bytes}; }

  void store(const float* sums, int64_t row, int64_t group, int groups) const {
    const int64_t first = group * kGroup;
    const int64_t width = min64(groups * kGroup, call.out_features - first);
    const Elem* bias = static_cast<const Elem*>(call.bias);
    const int64_t at = row * call.out_stride + first;
    for (int64_t i = 0; i < width; i += W) {
      const int n = static_cast<int>(min64(W, width - i));
      vf value = load_floats(sums + i);
      if (call.scales) value *= load_floats(call.scales + first + i);
      if (bias) value += load_one<T>(bias + first + i, n);
      if (call.is_out_float)
        store_one<Float32>(static_cast<float*>(call.out) + at + i, value, n);
      else
        store_one<T>(static_cast<Elem*>(call.out) + at + i, value, n);
    }
  }

  // run<NG>(row, num_rows, group, next) for every run of rows by NG groups; the next item reads weights from `next`.
  template <int NG, class F>
  void share(int64_t group_bytes, int num_threads, const F& f) const {
    const int64_t num_columns = ceil_div(num_groups, NG);
    const int64_t num_runs = ceil_div(call.num_rows, kRowsPerItem);
    for_items(num_columns * num_runs, num_threads, [&](int64_t item) {
      const int64_t row = item / num_columns * kRowsPerItem, group = item % num_columns * NG;
      const int64_t num_rows = min64(kRowsPerItem, call.num_rows - row);
      const int64_t ahead = group + NG * num_threads;
      // One row alone streams as fast without: the processor foresees a few long runs by itself.
      const char* next = ahead + NG <= num_groups && row == 0 && num_rows > 1
                             ? static_cast<const char*>(call.packed) + ahead * group_bytes
                             : nullptr;
      if (group + NG <= num_groups) return f.template run<NG>(row, num_rows, group, next);
      for (int64_t last = group; last < num_groups; last++) f.template run<1>(row, num_rows, last, nullptr);
    });
  }

  // Weights of group_bytes per group; the cycles of one row, and of reading the weights, decide about threads.
  template <class F>
  void run(int64_t group_bytes, int num_threads, const F& f) const {
    const int64_t cycles = call.num_rows * num_units * num_groups * kGroupVectors / 2 + num_units * num_groups;
    const int threads = threads_for(num_threads, cycles);
    if (call.num_rows == 1)
      share<2 * kTileGroups>(group_bytes, threads, f);
    else
      share<kTileGroups>(group_bytes, threads, f);
  }
};

template <class T>
struct Gemm {
  GemmWork<T> work;

  // Rows [row, row + num_rows) by NG groups. `next` is what the following item will read.
  template <int NG>
  void run(int64_t row, int64_t num_rows, int64_t group, const char* next) const {
    const int64_t num_units = work.num_units;
    const uint32_t* weights = static_cast<const uint32_t*>(work.call.packed) + group * num_units * kGroup;
    const bool is_one_pass = num_units <= kUnitsPerPass;
    const int64_t stride = NG * kGroup;
    float one_tile[kTileRows * NG * kGroup];
    float* sums = is_one_pass ? one_tile : static_cast<float*>(pomona::scratch(0, num_rows * stride * 4));
    const int64_t next_lines = NG * num_units;
    const int64_t lines_per_step = ceil_div(NG, ceil_div(num_rows, kTileRows));
    for (int64_t unit = 0; unit < num_units; unit += kUnitsPerPass) {
      const int64_t units = min64(kUnitsPerPass, num_units - unit);
      for (int64_t r = 0; r < num_rows; r += kTileRows) {
        const int rows = static_cast<int>(min64(kTileRows, num_rows - r));
        float* some_sums = is_one_pass ? sums : sums + r * stride;
        const int64_t fetched = r / kTileRows * units * lines_per_step;
        const bool is_fetching = next && is_one_pass && fetched < next_lines;
        tile_rows<T, NG>(rows, units, work.inputs(row + r, unit),
                         TileB{weights + unit * kGroup, num_units * kGroup, kGroup},
                         TileC{some_sums, stride, unit > 0},
                         is_fetching ? Ahead{next + fetched * 64, lines_per_step} : Ahead{});
        if (unit + units == num_units)
          for (int m = 0; m < rows; m++) work.store(some_sums + m * stride, row + r + m, group, NG);
      }
    }
  }
};

template <class T>
void gemm(const pomona::GemmCall& call, int num_threads) {
  const Gemm<T> gemm{GemmWork<T>(call)};
  gemm.work.run(gemm.work.num_units * kGroup * 4, num_threads, gemm);
}

}  // namespace
