// The C ABI that binding.py loads: picks the instruction set, copies arguments into call structures, checks nothing.
// Calls can be recorded while they run, and a whole recording run again in one call (kernels/cpu/recording.py).
#if defined(POMONA_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <variant>
#include <vector>

#include "api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace pomona;

#if defined(POMONA_AMX)
// Whether there are tile registers, and the system lets this process use them.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAll) != kAll) return false;
  constexpr long kAskForFeature = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return kAvx512;
#if defined(POMONA_AMX)
      if (has_amx()) return kAmx;
#endif
      return kAvx512Bf16;
    }
    return kAvx2;
  }
#endif
  return kPlain;
}

const Kernels* kernels_of(int isa) {
#if defined(__x86_64__)
  switch (isa) {
    case kAvx2: return kernels_avx2();
    case kAvx512: return kernels_avx512();
    case kAvx512Bf16: return kernels_avx512bf16();
#if defined(POMONA_AMX)
    case kAmx: return kernels_amx();
#endif
  }
#endif
  return kernels_plain();
}

const Kernels* kernels = kernels_of(best_isa());
int current_isa = best_isa();

// Any other kernel: everything it is told is in its call.
template <class Call>
struct Task {
  using Kernel = void (*)(const Call&, int);
  Kernel (Kernels::*kernel)[2];
  int dtype, num_threads;
  Call call;
  void run() const { (kernels->*kernel)[dtype](call, num_threads); }
};

struct LoraTask {
  int dtype, num_threads, phases;
  LoraCall call;
  void run() const { kernels->lora[dtype](call, num_threads, phases); }
};

// A product, and then the adapters' part of it.
struct AdaptedTask {
  int dtype, num_threads;
  GemmCall base;
  LoraCall adapters;
  void run() const { kernels->adapted[dtype](base, adapters, num_threads); }
};

struct AttentionTask {
  int dtype, num_threads;
  const AttentionStep* step;
  AttentionCall call;
  void run() const {
    AttentionCall now = call;
    static_cast<AttentionStep&>(now) = *step;
    kernels->attention[dtype](now, num_threads);
  }
};

using Recorded = std::variant<LoraTask, AdaptedTask, AttentionTask, Task<GemmCall>, Task<GatherCall>, Task<NormCall>,
                              Task<RopeCall>, Task<ActivationCall>>;

using Recording = std::vector<Recorded>;

thread_local Recording* recording = nullptr;

template <class T>
void perform(const T& task) {
  task.run();
  if (recording != nullptr) recording->push_back(task);
}

}  // namespace

// Changes whenever a signature or structure does: binding.py refuses a library of another number.
EXPORT int pomona_abi() { return 8; }

EXPORT int pomona_best_isa() { return best_isa(); }

EXPORT int pomona_isa() { return current_isa; }

EXPORT void pomona_set_isa(int isa) {
  current_isa = isa;
  kernels = kernels_of(isa);
}

EXPORT void pomona_lora(int dtype, int num_threads, int phases, const LoraSite* site, const LoraStep* step,
                        const int32_t* ranks, const float* scalings, const void* x, int64_t x_stride, void* out,
                        int64_t out_stride, float* v) {
  perform(LoraTask{dtype, num_threads, phases, {site, step, ranks, scalings, x, x_stride, out, out_stride, v}});
}

EXPORT void pomona_attention(int dtype, int num_threads, const AttentionStep* step, const void* query,
                             int64_t query_row_stride, int64_t query_head_stride, int64_t num_heads,
                             const void* key_cache, const void* value_cache, int64_t key_block_stride,
                             int64_t value_block_stride, int64_t block_size, int64_t num_kv_heads, int64_t head_dim,
                             int64_t window, float scale, void* out) {
  AttentionCall call{};
  call.query = query;
  call.query_row_stride = query_row_stride;
  call.query_head_stride = query_head_stride;
  call.num_heads = num_heads;
  call.key_cache = key_cache;
  call.value_cache = value_cache;
  call.key_block_stride = key_block_stride;
  call.value_block_stride = value_block_stride;
  call.block_size = block_size;
  call.num_kv_heads = num_kv_heads;
  call.head_dim = head_dim;
  call.window = window;
  call.scale = scale;
  call.out = out;
  perform(AttentionTask{dtype, num_threads, step, call});
}

EXPORT void pomona_gemm(int dtype, int num_threads, const void* x, int64_t num_rows, int64_t x_stride,
                        const void* packed, const float* scales, const void* bias, void* out, int64_t in_features,
                        int64_t out_features, int is_out_float) {
  perform(Task<GemmCall>{scales ? &Kernels::gemm_int8 : &Kernels::gemm, dtype, num_threads,
                         {x, num_rows, x_stride, packed, scales, bias, out, out_features, in_features, out_features,
                          is_out_float, nullptr, nullptr}});
}

EXPORT void pomona_adapted_gemm(int dtype, int num_threads, const void* x, int64_t num_rows, int64_t x_stride,
                                const void* packed, const float* scales, const void* bias, void* out,
                                int64_t in_features, int64_t out_features, const LoraSite* site, const LoraStep* step,
                                const int32_t* ranks, const float* lora_scalings) {
  perform(AdaptedTask{
      dtype, num_threads,
      {x, num_rows, x_stride, packed, scales, bias, out, out_features, in_features, out_features, 0, nullptr, nullptr},
      {site, step, ranks, lora_scalings, x, x_stride, out, out_features, nullptr}});
}

EXPORT void pomona_norm(int dtype, int num_threads, const void* x, void* residual, const void* weight, void* out,
                        int64_t num_outer, int64_t num_inner, int64_t outer_stride, int64_t inner_stride,
                        int64_t features, float eps) {
  perform(Task<NormCall>{&Kernels::norm, dtype, num_threads,
                         {x, residual, weight, out, num_outer, num_inner, outer_stride, inner_stride, features, eps}});
}

EXPORT void pomona_rope(int dtype, int num_threads, void* query, void* key, const void* value, void* key_cache,
                        void* value_cache, const int64_t* positions, const int64_t* slots, const float* cos_sin,
                        int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                        int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t key_block_stride,
                        int64_t value_block_stride, int64_t block_size) {
  perform(Task<RopeCall>{&Kernels::rope, dtype, num_threads,
                         {query, key, value, key_cache, value_cache, positions, slots, cos_sin, num_tokens, num_heads,
                          num_kv_heads, head_dim, query_stride, key_stride, value_stride, key_block_stride,
                          value_block_stride, block_size}});
}

EXPORT void pomona_greedy(int num_threads, const float* logits, int64_t num_rows, int64_t vocab_size,
                          int64_t row_stride, int64_t* token_ids, uint8_t* is_finite) {
  kernels->greedy({logits, num_rows, vocab_size, row_stride, token_ids, is_finite}, num_threads);
}

EXPORT void pomona_silu_mul(int dtype, int num_threads, const void* gate_up, void* out, int64_t num_rows,
                            int64_t features, int64_t row_stride) {
  perform(Task<ActivationCall>{&Kernels::silu_mul, dtype, num_threads, {gate_up, out, num_rows, features, row_stride}});
}

EXPORT void pomona_gather(int dtype, int num_threads, const void* packed, const float* scales, const int64_t* row_ids,
                          void* out, int64_t num_rows, int64_t in_features, int is_grouped) {
  perform(Task<GatherCall>{
      &Kernels::gather, dtype, num_threads, {packed, scales, row_ids, out, num_rows, in_features, is_grouped}});
}

// From here to pomona_end_recording, what this thread calls is run and recorded.
EXPORT void* pomona_begin_recording() { return recording = new Recording; }

EXPORT void pomona_end_recording() { recording = nullptr; }

EXPORT void pomona_free_recording(void* made) { delete static_cast<Recording*>(made); }

// The same calls again, with the same arguments: whatever they point to is read anew.
EXPORT void pomona_replay(const void* made) {
  for (const Recorded& recorded : *static_cast<const Recording*>(made))
    std::visit([](const auto& task) { task.run(); }, recorded);
}

// ranks_and_scalings: two addresses for each recorded LoRA call, in order.
EXPORT void pomona_set_ranks(void* made, const void* const* ranks_and_scalings) {
  for (Recorded& recorded : *static_cast<Recording*>(made)) {
    LoraCall* call = nullptr;
    if (LoraTask* task = std::get_if<LoraTask>(&recorded)) call = &task->call;
    if (AdaptedTask* task = std::get_if<AdaptedTask>(&recorded)) call = &task->adapters;
    if (call == nullptr) continue;
    call->ranks = static_cast<const int32_t*>(*ranks_and_scalings++);
    call->scalings = static_cast<const float*>(*ranks_and_scalings++);
  }
}
