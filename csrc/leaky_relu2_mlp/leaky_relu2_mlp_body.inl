// The loops of leaky_relu2_mlp_kernels.h, compiled once per instruction set by leaky_relu2_mlp_<isa>.cpp, which defines
// PGOLF_ISA.
//
// The sign of p hides in the last bit of a = leaky(p)^2: p >= 0 takes an even pattern, p < 0 an odd one. So the one
// tensor [M, H] that is kept serves dw_down = dy^T a and, through da/dp = 2 sqrt(a) or -2 |s| sqrt(a), the slope. The
// price is up to 1 ulp instead of 1/2 (float32: 1.5), an odd denormal where a true zero of the negative side would be,
// and NaN where the square of a negative p overflows.
#include "common/product.h"
#include "leaky_relu2_mlp/leaky_relu2_mlp_kernels.h"

namespace pgolf::leaky_relu2_mlp::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

// ---- element-wise ----

// The last bit of a T, where float's bits are.
template <class T>
constexpr int32_t kLastBit = sizeof(T) == 2 ? 0x10000 : 1;

// Bits of leaky(p)^2 as a T whose last bit is 1 exactly where p < 0 (or NaN); zeros beyond a T.
template <class T>
PGOLF_INLINE vi square_with_sign(vf p, float slope) {
  constexpr int32_t last = kLastBit<T>, to_nearest = sizeof(T) == 2 ? last : 0;  // a float32 has no bits to round by
  const vi positive = p >= 0;
  const vf leaky = positive ? p : p * slope;
  const vi bits = (vi)(leaky * leaky);
  // Even: round to the nearest multiple of two ulp. Odd: the odd neighbour of a truncated value is the nearest one.
  return (positive ? (bits + to_nearest) & ~last : bits | last) & -last;
}

PGOLF_INLINE void store_bits(float* out, vi bits) { store(out, (vf)bits); }
PGOLF_INLINE void store_bits(bf16* out, vi bits) {
  const vh narrow = __builtin_convertvector(bits >> 16, vh);
  memcpy(out, &narrow, sizeof narrow);
}

// sqrt(a), to 2^-13 for bfloat16. Where the hardware's own root is used it costs more than the product on AMX.
template <class T>
PGOLF_INLINE vf root(vf a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (vf)_mm512_sqrt_ps((__m512)a);
  return a * (vf)_mm512_rsqrt14_ps((__m512)max(a, splat(1e-37f)));
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// da/dp from square_with_sign's a.
template <class T>
PGOLF_INLINE vf slope_from_square(vf a, float negative) {
  const vi odd = ((vi)a & kLastBit<T>) != 0;
  return root<T>(a) * (odd ? splat(negative) : splat(2));
}

// The first `count` of kPanel floats.
template <class T>
PGOLF_INLINE void store_panel(T* out, const float* c, int64_t count) {
  T part[kPanel];
  T* whole = count == kPanel ? out : part;
  store(whole, load(c));
  store(whole + kLanes, load(c + kLanes));
  if (count < kPanel) memcpy(out, part, count * sizeof(T));
}

PGOLF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- memory and packing ----

template <class T>
int64_t panel_bytes(int64_t depth) {
  return words<T>(depth) * kPanel * 4;
}
template <class T>
int64_t left_bytes(int64_t rows, int64_t depth) {
  return left_size<T>(rows, depth) * sizeof(Element<T>);
}
template <class T>
void pack_rows(const void* w, int64_t columns, int64_t depth, int64_t p, void* out) {
  pack_transposed((const T*)w + p * kPanel * depth, depth, least(kPanel, columns - p * kPanel), depth, (Word<T>*)out);
}
template <class T>
void pack_panel(const void* w, int64_t columns, int64_t depth, int64_t p, void* out) {
  pgolf::PGOLF_ISA::pack_columns((const T*)w + p * kPanel, columns, least(kPanel, columns - p * kPanel), depth,
                                 (Word<T>*)out);
}

constexpr int64_t kSpare = 5 * 128;  // what Memory loses between pieces

template <class T>
int64_t rows_memory(int64_t rows, int64_t D, int64_t H) {
  return left_bytes<T>(rows, D) + left_bytes<T>(rows, H) + sums_size<T>(rows) * 4 + kSpare;
}
template <class T>
int64_t gradient_memory(int64_t rows, int64_t panels) {
  return (panels * rows * kPanel + sums_size<T>(1)) * 4 + panel_bytes<T>(kChunk<T>) + kSpare;
}

// product() with packed panels of `columns` columns.
template <class T, class Emit>
PGOLF_INLINE void multiply_packed(const Left<T>& left, int64_t depth, const void* packed, int64_t columns, float* sums,
                                  const Emit& emit) {
  const int64_t n = words<T>(depth);
  const auto from = [](int64_t) { return int64_t(0); };
  const auto panel = [&](int64_t p, int64_t k, int64_t) { return (const Word<T>*)packed + (p * n + k) * kPanel; };
  product<T>(left, depth, 0, panels_of(columns), sums, from, panel, emit);
}

template <class T>
PGOLF_INLINE Left<T> left_of_rows(const void* x, int64_t first, int64_t rows, int64_t depth, Element<T>* out) {
  return pack_left<T>(rows, depth, out, [&](int64_t i) { return (const T*)x + (first + i) * depth; });
}

// ---- forward ----

template <class T>
void forward(const Forward& f, int64_t first, int64_t rows, void* working) {
  const TileScope tiles;
  (void)tiles;
  Memory memory = {(char*)working};
  const int64_t D = f.D, H = f.H;
  const Left<T> x = left_of_rows<T>(f.x, first, rows, D, memory.take<Element<T>>(left_size<T>(rows, D)));
  const Left<T> hidden = {memory.take<Element<T>>(left_size<T>(rows, H)), left_pitch<T>(H), rows};
  float* sums = memory.take<float>(sums_size<T>(rows));
  zero_left_padding(hidden, H);
  multiply_packed<T>(x, D, f.up, H, sums, [&](int64_t i, int64_t p, const float* c) __attribute__((always_inline)) {
    const int64_t count = least(kPanel, H - p * kPanel);
    Element<T>* out = hidden.data + i * hidden.pitch + p * kPanel;
    Element<T> part[kPanel];
    Element<T>* whole = count == kPanel ? out : part;
    store_bits(whole, square_with_sign<T>(load(c), f.negative_slope));
    store_bits(whole + kLanes, square_with_sign<T>(load(c + kLanes), f.negative_slope));
    if (count < kPanel) memcpy(out, part, count * sizeof *out);
  });
  for (int64_t i = 0; f.a && i < rows; ++i) {
    const Element<T>* in = hidden.data + i * hidden.pitch;
    T* out = (T*)f.a + (first + i) * H;
    if constexpr (sizeof(T) == sizeof(Element<T>)) {
      memcpy(out, in, H * sizeof(T));
    } else {
      int64_t j = 0;
      for (; j + kLanes <= H; j += kLanes) store_bits(out + j, (vi)load(in + j));
      for (; j < H; ++j) memcpy(out + j, (const char*)(in + j) + 2, 2);
    }
  }
  T* y = (T*)f.y + first * D;
  multiply_packed<T>(hidden, H, f.down, D, sums,
                     [&](int64_t i, int64_t p, const float* c) __attribute__((always_inline)) {
                       store_panel(y + i * D + p * kPanel, c, least(kPanel, D - p * kPanel));
                     });
}

// ---- backward ----

// Row k of a panel of dp from the row as a left operand. Where a word is a pair of rows, the even row comes first and
// clears the other half.
template <class T>
PGOLF_INLINE void put_in_panel(const Element<T>* row, int64_t k, Word<T>* panel) {
  Word<T>* out = panel + k / kPerWord<T> * kPanel;
  if constexpr (kPairs<T>) {
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      const vi bits = __builtin_convertvector(read<vh>(row + j), vi);
      const vi pair = k % 2 ? read<vi>(out + j) | bits << 16 : bits;
      memcpy(out + j, &pair, sizeof pair);
    }
  } else {
    memcpy(out, row, kPanel * sizeof *row);
  }
}

// Zeros in the words of a last, short chunk that pad its depth.
template <class T>
void zero_dp_padding(const Backward& b, int64_t panels) {
  const int64_t chunk = b.rows / kChunk<T>, depth = b.rows % kChunk<T>;
  const int64_t used = (depth + kPerWord<T> - 1) / kPerWord<T>, n = words<T>(depth);
  for (int64_t p = 0; used < n && p < panels; ++p) {
    Word<T>* panel = (Word<T>*)b.dp + (chunk * panels + p) * words<T>(kChunk<T>) * kPanel;
    memset(panel + used * kPanel, 0, (n - used) * kPanel * sizeof *panel);
  }
}

template <class T>
void backward(const Backward& b, int64_t first, int64_t rows, void* working) {
  const TileScope tiles;
  (void)tiles;
  Memory memory = {(char*)working};
  const int64_t D = b.D, H = b.H, panels = panels_of(H);
  const float negative = b.negative_slope < 0 ? 2 * b.negative_slope : -2 * b.negative_slope;
  const Left<T> dy = left_of_rows<T>(b.dy, first, rows, D, memory.take<Element<T>>(left_size<T>(rows, D)));
  const Left<T> dp = {memory.take<Element<T>>(left_size<T>(rows, H)), left_pitch<T>(H), rows};
  float* sums = memory.take<float>(sums_size<T>(rows));
  zero_left_padding(dp, H);
  multiply_packed<T>(dy, D, b.down, H, sums, [&](int64_t i, int64_t p, const float* c) __attribute__((always_inline)) {
    const int64_t count = least(kPanel, H - p * kPanel), row = first + i;
    const T* a = (const T*)b.a + row * H + p * kPanel;
    __builtin_prefetch(a + 2 * kPanel, 0, 2);
    T a_part[kPanel] = {};
    if (count < kPanel) memcpy(a_part, a, count * sizeof *a), a = a_part;
    Element<T>* out = dp.data + i * dp.pitch + p * kPanel;
    Element<T> part[kPanel];
    Element<T>* whole = count == kPanel ? out : part;
    store(whole, load(c) * slope_from_square<T>(load(a), negative));
    store(whole + kLanes, load(c + kLanes) * slope_from_square<T>(load(a + kLanes), negative));
    if (count < kPanel) memcpy(out, part, count * sizeof *out);
    if (!b.dp) return;
    Word<T>* panel = (Word<T>*)b.dp + (row / kChunk<T> * panels + p) * words<T>(kChunk<T>) * kPanel;
    put_in_panel<T>(whole, row % kChunk<T>, panel);
  });
  if (b.dp && first + rows == b.rows) zero_dp_padding<T>(b, panels);
  if (!b.dx) return;
  T* dx = (T*)b.dx + first * D;
  multiply_packed<T>(dp, H, b.up, D, sums, [&](int64_t i, int64_t p, const float* c) __attribute__((always_inline)) {
    store_panel(dx + i * D + p * kPanel, c, least(kPanel, D - p * kPanel));
  });
}

// ---- gradients of the weights ----

template <class T>
void transpose(const void* from, int64_t rows, int64_t D, void* to) {
  const T* x = (const T*)from;
  const Left<T> left = {(Element<T>*)to, left_pitch<T>(kChunk<T>), D};
  zero_left_padding(left, rows);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(Element<T>)) {
    constexpr int64_t kDepth = 16 * kPerWord<T>;
    for (int64_t k = 0; k < rows; k += kDepth)
      for (int64_t j = 0; j < D; j += 16) {
        const __mmask16 inside = D - j < 16 ? (1 << (D - j)) - 1 : 0xffff;
        const auto at = [&](int64_t row) __attribute__((always_inline)) {
          const T* p = x + row * D + j;
          const __mmask16 mask = row < rows ? inside : 0;
          if constexpr (kPairs<T>) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
          return _mm512_maskz_loadu_epi32(mask, p);
        };
        __m512i block[16];
        for (int i = 0; i < 16; ++i) {
          if constexpr (kPairs<T>) {
            block[i] = _mm512_or_si512(at(k + 2 * i), _mm512_slli_epi32(at(k + 2 * i + 1), 16));
          } else {
            block[i] = at(k + i);
          }
        }
        transpose16(block);
        for (int64_t i = 0; i < 16 && j + i < D; ++i) memcpy(left.data + (j + i) * left.pitch + k, &block[i], 64);
      }
    return;
  }
#endif
  constexpr int64_t kBlock = 16;
  for (int64_t k = 0; k < rows; k += kBlock)
    for (int64_t j = 0; j < D; ++j)
      for (int64_t i = k; i < least(rows, k + kBlock); ++i)
        convert_row<T>(x + i * D + j, 1, left.data + j * left.pitch + i);
}

template <class T>
void weight_gradient(const WeightGradient& g, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
                     void* working) {
  const TileScope tiles;
  (void)tiles;
  Memory memory = {(char*)working};
  const int64_t D = g.D, H = g.H, pitch = left_pitch<T>(kChunk<T>), panels = panels_of(H);
  const int64_t rows = last - first;
  float* sums = memory.take<float>((last_panel - first_panel) * rows * kPanel);  // [panels][rows][kPanel]
  float* block = memory.take<float>(sums_size<T>(1));
  Word<T>* packed = memory.take<Word<T>>(words<T>(kChunk<T>) * kPanel);
  const auto from = [](int64_t) { return int64_t(0); };
  for (int64_t p = first_panel; g.add && p < last_panel; ++p)
    memcpy(sums + (p - first_panel) * rows * kPanel, g.sums + (p * D + first) * kPanel, rows * kPanel * 4);
  for (int64_t k = 0; k < g.rows; k += kChunk<T>) {
    const int64_t chunk = k / kChunk<T>, depth = least(kChunk<T>, g.rows - k);
    const bool add = g.add || k > 0;
    Element<T>* data = (Element<T>*)g.left + chunk * left_size<T>(D, kChunk<T>) + first * pitch;
    const Left<T> left = {data, pitch, rows};
    const auto panel = [&](int64_t p, int64_t, int64_t) __attribute__((always_inline)) -> const Word<T>* {
      if (g.dp) return (const Word<T>*)g.dp + (chunk * panels + p) * words<T>(kChunk<T>) * kPanel;
      pack_panel<T>((const T*)g.a + k * H, H, depth, p, packed);
      return packed;
    };
    const auto emit = [&](int64_t i, int64_t p, const float* c) __attribute__((always_inline)) {
      float* sum = sums + ((p - first_panel) * rows + i) * kPanel;
      store(sum, add ? load(sum) + load(c) : load(c));
      store(sum + kLanes, add ? load(sum + kLanes) + load(c + kLanes) : load(c + kLanes));
    };
    product<T>(left, depth, first_panel, last_panel, block, from, panel, emit);
  }
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t count = least(kPanel, H - p * kPanel);
    const float* from_panel = sums + (p - first_panel) * rows * kPanel;
    if (!g.gradient) {
      memcpy(g.sums + (p * D + first) * kPanel, from_panel, rows * kPanel * 4);
    } else if (g.dp) {
      store_transposed(from_panel, rows, D, count, (T*)g.gradient + p * kPanel * D + first);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        store_panel((T*)g.gradient + (first + i) * H + p * kPanel, from_panel + i * kPanel, count);
    }
  }
}

template <class T>
constexpr Loops kLoops = {kPanel,
                          kBlockRows<T>,
                          kChunk<T>,
                          kTiles<T> ? 1280 << 10 : 640 << 10,
                          sizeof(Element<T>),
                          panel_bytes<T>,
                          left_bytes<T>,
                          pack_rows<T>,
                          pack_panel<T>,
                          rows_memory<T>,
                          gradient_memory<T>,
                          forward<T>,
                          backward<T>,
                          transpose<T>,
                          weight_gradient<T>};

}  // namespace

extern const Kernels kKernels = {kLoops<float>, kLoops<bf16>};

}  // namespace pgolf::leaky_relu2_mlp::PGOLF_ISA
