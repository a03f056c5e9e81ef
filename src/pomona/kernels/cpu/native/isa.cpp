// All kernels for one instruction set. Compiled once per set, with its flags and POMONA_KERNELS naming the table.
#include "adapted.h"
#include "attention.h"
#include "rows.h"

namespace pomona {

const Kernels* POMONA_KERNELS() {
  static constexpr Kernels table = {
      {lora<Float32>, lora<BFloat16>},           {adapted<Float32>, adapted<BFloat16>},
      {attention<Float32>, attention<BFloat16>},
      {dense<Float32>, dense<BFloat16>},         {gemm_int8<Float32>, gemm_int8<BFloat16>},
      {gather<Float32>, gather<BFloat16>},       {norm<Float32>, norm<BFloat16>},
      {rope<Float32>, rope<BFloat16>},           {silu_mul<Float32>, silu_mul<BFloat16>},
      greedy,
  };
  return &table;
}

}  // namespace pomona
