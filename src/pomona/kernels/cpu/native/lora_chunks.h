// A chunk of a short run's rank rows: fetched ahead, and expanded by vectors or, where there are tile registers, onto a
// product's sums. Included by isa.cpp only.
//
// A short run does little with each weight, so memory sets the pace: while a chunk of rank rows is computed, A then B,
// the next chunk's are fetched into the cache, across slices and runs. The sums are those of lora.h, in the same order.
#pragma once
#include "lora.h"

namespace {

constexpr int64_t kChunkRanks = 32;  // with both projections' rows, and the next chunk's, well within a core's L2 cache

// Some rank rows of one slice of a block.
struct Chunk {
  const pomona::RowBlock* block = nullptr;  // null: no more work
  int64_t slice = 0, first_rank = 0, num_ranks = 0, a_bytes = 0, b_bytes = 0;
  const char *a[kChunkRanks], *b[kChunkRanks + 1];
};

// Fetches a chunk's rows one after the other, a few cache lines whenever it is asked to.
struct Fetcher {
  const Chunk& chunk;
  int64_t num_begun = 0;  // of A's rows, then B's
  const char *at = nullptr, *end = nullptr;

  explicit Fetcher(const Chunk& of_chunk) : chunk(of_chunk) {}

  INLINE void fetch(int64_t num_lines) {
    for (int64_t i = 0; i < num_lines && at < end; i++, at += 64) prefetch(at);
    if (at >= end) turn();
  }
  void turn() {
    if (chunk.block == nullptr || num_begun >= 2 * chunk.num_ranks) return;
    const bool is_a = num_begun < chunk.num_ranks;
    at = is_a ? chunk.a[num_begun] : chunk.b[num_begun - chunk.num_ranks];
    end = at + (is_a ? chunk.a_bytes : chunk.b_bytes);
    num_begun++;
  }
};

// What a chunk's expansion starts from and ends in.
template <class T>
struct Expansion {
  float* sums;  // [rows, stride] in the order of load_two, of earlier chunks and for later ones
  int64_t sums_stride;
  bool is_first, is_last;
  float scaling;
  typename T::Elem* out;
  int64_t out_stride;
};

// NB blocks of 2 W columns from i on, of MR rows; of one block alone, the first n. v: T::Row's units.
template <class T, int MR, int NB>
INLINE void expand_blocks(int64_t i, int n, const Chunk& chunk, const uint32_t (*v)[kChunkRanks],
                          const Expansion<T>& to) {
  using Elem = typename T::Elem;
  vf sums[MR][2 * NB];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * NB; c++)
      sums[m][c] = to.is_first ? vf{} : load_floats(to.sums + m * to.sums_stride + i + c * W);
  const auto b_at = [&](int64_t j, int block) { return reinterpret_cast<const Elem*>(chunk.b[j]) + i + block * 2 * W; };
  constexpr int kRanks = T::Row::kPerUnit;  // that are multiplied at once
  constexpr int kBytes = NB * 2 * W * sizeof(Elem);
  for (int64_t j = 0; j < chunk.num_ranks; j += kRanks) {
    if (W == 8)  // rank rows are far apart, too many to foresee: the next columns go to the nearest cache
#pragma GCC unroll 4
      for (int line = 0; line < kBytes; line += 64)
        prefetch_near(reinterpret_cast<const char*>(b_at(j, max64(2, NB))) + line);
#pragma GCC unroll 4
    for (int block = 0; block < NB; block++) {
      typename T::Factor weights[2];
      if constexpr (kRanks == 1)
        load_some<T>(b_at(j, block), n, weights);
      else
        pair_some<T>(b_at(j, block), b_at(j + 1, block), n, weights);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const auto row = (typename T::Factor)splat_unit(v[m] + j / kRanks);
        T::add(sums[m][2 * block], row, weights[0]);
        T::add(sums[m][2 * block + 1], row, weights[1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int block = 0; block < NB; block++) {
      const vf* sum = sums[m] + 2 * block;
      const int64_t at = i + block * 2 * W;
      if (to.is_last) {
        Elem* out = to.out + m * to.out_stride + at;
        vf two[2];
        load_some<T>(out, n, two);
        two[0] = fma(splat(to.scaling), sum[0], two[0]);
        two[1] = fma(splat(to.scaling), sum[1], two[1]);
        store_some<T>(out, two, n);
      } else {
        store_floats(to.sums + m * to.sums_stride + at, sum[0]);
        store_floats(to.sums + m * to.sums_stride + at + W, sum[1]);
      }
    }
}

template <class T, int MR>
INLINE void expand_run(int64_t num_columns, const Chunk& chunk, const uint32_t (*v)[kChunkRanks],
                       const Expansion<T>& to, Fetcher& ahead) {
  constexpr int NB = W == 16 ? 1 : MR == 1 ? 4 : MR == 2 ? 2 : 1;
  constexpr int64_t kColumns = NB * 2 * W;
  const auto fetch = [&](int64_t i, int64_t columns) {
    const int64_t bytes = columns * sizeof(typename T::Elem);
    if (bytes >= 64 || i * static_cast<int64_t>(sizeof(typename T::Elem)) % 64 == 0)
      ahead.fetch(chunk.num_ranks * max64(1, bytes / 64));
  };
  int64_t first = 0;
  for (; NB > 1 && first + kColumns <= num_columns; first += kColumns) {
    fetch(first, kColumns);
    expand_blocks<T, MR, NB>(first, 2 * W, chunk, v, to);
  }
  for_lanes(num_columns - first, LANES {
    fetch(first + i, 2 * W);
    expand_blocks<T, MR, 1>(first + i, n, chunk, v, to);
  });
}

#if defined(__AMX_BF16__)
// Fetches rank rows in the order of their use, a line of each, a few steps before: A of a chunk's ranks by parts, B,
// and A of the next chunk.
struct LinesAhead {
  static constexpr int64_t kSteps = 4;
  const Chunk &chunk, &next;

  INLINE static void fetch(const char* const* rows, int64_t num_rows, int64_t line) {
    for (int64_t j = 0; j < num_rows; j++) prefetch_near(rows[j] + line * 64);
  }
  INLINE static void fetch_a(const Chunk& of, int64_t first_rank, int64_t line) {
    fetch(of.a + first_rank, min64(kRankPart, of.num_ranks - first_rank), line);
  }
  // Beside a line of A, of a part's ranks.
  INLINE void beside_a(int64_t first_rank, int64_t line) const {
    const int64_t num_lines = ceil_div(chunk.a_bytes, 64), later = line + kSteps;
    if (later < num_lines) return fetch_a(chunk, first_rank, later);
    if (first_rank + kRankPart < chunk.num_ranks) return fetch_a(chunk, first_rank + kRankPart, later - num_lines);
    fetch(chunk.b, chunk.num_ranks, later - num_lines);
  }
  INLINE void beside_b(int64_t line) const {
    const int64_t num_lines = ceil_div(chunk.b_bytes, 64), later = line + kSteps;
    if (later < num_lines) return fetch(chunk.b, chunk.num_ranks, later);
    if (next.block) fetch_a(next, 0, later - num_lines);
  }
};

constexpr int64_t kSumsAhead = 4 * W;

// As expand_run, in the order of tile registers, of bfloat16 that are scaled already: onto a product's sums, which then
// become outputs.
struct TileExpansion {
  float* sums;  // [rows, sums_stride], of the slice's first column
  int64_t sums_stride;
  bool is_last;
  const uint16_t* bias;  // null: none
  uint16_t* out;
  int64_t out_stride;
};

// 2 W floats, those at even places first. Reads and writes n.
INLINE void load_apart(const float* from, int n, vf* two) {
  alignas(64) static constexpr int32_t kEven[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  float some[2 * W] = {};
  if (n < 2 * W) memcpy(some, from, n * 4), from = some;
  const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + W);
  const __m512i even = _mm512_load_si512(kEven), odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  two[0] = (vf)_mm512_permutex2var_ps(low, even, high), two[1] = (vf)_mm512_permutex2var_ps(low, odd, high);
}
INLINE void store_apart(float* to, const vf* two, int n) {
  alignas(64) static constexpr int32_t kLow[16] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  float some[2 * W];
  _mm512_storeu_ps(some, _mm512_permutex2var_ps((__m512)two[0], low, (__m512)two[1]));
  _mm512_storeu_ps(some + W, _mm512_permutex2var_ps((__m512)two[0], high, (__m512)two[1]));
  memcpy(to, some, n * 4);
}

// M rows' columns from i on.
template <int M>
INLINE void expand_lanes(int64_t i, int n, const Chunk& chunk, const float (*v)[kChunkRanks],
                         const TileExpansion& to) {
  vf even[M][2] = {}, odd[M][2] = {};  // of ranks, and in them of columns
  for (int64_t j = 0; j < chunk.num_ranks; j += 2) {
    vf weights[2], others[2];
    load_some<BFloat16>(reinterpret_cast<const uint16_t*>(chunk.b[j]) + i, n, weights);
    load_some<BFloat16>(reinterpret_cast<const uint16_t*>(chunk.b[j + 1]) + i, n, others);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const vf a = splat(v[m][j]), b = splat(v[m][j + 1]);
      even[m][0] = fma(a, weights[0], even[m][0]), even[m][1] = fma(a, weights[1], even[m][1]);
      odd[m][0] = fma(b, others[0], odd[m][0]), odd[m][1] = fma(b, others[1], odd[m][1]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    float* sums = to.sums + m * to.sums_stride + i;
    vf two[2];
    load_apart(sums, n, two);
    two[0] += even[m][0] + odd[m][0], two[1] += even[m][1] + odd[m][1];
    if (!to.is_last) {
      store_apart(sums, two, n);
      continue;
    }
    if (to.bias) {
      vf bias[2];
      load_some<BFloat16>(to.bias + i, n, bias);
      two[0] += bias[0], two[1] += bias[1];
    }
    store_some<BFloat16>(to.out + m * to.out_stride + i, two, n);
  }
}

// Rows by four, and the rest. Half of the sums are in another core's cache, and are fetched a little ahead too.
template <int kRest>
INLINE void expand_fours(int num_rows, int64_t num_columns, const Chunk& chunk, const float (*v)[kChunkRanks],
                         const TileExpansion& to, const LinesAhead& ahead) {
  for_lanes(num_columns, LANES {
    for (int m = 0; m < num_rows; m++)
      for (int64_t line = 0; line < 2; line++)
        prefetch_near(to.sums + m * to.sums_stride + i + kSumsAhead + line * W);
    ahead.beside_b(i / (2 * W));
    TileExpansion part = to;
    int row = 0;
    for (; row + 4 <= num_rows; row += 4) {
      expand_lanes<4>(i, n, chunk, v + row, part);
      part.sums += 4 * to.sums_stride, part.out += 4 * to.out_stride;
    }
    if constexpr (kRest > 0) expand_lanes<kRest>(i, n, chunk, v + row, part);
  });
}

INLINE void expand_tiles(int num_rows, int64_t num_columns, const Chunk& chunk, const float (*v)[kChunkRanks],
                         const TileExpansion& to, const LinesAhead& ahead) {
  switch (num_rows % 4) {
    case 0: return expand_fours<0>(num_rows, num_columns, chunk, v, to, ahead);
    case 1: return expand_fours<1>(num_rows, num_columns, chunk, v, to, ahead);
    case 2: return expand_fours<2>(num_rows, num_columns, chunk, v, to, ahead);
    case 3: return expand_fours<3>(num_rows, num_columns, chunk, v, to, ahead);
  }
}
#endif

}  // namespace
