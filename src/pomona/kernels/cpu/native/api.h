// The structures and the table of kernels that the C ABI (api.cpp) and the instruction-set builds (isa.cpp) share.
// Every pointer is borrowed for one call. Strides count elements of the tensor's own dtype.
#pragma once
#include <stdint.h>

namespace pomona {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

constexpr int kMaxSlices = 4;
constexpr int kMaxHeadDim = 256;

// Adapter pages of one site: the same for every step.
struct LoraSite {
  int64_t num_slices, in_features, rows_per_page;
  int64_t out_features[kMaxSlices];
  const void* a[kMaxSlices];
  const void* b[kMaxSlices];
  int64_t a_page_stride[kMaxSlices];
  int64_t b_page_stride[kMaxSlices];
};

// A run of rows inside one segment: the unit in which threads share rows.
struct RowBlock {
  int32_t segment, start, num_rows, padding;
};

// Segments of one step: the same for every layer.
struct LoraStep {
  int64_t num_segments, num_blocks, max_pages, max_rank, num_tokens;
  const RowBlock* blocks;
  const int32_t* page_tables;  // [num_segments, max_pages]
  const int64_t* page_shifts;  // [num_segments, max_pages]: bytes from each page to where it is read instead; or null
};

struct LoraCall {
  const LoraSite* site;
  const LoraStep* step;
  const int32_t* ranks;     // [num_slices, num_segments]
  const float* scalings;    // [num_slices, num_segments]
  const void* x;
  int64_t x_stride;
  void* out;
  int64_t out_stride;
  float* v;                 // [num_slices, num_tokens, max_rank] between the halves; null: both are done
};

// A run of one sequence's rows that is attended to together: the unit in which threads share queries.
struct QueryBlock {
  int32_t sequence, row, num_rows, first_position;
};

// Sequences of one step: the same for every layer of equal window.
struct AttentionStep {
  const QueryBlock* blocks;
  const int32_t* block_tables;  // [num_seqs, max_blocks]
  int64_t num_blocks, max_blocks, max_context;
};

struct AttentionCall : AttentionStep {
  const void *query, *key_cache, *value_cache;
  void* out;                    // [num_tokens, num_heads, head_dim], dense
  int64_t query_row_stride, query_head_stride;
  int64_t key_block_stride, value_block_stride;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t window;               // 0: none
  float scale;
};

// Rows whose adapters' part is added to a product before it is stored, with their shrunk inputs.
constexpr int32_t kNoAdapter = -1, kAddedLater = -2;
struct LongRuns {
  const int32_t* segments;      // of each row; or one of the two above
  const uint32_t* v;            // units of T::Row [num_slices, num_tokens, row_units]
  int64_t slice_units, row_units;
  const int64_t* num_shrunk;    // items of shrinking that are done: v is there when all are
  int64_t num_shrinks;
};

struct GemmCall {
  const void* x;
  int64_t num_rows, x_stride;
  const void* packed;
  const float* scales;          // [out_features, rounded up to 16]: packed holds int8; null: it holds the dtype
  const void* bias;             // null: none
  void* out;
  int64_t out_stride, in_features, out_features;
  int32_t is_out_float;         // out is float32 whatever the dtype
  const LoraCall* adapters;     // whose part is added to out, now or right after; null: none
  const LongRuns* long_runs;    // the rows to which it is added now; null: none
  int32_t is_block_shared;      // several threads add theirs to the rows of a block
  float* sums;                  // [num_rows, out_features]: what rows of kAddedLater are, instead of out
};

struct GatherCall {
  const void* packed;           // as in GemmCall, or [outputs, in_features] if not is_grouped
  const float* scales;
  const int64_t* row_ids;       // [num_rows]: which outputs of the weight
  void* out;                    // [num_rows, in_features], dense
  int64_t num_rows, in_features;
  int32_t is_grouped;
};

struct NormCall {
  const void* x;
  void* residual;               // null: none; else x + residual is stored here
  const void* weight;
  void* out;                    // dense
  int64_t num_outer, num_inner, outer_stride, inner_stride, features;
  float eps;
};

struct RopeCall {
  void *query, *key;
  const void* value;            // null: keys and values are not stored
  void *key_cache, *value_cache;
  const int64_t *positions, *slots;
  const float* cos_sin;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  int64_t query_stride, key_stride, value_stride;
  int64_t key_block_stride, value_block_stride, block_size;
};

struct ActivationCall {
  const void* gate_up;
  void* out;
  int64_t num_rows, features, row_stride;
};

struct GreedyCall {
  const float* logits;
  int64_t num_rows, vocab_size, row_stride;
  int64_t* token_ids;           // the first of the largest
  uint8_t* is_finite;           // 0 if any logit is infinite or no number
};

// One instruction set's kernels, by dtype.
struct Kernels {
  void (*lora[2])(const LoraCall&, int num_threads, int phases);
  void (*adapted[2])(const GemmCall&, const LoraCall&, int num_threads);
  void (*attention[2])(const AttentionCall&, int num_threads);
  void (*gemm[2])(const GemmCall&, int num_threads);
  void (*gemm_int8[2])(const GemmCall&, int num_threads);
  void (*gather[2])(const GatherCall&, int num_threads);
  void (*norm[2])(const NormCall&, int num_threads);
  void (*rope[2])(const RopeCall&, int num_threads);
  void (*silu_mul[2])(const ActivationCall&, int num_threads);
  void (*greedy)(const GreedyCall&, int num_threads);
};

enum Isa : int32_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kNumIsas = 5 };

// Defined by isa.cpp, once per instruction set that the compiler and the architecture have.
const Kernels* kernels_plain();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_amx();  // if compiled with POMONA_AMX: not all compilers can

// threads.cpp
using Body = void (*)(void* state, int thread);
// Runs body on up to num_threads threads, the caller's among them, and returns when all are done.
void run_threads(int num_threads, Body body, void* state);
enum Purpose : int32_t {
  kSums, kRows, kPanel, kParts, kPages, kShrunk, kSegments, kAdapterPanel, kFixedRows, kSplitRows, kWideRows,
  kLaterSums, kShrinkInputs, kNumPurposes
};
// Memory of the calling thread that lives until its next call with the same purpose.
void* scratch(Purpose purpose, int64_t num_bytes);
// At least that many bytes of zeros, for the calling thread, until its next call.
const void* zeros(int64_t num_bytes);

}  // namespace pomona
