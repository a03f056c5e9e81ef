// One vector type for every instruction set: W float lanes, written with the compiler's vector extensions and, where
// they matter, intrinsics. Included by isa.cpp only, always inside its own anonymous namespace, so that code compiled
// for one instruction set can never be linked into another's kernels. For the same reason nothing here comes from the
// C++ standard library.
//
// Dot products work on *units* of 32 bits: one float, or two neighbouring bfloat16. A kernel written over units serves
// both dtypes. Every operation is a fixed sequence per output element, so that a row's result never depends on the
// rows computed beside it; multiply-adds are fused by hand and never by the compiler (-ffp-contract=off).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

#define INLINE inline __attribute__((always_inline))

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat_unit(const void* p) {
  uint32_t x;
  memcpy(&x, p, 4);
  return x - vu{};
}
INLINE vf load_floats(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store_floats(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vu load_units(const void* p) {
  vu v;
  memcpy(&v, p, sizeof v);
  return v;
}
// The first num_bytes, then zeros.
INLINE vu load_units_part(const void* p, int64_t num_bytes) {
  vu v = {};
  memcpy(&v, p, num_bytes);
  return v;
}
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// The larger lane; a NaN in b is dropped, one in a stays.
INLINE vf larger(vf a, vf b) { return b > a ? b : a; }

INLINE float fold_sum(vf v) {
  float x[W];
  memcpy(x, &v, sizeof v);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}
INLINE float fold_max(vf v) {
  float x[W];
  memcpy(x, &v, sizeof v);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) x[i] = x[i + width] > x[i] ? x[i + width] : x[i];
  return x[0];
}

#if defined(__AVX512F__)
INLINE __m512 add_pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
// Sums over the lanes of 8 vectors, each in the same order whatever the other seven hold.
INLINE void fold_sum8(const vf* v, float* sums) {
  __m512 a = add_pairs((__m512)v[0], (__m512)v[4]), b = add_pairs((__m512)v[2], (__m512)v[6]);
  __m512 c = add_pairs((__m512)v[1], (__m512)v[5]), d = add_pairs((__m512)v[3], (__m512)v[7]);
  __m512 even = add_pairs(a, b), odd = add_pairs(c, d);  // lanes of a 128-bit part: v0 v2 v4 v6, v1 v3 v5 v7
  __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(even, odd, 0x44), _mm512_shuffle_f32x4(even, odd, 0xEE));
  __m512 half = _mm512_add_ps(low, _mm512_shuffle_f32x4(low, low, 0xB1));
  __m128 e = _mm512_castps512_ps128(half), o = _mm512_extractf32x4_ps(half, 2);
  _mm_storeu_ps(sums, _mm_unpacklo_ps(e, o));
  _mm_storeu_ps(sums + 4, _mm_unpackhi_ps(e, o));
}
#else
INLINE void fold_sum8(const vf* v, float* sums) {
  for (int i = 0; i < 8; i++) sums[i] = fold_sum(v[i]);
}
#endif

// exp(x) with a relative error below 2e-7; 0 below -87.3, NaN for NaN, finite for everything else.
INLINE vf exp_lanes(vf x) {
  const vf clamped = x > splat(88.0f) ? splat(88.0f) : x;
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vf shifted = fma(clamped, splat(1.44269504088896341f), shifter);
  const vf n = shifted - shifter;
  vf r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  vf y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r) + splat(1.0f);
  const vf power = (vf)(((vu)shifted + 127u) << 23);
  return x < splat(-87.3f) ? vf{} : y * power;
}

INLINE vf widen(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }
// Round to nearest even, as torch does; NaN stays NaN.
INLINE vh narrow(vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x != x ? quiet : rounded, vh);
}

struct Float32 {
  using Elem = float;
  static constexpr int kPerUnit = 1;
  static INLINE vf load(const Elem* p) { return load_floats(p); }
  static INLINE void store(Elem* p, vf v) { store_floats(p, v); }
  static INLINE vf round(vf v) { return v; }
  static INLINE vf mul_add(vf acc, vu a, vu b) { return fma((vf)a, (vf)b, acc); }
  // The units made of one row, or of two rows' elements side by side.
  static INLINE vu units_of(const Elem* row, const Elem*, int n) {
    return n == W ? load_units(row) : load_units_part(row, n * 4);
  }
};

struct BFloat16 {
  using Elem = uint16_t;
  static constexpr int kPerUnit = 2;
  static INLINE vf load(const Elem* p) {
    vh bits;
    memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
  static INLINE void store(Elem* p, vf v) {
    const vh bits = narrow(v);
    memcpy(p, &bits, sizeof bits);
  }
  static INLINE vf round(vf v) { return widen(narrow(v)); }
  static INLINE vu units_of(const Elem* row, const Elem* other, int n) {
    vh low = {}, high = {};
    memcpy(&low, row, n == W ? sizeof low : n * sizeof *row);
    memcpy(&high, other, n == W ? sizeof high : n * sizeof *other);
    return __builtin_convertvector(low, vu) | (__builtin_convertvector(high, vu) << 16);
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

// The first n < W elements, then zeros; and the other way round.
template <class T>
INLINE vf load_part(const typename T::Elem* p, int64_t n) {
  typename T::Elem x[W] = {};
  memcpy(x, p, n * sizeof *p);
  return T::load(x);
}
template <class T>
INLINE void store_part(typename T::Elem* p, vf v, int64_t n) {
  typename T::Elem x[W];
  T::store(x, v);
  memcpy(p, x, n * sizeof *p);
}

// f(first lane, number of lanes) over n elements in vectors of W.
template <class F>
INLINE void for_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}
template <class T>
INLINE vf load_some(const typename T::Elem* p, int n) {
  return n == W ? T::load(p) : load_part<T>(p, n);
}
template <class T>
INLINE void store_some(typename T::Elem* p, vf v, int n) {
  if (n == W)
    T::store(p, v);
  else
    store_part<T>(p, v, n);
}

}  // namespace
