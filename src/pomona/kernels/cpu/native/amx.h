// The product of tile.h by tile registers: C[rows, columns] (+)= A[rows, k] * B[k, columns], bfloat16. Included by isa.cpp.
//
// An instruction adds 16 units at once, evens and odds apart and then both to the sum: in this order for any number of
// rows, and row_product adds in the same.
#pragma once
#include "tile.h"
#include "tile_registers.h"

namespace {

// What a product is made by: tile registers where the machine has them.
#if defined(__AMX_BF16__)
template <class T>
constexpr bool kUsesTiles = T::kPerUnit == 2;
#else
constexpr int kStepUnits = 1, kMostTileRows = kTileRows;
template <class T>
constexpr bool kUsesTiles = false;
#endif

// Rows that are summed at once, and units that are added together.
template <class T>
struct ProductSize {
  static constexpr int kRows = kUsesTiles<T> ? kMostTileRows : kTileRows;
  static constexpr int kUnits = kUsesTiles<T> ? kStepUnits : 1;
};

#if defined(__AMX_BF16__)

// The factors of a product, over so many units of k; a row of A has no more bytes than that.
struct Factors {
  TileA a;
  TileB b;
  int64_t num_units, a_bytes;
};

// Weights of a later step, which are fetched into the nearest cache if weights are read once. A few lines at a time: one
// that has to wait for its turn holds up all that comes after it.
struct NextStep {
  const uint32_t* units;
  int64_t group_stride, step;

  template <int N>
  INLINE void fetch(int64_t group, int64_t first) const {
#pragma GCC unroll 8
    for (int64_t k = first; k < first + N; k++) prefetch_near(units + group * group_stride + k * step);
  }
};

// One step of k: MT tiles of rows by NG groups.
template <int MT, int NG, bool kFetches>
INLINE void multiply_step(const char* a, int64_t a_stride, const uint32_t* b, int64_t group_stride, int64_t step_bytes,
                          const NextStep& next) {
  static_assert(kStepUnits == 16);
  _tile_loadd(4, a, a_stride);
  if (kFetches) next.fetch<8>(0, 0);
  _tile_loadd(6, b, step_bytes);
  if (kFetches) next.fetch<8>(0, 8);
  _tile_dpbf16ps(0, 4, 6);
  if (NG >= 2) {
    if (kFetches) next.fetch<4>(1, 0);
    _tile_loadd(7, b + group_stride, step_bytes);
    if (kFetches) next.fetch<4>(1, 4);
    _tile_dpbf16ps(1, 4, 7);
    if (kFetches) next.fetch<4>(1, 8);
  }
  if (MT == 2) {
    _tile_loadd(5, a + 16 * a_stride, a_stride);
    if (kFetches && NG >= 2) next.fetch<4>(1, 12);
    _tile_dpbf16ps(2, 5, 6);
    if (NG >= 2) _tile_dpbf16ps(3, 5, 7);
  }
  if (MT == 1 && NG >= 2 && kFetches) next.fetch<4>(1, 12);
  if (MT == 1 && NG == 4) {
    if (kFetches) next.fetch<8>(2, 0);
    _tile_loadd(6, b + 2 * group_stride, step_bytes);
    if (kFetches) next.fetch<8>(2, 8);
    _tile_dpbf16ps(2, 4, 6);
    if (kFetches) next.fetch<8>(3, 0);
    _tile_loadd(7, b + 3 * group_stride, step_bytes);
    if (kFetches) next.fetch<8>(3, 8);
    _tile_dpbf16ps(3, 4, 7);
  }
}

// The units after the last whole step, through copies that zeros fill up.
template <int MT, int NG>
__attribute__((noinline)) void multiply_rest(int num_rows, const char* a, int64_t a_stride, const uint32_t* b,
                                             TileB of_b, int64_t num_units, int64_t a_bytes) {
  alignas(64) char rows[MT * 16][64] = {}, columns[NG][kStepUnits][64] = {};
  for (int m = 0; m < num_rows; m++) memcpy(rows[m], a + m * a_stride, a_bytes);
  for (int g = 0; g < NG; g++)
    for (int64_t k = 0; k < num_units; k++) memcpy(columns[g][k], b + g * of_b.group_stride + k * of_b.step, 64);
  __asm__ volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
  multiply_step<MT, NG, false>(rows[0], 64, reinterpret_cast<const uint32_t*>(columns), kStepUnits * kGroup, 64, {});
}

// What is fetched meanwhile. If weights are read once: those of a few steps later, and then of the next product, which
// are like these in size. If many rows pass by them: some lines of what comes after these.
enum class Fetch { kNothing, kNextStep, kBeside };
struct Stream {
  Fetch fetch = Fetch::kNothing;
  const uint32_t* next = nullptr;
  Ahead* beside = nullptr;

  static constexpr int64_t kUnitsAhead = 4 * kStepUnits;
  INLINE NextStep after(const Factors& factors, int64_t unit) const {
    const uint32_t* from = factors.b.units;
    int64_t later = unit + kUnitsAhead;
    if (later >= factors.num_units) {
      later -= factors.num_units, from = next;
      if (next == nullptr || later >= factors.num_units) from = factors.b.units, later = unit;  // is there already
    }
    return {from + later * factors.b.step, factors.b.group_stride, factors.b.step};
  }
};

template <int MT, int NG, Fetch kFetch>
INLINE void multiply_steps(const Factors& factors, Stream stream) {
  constexpr bool kFetches = kFetch == Fetch::kNextStep;
  const char* a = factors.a.rows;
  const uint32_t* b = factors.b.units;
  const int64_t group_stride = factors.b.group_stride, step = factors.b.step;
  for (int64_t unit = 0; unit + kStepUnits <= factors.num_units; unit += kStepUnits) {
    if (kFetch == Fetch::kBeside) stream.beside->step();
    multiply_step<MT, NG, kFetches>(a + unit * 4, factors.a.stride_bytes, b + unit * step, group_stride, step * 4,
                                    kFetches ? stream.after(factors, unit) : NextStep{});
  }
}

template <int MT, int NG>
INLINE void multiply_all(int num_rows, const Factors& factors, Stream stream) {
  switch (stream.fetch) {
    case Fetch::kNothing: multiply_steps<MT, NG, Fetch::kNothing>(factors, stream); break;
    case Fetch::kNextStep: multiply_steps<MT, NG, Fetch::kNextStep>(factors, stream); break;
    case Fetch::kBeside: multiply_steps<MT, NG, Fetch::kBeside>(factors, stream); break;
  }
  const int64_t unit = factors.num_units / kStepUnits * kStepUnits, step = factors.b.step;
  if (unit < factors.num_units)
    multiply_rest<MT, NG>(num_rows, factors.a.rows + unit * 4, factors.a.stride_bytes, factors.b.units + unit * step,
                          factors.b, factors.num_units - unit, factors.a_bytes - unit * 4);
}

template <int MT, int NG>
INLINE void multiply_tiles(int num_rows, const Factors& factors, const Factors* more, TileC c, Stream stream) {
  char *sums = reinterpret_cast<char*>(c.sums), *low = sums + 16 * c.stride * 4;
  const int64_t stride = c.stride * 4;
  configure_tiles(num_rows);
  __asm__ volatile("" ::: "memory");
  if (c.is_added_to) {
    _tile_loadd(0, sums, stride);
    if (NG >= 2) _tile_loadd(1, sums + 64, stride);
    if (MT == 2) _tile_loadd(2, low, stride);
    if (MT == 2 && NG >= 2) _tile_loadd(3, low + 64, stride);
    if (MT == 1 && NG == 4) _tile_loadd(2, sums + 128, stride);
    if (MT == 1 && NG == 4) _tile_loadd(3, sums + 192, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  multiply_all<MT, NG>(num_rows, factors, stream);
  if (more) multiply_all<MT, NG>(num_rows, *more, {});
  _tile_stored(0, sums, stride);
  if (NG >= 2) _tile_stored(1, sums + 64, stride);
  if (MT == 2) _tile_stored(2, low, stride);
  if (MT == 2 && NG >= 2) _tile_stored(3, low + 64, stride);
  if (MT == 1 && NG == 4) _tile_stored(2, sums + 128, stride);
  if (MT == 1 && NG == 4) _tile_stored(3, sums + 192, stride);
}

// Up to 32 rows by one or two groups, up to 16 by four; then the same rows and columns of more factors, if any.
template <int NG>
__attribute__((noinline)) void tile_product(int num_rows, const Factors& factors, const Factors* more, TileC c,
                                            Stream stream = {}) {
  if (NG == 4 || num_rows <= 16)
    multiply_tiles<1, NG>(num_rows, factors, more, c, stream);
  else
    multiply_tiles<2, NG>(num_rows, factors, more, c, stream);
}

// Any number of groups.
INLINE void tile_product(int num_rows, int64_t num_groups, Factors factors, TileC c) {
  for (; num_groups >= 2; num_groups -= 2) {
    tile_product<2>(num_rows, factors, nullptr, c);
    factors.b.units += 2 * factors.b.group_stride, c.sums += 2 * kGroup;
  }
  if (num_groups) tile_product<1>(num_rows, factors, nullptr, c);
}

// One row by NG groups, in the same order: a row alone is read faster without tiles.
template <int NG>
INLINE void row_product(const Factors& factors, float* sums, bool is_added_to) {
  const char* a = factors.a.rows;
  vf totals[NG];
#pragma GCC unroll 4
  for (int g = 0; g < NG; g++) totals[g] = is_added_to ? load_floats(sums + g * kGroup) : vf{};
  for (int64_t unit = 0; unit < factors.num_units; unit += kStepUnits) {
    vf even[NG] = {}, odd[NG] = {};
    const int64_t end = min64(unit + kStepUnits, factors.num_units);
    for (int64_t k = unit; k < end; k++) {
      const vu row = splat_unit(a + k * 4);
      const vf first = (vf)(row << 16), second = (vf)(row & 0xffff0000u);
#pragma GCC unroll 4
      for (int g = 0; g < NG; g++) {
        const vu columns = load_units(factors.b.units + g * factors.b.group_stride + k * factors.b.step);
        even[g] = fma(first, (vf)(columns << 16), even[g]);
        odd[g] = fma(second, (vf)(columns & 0xffff0000u), odd[g]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < NG; g++) totals[g] += even[g] + odd[g];
  }
#pragma GCC unroll 4
  for (int g = 0; g < NG; g++) store_floats(sums + g * kGroup, totals[g]);
}

#endif

}  // namespace
