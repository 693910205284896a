// Packed codes to numbers in registers, exactly and in the order of the columns, compiled once per instruction set.
//
// A group of 3 bytes is a 24-bit word of four codes, the inverse of base64. Every load takes whole vectors, so it reads
// up to kReadAhead bytes beyond the codes it unpacks: callers see to it that these may be read.
#include "common/operands.h"
#include "int6_linear/int6_linear_kernels.h"

namespace pgolf::int6_linear::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

constexpr int64_t kReadAhead = 64;

// Lane i: a 32-bit word with code i at bit 6 (i % 4); the fourth of a group lies 8 bits lower, at bit 10, because a
// float's mantissa ends at bit 22.
PGOLF_INLINE vi spread(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  const __m512i order = _mm512_set_epi8(-1, -1, 11, 10, -1, 11, 10, 9, -1, 11, 10, 9, -1, 11, 10, 9, -1, -1, 8, 7, -1,
                                        8, 7, 6, -1, 8, 7, 6, -1, 8, 7, 6, -1, -1, 5, 4, -1, 5, 4, 3, -1, 5, 4, 3, -1,
                                        5, 4, 3, -1, -1, 2, 1, -1, 2, 1, 0, -1, 2, 1, 0, -1, 2, 1, 0);
  return (vi)_mm512_shuffle_epi8(bytes, order);
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_set1_epi64x(read<int64_t>(p));
  const __m256i order = _mm256_set_epi8(-1, -1, 5, 4, -1, 5, 4, 3, -1, 5, 4, 3, -1, 5, 4, 3, -1, -1, 2, 1, -1, 2, 1, 0,
                                        -1, 2, 1, 0, -1, 2, 1, 0);
  return (vi)_mm256_shuffle_epi8(bytes, order);
#else
  const int32_t word = p[0] | p[1] << 8 | p[2] << 16;
  return vi{word, word, word, word >> 8};
#endif
}

// kLanes codes as floats. A code becomes the low bits of a mantissa whose unit is 1: 2^e + code, less 2^e + 32.
PGOLF_INLINE vf unpack_floats(const uint8_t* p) {
  vi mask, power;
  vf base;
  for (int i = 0; i < kLanes; ++i) {
    const int at = i % 4 < 3 ? 6 * (i % 4) : 10, e = 23 - at;
    mask[i] = 63 << at, power[i] = (127 + e) << 23, base[i] = float((1 << e) + 32);
  }
  return (vf)((spread(p) & mask) | power) - base;
}

#if defined(__AVX512VBMI__)
struct alignas(64) ByteTable {
  uint8_t at[64];
};

// 64 codes, a byte each: the 6 bytes of qword i's codes go there, then every byte is cut out at its own bit.
PGOLF_INLINE __m512i unpack_bytes(const uint8_t* p, const ByteTable& order) {
  const __m512i shifts = _mm512_set1_epi64(0x2a241e18120c0600);
  const __m512i groups = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), _mm512_loadu_si512(p));
  return _mm512_multishift_epi64_epi8(shifts, groups);  // the top two bits of each byte are a neighbour's
}
PGOLF_INLINE __m512i unpack_codes(const uint8_t* p) {
  constexpr ByteTable order = [] {
    ByteTable t = {};
    for (int i = 0; i < 64; ++i) t.at[i] = uint8_t(i % 8 < 6 ? i / 8 * 6 + i % 8 : 0);
    return t;
  }();
  return _mm512_and_si512(unpack_bytes(p, order), _mm512_set1_epi8(63));
}

// 64 codes as bfloat16. Each half of the number is looked up among 64 bytes, by the low six bits of the index.
PGOLF_INLINE void unpack_bf16(const uint8_t* p, __m512i (&out)[2]) {
  // Interleaving works within 128 bits: qword 2 i feeds the first vector, 2 i + 1 the second.
  static constexpr ByteTable order = [] {
    ByteTable t = {};
    for (int i = 0; i < 64; ++i) t.at[i] = uint8_t(i % 8 < 6 ? (i / 16 + 4 * (i / 8 % 2)) * 6 + i % 8 : 0);
    return t;
  }();
  struct Halves {
    ByteTable low, high;
  };
  static constexpr Halves halves = [] {
    Halves t = {};
    for (int code = 0; code < 64; ++code) {
      const int value = code - 32, size = value < 0 ? -value : value;
      int e = 0;
      while (size >> (e + 1)) ++e;
      const int bits = size ? (127 + e) << 7 | (size << (7 - e) & 127) : 0;
      t.low.at[code] = uint8_t(bits), t.high.at[code] = uint8_t(bits >> 8 | (value < 0) << 7);
    }
    return t;
  }();
  const __m512i codes = unpack_bytes(p, order);
  const __m512i low = _mm512_permutexvar_epi8(codes, _mm512_load_si512(halves.low.at));
  const __m512i high = _mm512_permutexvar_epi8(codes, _mm512_load_si512(halves.high.at));
  out[0] = _mm512_unpacklo_epi8(low, high);
  out[1] = _mm512_unpackhi_epi8(low, high);
}
#endif

// What one step unpacks: kStepVectors vectors of elements.
template <class T>
using WeightVector = std::conditional_t<kPairs<T>, vi, vf>;
template <class T>
constexpr int kStepVectors = kPairs<T> ? 2 : 1;
template <class T>
constexpr int64_t kStepCodes = kPairs<T> ? 64 : kLanes;
template <class T>
constexpr int64_t kStepBytes = kStepCodes<T> / 4 * 3;

template <class T>
PGOLF_INLINE void unpack_step(const uint8_t* p, WeightVector<T> (&out)[kStepVectors<T>]) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    __m512i halves[2];
    unpack_bf16(p, halves);
    out[0] = (vi)halves[0], out[1] = (vi)halves[1];
    return;
  }
#endif
  if constexpr (!kPairs<T>) out[0] = unpack_floats(p);
}

// K codes of a row as elements; writes whole steps.
template <class T>
PGOLF_INLINE void unpack_row(const uint8_t* p, int64_t K, Element<T>* out) {
  for (int64_t k = 0; k < K; k += kStepCodes<T>, p += kStepBytes<T>, out += kStepCodes<T>) {
    WeightVector<T> w[kStepVectors<T>];
    unpack_step<T>(p, w);
    memcpy(out, w, sizeof w);
  }
}

// `count` rows of the weight from `first` on, where kReadAhead bytes beyond them may be read: in place, or copied to
// `copy` [count * row_bytes + kReadAhead] near the end of the packed codes. Rows from N on are zeros there.
PGOLF_INLINE const uint8_t* readable_rows(const Problem& p, int64_t first, int64_t count, uint8_t* copy) {
  const int64_t bytes = row_bytes(p.K), wanted = count * bytes, left = (p.N - first) * bytes;
  const uint8_t* rows = p.packed + first * bytes;
  if (wanted + kReadAhead <= left) return rows;
  const int64_t there = wanted < left ? wanted : left;
  if (there > 0) memcpy(copy, rows, there);  // without columns there is no address
  memset(copy + there, 0, wanted + kReadAhead - there);
  return copy;
}

}  // namespace
}  // namespace pgolf::int6_linear::PGOLF_ISA
