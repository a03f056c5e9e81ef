// Dense layers over int8 weights with a scale per output: out = (x * Q^T) * scales + bias. Included by isa.cpp.
//
// Packed as in gemm.h with a byte per weight. Bytes become units in registers, without rounding, and are multiplied in
// the order of gemm.h; the scale comes last, so inputs are never quantized and sums are those of exact products. The
// first tile of rows that meets a weight leaves its units in a panel for the rows that follow.
#pragma once
#include "gemm.h"

namespace {

constexpr int64_t kPanelUnits = 256;  // 3 groups of that many units are 48 KiB

struct TileBytes {
  const int8_t* bytes;
  int64_t group_stride, step;
};

// As tile() in tile.h, over bytes. If IS_KEPT, the units are written to `panel`: [NG][num_units][16].
template <class T, int MR, int NG, bool IS_KEPT>
__attribute__((noinline)) void byte_tile(int64_t num_units, TileA a, TileBytes b, TileC c, uint32_t* panel,
                                         Ahead ahead) {
  constexpr int NV = NG * kGroupVectors;
  vf sums[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) sums[m][v] = c.is_added_to ? load_floats(c.sums + m * c.stride + v * W) : vf{};
  for (int64_t k = 0; k < num_units; k++) {
    vu columns[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      const int64_t lanes = v % kGroupVectors * W;
      columns[v] = T::widen_bytes(b.bytes + v / kGroupVectors * b.group_stride + k * b.step + lanes * T::kPerUnit);
      if (IS_KEPT) memcpy(panel + (v / kGroupVectors * num_units + k) * kGroup + lanes, &columns[v], sizeof(vu));
    }
    ahead.step();
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vu row = splat_unit(a.rows + m * a.stride_bytes + k * 4);
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) sums[m][v] = T::mul_add(sums[m][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) store_floats(c.sums + m * c.stride + v * W, sums[m][v]);
}

template <class T, int NG>
void byte_tile_rows(int num_rows, int64_t num_units, TileA a, TileBytes b, TileC c, Ahead ahead) {
  switch (num_rows) {
    case 1: return byte_tile<T, 1, NG, false>(num_units, a, b, c, nullptr, ahead);
    case 2: return byte_tile<T, 2, NG, false>(num_units, a, b, c, nullptr, ahead);
#if defined(__AVX2__)
    case 3: return byte_tile<T, 3, NG, false>(num_units, a, b, c, nullptr, ahead);
    case 4: return byte_tile<T, 4, NG, false>(num_units, a, b, c, nullptr, ahead);
#endif
#if defined(__AVX512F__)
    case 5: return byte_tile<T, 5, NG, false>(num_units, a, b, c, nullptr, ahead);
    case 6: return byte_tile<T, 6, NG, false>(num_units, a, b, c, nullptr, ahead);
    case 7: return byte_tile<T, 7, NG, false>(num_units, a, b, c, nullptr, ahead);
    case 8: return byte_tile<T, 8, NG, false>(num_units, a, b, c, nullptr, ahead);
#endif
  }
  __builtin_unreachable();
}

template <class T>
struct ByteGemm {
  GemmWork<T> work;
  static constexpr int64_t kStep = kGroup * T::kPerUnit;  // bytes of one unit of a group

  TileBytes weights(int64_t group, int64_t unit) const {
    const int64_t group_bytes = work.num_units * kStep;
    return {static_cast<const int8_t*>(work.call.packed) + group * group_bytes + unit * kStep, group_bytes, kStep};
  }

  // Rows [row, row + num_rows) by NG groups. `next` is what the following item will read.
  template <int NG>
  void run(int64_t row, int64_t num_rows, int64_t group, const char* next, FusedColumns<T, NG>* fused) const {
    if (num_rows <= kTileRows) return run_few<NG>(row, num_rows, group, next, fused);
    if constexpr (NG <= kTileGroups) run_many<NG>(row, num_rows, group, next, fused);
  }

  template <int NG>
  void run_few(int64_t row, int64_t num_rows, int64_t group, const char* next, FusedColumns<T, NG>* fused) const {
    float sums[kTileRows * NG * kGroup];
    const TileA a = work.inputs(row, 0);
    const TileC c{sums, NG * kGroup, false};
    const Ahead ahead = next ? Ahead{next, next + work.num_units * NG * kStep, ceil_div(NG * kStep, 64)} : Ahead{};
    if constexpr (NG > kTileGroups)
      byte_tile<T, 1, NG, false>(work.num_units, a, weights(group, 0), c, nullptr, ahead);
    else
      byte_tile_rows<T, NG>(static_cast<int>(num_rows), work.num_units, a, weights(group, 0), c, ahead);
    work.store_rows(sums, c.stride, row, static_cast<int>(num_rows), group, fused);
  }

  template <int NG>
  void run_many(int64_t row, int64_t num_rows, int64_t group, const char* next, FusedColumns<T, NG>* fused) const {
    constexpr int64_t stride = NG * kGroup;
    uint32_t* panel = static_cast<uint32_t*>(pomona::scratch(pomona::kPanel, NG * kPanelUnits * kGroup * 4));
    float* sums = static_cast<float*>(pomona::scratch(pomona::kSums, num_rows * stride * 4));
    const int64_t tiles = ceil_div(num_rows, kTileRows);
    for (int64_t unit = 0; unit < work.num_units; unit += kPanelUnits) {
      const int64_t units = min64(kPanelUnits, work.num_units - unit);
      Ahead ahead;
      if (next) ahead = {next + unit * NG * kStep, next + work.num_units * NG * kStep, ceil_div(NG * kStep, 64)};
      byte_tile<T, kTileRows, NG, true>(units, work.inputs(row, unit), weights(group, unit),
                                        TileC{sums, stride, unit > 0}, panel, ahead);
      for (int64_t tile = 1; tile < tiles; tile++) {
        const int64_t r = tile * kTileRows;
        tile_rows<T, NG>(static_cast<int>(min64(kTileRows, num_rows - r)), units, work.inputs(row + r, unit),
                         TileB{panel, units * kGroup, kGroup}, TileC{sums + r * stride, stride, unit > 0}, Ahead{});
      }
    }
    for (int64_t r = 0; r < num_rows; r += kTileRows) {
      const int rows = static_cast<int>(min64(kTileRows, num_rows - r));
      work.store_rows(sums + r * stride, stride, row + r, rows, group, fused);
    }
  }
};

template <class T, class S>
void gemm_int8(const pomona::GemmCall& call, int num_threads, const S& share) {
  const ByteGemm<T> gemm{GemmWork<T>(call)};
  gemm.work.run(gemm.work.num_units * ByteGemm<T>::kStep, num_threads, gemm, share);
}

template <class T>
void gemm_int8(const pomona::GemmCall& call, int num_threads) {
  gemm_int8<T>(call, num_threads, OnlyItems{});
}

}  // namespace
