// The product of tile.h by tile registers: C[rows, columns] (+)= A[rows, k] * B[k, columns], bfloat16. Included by
// isa.cpp.
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

// What is fetched with a step: factors of a later one into the nearest cache, and columns of a later item into the next
// one, of several groups in turn, since memory answers reads of several pages sooner than those of one. A few lines at
// a time: one that has to wait for its turn holds up all that comes after it.
struct LaterStep {
  TileA a;
  TileB b, far;

  // The slot-th of num_slots parts.
  template <int MT, int NG, class M>
  INLINE void fetch(int slot, int num_slots) const {
    if (M::kFetchesRows)
#pragma GCC unroll 8
      for (int m = slot * MT * 16 / num_slots; m < (slot + 1) * MT * 16 / num_slots; m++)
        prefetch_near(a.rows + m * a.stride_bytes);
    if (M::kFetchesColumns)
#pragma GCC unroll 16
      for (int i = slot * NG * 16 / num_slots; i < (slot + 1) * NG * 16 / num_slots; i++)
        prefetch_near(b.units + i / 16 * b.group_stride + i % 16 * b.step);
    constexpr int kLines = M::kFarPlaces * M::kFarUnits;
#pragma GCC unroll 16
    for (int i = slot * kLines / num_slots; i < (slot + 1) * kLines / num_slots; i++)
      prefetch(far.units + i % M::kFarPlaces * far.group_stride + i / M::kFarPlaces * far.step);
  }
};

// What is done meanwhile, with every step of a product. Nothing:
struct Nothing {
  static constexpr bool kFetchesRows = false, kFetchesColumns = false;
  static constexpr int kFarPlaces = 1, kFarUnits = 0;
  INLINE void step() {}
  INLINE void before_more() {}
  INLINE LaterStep later(const Factors&, int64_t) { return {}; }
};

// Rows of the next step, and of the next rows after the last one.
struct NextRows : Nothing {
  static constexpr bool kFetchesRows = true;
  INLINE LaterStep later(const Factors& factors, int64_t unit) {
    const TileA& a = factors.a;
    const int64_t next = unit + kStepUnits;
    return {{a.rows + (next < factors.num_units ? next * 4 : kMostTileRows * a.stride_bytes), a.stride_bytes}, {}, {}};
  }
};

// One step of k: MT tiles of rows by NG groups.
template <int MT, int NG, class M>
INLINE void multiply_step(TileA a, TileB b, const LaterStep& later) {
  static_assert(kStepUnits == 16);
  constexpr int kHalf = NG >= 2 ? 5 : 3, kSlots = NG == 4 || (MT == 2 && NG == 2) ? 8 : MT == 2 ? 5 : kHalf;
  const auto fetch = [&](int slot) __attribute__((always_inline)) { later.fetch<MT, NG, M>(slot, kSlots); };
  const int64_t step_bytes = b.step * 4;
  _tile_loadd(4, a.rows, a.stride_bytes);
  fetch(0);
  _tile_loadd(6, b.units, step_bytes);
  fetch(1);
  _tile_dpbf16ps(0, 4, 6);
  fetch(2);
  if (NG >= 2) {
    _tile_loadd(7, b.units + b.group_stride, step_bytes);
    fetch(3);
    _tile_dpbf16ps(1, 4, 7);
    fetch(4);
  }
  if (MT == 2) {
    _tile_loadd(5, a.rows + 16 * a.stride_bytes, a.stride_bytes);
    fetch(kHalf);
    _tile_dpbf16ps(2, 5, 6);
    fetch(kHalf + 1);
    if (NG >= 2) {
      _tile_dpbf16ps(3, 5, 7);
      fetch(7);
    }
  }
  if (NG == 4) {
    _tile_loadd(6, b.units + 2 * b.group_stride, step_bytes);
    fetch(5);
    _tile_dpbf16ps(2, 4, 6);
    fetch(6);
    _tile_loadd(7, b.units + 3 * b.group_stride, step_bytes);
    fetch(7);
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
  multiply_step<MT, NG, Nothing>({rows[0], 64},
                                 {reinterpret_cast<const uint32_t*>(columns), kStepUnits * kGroup, kGroup}, {});
}

template <int MT, int NG, class M>
INLINE void multiply_all(int num_rows, const Factors& factors, M& meanwhile) {
  const TileA a = factors.a;
  const TileB b = factors.b;
  int64_t unit = 0;
  for (; (unit + kStepUnits) * 4 <= factors.a_bytes; unit += kStepUnits) {
    meanwhile.step();
    multiply_step<MT, NG, M>({a.rows + unit * 4, a.stride_bytes}, {b.units + unit * b.step, b.group_stride, b.step},
                             meanwhile.later(factors, unit));
  }
  if (unit < factors.num_units)
    multiply_rest<MT, NG>(num_rows, a.rows + unit * 4, a.stride_bytes, b.units + unit * b.step, b,
                          factors.num_units - unit, factors.a_bytes - unit * 4);
}

template <int MT, int NG, class M>
INLINE void multiply_tiles(int num_rows, const Factors& factors, const Factors* more, TileC c, M& meanwhile) {
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
  multiply_all<MT, NG>(num_rows, factors, meanwhile);
  Nothing nothing;
  if (more) {
    meanwhile.before_more();
    multiply_all<MT, NG>(num_rows, *more, nothing);
  }
  _tile_stored(0, sums, stride);
  if (NG >= 2) _tile_stored(1, sums + 64, stride);
  if (MT == 2) _tile_stored(2, low, stride);
  if (MT == 2 && NG >= 2) _tile_stored(3, low + 64, stride);
  if (MT == 1 && NG == 4) _tile_stored(2, sums + 128, stride);
  if (MT == 1 && NG == 4) _tile_stored(3, sums + 192, stride);
}

// Up to 32 rows by one or two groups, up to 16 by four; then the same rows and columns of more factors, if any.
template <int NG, class M>
__attribute__((noinline)) void tile_product(int num_rows, const Factors& factors, const Factors* more, TileC c,
                                            M& meanwhile) {
  if (NG == 4 || num_rows <= 16)
    multiply_tiles<1, NG>(num_rows, factors, more, c, meanwhile);
  else
    multiply_tiles<2, NG>(num_rows, factors, more, c, meanwhile);
}
template <int NG>
INLINE void tile_product(int num_rows, const Factors& factors, TileC c) {
  Nothing nothing;
  tile_product<NG>(num_rows, factors, nullptr, c, nothing);
}

// Any number of rows and groups.
INLINE void tile_product(int64_t num_rows, int64_t num_groups, const Factors& factors, TileC c) {
  for (int64_t row = 0; row < num_rows; row += kMostTileRows) {
    const int rows = static_cast<int>(min64(kMostTileRows, num_rows - row));
    Factors some = factors;
    some.a.rows += row * some.a.stride_bytes;
    TileC part{c.sums + row * c.stride, c.stride, c.is_added_to};
    for (int64_t left = num_groups; left > 0; left -= 2) {
      left >= 2 ? tile_product<2>(rows, some, part) : tile_product<1>(rows, some, part);
      some.b.units += 2 * some.b.group_stride, part.sums += 2 * kGroup;
    }
  }
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
