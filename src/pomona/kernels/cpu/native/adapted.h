// A product with its adapters' part, in one go. Included by isa.cpp only.
//
// Long runs of rows get theirs before the product stores them (fused.h). Short runs get theirs right after it, on
// threads that have not gone home; some products fetch their adapters' pages into the cache meanwhile (PageFetch in
// gemm.h). Results are those of one after the other, bit for bit; with tile registers both parts are added before
// anything is rounded, the same for long and short runs.
#pragma once
#include "gemm_int8.h"
#include "gemm_tiles.h"
#include "lora_short.h"

namespace {

// Where the long runs' shrunk inputs will be, whose rows are whose, and which get their adapter's part later.
template <class T>
pomona::LongRuns plan_rows(const Lora<T>& work, int64_t num_long, const int64_t& num_shrunk) {
  const pomona::LoraStep& step = work.step;
  auto* segments = static_cast<int32_t*>(pomona::scratch(pomona::kSegments, step.num_tokens * sizeof(int32_t)));
  for (int64_t row = 0; row < step.num_tokens; row++) segments[row] = pomona::kNoAdapter;
  for (const pomona::RowBlock* block = step.blocks; block < step.blocks + step.num_blocks; block++) {
    const int32_t segment = block < step.blocks + num_long ? block->segment : pomona::kAddedLater;
    for (int32_t row = 0; row < block->num_rows; row++) segments[block->start + row] = segment;
  }
  return {segments, work.v_units, step.num_tokens * work.row_units(), work.row_units(), &num_shrunk,
          work.num_shrinks()};
}

template <class T, class S = OnlyItems>
void base_product(const pomona::GemmCall& call, int num_threads, const S& share = {}) {
  call.scales ? gemm_int8<T>(call, num_threads, share) : dense<T>(call, num_threads, share);
}

template <class T>
void adapted(const pomona::GemmCall& gemm_call, const pomona::LoraCall& lora_call, int num_threads) {
  // With tile registers a row's adapter is rounded together with the product, or after it, whatever its run's length.
  const bool is_fusible = can_fuse(*lora_call.site);
  const bool has_short_runs = !kUsesTiles<T> || (is_fusible && !gemm_call.scales);
  const Shares shares = share_blocks(lora_call, num_threads, has_short_runs ? kFewRows<T> : 0);
  pomona::GemmCall base = gemm_call;
  if (shares.is_idle) return base_product<T>(base, num_threads);
  base.adapters = &lora_call, base.is_block_shared = shares.num_cuts > 1;
  if (shares.num_long > 0 && !is_fusible) {
    base_product<T>(base, num_threads);
    return lora<T>(lora_call, num_threads, 3);
  }
  const Lora<T> work = long_work<T>(lora_call, shares, new_v<T>(lora_call));
  const ShortRuns<T> few{work, shares, &base};
  const bool has_sums = kUsesTiles<T> && few.num_items() > 0;
  int64_t num_shrunk = 0;
  const pomona::LongRuns long_runs =
      shares.num_long > 0 || has_sums ? plan_rows<T>(work, shares.num_long, num_shrunk) : pomona::LongRuns{};
  if (long_runs.segments) base.long_runs = &long_runs;
  if (has_sums)
    base.sums = static_cast<float*>(pomona::scratch(pomona::kLaterSums, base.num_rows * base.out_features * 4));
  const auto in_turn = [&](int64_t num_items, int threads, const auto& product) {
    const auto shrink = [&](int64_t item) {
      work.shrink(item);
      __atomic_fetch_add(&num_shrunk, 1, __ATOMIC_RELEASE);
    };
    const auto run_few = [&](int64_t item) { few.run(item); };
    for_kinds(threads > shares.threads ? threads : shares.threads, Kind{work.num_shrinks(), shrink, false},
              Kind{num_items, product}, Kind{few.num_items(), run_few});
  };
  base_product<T>(base, num_threads, in_turn);
}

}  // namespace
