// One vector type per instruction set, for bodies that are compiled once per set: include it after defining PGOLF_ISA,
// the name of the unit's namespace.
//
// Arithmetic is plain operators on GCC/Clang vectors (a * b + c contracts to one FMA where there is one); only what has
// no operator is a function here. Formulas are templates over the vector, so that several.h can take N at once.
// Everything is static: an inline function shared between units could be merged by the linker into one copy, and that
// copy could use instructions the running CPU lacks. Only C headers for the same reason.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PGOLF_ISA
#error "define PGOLF_ISA (generic, avx2, avx512, avx512bf16) before including common/simd.h"
#endif
#define PGOLF_INLINE static inline __attribute__((always_inline))

namespace pgolf::PGOLF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));  // half-precision bits

struct bf16 {
  uint16_t bits;
};
// The half of the units' storage. The generic unit has no conversion instructions, so it keeps float.
#if defined(__AVX2__)
struct half {
  uint16_t bits;
};
#else
typedef float half;
#endif

PGOLF_INLINE vf splat(float x) { return x - vf{}; }
PGOLF_INLINE vi bits_of(vf x) { return (vi)x; }
PGOLF_INLINE vf from_bits(vi x) { return (vf)x; }
PGOLF_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

template <class V, class T>
PGOLF_INLINE V read(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

PGOLF_INLINE vf load(const float* p) { return read<vf>(p); }
PGOLF_INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector(read<vh>(p), vi) << 16); }
PGOLF_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
PGOLF_INLINE float load_one(const float* p) { return *p; }
PGOLF_INLINE float load_one(const bf16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Rounds to nearest even; a NaN stays one.
#if defined(__AVX512BF16__)
PGOLF_INLINE void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
PGOLF_INLINE void store(bf16* p, vf x) {
  const vi bits = (vi)x, rounded = bits + 0x7fff + ((bits >> 16) & 1), nan = (vi)(x != x);
  const vh narrow = __builtin_convertvector(((rounded & ~nan) | (nan & 0x7fc00000)) >> 16, vh);
  memcpy(p, &narrow, sizeof narrow);
}
#endif
#if defined(__AVX512F__)
PGOLF_INLINE vf load(const half* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
PGOLF_INLINE void store(half* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0)); }
PGOLF_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
PGOLF_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
PGOLF_INLINE vf rough_reciprocal(vf x) { return (vf)_mm512_rcp14_ps((__m512)x); }
#elif defined(__AVX2__)
PGOLF_INLINE vf load(const half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
PGOLF_INLINE void store(half* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
PGOLF_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
PGOLF_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
PGOLF_INLINE vf rough_reciprocal(vf x) {  // 2^-11.4 of the instruction, squared by one Newton step
  const vf r = (vf)_mm256_rcp_ps((__m256)x);
  return r * (2.0f - x * r);
}
#else
PGOLF_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
PGOLF_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
PGOLF_INLINE vf rough_reciprocal(vf x) { return 1.0f / x; }
#endif
#if defined(__AVX2__)
PGOLF_INLINE float load_one(const half* p) { return _cvtsh_ss(p->bits); }
#endif

// The smaller (greater) of a constant and x; a NaN in x stays one.
PGOLF_INLINE vf min(float a, vf x) { return min(splat(a), x); }
PGOLF_INLINE vf max(float a, vf x) { return max(splat(a), x); }

// 1 / x. Exact: to a float's rounding. Otherwise to 2^-14.
template <bool EXACT, class V>
PGOLF_INLINE V reciprocal(V x) {
  if constexpr (!EXACT) return rough_reciprocal(x);
#if defined(__AVX512F__)
  const V r = rough_reciprocal(x);
  return r * (2.0f - x * r);  // an eighth of the cost of a division
#else
  return 1.0f / x;
#endif
}

#if defined(__AVX512F__)
PGOLF_INLINE float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
#else
PGOLF_INLINE float sum(vf x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
#endif
PGOLF_INLINE float greatest(vf x) {
  float lanes[kLanes];
  store(lanes, x);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}
// All ones in the first n lanes, zeros in the rest.
PGOLF_INLINE vi first_lanes(int n) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}
PGOLF_INLINE vf keep(vf x, vi mask) { return (vf)((vi)x & mask); }

// 2^(x k) for |x k| <= 126. Largest relative error: 1e-7 (degree 6), 2.7e-6 (4), 7.5e-5 (3). Minimax on [-1/2, 1/2].
template <int DEGREE, class V>
PGOLF_INLINE V exp2_to(V x, float k) {
  static_assert(DEGREE == 3 || DEGREE == 4 || DEGREE == 6, "no other polynomials are here");
  const V shifted = x * k + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x k)
  const V f = x * k - (shifted - 12582912.0f);
  V p;
  if constexpr (DEGREE == 6) {
    p = f * 1.5345812e-4f + 1.3399931e-3f;
    p = p * f + 9.618489e-3f;
    p = p * f + 5.5503286e-2f;
    p = p * f + 2.4022646e-1f;
    p = p * f + 6.931472e-1f;
    p = p * f + 1.0f;
  } else if constexpr (DEGREE == 4) {
    p = f * 9.570102e-3f + 5.591786e-2f;
    p = p * f + 2.4024744e-1f;
    p = p * f + 6.931218e-1f;
    p = p * f + 9.999993e-1f;
  } else {
    p = f * 5.5171669e-2f + 2.4261113e-1f;
    p = p * f + 6.9326097e-1f;
    p = p * f + 9.9992806e-1f;
  }
  return from_bits(bits_of(p) + (bits_of(shifted) << 23));
}

template <bool EXACT, class V>
PGOLF_INLINE V exp2(V x, float k) {
  return exp2_to<EXACT ? 6 : 4>(x, k);
}

// tanh(y) to 1e-7: y + y^3 P(y^2) up to 0.625, 1 - 2 / (exp(2 |y|) + 1) beyond.
template <class V>
PGOLF_INLINE V exact_tanh(V y) {
  const auto sign = bits_of(y) & INT32_MIN;
  const V size = min(10.0f, from_bits(bits_of(y) ^ sign)), t = size * size;
  V p = t * -5.71704215e-3f + 2.06505845e-2f;
  p = p * t - 5.37434971e-2f;
  p = p * t + 1.33314913e-1f;
  p = p * t - 3.33332839e-1f;
  const V near = size + size * (t * p);
  const V far = 1.0f - 2.0f * reciprocal<true>(exp2<true>(size, 2.88539008f) + 1.0f);
  return from_bits(bits_of(select(size < 0.625f, near, far)) | sign);
}

// scale tanh(y): tanh to 1.2e-5, reached where |y| > 6; to 1e-6 below that. A minimax rational function: half the work.
template <class V>
PGOLF_INLINE V rough_tanh(V y, float scale = 1) {
  y = max(-6.0f, min(6.0f, y));
  const V t = y * y;
  V p = t * (scale * 4.50662586e-6f) + scale * 2.39122973e-3f;
  p = p * t + scale * 1.24265763e-1f;
  p = p * t + scale * 9.99998691e-1f;
  V q = t * 1.55124245e-4f + 2.15948578e-2f;
  q = q * t + 4.57594098e-1f;
  return y * p * rough_reciprocal(q * t + 1.0f);
}

// scale tanh(y)
template <bool EXACT, class V>
PGOLF_INLINE V tanh(V y, float scale = 1) {
  if constexpr (EXACT) return exact_tanh(y) * scale;
  return rough_tanh(y, scale);
}

}  // namespace pgolf::PGOLF_ISA
