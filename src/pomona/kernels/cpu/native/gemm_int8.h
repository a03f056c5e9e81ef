// Dense layers over int8 weights with a scale per output: out = (x * Q^T) * scales + bias. Included by isa.cpp.
//
// Packed as in gemm.h with a byte per weight and two inputs to a unit, whatever the dtype. Inputs become int16
// (fixed_point.h), bytes too, in registers: a block of inputs is summed exactly, then added in float32, block after
// block; the scale of the output comes last.
#pragma once
#include "fixed_point.h"
#include "gemm.h"

namespace {

constexpr int64_t kByteStep = 2 * kGroup;    // bytes of one unit of a group
constexpr int64_t kByteUnitsPerPass = 4096;  // whole blocks; 3 groups of that many units are 384 KiB

struct TileFixed {
  const char *rows, *scales;  // of the first row's first unit and block
  int64_t row_bytes, part_bytes;
};

struct TileBytes {
  const int8_t* bytes;
  int64_t group_stride;
};

// As tile() in tile.h, for rows of kParts int16 per input. Sums are added block by block: the same for every MR and NG.
template <int kParts, int MR, int NG, bool kIsFetching>
INLINE void byte_tile(int64_t num_units, TileFixed a, TileBytes b, TileC c, Ahead ahead) {
  constexpr int NV = NG * kGroupVectors;
  for (int64_t first = 0; first < num_units; first += kBlockUnits) {
    const int64_t end = min64(first + kBlockUnits, num_units);
    vi sums[MR * kParts][NV] = {};
    for (int64_t k = first; k < end; k++) {
      vu columns[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) {
        const int8_t* group = b.bytes + v / kGroupVectors * b.group_stride;
        columns[v] = widen_bytes(group + k * kByteStep + v % kGroupVectors * W * 2);
      }
      if (kIsFetching) ahead.step();
#pragma GCC unroll 8
      for (int m = 0; m < MR * kParts; m++) {
        const vu row = splat_unit(a.rows + m / kParts * a.row_bytes + m % kParts * a.part_bytes + k * 4);
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) sums[m][v] = add_dot(sums[m][v], row, columns[v]);
      }
    }
    const bool is_added_to = c.is_added_to || first > 0;
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vf scale = (vf)splat_unit(a.scales + m * a.row_bytes + first / kBlockUnits * 4);
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) {
        float* to = c.sums + m * c.stride + v * W;
        vf sum = is_added_to ? load_floats(to) : vf{};
        sum = fma(__builtin_convertvector(sums[m * kParts][v], vf), scale, sum);
        if (kParts == 2) {
          const vf low = __builtin_convertvector(sums[m * kParts + kParts - 1][v], vf);
          sum = fma(low, scale * splat(1.0f / (1 << kLowBits)), sum);
        }
        store_floats(to, sum);
      }
    }
  }
}

template <int kParts, int NG, bool kIsFetching>
__attribute__((noinline)) void byte_tile_rows(int num_rows, int64_t num_units, TileFixed a, TileBytes b, TileC c,
                                              Ahead ahead) {
  if constexpr (NG > kTileGroups) return byte_tile<kParts, 1, NG, kIsFetching>(num_units, a, b, c, ahead);
  switch (num_rows * kParts) {
    case 1: return byte_tile<kParts, 1, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 2: return byte_tile<kParts, 2 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
#if defined(__AVX2__)
    case 3: return byte_tile<kParts, 3 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 4: return byte_tile<kParts, 4 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
#endif
#if defined(__AVX512F__)
    case 5: return byte_tile<kParts, 5 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 6: return byte_tile<kParts, 6 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 7: return byte_tile<kParts, 7 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 8: return byte_tile<kParts, 8 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
#endif
  }
  __builtin_unreachable();
}

template <class T>
struct ByteGemm {
  static constexpr int kParts = FixedRows<T>::kParts, kRows = kTileRows / kParts;
  GemmWork<T> work;
  FixedRows<T> fixed;
  int64_t num_units;

  ByteGemm(const pomona::GemmCall& call, int num_threads)
      : work(call), fixed(call, num_threads), num_units(ceil_div(call.in_features, 2)) {}

  TileFixed inputs(int64_t row, int64_t unit) const {
    const char* of_row = fixed.rows + row * fixed.row_bytes;
    const char* scales = of_row + kParts * fixed.part_bytes + unit / kBlockUnits * 4;
    return {of_row + unit * 4, scales, fixed.row_bytes, fixed.part_bytes};
  }

  TileBytes weights(int64_t group, int64_t unit) const {
    const int64_t group_bytes = num_units * kByteStep;
    return {static_cast<const int8_t*>(work.call.packed) + group * group_bytes + unit * kByteStep, group_bytes};
  }

  // Rows [row, row + num_rows) by NG groups. `next` is what the following item will read.
  template <int NG>
  void run(int64_t row, int64_t num_rows, int64_t group, const char* next, FusedColumns<T, NG>* fused) const {
    constexpr int64_t stride = NG * kGroup;
    const bool is_one_pass = num_units <= kByteUnitsPerPass;
    float one_tile[kRows * stride];
    float* sums = is_one_pass ? one_tile : static_cast<float*>(pomona::scratch(pomona::kSums, num_rows * stride * 4));
    const char* next_end = next + num_units * NG * kByteStep;
    const int64_t lines_per_step = ceil_div(NG * kByteStep, 64 * ceil_div(num_rows, kRows));
    for (int64_t unit = 0; unit < num_units; unit += kByteUnitsPerPass) {
      const int64_t units = min64(kByteUnitsPerPass, num_units - unit);
      for (int64_t r = 0; r < num_rows; r += kRows) {
        const int rows = static_cast<int>(min64(kRows, num_rows - r));
        const TileC c{is_one_pass ? sums : sums + r * stride, stride, unit > 0};
        const Ahead ahead{next + r / kRows * units * lines_per_step * 64, next_end, lines_per_step};
        if (next && is_one_pass && ahead.is_any())
          byte_tile_rows<kParts, NG, true>(rows, units, inputs(row + r, unit), weights(group, unit), c, ahead);
        else
          byte_tile_rows<kParts, NG, false>(rows, units, inputs(row + r, unit), weights(group, unit), c, {});
        if (unit + units == num_units) work.store_rows(c.sums, stride, row + r, rows, group, fused);
      }
    }
  }
};

template <class T, class S>
void gemm_int8(const pomona::GemmCall& call, int num_threads, const S& share) {
  const ByteGemm<T> gemm(call, num_threads);
  gemm.work.template run<kTileGroups, 1>(gemm.num_units * kByteStep, num_threads, gemm, share);
}

template <class T>
void gemm_int8(const pomona::GemmCall& call, int num_threads) {
  gemm_int8<T>(call, num_threads, OnlyItems{});
}

}  // namespace
