// What attention reads of the KV cache: a tile of positions, whose keys and values are found in their blocks and laid
// out as factors of a product, while the next tile's blocks are fetched. Included by isa.cpp.
#pragma once
#include "amx.h"
#include "softmax_lanes.h"
#include "transpose.h"
#include "work.h"

namespace {

// Positions of one tile: those in [low, high) are read, each at its own place.
struct Tile {
  int64_t begin, low, high;
};

// The blocks that the next tile lies in, keys and values in turn: handed out to the products that run meanwhile, or,
// where products are too short, fetched with each step of all that is done, from several blocks in turn.
template <class T>
struct NextBlocks {
  using Elem = typename T::Elem;
  const pomona::AttentionCall* call = nullptr;
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
    const void* cache = is_value ? call->value_cache : call->key_cache;
    const int64_t stride = is_value ? call->value_block_stride : call->key_block_stride;
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

template <class T>
struct CacheReader {
  using Elem = typename T::Elem;
  static constexpr int64_t kTokensPerStep = ProductSize<T>::kUnits * T::kPerUnit;
  static constexpr int64_t kTileUnits = kTokenTile / T::kPerUnit;
  const pomona::AttentionCall& call;
  int64_t num_units, value_width;  // of head_dim; and it padded

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

  // Those of the tile at `begin`, of a context that ends at `end`.
  NextBlocks<T> next_blocks(const int32_t* table, int64_t begin, int64_t end) const {
    const int64_t bytes = call.block_size * call.num_kv_heads * call.head_dim * sizeof(Elem);
    const int64_t last = min64(end, begin / kTokenTile * kTokenTile + kTokenTile) - 1;
    return {&call, table, begin / call.block_size, last / call.block_size, ceil_div(bytes, 64), false, {}};
  }

  // keys[unit][token of the tile] of one kv head; unspecified from the first group past the tile's end on.
  void load_keys(const Elem* const* tokens, int64_t num_tokens, int64_t kv_head, uint32_t* keys,
                 NextBlocks<T>& blocks) const {
    for (int64_t t = 0; t < num_tokens; t += kGroup, keys += kGroup) {
      const char* rows[kGroup];
      for (int64_t i = 0; i < kGroup; i++)
        rows[i] = reinterpret_cast<const char*>(tokens[t + i] + kv_head * call.head_dim);
      lay_out_units(rows, call.head_dim * sizeof(Elem), keys, kTokenTile, [&] { blocks.fetch(kGroup); });
    }
  }

  // values[unit of tokens][head_dim, in the order of load_two] of one kv head, from the first unit on.
  void load_values(const Elem* const* tokens, int64_t first_unit, int64_t end_unit, int64_t kv_head, uint32_t* values,
                   NextBlocks<T>& blocks) const {
    for (int64_t unit = first_unit; unit < end_unit; unit++, values += value_width) {
      blocks.fetch(4);
      const Elem* row = tokens[unit * T::kPerUnit] + kv_head * call.head_dim;
      const Elem* other = tokens[unit * T::kPerUnit + T::kPerUnit - 1] + kv_head * call.head_dim;
      for (int64_t i = 0; i < value_width; i += 2 * W)
        pair_some<T>(row + i, other + i, max64(0, min64(2 * W, call.head_dim - i)), values + i);
    }
  }

  // keys[token of the tile][unit] of one kv head.
  void copy_keys(const Elem* const* tokens, int64_t num_tokens, int64_t kv_head, uint32_t* keys,
                 NextBlocks<T>& blocks) const {
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
};

}  // namespace
