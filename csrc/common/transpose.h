// Transposing in registers, once per instruction set.
#pragma once
#include "common/simd.h"

namespace pgolf::PGOLF_ISA {

#if defined(__AVX512F__)
// Rows of 16 words become columns.
PGOLF_INLINE void transpose16(__m512i (&x)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // x[4 i + j]: words j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3
    x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}
#endif

// w[j][i] = sums[i][j] for the first `count` of 2 kLanes columns; w has `pitch` numbers from row to row.
template <class T>
PGOLF_INLINE void store_transposed(const float* sums, int64_t rows, int64_t pitch, int64_t count, T* w) {
  constexpr int64_t kColumns = 2 * kLanes;
  for (int64_t i = 0; i < rows; i += 16) {
    const int64_t n = rows - i < 16 ? rows - i : 16;
    float block[kColumns][16];
#if defined(__AVX512F__)
    for (int half = 0; half < 2; ++half) {
      __m512i x[16];
      for (int r = 0; r < 16; ++r)
        x[r] = r < n ? _mm512_loadu_si512(sums + (i + r) * kColumns + 16 * half) : _mm512_setzero_si512();
      transpose16(x);
      memcpy(block[16 * half], x, sizeof x);
    }
#else
    for (int64_t r = 0; r < 16; ++r)
      for (int64_t j = 0; j < kColumns; ++j) block[j][r] = r < n ? sums[(i + r) * kColumns + j] : 0;
#endif
    for (int64_t j = 0; j < count; ++j) {
      T row[16];
      for (int r = 0; r < 16; r += kLanes) store(row + r, load(block[j] + r));
      memcpy(w + j * pitch + i, row, n * sizeof(T));
    }
  }
}

}  // namespace pgolf::PGOLF_ISA
