// The transpose of 16 by 16 units, and rows laid out as columns by it. Included by isa.cpp.
#pragma once
#include "vec.h"

namespace {

#if defined(__AVX512F__)
// 16 rows of 16 units -> their transpose.
INLINE void transpose_units(const char* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + offset);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
  }
}
#else
INLINE void transpose_units(const char* const* rows, int64_t offset, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; i++) {
    uint32_t row[16];
    memcpy(row, rows[i] + offset, sizeof row);
    for (int unit = 0; unit < 16; unit++) out[unit * stride + i] = row[unit];
  }
}
#endif

// 16 rows of num_bytes as columns of units: out[unit][row], zeros after the last byte up to 16 whole units. fetch() is
// called before each 16 units.
template <class F>
INLINE void lay_out_units(const char* const* rows, int64_t num_bytes, uint32_t* out, int64_t stride, const F& fetch) {
  const int64_t whole = num_bytes / 64 * 64;
  for (int64_t at = 0; at < whole; at += 64) {
    fetch();
    transpose_units(rows, at, out + at / 4 * stride, stride);
  }
  if (whole == num_bytes) return;
  char rest[16][64] = {};
  const char* rest_rows[16];
  for (int i = 0; i < 16; i++) {
    memcpy(rest[i], rows[i] + whole, num_bytes - whole);
    rest_rows[i] = rest[i];
  }
  transpose_units(rest_rows, 0, out + whole / 4 * stride, stride);
}

}  // namespace
