// What a kernel is written for: elements of a dtype, in memory and in vectors. Included by isa.cpp.
//
// Dot products work on *units* of 32 bits: one float, or two neighbouring bfloat16. A kernel written over units serves
// both dtypes.
#pragma once
#include "vec.h"

namespace {

#if defined(__AVX512BW__)
// 16-bit elements of the low and of the high half side by side.
INLINE __m512i interleave_halves(__m512i x) {
  alignas(64) static constexpr uint16_t kAlternately[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kAlternately), x);
}
#endif
INLINE vf widen(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }
// In the upper half of each, rounded to nearest even, as torch does. The lower half is what it may be. A NaN that
// arithmetic makes, or takes from a bfloat16, has zeros in its lower half, so it stays one.
INLINE vu round_upper(vf x) {
  const vu bits = (vu)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i upper = (__m256i)(round_upper(x) >> 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  return (vh)_mm256_castsi256_si128(packed);
#else
  return __builtin_convertvector(round_upper(x) >> 16, vh);
#endif
}

struct Float32 {
  using Elem = float;
  static constexpr int kPerUnit = 1;
  using Row = Float32;
  using Factor = vf;
  static constexpr int kHalves = 1;
  static INLINE vf half(vu units, int) { return (vf)units; }
  static INLINE vf half_lean(vu units, int) { return (vf)units; }
  static INLINE vf half_at(const void* units, int) { return (vf)load_units(units); }
  static INLINE void add(vf& sum, vf a, vf b) { add_product(sum, a, b); }
  static INLINE vf load(const Elem* p) { return load_floats(p); }
  static INLINE void store(Elem* p, vf v) { store_floats(p, v); }
  // 2 W elements, in their order.
  static INLINE void store_next(Elem* p, vf v, vf next) { store(p, v), store(p + W, next); }
  static INLINE vf round(vf v) { return v; }
  // Units of one row, or of two rows' elements side by side, in the elements' order.
  static INLINE vu pair(const Elem* row, const Elem*) { return load_units(row); }
  static INLINE vf mul_add(vf acc, vu a, vu b) { return fma((vf)a, (vf)b, acc); }
  // 2 W elements as two vectors, in whatever order is cheapest; store_two takes the same order.
  static INLINE void load_two(const Elem* p, vf* two) { two[0] = load(p), two[1] = load(p + W); }
  static INLINE void store_two(Elem* p, const vf* two) { store(p, two[0]), store(p + W, two[1]); }
  // Units of one row, or of two rows' elements side by side, in the order of load_two.
  static INLINE void pair_two(const Elem* row, const Elem*, void* units) { memcpy(units, row, 2 * W * 4); }
};

struct BFloat16 {
  using Elem = uint16_t;
  static constexpr int kPerUnit = 2;
  // What is multiplied: units as they are; or, where nothing multiplies these, floats of their even elements, then of
  // the odd ones. Row: what a product's rows are best made of, since each meets many columns.
#if defined(__AVX512BF16__)
  using Row = BFloat16;
  using Factor = vu;
  static constexpr int kHalves = 1;
  static INLINE vu half(vu units, int) { return units; }
  static INLINE vu half_lean(vu units, int) { return units; }
  static INLINE vu half_at(const void* units, int) { return load_units(units); }
  static INLINE void add(vf& sum, vu a, vu b) { sum = mul_add(sum, a, b); }
#else
  using Row = Float32;
  using Factor = vf;
  static constexpr int kHalves = 2;
  static INLINE vf half(vu units, int i) { return (vf)(i == 0 ? units << 16 : units & 0xffff0000u); }
  // The same without a register for the mask, which is read each time.
  static INLINE vf half_lean(vu units, int i) { return i == 0 ? (vf)(units << 16) : (vf)upper_half(units); }
  // The same, and units are read each time too.
  static INLINE vf half_at(const void* units, int i) {
    return i == 0 ? (vf)(load_units(units) << 16) : (vf)upper_half_at(units);
  }
  static INLINE void add(vf& sum, vf a, vf b) { add_product(sum, a, b); }
#endif
  static INLINE vf load(const Elem* p) {
    vh bits;
    memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
  static INLINE void store(Elem* p, vf v) {
    const vh bits = narrow(v);
    memcpy(p, &bits, sizeof bits);
  }
  static INLINE void store_next(Elem* p, vf v, vf next) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i low = (__m256i)(round_upper(v) >> 16), high = (__m256i)(round_upper(next) >> 16);
    const __m256i in_parts = _mm256_packus_epi32(low, high);  // of 64 bits, of which the middle two change places
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(in_parts, 0xD8));
#else
    store(p, v), store(p + W, next);
#endif
  }
#if defined(__AVX512BF16__)
  static INLINE vf round(vf v) { return widen(narrow(v)); }
#else
  static INLINE vf round(vf v) { return (vf)(round_upper(v) & 0xffff0000u); }
#endif
  // Even elements, odd elements: unlike widening, that takes no shuffles.
  static INLINE void load_two(const Elem* p, vf* two) {
    const vu pairs = load_units(p);
    two[0] = (vf)(pairs << 16);
    two[1] = (vf)(pairs & 0xffff0000u);
  }
  static INLINE void store_two(Elem* p, const vf* two) {
#if defined(__AVX512BF16__)
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)two[1], (__m512)two[0]);
    _mm512_storeu_si512(p, interleave_halves(halves));
#else
    const vu pairs = (round_upper(two[0]) >> 16) | (round_upper(two[1]) & 0xffff0000u);
    memcpy(p, &pairs, sizeof pairs);
#endif
  }
  static INLINE vu pair(const Elem* row, const Elem* other) {
    vh bits[2];
    memcpy(&bits[0], row, sizeof(vh));
    memcpy(&bits[1], other, sizeof(vh));
    return __builtin_convertvector(bits[0], vu) | (__builtin_convertvector(bits[1], vu) << 16);
  }
  static INLINE void pair_two(const Elem* row, const Elem* other, void* units) {
    const vu a = load_units(row), b = load_units(other);
    const vu both[2] = {(a & 0xffffu) | (b << 16), (a >> 16) | (b & 0xffff0000u)};
    memcpy(units, both, sizeof both);
  }
  static INLINE vf mul_add(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = fma((vf)(a << 16), (vf)(b << 16), acc);
    return fma((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), acc);
#endif
  }
};

// The same for the first n < 2 W elements; the others are zeros, or not stored.
template <class T>
INLINE void load_two_part(const typename T::Elem* p, int64_t n, vf* two) {
  typename T::Elem x[2 * W] = {};
  memcpy(x, p, n * sizeof *p);
  T::load_two(x, two);
}
template <class T>
INLINE void store_two_part(typename T::Elem* p, const vf* two, int64_t n) {
  typename T::Elem x[2 * W];
  T::store_two(x, two);
  memcpy(p, x, n * sizeof *p);
}

// f(first element, number of elements) over all elements, 2 W at a time and what is left at the end.
// f must be inlined, so that the usual case is compiled for itself.
#define LANES [&](int64_t i, int n) __attribute__((always_inline))
template <class F>
INLINE void for_lanes(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) f(i, 2 * W);
  if (i < count) f(i, static_cast<int>(count - i));
}
// n <= W elements.
template <class T>
INLINE vf load_one(const typename T::Elem* p, int n) {
  if (n == W) return T::load(p);
  typename T::Elem x[W] = {};
  memcpy(x, p, n * sizeof *p);
  return T::load(x);
}
template <class T>
INLINE void store_one(typename T::Elem* p, vf v, int n) {
  if (n == W) return T::store(p, v);
  typename T::Elem x[W];
  T::store(x, v);
  memcpy(p, x, n * sizeof *p);
}
template <class T>
INLINE void load_some(const typename T::Elem* p, int n, vf* two) {
  n == 2 * W ? T::load_two(p, two) : load_two_part<T>(p, n, two);
}
template <class T>
INLINE void pair_some(const typename T::Elem* row, const typename T::Elem* other, int64_t n, void* units) {
  if (n == 2 * W) return T::pair_two(row, other, units);
  typename T::Elem rest[2][2 * W] = {};
  memcpy(rest[0], row, n * sizeof *row);
  memcpy(rest[1], other, n * sizeof *row);
  T::pair_two(rest[0], rest[1], units);
}
template <class T>
INLINE void store_some(typename T::Elem* p, const vf* two, int n) {
  n == 2 * W ? T::store_two(p, two) : store_two_part<T>(p, two, n);
}

}  // namespace
