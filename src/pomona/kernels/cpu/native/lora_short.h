// LoRA of short runs of rows (decodes), both halves of a run by one thread; and LoRA's entry. Included by isa.cpp only.
#pragma once
#include "lora_chunks.h"

namespace {

constexpr int kRowsAtOnce = W == 16 ? 8 : W == 8 ? 6 : 2;

template <int N>
struct Number {
  static constexpr int value = N;
};

template <class T>
struct ShortRuns {
  using Elem = typename T::Elem;
  const Lora<T>& work;
  const Shares& shares;
  const pomona::GemmCall* base;  // whose sums become outputs here, with tile registers; else null
  const pomona::LoraCall& call = work.call;
  const pomona::LoraSite& site = work.site;
  const pomona::LoraStep& step = work.step;

  int64_t num_items() const { return (step.num_blocks - shares.num_long) * shares.num_cuts; }

  // The first chunk at or after a slice and rank of an item, in that item or those that this thread will most likely
  // take next.
  void find_chunk(int64_t item, int64_t slice, int64_t first_rank, Chunk& chunk) const {
    for (; item < num_items(); item += shares.threads, slice = -1) {
      const pomona::RowBlock& block = step.blocks[shares.num_long + item / shares.num_cuts];
      const int64_t cut = shares.num_cuts > 1 ? item % shares.num_cuts : -1;
      if (slice < 0) slice = max64(0, cut), first_rank = 0;
      for (; slice < (cut < 0 ? site.num_slices : cut + 1); slice++, first_rank = 0) {
        const int64_t left = work.rank_of(slice, block.segment) - first_rank;
        if (left > 0) return set_chunk(block, slice, first_rank, min64(kChunkRanks, left), chunk);
      }
    }
    chunk.block = nullptr;
  }

  void set_chunk(const pomona::RowBlock& block, int64_t slice, int64_t first_rank, int64_t num_ranks,
                 Chunk& chunk) const {
    chunk.block = &block;
    chunk.slice = slice, chunk.first_rank = first_rank, chunk.num_ranks = num_ranks;
    chunk.a_bytes = site.in_features * sizeof(Elem), chunk.b_bytes = site.out_features[slice] * sizeof(Elem);
    find_rows<T>(site, step, site.a[slice], site.a_page_stride[slice], site.in_features, block.segment, first_rank,
                 num_ranks, chunk.a);
    find_b_rows<T>(site, step, slice, block.segment, first_rank, num_ranks, chunk.b);
  }

  // MR rows of the chunk's block.
  template <int MR>
  void compute(const Chunk& chunk, int row, Fetcher& ahead) const {
    const pomona::RowBlock& block = *chunk.block;
    const Elem* x = static_cast<const Elem*>(call.x) + (block.start + row) * call.x_stride;
    uint32_t v[MR][kChunkRanks];
    for (int64_t first = 0; first < chunk.num_ranks; first += kRankTile) {
      const int64_t end = min64(kRankTile, chunk.num_ranks - first);
      vf totals[MR][kRankTile] = {};
      constexpr int NJ = W == 8 ? (MR == 1 ? 8 : MR == 2 ? 4 : 2) : 4;  // their sums stay in registers
      const auto shrink = [&](auto num_ranks, int j) __attribute__((always_inline)) {
        shrink_lanes<T, MR, num_ranks.value>(chunk.a_bytes, x, call.x_stride, chunk.a + first + j, totals, j,
                                             [&](int64_t at) {
                                               if (W == 16 || at % 64 == 0) ahead.fetch(num_ranks.value);
                                             });
      };
      int j = 0;
      for (; j + NJ <= end; j += NJ) shrink(Number<NJ>{}, j);
      for (; j < end; j++) shrink(Number<1>{}, j);
      for (int m = 0; m < MR; m++) {
        float sums[kRankTile + W] = {};
        fold_sum8(totals[m], sums);
        put_rank_tile<T>(sums, end, v[m] + first / T::Row::kPerUnit);
      }
    }
    const int64_t width = site.out_features[chunk.slice], stride = ceil_div(width, 2 * W) * 2 * W;
    const bool is_first = chunk.first_rank == 0;
    const bool is_last = chunk.first_rank + chunk.num_ranks == work.rank_of(chunk.slice, block.segment);
    float* sums = nullptr;
    if (!is_first || !is_last)
      sums = static_cast<float*>(pomona::scratch(pomona::kRows, block.num_rows * stride * 4)) + row * stride;
    Elem* out = static_cast<Elem*>(call.out) + (block.start + row) * call.out_stride;
    for (int64_t slice = 0; slice < chunk.slice; slice++) out += site.out_features[slice];
    const float scaling = call.scalings[chunk.slice * step.num_segments + block.segment];
    expand_run<T, MR>(width, chunk, v, {sums, stride, is_first, is_last, scaling, out, call.out_stride}, ahead);
  }

#if defined(__AMX_BF16__)
  TileExpansion expansion(const pomona::RowBlock& block, int64_t slice, bool is_last) const {
    int64_t column = 0;
    for (int64_t i = 0; i < slice; i++) column += site.out_features[i];
    const auto* bias = static_cast<const Elem*>(base->bias);
    return {base->sums + block.start * base->out_features + column, base->out_features, is_last,
            bias ? bias + column : nullptr,
            static_cast<Elem*>(call.out) + block.start * call.out_stride + column, call.out_stride};
  }

  // All rows of the chunk's block.
  void compute_tiles(const Chunk& chunk, const Chunk& next) const {
    const LinesAhead ahead{chunk, next};
    const pomona::RowBlock& block = *chunk.block;
    const Elem* x = static_cast<const Elem*>(call.x) + block.start * call.x_stride;
    const vf scaling = splat(call.scalings[chunk.slice * step.num_segments + block.segment]);
    const TileA inputs{reinterpret_cast<const char*>(x), call.x_stride * static_cast<int64_t>(sizeof(Elem))};
    alignas(64) float v[kFewRows<T>][kChunkRanks], sums[kFewRows<T>][kRankPart];
    for (int64_t first = 0; first < chunk.num_ranks; first += kRankPart) {
      int64_t line = 0;
      const uint32_t* columns = lay_out_columns(chunk.a + first, chunk.num_ranks - first, chunk.a_bytes,
                                                [&] { ahead.beside_a(first, line++); });
      tile_product<1>(block.num_rows, {inputs, {columns, 0, kRankPart}, ceil_div(chunk.a_bytes, 4), chunk.a_bytes},
                      {sums[0], kRankPart, false});
      for (int m = 0; m < block.num_rows; m++) store_floats(v[m] + first, T::round(scaling * load_floats(sums[m])));
    }
    const bool is_last = chunk.first_rank + chunk.num_ranks == work.rank_of(chunk.slice, block.segment);
    const TileExpansion to = expansion(block, chunk.slice, is_last);
    expand_tiles(block.num_rows, site.out_features[chunk.slice], chunk, v, to, ahead);
  }

  // Outputs of a slice that the block's adapter does not have.
  void finish(const pomona::RowBlock& block, int64_t slice) const {
    const Chunk nothing{};
    const float v[kFewRows<T>][kChunkRanks] = {};
    expand_tiles(block.num_rows, site.out_features[slice], nothing, v, expansion(block, slice, true),
                 {nothing, nothing});
  }
#endif

  // All slices of a block, or one.
  void run(int64_t item) const {
    Chunk chunks[2];
    find_chunk(item, -1, 0, chunks[0]);
    const pomona::RowBlock* block = step.blocks + shares.num_long + item / shares.num_cuts;
    const int64_t cut = shares.num_cuts > 1 ? item % shares.num_cuts : -1;
#if defined(__AMX_BF16__)
    if constexpr (kUsesTiles<T>)
      for (int64_t slice = max64(0, cut); slice < (cut < 0 ? site.num_slices : cut + 1); slice++)
        if (work.rank_of(slice, block->segment) == 0) finish(*block, slice);
#endif
    for (int i = 0;; i ^= 1) {
      const Chunk& chunk = chunks[i];
      if (chunk.block != block || (cut >= 0 && chunk.slice != cut)) return;
      find_chunk(item, chunk.slice, chunk.first_rank + chunk.num_ranks, chunks[i ^ 1]);
      compute_rows(chunk, chunks[i ^ 1]);
    }
  }

  void compute_rows(const Chunk& chunk, const Chunk& next) const {
#if defined(__AMX_BF16__)
    if constexpr (kUsesTiles<T>) return compute_tiles(chunk, next);
#endif
    Fetcher ahead(next);
    const int num_rows = chunk.block->num_rows;
    const int num_parts = (num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
    for (int part = 0; part < num_parts; part++) {
      const int row = part * num_rows / num_parts;
      compute_some(chunk, row, (part + 1) * num_rows / num_parts - row, ahead);
    }
  }

  void compute_some(const Chunk& chunk, int row, int num_rows, Fetcher& ahead) const {
    switch (num_rows) {
      case 1: return compute<1>(chunk, row, ahead);
      case 2: return compute<2>(chunk, row, ahead);
#if defined(__AVX2__)
      case 3: return compute<3>(chunk, row, ahead);
      case 4: return compute<4>(chunk, row, ahead);
      case 5: return compute<5>(chunk, row, ahead);
      case 6: return compute<6>(chunk, row, ahead);
#endif
#if defined(__AVX512F__)
      case 7: return compute<7>(chunk, row, ahead);
      case 8: return compute<8>(chunk, row, ahead);
#endif
    }
  }
};

// phases: 1 shrink, 2 expand, with v in between; 3 both.
template <class T>
void lora(const pomona::LoraCall& call, int num_threads, int phases) {
  const Shares shares = share_blocks(call, num_threads, phases == 3 && !kUsesTiles<T> ? kFewRows<T> : 0);
  if (shares.is_idle) return;
  const Lora<T> work = long_work<T>(call, shares, phases == 3 ? new_v<T>(call) : nullptr);
  const ShortRuns<T> few{work, shares, nullptr};
  const int64_t num_shrinks = phases & 1 ? work.num_shrinks() : 0;
  const auto shrink = [&](int64_t item) {
    item < num_shrinks ? work.shrink(item) : few.run(item - num_shrinks);
  };
  const auto expand = [&](int64_t item) { work.expand(item); };
  const int64_t num_expands = phases & 2 ? work.num_pairs * work.column_tiles : 0;
  for_kinds(shares.threads, Kind{num_shrinks + few.num_items(), shrink},
            Kind{num_expands, expand}, Kind{0, expand});
}

}  // namespace
