// What shrinking sums: rows by rank rows, over the input features. Included by lora.h.
//
// Each lane sums its own elements in their order, and the lanes' sums are added last, in one order: however many rows
// and rank rows are summed at once, and whether rows were widened before.
#pragma once
#include "api.h"
#include "tile.h"

namespace {

constexpr int kRankTile = 8;  // ranks that are summed at once
constexpr int kShrinkRows = W == 16 ? 3 : W == 8 ? 6 : 1;

// MR rows by NJ rank rows, summed over the input features, each lane for itself; and at every step, so many bytes from
// the rows' beginnings, beside(bytes).
template <class T, int MR, int NJ, class F>
INLINE void shrink_lanes(int64_t num_bytes, const typename T::Elem* x, int64_t x_stride, const char* const* rank_rows,
                         vf (*totals)[kRankTile], int first, const F& beside) {
  constexpr int64_t kBytes = W * 4;
  vf sums[MR][NJ] = {};
  const auto row_at = [&](int m, int64_t at) { return reinterpret_cast<const char*>(x + m * x_stride) + at; };
  int64_t at = 0;
  for (; at + kBytes <= num_bytes; at += kBytes) {
    beside(at);
    if constexpr (W < 16 && MR <= 2) {  // registers enough to read everything once
      typename T::Factor rows[MR][T::kHalves];
#pragma GCC unroll 2
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
        for (int half = 0; half < T::kHalves; half++) rows[m][half] = T::half(load_units(row_at(m, at)), half);
#pragma GCC unroll 8
      for (int j = 0; j < NJ; j++) {
        const vu units = load_units(rank_rows[j] + at);
#pragma GCC unroll 2
        for (int half = 0; half < T::kHalves; half++) {
          const auto weight = T::half(units, half);
#pragma GCC unroll 2
          for (int m = 0; m < MR; m++) T::add(sums[m][j], rows[m][half], weight);
        }
      }
      continue;
    }
#pragma GCC unroll 2
    for (int half = 0; half < T::kHalves; half++) {
      typename T::Factor weights[NJ];
#pragma GCC unroll 8
      for (int j = 0; j < NJ; j++) weights[j] = T::half_lean(load_units(rank_rows[j] + at), half);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const auto row = T::half_lean(load_units(row_at(m, at)), half);
#pragma GCC unroll 8
        for (int j = 0; j < NJ; j++) T::add(sums[m][j], row, weights[j]);
      }
    }
  }
  if (at < num_bytes)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) {
      const vu weights = load_units_part(rank_rows[j] + at, num_bytes - at);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
        sums[m][j] = T::mul_add(sums[m][j], load_units_part(row_at(m, at), num_bytes - at), weights);
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) totals[m][first + j] = sums[m][j];
}

// f(first row, number of rows) for each tile of a block, of nearly equal numbers of rows.
template <class F>
INLINE void for_shrink_tiles(int64_t num_rows, const F& f) {
  const int64_t num_tiles = ceil_div(num_rows, kShrinkRows);
  for (int64_t tile = 0; tile < num_tiles; tile++) {
    const int64_t row = tile * num_rows / num_tiles;
    f(row, static_cast<int>((tile + 1) * num_rows / num_tiles - row));
  }
}

// A block's rows, for all its ranks. Where vectors are narrow they are widened once, and in the order of their use:
// those of a tile side by side, W units of each after the other.
template <class T>
struct ShrinkInputs {
  using Elem = typename T::Elem;
  static constexpr bool kIsWide = W == 8;
  static constexpr int64_t kStepBytes = W * 4, kStepFloats = W * T::kHalves;  // of one row
  static constexpr int64_t kPassBytes = 48 * kStepBytes;                      // of a tile's rows these stay in L1

  const Elem* x;
  int64_t x_stride, num_bytes;
  float* wide = nullptr;

  ShrinkInputs(const Elem* rows, int64_t stride, int64_t in_features)
      : x(rows), x_stride(stride), num_bytes(in_features * static_cast<int64_t>(sizeof(Elem))) {}

  int64_t wide_stride() const { return ceil_div(num_bytes, kStepBytes) * kStepFloats; }

  // To be called before anything is shrunk.
  void prepare(int64_t num_rows) {
    if (!kIsWide || wide) return;
    wide = static_cast<float*>(pomona::scratch(pomona::kShrinkInputs, num_rows * wide_stride() * 4));
    for_shrink_tiles(num_rows, [&](int64_t row, int rows) { widen(row, rows); });
  }
  void widen(int64_t row, int num_rows) const {
    for (int m = 0; m < num_rows; m++) {
      const char* from = reinterpret_cast<const char*>(x + (row + m) * x_stride);
      float* to = wide + row * wide_stride() + m * kStepFloats;
      for (int64_t at = 0; at < num_bytes; at += kStepBytes, to += num_rows * kStepFloats) {
        const bool is_whole = at + kStepBytes <= num_bytes;
        const vu units = is_whole ? load_units(from + at) : load_units_part(from + at, num_bytes - at);
#pragma GCC unroll 2
        for (int half = 0; half < T::kHalves; half++) store_floats(to + half * W, (vf)T::half(units, half));
      }
    }
  }

  // One of for_shrink_tiles by 8 rank rows.
  void shrink(int64_t row, int num_rows, const char* const* rank_rows, float (*sums)[kRankTile]) const {
    static_assert(kShrinkRows <= 6);
    switch (num_rows) {
      case 1: return tile<1>(row, rank_rows, sums);
#if defined(__AVX2__)
      case 2: return tile<2>(row, rank_rows, sums);
      case 3: return tile<3>(row, rank_rows, sums);
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
      case 4: return tile<4>(row, rank_rows, sums);
      case 5: return tile<5>(row, rank_rows, sums);
      case 6: return tile<6>(row, rank_rows, sums);
#endif
    }
  }
  // Not inlined: each number of rows is compiled once.
  template <int MR>
  __attribute__((noinline)) ALIGN_LOOPS void tile(int64_t row, const char* const* rank_rows,
                                                  float (*sums)[kRankTile]) const {
    vf totals[MR][kRankTile];
    if constexpr (kIsWide) {
      for (int64_t begin = 0; begin < num_bytes; begin += kPassBytes)
        for (int j = 0; j < kRankTile; j += 2)
          add_wide<MR>(row, begin, min64(num_bytes, begin + kPassBytes), rank_rows, totals, j);
    } else {
      // Meanwhile the rows after them are fetched: rows are short, so the processor's own prefetching begins anew with
      // each of them. Narrower vectors take long enough for that.
      const Elem* rows = x + row * x_stride;
      shrink_lanes<T, MR, kRankTile>(num_bytes, rows, x_stride, rank_rows, totals, 0, [&](int64_t at) {
        if (W < 16) return;
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) prefetch_near(reinterpret_cast<const char*>(rows + (MR + m) * x_stride) + at);
      });
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) fold_sum8(totals[m], sums[m]);
  }

  // Widened rows by rank rows j and j + 1, of bytes [begin, end) of these, onto the totals of what comes before.
  template <int MR>
  INLINE void add_wide(int64_t row, int64_t begin, int64_t end, const char* const* rank_rows,
                       vf (*totals)[kRankTile], int j) const {
    vf sums[MR][2];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) sums[m][i] = begin == 0 ? vf{} : totals[m][j + i];
    const float* rows = wide + row * wide_stride() + begin / kStepBytes * MR * kStepFloats;
    const auto step = [&](const auto& weight_of) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int half = 0; half < T::kHalves; half++) {
        const auto weight = weight_of(0, half), other = weight_of(1, half);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
          const auto inputs = (typename T::Factor)load_floats(rows + m * kStepFloats + half * W);
          T::add(sums[m][0], inputs, weight);
          T::add(sums[m][1], inputs, other);
        }
      }
    };
    const char *a = rank_rows[j], *b = rank_rows[j + 1];
    int64_t at = begin;
    for (; at + kStepBytes <= end; at += kStepBytes, rows += MR * kStepFloats)
      step([&](int i, int half) __attribute__((always_inline)) { return T::half_at((i ? b : a) + at, half); });
    if (at < end)
      step([&](int i, int half) __attribute__((always_inline)) {
        return T::half_lean(load_units_part((i ? b : a) + at, end - at), half);
      });
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) totals[m][j + i] = sums[m][i];
  }
};

}  // namespace
