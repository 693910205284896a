// The loops for few rows of x, compiled once per instruction set: weights are unpacked in registers, row by row, and
// each output is a dot product along them.
//
// Kept in registers is a block of BLOCK weight rows x ROWS rows of x, so that an unpacked weight meets ROWS rows of x
// and a loaded x meets BLOCK weights. Every output has one accumulator whatever the block, so its bits do not depend on
// which rows share a call.
#include "int6_linear/int6_linear_unpack.inl"

namespace pgolf::int6_linear::PGOLF_ISA {
namespace {

// Cold weights come from the third-level cache or memory: this many bytes ahead of their use.
constexpr int64_t kBytesAhead = 4096;

PGOLF_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 3);
}

// --- scales, biases and outputs ---

PGOLF_INLINE float half_to_float(uint16_t bits) {
#if defined(__AVX2__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;  // no denormal on the way
  const uint32_t word = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  float x;
  memcpy(&x, &word, 4);
  return x;
#endif
}

template <class T>
void set_columns_as(const Problem& p, const Columns& columns) {
  const int64_t end = round_up(p.N, kPieceRows);
  int64_t n = 0;
#if defined(__AVX2__)
  for (; n + kLanes <= p.N; n += kLanes) store(columns.scale + n, load((const half*)p.scale + n));
#endif
  for (; n < p.N; ++n) columns.scale[n] = half_to_float(p.scale[n]);
  for (; n < end; ++n) columns.scale[n] = 0;
  n = 0;
  if (p.bias) {
    const T* bias = (const T*)p.bias;
    for (; n + kLanes <= p.N; n += kLanes) store(columns.bias + n, load(bias + n));
    for (; n < p.N; ++n) columns.bias[n] = load_one(bias + n);
  }
  memset(columns.bias + n, 0, (end - n) * sizeof(float));
}

// y[j] = step (sums[j] - offset) scale[first + j] + bias[first + j] for j in [0, count). Reads whole vectors of sums.
template <class T>
PGOLF_INLINE void finish_row(const float* sums, float offset, float step, const Columns& columns, int64_t first,
                             int64_t count, T* y) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const vf factor = load(columns.scale + first + j) * step;
    const vf out = (load(sums + j) - offset) * factor + load(columns.bias + first + j);
    if (count - j >= kLanes) {
      store(y + j, out);
    } else {
      T part[kLanes];
      store(part, out);
      memcpy(y + j, part, (count - j) * sizeof(T));
    }
  }
}

// --- sums of vectors ---

// out[i] = the sum of v[i]'s lanes, i < COUNT, which is 4, 8 or 16. Always added in the same order.
template <int COUNT>
PGOLF_INLINE void sum_lanes(const vf* v, float* out) {
#if defined(__AVX512F__)
  __m512 quarter[COUNT / 4];  // lane 4 i + j: a part of the sum of vector 4 q + j
#pragma GCC unroll 4
  for (int q = 0; q < COUNT / 4; ++q) {
    const __m512 a = (__m512)v[4 * q], b = (__m512)v[4 * q + 1], c = (__m512)v[4 * q + 2], d = (__m512)v[4 * q + 3];
    const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    quarter[q] = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
  }
  const auto fold = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  constexpr int kQuarters = COUNT / 4;
  const __m512 low = fold(quarter[0], quarter[1 % kQuarters]);
  const __m512 total = fold(low, fold(quarter[2 % kQuarters], quarter[3 % kQuarters]));
  memcpy(out, &total, COUNT * sizeof(float));
#elif defined(__AVX2__)
  __m256 half[COUNT / 4];  // lane 4 i + j: a part of the sum of vector 4 q + j
#pragma GCC unroll 4
  for (int q = 0; q < COUNT / 4; ++q) {
    const __m256 a = (__m256)v[4 * q], b = (__m256)v[4 * q + 1], c = (__m256)v[4 * q + 2], d = (__m256)v[4 * q + 3];
    half[q] = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  }
#pragma GCC unroll 4
  for (int q = 0; q < COUNT / 4; ++q) {
    const __m128 sums = _mm256_castps256_ps128(half[q]) + _mm256_extractf128_ps(half[q], 1);
    memcpy(out + 4 * q, &sums, sizeof sums);
  }
#else
  for (int i = 0; i < COUNT; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

// The sums of acc[m][r] to sums[m * kPieceRows + r], or added to what is there.
template <int ROWS, int BLOCK>
PGOLF_INLINE void store_sums(const vf (&acc)[ROWS][BLOCK], bool add, float* sums) {
  constexpr int kCount = ROWS * BLOCK, kWhole = kCount <= 4 ? 4 : (kCount + 7) / 8 * 8;
  vf v[kWhole];
  float out[kWhole];
#pragma GCC unroll 32
  for (int i = 0; i < kWhole; ++i) v[i] = i < kCount ? acc[i / BLOCK][i % BLOCK] : splat(0);
  sum_lanes<kWhole <= 16 ? kWhole : 16>(v, out);
  if constexpr (kWhole > 16) sum_lanes<kWhole - 16>(v + 16, out + 16);
#pragma GCC unroll 32
  for (int m = 0; m < ROWS; ++m) {
    for (int r = 0; add && r < BLOCK; ++r) out[m * BLOCK + r] += sums[m * kPieceRows + r];
    memcpy(sums + m * kPieceRows, out + m * BLOCK, BLOCK * sizeof(float));
  }
}

// --- dots ---

// Of 32 or 16 registers; with few rows of x the weights take more of them.
constexpr int accumulators_for(int rows) { return kLanes < 16 ? 8 : rows <= 4 ? 16 : 24; }
constexpr int kDotsRows = kLanes == 16 ? 12 : 4;  // rows of x at a time, at most
PGOLF_INLINE void multiply_add(vf& acc, vf a, vf b) { acc += a * b; }
#if defined(__AVX512BF16__)
PGOLF_INLINE void multiply_add(vf& acc, vi a, vi b) {
  acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

// A lane adds this many products before they join the others: float32's error grows with the length of a sum.
constexpr int64_t kDotsDepth = 256 * kLanes;
// Weight rows at a time: 8, 6, 4, 3, 2 or 1, which divide kPieceRows.
constexpr int kMaxBlock = 8;
constexpr int block_for(int rows, int accumulators) {
  const int blocks[] = {8, 6, 4, 3, 2};
  for (int block : blocks)
    if (block * rows <= accumulators) return block;
  return 1;
}

// x: chunks `stride` elements apart.
template <class T, int ROWS>
PGOLF_INLINE void dot_block(const uint8_t* packed, int64_t bytes, int64_t K, const Element<T>* x, int64_t stride,
                            bool add, float* sums) {
  constexpr int kBlock = block_for(ROWS, accumulators_for(ROWS)), kVectors = kStepVectors<T>;
  using Vector = WeightVector<T>;
  vf acc[ROWS][kBlock];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * kBlock; ++i) acc[i / kBlock][i % kBlock] = splat(0);
  for (int64_t k = 0; k < K; k += kChunk, x += stride) {
    for (int64_t step = 0; step < kChunk; step += kStepCodes<T>, packed += kStepBytes<T>) {
      Vector w[kBlock][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) unpack_step<T>(packed + r * bytes, w[r]);
#pragma GCC unroll 32
      for (int i = 0; i < ROWS * kVectors; ++i) {
        const int m = i / kVectors, v = i % kVectors;
        const Vector right = read<Vector>(x + m * kChunk + step + v * (kStepCodes<T> / kVectors));
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) multiply_add(acc[m][r], w[r][v], right);
      }
    }
  }
  store_sums(acc, add, sums);
}

// --- bytes ---

#if defined(__AVX512VNNI__)
// Where bfloat16 is multiplied at half the rate of bytes, as on the CPUs with tiles, bytes stay ahead for longer.
constexpr int kMaxBytesRows = PGOLF_TILES ? 4 : 2;
constexpr int kByteAccumulators = 8;  // pairs of them
constexpr float kPlanesMax = 32512;   // 127 * 256: the high byte of the largest

template <int ROWS>
PGOLF_INLINE void byte_block(const uint8_t* packed, int64_t bytes, int64_t K, const int8_t* planes, int64_t stride,
                             float* sums) {
  constexpr int kBlock = block_for(ROWS, kByteAccumulators);
  __m512i acc[2 * ROWS][kBlock];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * ROWS * kBlock; ++i) acc[i / kBlock][i % kBlock] = _mm512_setzero_si512();
  constexpr int64_t kChunkBytes = kChunk / 4 * 3;
  const uint8_t* ahead = packed + kBytesAhead;  // of all the rows, which lie one after the other
  for (int64_t k = 0; k < K; k += kChunk, packed += kChunkBytes, ahead += kBlock * kChunkBytes, planes += stride) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBlock * kChunkBytes; i += 64) __builtin_prefetch(ahead + i, 0, 3);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const __m512i codes = unpack_codes(packed + r * bytes);
#pragma GCC unroll 8
      for (int q = 0; q < 2 * ROWS; ++q)
        acc[q][r] = _mm512_dpbusd_epi32(acc[q][r], codes, _mm512_loadu_si512(planes + q * kChunk));
    }
  }
  vf total[ROWS][kBlock];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS * kBlock; ++i) {
    const int m = i / kBlock, r = i % kBlock;
    const vf high = (vf)_mm512_cvtepi32_ps(acc[2 * m][r]), low = (vf)_mm512_cvtepi32_ps(acc[2 * m + 1][r]);
    total[m][r] = high * 256.0f + low;
  }
  store_sums(total, false, sums);
}

bool quantize(const Problem& p, int64_t m, const Activations& a) {
  typedef int8_t bytes __attribute__((vector_size(kLanes)));
  const bf16* x = (const bf16*)p.x + m * p.K;
  const auto at = [&](int64_t k) __attribute__((always_inline)) {
    if (p.K - k >= kLanes) return load(x + k);
    bf16 part[kLanes] = {};
    memcpy(part, x + k, (p.K - k) * sizeof(bf16));
    return load(part);
  };
  vi size = {};  // bits without the sign, which order as the numbers do
  for (int64_t k = 0; k < p.K; k += kLanes) {
    const vi bits = bits_of(at(k)) & 0x7fffffff;
    size = bits > size ? bits : size;
  }
  int32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = size[i] > top ? size[i] : top;
  float max;
  memcpy(&max, &top, 4);
  a.step[m] = 0;
  if (!(max > 0x1p-100f && max < 0x1p100f)) return false;    // NaN, or 1 / step or a product could overflow
  const float inverse = kPlanesMax / max, shift = 12582912;  // 1.5 * 2^23: the sum's low bits are the rounded number
  vi sum = {};
  for (int64_t k = 0; k < round_up(p.K, kChunk); k += kLanes) {
    const vi q = k < p.K ? bits_of(at(k) * inverse + shift) - bits_of(splat(shift)) : vi{};
    const bytes high = __builtin_convertvector((q + 128) >> 8, bytes), low = __builtin_convertvector(q, bytes);
    int8_t* out = a.planes + (k / kChunk * p.M + m) * 2 * kChunk + k % kChunk;
    memcpy(out, &high, sizeof high);
    memcpy(out + kChunk, &low, sizeof low);
    sum += q;
  }
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  a.step[m] = max / kPlanesMax;
  a.offset[m] = 32.0f * float(total);
  return true;
}
#else
constexpr int kMaxBytesRows = 0, kByteAccumulators = 8;
constexpr bool (*quantize)(const Problem&, int64_t, const Activations&) = nullptr;
#endif

// --- a piece of work ---

template <class T>
void convert_as(const Problem& p, int64_t m, const Activations& a) {
  const T* x = (const T*)p.x + m * p.K;
  for (int64_t k = 0; k < p.K; k += kChunk) {
    Element<T>* out = (Element<T>*)a.rows + k * p.M + m * kChunk;
    const int64_t count = p.K - k < kChunk ? p.K - k : kChunk;
    convert_row<T>(x + k, count, out);
    memset(out + count, 0, (kChunk - count) * sizeof(Element<T>));
  }
  a.step[m] = a.offset[m] = 0;
}

int64_t dots_work(const Problem& p) {
  return p.M * kPieceRows * sizeof(float) + round_up(kMaxBlock * row_bytes(p.K) + kReadAhead, 64);
}

// The sums [M, kPieceRows] of `count` weight rows from `first` on, for rows [m, m + ROWS) of x. copy: see
// readable_rows.
template <class T, int ROWS>
void sum_dots(const Problem& p, const Activations& a, int64_t m, int64_t first, int64_t count, float* sums,
              uint8_t* copy) {
  constexpr int kBlock = block_for(ROWS, accumulators_for(ROWS));
  const int64_t bytes = row_bytes(p.K);
  const Element<T>* x = (const Element<T>*)a.rows + m * kChunk;
  for (int64_t i = 0; i < count; i += kBlock) {
    const uint8_t* packed = readable_rows(p, first + i, kBlock, copy);
    prefetch(packed + kBytesAhead, kBlock * bytes);
    for (int64_t k = 0; k == 0 || k < p.K; k += kDotsDepth) {
      const int64_t depth = p.K - k < kDotsDepth ? p.K - k : kDotsDepth;
      dot_block<T, ROWS>(packed + k / 4 * 3, bytes, depth, x + k * p.M, p.M * kChunk, k > 0, sums + m * kPieceRows + i);
    }
  }
}

#if defined(__AVX512VNNI__)
template <int ROWS>
void sum_bytes(const Problem& p, const Activations& a, int64_t m, int64_t first, int64_t count, float* sums,
               uint8_t* copy) {
  constexpr int kBlock = block_for(ROWS, kByteAccumulators);
  for (int64_t i = 0; i < count; i += kBlock)
    byte_block<ROWS>(readable_rows(p, first + i, kBlock, copy), row_bytes(p.K), p.K, a.planes + 2 * m * kChunk,
                     2 * p.M * kChunk, sums + m * kPieceRows + i);
}
#endif

using Sum = void (*)(const Problem&, const Activations&, int64_t, int64_t, int64_t, float*, uint8_t*);
template <class T>
constexpr Sum kDots[] = {sum_dots<T, 1>,  sum_dots<T, 2>,  sum_dots<T, 3>, sum_dots<T, 4>,
#if defined(__AVX512F__)
                         sum_dots<T, 5>,  sum_dots<T, 6>,  sum_dots<T, 7>, sum_dots<T, 8>, sum_dots<T, 9>,
                         sum_dots<T, 10>, sum_dots<T, 11>, sum_dots<T, 12>
#endif
};
#if defined(__AVX512VNNI__)
constexpr Sum kBytes[] = {sum_bytes<1>, sum_bytes<2>,
#if PGOLF_TILES
                          sum_bytes<3>, sum_bytes<4>
#endif
};
#else
constexpr Sum kBytes[] = {nullptr};
#endif

template <class T>
void dots_as(const Problem& p, const Activations& a, const Columns& columns, int64_t first, char* work) {
  const int64_t count = p.N - first < kPieceRows ? p.N - first : kPieceRows;
  float* sums = (float*)work;
  uint8_t* copy = (uint8_t*)(sums + p.M * kPieceRows);
  for (int64_t m = 0, rows; m < p.M; m += rows) {
    const bool bytes = a.step[m] > 0;
    int64_t run = 1;
    while (m + run < p.M && (a.step[m + run] > 0) == bytes) ++run;
    const int64_t most = bytes ? kMaxBytesRows : kDotsRows, groups = (run + most - 1) / most;
    rows = (run + groups - 1) / groups;  // 16 as 8 and 8, not 12 and 4
    (bytes ? kBytes : kDots<T>)[rows - 1](p, a, m, first, count, sums, copy);
  }
  for (int64_t m = 0; m < p.M; ++m)
    finish_row(sums + m * kPieceRows, a.offset[m], a.step[m] > 0 ? a.step[m] : 1, columns, first, count,
               (T*)p.y + m * p.N + first);
}

}  // namespace
}  // namespace pgolf::int6_linear::PGOLF_ISA
