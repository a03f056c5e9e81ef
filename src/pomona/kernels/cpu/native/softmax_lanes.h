// The softmax of attention where scores stand by position and then by row, a row to each lane. Included by isa.cpp.
//
// What is added in which order is the same as in soften() in softmax_rows.h, and so are the bits.
#pragma once
#include "vec.h"

namespace {

constexpr int64_t kTokenTile = 64;

// Which positions of a tile each lane sees: [low, high), all of them in [first, last).
struct Seen {
  int64_t first, last;
  bool is_partial;  // not all lanes see all of them
  vi low, high;
};

template <bool kIsPartial>
INLINE vf score_of(const float* scores, int64_t stride, int64_t t, const Seen& seen, vf scale) {
  const vf score = load_floats(scores + t * stride) * scale;
  if (!kIsPartial) return score;
  const vi at = vi{} + static_cast<int32_t>(t);
  return (at >= seen.low) & (at < seen.high) ? score : splat(-INFINITY);
}

// Positions [first, last) that are seen, or, of a whole tile, all.
template <bool kIsWhole, bool kIsPartial, class F, class S>
INLINE vf soften_lanes(const float* scores, int64_t stride, const Seen& seen, vf scale, vf& maxima, vf& totals,
                       const F& fetch, const S& store) {
  const int64_t first = kIsWhole ? 0 : seen.first, last = kIsWhole ? kTokenTile : seen.last;
  const vf nothing = splat(-INFINITY), before = maxima;
  vf largest[4] = {nothing, nothing, nothing, nothing};
  int64_t t = first;
  for (; t + 4 <= last; t += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      largest[i] = larger(largest[i], score_of<kIsPartial>(scores, stride, t + i, seen, scale));
  if (!kIsWhole)
    for (; t < last; t++)
      largest[0] = larger(largest[0], score_of<kIsPartial>(scores, stride, t, seen, scale));
  const vf most = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
  maxima = most > before ? most : before;
  const vf shift = maxima == nothing ? vf{} : maxima;
  vf parts[W];
  for (int64_t i = 0; i < W; i += 2) {
    fetch();
    parts[i] = parts[i + 1] = vf{};
#pragma GCC unroll 4
    for (int64_t t = i; t < kTokenTile; t += W) {
      if (!kIsWhole && (t + 1 < first || t >= last)) continue;
      vf two[2];
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; odd++) {
        const bool is_seen = kIsWhole || (t + odd >= first && t + odd < last);
        two[odd] =
            is_seen ? exp2_lanes(score_of<kIsPartial>(scores, stride, t + odd, seen, scale) - shift) : vf{};
        parts[i + odd] += two[odd];
      }
      store(t, two);
    }
  }
  for (int width = W / 2; width > 0; width /= 2)  // as fold_sum does
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  const vf decay = before == nothing ? splat(1.0f) : exp2_lanes(before - maxima);  // nothing yet: sums are zero
  totals = totals * decay + parts[0];
  return decay;
}

// The scores of W rows, each stride floats after the last position's, become weights: store(position, those of it and
// of the next) takes them, for every second position of which one is in [first, last). Maxima and totals go on; what
// earlier sums of values are to be multiplied by is returned. fetch() is called now and then.
template <class F, class S>
INLINE vf soften_lanes(const float* scores, int64_t stride, const Seen& seen, vf scale, vf& maxima, vf& totals,
                       const F& fetch, const S& store) {
  if (seen.is_partial) return soften_lanes<false, true>(scores, stride, seen, scale, maxima, totals, fetch, store);
  if (seen.first > 0 || seen.last < kTokenTile)
    return soften_lanes<false, false>(scores, stride, seen, scale, maxima, totals, fetch, store);
  return soften_lanes<true, false>(scores, stride, seen, scale, maxima, totals, fetch, store);
}

}  // namespace
