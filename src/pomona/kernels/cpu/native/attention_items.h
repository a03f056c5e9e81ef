// Who attends to what: the items of attention, their queries as factors of a product, the positions that they see, and
// where their results go. Included by isa.cpp.
#pragma once
#include "attention_cache.h"
#include "attention_tiles.h"
#include "softmax_rows.h"

namespace {

// Some of one sequence's rows, and some kv heads with all the query heads that read them.
struct Item {
  pomona::QueryBlock block;
  int64_t first_head, num_heads;  // kv heads
  const int32_t* table;
  int64_t group;  // query heads per kv head

  int64_t rows_per_head() const { return block.num_rows * group; }
};

// The positions of a tile that a row of a kv head sees.
struct Span {
  int64_t low, high;
};

template <class T>
struct AttentionItems {
  using Elem = typename T::Elem;
  static constexpr int64_t kTokensPerStep = ProductSize<T>::kUnits * T::kPerUnit;
  static constexpr int64_t kBlockGroups = kUsesTiles<T> ? 2 : kTileGroups, kBlockLanes = kBlockGroups * kGroup;
  const pomona::AttentionCall& call;
  int64_t group, num_units, value_width;  // query heads per kv head; units of head_dim; head_dim padded
  int64_t heads_per_item;                 // kv heads

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

  Item item(int64_t index) const {
    const int64_t parts = ceil_div(call.num_kv_heads, heads_per_item);
    const pomona::QueryBlock& block = call.blocks[index / parts];
    const int64_t first = index % parts * heads_per_item;
    return {block, first, min64(heads_per_item, call.num_kv_heads - first),
            call.block_tables + block.sequence * call.max_blocks, group};
  }

  int64_t first_read(const Item& it) const {
    return call.window ? max64(0, it.block.first_position - call.window + 1) : 0;
  }
  int64_t end_read(const Item& it) const { return it.block.first_position + it.block.num_rows; }

  Span seen_by(const Item& it, const Tile& tile, int64_t row) const {
    return seen_by_token(it, tile, row / group);
  }
  Span seen_by_token(const Item& it, const Tile& tile, int64_t token) const {
    const int64_t newest = it.block.first_position + token - tile.begin;
    return {call.window ? max64(tile.low, newest - call.window + 1) : tile.low, min64(newest + 1, tile.high)};
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
};

}  // namespace
