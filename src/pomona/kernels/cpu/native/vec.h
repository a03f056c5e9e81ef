// One vector type for every instruction set: W float lanes, written with the compiler's vector extensions and, where
// they matter, intrinsics. Included by isa.cpp only, always inside its own anonymous namespace, so that code compiled
// for one instruction set can never be linked into another's kernels. For the same reason nothing here comes from the
// C++ standard library.
//
// Every operation is a fixed sequence per output element, so that a row's result never depends on the rows computed
// beside it; multiply-adds are fused by hand and never by the compiler (-ffp-contract=off). Units of 32 bits are those
// of elements.h.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
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
typedef int8_t vb __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 4)));

#define INLINE inline __attribute__((always_inline))

constexpr INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
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
INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// sum = a * b + sum, in the register that has the sum. Compilers move sums between registers as they like, and a tile
// leaves none of the sixteen free: some sums would be stored and loaded again with every step.
INLINE void add_product(vf& sum, vf a, vf b) {
#if defined(__FMA__) && !defined(__AVX512F__)
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = fma(a, b, sum);
#endif
}
// The upper half of each, and zeros. The mask comes from memory: for the same reason.
INLINE vu upper_half(vu units) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  alignas(32) static constexpr uint32_t kMask[W] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                    0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
  vu upper;
  __asm__("vpand %2, %1, %0" : "=x"(upper) : "x"(units), "m"(kMask));
  return upper;
#else
  return units & 0xffff0000u;
#endif
}
// The same of units in memory. They are read here, whoever has read them before: a register that keeps them from one
// half to the other is one too few for the sums of a tile that fetches beside.
INLINE vu upper_half_at(const void* units) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  vu upper;
  __asm__("vmovdqu %1, %0" : "=x"(upper) : "m"(*static_cast<const char(*)[W * 4]>(units)));
  return upper_half(upper);
#else
  return upper_half(load_units(units));
#endif
}
// The larger lane; a NaN in b is dropped, one in a stays.
INLINE vf larger(vf a, vf b) { return b > a ? b : a; }

#if defined(__AVX512F__)
INLINE float fold_sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float fold_max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE int32_t fold_max(vi v) { return _mm512_reduce_max_epi32((__m512i)v); }
#else
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
INLINE int32_t fold_max(vi v) {
  int32_t most = v[0];
  for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
  return most;
}
#endif

#if defined(__AVX512F__)
INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
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
#elif defined(__AVX2__)
// Sums over the lanes of 8 vectors, in the order of fold_sum.
INLINE void fold_sum8(const vf* v, float* sums) {
  __m256 halves[4];  // of vectors i and i + 4: lanes 0 to 3 with 4 to 7
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256 a = (__m256)v[i], b = (__m256)v[i + 4];
    halves[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  const auto fold = [](__m256 a, __m256 b) {
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b));
    return _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
  };
  const __m256 first = fold(halves[0], halves[1]), second = fold(halves[2], halves[3]);
  const __m256 even = _mm256_shuffle_ps(first, second, 0x88), odd = _mm256_shuffle_ps(first, second, 0xDD);
  _mm256_storeu_ps(sums, _mm256_add_ps(even, odd));
}
#else
INLINE void fold_sum8(const vf* v, float* sums) {
  for (int i = 0; i < 8; i++) sums[i] = fold_sum(v[i]);
}
#endif

// 2^x with a relative error below 3e-7; 0 far below, NaN for NaN, for x of at most 127.
INLINE vf exp2_lanes(vf x) {
  const vf low = splat(-160.0f);
  x = low > x ? low : x;
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vf shifted = x + shifter, n = shifted - shifter, f = x - n;
  vf y = splat(1.535336188e-4f);
  y = fma(y, f, splat(1.339887440e-3f));
  y = fma(y, f, splat(9.618437357e-3f));
  y = fma(y, f, splat(5.550332548e-2f));
  y = fma(y, f, splat(2.402264791e-1f));
  y = fma(y, f, splat(6.931472028e-1f));
  y = fma(y, f, splat(1.0f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const vf power = (vf)(((vu)shifted + 127u) << 23);
  return x < splat(-126.0f) ? vf{} : y * power;
#endif
}
constexpr float kLog2E = 1.44269504088896341f;

// W units of two int16, from bytes.
INLINE vu widen_bytes(const int8_t* p) {
#if defined(__AVX512BW__)
  return (vu)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vb bytes;
  memcpy(&bytes, p, sizeof bytes);
  return (vu)__builtin_convertvector(bytes, vs);
#endif
}
// acc + both products of each unit: no sum of the two is as large as 2^31.
INLINE vi add_dot(vi acc, vu a, vu b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

}  // namespace
