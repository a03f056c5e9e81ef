// Dense layers by tile registers (AMX), and who makes a dense layer. Included by isa.cpp.
//
// Weights are packed as in gemm.h. An item is a run of rows by as many groups of columns as stay in a core's L2 cache:
// of 32 rows, which stay in its L1 cache, all columns are summed before the next rows come. The adapters' part of a row
// is summed with the product's, as if there were so many inputs more: nothing is rounded in between. Rows of short runs
// are left as sums, to which theirs is added right after (lora_short.h), in the same order.
#pragma once
#include "gemm.h"

namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kItemBytes = 512 << 10;       // of weights
constexpr int64_t kItemRowsBytes = 1280 << 10;  // of a run of rows: both stay in L2
constexpr int kMostItemGroups = 16;  // of more rows than one tile has
constexpr int kFewestTileRows = 4;  // of an adapter's: for fewer, giving the registers other sizes costs more

// B of one adapter at a time, for the columns of an item.
template <class T>
struct AdapterColumns {
  using Elem = typename T::Elem;
  const pomona::LoraCall& call;
  const pomona::LongRuns& runs;
  const int num_groups;
  int64_t slices[kMostItemGroups], columns[kMostItemGroups], num_units[kMostItemGroups];  // columns: within the slice
  uint32_t* panel;                                                                        // [groups][row_units][16]
  int32_t segment = -1;
  int64_t columns_ahead;  // to those of this thread's next item: rows of B are fetched there, too far apart to foresee

  AdapterColumns(const pomona::GemmCall& gemm, int64_t first_group, int groups, int64_t groups_ahead)
      : call(*gemm.adapters), runs(*gemm.long_runs), num_groups(groups), columns_ahead(groups_ahead * kGroup) {
    panel = static_cast<uint32_t*>(pomona::scratch(pomona::kAdapterPanel, num_groups * panel_stride() * 4));
    int64_t slice = 0, column = first_group * kGroup;
    while (column >= call.site->out_features[slice]) column -= call.site->out_features[slice++];
    for (int g = 0; g < num_groups; g++, column += kGroup) {
      if (column == call.site->out_features[slice]) column = 0, slice++;
      slices[g] = slice, columns[g] = column;
    }
  }

  int64_t panel_stride() const { return runs.row_units * kGroup; }

  void keep(int32_t new_segment) {
    if (segment == new_segment) return;
    segment = new_segment;
    const char* rows[kMaxRank + 1];
    for (int g = 0; g < num_groups; g++) {
      const int64_t slice = slices[g], lora_rank = call.ranks[slice * call.step->num_segments + segment];
      if (g == 0 || slice != slices[g - 1])
        find_b_rows<T>(*call.site, *call.step, slice, segment, 0, lora_rank, rows);
      num_units[g] = ceil_div(lora_rank, T::kPerUnit);
      uint32_t* units = panel + g * panel_stride();
      for (int64_t k = 0; k < num_units[g]; k++, units += kGroup) {
        const Elem* row = reinterpret_cast<const Elem*>(rows[k * T::kPerUnit]) + columns[g];
        const Elem* other = reinterpret_cast<const Elem*>(rows[k * T::kPerUnit + T::kPerUnit - 1]) + columns[g];
        if (g % 2 == 0) prefetch(row + columns_ahead), prefetch(other + columns_ahead);
        const vu pairs = T::pair(row, other);
        memcpy(units, &pairs, sizeof pairs);
      }
      memset(units, 0, (whole_units(g) - num_units[g]) * kGroup * 4);
    }
  }

  int64_t whole_units(int g) const { return ceil_div(num_units[g], kStepUnits) * kStepUnits; }

  // If all rows and two groups, or one, are of one slice of the kept adapter: what its part is made of.
  bool is_one_slice(int g, int groups) const {
    return num_units[g] > 0 && (groups == 1 || slices[g] == slices[g + groups - 1]);
  }

  // Shrunk inputs from a row on, and the kept columns from a group on.
  Factors factors(int64_t row, int g) const {
    const uint32_t* v = runs.v + slices[g] * runs.slice_units + row * runs.row_units;
    return {{reinterpret_cast<const char*>(v), runs.row_units * 4},
            {panel + g * panel_stride(), panel_stride(), kGroup},
            whole_units(g),
            whole_units(g) * 4};
  }

  // Adds v * B of the kept adapter to the sums of its rows.
  void add(int64_t row, int num_rows, int g, int groups, float* sums, int64_t stride) const {
    wait_for_shrunk(runs);
    for (int i = 0; i < groups; i++, sums += kGroup) {
      if (num_units[g + i] == 0) continue;
      if (num_rows >= kFewestTileRows)
        tile_product<1>(num_rows, factors(row, g + i), {sums, stride, true});
      else
        for (int m = 0; m < num_rows; m++) row_product<1>(factors(row + m, g + i), sums + m * stride, true);
    }
  }
};

// What is done beside an item's products: with every step, two rows of the last product's sums are stored, and factors
// are fetched. Weights that are read once: those of the next product into the L2 cache, from several places in turn,
// and from there those of two steps later; of the first product, which nothing has fetched, those of four steps later.
// Weights that many rows pass by are in the L2 cache: those of the next step, and some lines of the next item.
template <class T, int NG, bool kIsReadOnce>
struct Beside {
  static constexpr bool kFetchesRows = NG == 2, kFetchesColumns = true;  // 16 rows stay in the L1 cache
  // As many lines as a step of two groups takes. That of four reads from four places itself: half of them is better.
  static constexpr int kFarPlaces = NG == 2 ? 8 : 4, kFarUnits = kIsReadOnce ? 2 * kStepUnits / kFarPlaces : 0;
  static constexpr int64_t kStride = NG * kGroup;
  const GemmWork<T>& work;
  Ahead ahead;
  int64_t units_ahead = kStepUnits;
  const char* next_rows = nullptr;         // of the next product
  const uint32_t* next_columns = nullptr;  // if they are known
  int64_t place_units = 0, far_unit = 0;   // of next_columns: in each place, and of these the next to be fetched
  int64_t row = 0, group = 0;              // of the sums that are left to be stored
  const float* left = nullptr;
  int num_left = 0, tile = 0;
  alignas(64) float tiles[2][kMostTileRows * 2 * kGroup];

  explicit Beside(const GemmWork<T>& of_work) : work(of_work) {}

  INLINE void step() {
    if (!kIsReadOnce) ahead.step();
    if (num_left >= 2) store_some(2);
  }
  INLINE void before_more() { wait_for_shrunk(*work.call.long_runs); }
  INLINE LaterStep later(const Factors& factors, int64_t unit) {
    const TileA& a = factors.a;
    const TileB& b = factors.b;
    const char* rows = unit + kStepUnits < factors.num_units ? a.rows + (unit + kStepUnits) * 4 : next_rows;
    const uint32_t* columns = b.units;
    int64_t at = unit + units_ahead;
    if (at >= factors.num_units) {
      at -= factors.num_units, columns = next_columns;
      if (next_columns == nullptr || at >= factors.num_units) columns = b.units, at = unit;  // is there already
    }
    const TileB near{columns + at * b.step, b.group_stride, b.step};
    if (kFarUnits == 0) return {{rows, a.stride_bytes}, near, {}};
    if (far_unit >= place_units) return {{rows, a.stride_bytes}, near, {b.units, 0, 0}};
    const TileB far{next_columns + far_unit * b.step, place_units * b.step, b.step};
    far_unit += kFarUnits;
    return {{rows, a.stride_bytes}, near, far};
  }

  float* sums() { return tiles[tile]; }
  // The sums are all there. What is left of the last ones is stored before.
  template <int kNow>
  void store(int64_t new_row, int num_rows, int64_t new_group) {
    store_some(num_left);
    if (kNow != NG || num_rows == 1 || work.call.is_out_float || (new_group + NG) * kGroup > work.call.out_features)
      return work.template store_rows<kNow>(sums(), kNow * kGroup, new_row, num_rows, new_group, nullptr);
    row = new_row, group = new_group, left = sums(), num_left = num_rows;
    tile = 1 - tile;
  }
  INLINE void store_some(int num_rows) {
    if (work.is_plain)
      work.template store_whole<NG, true>(left, kStride, row, num_rows, group);
    else
      work.template store_whole<NG, false>(left, kStride, row, num_rows, group);
    left += num_rows * kStride, row += num_rows, num_left -= num_rows;
  }
};

template <class T>
struct TileGemm {
  GemmWork<T> work;
  int64_t item_groups, item_rows;

  explicit TileGemm(const pomona::GemmCall& call) : work(call) {
    const int64_t most = max64(2, min64(kMostItemGroups, kItemBytes / group_bytes() / 2 * 2));
    item_groups = call.num_rows <= 16 ? 4 : call.num_rows <= kMostTileRows ? 6 : most;
    item_rows = max64(kRowsPerItem, kItemRowsBytes / (work.num_units * 4) / kRowsPerItem * kRowsPerItem);
  }

  int64_t group_bytes() const { return work.num_units * kGroup * 4; }
  const uint32_t* weights(int64_t group) const {
    return static_cast<const uint32_t*>(work.call.packed) + group * work.num_units * kGroup;
  }

  // Rows of one adapter, or of none, from `row` on: where they end, and whose they are.
  int same_adapter(int64_t row, int num_rows, int32_t* segment) const {
    *segment = pomona::kNoAdapter;
    if (work.call.long_runs == nullptr) return num_rows;
    const int32_t* segments = work.call.long_runs->segments + row;
    int end = 1;
    while (end < num_rows && segments[end] == segments[0]) end++;
    *segment = segments[0];
    return end;
  }

  // Up to 32 rows by NG groups, the first_group-th of an item's and those after it.
  template <int NG, class B>
  void sum(int64_t row, int num_rows, int64_t group, int first_group, B& beside,
           AdapterColumns<T>* adapters) const {
    constexpr int64_t kStride = NG * kGroup;
    const int64_t column = (group + first_group) * kGroup, group_units = work.num_units * kGroup;
    const TileB columns{weights(group + first_group), group_units, kGroup};
    const Factors factors{work.inputs(row, 0), columns, work.num_units, work.num_units * 4};
    int32_t segment;
    const bool is_one_run = same_adapter(row, num_rows, &segment) == num_rows;
    if (is_one_run && segment == pomona::kAddedLater)
      return multiply<NG>(num_rows, factors, {later(row, column), work.call.out_features, false}, beside);
    float* own = beside.sums();
    if (is_one_run && segment >= 0 && num_rows > 1) {
      adapters->keep(segment);
      if (adapters->is_one_slice(first_group, NG)) {
        const Factors adapter = adapters->factors(row, first_group);
        tile_product<NG>(num_rows, factors, &adapter, {own, kStride, false}, beside);
        return beside.template store<NG>(row, num_rows, group + first_group);
      }
    }
    multiply<NG>(num_rows, factors, {own, kStride, false}, beside);
    if (is_one_run && segment == pomona::kNoAdapter)
      return beside.template store<NG>(row, num_rows, group + first_group);
    for (int first = 0, end; first < num_rows; first = end) {
      end = first + same_adapter(row + first, num_rows - first, &segment);
      float* sums = own + first * kStride;
      if (segment == pomona::kAddedLater) {
        for (int m = first; m < end; m++, sums += kStride) memcpy(later(row + m, column), sums, kStride * 4);
        continue;
      }
      if (segment >= 0) {
        adapters->keep(segment);
        adapters->add(row + first, end - first, first_group, NG, sums, kStride);
      }
      work.template store_rows<NG>(sums, kStride, row + first, end - first, group + first_group, nullptr);
    }
  }

  float* later(int64_t row, int64_t column) const {
    return work.call.sums + row * work.call.out_features + column;
  }

  template <int NG, class B>
  INLINE static void multiply(int num_rows, const Factors& factors, TileC c, B& beside) {
    num_rows == 1 ? row_product<NG>(factors, c.sums, c.is_added_to)
                  : tile_product<NG>(num_rows, factors, nullptr, c, beside);
  }

  // What a thread knows of its next item: its columns, and what is fetched of them where many rows pass by.
  struct Next {
    const uint32_t* columns = nullptr;
    int64_t num_groups = 0;
    Ahead ahead;
  };

  // is_near: the first columns are in the L2 cache already.
  template <int NG, bool kIsReadOnce>
  void run(int64_t row, int64_t num_rows, int64_t group, int num_groups, const Next& next, bool is_near,
           AdapterColumns<T>* adapters) const {
    Beside<T, NG, kIsReadOnce> beside(work);
    beside.ahead = next.ahead;
    for (int64_t r = 0; r < num_rows; r += kMostTileRows) {
      const int rows = static_cast<int>(min64(kMostTileRows, num_rows - r));
      for (int g = 0; g < num_groups;) {
        const int left = num_groups - g, groups = left >= NG ? NG : left >= 2 ? 2 : 1;
        const bool is_last = groups == left;
        beside.next_rows = work.inputs(row + r + (is_last ? rows : 0), 0).rows;
        beside.next_columns = !is_last ? weights(group + g + groups) : kIsReadOnce ? next.columns : weights(group);
        if (kIsReadOnce) {
          const int64_t next_groups = min64(NG, is_last ? next.num_groups : left - groups);
          beside.units_ahead = (is_near || g > 0 ? 2 : 4) * kStepUnits;
          beside.place_units = ceil_div(next_groups * work.num_units, beside.kFarPlaces), beside.far_unit = 0;
        }
        if (groups == NG)
          sum<NG>(row + r, rows, group, g, beside, adapters);
        else if (groups == 2)
          sum<2>(row + r, rows, group, g, beside, adapters);
        else
          sum<1>(row + r, rows, group, g, beside, adapters);
        g += groups;
      }
    }
    beside.store_some(beside.num_left);
  }

  // As many groups of columns for an item, or fewer, as leave all threads the same work.
  static int64_t balanced(int64_t most, int64_t num_groups, int threads) {
    int64_t best = most, least = num_groups;
    for (int64_t groups = most; groups >= 2; groups -= 2) {
      const int64_t load = min64(num_groups, ceil_div(ceil_div(num_groups, groups), threads) * groups);
      if (load < least) best = groups, least = load;
    }
    return best;
  }

  template <class S>
  void run_all(int num_threads, const S& share) const {
    const int64_t cycles = work.num_units * work.num_groups * (1 + work.call.num_rows * kGroupVectors / 8);
    const int threads = threads_for(num_threads, cycles);
    // Items of fewer rows are small as they are, and those of several runs many.
    const bool is_large = work.call.num_rows > 16 && work.call.num_rows <= item_rows;
    const int64_t groups = is_large ? balanced(item_groups, work.num_groups, threads) : item_groups;
    const int64_t num_columns = ceil_div(work.num_groups, groups);
    const int64_t num_items = num_columns * ceil_div(work.call.num_rows, item_rows);
    share(num_items, threads, [&](int64_t item) {
      const int64_t place = side_by_side(item, num_items, threads);
      const int64_t row = place / num_columns * item_rows, group = place % num_columns * groups;
      const int64_t num_rows = min64(item_rows, work.call.num_rows - row);
      const int num_some = static_cast<int>(min64(groups, work.num_groups - group));
      // The columns after these are most likely this thread's too.
      const int64_t next_groups = min64(groups, work.num_groups - group - groups);
      const bool has_next = next_groups > 0 && item + threads < num_items;
      Next next;
      if (has_next) next = {weights(group + groups), next_groups, {}};
      const auto run_item = [&](AdapterColumns<T>* adapters) {
        const bool is_near = item >= threads;  // this thread fetched them
        if (num_rows <= 16) return run<4, true>(row, num_rows, group, num_some, next, is_near, adapters);
        if (num_rows <= kMostTileRows) return run<2, true>(row, num_rows, group, num_some, next, is_near, adapters);
        if (has_next) {
          const char* columns = reinterpret_cast<const char*>(next.columns);
          const int64_t num_bytes = next_groups * group_bytes(), num_steps = ceil_div(work.num_units, kStepUnits);
          const int64_t num_products = ceil_div(num_rows, kMostTileRows) * ceil_div(num_some, 2);
          next.ahead = {columns, columns + num_bytes, ceil_div(num_bytes, 64 * num_steps * num_products) * 64};
        }
        run<2, false>(row, num_rows, group, num_some, next, true, adapters);
      };
      if (work.call.long_runs == nullptr) return run_item(nullptr);
      AdapterColumns<T> adapters(work.call, group, num_some, next.columns ? groups : 0);
      run_item(&adapters);
    });
  }
};

#endif

// share(num_items, num_threads, f) runs f(item) for all items, whatever else it does.
template <class T, class S = OnlyItems>
void dense(const pomona::GemmCall& call, int num_threads, const S& share = {}) {
#if defined(__AMX_BF16__)
  if constexpr (kUsesTiles<T>) return TileGemm<T>(call).run_all(num_threads, share);
#endif
  gemm<T>(call, num_threads, share);
}

template <class T>
void dense(const pomona::GemmCall& call, int num_threads) {
  dense<T>(call, num_threads, OnlyItems{});
}

}  // namespace
