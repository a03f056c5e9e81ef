// Attention's two products for few rows, where there are tile registers. Included by isa.cpp.
//
// A decode has a few query heads for each kv head, so laying out keys and values costs more than multiplying with them.
// Here keys are the rows of a product, as they lie in the cache, and queries its columns; all kv heads are summed in
// one go: a head's queries have zeros where other heads' rows are. Values are multiplied by vectors. What is added in
// which order is the same as in attention.h, whichever factor is on the left, and zeros change no sum: so are the bits.
#pragma once
#include "elements.h"
#include "softmax_lanes.h"
#include "tile_registers.h"

namespace {

constexpr int64_t kLanes = 16;  // rows that are attended to at once: of one or more kv heads

#if defined(__AMX_BF16__)

// 16 keys below each other in the cache; or zeros, 0 bytes apart.
struct KeyRows {
  const char* first;
  int64_t stride_bytes;
};

// scores[position][row], of 4 times 16 positions for 16 rows. Of each key num_bytes, whole steps of 64, are read from
// first_byte on. queries: [unit][row].
template <class F>
INLINE void score_tiles(const KeyRows* keys, int64_t first_byte, int64_t num_bytes, const uint32_t* queries,
                        float* scores, const F& fetch) {
  configure_tiles(kLanes);
  __asm__ volatile("" ::: "memory");  // tiles are loaded and stored behind the compiler's back
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t at = first_byte; at < first_byte + num_bytes; at += 64, queries += kStepUnits * kLanes) {
    fetch();
    _tile_loadd(6, queries, 64);
    _tile_loadd(4, keys[0].first + at, keys[0].stride_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, keys[1].first + at, keys[1].stride_bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, keys[2].first + at, keys[2].stride_bytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, keys[3].first + at, keys[3].stride_bytes);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 256, 64);
  _tile_stored(2, scores + 512, 64);
  _tile_stored(3, scores + 768, 64);
  __asm__ volatile("" ::: "memory");
}

// R rows' sums over NV vectors of columns (+)= weights * values, over the positions [low, high) of a tile, in the order
// of tiles: a step's even and odd positions apart, then both to the sum. weights: [64, 16], of which R are taken;
// values: 64 rows.
template <int R, int NV, class F>
INLINE void add_values(const uint16_t* const* values, int64_t column, int64_t low, int64_t high, const float* weights,
                       float* sums, int64_t stride, const F& fetch) {
  for (int64_t step = low / 32 * 32; step < high; step += 32) {
    vf parts[2][R][NV] = {};
    for (int64_t t = max64(step, low / 2 * 2); t < min64(step + 32, high); t += 2) {
      fetch();
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; odd++) {
        vf columns[NV];
#pragma GCC unroll 2
        for (int n = 0; n < NV; n += 2) BFloat16::load_two(values[t + odd] + column + n * W, columns + n);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const vf weight = splat(weights[(t + odd) * kLanes + r]);
#pragma GCC unroll 4
          for (int n = 0; n < NV; n++) parts[odd][r][n] = fma(weight, columns[n], parts[odd][r][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) {
        float* sum = sums + r * stride + n * W;
        store_floats(sum, load_floats(sum) + (parts[0][r][n] + parts[1][r][n]));
      }
  }
}

// Any number of rows and of columns.
template <class F>
INLINE void add_values(int64_t num_rows, int64_t num_columns, const uint16_t* const* values, int64_t column,
                       int64_t low, int64_t high, const float* weights, float* sums, int64_t stride, const F& fetch) {
  constexpr int64_t kMostRows = 7;  // more do not fit the registers
  for (; num_rows > 0; num_rows -= kMostRows, weights += kMostRows, sums += kMostRows * stride)
    for (int64_t i = 0; i < num_columns;) {
#define POMONA_ADD(R, NV) add_values<R, NV>(values, column + i, low, high, weights, sums + i, stride, fetch)
      const bool is_wide = num_rows <= 3 && num_columns - i >= 4 * W;
      switch (min64(num_rows, kMostRows)) {
        case 1: is_wide ? POMONA_ADD(1, 4) : POMONA_ADD(1, 2); break;
        case 2: is_wide ? POMONA_ADD(2, 4) : POMONA_ADD(2, 2); break;
        case 3: is_wide ? POMONA_ADD(3, 4) : POMONA_ADD(3, 2); break;
        case 4: POMONA_ADD(4, 2); break;
        case 5: POMONA_ADD(5, 2); break;
        case 6: POMONA_ADD(6, 2); break;
        default: POMONA_ADD(7, 2);
      }
#undef POMONA_ADD
      i += (is_wide ? 4 : 2) * W;
    }
}

#endif

}  // namespace
