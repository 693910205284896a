// The loops of slot_kernels.h, compiled once per instruction set by slot_<isa>.cpp, which defines PGOLF_ISA.
//
// The surprise is what bounds them: at about 18 vector instructions per 16 logits a sweep is arithmetic, not memory, so
// it neither blocks for a cache nor fuses two steps; it reads half-precision storage to save instructions elsewhere.
#include <math.h>

#include <type_traits>

#include "common/simd.h"
#include "slot/slot_kernels.h"

namespace pgolf::slot::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

// Registers of the product's inner tile: kTileRows x 2 accumulators, 2 columns' vectors, the rest for addresses.
constexpr int kTileRows = kLanes == 16 ? 14 : 6;
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kBlockRows = 8 * kTileRows;  // packed rows x D floats stay in L2
static_assert(kColumnMultiple % kPanel == 0, "a row of the base is whole panels");

template <class T>
PGOLF_INLINE const T* row(const Rows& rows, int64_t i, int64_t D) {
  return (const T*)rows.hidden + (int64_t)rows.index[i] * D;
}

// The product runs on 32-bit words: a float, or two bfloat16 of neighbouring depth where the CPU multiplies such pairs.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPairs = sizeof(T) == 2;
#else
template <class T>
constexpr bool kPairs = false;
#endif
template <class T>
using Word = std::conditional_t<kPairs<T>, uint32_t, float>;

template <class T>
PGOLF_INLINE int64_t depth(int64_t D) {
  return kPairs<T> ? (D + 1) / 2 : D;
}

// Word k of a row of D elements.
template <class T>
PGOLF_INLINE Word<T> word(const T* row, int64_t k, int64_t D) {
  if constexpr (kPairs<T>) {
    return row[2 * k].bits | uint32_t(2 * k + 1 < D ? row[2 * k + 1].bits : 0) << 16;
  } else {
    return load_one(row + k);
  }
}

template <class T>
void pack_as(const Head& head, int64_t p, Word<T>* out) {
  const T* w = (const T*)head.weight + p * kPanel * head.D;
  const int64_t columns = head.V - p * kPanel < kPanel ? head.V - p * kPanel : kPanel;
  for (int64_t j = 0; j < kPanel; ++j)
    for (int64_t k = 0; k < depth<T>(head.D); ++k)
      out[k * kPanel + j] = j < columns ? word(w + j * head.D, k, head.D) : Word<T>(0);
}

// kTileRows rows, starting at `first`, as [depth][kTileRows]; rows from n on are zeros.
template <class T>
void pack_tile(const Head& head, const Rows& rows, int64_t first, Word<T>* out) {
  for (int r = 0; r < kTileRows; ++r) {
    const bool inside = first + r < rows.n;
    const T* h = row<T>(rows, inside ? first + r : 0, head.D);
    for (int64_t k = 0; k < depth<T>(head.D); ++k) out[k * kTileRows + r] = inside ? word(h, k, head.D) : Word<T>(0);
  }
}

PGOLF_INLINE void multiply_add(vf& acc, float a, vf b) { acc += a * b; }
#if defined(__AVX512BF16__)
PGOLF_INLINE void multiply_add(vf& acc, uint32_t a, vi b) {
  acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

template <class W>
PGOLF_INLINE void multiply(const W* a, const W* b, int64_t depth, vf (&acc)[kTileRows][2]) {
  using Vector = std::conditional_t<std::is_same_v<W, float>, vf, vi>;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = splat(0.0f);
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kPanel) {
    const Vector left = read<Vector>(b), right = read<Vector>(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      multiply_add(acc[r][0], a[r], left);
      multiply_add(acc[r][1], a[r], right);
    }
  }
}

template <class T, class S, bool EXACT>
void freeze_as(const Head& head, const Rows& rows, float cap, const float* b0, const float* scale, void* scratch,
               S* base) {
  const float inverse = cap ? 1 / cap : 0;
  const int64_t K = depth<T>(head.D);
  Word<T>* packed_rows = (Word<T>*)scratch;
  for (int64_t first = 0; first < rows.n; first += kBlockRows) {
    const int64_t last = first + kBlockRows < rows.n ? first + kBlockRows : rows.n;
    for (int64_t i = first; i < last; i += kTileRows) pack_tile<T>(head, rows, i, packed_rows + (i - first) * K);
    for (int64_t v = 0; v < head.stride; v += kPanel) {
      const vf b_left = b0 ? load(b0 + v) : splat(0), b_right = b0 ? load(b0 + v + kLanes) : splat(0);
      for (int64_t i = first; i < last; i += kTileRows) {
        vf acc[kTileRows][2];
        multiply(packed_rows + (i - first) * K, (const Word<T>*)head.packed + v * K, K, acc);
        const int count = last - i < kTileRows ? int(last - i) : kTileRows;
        for (int r = 0; r < count; ++r) {
          S* out = base + (i + r) * head.stride + v;
          vf left = acc[r][0], right = acc[r][1];
          if (scale) left *= scale[i + r], right *= scale[i + r];
          if (cap) {
            left = tanh<EXACT>((left + b_left) * inverse);
            right = tanh<EXACT>((right + b_right) * inverse);
          }
          store(out, left);
          store(out + kLanes, right);
        }
      }
    }
  }
}

void freeze(const Head& head, const Rows& rows, float cap, const float* b0, const float* scale, bool exact,
            void* packed_rows, void* base) {
  const bool wide = head.dtype == DType::float32;
  if (wide) {
    freeze_as<float, float, true>(head, rows, cap, b0, scale, packed_rows, (float*)base);
  } else if (exact) {
    freeze_as<bf16, float, true>(head, rows, cap, b0, scale, packed_rows, (float*)base);
  } else {
    freeze_as<bf16, half, false>(head, rows, cap, b0, scale, packed_rows, (half*)base);
  }
}

// gradient += sum over the group's rows of factor[j] * scratch row j
PGOLF_INLINE void add_group(const Head& head, const float* scratch, int count, const float* factor, float* gradient) {
  static_assert(kRowsPerGroup == 2, "written out for two rows");
  const float *first = scratch, *second = count > 1 ? scratch + head.stride : scratch;  // factor[1] is 0 for one row
  for (int64_t v = 0; v < head.stride; v += kLanes)
    store(gradient + v, load(gradient + v) + (factor[0] * load(first + v) + factor[1] * load(second + v)));
}

template <class S, bool EXACT>
void sweep_u_as(const Head& head, const Sweep& s) {
  const float k = s.cap * 1.44269504f;  // to base 2
  const int64_t whole = head.V / kLanes * kLanes;
  const vi tail = first_lanes(int(head.V - whole));
  for (int64_t first = 0; first < s.rows.n; first += kRowsPerGroup) {
    const int count = s.rows.n - first < kRowsPerGroup ? int(s.rows.n - first) : kRowsPerGroup;
    float factor[kRowsPerGroup] = {};
    for (int j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const S* u = (const S*)s.base + i * head.stride;
      float* d = s.scratch + j * head.stride;
      vf total = splat(0);
      const auto at = [&](int64_t v, bool masked) __attribute__((always_inline)) {
        __builtin_prefetch(u + head.stride + v);  // the next row: a third off the time at V = 4096
        const vf uv = load(u + v), wv = load(s.b + v);
        const vf q = (uv + wv) * reciprocal<EXACT>(uv * wv + 1.0f);
        vf e = exp2<EXACT>(q, k);
        if (masked) e = keep(e, tail);
        total += e;
        store(d + v, e * (1.0f - q * q));
      };
      int64_t v = 0;
      for (; v < whole; v += kLanes) at(v, false);
      if (v < head.V) at(v, true);
      for (v += v < head.V ? kLanes : 0; v < head.stride; v += kLanes) store(d + v, splat(0));
      const int32_t y = s.rows.target[i];
      const float uy = load_one(u + y), q = (uy + s.b[y]) / (1 + uy * s.b[y]), z = sum(total);
      s.nll[i] = logf(z) - s.cap * q;
      factor[j] = s.rows.weight[i] / z;
      s.gradient[y] -= s.rows.weight[i] * (1 - q * q);
    }
    add_group(head, s.scratch, count, factor, s.gradient);
  }
}

// SHIFT: subtract the row's maximum before exp. GRADIENT: also the gradient and the slopes.
template <class S, bool EXACT, bool CAPPED, bool SHIFT, bool GRADIENT>
void sweep_z_as(const Head& head, const Sweep& s) {
  const float inverse = CAPPED ? 1 / s.cap : 1, cap = CAPPED ? s.cap : 1, k = cap * 1.44269504f;
  const int64_t whole = head.V / kLanes * kLanes;
  const vi tail = first_lanes(int(head.V - whole));
  for (int64_t first = 0; first < s.rows.n; first += kRowsPerGroup) {
    const int count = s.rows.n - first < kRowsPerGroup ? int(s.rows.n - first) : kRowsPerGroup;
    float factor[kRowsPerGroup] = {}, bias_factor[kRowsPerGroup] = {};
    for (int j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const S* base = (const S*)s.base + i * head.stride;
      float* d = s.scratch + j * head.stride;
      const float rho = s.rho[i] * inverse, r = s.r[i] * inverse;
      // In units of cap: the logit without the bias, and with it.
      const auto before_bias = [&](int64_t v)
                                   __attribute__((always_inline)) { return load(base + v) * rho + load(s.b + v) * r; };
      const auto logit = [&](int64_t v, vf x) __attribute__((always_inline)) { return x + load(s.bias + v) * inverse; };
      const auto capped = [](vf y) __attribute__((always_inline)) { return CAPPED ? tanh<EXACT>(y) : y; };
      float top = 0;
      if (SHIFT) {
        vf most = splat(-INFINITY);
        for (int64_t v = 0; v < whole; v += kLanes) most = max(most, logit(v, before_bias(v)));
        if (whole < head.V) {
          const vf last = logit(whole, before_bias(whole));
          most = max(most, (vf)(((vi)last & tail) | ((vi)splat(-INFINITY) & ~tail)));
        }
        top = capped(splat(greatest(most)))[0];
      }
      vf total = splat(0), slope = splat(0);
      const auto at = [&](int64_t v, bool masked) __attribute__((always_inline)) {
        __builtin_prefetch(base + head.stride + v);
        const vf x = before_bias(v), q = capped(logit(v, x));
        vf e = SHIFT ? exp2<EXACT>(max((q - top) * k, splat(-126.0f)), 1) : exp2<EXACT>(q, k);
        if (masked) e = keep(e, tail);
        total += e;
        if (GRADIENT) {
          const vf dv = CAPPED ? e * (1.0f - q * q) : e;
          store(d + v, dv);
          slope += dv * x;
        }
      };
      int64_t v = 0;
      for (; v < whole; v += kLanes) at(v, false);
      if (v < head.V) at(v, true);
      const int32_t target = s.rows.target[i];
      const float x = load_one(base + target) * rho + s.b[target] * r;
      const float q = capped(splat(x + s.bias[target] * inverse))[0], z = sum(total);
      s.nll[i] = logf(z) + cap * (top - q);
      if (GRADIENT) {
        for (v += v < head.V ? kLanes : 0; v < head.stride; v += kLanes) store(d + v, splat(0));
        const float m = s.rows.weight[i], own = CAPPED ? 1 - q * q : 1;
        bias_factor[j] = m / z;
        factor[j] = s.r[i] * bias_factor[j];
        s.gradient[target] -= m * s.r[i] * own;
        s.slope[i] = m * cap * (sum(slope) / z - own * x);
        if (s.bias_gradient) s.bias_gradient[target] -= m * own;
      }
    }
    if (GRADIENT) add_group(head, s.scratch, count, factor, s.gradient);
    if (GRADIENT && s.bias_gradient) add_group(head, s.scratch, count, bias_factor, s.bias_gradient);
  }
}

template <class S, bool EXACT, bool GRADIENT>
void sweep_z_of(const Head& head, const Sweep& s) {
  if (!s.cap) {
    sweep_z_as<S, EXACT, false, true, GRADIENT>(head, s);
  } else if (s.cap > kLargestPlainCap) {
    sweep_z_as<S, EXACT, true, true, GRADIENT>(head, s);
  } else {
    sweep_z_as<S, EXACT, true, false, GRADIENT>(head, s);
  }
}

void sweep_u(const Head& head, const Sweep& s) {
  head.dtype == DType::float32 ? sweep_u_as<float, true>(head, s) : sweep_u_as<half, false>(head, s);
}

void sweep_z(const Head& head, const Sweep& s) {
  if (!s.gradient) {
    sweep_z_of<float, true, false>(head, s);
  } else {
    head.dtype == DType::float32 ? sweep_z_of<float, true, true>(head, s) : sweep_z_of<half, false, true>(head, s);
  }
}

template <class T>
void inverse_rms_as(const Head& head, const Rows& rows, const float* delta, float* r) {
  const int64_t D = head.D, whole = D / kLanes * kLanes;
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* h = row<T>(rows, i, D);
    vf squares = splat(0);
    for (int64_t d = 0; d < whole; d += kLanes) {
      const vf x = delta ? load(h + d) + load(delta + d) : load(h + d);
      squares += x * x;
    }
    float total = sum(squares);
    for (int64_t d = whole; d < D; ++d) {
      const float x = load_one(h + d) + (delta ? delta[d] : 0);
      total += x * x;
    }
    r[i] = 1 / sqrtf(total / D + kRmsEps);
  }
}

// out[d] += sum_i q[i] x_i[d] over n rows of D elements that `at` finds. Eight rows are added up before they meet
// `out`: fewer roundings at its size, and an eighth of its traffic.
template <class T, class At>
PGOLF_INLINE void combine(int64_t n, int64_t D, const float* q, float* out, const At& at) {
  constexpr int kRows = 8;
  const int64_t whole = D / kLanes * kLanes;
  for (int64_t i = 0; i < n; i += kRows) {
    const T* x[kRows];
    float factor[kRows];
    for (int j = 0; j < kRows; ++j) {
      x[j] = at(i + j < n ? i + j : i);
      factor[j] = i + j < n ? q[i + j] : 0;
    }
    for (int64_t d = 0; d < whole; d += kLanes) {
      vf sum = splat(0);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) sum += factor[j] * load(x[j] + d);
      store(out + d, load(out + d) + sum);
    }
    for (int64_t d = whole; d < D; ++d) {
      float sum = 0;
      for (int j = 0; j < kRows; ++j) sum += factor[j] * load_one(x[j] + d);
      out[d] += sum;
    }
  }
}

template <class T>
void project_as(const Head& head, const float* delta, const float* bias, float* b) {
  const int64_t D = head.D, whole = D / kLanes * kLanes;
  for (int64_t v = 0; v < head.V; ++v) {
    const T* w = (const T*)head.weight + v * D;
    vf even = splat(0), odd = splat(0);
    int64_t d = 0;
    for (; d + 2 * kLanes <= whole; d += 2 * kLanes) {
      even += load(w + d) * load(delta + d);
      odd += load(w + d + kLanes) * load(delta + d + kLanes);
    }
    if (d < whole) even += load(w + d) * load(delta + d);
    float total = sum(even + odd);
    for (d = whole; d < D; ++d) total += load_one(w + d) * delta[d];
    b[v] = total + (bias ? bias[v] : 0);
  }
}

int64_t words_per_row(const Head& head) {
  return head.dtype == DType::float32 ? depth<float>(head.D) : depth<bf16>(head.D);
}

void pack(const Head& head, int64_t p, void* out) {
  if (head.dtype == DType::float32) {
    pack_as<float>(head, p, (float*)out);
  } else {
    pack_as<bf16>(head, p, (Word<bf16>*)out);
  }
}

void inverse_rms(const Head& head, const Rows& rows, const float* delta, float* r) {
  head.dtype == DType::float32 ? inverse_rms_as<float>(head, rows, delta, r)
                               : inverse_rms_as<bf16>(head, rows, delta, r);
}

void add_rows(const Head& head, const Rows& rows, const float* q, float* out) {
  if (head.dtype == DType::float32) {
    combine<float>(rows.n, head.D, q, out, [&](int64_t i) { return row<float>(rows, i, head.D); });
  } else {
    combine<bf16>(rows.n, head.D, q, out, [&](int64_t i) { return row<bf16>(rows, i, head.D); });
  }
}

void project(const Head& head, const float* delta, const float* bias, float* b) {
  memset(b, 0, head.stride * sizeof(float));
  if (!delta) {
    if (bias) memcpy(b, bias, head.V * sizeof(float));
  } else if (head.dtype == DType::float32) {
    project_as<float>(head, delta, bias, b);
  } else {
    project_as<bf16>(head, delta, bias, b);
  }
}

void pull_back(const Head& head, const float* g, float* d_delta) {
  memset(d_delta, 0, head.D * sizeof(float));
  if (head.dtype == DType::float32) {
    combine<float>(head.V, head.D, g, d_delta, [&](int64_t v) { return (const float*)head.weight + v * head.D; });
  } else {
    combine<bf16>(head.V, head.D, g, d_delta, [&](int64_t v) { return (const bf16*)head.weight + v * head.D; });
  }
}

void shift(const Head& head, const float* b, const float* b0, float cap, float* w) {
  for (int64_t v = 0; v < head.stride; v += kLanes) store(w + v, tanh<true>((load(b + v) - load(b0 + v)) * (1 / cap)));
}

}  // namespace

const Kernels kKernels = {kPanel,  kBlockRows,  sizeof(half), words_per_row, pack,      freeze, sweep_u,
                          sweep_z, inverse_rms, add_rows,     project,       pull_back, shift};

}  // namespace pgolf::slot::PGOLF_ISA
