// Dense layers over int8 weights with a scale per output: out = (x * Q^T) * scales + bias. Included by isa.cpp.
//
// Packed as in gemm.h with a byte per weight and two inputs to a unit, whatever the dtype. Inputs become int16
// (fixed_point.h), bytes too, in registers: a block of inputs is summed exactly, then added in float32, block after
// block; the scale of the output comes last.
#pragma once
#include "amx.h"
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
      if (kIsFetching) ahead.step_on();
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
    case 5: return byte_tile<kParts, 5 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 6: return byte_tile<kParts, 6 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
#endif
#if defined(__AVX512F__)
    case 7: return byte_tile<kParts, 7 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
    case 8: return byte_tile<kParts, 8 / kParts, NG, kIsFetching>(num_units, a, b, c, ahead);
#endif
  }
  __builtin_unreachable();
}

#if defined(__AMX_INT8__)

constexpr int64_t kStepInputs = 64, kFewestByteRows = 9;  // of one tile instruction; rows worth the columns' layout

// A call's inputs as FixedRows has them, each int16 as two bytes, the signed high ones and the unsigned low ones apart:
// sums of either are exact, and so is their sum. Of each row its high bytes, its low bytes and a scale per block.
template <class T>
struct SplitRows {
  static_assert(FixedRows<T>::kParts == 1);
  int64_t part_bytes, row_bytes;
  const char* rows;

  SplitRows(const pomona::GemmCall& call, int num_threads)
      : part_bytes(ceil_div(call.in_features, kStepInputs) * kStepInputs) {
    const int64_t num_blocks = ceil_div(call.in_features, kBlockInputs);
    row_bytes = (ceil_div(2 * part_bytes + num_blocks * 4, 64) | 1) * 64;
    char* to = static_cast<char*>(pomona::scratch(pomona::kSplitRows, call.num_rows * row_bytes));
    rows = to;
    for_rows(call.num_rows, call.in_features / 2, num_threads, [&](int64_t row) {
      const auto* x = static_cast<const typename T::Elem*>(call.x) + row * call.x_stride;
      char *high = to + row * row_bytes, *scales = high + 2 * part_bytes;
      for (int64_t first = 0; first < call.in_features; first += kBlockInputs, scales += 4) {
        alignas(64) char block[kBlockInputs * 2];
        const int64_t num_inputs = min64(kBlockInputs, call.in_features - first);
        if (num_inputs < kBlockInputs) memset(block, 0, sizeof block);
        const float scale = FixedRows<T>::fix(x + first, num_inputs, block, 0);
        memcpy(scales, &scale, 4);
        for (int64_t i = 0; i < min64(kBlockInputs, part_bytes - first); i += 2 * W) {
          const __m512i both = _mm512_load_si512(block + i * 2);
          auto *to_high = reinterpret_cast<__m256i*>(high + first + i);
          auto *to_low = reinterpret_cast<__m256i*>(high + part_bytes + first + i);
          _mm256_storeu_si256(to_high, _mm512_cvtepi16_epi8(_mm512_srai_epi16(both, 8)));
          _mm256_storeu_si256(to_low, _mm512_cvtepi16_epi8(both));
        }
      }
    });
  }
};

// The product by tiles. An item is a run of rows by two groups of columns, which are laid out once; meanwhile the next
// item's are fetched.
template <class T>
struct TileByteGemm {
  GemmWork<T> work;
  SplitRows<T> split;
  int64_t num_units;

  TileByteGemm(const pomona::GemmCall& call, int num_threads)
      : work(call), split(call, num_threads), num_units(ceil_div(call.in_features, 2)) {}

  int64_t group_bytes() const { return num_units * kByteStep; }
  const char* weights(int64_t group) const {
    return static_cast<const char*>(work.call.packed) + group * group_bytes();
  }

  // Columns of NG groups as tiles take them: four inputs of a column side by side.
  template <int NG>
  const char* lay_out_columns(int64_t group) const {
    const int64_t stride = split.part_bytes * kGroup, whole = num_units / 2 * 2;
    char* panel = static_cast<char*>(pomona::scratch(pomona::kPanel, NG * stride));
    for (int g = 0; g < NG; g++) {
      const char* from = weights(group + g);
      char *to = panel + g * stride, *end = to + stride;
      for (int64_t unit = 0; unit < whole; unit += 2, from += 64, to += 64)
        _mm512_storeu_si512(to, interleave_halves(_mm512_loadu_si512(from)));
      if (whole < num_units) {
        _mm512_storeu_si512(to, interleave_halves((__m512i)load_units_part(from, kByteStep)));
        to += 64;
      }
      memset(to, 0, end - to);
    }
    return panel;
  }

  // Up to 16 rows by one or two groups: block by block, as byte_tile adds them.
  template <int NG>
  void sum(int64_t row, int num_rows, const char* columns, float* sums, Ahead& ahead) const {
    constexpr int64_t kStride = NG * kGroup;
    const int64_t stride = split.part_bytes * kGroup;
    configure_tiles(num_rows);
    const char *high = split.rows + row * split.row_bytes, *low = high + split.part_bytes;
    const char* scales = low + split.part_bytes;
    for (int64_t first = 0; first < split.part_bytes; first += kBlockInputs, scales += 4) {
      const int64_t end = min64(first + kBlockInputs, split.part_bytes);
      __asm__ volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t at = first; at < end; at += kStepInputs) {
        _tile_loadd(4, high + at, split.row_bytes);
        ahead.step();
        _tile_loadd(6, columns + at * kGroup, 64);
        _tile_loadd(5, low + at, split.row_bytes);
        _tile_dpbssd(0, 4, 6);
        ahead.step();
        _tile_dpbusd(2, 5, 6);
        if (NG == 2) {
          _tile_loadd(7, columns + stride + at * kGroup, 64);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbusd(3, 5, 7);
        }
      }
      alignas(64) int32_t of_high[16][kStride], of_low[16][kStride];
      _tile_stored(0, of_high[0], NG * 64);
      _tile_stored(2, of_low[0], NG * 64);
      if (NG == 2) _tile_stored(1, of_high[0] + kGroup, NG * 64);
      if (NG == 2) _tile_stored(3, of_low[0] + kGroup, NG * 64);
      for (int m = 0; m < num_rows; m++) {
        const vf scale = (vf)splat_unit(scales + m * split.row_bytes);
#pragma GCC unroll 2
        for (int g = 0; g < NG; g++) {
          const vi total = ((vi)load_units(of_high[m] + g * kGroup) << 8) + (vi)load_units(of_low[m] + g * kGroup);
          float* to = sums + m * kStride + g * kGroup;
          store_floats(to, fma(__builtin_convertvector(total, vf), scale, first > 0 ? load_floats(to) : vf{}));
        }
      }
    }
  }

  template <int NG>
  void run(int64_t row, int64_t num_rows, int64_t group, Ahead ahead, FusedColumns<T, NG>* fused) const {
    const char* columns = lay_out_columns<NG>(group);
    for (int64_t r = 0; r < num_rows; r += 16) {
      const int rows = static_cast<int>(min64(16, num_rows - r));
      alignas(64) float sums[16 * NG * kGroup];
      sum<NG>(row + r, rows, columns, sums, ahead);
      for (int m = 0; m < rows; m += kTileRows)
        work.store_rows(sums + m * NG * kGroup, NG * kGroup, row + r + m, static_cast<int>(min64(kTileRows, rows - m)),
                        group, fused);
    }
  }

  template <class S>
  void run_all(int num_threads, const S& share) const {
    const int64_t num_columns = ceil_div(work.num_groups, 2);
    const int64_t num_items = num_columns * ceil_div(work.call.num_rows, kRowsPerItem);
    const int threads = threads_for(num_threads, work.num_groups * num_units * (1 + work.call.num_rows / 8));
    share(num_items, threads, [&](int64_t item) {
      const int64_t place = side_by_side(item, num_items, threads);
      const int64_t row = place / num_columns * kRowsPerItem, group = place % num_columns * 2;
      const int64_t num_rows = min64(kRowsPerItem, work.call.num_rows - row);
      const int num_groups = static_cast<int>(min64(2, work.num_groups - group));
      const bool has_next = item + threads < num_items && group + 2 + num_groups <= work.num_groups;
      Ahead ahead;
      if (has_next) {
        const int64_t num_steps = 2 * split.part_bytes / kStepInputs * ceil_div(num_rows, 16);
        const int64_t num_lines = ceil_div(num_groups * group_bytes(), 64);
        ahead = {weights(group + 2), weights(group + 2 + num_groups), ceil_div(num_lines, num_steps) * 64};
      }
      if (num_groups == 2) return work.template run_columns<2>(*this, row, num_rows, group, has_next ? 2 : 0, ahead);
      work.template run_columns<1>(*this, row, num_rows, group, 0, ahead);
    });
  }
};

#endif

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
    const int64_t bytes_per_step = NG * kByteStep / min64(ceil_div(num_rows, kRows), 2);
    const int64_t next_bytes = num_units * NG * kByteStep;
    for (int64_t unit = 0; unit < num_units; unit += kByteUnitsPerPass) {
      const int64_t units = min64(kByteUnitsPerPass, num_units - unit);
      for (int64_t r = 0; r < num_rows; r += kRows) {
        const int rows = static_cast<int>(min64(kRows, num_rows - r));
        const TileC c{is_one_pass ? sums : sums + r * stride, stride, unit > 0};
        const int64_t fetched = r / kRows * units * bytes_per_step;
        if (next && is_one_pass && fetched < next_bytes)
          byte_tile_rows<kParts, NG, true>(rows, units, inputs(row + r, unit), weights(group, unit), c,
                                           {next + fetched, next + next_bytes, bytes_per_step});
        else
          byte_tile_rows<kParts, NG, false>(rows, units, inputs(row + r, unit), weights(group, unit), c, {});
        if (unit + units == num_units) work.store_rows(c.sums, stride, row + r, rows, group, fused);
      }
    }
  }
};

template <class T, class S>
void gemm_int8(const pomona::GemmCall& call, int num_threads, const S& share) {
#if defined(__AMX_INT8__)
  if constexpr (kUsesTiles<T>)
    if (call.num_rows >= kFewestByteRows) return TileByteGemm<T>(call, num_threads).run_all(num_threads, share);
#endif
  const ByteGemm<T> gemm(call, num_threads);
  gemm.work.run(gemm.num_units * kByteStep, num_threads, gemm, share);
}

template <class T>
void gemm_int8(const pomona::GemmCall& call, int num_threads) {
  gemm_int8<T>(call, num_threads, OnlyItems{});
}

}  // namespace
