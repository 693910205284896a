// The loops of slot_kernels.h, compiled once per instruction set by slot_<isa>.cpp, which defines PGOLF_ISA.
//
// The surprise is what bounds them: at about 20 vector instructions per 16 logits a sweep is arithmetic, not memory, so
// it neither blocks for a cache nor fuses two steps; what counts is that the CPU always finds an instruction to start.
#include <math.h>

#include "common/product.h"
#include "common/several.h"
#include "slot/slot_kernels.h"

namespace pgolf::slot::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

// Whole blocks of about 256 rows: as left operand they stay in L2, and the weight is read once for all of them.
template <class T>
constexpr int64_t kFreezeRows = 256 / kBlockRows<T> * kBlockRows<T>;
static_assert(kColumnMultiple % kPanel == 0, "a row of the base is whole panels");

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

template <class T>
PGOLF_INLINE const T* row(const Rows& rows, int64_t i, int64_t D) {
  return (const T*)rows.hidden + (int64_t)rows.index[i] * D;
}

template <class T, class S, bool EXACT>
void freeze_as(const Head& head, const Rows& rows, float cap, const float* b0, const float* scale, void* scratch,
               S* base) {
  const TileScope tiles;
  (void)tiles;
  const float inverse = cap ? 1 / cap : 0, k = cap * kLog2E;
  const int64_t panel_words = words<T>(head.D) * kPanel;
  float* sums = (float*)scratch;
  Element<T>* packed_rows = (Element<T>*)(sums + sums_size<T>(kFreezeRows<T>));
  constexpr int64_t kRows = kFreezeRows<T>;
  for (int64_t first = 0; first < rows.n; first += kRows) {
    const int64_t count = rows.n - first < kRows ? rows.n - first : kRows;
    const Left<T> left =
        pack_left<T>(count, head.D, packed_rows, [&](int64_t i) { return row<T>(rows, first + i, head.D); });
    product<T>(
        left, head.D, 0, head.stride / kPanel, sums, [](int64_t) { return int64_t(0); },
        [&](int64_t p, int64_t k, int64_t) { return (const Word<T>*)head.packed + p * panel_words + k * kPanel; },
        [&](int64_t i, int64_t p, const float* c) __attribute__((always_inline)) {
          S* out = base + (first + i) * head.stride + p * kPanel;
          const float factor = scale ? scale[first + i] : 1;
          auto x = load_several<2>(c) * factor;
          if (cap) {
            if (b0) x = x + load_several<2>(b0 + p * kPanel);
            x = tanh<EXACT>(x * inverse, k);
          }
          store(out, x);
        });
  }
}

void freeze(const Head& head, const Rows& rows, float cap, const float* b0, const float* scale, bool exact,
            void* scratch, void* base) {
  const bool wide = head.dtype == DType::float32;
  if (wide) {
    freeze_as<float, float, true>(head, rows, cap, b0, scale, scratch, (float*)base);
  } else if (exact) {
    freeze_as<bf16, float, true>(head, rows, cap, b0, scale, scratch, (float*)base);
  } else {
    freeze_as<bf16, half, false>(head, rows, cap, b0, scale, scratch, (half*)base);
  }
}

// Vectors that the sweeps take side by side: more spill.
constexpr int kTogether = kLanes == 16 ? 8 : 4;

// step(v, Count<N>) for N vectors at v: all of [0, V) in kTogether, then one by one, the last with lanes beyond V.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Step>
PGOLF_INLINE void for_vectors(int64_t V, const Step& step) {
  int64_t v = 0;
  for (; v + kTogether * kLanes <= V; v += kTogether * kLanes) step(v, Count<kTogether>());
  for (; v < V; v += kLanes) step(v, Count<1>());
}

// Lanes of a vector at v that lie within V; all of them unless N is 1.
template <int N>
PGOLF_INLINE Several<vf, N> inside(Several<vf, N> x, int64_t v, int64_t V) {
  if constexpr (N == 1) x.x[0] = keep(x.x[0], first_lanes(V - v < kLanes ? int(V - v) : kLanes));
  return x;
}

// The row that follows, into the first-level cache: a third off the time at V = 4096.
template <int N, class S>
PGOLF_INLINE void prefetch_next(const S* p, int64_t stride) {
#pragma GCC unroll 16
  for (int64_t j = 0; j < N * kLanes; j += 64 / sizeof(S)) __builtin_prefetch(p + stride + j);
}

template <class S, bool EXACT>
void sweep_u_as(const Head& head, const Sweep& s) {
  constexpr int kDegree = EXACT ? 6 : 3;  // 7.5e-5 of a probability, where half storage costs up to 4e-3
  const float k = s.cap * kLog2E, square = k * k;
  const int64_t V = head.V, stride = head.stride;
  const float *w = s.b, *w_over_square = s.w_over_square;
  float *const gradient = s.gradient, *const waiting = s.scratch;
  float factor = 0;
  memset(waiting, 0, stride * sizeof(float));
  for (int64_t i = 0; i < s.rows.n; ++i) {
    const S* u = (const S*)s.base + i * stride;
    vf total = splat(0);
    for_vectors(V, [&](int64_t v, auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      prefetch_next<N>(u + v, stride);
      const auto uv = load_several<N>(u + v);
      const auto one_plus = uv * load_several<N>(w_over_square + v) + 1.0f;
      const auto q = (uv + load_several<N>(w + v)) * reciprocal<EXACT>(one_plus);
      const auto e = inside(exp2_to<kDegree>(q, 1), v, V);
      total += sum_vectors(e);
      const auto sum = load_several<N>(gradient + v) + load_several<N>(waiting + v) * factor;
      store(gradient + v, sum);
      store(waiting + v, e * (square - q * q));
    });
    s.nll[i] = sum(total);
    factor = s.rows.weight[i] / (s.nll[i] * square);
  }
  for (int64_t v = 0; v < V; v += kLanes) store(gradient + v, load(gradient + v) + factor * load(waiting + v));
  for (int64_t i = 0; i < s.rows.n; ++i) {
    const int32_t y = s.rows.target[i];
    const float u = load_one((const S*)s.base + i * stride + y);
    const float q = (u + w[y]) / (1 + u * w_over_square[y]);
    s.nll[i] = logf(s.nll[i]) - kLn2 * q;
    gradient[y] -= s.rows.weight[i] * (1 - q * q / square);
  }
}

// SHIFT: subtract the row's maximum before exp. GRADIENT: also the gradient and the slopes. BIAS: there may be one.
template <class S, bool EXACT, bool CAPPED, bool SHIFT, bool GRADIENT, bool BIAS>
void sweep_z_as(const Head& head, const Sweep& s) {
  constexpr int kDegree = EXACT ? 6 : 3;
  // Logits are q times unit: to base 2 if capped, so that the cap's factor k meets the constants of tanh.
  const float inverse = CAPPED ? 1 / s.cap : 1, k = CAPPED ? s.cap * kLog2E : 1, square = k * k;
  const float to_base_2 = CAPPED ? 1 : kLog2E, unit = CAPPED ? kLn2 : 1;
  const int64_t V = head.V, stride = head.stride;
  const float *b = s.b, *bias = s.bias;
  float *const gradient = s.gradient, *const bias_gradient = s.bias_gradient, *const waiting = s.scratch;
  float factor = 0, bias_factor = 0;
  if (GRADIENT) memset(waiting, 0, stride * sizeof(float));
  for (int64_t i = 0; i < s.rows.n; ++i) {
    const S* base = (const S*)s.base + i * stride;
    const float rho = s.rho[i] * inverse, r = s.r[i] * inverse;
    const auto capped = [&](auto y) __attribute__((always_inline)) {
      if constexpr (CAPPED) return tanh<EXACT>(y, k);
      return y;
    };
    // In units of cap: the logit without the bias, and with it.
    const auto before_bias = [&](int64_t v, auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      return load_several<N>(base + v) * rho + load_several<N>(b + v) * r;
    };
    const auto with_bias = [&](auto x, int64_t v, auto count) __attribute__((always_inline)) {
      if constexpr (BIAS) return x + load_several<decltype(count)::value>(bias + v) * inverse;
      return x;
    };
    float top = 0;
    if (SHIFT) {
      vf most = splat(-INFINITY);
      for (int64_t v = 0; v < V; v += kLanes) {
        const vf y = with_bias(before_bias(v, Count<1>()), v, Count<1>()).x[0];
        const vi in = first_lanes(V - v < kLanes ? int(V - v) : kLanes);
        most = max(most, select(in, y, most));
      }
      top = capped(splat(greatest(most)))[0];
    }
    vf total = splat(0), slope = splat(0);
    for_vectors(V, [&](int64_t v, auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      prefetch_next<N>(base + v, stride);
      const auto x = before_bias(v, count), q = capped(with_bias(x, v, count));
      const auto e = inside(
          SHIFT ? exp2_to<kDegree>(max(-126.0f, (q - top) * to_base_2), 1) : exp2_to<kDegree>(q, to_base_2), v, V);
      total += sum_vectors(e);
      if constexpr (GRADIENT) {
        const auto before = load_several<N>(waiting + v);
        store(gradient + v, load_several<N>(gradient + v) + before * factor);
        if (BIAS && bias_gradient) store(bias_gradient + v, load_several<N>(bias_gradient + v) + before * bias_factor);
        auto d = e;
        if constexpr (CAPPED) d = e * (square - q * q);
        store(waiting + v, d);
        slope += sum_vectors(d * x);
      }
    });
    const int32_t y = s.rows.target[i];
    const float x = load_one(base + y) * rho + b[y] * r;
    const float q = capped(splat(BIAS ? x + bias[y] * inverse : x))[0], z = sum(total);
    s.nll[i] = logf(z) + unit * (top - q);
    if (GRADIENT) {
      const float m = s.rows.weight[i], own = CAPPED ? 1 - q * q / square : 1;
      bias_factor = m / (z * square);
      factor = s.r[i] * bias_factor;
      gradient[y] -= m * s.r[i] * own;
      s.slope[i] = (CAPPED ? s.cap : 1) * (bias_factor * sum(slope) - m * own * x);
      if (BIAS && bias_gradient) bias_gradient[y] -= m * own;
    }
  }
  for (int64_t v = 0; GRADIENT && v < V; v += kLanes) {
    const vf last = load(waiting + v);
    store(gradient + v, load(gradient + v) + factor * last);
    if (BIAS && bias_gradient) store(bias_gradient + v, load(bias_gradient + v) + bias_factor * last);
  }
}

template <class S, bool EXACT, bool GRADIENT>
void sweep_z_of(const Head& head, const Sweep& s) {
  if (!s.cap) {
    sweep_z_as<S, EXACT, false, true, GRADIENT, true>(head, s);
  } else if (s.cap > kLargestPlainCap) {
    sweep_z_as<S, EXACT, true, true, GRADIENT, true>(head, s);
  } else if (s.bias_gradient || !GRADIENT) {
    sweep_z_as<S, EXACT, true, false, GRADIENT, true>(head, s);
  } else {
    sweep_z_as<S, EXACT, true, false, GRADIENT, false>(head, s);
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
  const int64_t D = head.D;
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* h = row<T>(rows, i, D);
    // Four sums: one would wait for itself.
    Several<vf, 4> squares = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
      auto x = load_several<4>(h + d);
      if (delta) x = x + load_several<4>(delta + d);
      squares = squares + x * x;
    }
    float total = sum(sum_vectors(squares));
    for (; d < D; ++d) {
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
  const int64_t D = head.D;
  for (int64_t v = 0; v < head.V; ++v) {
    const T* w = (const T*)head.weight + v * D;
    Several<vf, 4> sums = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) sums = sums + load_several<4>(w + d) * load_several<4>(delta + d);
    float total = sum(sum_vectors(sums));
    for (; d < D; ++d) total += load_one(w + d) * delta[d];
    b[v] = total + (bias ? bias[v] : 0);
  }
}

template <class T>
void pack_as(const Head& head, int64_t p, Word<T>* out) {
  const int64_t left = head.V - p * kPanel;
  pack_transposed<T>((const T*)head.weight + p * kPanel * head.D, head.D, left < kPanel ? left : kPanel, head.D, out);
}

void pack(const Head& head, int64_t p, void* out) {
  head.dtype == DType::float32 ? pack_as<float>(head, p, (Word<float>*)out) : pack_as<bf16>(head, p, (Word<bf16>*)out);
}

template <class T>
int64_t scratch_bytes_as(const Head& head) {
  return sums_size<T>(kFreezeRows<T>) * sizeof(float) + left_size<T>(kFreezeRows<T>, head.D) * sizeof(Element<T>);
}

int64_t words_per_row(const Head& head) {
  return head.dtype == DType::float32 ? words<float>(head.D) : words<bf16>(head.D);
}

int64_t scratch_bytes(const Head& head) {
  return head.dtype == DType::float32 ? scratch_bytes_as<float>(head) : scratch_bytes_as<bf16>(head);
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

void shift(const Head& head, const float* b, const float* b0, float cap, float* w, float* w_over_square) {
  const float k = cap * kLog2E;
  for (int64_t v = 0; v < head.stride; v += kLanes) {
    const vf tanh_b = tanh<true>((load(b + v) - load(b0 + v)) * (1 / cap));
    store(w + v, tanh_b * k);
    store(w_over_square + v, tanh_b * (1 / k));
  }
}

}  // namespace

const Kernels kKernels = {kPanel,  sizeof(half), words_per_row, scratch_bytes, pack,      freeze, sweep_u,
                          sweep_z, inverse_rms,  add_rows,      project,       pull_back, shift};

}  // namespace pgolf::slot::PGOLF_ISA
