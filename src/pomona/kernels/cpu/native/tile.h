// The register-blocked product that dense layers and attention share: C[rows, columns] (+)= A[rows, k] * B[k, columns]
// over units. A is row-major; B comes in groups of 16 columns, each unit of a group side by side. Included by isa.cpp.
#pragma once
#include "elements.h"

namespace {

constexpr int kGroup = 16;                    // columns per group, on every instruction set
constexpr int kGroupVectors = kGroup / W;
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileGroups = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileGroups = 1;
#else
constexpr int kTileRows = 2, kTileGroups = 1;
#endif

// Rows of units of the product's dtype T, or of T::Row.
struct TileA {
  const char* rows;
  int64_t stride_bytes;
};
struct TileB {
  const uint32_t* units;
  int64_t group_stride, step;  // in units: between groups of columns, between steps of k
};
struct TileC {
  float* sums;
  int64_t stride;
  bool is_added_to;
};

// Memory to fetch into the cache meanwhile: so many bytes with every step of k, fewer than a line among them. Fetching
// steadily costs little; asking for much at once would stop the computation until it has arrived.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t bytes_per_step = 0;

  bool is_any() const { return at < end; }
  INLINE void step() {
    if (is_any()) step_on();
  }
  // The same, for those who know that as many steps as they make have enough to fetch, or nearly: looking for the end
  // costs narrow vectors more than what is fetched past it.
  INLINE void step_on() {
    int64_t i = 0;
    do prefetch(at + i);
    while ((i += 64) < bytes_per_step);
    at += bytes_per_step;
  }
};

// Likewise, from several places a line each in turn: memory answers reads of several pages sooner than those of one.
template <int kPlaces>
struct AheadInTurn {
  const char* places[kPlaces];
  int64_t at = 0, end = 0;  // bytes from each place

  bool is_any() const { return at < end; }
  INLINE void fetch(int64_t num_lines) {
    for (; num_lines > 0 && at < end; num_lines -= kPlaces, at += 64)
#pragma GCC unroll 8
      for (int i = 0; i < kPlaces; i++) prefetch(places[i] + at);
  }
};

// Likewise, pages that lie anywhere.
struct AheadPages {
  const char* const* page = nullptr;  // the next one
  int64_t lines_per_page = 0, lines_left = 0, lines_per_step = 0;
  const char *at = nullptr, *end = nullptr;

  bool is_any() const { return at < end; }
  INLINE void step() {
    for (int64_t i = 0; i < lines_per_step && at < end; i++, at += 64) prefetch(at);
    if (at >= end && lines_left > 0) turn(0);
  }
  void turn(int64_t first_line) {
    const int64_t lines = min64(lines_per_page - first_line, lines_left);
    at = *page++ + first_line * 64, end = at + lines * 64;
    lines_left -= lines;
  }
};

// What becomes of a tile's sums: they are C.
struct KeepSums {
  INLINE void operator()(TileC c, int m, int v, vf sum) const { store_floats(c.sums + m * c.stride + v * W, sum); }
};

// MR rows by NG groups; finish(C, row, vector, sum) at the end. Each sum runs over k in order from the given C or zero:
// the same for every MR and NG. R: what A's rows are made of, T or T::Row.
template <class T, class R, int MR, int NG, bool kIsFetching, class F>
INLINE void tile(int64_t num_units, TileA a, TileB b, TileC c, Ahead ahead, AheadPages beside, F finish) {
  constexpr int NV = NG * kGroupVectors;
  vf sums[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) sums[m][v] = c.is_added_to ? load_floats(c.sums + m * c.stride + v * W) : vf{};
  for (int64_t k = 0; k < num_units; k++) {
#pragma GCC unroll 2
    for (int half = 0; half < T::kHalves; half++) {
      typename T::Factor columns[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) {
        const uint32_t* units = b.units + v / kGroupVectors * b.group_stride + v % kGroupVectors * W + k * b.step;
        columns[v] = kIsFetching ? T::half_at(units, half) : T::half_lean(load_units(units), half);
      }
      if (kIsFetching && half == 0) {
        W == 16 ? ahead.step() : ahead.step_on();
        if (W == 16) beside.step();
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const int64_t unit = R::kPerUnit < T::kPerUnit ? k * T::kHalves + half : k;
        const vu units = splat_unit(a.rows + m * a.stride_bytes + unit * 4);
        const auto row = R::kPerUnit < T::kPerUnit ? (typename T::Factor)units : T::half_lean(units, half);
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) T::add(sums[m][v], row, columns[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) finish(c, m, v, sums[m][v]);
}

// Loops that begin with a cache line: where a tile of four rows lies is otherwise chance, and 4 % of its pace.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
#define ALIGN_LOOPS __attribute__((optimize("align-loops=64")))
#else
#define ALIGN_LOOPS
#endif

// Not inlined: eight copies of a long loop are enough; and eight more that fetch nothing, which is seen in the others.
template <class T, class R, int NG, bool kIsFetching, class F>
__attribute__((noinline)) ALIGN_LOOPS void tile_rows(int num_rows, int64_t num_units, TileA a, TileB b, TileC c,
                                                     Ahead ahead, AheadPages beside, F finish) {
  static_assert(kTileRows <= 8);
  switch (num_rows) {
    case 1: return tile<T, R, 1, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
    case 2: return tile<T, R, 2, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
#if defined(__AVX2__)
    case 3: return tile<T, R, 3, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
    case 4: return tile<T, R, 4, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
    case 5: return tile<T, R, 5, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
    case 6: return tile<T, R, 6, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
#endif
#if defined(__AVX512F__)
    case 7: return tile<T, R, 7, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
    case 8: return tile<T, R, 8, NG, kIsFetching>(num_units, a, b, c, ahead, beside, finish);
#endif
  }
  __builtin_unreachable();
}
template <class T, int NG, class R = T>
INLINE void tile_rows(int num_rows, int64_t num_units, TileA a, TileB b, TileC c, Ahead ahead, AheadPages beside = {}) {
  if (ahead.is_any() || beside.is_any())
    tile_rows<T, R, NG, true>(num_rows, num_units, a, b, c, ahead, beside, KeepSums{});
  else
    tile_rows<T, R, NG, false>(num_rows, num_units, a, b, c, ahead, beside, KeepSums{});
}

// Any number of rows and groups: C[num_rows, num_groups * 16]. `next_ahead(num_units)` says what each tile fetches.
template <class T, class F>
INLINE void product(int64_t num_rows, int64_t num_groups, int64_t num_units, TileA a, TileB b, TileC c,
                    const F& next_ahead) {
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    const int rows = static_cast<int>(min64(kTileRows, num_rows - row));
    const TileA some_rows{a.rows + row * a.stride_bytes, a.stride_bytes};
    for (int64_t group = 0; group < num_groups;) {
      const TileB columns{b.units + group * b.group_stride, b.group_stride, b.step};
      const TileC part{c.sums + row * c.stride + group * kGroup, c.stride, c.is_added_to};
      const Ahead ahead = next_ahead(num_units);
      const int64_t left = num_groups - group;
      if (left >= kTileGroups) {
        tile_rows<T, kTileGroups>(rows, num_units, some_rows, columns, part, ahead);
        group += kTileGroups;
      } else if (kTileGroups > 2 && left == 2) {
        tile_rows<T, kTileGroups == 3 ? 2 : 1>(rows, num_units, some_rows, columns, part, ahead);
        group += 2;
      } else {
        tile_rows<T, 1>(rows, num_units, some_rows, columns, part, ahead);
        group += 1;
      }
    }
  }
}

}  // namespace
