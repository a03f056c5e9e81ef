// The adapters' part of long runs of rows, added to a product's sums before they are stored: what a prompt's rows make
// does not fit the cache, and would have to be read again. Included by isa.cpp only.
#pragma once
#include "amx.h"
#include "lora.h"

namespace {

// Whole groups of columns belong to one slice.
INLINE bool can_fuse(const pomona::LoraSite& site) {
  for (int64_t slice = 0; slice < site.num_slices; slice++)
    if (site.out_features[slice] % kGroup) return false;
  return true;
}

// Until the long runs' shrunk inputs are there. Threads begin to shrink before they take what waits here, so this ends.
INLINE void wait_for_shrunk(const pomona::LongRuns& runs) { wait_for(*runs.num_shrunk, runs.num_shrinks); }

// NG groups of columns from `first_group` on; B of one segment at a time is kept for them, as the tile wants it.
template <class T, int NG>
struct FusedColumns {
  using Elem = typename T::Elem;
  const pomona::LoraCall& call;
  const pomona::LongRuns& runs;
  int64_t slices[NG], columns[NG], num_units[NG];  // columns: of the group's first within its slice
  float scalings[NG];
  uint32_t* panel;                                 // [NG][units][16]
  int32_t segment = -1;
  int64_t columns_ahead;  // to those of this thread's next item: rows of B are fetched there, too far apart to foresee

  FusedColumns(const pomona::GemmCall& gemm, int64_t first_group, int64_t groups_ahead)
      : call(*gemm.adapters), runs(*gemm.long_runs), columns_ahead(groups_ahead * kGroup) {
    panel = static_cast<uint32_t*>(pomona::scratch(pomona::kAdapterPanel, NG * panel_stride() * 4));
    int64_t slice = 0, column = first_group * kGroup;
    while (column >= call.site->out_features[slice]) column -= call.site->out_features[slice++];
    for (int g = 0; g < NG; g++, column += kGroup) {
      if (column == call.site->out_features[slice]) column = 0, slice++;
      slices[g] = slice, columns[g] = column;
    }
  }

  int64_t panel_stride() const { return runs.row_units * T::Row::kPerUnit / T::kPerUnit * kGroup; }

  void keep(int32_t new_segment) {
    if (segment == new_segment) return;
    segment = new_segment;
    const char* rows[kMaxRank + 1];
    for (int g = 0; g < NG; g++) {
      const int64_t slice = slices[g], at = slice * call.step->num_segments + segment, lora_rank = call.ranks[at];
      if (g == 0 || slice != slices[g - 1]) {
        find_b_rows<T>(*call.site, *call.step, slice, segment, 0, lora_rank, rows);
        for (int64_t j = 0; j < lora_rank; j++)
          for (int64_t i = 0; i < NG * kGroup * static_cast<int64_t>(sizeof(Elem)); i += 64)
            prefetch(rows[j] + (columns[g] + columns_ahead) * sizeof(Elem) + i);
      }
      num_units[g] = ceil_div(lora_rank, T::kPerUnit);
      scalings[g] = kUsesTiles<T> ? 1.0f : call.scalings[at];  // tiles: v has been scaled
      for (int64_t k = 0; k < num_units[g]; k++)
        for (int64_t i = 0; i < kGroup; i += W) {
          const Elem* row = reinterpret_cast<const Elem*>(rows[k * T::kPerUnit]) + columns[g] + i;
          const Elem* other = reinterpret_cast<const Elem*>(rows[k * T::kPerUnit + T::kPerUnit - 1]) + columns[g] + i;
          const vu units = T::pair(row, other);
          memcpy(panel + g * panel_stride() + k * kGroup + i, &units, sizeof units);
        }
    }
  }

  // v * B for at most a tile of rows of the kept segment. store_of(g) is what takes the sums from the g-th group on, of
  // one slice; store_plain(g) stores a group whose slice has no rank.
  template <class F, class G>
  INLINE void multiply(int64_t row, int num_rows, const F& store_of, const G& store_plain) const {
    wait_for_shrunk(runs);
    for (int g = 0; g < NG;) {
      if (num_units[g] == 0) {
        store_plain(g++);
        continue;
      }
      const uint32_t* v = runs.v + slices[g] * runs.slice_units + row * runs.row_units;
      const TileA a{reinterpret_cast<const char*>(v), runs.row_units * 4};
      const TileB b{panel + g * panel_stride(), panel_stride(), kGroup};
      if constexpr (W < 16) {  // as many sums as there are registers: what becomes of them takes some too
        float sums[kTileRows * kGroup];
        tile_rows<T, 1, typename T::Row>(num_rows, num_units[g], a, b, {sums, kGroup, false}, {});
        store_of(g).rows(num_rows, sums);
        g++;
      } else if (g == 0 && slices[NG - 1] == slices[0]) {
        tile_rows<T, typename T::Row, NG, false>(num_rows, num_units[0], a, b, {}, {}, {}, store_of(0));
        g = NG;
      } else {
        tile_rows<T, typename T::Row, 1, false>(num_rows, num_units[g], a, b, {}, {}, {}, store_of(g));
        g++;
      }
    }
  }
};

}  // namespace
