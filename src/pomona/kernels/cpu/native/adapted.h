// A product with its adapters' part, in one go. Included by isa.cpp only.
//
// Long runs of rows get theirs before the product stores them (fused.h). Short runs get theirs right after it: the
// product, which computes longer than it reads, fetches their adapters' pages into the cache meanwhile. Results are
// those of one after the other, bit for bit.
#pragma once
#include "gemm.h"
#include "gemm_int8.h"
#include "lora_short.h"

namespace {

template <class T>
pomona::LongRuns shrink_long_runs(const pomona::LoraCall& call, const Shares& shares) {
  const pomona::LoraStep& step = *call.step;
  const Lora<T> work = long_work<T>(call, shares, new_v<T>(call));
  for_items(work.num_pairs * work.rank_tiles, shares.threads,
            [&](int64_t item) { work.shrink(item, item + shares.threads); });
  auto* segments = static_cast<int32_t*>(pomona::scratch(pomona::kSegments, step.num_tokens * sizeof(int32_t)));
  for (int64_t row = 0; row < step.num_tokens; row++) segments[row] = -1;
  for (const pomona::RowBlock* block = step.blocks; block < step.blocks + shares.num_long; block++)
    for (int32_t row = 0; row < block->num_rows; row++) segments[block->start + row] = block->segment;
  return {segments, work.v_units, step.num_tokens * work.row_units(), work.row_units()};
}

template <class T>
void adapted(const pomona::GemmCall& gemm_call, const pomona::LoraCall& lora_call, int num_threads) {
  const Shares shares = share_blocks(lora_call, num_threads, true);
  const bool is_fused = !shares.is_idle && shares.num_long > 0 && can_fuse(*lora_call.site);
  pomona::GemmCall base = gemm_call;
  pomona::LongRuns long_runs;
  if (!shares.is_idle) base.adapters = &lora_call;
  if (is_fused) {
    long_runs = shrink_long_runs<T>(lora_call, shares);
    base.long_runs = &long_runs;
  }
  base.scales ? gemm_int8<T>(base, num_threads) : gemm<T>(base, num_threads);
  if (shares.is_idle) return;
  if (!is_fused) return lora<T>(lora_call, num_threads, 3);
  const Lora<T> work = long_work<T>(lora_call, shares, nullptr);
  const ShortRuns<T> few{work, shares};
  for_items(few.num_items(), shares.threads, [&](int64_t item) { few.run(item); });
}

}  // namespace
