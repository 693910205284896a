// The loops of newton_schulz_kernels.h, compiled once per instruction set by newton_schulz_<isa>.cpp, which defines
// PGOLF_ISA.
//
// The surprise: no function here handles a tail. Matrices have room for whole panels and blocks, and what lies around
// the numbers is zero and stays so, because sums of products with zeros are zeros.
#include <type_traits>

#include "common/product.h"
#include "newton_schulz/newton_schulz_kernels.h"

namespace pgolf::newton_schulz::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

template <class T>
int64_t storage_rows(int64_t rows) {
  const int64_t blocks = rows + kBlockRows<T> - 1, panels = round_up(rows, kPanel);
  return blocks > panels ? blocks : panels;
}

template <class T>
int64_t bytes(int64_t rows, int64_t columns) {
  return storage_rows<T>(rows) * left_pitch<T>(columns) * (int64_t)sizeof(T);
}

template <class T>
int64_t product_bytes(int64_t rows) {
  return (kPanel * kChunk<T> / kPerWord<T> + sums_size<T>(rows)) * 4;
}

template <class T>
void clear(void* matrix, int64_t rows, int64_t columns) {
  const int64_t pitch = left_pitch<T>(columns), tail = round_up(columns, kPanel) - columns;
  T* m = (T*)matrix;
  memset(m + rows * pitch, 0, (storage_rows<T>(rows) - rows) * pitch * sizeof(T));
  for (int64_t i = 0; tail && i < rows; ++i) memset(m + i * pitch + columns, 0, tail * sizeof(T));
}

// A square of kPanel x kPanel becomes its transpose elsewhere.
template <class T>
PGOLF_INLINE void transpose_square(const T* in, int64_t pitch, T* out, int64_t out_pitch) {
#if defined(__AVX512F__)
  constexpr int64_t kRows = 16 * sizeof(float) / sizeof(T);  // of the input, in one line of the output
  for (int64_t i = 0; i < kPanel; i += kRows)
    for (int64_t j = 0; j < kPanel; j += 16) {
      __m512i x[16];
      for (int r = 0; r < 16; ++r) {
        const T* at = in + (i + r * kRows / 16) * pitch + j;
        if constexpr (sizeof(T) == 2) {
          const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
          const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + pitch)));
          x[r] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        } else {
          x[r] = _mm512_loadu_si512(at);
        }
      }
      transpose16(x);
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + (j + r) * out_pitch + i, x[r]);
    }
#else
  for (int64_t j = 0; j < kPanel; ++j)
    for (int64_t i = 0; i < kPanel; ++i) out[j * out_pitch + i] = in[i * pitch + j];
#endif
}

// nothrow: or the tiles' release below would bring in the linker's shared exception handler.
template <class T>
__attribute__((nothrow)) void multiply_panels(const Product& q, int64_t first, int64_t last, void* memory) {
  Word<T>* packed = (Word<T>*)memory;
  float* sums = (float*)(packed + kPanel * kChunk<T> / kPerWord<T>);
  const Left<T> left = {(T*)q.left, left_pitch<T>(q.depth), q.rows};
  const T *right = (const T*)q.right, *u = (const T*)q.u, *u_low = (const T*)q.u_low, *v = (const T*)q.v;
  T *out = (T*)q.out, *out_low = (T*)q.out_low;
  const int64_t right_pitch = left_pitch<T>(q.transposed ? q.depth : q.columns), pitch = left_pitch<T>(q.columns);
  const auto from = [&](int64_t p) { return q.symmetric ? p * kPanel : 0; };
  const auto panel = [&](int64_t p, int64_t word, int64_t count) {
    const int64_t k = word * kPerWord<T>, left = q.depth - k, n = count * kPerWord<T>;
    q.transposed
        ? pack_transposed<T>(right + p * kPanel * right_pitch + k, right_pitch, kPanel, left < n ? left : n, packed)
        : pack_columns<T>(right + k * right_pitch + p * kPanel, right_pitch, kPanel, left < n ? left : n, packed);
    return (const Word<T>*)packed;
  };
  // Not inlined: the compiler would write it out once per step of product(), and spend a sixth of the time on
  // addresses.
  const auto emit = [&](int64_t i, int64_t p, float* c) __attribute__((noinline)) {
    const int64_t column = p * kPanel, at = i * pitch + column;
#pragma GCC unroll 2
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      vf x = q.alpha * load(c + j);
      if (u) x += q.beta * load(u + at + j);
      if (u_low) x += q.beta * load(u_low + at + j);
      if (v) x += q.gamma * load(v + at + j);
      store(out + at + j, x);
      if (out_low) store(out_low + at + j, x - load(out + at + j));
      store(c + j, x);
    }
    if (!q.symmetric) return;
    if (i < column + kPanel) {
      q.diagonal[i] = c[i - column];
    } else if ((i + 1) % kPanel == 0 || i + 1 == q.rows) {
      const int64_t row = i / kPanel * kPanel;
      transpose_square(out + row * pitch + column, pitch, out + column * pitch + row, pitch);
    }
  };
  product<T>(left, q.depth, first, last, sums, from, panel, emit);
}

template <class T>
void multiply_in_tiles(const Product& q, int64_t first, int64_t last, void* memory) {
  const TileScope tiles;
  (void)tiles;
  multiply_panels<T>(q, first, last, memory);
}

template <class T>
float take_mean(double shift, const float* diagonal, int64_t n, void* matrix, void* low) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += diagonal[i];
  const float mean = float(shift + total / n);
  T *m = (T*)matrix, *l = (T*)low;
  for (int64_t i = 0, at = 0; i < n; ++i, at += left_pitch<T>(n) + 1) {
    const vf x = splat(float(shift + diagonal[i] - mean));
    T rounded[kLanes], lost[kLanes];
    store(rounded, x);
    store(lost, x - load(rounded));
    m[at] = rounded[0];
    if (l) l[at] = lost[0];
  }
  return mean;
}

template <class In>
void squares_as(const Lines& g, bool lines_are_rows, float* part, float* sums) {
  const In* line = (const In*)g.data;
  if (lines_are_rows) {
    for (int64_t i = 0; i < g.count; ++i, line += g.stride) {
      vf acc[4] = {};
      int64_t j = 0;
      for (; j + 4 * kLanes <= g.length; j += 4 * kLanes)
        for (int a = 0; a < 4; ++a) {
          const vf x = load(line + j + a * kLanes);
          acc[a] += x * x;
        }
      float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
      for (; j < g.length; ++j) total += load_one(line + j) * load_one(line + j);
      sums[i] = total;
    }
    return;
  }
  constexpr int64_t kLinesPerPart = 32;  // added up apart: the error of one long float32 sum would show in the result
  memset(sums, 0, g.length * sizeof(float));
  for (int64_t first = 0; first < g.count; first += kLinesPerPart) {
    memset(part, 0, g.length * sizeof(float));
    for (int64_t i = first; i < g.count && i < first + kLinesPerPart; ++i, line += g.stride)
      for (int64_t j = 0; j < g.length; ++j) part[j] += load_one(line + j) * load_one(line + j);
    for (int64_t j = 0; j < g.length; ++j) sums[j] += part[j];
  }
}

void squares(const Lines& g, bool lines_are_rows, float* part, float* sums) {
  g.dtype == DType::float32 ? squares_as<float>(g, lines_are_rows, part, sums)
                            : squares_as<bf16>(g, lines_are_rows, part, sums);
}

// What each number of a piece of a line is divided by, first one, then `norm`.
struct Divisors {
  float one, norm;
  const float* each;  // instead of `one`, or null
};

// `count` quotients, with zeros up to a whole vector; 16-bit ones by way of the reciprocal.
template <class In, class T>
PGOLF_INLINE void divide(const In* in, int64_t count, const Divisors& by, T* out) {
  const float inverse = 1 / by.one / by.norm;
  const auto quotient = [&](vf x, const float* each) __attribute__((always_inline)) {
    if (each) return x / load(each) / by.norm;
    if (sizeof(T) == 2) return x * inverse;
    return (by.one == 1 ? x : x / by.one) / by.norm;
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(out + j, quotient(load(in + j), by.each ? by.each + j : nullptr));
  if (j == count) return;
  float x[kLanes] = {}, each[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) each[i] = 1;
  for (int64_t i = 0; j + i < count; ++i) {
    x[i] = load_one(in + j + i);
    if (by.each) each[i] = by.each[j + i];
  }
  store(out + j, quotient(load(x), by.each ? each : nullptr));
}

template <class In, class T>
void normalize_as(const Lines& g, bool lines_are_rows, const float* divisors, float norm, bool transpose, T* x,
                  int64_t pitch) {
  const auto piece = [&](int64_t i, int64_t j, int64_t count, T* out) {
    const Divisors by = {lines_are_rows ? divisors[i] : 1, norm, lines_are_rows ? nullptr : divisors + j};
    divide((const In*)g.data + i * g.stride + j, count, by, out);
  };
  if (!transpose) {
    for (int64_t i = 0; i < g.count; ++i) piece(i, 0, g.length, x + i * pitch);
    return;
  }
  alignas(64) T square[kPanel * kPanel];
  for (int64_t i = 0; i < g.count; i += kPanel)
    for (int64_t j = 0; j < g.length; j += kPanel) {
      const int64_t rows = g.count - i < kPanel ? g.count - i : kPanel;
      const int64_t count = g.length - j < kPanel ? g.length - j : kPanel;
      if (rows < kPanel || count < kPanel) memset(square, 0, sizeof square);
      for (int64_t r = 0; r < rows; ++r) piece(i + r, j, count, square + r * kPanel);
      transpose_square(square, kPanel, x + j * pitch + i, pitch);
    }
}

template <class T>
void normalize(const Lines& g, bool lines_are_rows, const float* divisors, float norm, bool transpose, void* x,
               int64_t rows, int64_t columns) {
  clear<T>(x, rows, columns);
  g.dtype == DType::float32
      ? normalize_as<float>(g, lines_are_rows, divisors, norm, transpose, (T*)x, left_pitch<T>(columns))
      : normalize_as<bf16>(g, lines_are_rows, divisors, norm, transpose, (T*)x, left_pitch<T>(columns));
}

template <class T, class Out>
PGOLF_INLINE void store_row(const T* x, int64_t count, Out* out) {
  if constexpr (std::is_same_v<T, Out>) {
    memcpy(out, x, count * sizeof(T));
  } else {
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store(out + j, load(x + j));
    for (; j < count; ++j) {
      Out rounded[kLanes];
      store(rounded, splat(x[j]));
      out[j] = rounded[0];
    }
  }
}

template <class T, class Out>
void store_as(const void* matrix, int64_t rows, int64_t columns, bool transpose, void* result) {
  const T* x = (const T*)matrix;
  const int64_t pitch = left_pitch<T>(columns);
  Out* out = (Out*)result;
  if (!transpose) {
    for (int64_t i = 0; i < rows; ++i) store_row(x + i * pitch, columns, out + i * columns);
    return;
  }
  alignas(64) T square[kPanel * kPanel];
  for (int64_t j = 0; j < columns; j += kPanel)
    for (int64_t i = 0; i < rows; i += kPanel) {
      transpose_square(x + i * pitch + j, pitch, square, kPanel);
      for (int64_t r = 0; r < kPanel && j + r < columns; ++r)
        store_row(square + r * kPanel, rows - i < kPanel ? rows - i : kPanel, out + (j + r) * rows + i);
    }
}

template <class T, class Out>
constexpr Loops loops() {
  return {std::is_same_v<T, bf16>, bytes<T>,     product_bytes<T>, clear<T>, squares, normalize<T>,
          multiply_in_tiles<T>,    take_mean<T>, store_as<T, Out>};
}

}  // namespace

extern const Kernels kKernels = {kPanel, loops<float, float>(), loops<Element<bf16>, bf16>(), loops<float, bf16>()};

}  // namespace pgolf::newton_schulz::PGOLF_ISA
