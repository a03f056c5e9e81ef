// The running softmax of attention: scores of a row side by side, and how chunks are merged. Included by isa.cpp.
// (Online softmax: arXiv 1805.02867.)
#pragma once
#include "elements.h"
#include "softmax_lanes.h"
#include "tile.h"

namespace {

// Maxima and sums of exponentials of some rows, and their sums of values by weight: [row, width] in the order of
// load_two; of rows that are columns, [block of lanes][width][lane].
struct Softmax {
  float *maxima, *totals, *values;
  int64_t width;

  Softmax from(int64_t row) const { return {maxima + row, totals + row, values + row * width, width}; }
};

INLINE float scalar_exp2(float x) { return exp2_lanes(splat(x))[0]; }

inline void scale_row(float* row, int64_t width, float factor) {
  for (int64_t i = 0; i < width; i += W) store_floats(row + i, load_floats(row + i) * splat(factor));
}

// One row of a tile's scores becomes weights; positions outside [low, high) are masked. log2_scale: of scores, as
// exponents of two, which are cheaper than those of e.
template <class T>
void soften(const float* scores, int64_t low, int64_t high, float log2_scale, const Softmax& softmax, int64_t row,
            uint32_t* weights) {
  using Elem = typename T::Elem;
  constexpr int kVectors = kTokenTile / W;
  if (low >= high) {
    memset(weights, 0, kTokenTile * sizeof(Elem));
    return;
  }
  vf lanes[kVectors], largest = splat(-INFINITY);
  vi index;
  for (int i = 0; i < W; i++) index[i] = i;
  const bool is_masked = low > 0 || high < kTokenTile;
  const int32_t first = static_cast<int32_t>(low), last = static_cast<int32_t>(high);
  const vf scale = splat(log2_scale);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    lanes[i] = load_floats(scores + i * W) * scale;
    if (is_masked) {
      const vi position = index + i * W;
      lanes[i] = (position >= first) & (position < last) ? lanes[i] : splat(-INFINITY);
    }
    largest = larger(largest, lanes[i]);
  }
  const float before = softmax.maxima[row];
  const float tile_max = fold_max(largest);
  const float now = tile_max > before ? tile_max : before;
  const vf shift = splat(now == -INFINITY ? 0.0f : now);
  vf total = {};
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    const vf weight = exp2_lanes(lanes[i] - shift);
    total += weight;
    T::store(reinterpret_cast<Elem*>(weights) + i * W, weight);
  }
  if (now != before) {
    softmax.maxima[row] = now;
    if (before != -INFINITY) {  // otherwise all of it is still zero
      const float decay = scalar_exp2(before - now);
      softmax.totals[row] *= decay;
      scale_row(softmax.values + row * softmax.width, softmax.width, decay);
    }
  }
  softmax.totals[row] += fold_sum(total);
}

// Scores of W rows that are columns, of which there are kLanesApart side by side, become weights, units of which stand
// kGroup apart, and the sums of values so far are scaled.
template <class T, int64_t kLanesApart>
void soften_columns(const Seen& seen, const float* scores, float log2_scale, const Softmax& softmax,
                    uint32_t* weights) {
  using Elem = typename T::Elem;
  const auto store = [&](int64_t t, const vf* two) {
    Elem* to = reinterpret_cast<Elem*>(weights + t / T::kPerUnit * kGroup);
    if (T::kPerUnit == 2) return T::store_two(to, two);
    T::store(to, two[0]);
    T::store(to + kGroup, two[1]);
  };
  if (seen.is_partial || seen.first > 0 || seen.last < kTokenTile) {
    const vf none[2] = {};
    for (int64_t t = 0; t < kTokenTile; t += 2) store(t, none);
    if (seen.first >= seen.last) return;
  }
  vf most = load_floats(softmax.maxima), total = load_floats(softmax.totals);
  const vf decay = soften_lanes(scores, kLanesApart, seen, splat(log2_scale), most, total, [] {}, store);
  store_floats(softmax.maxima, most);
  store_floats(softmax.totals, total);
  if (fold_max((vi)(decay != splat(1.0f)) & 1) == 0) return;
  for (int64_t i = 0; i < softmax.width; i++) {
    float* sum = softmax.values + i * kLanesApart;
    store_floats(sum, load_floats(sum) * decay);
  }
}

inline void merge_rows(const Softmax& chunk, int64_t num_rows, const Softmax& into) {
  const int64_t width = into.width;
  for (int64_t row = 0; row < num_rows; row++) {
    const float added = chunk.maxima[row], before = into.maxima[row];
    if (added == -INFINITY && chunk.totals[row] == 0.0f) continue;
    const float now = added > before ? added : before;
    const float keep = before == -INFINITY ? 0.0f : scalar_exp2(before - now), take = scalar_exp2(added - now);
    into.maxima[row] = now;
    into.totals[row] = into.totals[row] * keep + chunk.totals[row] * take;
    for (int64_t i = row * width; i < (row + 1) * width; i += W)
      store_floats(into.values + i, fma(load_floats(into.values + i), splat(keep),
                                        load_floats(chunk.values + i) * splat(take)));
  }
}

// The same of rows that are columns, kLanesApart side by side.
template <int64_t kLanesApart>
void merge_columns(const Softmax& chunk, int64_t num_rows, const Softmax& into) {
  for (int64_t row = 0; row < num_rows; row += W) {
    const vf nothing = splat(-INFINITY), added = load_floats(chunk.maxima + row);
    const vf before = load_floats(into.maxima + row), more = load_floats(chunk.totals + row);
    const vi is_empty = (added == nothing) & (more == vf{});
    const vf now = is_empty ? before : added > before ? added : before;
    const vf keep = is_empty ? splat(1.0f) : before == nothing ? vf{} : exp2_lanes(before - now);
    const vf take = is_empty ? vf{} : exp2_lanes(added - now);
    store_floats(into.maxima + row, now);
    store_floats(into.totals + row, load_floats(into.totals + row) * keep + more * take);
    const int64_t first = row / kLanesApart * kLanesApart * into.width + row % kLanesApart;
    for (int64_t i = first; i < first + into.width * kLanesApart; i += kLanesApart)
      store_floats(into.values + i, fma(load_floats(into.values + i), keep, load_floats(chunk.values + i) * take));
  }
}

}  // namespace
