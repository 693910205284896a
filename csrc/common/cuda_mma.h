// Sixteen-bit floats on a GPU, and the tensor cores' product of them. Every NVIDIA GPU from sm_80 on has these
// instructions; newer and faster ones want tiles of 64 rows, more than a matrix-vector product has.
#pragma once
#include <string.h>

#include "common/cuda.h"

namespace pgolf {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#ifndef PGOLF_EMULATE_CUDA

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// To nearest even.
__device__ __forceinline__ void round_to(float x, float& y) { y = x; }
__device__ __forceinline__ void round_to(float x, Bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void round_to(float x, Half& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// a b + c in each half of a word, rounded once; T: the halves' format.
template <class T>
__device__ __forceinline__ unsigned fma_pairs(unsigned a, unsigned b, unsigned c);
template <>
__device__ __forceinline__ unsigned fma_pairs<Bf16>(unsigned a, unsigned b, unsigned c) {
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
  return a;
}
template <>
__device__ __forceinline__ unsigned fma_pairs<Half>(unsigned a, unsigned b, unsigned c) {
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
  return a;
}

// c += a b for a [16, 16], b [16, 8], c [16, 8], by a warp. With g = lane / 4 and t = lane % 4 a lane holds, as pairs
// of neighbours: of a, rows g and g + 8 at columns 2t (words 0, 1) and 2t + 8 (words 2, 3); of b, column g at rows 2t
// and 2t + 8; of c, columns 2t and 2t + 1 of row g, then of row g + 8.
#define PGOLF_MMA(T, name)                                                                                        \
  template <>                                                                                                     \
  __device__ __forceinline__ void mma_16x8x16<T>(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                    \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                      \
  }
template <class T>
__device__ __forceinline__ void mma_16x8x16(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]);
PGOLF_MMA(Bf16, "bf16")
PGOLF_MMA(Half, "f16")
#undef PGOLF_MMA

#else

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline float to_float(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? ldexpf(float(mantissa), -24)
                                     : ldexpf(float(1024 + mantissa), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

inline void round_to(float x, float& y) { y = x; }
inline void round_to(float x, Bf16& y) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  y.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void round_to(float x, Half& y) {
  const float size = fabsf(x);
  int exponent = -14;
  if (size >= ldexpf(1, -14) && size < INFINITY) frexpf(size, &exponent), --exponent;
  // A mantissa that rounds up to 2048 carries into the exponent, as it should.
  const int steps = size < INFINITY ? int(fminf(nearbyintf(ldexpf(size, 10 - exponent)), 2048)) : 0;
  const int bits = x != x ? 0x7fff : size >= 65520 ? 0x7c00 : (exponent + 14) * 1024 + steps;
  y.bits = uint16_t(bits | (x == x && signbit(x)) << 15);
}

template <class T>
T half_of(unsigned word, int i) {
  return {uint16_t(word >> 16 * i)};
}

template <class T>
unsigned fma_pairs(unsigned a, unsigned b, unsigned c) {
  unsigned result = 0;
  for (int i = 0; i < 2; ++i) {
    T y;
    round_to(fmaf(to_float(half_of<T>(a, i)), to_float(half_of<T>(b, i)), to_float(half_of<T>(c, i))), y);
    result |= unsigned(y.bits) << 16 * i;
  }
  return result;
}

// The hardware aligns the 16 products and c to the largest of them and cuts off what is below; here the sum is exact,
// and cut off to float32.
template <class T>
void mma_16x8x16(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) {
  unsigned all_a[2][32][2], all_b[32][2];  // of a by halves of the depth
  memcpy(all_a[0], emulation::exchange(a[0] | uint64_t(a[1]) << 32), sizeof all_b);
  memcpy(all_a[1], emulation::exchange(a[2] | uint64_t(a[3]) << 32), sizeof all_b);
  memcpy(all_b, emulation::exchange(b[0] | uint64_t(b[1]) << 32), sizeof all_b);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const unsigned pair_a = all_a[k / 8][g * 4 + k % 8 / 2][row], pair_b = all_b[column * 4 + k % 8 / 2][k / 8];
      sum += double(to_float(half_of<T>(pair_a, k % 2))) * double(to_float(half_of<T>(pair_b, k % 2)));
    }
    const float nearest = float(sum);
    c[i] = fabs(double(nearest)) > fabs(sum) ? nextafterf(nearest, 0) : nearest;
  }
}

#endif

}  // namespace pgolf
