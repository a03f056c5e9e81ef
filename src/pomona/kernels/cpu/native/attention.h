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
#include "amx.h"
#include "attention_tiles.h"
#include "transpose.h"
#include "work.h"

namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kRowsTogether = 128;  // rows times query heads up to which an item takes all kv heads
// Lines of the next tile that few rows fetch at each step of a product with keys, each sixteenth of the scores and each
// pair of values: about as many as there are, about as often as they arrive.
constexpr int64_t kLinesPerStep = 24, kLinesPerRow = 16, kLinesPerPair = 4;
static_assert(kChunk % kTokenTile == 0 && kTokenTile % kGroup == 0 && kTokenTile % (2 * kStepUnits) == 0);

// Running softmax of some rows: maxima, sums of exponentials, weighted sums of values (in the order of load_two).
struct Softmax {
  float *maxima, *totals, *values;
};

// Positions of one tile: those in [low, high) are read, each at its own place.
struct Tile {
  int64_t begin, low, high;
};

template <class T>
struct Attention {
  using Elem = typename T::Elem;
  static constexpr int kRows = ProductSize<T>::kRows;
  static constexpr int64_t kTokensPerStep = ProductSize<T>::kUnits * T::kPerUnit;
  static constexpr int64_t kBlockGroups = kUsesTiles<T> ? 2 : kTileGroups, kBlockLanes = kBlockGroups * kGroup;
  static constexpr int64_t kTileUnits = kTokenTile / T::kPerUnit;
  const pomona::AttentionCall& call;
  int64_t group, num_units, value_width;  // query heads per kv head; units of head_dim; head_dim padded
  int64_t heads_per_item, max_rows;       // kv heads; rows times heads, at most

  struct Item {
    pomona::QueryBlock block;
    int64_t first_head, num_heads;  // kv heads
    const int32_t* table;
    int64_t rows_per_head() const { return block.num_rows * group; }
    int64_t group;
  };

  // Scratch of one thread, carved from one allocation.
  struct Space {
    uint32_t *query, *keys, *values, *columns, *weights;
    float* scores;
    Softmax chunk, merged;
  };

  // More rows of a head than kLanes are the columns of its products, in blocks of kBlockLanes.
  static bool has_columns(int64_t rows_per_head) { return rows_per_head > kLanes; }
  static bool has_columns(const Item& it) { return has_columns(it.rows_per_head()); }
  // How many rows of scratch a head has.
  static int64_t padded(int64_t rows_per_head) {
    return has_columns(rows_per_head) ? ceil_div(rows_per_head, kBlockLanes) * kBlockLanes : rows_per_head;
  }

  // Few enough rows for attention_tiles.h, and heads and blocks of which tiles can be loaded.
  bool has_lanes(const Item& it) const {
    return kUsesTiles<T> && it.rows_per_head() <= kLanes && call.head_dim % kTokensPerStep == 0 &&
           call.block_size % kLanes == 0;
  }
  static int64_t heads_at_once(const Item& it) { return kLanes / it.rows_per_head(); }

  int64_t softmax_floats() const { return max_rows * (2 + value_width); }

  Softmax softmax_at(float* at) const { return {at, at + max_rows, at + 2 * max_rows}; }

  Space space() const {
    const int64_t most_lanes = max64(max_rows, kUsesTiles<T> ? heads_per_item * kLanes : 0);
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

  Item item(int64_t index) const {
    const int64_t parts = ceil_div(call.num_kv_heads, heads_per_item);
    const pomona::QueryBlock& block = call.blocks[index / parts];
    const int64_t first = index % parts * heads_per_item;
    return {block, first, min64(heads_per_item, call.num_kv_heads - first),
            call.block_tables + block.sequence * call.max_blocks, group};
  }

  const Elem* query_of(const Item& it, int64_t head, int64_t row) const {
    return static_cast<const Elem*>(call.query) + (it.block.row + row / group) * call.query_row_stride +
           ((it.first_head + head) * group + row % group) * call.query_head_stride;
  }

  // [head][row][unit]; or as columns, [head][16 rows][unit][row]; or where tiles take few rows, [head][unit][lane].
  void load_query(const Item& it, uint32_t* out) const {
    if (has_columns(it)) return load_query_columns(it, out);
    if (has_lanes(it)) return load_lanes(it, out);
    for (int64_t h = 0; h < it.num_heads; h++)
      for (int64_t row = 0; row < it.rows_per_head(); row++, out += num_units) {
        out[num_units - 1] = 0;
        memcpy(out, query_of(it, h, row), call.head_dim * sizeof(Elem));
      }
  }

  void load_lanes(const Item& it, uint32_t* out) const {
    memset(out, 0, it.num_heads * num_units * kLanes * 4);
    for (int64_t h = 0; h < it.num_heads; h++, out += num_units * kLanes)
      for (int64_t row = 0; row < it.rows_per_head(); row++) {
        const int64_t lane = h % heads_at_once(it) * it.rows_per_head() + row;
        const Elem* query = query_of(it, h, row);
        for (int64_t unit = 0; unit < num_units; unit++)
          memcpy(out + unit * kLanes + lane, query + unit * T::kPerUnit, 4);
      }
  }

  void load_query_columns(const Item& it, uint32_t* out) const {
    const char* zeros = static_cast<const char*>(pomona::zeros(num_units * 4));
    for (int64_t h = 0; h < it.num_heads; h++)
      for (int64_t first = 0; first < padded(it.rows_per_head()); first += kGroup, out += num_units * kGroup) {
        const char* rows[kGroup];
        for (int64_t i = 0; i < kGroup; i++) {
          const bool is_row = first + i < it.rows_per_head();
          rows[i] = is_row ? reinterpret_cast<const char*>(query_of(it, h, first + i)) : zeros;
        }
        lay_out_units(rows, call.head_dim * sizeof(Elem), out, kGroup, [] {});
      }
  }

  // Where the tile's keys (or values) of the first kv head are; positions outside [low, high) get zeros: a freed block
  // may hold anything.
  void find_tokens(const void* cache, int64_t block_stride, const int32_t* table, const Tile& tile,
                   const Elem** rows) const {
    const Elem* zeros = static_cast<const Elem*>(pomona::zeros(call.num_kv_heads * call.head_dim * sizeof(Elem)));
    constexpr int64_t kWhole = kTokensPerStep > kGroup ? kTokensPerStep : kGroup;
    const int64_t end = ceil_div(tile.high, kWhole) * kWhole;
    const int64_t token = call.num_kv_heads * call.head_dim;
    for (int64_t t = 0; t < tile.low; t++) rows[t] = zeros;
    for (int64_t t = tile.high; t < end; t++) rows[t] = zeros;
    int64_t block = (tile.begin + tile.low) / call.block_size, offset = (tile.begin + tile.low) % call.block_size;
    for (int64_t t = tile.low; t < tile.high; block++, offset = 0) {
      const Elem* at = static_cast<const Elem*>(cache) + table[block] * block_stride + offset * token;
      const int64_t stop = min64(tile.high, t + call.block_size - offset);
      for (; t < stop; t++, at += token) rows[t] = at;
    }
  }

  // The blocks that the next tile lies in, keys and values in turn: handed out to the products that run meanwhile, or,
  // where products are too short, fetched with each step of all that is done, from several blocks in turn.
  struct NextBlocks {
    const Attention* work = nullptr;
    const int32_t* table = nullptr;
    int64_t block = 0, last = -1;  // positions in the table
    int64_t num_lines = 0;
    bool is_value = false;
    static constexpr int kPlaces = 4;  // blocks of 16 positions in a tile
    AheadInTurn<kPlaces> ahead;

    INLINE void fetch(int64_t lines) {
      if (!kUsesTiles<T>) return;
      ahead.fetch(lines);
      if (!ahead.is_any() && block <= last) turn();
    }
    void turn() {
      for (int i = 0; i < kPlaces; i++) ahead.places[i] = at(min64(block + i, last));
      ahead.at = 0, ahead.end = num_lines * 64;
      if (is_value) block += kPlaces;
      is_value = !is_value;
    }
    const char* at(int64_t index) const {
      const auto& call = work->call;
      const void* cache = is_value ? call.value_cache : call.key_cache;
      const int64_t stride = is_value ? call.value_block_stride : call.key_block_stride;
      return reinterpret_cast<const char*>(static_cast<const Elem*>(cache) + table[index] * stride);
    }

    Ahead take(int64_t num_steps) {
      if (block > last) return {};
      const char* lines = at(block);
      if (is_value) block++;
      is_value = !is_value;
      return {lines, lines + num_lines * 64, ceil_div(num_lines, num_steps) * 64};
    }
  };

  // Those of the tile at `begin`; none where each kv head is an item of its own.
  NextBlocks next_blocks(const Item& it, int64_t begin, int64_t end) const {
    const int64_t bytes = call.block_size * call.num_kv_heads * call.head_dim * sizeof(Elem);
    const int64_t last = min64(end, begin / kTokenTile * kTokenTile + kTokenTile) - 1;
    return {this, it.table, begin / call.block_size, it.num_heads == call.num_kv_heads ? last / call.block_size : -1,
            ceil_div(bytes, 64), false, {}};
  }

  // keys[unit][token of the tile] of one kv head; unspecified from the first group past the tile's end on.
  void load_keys(const Elem* const* tokens, int64_t num_tokens, int64_t kv_head, uint32_t* keys,
                 NextBlocks& blocks) const {
    for (int64_t t = 0; t < num_tokens; t += kGroup, keys += kGroup) {
      const char* rows[kGroup];
      for (int64_t i = 0; i < kGroup; i++)
        rows[i] = reinterpret_cast<const char*>(tokens[t + i] + kv_head * call.head_dim);
      lay_out_units(rows, call.head_dim * sizeof(Elem), keys, kTokenTile, [&] { blocks.fetch(kGroup); });
    }
  }

  // values[unit of tokens][head_dim, in the order of load_two] of one kv head, from the first unit on.
  void load_values(const Elem* const* tokens, int64_t first_unit, int64_t end_unit, int64_t kv_head, uint32_t* values,
                   NextBlocks& blocks) const {
    for (int64_t unit = first_unit; unit < end_unit; unit++, values += value_width) {
      blocks.fetch(4);
      const Elem* row = tokens[unit * T::kPerUnit] + kv_head * call.head_dim;
      const Elem* other = tokens[unit * T::kPerUnit + T::kPerUnit - 1] + kv_head * call.head_dim;
      for (int64_t i = 0; i < value_width; i += 2 * W)
        pair_some<T>(row + i, other + i, max64(0, min64(2 * W, call.head_dim - i)), values + i);
    }
  }

  // One row of scores becomes weights; the tile's positions outside [low, high) are masked.
  void soften(float* scores, int64_t low, int64_t high, int64_t row, const Softmax& softmax, uint32_t* weights) const {
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
    const vf scale = splat(call.scale * kLog2E);  // powers of two are cheaper than powers of e
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
        scale_row(softmax.values + row * value_width, decay);
      }
    }
    softmax.totals[row] += fold_sum(total);
  }

  static float scalar_exp2(float x) { return exp2_lanes(splat(x))[0]; }

  void scale_row(float* row, float factor) const {
    for (int64_t i = 0; i < value_width; i += W) store_floats(row + i, load_floats(row + i) * splat(factor));
  }

#if defined(__AMX_BF16__)
  // Scores of rows side by side, of whole heads, become weights. The softmax of the first is the first_row-th.
  void weigh_lanes(const Item& it, const Tile& tile, int64_t num_rows, float* scores, int64_t first_row,
                   const Softmax& softmax, NextBlocks& blocks) const {
    const Seen seen = seen_by_lanes(it, tile, 0, num_rows);
    for (int64_t t = tile.low / 2 * 2; t < ceil_div(tile.high, 2) * 2; t++)
      if (t < seen.first || t >= seen.last) memset(scores + t * kLanes, 0, kLanes * 4);
    if (seen.first >= seen.last) return;
    const int n = static_cast<int>(num_rows);
    float *maxima = softmax.maxima + first_row, *totals = softmax.totals + first_row;
    vf most = load_one<Float32>(maxima, n), total = load_one<Float32>(totals, n);
    alignas(64) float decays[kLanes];
    const vf decay = soften_lanes(
        scores, kLanes, seen, splat(call.scale * kLog2E), most, total, [&] { blocks.fetch(2 * kLinesPerRow); },
        [&](int64_t t, const vf* two) {
          store_floats(scores + t * kLanes, T::round(two[0]));
          store_floats(scores + (t + 1) * kLanes, T::round(two[1]));
        });
    store_floats(decays, decay);
    store_one<Float32>(maxima, most, n);
    store_one<Float32>(totals, total, n);
    for (int64_t row = 0; row < num_rows; row++)
      if (decays[row] != 1.0f) scale_row(softmax.values + (first_row + row) * value_width, decays[row]);
  }

  void attend_lanes(const Item& it, const Tile& tile, const Elem* const* values, const Space& s, const Softmax& softmax,
                    NextBlocks& blocks) const {
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
    for (int64_t first = 0; first < it.num_heads; first += heads_at_once(it)) {
      const int64_t num_heads = min64(heads_at_once(it), it.num_heads - first), head = it.first_head + first;
      score_tiles(keys, head * head_bytes, num_heads * head_bytes, s.query + first * num_units * kLanes, s.scores,
                  [&] { blocks.fetch(kLinesPerStep); });
      weigh_lanes(it, tile, num_heads * rows, s.scores, first * rows, softmax, blocks);
      for (int64_t h = 0; h < num_heads; h++)
        add_values(rows, call.head_dim, values, (head + h) * call.head_dim, tile.low, tile.high, s.scores + h * rows,
                   softmax.values + (first + h) * rows * value_width, value_width,
                   [&] { blocks.fetch(kLinesPerPair); });
    }
  }
#endif

  // Attention of rows that are columns to one tile: scores[position][row], weights[unit of positions][row] and sums of
  // values[head_dim][row], of kBlockLanes rows at a time. Keys and transposed values are the rows of the products.
  void attend_columns(const Item& it, const Tile& tile, const Elem* const* keys, const Elem* const* values,
                      const Space& s, const Softmax& softmax, NextBlocks& blocks) const {
    constexpr int64_t kUnits = ProductSize<T>::kUnits;
    const int64_t rows = it.rows_per_head(), num_lanes = padded(rows), first = tile.low / kTokensPerStep * kUnits;
    for (int64_t h = 0; h < it.num_heads; h++) {
      copy_keys(keys, tile.high, it.first_head + h, s.keys, blocks);
      const int64_t end = ceil_div(tile.high, kTokensPerStep) * kUnits;
      load_values(values, first, end, it.first_head + h, s.values, blocks);
      lay_out_values(end - first, s.values, s.columns);
      for (int64_t row = 0; row < rows; row += kBlockLanes) {
        const int64_t num_rows = min64(kBlockLanes, rows - row), num_groups = ceil_div(num_rows, kGroup);
        const int64_t newest = it.block.first_position + (row + num_rows - 1) / group - tile.begin;
        if (newest < tile.low) continue;
        const int64_t seen = min64(newest + 1, tile.high), at = h * num_lanes + row;
        multiply(ceil_div(seen, kGroup) * kGroup, num_groups, num_units,
                 TileA{reinterpret_cast<const char*>(s.keys), num_units * 4},
                 TileB{s.query + at * num_units, num_units * kGroup, kGroup}, TileC{s.scores, kBlockLanes, false},
                 blocks);
        float* sums = softmax.values + at * value_width;
        for (int64_t lane = 0; lane < num_rows; lane += W) {
          const Seen of_lanes = seen_by_lanes(it, tile, row + lane, min64(W, num_rows - lane));
          weigh_columns(of_lanes, s.scores + lane, softmax.maxima + at + lane, softmax.totals + at + lane,
                        s.weights + lane / kGroup * kTileUnits * kGroup + lane % kGroup, sums + lane);
        }
        multiply(value_width, num_groups, ceil_div(seen, kTokensPerStep) * kUnits - first,
                 TileA{reinterpret_cast<const char*>(s.columns), kTileUnits * 4},
                 TileB{s.weights + first * kGroup, kTileUnits * kGroup, kGroup}, TileC{sums, kBlockLanes, true},
                 blocks);
      }
    }
  }

  // Scores of W rows become weights, units of which stand kGroup apart, and the sums of values so far are scaled.
  void weigh_columns(const Seen& seen, const float* scores, float* maxima, float* totals, uint32_t* weights,
                     float* sums) const {
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
    vf most = load_floats(maxima), total = load_floats(totals);
    const vf decay =
        soften_lanes(scores, kBlockLanes, seen, splat(call.scale * kLog2E), most, total, [] {}, store);
    store_floats(maxima, most);
    store_floats(totals, total);
    if (fold_max((vi)(decay != splat(1.0f)) & 1) == 0) return;
    for (int64_t i = 0; i < value_width; i++) {
      float* sum = sums + i * kBlockLanes;
      store_floats(sum, load_floats(sum) * decay);
    }
  }

  // What up to W rows of a kv head see of a tile, from a row on, and then those of other heads. Other lanes see
  // nothing.
  Seen seen_by_lanes(const Item& it, const Tile& tile, int64_t row, int64_t num_rows) const {
    const bool is_one_head = row + num_rows <= it.rows_per_head();
    const Span of_oldest = seen_by(it, tile, is_one_head ? row : 0);
    const Span of_newest = seen_by(it, tile, is_one_head ? row + num_rows - 1 : it.rows_per_head() - 1);
    Seen seen{of_oldest.low, of_newest.high, false, {}, {}};
    if (of_oldest.low == of_newest.low && of_oldest.high == of_newest.high) return seen;
    seen.is_partial = true;
    for (int64_t i = 0, token = row / group, head = row % group; i < num_rows; i++) {
      const Span span = seen_by_token(it, tile, token);
      seen.low[i] = static_cast<int32_t>(span.low), seen.high[i] = static_cast<int32_t>(span.high);
      if (++head == group) head = 0, token++;
      if (token == it.block.num_rows) token = 0;
    }
    return seen;
  }

  // keys[token of the tile][unit] of one kv head.
  void copy_keys(const Elem* const* tokens, int64_t num_tokens, int64_t kv_head, uint32_t* keys,
                 NextBlocks& blocks) const {
    for (int64_t t = 0; t < ceil_div(num_tokens, kGroup) * kGroup; t++, keys += num_units) {
      if (t % kGroup == 0) blocks.fetch(num_units);  // lines, as many as are copied
      keys[num_units - 1] = 0;
      memcpy(keys, tokens[t] + kv_head * call.head_dim, call.head_dim * sizeof(Elem));
    }
  }

  // values[unit of tokens][head_dim] as columns[head_dim][unit of tokens].
  void lay_out_values(int64_t units, const uint32_t* values, uint32_t* columns) const {
    for (int64_t unit = 0; unit < units; unit += kGroup)
      for (int64_t i = 0; i < value_width; i += kGroup) {
        const char* rows[kGroup];
        for (int64_t k = 0; k < kGroup; k++)
          rows[k] = reinterpret_cast<const char*>(values + (unit + k) * value_width + i);
        transpose_units(rows, 0, columns + i * kTileUnits + unit, kTileUnits);
      }
  }

  // Attention of an item's rows to the positions [begin, end) of one chunk.
  // `following` is what this thread will do next, or null.
  void attend(const Item& it, int64_t begin, int64_t end, const Space& s, const Softmax& softmax,
              const Item* following) const {
    const int64_t rows = it.rows_per_head(), num_rows = padded(rows) * it.num_heads;
    for (int64_t i = 0; i < num_rows; i++) softmax.maxima[i] = -INFINITY, softmax.totals[i] = 0.0f;
    memset(softmax.values, 0, num_rows * value_width * 4);
    for (int64_t at = begin / kTokenTile * kTokenTile; at < end; at += kTokenTile) {
      const Tile tile{at, max64(begin - at, 0), min64(end - at, kTokenTile)};
      const bool is_last = at + kTokenTile >= end;
      NextBlocks blocks = is_last ? following ? next_blocks(*following, first_read(*following), end_read(*following))
                                              : NextBlocks{}
                                  : next_blocks(it, at + kTokenTile, end);
      const Elem *keys[kTokenTile], *values[kTokenTile];
      find_tokens(call.value_cache, call.value_block_stride, it.table, tile, values);
#if defined(__AMX_BF16__)
      if constexpr (kUsesTiles<T>)
        if (has_lanes(it)) {
          attend_lanes(it, tile, values, s, softmax, blocks);
          continue;
        }
#endif
      find_tokens(call.key_cache, call.key_block_stride, it.table, tile, keys);
      if (has_columns(it)) {
        attend_columns(it, tile, keys, values, s, softmax, blocks);
        continue;
      }
      for (int64_t h = 0; h < it.num_heads; h++) {
        const int64_t row = h * rows;
        const Softmax part{softmax.maxima + row, softmax.totals + row, softmax.values + row * value_width};
        load_keys(keys, tile.high, it.first_head + h, s.keys, blocks);
        weigh(it, tile, s.query + row * num_units, s, part, blocks);
        // In whole steps: what is added together does not depend on where reading begins or ends.
        constexpr int64_t kUnits = ProductSize<T>::kUnits;
        const int64_t first = tile.low / kTokensPerStep * kUnits;
        load_values(values, first, ceil_div(tile.high, kTokensPerStep) * kUnits, it.first_head + h, s.values, blocks);
        for_row_tiles(it, tile, [&](int64_t row, int64_t num_rows, int64_t seen) {
          multiply(num_rows, value_width / kGroup, ceil_div(seen, kTokensPerStep) * kUnits - first,
                   TileA{reinterpret_cast<const char*>(s.weights + row * (kTokenTile / T::kPerUnit) + first),
                         kTokenTile * int64_t{sizeof(Elem)}},
                   TileB{s.values, kGroup, value_width}, TileC{part.values + row * value_width, value_width, true},
                   blocks);
        });
      }
    }
  }

  INLINE static void multiply(int64_t num_rows, int64_t num_groups, int64_t num_units, TileA a, TileB b, TileC c,
                              NextBlocks& blocks) {
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
      const int64_t newest = it.block.first_position + (row + num_rows - 1) / group - tile.begin;
      if (newest >= tile.low) f(row, num_rows, min64(newest + 1, tile.high));
    }
  }

  // The positions of a tile that a row of a kv head sees.
  struct Span {
    int64_t low, high;
  };
  Span seen_by(const Item& it, const Tile& tile, int64_t row) const {
    return seen_by_token(it, tile, row / group);
  }
  Span seen_by_token(const Item& it, const Tile& tile, int64_t token) const {
    const int64_t newest = it.block.first_position + token - tile.begin;
    return {call.window ? max64(tile.low, newest - call.window + 1) : tile.low, min64(newest + 1, tile.high)};
  }

  // Scores of one kv head's rows in a tile, then their weights.
  void weigh(const Item& it, const Tile& tile, const uint32_t* query, const Space& s, const Softmax& softmax,
             NextBlocks& blocks) const {
    for_row_tiles(it, tile, [&](int64_t row, int64_t num_rows, int64_t seen) {
      multiply(num_rows, ceil_div(seen, kGroup), num_units,
               TileA{reinterpret_cast<const char*>(query + row * num_units), num_units * 4},
               TileB{s.keys, kGroup, kTokenTile}, TileC{s.scores + row * kTokenTile, kTokenTile, false}, blocks);
    });
    for (int64_t row = 0; row < it.rows_per_head(); row++) {
      const Span seen = seen_by(it, tile, row);
      soften(s.scores + row * kTokenTile, seen.low, seen.high, row, softmax,
             s.weights + row * (kTokenTile / T::kPerUnit));
    }
  }

  void merge(const Item& it, const Softmax& chunk, const Softmax& into) const {
    const int64_t num_rows = padded(it.rows_per_head()) * it.num_heads;
    if (has_columns(it)) return merge_columns(chunk, num_rows, into);
    for (int64_t row = 0; row < num_rows; row++) {
      const float added = chunk.maxima[row], before = into.maxima[row];
      if (added == -INFINITY && chunk.totals[row] == 0.0f) continue;
      const float now = added > before ? added : before;
      const float keep = before == -INFINITY ? 0.0f : scalar_exp2(before - now), take = scalar_exp2(added - now);
      into.maxima[row] = now;
      into.totals[row] = into.totals[row] * keep + chunk.totals[row] * take;
      for (int64_t i = row * value_width; i < (row + 1) * value_width; i += W)
        store_floats(into.values + i, fma(load_floats(into.values + i), splat(keep),
                                          load_floats(chunk.values + i) * splat(take)));
    }
  }

  void merge_columns(const Softmax& chunk, int64_t num_rows, const Softmax& into) const {
    for (int64_t row = 0; row < num_rows; row += W) {
      const vf nothing = splat(-INFINITY), added = load_floats(chunk.maxima + row);
      const vf before = load_floats(into.maxima + row), more = load_floats(chunk.totals + row);
      const vi is_empty = (added == nothing) & (more == vf{});
      const vf now = is_empty ? before : added > before ? added : before;
      const vf keep = is_empty ? splat(1.0f) : before == nothing ? vf{} : exp2_lanes(before - now);
      const vf take = is_empty ? vf{} : exp2_lanes(added - now);
      store_floats(into.maxima + row, now);
      store_floats(into.totals + row, load_floats(into.totals + row) * keep + more * take);
      const int64_t first = row / kBlockLanes * kBlockLanes * value_width + row % kBlockLanes;
      for (int64_t i = first; i < first + value_width * kBlockLanes; i += kBlockLanes)
        store_floats(into.values + i, fma(load_floats(into.values + i), keep, load_floats(chunk.values + i) * take));
    }
  }

  void store(const Item& it, const Softmax& softmax) const {
    if (has_columns(it)) return store_columns(it, softmax);
    for (int64_t h = 0, row = 0; h < it.num_heads; h++)
      for (int64_t r = 0; r < it.block.num_rows; r++)
        for (int64_t g = 0; g < group; g++, row++) {
          store_row(it, h, r * group + g, softmax.values + row * value_width, softmax.totals[row]);
        }
  }

  void store_columns(const Item& it, const Softmax& softmax) const {
    const int64_t rows = it.rows_per_head();
    float* values = static_cast<float*>(pomona::scratch(pomona::kSums, kGroup * value_width * 4));
    for (int64_t h = 0; h < it.num_heads; h++)
      for (int64_t row = 0; row < rows; row += kGroup) {
        const int64_t at = h * padded(rows) + row, lane = at % kBlockLanes;
        const float* sums = softmax.values + (at - lane) * value_width + lane;
        for (int64_t i = 0; i < value_width; i += kGroup) {
          const char* of_dims[kGroup];
          for (int64_t k = 0; k < kGroup; k++)
            of_dims[k] = reinterpret_cast<const char*>(sums + (i + k) * kBlockLanes);
          transpose_units(of_dims, 0, reinterpret_cast<uint32_t*>(values) + i, value_width);
        }
        for (int64_t k = 0; k < min64(kGroup, rows - row); k++)
          store_row(it, h, row + k, values + k * value_width, softmax.totals[at + k]);
      }
  }

  void store_row(const Item& it, int64_t head, int64_t row, const float* values, float total) const {
    Elem* out = static_cast<Elem*>(call.out) +
                ((it.block.row + row / group) * call.num_heads + (it.first_head + head) * group + row % group) *
                    call.head_dim;
    const vf factor = splat(1.0f / total);
    for (int64_t i = 0; i < call.head_dim; i += 2 * W) {
      const vf two[2] = {load_floats(values + i) * factor, load_floats(values + i + W) * factor};
      if (i + 2 * W <= call.head_dim)
        T::store_two(out + i, two);
      else
        store_two_part<T>(out + i, two, call.head_dim - i);
    }
  }

  int64_t first_read(const Item& it) const {
    return call.window ? max64(0, it.block.first_position - call.window + 1) : 0;
  }
  int64_t end_read(const Item& it) const { return it.block.first_position + it.block.num_rows; }

  // All chunks of one item, one after the other.
  void whole(int64_t index, int64_t next_index, int64_t num_items) const {
    const Item it = item(index), after = item(next_index < num_items ? next_index : index);
    const Space s = space();
    const int64_t begin = first_read(it), end = end_read(it);
    load_query(it, s.query);
    bool is_first = true;
    for (int64_t chunk = begin / kChunk; chunk * kChunk < end; chunk++, is_first = false) {
      const Item* following = (chunk + 1) * kChunk >= end && next_index < num_items ? &after : nullptr;
      attend(it, max64(begin, chunk * kChunk), min64(end, (chunk + 1) * kChunk), s, is_first ? s.merged : s.chunk,
             following);
      if (!is_first) merge(it, s.chunk, s.merged);
    }
    store(it, s.merged);
  }

  // One chunk of one item; whoever finishes an item's last chunk merges them all.
  void part(int64_t index, int64_t chunk, float* parts, int32_t* num_done) const {
    const Item it = item(index);
    const int64_t begin = first_read(it), end = end_read(it), first = begin / kChunk, last = (end - 1) / kChunk;
    if (chunk < first || chunk > last) return;
    const Space s = space();
    load_query(it, s.query);
    attend(it, max64(begin, chunk * kChunk), min64(end, (chunk + 1) * kChunk), s,
           softmax_at(parts + chunk * softmax_floats()), nullptr);
    if (__atomic_add_fetch(num_done, 1, __ATOMIC_ACQ_REL) < last - first + 1) return;
    const Softmax merged = softmax_at(parts + first * softmax_floats());
    for (int64_t i = first + 1; i <= last; i++)
      merge(it, softmax_at(parts + i * softmax_floats()), merged);
    store(it, merged);
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
  const Attention<T> work{call, group, ceil_div(call.head_dim, T::kPerUnit),
                          ceil_div(call.head_dim, padding) * padding, heads_per_item,
                          Attention<T>::padded(most_rows * group) * heads_per_item};
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
