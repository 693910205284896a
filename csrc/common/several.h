// N vectors that go through a formula side by side, for loops whose body is one long chain of dependent instructions.
//
// The surprise: with chains one after the other the CPU finds too little to do, although they are independent: their
// waiting instructions fill its schedulers. Here every operator is N instructions that can start together, a quarter
// less time on Zen 5. N times the live values must fit the registers: 8 for 32 of them, fewer for 16.
#pragma once
#include "common/simd.h"

namespace pgolf::PGOLF_ISA {

template <class V, int N>
struct Several {
  V x[N];
};

template <int N, class F>
PGOLF_INLINE auto each(const F& f) {
  Several<decltype(f(0)), N> r;
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) r.x[i] = f(i);
  return r;
}
#define PGOLF_EACH(...) each<N>([&](int i) __attribute__((always_inline)) { return __VA_ARGS__; })

#define PGOLF_OPERATOR(op)                                                        \
  template <class V, int N>                                                       \
  PGOLF_INLINE auto operator op(const Several<V, N>& a, const Several<V, N>& b) { \
    return PGOLF_EACH(a.x[i] op b.x[i]);                                          \
  }                                                                               \
  template <class V, int N, class S>                                              \
  PGOLF_INLINE auto operator op(const Several<V, N>& a, S b) {                    \
    return PGOLF_EACH(a.x[i] op b);                                               \
  }                                                                               \
  template <class V, int N>                                                       \
  PGOLF_INLINE auto operator op(float a, const Several<V, N>& b) {                \
    return PGOLF_EACH(a op b.x[i]);                                               \
  }
PGOLF_OPERATOR(+)
PGOLF_OPERATOR(-)
PGOLF_OPERATOR(*)
PGOLF_OPERATOR(/)
PGOLF_OPERATOR(&)
PGOLF_OPERATOR(|)
PGOLF_OPERATOR(^)
PGOLF_OPERATOR(<)
PGOLF_OPERATOR(<<)
#undef PGOLF_OPERATOR

template <int N, class T>
PGOLF_INLINE Several<vf, N> load_several(const T* p) {
  return PGOLF_EACH(load(p + i * kLanes));
}
template <int N, class T>
PGOLF_INLINE void store(T* p, const Several<vf, N>& a) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(p + i * kLanes, a.x[i]);
}

template <int N>
PGOLF_INLINE auto bits_of(const Several<vf, N>& a) {
  return PGOLF_EACH(bits_of(a.x[i]));
}
template <int N>
PGOLF_INLINE auto from_bits(const Several<vi, N>& a) {
  return PGOLF_EACH(from_bits(a.x[i]));
}
template <int N>
PGOLF_INLINE auto select(const Several<vi, N>& mask, const Several<vf, N>& a, const Several<vf, N>& b) {
  return PGOLF_EACH(select(mask.x[i], a.x[i], b.x[i]));
}
template <int N>
PGOLF_INLINE auto min(float a, const Several<vf, N>& b) {
  return PGOLF_EACH(min(a, b.x[i]));
}
template <int N>
PGOLF_INLINE auto max(float a, const Several<vf, N>& b) {
  return PGOLF_EACH(max(a, b.x[i]));
}
template <int N>
PGOLF_INLINE auto rough_reciprocal(const Several<vf, N>& a) {
  return PGOLF_EACH(rough_reciprocal(a.x[i]));
}
#undef PGOLF_EACH

// The lanes' sums over the vectors.
template <int N>
PGOLF_INLINE vf sum_vectors(const Several<vf, N>& a) {
  vf total = a.x[0];
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) total += a.x[i];
  return total;
}

}  // namespace pgolf::PGOLF_ISA
