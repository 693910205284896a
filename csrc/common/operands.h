// The two operands of product.h, compiled once per instruction set.
//
//   left   row-major, one Element per number: bfloat16 where the CPU multiplies pairs of it, float elsewhere. Rows come
//   in
//          whole blocks and depth in whole steps, zeros beyond what the caller has.
//   right  panels of kPanel columns, [words][kPanel]: a Word is one float, or two bfloat16 of neighbouring depth. AMX
//          reads the same panels as tiles.
#pragma once
#include <type_traits>

#include "common/simd.h"
#include "common/transpose.h"

#if defined(__AMX_BF16__) || defined(PGOLF_EMULATE_AMX)
#define PGOLF_TILES 1
#else
#define PGOLF_TILES 0
#endif

namespace pgolf::PGOLF_ISA {

#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPairs = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kPairs = false;
#endif
template <class T>
constexpr bool kTiles = PGOLF_TILES && kPairs<T>;

template <class T>
using Element = std::conditional_t<kPairs<T>, bf16, float>;
template <class T>
using Word = std::conditional_t<kPairs<T>, uint32_t, float>;

constexpr int64_t kPanel = 2 * kLanes;
// What the registers hold: four tiles, or as many rows of two vectors as leave room for two columns and a broadcast.
template <class T>
constexpr int kBlockRows = kTiles<T>      ? 32
                           : kLanes == 16 ? 14
                                          : 5;
template <class T>
constexpr int64_t kDepthStep = kTiles<T>   ? 32
                               : kPairs<T> ? 2
                                           : 1;
template <class T>
constexpr int64_t kPerWord = kPairs<T> ? 2 : 1;
// Depth of a panel that stays in the first-level cache: 32 KB; half of it in float32, where the length of a sum decides
// the result's error: sums of 128 are as exact as MKL's, sums of 256 lose a fifth and gain 2 %.
template <class T>
constexpr int64_t kChunk = kPairs<T> ? 512 : 128;

PGOLF_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
PGOLF_INLINE int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Hands out pieces of one block of working memory, a cache line apart; from a null pointer it measures what they take.
struct Memory {
  char* at;
  template <class X>
  X* take(int64_t n) {
    X* piece = (X*)at;
    at += round_up(n * (int64_t)sizeof(X), 64) + 64;
    return piece;
  }
};

// Words of a panel.
template <class T>
PGOLF_INLINE int64_t words(int64_t depth) {
  return round_up(depth, kDepthStep<T>) / kPerWord<T>;
}

// Elements from one row of a left operand to the next. One cache line more than needed: at a pitch of a power of two
// the rows of a block would share cache sets.
template <class T>
PGOLF_INLINE int64_t left_pitch(int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(Element<T>);
  return round_up(depth, kLine) + kLine;
}

template <class T>
struct Left {
  Element<T>* data;
  int64_t pitch;
  int64_t rows;  // storage goes on to a whole block
};

// Elements that a left operand of rows x depth needs.
template <class T>
PGOLF_INLINE int64_t left_size(int64_t rows, int64_t depth) {
  return round_up(rows, kBlockRows<T>) * left_pitch<T>(depth);
}

template <class T>
PGOLF_INLINE void convert_row(const T* in, int64_t n, Element<T>* out) {
  if constexpr (std::is_same_v<T, Element<T>>) {
    memcpy(out, in, n * sizeof(T));
  } else {
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes) store(out + k, load(in + k));
    for (; k < n; ++k) out[k] = load_one(in + k);
  }
}

// Zeros in rows and depth that pad a left operand.
template <class T>
PGOLF_INLINE void zero_left_padding(const Left<T>& left, int64_t depth) {
  const int64_t steps = round_up(depth, kDepthStep<T>), blocks = round_up(left.rows, kBlockRows<T>);
  for (int64_t i = 0; steps > depth && i < left.rows; ++i)
    memset(left.data + i * left.pitch + depth, 0, (steps - depth) * sizeof(Element<T>));
  for (int64_t i = left.rows; i < blocks; ++i) memset(left.data + i * left.pitch, 0, steps * sizeof(Element<T>));
}

// A left operand from any rows: row(i) is the address of row i, depth numbers.
template <class T, class Row>
PGOLF_INLINE Left<T> pack_left(int64_t rows, int64_t depth, Element<T>* out, const Row& row) {
  const Left<T> left = {out, left_pitch<T>(depth), rows};
  for (int64_t i = 0; i < rows; ++i) convert_row<T>(row(i), depth, out + i * left.pitch);
  zero_left_padding(left, depth);
  return left;
}

// Word k of a row of n numbers.
template <class T>
PGOLF_INLINE Word<T> word_of(const T* row, int64_t k, int64_t n) {
  if constexpr (kPairs<T>) {
    return (2 * k < n ? row[2 * k].bits : 0) | uint32_t(2 * k + 1 < n ? row[2 * k + 1].bits : 0) << 16;
  } else {
    return k < n ? load_one(row + k) : 0;
  }
}

// A panel whose column j is row j of w, as in y = x w^T: w [columns, depth] with `pitch` numbers from row to row,
// columns <= kPanel.
template <class T>
PGOLF_INLINE void pack_transposed(const T* w, int64_t pitch, int64_t columns, int64_t depth, Word<T>* out) {
  const int64_t n = words<T>(depth);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(Element<T>)) {
    constexpr int64_t kPerLine = 64 / sizeof(T);
    for (int64_t k = 0; k < n; k += 16) {
      const int64_t left = depth - k * kPerWord<T>, count = left < kPerLine ? (left > 0 ? left : 0) : kPerLine;
      const __mmask32 inside = count == 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
      for (int64_t first = 0; first < kPanel; first += 16) {
        __m512i x[16];
        for (int j = 0; j < 16; ++j) {
          const T* at = w + (first + j) * pitch + k * kPerWord<T>;
          const __mmask32 mask = first + j < columns ? inside : 0;
          x[j] = sizeof(T) == 2 ? _mm512_maskz_loadu_epi16(mask, at) : _mm512_maskz_loadu_epi32(__mmask16(mask), at);
        }
        transpose16(x);
        for (int i = 0; i < 16 && k + i < n; ++i) memcpy(out + (k + i) * kPanel + first, &x[i], 64);
      }
    }
    return;
  }
#endif
  for (int64_t j = 0; j < kPanel; ++j)
    for (int64_t k = 0; k < n; ++k) out[k * kPanel + j] = j < columns ? word_of(w + j * pitch, k, depth) : Word<T>(0);
}

// A panel of the `columns` first columns of b [depth, ...] with `pitch` numbers from row to row, columns <= kPanel.
template <class T>
PGOLF_INLINE void pack_columns(const T* b, int64_t pitch, int64_t columns, int64_t depth, Word<T>* out) {
  const int64_t n = words<T>(depth);
  const bool whole = columns == kPanel;
  const auto at = [&](int64_t row, int64_t j) __attribute__((always_inline)) -> vi {  // bits of kLanes numbers
    if (row >= depth) return vi{};
    const T* p = b + row * pitch + j;
    T part[kLanes] = {};
    if (!whole) {
      for (int64_t i = 0; i < kLanes && j + i < columns; ++i) part[i] = p[i];
      p = part;
    }
    if constexpr (kPairs<T>) return __builtin_convertvector(read<vh>(p), vi);
    return (vi)load((const T*)p);
  };
  for (int64_t k = 0; k < n; ++k)
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      vi x = at(k * kPerWord<T>, j);
      if constexpr (kPairs<T>) x |= at(2 * k + 1, j) << 16;
      memcpy(out + k * kPanel + j, &x, sizeof x);
    }
}

}  // namespace pgolf::PGOLF_ISA
