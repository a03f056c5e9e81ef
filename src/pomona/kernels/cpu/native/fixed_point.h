// Inputs as fixed point: their products with int8 weights are integers, and sums of those exact. Included by isa.cpp.
//
// Each block of 256 consecutive inputs has a scale of its own, the power of two that puts its largest magnitude between
// 2^14 and 2^15. A bfloat16 becomes one int16: what is at least 1/128 of the block's largest keeps its value, the rest
// moves by at most 2^-15 of that largest. A float32 becomes two, the second in units of 2^-15: 1/64 and 2^-30. A block
// whose largest is below 2^-96 counts as if it were that. A NaN or an infinity makes its block's scale NaN, and so all
// that its row becomes.
#pragma once
#include "rows.h"

namespace {

constexpr int64_t kBlockInputs = 256;  // the sum of 256 products of an int8 and an int16 is below 2^30
constexpr int64_t kBlockUnits = kBlockInputs / 2;
constexpr int kLowBits = 15;           // of a float32's second int16

// int16 of values below 2^15, in the order of load_two, by the trick of exp2_lanes.
template <class T>
INLINE void store_int16(void* to, const vf* shifted) {
  if constexpr (T::kPerUnit == 2) {
    const vu pairs = ((vu)shifted[0] & 0xffffu) | ((vu)shifted[1] << 16);
    memcpy(to, &pairs, sizeof pairs);
  } else {
    const vh halves[2] = {__builtin_convertvector((vu)shifted[0], vh), __builtin_convertvector((vu)shifted[1], vh)};
    memcpy(to, halves, sizeof halves);
  }
}

// A call's inputs: of each row its parts [kParts][blocks][128 units of two int16], then a scale per block.
template <class T>
struct FixedRows {
  static constexpr int kParts = T::kPerUnit == 1 ? 2 : 1;
  int64_t num_blocks, part_bytes, row_bytes;
  const char* rows;

  FixedRows(const pomona::GemmCall& call, int num_threads)
      : num_blocks(ceil_div(call.in_features, kBlockInputs)), part_bytes(num_blocks * kBlockInputs * 2) {
    // An odd number of cache lines: rows one below the other do not crowd out each other.
    row_bytes = (ceil_div(kParts * part_bytes + num_blocks * 4, 64) | 1) * 64;
    char* to = static_cast<char*>(pomona::scratch(pomona::kFixedRows, call.num_rows * row_bytes));
    rows = to;
    for_rows(call.num_rows, call.in_features / 4, num_threads, [&](int64_t row) {
      const auto* x = static_cast<const typename T::Elem*>(call.x) + row * call.x_stride;
      char* fixed = to + row * row_bytes;
      for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t first = block * kBlockInputs;
        char* to_block = fixed + first * 2;
        const float scale = fix(x + first, min64(kBlockInputs, call.in_features - first), to_block, part_bytes);
        memcpy(fixed + kParts * part_bytes + block * 4, &scale, 4);
      }
    });
  }

  // The magnitude of the largest, as bits: magnitudes order as their bits do, and infinities and NaN come last.
  INLINE static int32_t largest_of(const typename T::Elem* x, int64_t num_inputs) {
    vi largest = {};
    if constexpr (T::kPerUnit == 2) {
      vs pairs = {};
      for_lanes(num_inputs, LANES {
        const vs bits = (vs)(n == 2 * W ? load_units(x + i) : load_units_part(x + i, n * 2)) & (int16_t)0x7fff;
        pairs = bits > pairs ? bits : pairs;
      });
      const vi even = (vi)pairs << 16, odd = (vi)pairs & (int32_t)0xffff0000;
      largest = even > odd ? even : odd;
    } else {
      for_lanes(num_inputs, LANES {
        vf value[2];
        load_some<T>(x + i, n, value);
        for (int j = 0; j < 2; j++) {
          const vi bits = (vi)value[j] & 0x7fffffff;
          largest = bits > largest ? bits : largest;
        }
      });
    }
    return fold_max(largest);
  }

  // One block, of which the second part, if there is one, goes part_bytes after the first; returns its scale.
  INLINE static float fix(const typename T::Elem* x, int64_t num_inputs, char* to, int64_t part_bytes) {
    constexpr int32_t kExponent = 1 << 23, kLeast = 31 * kExponent, kNotFinite = 255 * kExponent;
    const int32_t exponent = largest_of(x, num_inputs) / kExponent * kExponent;
    const int32_t scale_bits = (exponent < kLeast ? kLeast : exponent) - 14 * kExponent;
    const int32_t inverse_bits = 254 * kExponent - scale_bits;
    float scale, inverse;
    memcpy(&scale, &scale_bits, 4);
    memcpy(&inverse, &inverse_bits, 4);
    const vf shifter = splat(12582912.0f), most = splat(32767.0f);  // the shifter is exp2_lanes'
    for_lanes(num_inputs, LANES {
      vf value[2], high[2], low[2];
      load_some<T>(x + i, n, value);
      for (int j = 0; j < 2; j++) {
        if (kParts == 1) {
          high[j] = fma(value[j], splat(inverse), shifter);
          continue;
        }
        value[j] *= splat(inverse);
        high[j] = (value[j] > most ? most : value[j]) + shifter;
        low[j] = fma(value[j] - (high[j] - shifter), splat(1 << kLowBits), shifter);
      }
      store_int16<T>(to + i * 2, high);
      if (kParts == 2) store_int16<T>(to + part_bytes + i * 2, low);
    });
    return exponent == kNotFinite ? NAN : scale;
  }
};

}  // namespace
