// Row-wise kernels: RMS norm, rotary embedding with the KV write, gated activation, greedy choice. Included by isa.cpp.
// Intermediate results are rounded where the torch reference rounds them.
#pragma once
#include "elements.h"
#include "work.h"

namespace {

// f(row) for every row, several rows at a time.
template <class F>
void for_rows(int64_t num_rows, int64_t cycles_per_row, int num_threads, const F& f) {
  const int64_t at_once = max64(1, kThreadCycles / 4 / max64(1, cycles_per_row));
  for_items(ceil_div(num_rows, at_once), threads_for(num_threads, num_rows * cycles_per_row), [&](int64_t item) {
    const int64_t end = min64(num_rows, (item + 1) * at_once);
    for (int64_t row = item * at_once; row < end; row++) f(row);
  });
}

template <class T>
void norm(const pomona::NormCall& call, int num_threads) {
  using Elem = typename T::Elem;
  const int64_t features = call.features;
  const Elem* weight = static_cast<const Elem*>(call.weight);
  for_rows(call.num_outer * call.num_inner, features * 8 / W + 60, num_threads, [&](int64_t row) {
    const Elem* x = static_cast<const Elem*>(call.x) + row / call.num_inner * call.outer_stride +
                    row % call.num_inner * call.inner_stride;
    Elem* residual = call.residual ? static_cast<Elem*>(call.residual) + row * features : nullptr;
    Elem* out = static_cast<Elem*>(call.out) + row * features;
    vf squares[2] = {};
    for_lanes(features, LANES {
      vf value[2], added[2];
      load_some<T>(x + i, n, value);
      if (residual) {
        load_some<T>(residual + i, n, added);
        for (int j = 0; j < 2; j++) value[j] = T::round(value[j] + added[j]);
        store_some<T>(residual + i, value, n);
      }
      for (int j = 0; j < 2; j++) squares[j] = fma(value[j], value[j], squares[j]);
    });
    const float mean = fold_sum(squares[0] + squares[1]) / static_cast<float>(features);
    const vf inverse = splat(1.0f / sqrtf(mean + call.eps));
    const Elem* from = residual ? residual : x;
    for_lanes(features, LANES {
      vf value[2], scale[2];
      load_some<T>(from + i, n, value);
      load_some<T>(weight + i, n, scale);
      for (int j = 0; j < 2; j++) value[j] = T::round(value[j] * inverse) * scale[j];
      store_some<T>(out + i, value, n);
    });
  });
}

template <class T>
INLINE void rotate(typename T::Elem* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    const int n = static_cast<int>(min64(W, half - i));
    const vf c = load_one<Float32>(cos + i, n), s = load_one<Float32>(sin + i, n);
    const vf low = load_one<T>(head + i, n), high = load_one<T>(head + half + i, n);
    store_one<T>(head + i, low * c - high * s, n);
    store_one<T>(head + half + i, high * c + low * s, n);
  }
}

// Where a token's keys (or values) go.
template <class Elem>
INLINE Elem* kv_at(void* cache, int64_t block_stride, const pomona::RopeCall& call, int64_t token) {
  const int64_t slot = call.slots[token];
  return static_cast<Elem*>(cache) + slot / call.block_size * block_stride +
         slot % call.block_size * call.num_kv_heads * call.head_dim;
}

// The slots of decodes lie all over memory: asked for one by one, each would be waited for.
template <class Elem>
INLINE void fetch_slot(const pomona::RopeCall& call, int64_t token) {
  const int64_t num_bytes = call.num_kv_heads * call.head_dim * sizeof(Elem);
  const Elem* key = kv_at<Elem>(call.key_cache, call.key_block_stride, call, token);
  const Elem* value = kv_at<Elem>(call.value_cache, call.value_block_stride, call, token);
  for (int64_t at = 0; at < num_bytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(key) + at, 1, 3);
    __builtin_prefetch(reinterpret_cast<const char*>(value) + at, 1, 3);
  }
}

template <class T>
void rope(const pomona::RopeCall& call, int num_threads) {
  using Elem = typename T::Elem;
  const int64_t dim = call.head_dim, half = dim / 2, kv_width = call.num_kv_heads * dim;
  const int64_t width = (call.num_heads + 2 * call.num_kv_heads) * dim;
  for_rows(call.num_tokens, width * 4 / W + 20, num_threads, [&](int64_t token) {
    constexpr int64_t kSlotsAhead = 4;
    if (call.value && token + kSlotsAhead < call.num_tokens) fetch_slot<Elem>(call, token + kSlotsAhead);
    Elem* key = static_cast<Elem*>(call.key) + token * call.key_stride;
    if (call.cos_sin) {
      const float* cos = call.cos_sin + call.positions[token] * dim;
      Elem* query = static_cast<Elem*>(call.query) + token * call.query_stride;
      for (int64_t h = 0; h < call.num_heads; h++) rotate<T>(query + h * dim, cos, cos + half, half);
      for (int64_t h = 0; h < call.num_kv_heads; h++) rotate<T>(key + h * dim, cos, cos + half, half);
    }
    if (call.value) {
      const Elem* value = static_cast<const Elem*>(call.value) + token * call.value_stride;
      memcpy(kv_at<Elem>(call.key_cache, call.key_block_stride, call, token), key, kv_width * sizeof(Elem));
      memcpy(kv_at<Elem>(call.value_cache, call.value_block_stride, call, token), value, kv_width * sizeof(Elem));
    }
  });
}

template <class T>
void silu_mul(const pomona::ActivationCall& call, int num_threads) {
  using Elem = typename T::Elem;
  const int64_t features = call.features;
  for_rows(call.num_rows, features * 20 / W, num_threads, [&](int64_t row) {
    const Elem* gate = static_cast<const Elem*>(call.gate_up) + row * call.row_stride;
    Elem* out = static_cast<Elem*>(call.out) + row * features;
    for_lanes(features, LANES {
      vf g[2], up[2];
      load_some<T>(gate + i, n, g);
      load_some<T>(gate + features + i, n, up);
      for (int j = 0; j < 2; j++) {
        const vf power = g[j] * splat(-kLog2E), most = splat(127.0f);
        g[j] = T::round(g[j] / (splat(1.0f) + exp2_lanes(power > most ? most : power))) * up[j];
      }
      store_some<T>(out + i, g, n);
    });
  });
}

// Rows of a weight that lies in groups of 16 outputs (see gemm.h and gemm_int8.h) or row after row.
template <class T>
void gather(const pomona::GatherCall& call, int num_threads) {
  using Elem = typename T::Elem;
  constexpr int64_t kLanes = 16;
  const int64_t per_unit = call.scales ? 2 : T::kPerUnit;
  const int64_t num_units = ceil_div(call.in_features, per_unit);
  const int64_t step = (call.is_grouped ? kLanes : 1) * per_unit;
  for_rows(call.num_rows, num_units * 8, num_threads, [&](int64_t row) {
    const int64_t id = call.row_ids[row];
    const int64_t first = call.is_grouped ? (id / kLanes * num_units * kLanes + id % kLanes) * per_unit
                                          : id * call.in_features;
    Elem* out = static_cast<Elem*>(call.out) + row * call.in_features;
    for (int64_t unit = 0; unit < num_units; unit++) {
      const int64_t at = first + unit * step, n = min64(per_unit, call.in_features - unit * per_unit);
      if (!call.scales) {
        memcpy(out + unit * per_unit, static_cast<const Elem*>(call.packed) + at, n * sizeof(Elem));
        continue;
      }
      vf values = {};
      for (int64_t i = 0; i < n; i++) values[i] = static_cast<const int8_t*>(call.packed)[at + i] * call.scales[id];
      store_one<T>(out + unit * per_unit, values, static_cast<int>(n));
    }
  });
}

// One pass per row: the largest of each lane and where it came first, and whether anything is not finite.
inline void greedy(const pomona::GreedyCall& call, int num_threads) {
  for_rows(call.num_rows, call.vocab_size * 2 / W, num_threads, [&](int64_t row) {
    const float* logits = call.logits + row * call.row_stride;
    vf largest = splat(-INFINITY), range = {};
    vi index, where = {};
    for (int i = 0; i < W; i++) index[i] = i;
    int64_t i = 0;
    for (; i + W <= call.vocab_size; i += W, index += W) {
      const vf value = load_floats(logits + i);
      const vi is_larger = value > largest;
      where = is_larger ? index : where;
      largest = is_larger ? value : largest;
      range += value - value;  // zero, or NaN for ever once a value is not finite
    }
    float best = -INFINITY, rest = 0.0f;
    int64_t token = 0;
    for (int lane = 0; lane < W; lane++) {
      const bool is_earlier = largest[lane] == best && where[lane] < token;
      if (largest[lane] > best || is_earlier) best = largest[lane], token = where[lane];
    }
    for (; i < call.vocab_size; i++) {
      if (logits[i] > best) best = logits[i], token = i;
      rest += logits[i] - logits[i];
    }
    call.token_ids[row] = token;
    call.is_finite[row] = fold_sum(range) + rest == 0.0f;
  });
}

}  // namespace
