// The matrix product every kernel is built on, compiled once per instruction set: a left operand times panels, and a
// caller's function on every row of the result while it is in the first-level cache.
//
// A panel of 32 columns x 512 depth (32 KB) stays in the first-level cache while the rows of the left operand stream
// past it from the second level. The caller's function runs on the block before while the next one is multiplied: on
// AMX that hides it behind the tile unit, elsewhere the block's sums are still in the cache.
#pragma once
#include "common/operands.h"
#if PGOLF_TILES
#include "common/amx.h"
#endif

namespace pgolf::PGOLF_ISA {

#if !PGOLF_TILES
struct TileScope {};
#endif

constexpr int kSteps = 16;  // pieces of the work that goes on beside a block's product

PGOLF_INLINE void multiply_add(vf& acc, float a, vf b) { acc += a * b; }
#if defined(__AVX512BF16__)
PGOLF_INLINE void multiply_add(vf& acc, uint32_t a, vi b) {
  acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

// c [kBlockRows][kPanel] = a b, or += (ADD), over n words of depth. Sums start at 0 and join c at the end: none is
// longer than a chunk, and its length decides its error. A function of its own: inlined, it spills sums in every step
// where a caller's constants hold registers too, a fifth of the speed.
template <class T, bool ADD, int VECTORS>
__attribute__((noinline)) static void multiply_vectors(const Element<T>* a, int64_t pitch, const Word<T>* b, int64_t n,
                                                       float* c) {
  constexpr int kRows = kBlockRows<T>;
  using Vector = std::conditional_t<kPairs<T>, vi, vf>;
  vf acc[kRows][VECTORS];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * VECTORS; ++i) acc[i / VECTORS][i % VECTORS] = splat(0);
  // Every fourth row's address; x86 reaches the three between by scaling the pitch.
  const char* row[(kRows + 3) / 4];
  const int64_t bytes = pitch * sizeof(Element<T>);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r += 4) row[r / 4] = (const char*)a + r * bytes;
  for (int64_t k = 0; k < n; ++k, b += kPanel) {
    Vector columns[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) columns[v] = read<Vector>(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Word<T> w = read<Word<T>>(row[r / 4] + (r % 4) * bytes + k * sizeof(Word<T>));
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) multiply_add(acc[r][v], w, columns[v]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows * VECTORS; ++i) {
    float* out = c + i / VECTORS * kPanel + i % VECTORS * kLanes;
    const vf sum = acc[i / VECTORS][i % VECTORS];
    store(out, ADD ? load(out) + sum : sum);
  }
}

#if PGOLF_TILES
// The same in 2 x 2 tiles of 16 x 16 sums, which go on from c, with meanwhile in between; n is a multiple of 16.
template <bool ADD, int VECTORS, class Meanwhile>
PGOLF_INLINE void multiply_tiles(const bf16* a, int64_t pitch, const uint32_t* b, int64_t n, float* c,
                                 const Meanwhile& meanwhile) {
  constexpr int64_t kRow = kPanel * 4;  // bytes of a row of b or c
  constexpr bool kBoth = VECTORS == 2;
  const int64_t bytes = pitch * 2;
  if (ADD) {
    tile_load<0>(c, kRow), tile_load<2>(c + 16 * kPanel, kRow);
    if (kBoth) tile_load<1>(c + 16, kRow), tile_load<3>(c + 16 * kPanel + 16, kRow);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  int step = 0;
#pragma GCC unroll 1
  for (int64_t k = 0; k < n; k += 16, a += 32, b += 16 * kPanel) {
    tile_stream<4>(a, bytes);
    tile_load<6>(b, kRow);
    tile_multiply_bf16<0, 4, 6>();
    if (kBoth) {
      tile_load<7>(b + 16, kRow);
      tile_multiply_bf16<1, 4, 7>();
    }
    tile_stream<5>(a + 16 * pitch, bytes);
    tile_multiply_bf16<2, 5, 6>();
    if (kBoth) tile_multiply_bf16<3, 5, 7>();
    if (step < kSteps) meanwhile(step++);
  }
  while (step < kSteps) meanwhile(step++);
  tile_store<0>(c, kRow), tile_store<2>(c + 16 * kPanel, kRow);
  if (kBoth) tile_store<1>(c + 16, kRow), tile_store<3>(c + 16 * kPanel + 16, kRow);
}
#endif

// c = a b, or += (ADD), and meanwhile(0 .. kSteps - 1) before c is touched.
template <class T, bool ADD, int VECTORS = 2, class Meanwhile>
PGOLF_INLINE void multiply(const Element<T>* a, int64_t pitch, const Word<T>* b, int64_t n, float* c,
                           const Meanwhile& meanwhile) {
#if PGOLF_TILES
  if constexpr (kTiles<T>) return multiply_tiles<ADD, VECTORS>(a, pitch, b, n, c, meanwhile);
#endif
  for (int step = 0; step < kSteps; ++step) meanwhile(step);
  multiply_vectors<T, ADD, VECTORS>(a, pitch, b, n, c);
}

// Floats of working memory for a product of `rows` rows: the sums of one panel.
template <class T>
PGOLF_INLINE int64_t sums_size(int64_t rows) {
  return round_up(rows + kBlockRows<T>, kBlockRows<T>) * kPanel;
}

// emit(i, p, c) for each panel p in [first, last) and each row i >= from(p): c[j] = sum_k left[i][k] panel_p[k][j],
// kPanel floats in cache, to be used or changed at will.
//
// panel(p, k, n): the address of words [k, k + n) of panel p, valid until its next call; it may pack them just then.
// Blocks of rows begin at from(p), so left needs kBlockRows - 1 rows of storage beyond the last one. emit runs late, a
// block behind, but always before panel(p + 1, ...) of the panel after the next is asked for.
//
// VECTORS = 1: only the first kLanes columns of the panels are wanted, and c holds no others; about half the time with
// 16 lanes.
template <class T, int VECTORS = 2, class Panel, class From, class Emit>
PGOLF_INLINE void product(const Left<T>& left, int64_t depth, int64_t first, int64_t last, float* sums,
                          const From& from, const Panel& panel, const Emit& emit) {
  constexpr int kRows = kBlockRows<T>, kRowsPerStep = (kRows + kSteps - 1) / kSteps;
  const int64_t n = words<T>(depth), chunk = kChunk<T> / kPerWord<T>;
  struct {
    int64_t row, count, panel;
    float* c;
  } ready = {0, 0, 0, sums};  // the block whose rows are still to be emitted
  const char* ahead = nullptr;
  int64_t lines_ahead = 0;
  const auto meanwhile = [&](int step) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int q = 0; q < kRowsPerStep; ++q) {
      const int r = step * kRowsPerStep + q;
      if (r < ready.count) emit(ready.row + r, ready.panel, ready.c + r * kPanel);
    }
    for (int64_t line = 0; line < lines_ahead; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  };
  for (int64_t p = first; p < last; ++p) {
    const int64_t start = from(p), blocks = (left.rows - start + kRows - 1) / kRows;
    for (int64_t k = 0; k < n; k += chunk) {
      const int64_t count = n - k < chunk ? n - k : chunk;
      const Word<T>* b = panel(p, k, count);
      // What follows a packed panel is, nearly always, the next one: into the second-level cache with it.
      ahead = (const char*)(b + count * kPanel);
      lines_ahead = blocks > 0 ? count * kPanel * 4 / 64 / (blocks * kSteps) : 0;
      for (int64_t m = 0; m < blocks; ++m) {
        const int64_t row = start + m * kRows;
        const Element<T>* a = left.data + row * left.pitch + k * kPerWord<T>;
        float* c = n > chunk ? sums + m * kRows * kPanel : sums;
        k ? multiply<T, true, VECTORS>(a, left.pitch, b, count, c, meanwhile)
          : multiply<T, false, VECTORS>(a, left.pitch, b, count, c, meanwhile);
        ready.count = 0;
        if (k + count == n) ready = {row, left.rows - row < kRows ? left.rows - row : kRows, p, c};
      }
    }
  }
  lines_ahead = 0;
  for (int step = 0; step < kSteps; ++step) meanwhile(step);
}

}  // namespace pgolf::PGOLF_ISA
