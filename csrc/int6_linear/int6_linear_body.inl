// The loops of int6_linear_kernels.h, compiled once per instruction set by int6_linear_<isa>.cpp, which defines
// PGOLF_ISA.
//
// The scale of a weight row is applied once per output, so the products are of whole codes, which even bfloat16 holds
// exactly: the result is as exact as a float32 sum of x times the true weights.
#include "common/product.h"
#include "int6_linear/int6_linear_small.inl"

namespace pgolf::int6_linear::PGOLF_ISA {
namespace {

template <class V>
PGOLF_INLINE V* take(char*& memory, int64_t count) {
  V* at = (V*)memory;
  memory += round_up(count * sizeof(V), 64);
  return at;
}

// --- x as panels, unpacked weights on the left ---

template <class T>
int64_t panel_bytes_as(const Problem& p) {
  return words<T>(p.K) * kPanel * sizeof(Word<T>);
}

template <class T>
void pack_x_as(const Problem& p, int64_t index, void* panel) {
  const int64_t left = p.M - index * kPanel, columns = left < kPanel ? left : kPanel;
  pack_transposed((const T*)p.x + index * kPanel * p.K, p.K, columns, p.K, (Word<T>*)panel);
}

constexpr int64_t kStrip = 16;  // weight rows whose outputs are turned together: 32 bytes of a row of y at a time

template <class T>
int64_t multiply_x_work_as(const Problem& p, int64_t rows) {
  return round_up(left_size<T>(rows, p.K) * sizeof(Element<T>), 64) + sums_size<T>(rows) * sizeof(float) +
         2 * kStrip * kPanel * sizeof(float) + round_up(rows * row_bytes(p.K) + kReadAhead, 64);
}

// turned[j][r] = strip[r][j]
PGOLF_INLINE void turn(const float* strip, float* turned) {
#if defined(__AVX512F__)
  for (int64_t j = 0; j < kPanel; j += 16) {
    __m512i x[16];
    for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(strip + r * kPanel + j);
    transpose16(x);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(turned + (j + i) * kStrip, x[i]);
  }
#else
  for (int64_t j = 0; j < kPanel; ++j)
    for (int64_t r = 0; r < kStrip; ++r) turned[j * kStrip + r] = strip[r * kPanel + j];
#endif
}

template <class T, int VECTORS>
void multiply_x_panels(const Problem& p, const Left<T>& left, const void* panels, const Columns& columns, int64_t first,
                       int64_t first_panel, int64_t last_panel, char* work) {
  float* strip = take<float>(work, kStrip * kPanel);
  float* turned = take<float>(work, kStrip * kPanel);
  const int64_t n = words<T>(p.K);
  product<T, VECTORS>(
      left, p.K, first_panel, last_panel, (float*)work, [](int64_t) { return int64_t(0); },
      [&](int64_t panel, int64_t k, int64_t) { return (const Word<T>*)panels + (panel * n + k) * kPanel; },
      [&](int64_t i, int64_t panel, float* c) __attribute__((always_inline)) {
        memcpy(strip + i % kStrip * kPanel, c, VECTORS * kLanes * sizeof(float));
        if (i % kStrip < kStrip - 1 && i < left.rows - 1) return;
        turn(strip, turned);
        const int64_t start = i / kStrip * kStrip, m = panel * kPanel, rows = p.M - m < kPanel ? p.M - m : kPanel;
        for (int64_t j = 0; j < rows; ++j)
          finish_row(turned + j * kStrip, 0, 1, columns, first + start, i + 1 - start,
                     (T*)p.y + (m + j) * p.N + first + start);
      });
}

template <class T>
void multiply_x_as(const Problem& p, const void* panels, const Columns& columns, int64_t first, int64_t rows,
                   int64_t first_panel, int64_t last_panel, char* work) {
  const TileScope tiles;
  (void)tiles;
  const int64_t count = p.N - first < rows ? p.N - first : rows, bytes = row_bytes(p.K);
  const Left<T> left = {take<Element<T>>(work, left_size<T>(rows, p.K)), left_pitch<T>(p.K), count};
  const uint8_t* packed = readable_rows(p, first, rows, (uint8_t*)take<uint8_t>(work, rows * bytes + kReadAhead));
  for (int64_t i = 0; i < count; ++i, packed += bytes) {
    prefetch(packed + kBytesAhead, bytes);
    unpack_row<T>(packed, p.K, left.data + i * left.pitch);
  }
  zero_left_padding(left, p.K);
  // A last panel that is at most half full takes half the time.
  const bool half = last_panel * kPanel - p.M >= kLanes;
  multiply_x_panels<T, 2>(p, left, panels, columns, first, first_panel, last_panel - half, work);
  if (half) multiply_x_panels<T, 1>(p, left, panels, columns, first, last_panel - 1, last_panel, work);
}

// --- unpacked weights as panels, x on the left ---

// Elements from one unpacked row to the next: whole chunks, and no power of two of cache lines.
template <class T>
PGOLF_INLINE int64_t unpacked_pitch(const Problem& p) {
  return round_up(p.K, kChunk) + 64 / sizeof(Element<T>);
}

template <class T>
int64_t unpack_work_as(const Problem& p) {
  return kPanel * unpacked_pitch<T>(p) * sizeof(Element<T>) + round_up(kPanel * row_bytes(p.K) + kReadAhead, 64);
}

template <class T>
void unpack_as(const Problem& p, int64_t index, void* panel, char* work) {
  const int64_t pitch = unpacked_pitch<T>(p), left = p.N - index * kPanel, columns = left < kPanel ? left : kPanel;
  Element<T>* rows = take<Element<T>>(work, kPanel * pitch);
  const uint8_t* packed = readable_rows(p, index * kPanel, kPanel, (uint8_t*)work);
  for (int64_t j = 0; j < columns; ++j) unpack_row<T>(packed + j * row_bytes(p.K), p.K, rows + j * pitch);
  pack_transposed<Element<T>>(rows, pitch, columns, p.K, (Word<Element<T>>*)panel);
}

template <class T>
int64_t multiply_work_as(const Problem& p, int64_t rows) {
  return round_up(left_size<T>(rows, p.K) * sizeof(Element<T>), 64) + sums_size<T>(rows) * sizeof(float);
}

template <class T>
void multiply_as(const Problem& p, const void* panels, const Columns& columns, int64_t first, int64_t rows,
                 int64_t first_panel, int64_t last_panel, char* work) {
  const TileScope tiles;
  (void)tiles;
  const int64_t n = words<T>(p.K), count = p.M - first < rows ? p.M - first : rows;
  const T* x = (const T*)p.x + first * p.K;
  Element<T>* memory = take<Element<T>>(work, left_size<T>(rows, p.K));
  const Left<T> left = pack_left<T>(count, p.K, memory, [&](int64_t i) { return x + i * p.K; });
  product<T>(
      left, p.K, first_panel, last_panel, (float*)work, [](int64_t) { return int64_t(0); },
      [&](int64_t panel, int64_t k, int64_t) { return (const Word<T>*)panels + (panel * n + k) * kPanel; },
      [&](int64_t i, int64_t panel, float* c) __attribute__((always_inline)) {
        const int64_t column = panel * kPanel, inside = p.N - column < kPanel ? p.N - column : kPanel;
        finish_row(c, 0, 1, columns, column, inside, (T*)p.y + (first + i) * p.N + column);
      });
}

// Rows of x up to which dots win; tiles win from the start.
constexpr int64_t kMaxDotsRows = kLanes == 16 ? 24 : 8;

#define PGOLF_BY_DTYPE(call, ...) (p.dtype == DType::float32 ? call<float>(__VA_ARGS__) : call<bf16>(__VA_ARGS__))

void set_columns(const Problem& p, const Columns& columns) { PGOLF_BY_DTYPE(set_columns_as, p, columns); }
void convert(const Problem& p, int64_t m, const Activations& a) { PGOLF_BY_DTYPE(convert_as, p, m, a); }
void dots(const Problem& p, const Activations& a, const Columns& columns, int64_t first, char* work) {
  PGOLF_BY_DTYPE(dots_as, p, a, columns, first, work);
}
int64_t panel_bytes(const Problem& p) { return PGOLF_BY_DTYPE(panel_bytes_as, p); }
void pack_x(const Problem& p, int64_t index, void* panel) { PGOLF_BY_DTYPE(pack_x_as, p, index, panel); }
int64_t multiply_x_work(const Problem& p, int64_t rows) { return PGOLF_BY_DTYPE(multiply_x_work_as, p, rows); }
void multiply_x(const Problem& p, const void* panels, const Columns& columns, int64_t first, int64_t rows,
                int64_t first_panel, int64_t last_panel, char* work) {
  PGOLF_BY_DTYPE(multiply_x_as, p, panels, columns, first, rows, first_panel, last_panel, work);
}
int64_t unpack_work(const Problem& p) { return PGOLF_BY_DTYPE(unpack_work_as, p); }
void unpack(const Problem& p, int64_t index, void* panel, char* work) {
  PGOLF_BY_DTYPE(unpack_as, p, index, panel, work);
}
int64_t multiply_work(const Problem& p, int64_t rows) { return PGOLF_BY_DTYPE(multiply_work_as, p, rows); }
void multiply(const Problem& p, const void* panels, const Columns& columns, int64_t first, int64_t rows,
              int64_t first_panel, int64_t last_panel, char* work) {
  PGOLF_BY_DTYPE(multiply_as, p, panels, columns, first, rows, first_panel, last_panel, work);
}

}  // namespace

const Kernels kKernels = {kPanel,        {kBlockRows<float>, kBlockRows<bf16>},
                          kMaxBytesRows, {kMaxDotsRows, kTiles<bf16> ? 0 : kMaxDotsRows},
                          set_columns,   quantize,
                          convert,       dots_work,
                          dots,          panel_bytes,
                          pack_x,        multiply_x_work,
                          multiply_x,    unpack_work,
                          unpack,        multiply_work,
                          multiply};

}  // namespace pgolf::int6_linear::PGOLF_ISA
