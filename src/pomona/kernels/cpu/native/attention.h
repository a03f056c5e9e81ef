// Attention over a paged KV cache, prompt chunks and decodes alike. Included by isa.cpp.
//
// An item is a run of one sequence's rows and some kv heads with all the query heads that read them, so that each key
// and value is read once for the whole group. Decodes take all kv heads at once, which lie beside each other in memory,
// and fetch the next tile meanwhile: memory sets their pace. Keys and values are repacked tile by tile and multiplied
// by the same product as dense layers: few rows are the rows of that product, many rows its columns. Where there are
// tile registers, those of few rows are taken as they lie (attention_tiles.h). The bits are the same in all three.
//
// Contexts are cut into chunks of kChunk positions; each chunk has its own online softmax, and chunks are merged in
// order. The cuts depend on positions alone, so a row's result does not depend on its company or on how many threads
// share a long context. (Online softmax: arXiv 1805.02867; splitting: Flash-Decoding.)
#pragma once
#include "attention_items.h"

namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kRowsTogether = 128;  // rows times query heads up to which an item takes all kv heads
// Lines of the next tile that few rows fetch at each step of a product with keys, each sixteenth of the scores and each
// pair of values: about as many as there are, about as often as they arrive.
constexpr int64_t kLinesPerStep = 24, kLinesPerRow = 16, kLinesPerPair = 4;
static_assert(kChunk % kTokenTile == 0 && kTokenTile % kGroup == 0 && kTokenTile % (2 * kStepUnits) == 0);

template <class T>
struct Attention {
  using Elem = typename T::Elem;
  using Items = AttentionItems<T>;
  static constexpr int kRows = ProductSize<T>::kRows;
  static constexpr int64_t kUnits = ProductSize<T>::kUnits, kTokensPerStep = kUnits * T::kPerUnit;
  static constexpr int64_t kBlockLanes = Items::kBlockLanes, kTileUnits = kTokenTile / T::kPerUnit;
  const pomona::AttentionCall& call;
  Items items;
  CacheReader<T> cache;
  int64_t num_units, value_width;  // of head_dim; and it padded
  int64_t max_rows;                // rows times heads of an item, at most
  float log2_scale;

  // Scratch of one thread, carved from one allocation.
  struct Space {
    uint32_t *query, *keys, *values, *columns, *weights;
    float* scores;
    Softmax chunk, merged;
  };

  int64_t softmax_floats() const { return max_rows * (2 + value_width); }

  Softmax softmax_at(float* at) const { return {at, at + max_rows, at + 2 * max_rows, value_width}; }

  Space space() const {
    const int64_t most_lanes = max64(max_rows, kUsesTiles<T> ? items.heads_per_item * kLanes : 0);
    // 15 units more: units are laid out 16 at a time.
    const int64_t sizes[] = {most_lanes * num_units + 15 * kGroup, kTokenTile * (num_units + 15),
                             kTokenTile * value_width,             kTokenTile * value_width,
                             max_rows * kTokenTile,                most_lanes * kTokenTile,
                             softmax_floats(),                     softmax_floats()};
    int64_t total = 0;
    for (int64_t size : sizes) total += ceil_div(size, 16) * 16;
    uint32_t* at = static_cast<uint32_t*>(pomona::scratch(pomona::kPanel, total * 4));
    uint32_t* parts[8];
    for (int i = 0; i < 8; i++) parts[i] = at, at += ceil_div(sizes[i], 16) * 16;
    return {parts[0], parts[1], parts[2], parts[3], parts[4], reinterpret_cast<float*>(parts[5]),
            softmax_at(reinterpret_cast<float*>(parts[6])), softmax_at(reinterpret_cast<float*>(parts[7]))};
  }

#if defined(__AMX_BF16__)
  // Scores of rows side by side, of whole heads, become weights. The softmax of the first is the first_row-th.
  void weigh_lanes(const Item& it, const Tile& tile, int64_t num_rows, float* scores, int64_t first_row,
                   const Softmax& softmax, NextBlocks<T>& blocks) const {
    const Seen seen = items.seen_by_lanes(it, tile, 0, num_rows);
    for (int64_t t = tile.low / 2 * 2; t < ceil_div(tile.high, 2) * 2; t++)
      if (t < seen.first || t >= seen.last) memset(scores + t * kLanes, 0, kLanes * 4);
    if (seen.first >= seen.last) return;
    const int n = static_cast<int>(num_rows);
    float *maxima = softmax.maxima + first_row, *totals = softmax.totals + first_row;
    vf most = load_one<Float32>(maxima, n), total = load_one<Float32>(totals, n);
    alignas(64) float decays[kLanes];
    const vf decay = soften_lanes(
        scores, kLanes, seen, splat(log2_scale), most, total, [&] { blocks.fetch(2 * kLinesPerRow); },
        [&](int64_t t, const vf* two) {
          store_floats(scores + t * kLanes, T::round(two[0]));
          store_floats(scores + (t + 1) * kLanes, T::round(two[1]));
        });
    store_floats(decays, decay);
    store_one<Float32>(maxima, most, n);
    store_one<Float32>(totals, total, n);
    for (int64_t row = 0; row < num_rows; row++)
      if (decays[row] != 1.0f) scale_row(softmax.from(first_row + row).values, value_width, decays[row]);
  }

  void attend_lanes(const Item& it, const Tile& tile, const Elem* const* values, const Space& s, const Softmax& softmax,
                    NextBlocks<T>& blocks) const {
    const int64_t rows = it.rows_per_head(), head_bytes = call.head_dim * sizeof(Elem);
    const int64_t token_bytes = call.num_kv_heads * head_bytes;
    KeyRows keys[kTokenTile / 16];
    for (int64_t i = 0; i < kTokenTile / 16; i++) {
      keys[i] = {static_cast<const char*>(pomona::zeros(token_bytes)), 0};
      if (i * 16 + 16 <= tile.low || i * 16 >= tile.high) continue;
      const int64_t position = tile.begin + i * 16;
      const Elem* block = static_cast<const Elem*>(call.key_cache) +
                          it.table[position / call.block_size] * call.key_block_stride;
      keys[i] = {reinterpret_cast<const char*>(block) + position % call.block_size * token_bytes, token_bytes};
    }
    for (int64_t first = 0; first < it.num_heads; first += Items::heads_at_once(it)) {
      const int64_t num_heads = min64(Items::heads_at_once(it), it.num_heads - first), head = it.first_head + first;
      score_tiles(keys, head * head_bytes, num_heads * head_bytes, s.query + first * num_units * kLanes, s.scores,
                  [&] { blocks.fetch(kLinesPerStep); });
      weigh_lanes(it, tile, num_heads * rows, s.scores, first * rows, softmax, blocks);
      for (int64_t h = 0; h < num_heads; h++)
        add_values(rows, call.head_dim, values, (head + h) * call.head_dim, tile.low, tile.high, s.scores + h * rows,
                   softmax.from((first + h) * rows).values, value_width, [&] { blocks.fetch(kLinesPerPair); });
    }
  }
#endif

  // Attention of rows that are columns to one tile: scores[position][row], weights[unit of positions][row] and sums of
  // values[head_dim][row], of kBlockLanes rows at a time. Keys and transposed values are the rows of the products.
  void attend_columns(const Item& it, const Tile& tile, const Elem* const* keys, const Elem* const* values,
                      const Space& s, const Softmax& softmax, NextBlocks<T>& blocks) const {
    const int64_t rows = it.rows_per_head(), num_lanes = Items::padded(rows);
    const int64_t first = tile.low / kTokensPerStep * kUnits;
    for (int64_t h = 0; h < it.num_heads; h++) {
      cache.copy_keys(keys, tile.high, it.first_head + h, s.keys, blocks);
      const int64_t end = ceil_div(tile.high, kTokensPerStep) * kUnits;
      cache.load_values(values, first, end, it.first_head + h, s.values, blocks);
      cache.lay_out_values(end - first, s.values, s.columns);
      for (int64_t row = 0; row < rows; row += kBlockLanes) {
        const int64_t num_rows = min64(kBlockLanes, rows - row), num_groups = ceil_div(num_rows, kGroup);
        const int64_t newest = it.block.first_position + (row + num_rows - 1) / it.group - tile.begin;
        if (newest < tile.low) continue;
        const int64_t seen = min64(newest + 1, tile.high), at = h * num_lanes + row;
        multiply(ceil_div(seen, kGroup) * kGroup, num_groups, num_units,
                 TileA{reinterpret_cast<const char*>(s.keys), num_units * 4},
                 TileB{s.query + at * num_units, num_units * kGroup, kGroup}, TileC{s.scores, kBlockLanes, false},
                 blocks);
        float* sums = softmax.values + at * value_width;
        for (int64_t lane = 0; lane < num_rows; lane += W) {
          const Seen seen_by_lanes = items.seen_by_lanes(it, tile, row + lane, min64(W, num_rows - lane));
          const Softmax part{softmax.maxima + at + lane, softmax.totals + at + lane, sums + lane, value_width};
          soften_columns<T, kBlockLanes>(seen_by_lanes, s.scores + lane, log2_scale, part,
                                         s.weights + lane / kGroup * kTileUnits * kGroup + lane % kGroup);
        }
        multiply(value_width, num_groups, ceil_div(seen, kTokensPerStep) * kUnits - first,
                 TileA{reinterpret_cast<const char*>(s.columns), kTileUnits * 4},
                 TileB{s.weights + first * kGroup, kTileUnits * kGroup, kGroup}, TileC{sums, kBlockLanes, true},
                 blocks);
      }
    }
  }

  // Attention of an item's rows to the positions [begin, end) of one chunk.
  // `following` is what this thread will do next, or null.
  void attend(const Item& it, int64_t begin, int64_t end, const Space& s, const Softmax& softmax,
              const Item* following) const {
    const int64_t num_rows = Items::padded(it.rows_per_head()) * it.num_heads;
    for (int64_t i = 0; i < num_rows; i++) softmax.maxima[i] = -INFINITY, softmax.totals[i] = 0.0f;
    memset(softmax.values, 0, num_rows * value_width * 4);
    for (int64_t at = begin / kTokenTile * kTokenTile; at < end; at += kTokenTile) {
      const Tile tile{at, max64(begin - at, 0), min64(end - at, kTokenTile)};
      const bool is_last = at + kTokenTile >= end;
      NextBlocks<T> blocks = !is_last ? next_blocks(it, at + kTokenTile, end) : first_blocks(following);
      const Elem *keys[kTokenTile], *values[kTokenTile];
      cache.find_tokens(call.value_cache, call.value_block_stride, it.table, tile, values);
#if defined(__AMX_BF16__)
      if constexpr (kUsesTiles<T>)
        if (items.has_lanes(it)) {
          attend_lanes(it, tile, values, s, softmax, blocks);
          continue;
        }
#endif
      cache.find_tokens(call.key_cache, call.key_block_stride, it.table, tile, keys);
      if (Items::has_columns(it)) {
        attend_columns(it, tile, keys, values, s, softmax, blocks);
        continue;
      }
      attend_rows(it, tile, keys, values, s, softmax, blocks);
    }
  }

  NextBlocks<T> first_blocks(const Item* it) const {
    return it ? next_blocks(*it, items.first_read(*it), items.end_read(*it)) : NextBlocks<T>{};
  }
  // Those of the tile at `begin`; none where each kv head is an item of its own.
  NextBlocks<T> next_blocks(const Item& it, int64_t begin, int64_t end) const {
    return it.num_heads == call.num_kv_heads ? cache.next_blocks(it.table, begin, end) : NextBlocks<T>{};
  }

  // Attention of rows that are the rows of the products to one tile.
  void attend_rows(const Item& it, const Tile& tile, const Elem* const* keys, const Elem* const* values,
                   const Space& s, const Softmax& softmax, NextBlocks<T>& blocks) const {
    for (int64_t h = 0; h < it.num_heads; h++) {
      const int64_t row = h * it.rows_per_head();
      const Softmax part = softmax.from(row);
      cache.load_keys(keys, tile.high, it.first_head + h, s.keys, blocks);
      weigh(it, tile, s.query + row * num_units, s, part, blocks);
      // In whole steps: what is added together does not depend on where reading begins or ends.
      const int64_t first = tile.low / kTokensPerStep * kUnits;
      cache.load_values(values, first, ceil_div(tile.high, kTokensPerStep) * kUnits, it.first_head + h, s.values,
                        blocks);
      for_row_tiles(it, tile, [&](int64_t row, int64_t num_rows, int64_t seen) {
        multiply(num_rows, value_width / kGroup, ceil_div(seen, kTokensPerStep) * kUnits - first,
                 TileA{reinterpret_cast<const char*>(s.weights + row * kTileUnits + first),
                       kTokenTile * int64_t{sizeof(Elem)}},
                 TileB{s.values, kGroup, value_width}, TileC{part.values + row * value_width, value_width, true},
                 blocks);
      });
    }
  }

  INLINE static void multiply(int64_t num_rows, int64_t num_groups, int64_t num_units, TileA a, TileB b, TileC c,
                              NextBlocks<T>& blocks) {
#if defined(__AMX_BF16__)
    if constexpr (kUsesTiles<T>) return tile_product(num_rows, num_groups, {a, b, num_units, num_units * 4}, c);
#endif
    product<T>(num_rows, num_groups, num_units, a, b, c, [&](int64_t steps) { return blocks.take(steps); });
  }

  // f(first row, number of rows, end of the tile's positions that they see) for rows that see any.
  template <class F>
  INLINE void for_row_tiles(const Item& it, const Tile& tile, const F& f) const {
    const int64_t rows = it.rows_per_head();
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t num_rows = min64(kRows, rows - row);
      const int64_t newest = it.block.first_position + (row + num_rows - 1) / it.group - tile.begin;
      if (newest >= tile.low) f(row, num_rows, min64(newest + 1, tile.high));
    }
  }

  // Scores of one kv head's rows in a tile, then their weights.
  void weigh(const Item& it, const Tile& tile, const uint32_t* query, const Space& s, const Softmax& softmax,
             NextBlocks<T>& blocks) const {
    for_row_tiles(it, tile, [&](int64_t row, int64_t num_rows, int64_t seen) {
      multiply(num_rows, ceil_div(seen, kGroup), num_units,
               TileA{reinterpret_cast<const char*>(query + row * num_units), num_units * 4},
               TileB{s.keys, kGroup, kTokenTile}, TileC{s.scores + row * kTokenTile, kTokenTile, false}, blocks);
    });
    for (int64_t row = 0; row < it.rows_per_head(); row++) {
      const Span seen = items.seen_by(it, tile, row);
      soften<T>(s.scores + row * kTokenTile, seen.low, seen.high, log2_scale, softmax, row,
                s.weights + row * kTileUnits);
    }
  }

  static void merge(const Item& it, const Softmax& chunk, const Softmax& into) {
    const int64_t num_rows = Items::padded(it.rows_per_head()) * it.num_heads;
    if (Items::has_columns(it)) return merge_columns<kBlockLanes>(chunk, num_rows, into);
    merge_rows(chunk, num_rows, into);
  }

  // All chunks of one item, one after the other.
  void whole(int64_t index, int64_t next_index, int64_t num_items) const {
    const Item it = items.item(index), after = items.item(next_index < num_items ? next_index : index);
    const Space s = space();
    const int64_t begin = items.first_read(it), end = items.end_read(it);
    items.load_query(it, s.query);
    bool is_first = true;
    for (int64_t chunk = begin / kChunk; chunk * kChunk < end; chunk++, is_first = false) {
      const Item* following = (chunk + 1) * kChunk >= end && next_index < num_items ? &after : nullptr;
      attend(it, max64(begin, chunk * kChunk), min64(end, (chunk + 1) * kChunk), s, is_first ? s.merged : s.chunk,
             following);
      if (!is_first) merge(it, s.chunk, s.merged);
    }
    items.store(it, s.merged);
  }

  // One chunk of one item; whoever finishes an item's last chunk merges them all.
  void part(int64_t index, int64_t chunk, float* parts, int32_t* num_done) const {
    const Item it = items.item(index);
    const int64_t begin = items.first_read(it), end = items.end_read(it);
    const int64_t first = begin / kChunk, last = (end - 1) / kChunk;
    if (chunk < first || chunk > last) return;
    const Space s = space();
    items.load_query(it, s.query);
    attend(it, max64(begin, chunk * kChunk), min64(end, (chunk + 1) * kChunk), s,
           softmax_at(parts + chunk * softmax_floats()), nullptr);
    if (__atomic_add_fetch(num_done, 1, __ATOMIC_ACQ_REL) < last - first + 1) return;
    const Softmax merged = softmax_at(parts + first * softmax_floats());
    for (int64_t i = first + 1; i <= last; i++)
      merge(it, softmax_at(parts + i * softmax_floats()), merged);
    items.store(it, merged);
  }
};

template <class T>
void attention(const pomona::AttentionCall& call, int num_threads) {
  int64_t most_rows = 0, num_rows = 0;
  for (int64_t i = 0; i < call.num_blocks; i++) {
    most_rows = max64(most_rows, call.blocks[i].num_rows);
    num_rows += call.blocks[i].num_rows;
  }
  const int64_t group = call.num_heads / call.num_kv_heads, padding = max64(kGroup, 2 * W);
  const int64_t cycles = num_rows * call.max_context * call.num_kv_heads * (8 + call.head_dim / 16);
  const int threads = threads_for(num_threads, cycles);
  // Few rows: all kv heads together, if that leaves enough items. Otherwise each head is an item of its own.
  const int64_t num_chunks = ceil_div(call.max_context, kChunk);
  const bool is_enough = threads == 1 || call.num_blocks * num_chunks >= 2 * threads;
  const int64_t heads_per_item = most_rows * call.num_heads <= kRowsTogether && is_enough ? call.num_kv_heads : 1;
  const int64_t units = ceil_div(call.head_dim, T::kPerUnit), width = ceil_div(call.head_dim, padding) * padding;
  const Attention<T> work{call,
                          {call, group, units, width, heads_per_item},
                          {call, units, width},
                          units,
                          width,
                          AttentionItems<T>::padded(most_rows * group) * heads_per_item,
                          call.scale * kLog2E};
  const int64_t num_items = call.num_blocks * ceil_div(call.num_kv_heads, heads_per_item);
  if (threads == 1 || num_chunks == 1 || num_items >= 4 * threads) {
    for_items(num_items, threads, [&](int64_t item) { work.whole(item, item + threads, num_items); });
    return;
  }
  const int64_t part_floats = num_chunks * work.softmax_floats();
  float* parts = static_cast<float*>(pomona::scratch(pomona::kParts, num_items * (part_floats * 4 + 4)));
  int32_t* num_done = reinterpret_cast<int32_t*>(parts + num_items * part_floats);
  memset(num_done, 0, num_items * 4);
  for_items(num_items * num_chunks, threads, [&](int64_t item) {
    const int64_t index = item / num_chunks;
    work.part(index, item % num_chunks, parts + index * part_floats, num_done + index);
  });
}

}  // namespace
