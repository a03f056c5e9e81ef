// Attention over a paged KV cache, prompt chunks and decodes alike. Included by isa.cpp.
//
// An item is a run of one sequence's rows and one kv head with all the query heads that read it, so that each key and
// value is read once for the whole group. Keys and values are repacked tile by tile and multiplied by the same product
// as dense layers. Contexts are cut into chunks of kChunk positions; each chunk has its own online softmax, and chunks
// are merged in order. The cuts depend on positions alone, so a row's result does not depend on which rows are computed
// with it or on how many threads share a long context. (Online softmax: arXiv 1805.02867; splitting: Flash-Decoding.)
#pragma once
#include "tile.h"
#include "work.h"

namespace {

constexpr int64_t kTokenTile = 64;
constexpr int64_t kChunk = 512;
static_assert(kChunk % kTokenTile == 0 && kTokenTile % kGroup == 0);

#if defined(__AVX512F__)
// 16 rows of 16 units -> their transpose.
INLINE void transpose_units(const char* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + offset);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
  }
}
#else
INLINE void transpose_units(const char* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; i++) {
    uint32_t row[16];
    memcpy(row, rows[i] + offset, sizeof row);
    for (int unit = 0; unit < 16; unit++) out[unit * stride + i] = row[unit];
  }
}
#endif

// Running softmax of some rows: maxima, sums of exponentials, weighted sums of values.
struct Softmax {
  float *maxima, *totals, *values;
};

template <class T>
struct Attention {
  using Elem = typename T::Elem;
  const pomona::AttentionCall& call;
  int64_t group, num_units, value_width, max_rows;  // query heads per kv head; units of head_dim; head_dim padded

  // Scratch of one thread, carved from one allocation.
  struct Space {
    uint32_t *query, *keys, *values, *weights;
    float* scores;
    Softmax chunk, merged;
  };

  int64_t softmax_floats() const { return max_rows * (2 + value_width); }

  Softmax softmax_at(float* at) const { return {at, at + max_rows, at + 2 * max_rows}; }

  Space space() const {
    const int64_t sizes[] = {max_rows * num_units, kTokenTile * (num_units + 15), kTokenTile * value_width,
                             max_rows * kTokenTile, max_rows * kTokenTile, softmax_floats(), softmax_floats()};
    int64_t total = 0;
    for (int64_t size : sizes) total += ceil_div(size, 16) * 16;
    uint32_t* at = static_cast<uint32_t*>(pomona::scratch(2, total * 4));
    uint32_t* parts[7];
    for (int i = 0; i < 7; i++) parts[i] = at, at += ceil_div(sizes[i], 16) * 16;
    return {parts[0], parts[1], parts[2], parts[3], reinterpret_cast<float*>(parts[4]),
            softmax_at(reinterpret_cast<float*>(parts[5])), softmax_at(reinterpret_cast<float*>(parts[6]))};
  }

  // Where a token's key or value of one head is.
  const char* token(const void* cache, int64_t block_stride, const int32_t* table, int64_t position,
                    int64_t kv_head) const {
    const int64_t block = table[position / call.block_size], offset = position % call.block_size;
    return reinterpret_cast<const char*>(static_cast<const Elem*>(cache) + block * block_stride +
                                         (offset * call.num_kv_heads + kv_head) * call.head_dim);
  }

  void load_query(const pomona::QueryBlock& block, int64_t kv_head, uint32_t* out) const {
    for (int64_t r = 0; r < block.num_rows; r++)
      for (int64_t g = 0; g < group; g++, out += num_units) {
        const Elem* head = static_cast<const Elem*>(call.query) + (block.row + r) * call.query_row_stride +
                           (kv_head * group + g) * call.query_head_stride;
        out[num_units - 1] = 0;
        memcpy(out, head, call.head_dim * sizeof(Elem));
      }
  }

  // keys[unit][token] of the tile's positions; those outside [low, high) are zeros, or unspecified from the first group
  // past high on. Nothing outside [low, high) is read: a freed block may hold anything.
  void load_keys(const int32_t* table, int64_t tile, int64_t low, int64_t high, int64_t kv_head, uint32_t* keys) const {
    alignas(64) static const char zeros[pomona::kMaxHeadDim * 4] = {};
    const int64_t num_bytes = call.head_dim * sizeof(Elem), whole = num_bytes / 64 * 64;
    for (int64_t t = 0; t < high; t += kGroup, keys += kGroup) {
      const char* rows[kGroup];
      for (int64_t i = 0; i < kGroup; i++)
        rows[i] = t + i >= low && t + i < high
                      ? token(call.key_cache, call.key_block_stride, table, tile + t + i, kv_head)
                      : zeros;
      for (int64_t at = 0; at < whole; at += 64) transpose_units(rows, at, keys + at / 4 * kTokenTile, kTokenTile);
      if (whole == num_bytes) continue;
      char rest[kGroup][64] = {};
      const char* rest_rows[kGroup];
      for (int64_t i = 0; i < kGroup; i++) {
        memcpy(rest[i], rows[i] + whole, num_bytes - whole);
        rest_rows[i] = rest[i];
      }
      transpose_units(rest_rows, 0, keys + whole / 4 * kTokenTile, kTokenTile);
    }
  }

  // values[units of tokens][head_dim padded] for the units of the tile that [low, high) touches; zeros elsewhere in them.
  void load_values(const int32_t* table, int64_t tile, int64_t low, int64_t high, int64_t kv_head,
                   uint32_t* values) const {
    static const Elem zeros[pomona::kMaxHeadDim] = {};
    for (int64_t t = low / T::kPerUnit * T::kPerUnit; t < high; t += T::kPerUnit, values += value_width) {
      const Elem* rows[2] = {zeros, zeros};
      for (int64_t i = 0; i < T::kPerUnit; i++)
        if (t + i >= low && t + i < high)
          rows[i] = reinterpret_cast<const Elem*>(
              token(call.value_cache, call.value_block_stride, table, tile + t + i, kv_head));
      for_lanes(call.head_dim, [&](int64_t i, int n) {
        const vu units = T::units_of(rows[0] + i, rows[1] + i, n);
        memcpy(values + i, &units, sizeof units);
      });
      for (int64_t i = ceil_div(call.head_dim, W) * W; i < value_width; i++) values[i] = 0;
    }
  }

  // One row of scores becomes weights; the tile's positions outside [low, high) are masked.
  void soften(float* scores, int64_t low, int64_t high, int64_t row, const Softmax& softmax, uint32_t* weights) const {
    constexpr int kVectors = kTokenTile / W;
    vf lanes[kVectors], largest = splat(-INFINITY);
    vi index;
    for (int i = 0; i < W; i++) index[i] = i;
    const bool is_masked = low > 0 || high < kTokenTile;
    const int32_t first = static_cast<int32_t>(low), last = static_cast<int32_t>(high);
    for (int i = 0; i < kVectors; i++) {
      lanes[i] = load_floats(scores + i * W) * splat(call.scale);
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
    for (int i = 0; i < kVectors; i++) {
      lanes[i] = exp_lanes(lanes[i] - shift);
      total += lanes[i];
      T::store(reinterpret_cast<Elem*>(weights) + i * W, lanes[i]);
    }
    if (now != before) {
      const float decay = before == -INFINITY ? 0.0f : scalar_exp(before - now);
      softmax.maxima[row] = now;
      softmax.totals[row] *= decay;
      scale_row(softmax.values + row * value_width, decay);
    }
    softmax.totals[row] += fold_sum(total);
  }

  static float scalar_exp(float x) { return exp_lanes(splat(x))[0]; }

  void scale_row(float* row, float factor) const {
    for (int64_t i = 0; i < value_width; i += W) store_floats(row + i, load_floats(row + i) * splat(factor));
  }

  // Attention of a block's rows to the positions [begin, end) of one chunk.
  void attend(const pomona::QueryBlock& block, int64_t kv_head, int64_t begin, int64_t end, const Space& s,
              const Softmax& softmax) const {
    const int32_t* table = call.block_tables + block.sequence * call.max_blocks;
    const int64_t num_rows = block.num_rows * group;
    for (int64_t row = 0; row < num_rows; row++) softmax.maxima[row] = -INFINITY, softmax.totals[row] = 0.0f;
    memset(softmax.values, 0, num_rows * value_width * 4);
    const TileA query{reinterpret_cast<const char*>(s.query), num_units * 4};
    const char* weights = reinterpret_cast<const char*>(s.weights);
    for (int64_t tile = begin / kTokenTile * kTokenTile; tile < end; tile += kTokenTile) {
      // A position keeps its place in the tile whichever of the tile's positions are attended to.
      const int64_t low = max64(begin - tile, 0), high = min64(end - tile, kTokenTile);
      load_keys(table, tile, low, high, kv_head, s.keys);
      product<T>(num_rows, ceil_div(high, kGroup), num_units, query, TileB{s.keys, kGroup, kTokenTile},
                 TileC{s.scores, kTokenTile, false});
      for (int64_t r = 0; r < block.num_rows; r++) {
        const int64_t newest = block.first_position + r - tile;
        const int64_t oldest = call.window ? max64(low, newest - call.window + 1) : low;
        for (int64_t g = 0; g < group; g++) {
          const int64_t row = r * group + g;
          soften(s.scores + row * kTokenTile, oldest, min64(newest + 1, high), row, softmax,
                 s.weights + row * (kTokenTile / T::kPerUnit));
        }
      }
      load_values(table, tile, low, high, kv_head, s.values);
      const int64_t unit = low / T::kPerUnit;
      product<T>(num_rows, value_width / kGroup, ceil_div(high, T::kPerUnit) - unit,
                 TileA{weights + unit * 4, kTokenTile * static_cast<int64_t>(sizeof(Elem))},
                 TileB{s.values, kGroup, value_width}, TileC{softmax.values, value_width, true});
    }
  }

  void merge(const Softmax& chunk, int64_t num_rows, const Softmax& into) const {
    for (int64_t row = 0; row < num_rows; row++) {
      const float added = chunk.maxima[row], before = into.maxima[row];
      if (added == -INFINITY && chunk.totals[row] == 0.0f) continue;
      const float now = added > before ? added : before;
      const float keep = before == -INFINITY ? 0.0f : scalar_exp(before - now), take = scalar_exp(added - now);
      into.maxima[row] = now;
      into.totals[row] = into.totals[row] * keep + chunk.totals[row] * take;
      for (int64_t i = row * value_width; i < (row + 1) * value_width; i += W)
        store_floats(into.values + i, fma(load_floats(into.values + i), splat(keep),
                                          load_floats(chunk.values + i) * splat(take)));
    }
  }

  void store(const pomona::QueryBlock& block, int64_t kv_head, const Softmax& softmax) const {
    for (int64_t r = 0; r < block.num_rows; r++)
      for (int64_t g = 0; g < group; g++) {
        const int64_t row = r * group + g;
        Elem* out = static_cast<Elem*>(call.out) +
                    ((block.row + r) * call.num_heads + kv_head * group + g) * call.head_dim;
        const vf factor = splat(1.0f / softmax.totals[row]);
        const float* values = softmax.values + row * value_width;
        for_lanes(call.head_dim, [&](int64_t i, int n) { store_some<T>(out + i, load_floats(values + i) * factor, n); });
      }
  }

  int64_t first_read(const pomona::QueryBlock& block) const {
    return call.window ? max64(0, block.first_position - call.window + 1) : 0;
  }

  // All chunks of one item, one after the other.
  void whole(const pomona::QueryBlock& block, int64_t kv_head) const {
    const Space s = space();
    const int64_t begin = first_read(block), end = block.first_position + block.num_rows;
    load_query(block, kv_head, s.query);
    bool is_first = true;
    for (int64_t chunk = begin / kChunk; chunk * kChunk < end; chunk++, is_first = false) {
      const Softmax& into = is_first ? s.merged : s.chunk;
      attend(block, kv_head, max64(begin, chunk * kChunk), min64(end, (chunk + 1) * kChunk), s, into);
      if (!is_first) merge(s.chunk, block.num_rows * group, s.merged);
    }
    store(block, kv_head, s.merged);
  }

  // One chunk of one item; whoever finishes an item's last chunk merges them all.
  void part(const pomona::QueryBlock& block, int64_t kv_head, int64_t chunk, float* parts, int32_t* num_left) const {
    const int64_t begin = first_read(block), end = block.first_position + block.num_rows;
    const int64_t first = begin / kChunk, last = (end - 1) / kChunk;
    if (chunk < first || chunk > last) return;
    const Space s = space();
    load_query(block, kv_head, s.query);
    attend(block, kv_head, max64(begin, chunk * kChunk), min64(end, (chunk + 1) * kChunk), s,
           softmax_at(parts + chunk * softmax_floats()));
    const int32_t num_done = __atomic_add_fetch(num_left, 1, __ATOMIC_ACQ_REL);
    if (num_done < last - first + 1) return;
    for (int64_t i = first + 1; i <= last; i++)
      merge(softmax_at(parts + i * softmax_floats()), block.num_rows * group, softmax_at(parts + first * softmax_floats()));
    store(block, kv_head, softmax_at(parts + first * softmax_floats()));
  }
};

template <class T>
void attention(const pomona::AttentionCall& call, int num_threads) {
  int64_t most_rows = 0, num_rows = 0;
  for (int64_t i = 0; i < call.num_blocks; i++) {
    most_rows = max64(most_rows, call.blocks[i].num_rows);
    num_rows += call.blocks[i].num_rows;
  }
  const int64_t group = call.num_heads / call.num_kv_heads;
  const Attention<T> work{call, group, ceil_div(call.head_dim, T::kPerUnit), ceil_div(call.head_dim, kGroup) * kGroup,
                          most_rows * group};
  const int64_t num_items = call.num_blocks * call.num_kv_heads;
  const int64_t num_chunks = ceil_div(call.max_context, kChunk);
  const int threads = threads_for(num_threads, num_rows * call.max_context * call.num_kv_heads * (8 + call.head_dim / 16));
  if (threads <= 1 || num_chunks <= 1 || num_items >= 4 * threads) {
    for_items(num_items, threads, [&](int64_t item) {
      work.whole(call.blocks[item / call.num_kv_heads], item % call.num_kv_heads);
    });
    return;
  }
  const int64_t part_floats = num_chunks * work.softmax_floats();
  float* parts = static_cast<float*>(pomona::scratch(3, num_items * (part_floats * 4 + 4)));
  int32_t* num_done = reinterpret_cast<int32_t*>(parts + num_items * part_floats);
  memset(num_done, 0, num_items * 4);
  for_items(num_items * num_chunks, threads, [&](int64_t item) {
    const int64_t pair = item / num_chunks;
    work.part(call.blocks[pair / call.num_kv_heads], pair % call.num_kv_heads, item % num_chunks,
              parts + pair * part_floats, num_done + pair);
  });
}

}  // namespace
