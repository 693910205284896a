// The loops of causal_attention_kernels.h, compiled once per instruction set by causal_attention_<isa>.cpp, which
// defines PGOLF_ISA.
//
// Forward takes one block of query rows at a time: all its scores up to the diagonal, their softmax, their product with
// v. Backward takes one block of keys at a time, so that P^T and dS^T come out as the left operands of dv = P^T dy and
// dk = dS^T q; dS^T is also kept as the right operand of dq^T = k^T dS^T, which is why nothing but k is transposed.
#include <math.h>

#include "causal_attention/causal_attention_kernels.h"
#include "common/product.h"

namespace pgolf::causal_attention::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

constexpr float kLog2E = 1.44269504f;
// Queries whose dS^T is kept at a time: with 2048 keys it takes 2 MB.
constexpr int64_t kQueries = 512;

// Words of a panel whose depth is tokens, whole panels of them.
template <class T>
PGOLF_INLINE int64_t token_words(int64_t tokens) {
  return round_up(tokens, kPanel) / kPerWord<T>;
}

PGOLF_INLINE int64_t from_the_start(int64_t) { return 0; }

// Rows of one head of a [B, T, heads, d] tensor.
template <class T>
struct Head {
  T* data;
  int64_t pitch;
  T* row(int64_t t) const { return data + t * pitch; }
};
template <class T>
PGOLF_INLINE Head<T> head_of(T* tensor, const Problem& p, int64_t b, int64_t heads, int64_t h) {
  return {tensor + (b * p.T * heads + h) * p.d, heads * p.d};
}

// Panels of the rows of x, n x d, as columns: the right operand of products with x^T.
template <class T>
void pack_rows(const Head<const T>& x, int64_t n, int64_t d, Word<T>* out) {
  for (int64_t p = 0; p < panels_of(n); ++p) {
    const int64_t first = p * kPanel, count = n - first < kPanel ? n - first : kPanel;
    pack_transposed(x.row(first), x.pitch, count, d, out + p * words<T>(d) * kPanel);
  }
}

// Panels of the columns of x, n x d; depth is padded with zeros to whole panels of tokens.
template <class T>
void pack_features(const Head<const T>& x, int64_t n, int64_t d, Word<T>* out) {
  const int64_t depth = token_words<T>(n), filled = words<T>(n);
  for (int64_t p = 0; p < panels_of(d); ++p, out += depth * kPanel) {
    const int64_t first = p * kPanel;
    pack_columns(x.data + first, x.pitch, d - first < kPanel ? d - first : kPanel, n, out);
    memset(out + filled * kPanel, 0, (depth - filled) * kPanel * 4);
  }
}

template <class T>
PGOLF_INLINE float dot(const T* a, const T* b, int64_t n) {
  vf total = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(a + i) * load(b + i);
  float result = sum(total);
  for (; i < n; ++i) result += load_one(a + i) * load_one(b + i);
  return result;
}

PGOLF_INLINE void store_one(float* p, float x) { *p = x; }
PGOLF_INLINE void store_one(bf16* p, float x) {
  bf16 lanes[kLanes];
  store(lanes, splat(x));
  *p = lanes[0];
}

template <class T>
PGOLF_INLINE void store_row(T* out, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; ++i) store_one(out + i, x[i]);
}

// 2^x for x <= 0, 0 below 2^-126; NaN stays. Lanes that are masked afterwards may hold any x.
template <class T>
PGOLF_INLINE vf weight_of(vf x) {
  return exp2<std::is_same_v<T, float>>(min(splat(0.0f), max(splat(-126.0f), x)), 1);
}

// ---- forward

template <class T>
struct ForwardMemory {
  Word<T>*k, *v;
  Element<T>*q, *weights;
  float *scores, *y, *sums;
  int64_t score_pitch, y_pitch;
  ForwardMemory(Memory& m, int64_t n, int64_t d) {
    constexpr int64_t kRows = kBlockRows<T>;
    k = m.take<Word<T>>(panels_of(n) * kPanel * words<T>(d));
    v = m.take<Word<T>>(panels_of(d) * kPanel * token_words<T>(n));
    q = m.take<Element<T>>(left_size<T>(kRows, d));
    weights = m.take<Element<T>>(left_size<T>(kRows, round_up(n, kPanel)));
    score_pitch = round_up(n, kPanel);
    scores = m.take<float>(kRows * score_pitch);
    y_pitch = round_up(d, kPanel);
    y = m.take<float>(kRows * y_pitch);
    sums = m.take<float>(sums_size<T>(kRows));
  }
};

// Softmax of scores[0 .. t] times `scale` into weights[0 .. n), zeros beyond t, not yet divided by their sum. Returns
// the sum and, in *lse, log2 of it with the maximum restored.
template <class T>
PGOLF_INLINE float softmax(const float* scores, int64_t t, int64_t n, float scale, Element<T>* weights, float* lse) {
  const int64_t whole = (t + 1) / kLanes * kLanes;
  const vi tail = first_lanes(int(t + 1 - whole));
  vf most = splat(-INFINITY);
  for (int64_t i = 0; i < whole; i += kLanes) most = max(most, load(scores + i));
  if (whole <= t) most = max(most, (vf)(((vi)load(scores + whole) & tail) | ((vi)splat(-INFINITY) & ~tail)));
  const float top = greatest(most) * scale;
  vf total = splat(0);
  int64_t i = 0;
  for (; i < whole; i += kLanes) {
    const vf e = weight_of<T>(load(scores + i) * scale - top);
    total += e;
    store(weights + i, e);
  }
  if (whole <= t) {
    const vf e = keep(weight_of<T>(load(scores + whole) * scale - top), tail);
    total += e;
    store(weights + whole, e);
    i += kLanes;
  }
  for (; i < n; i += kLanes) store(weights + i, splat(0));
  const float s = sum(total);
  *lse = top + log2f(s);
  return s;
}

// y without its component along v, in place.
template <class T>
PGOLF_INLINE void exclude(float* y, const T* v, int64_t d) {
  const float length = fmaxf(sqrtf(dot(v, v, d)), 1e-12f);
  float along = 0;
  for (int64_t i = 0; i < d; ++i) along += y[i] * load_one(v + i);
  along /= length * length;
  for (int64_t i = 0; i < d; ++i) y[i] -= along * load_one(v + i);
}

template <class T>
void forward_as(const Problem& p, const Forward& a, int64_t b, int64_t kv, char* memory) {
  constexpr int64_t kRows = kBlockRows<T>;
  const int64_t n = p.T, d = p.d, group = p.H / p.Hkv, feature_panels = panels_of(d);
  const float scale = kLog2E / sqrtf(float(d));
  Memory pieces = {memory};
  const ForwardMemory<T> m(pieces, n, d);
  const auto k = head_of((const T*)a.k, p, b, p.Hkv, kv), v = head_of((const T*)a.v, p, b, p.Hkv, kv);
  const TileScope tiles;
  (void)tiles;
  pack_rows<T>(k, n, d, m.k);
  pack_features<T>(v, n, d, m.v);
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const auto q = head_of((const T*)a.q, p, b, p.H, h);
    const auto y = head_of((T*)a.y, p, b, p.H, h), with_self = head_of((T*)a.y_with_self, p, b, p.H, h);
    float* lse = a.lse + (b * p.H + h) * n;
    for (int64_t first = 0; first < n; first += kRows) {
      const int64_t count = n - first < kRows ? n - first : kRows;
      const int64_t key_panels = panels_of(first + count), keys = key_panels * kPanel;
      const auto rows = pack_left<T>(count, d, m.q, [&](int64_t i) { return q.row(first + i); });
      product<T>(
          rows, d, 0, key_panels, m.sums, from_the_start,
          [&](int64_t panel, int64_t word, int64_t) { return m.k + (panel * words<T>(d) + word) * kPanel; },
          [&](int64_t i, int64_t panel, const float* c) __attribute__((always_inline)) {
            float* out = m.scores + i * m.score_pitch + panel * kPanel;
            store(out, load(c));
            store(out + kLanes, load(c + kLanes));
          });
      const Left<T> weights = {m.weights, left_pitch<T>(round_up(n, kPanel)), count};
      float inverse[kRows];
      for (int64_t i = 0; i < count; ++i)
        inverse[i] = 1 / softmax<T>(m.scores + i * m.score_pitch, first + i, keys, scale,
                                    weights.data + i * weights.pitch, lse + first + i);
      product<T>(
          weights, keys, 0, feature_panels, m.sums, from_the_start,
          [&](int64_t panel, int64_t word, int64_t) { return m.v + (panel * token_words<T>(n) + word) * kPanel; },
          [&](int64_t i, int64_t panel, const float* c) __attribute__((always_inline)) {
            float* out = m.y + i * m.y_pitch + panel * kPanel;
            store(out, load(c) * inverse[i]);
            store(out + kLanes, load(c + kLanes) * inverse[i]);
          });
      for (int64_t i = 0; i < count; ++i) {
        float* row = m.y + i * m.y_pitch;
        if (p.exclude_self) {
          store_row(with_self.row(first + i), row, d);
          exclude(row, v.row(first + i), d);
        }
        store_row(y.row(first + i), row, d);
      }
    }
  }
}

// ---- backward

template <class T>
struct BackwardMemory {
  Element<T>*k, *v, *k_transposed, *weights, *dscores;
  Word<T>*q_rows, *dy_rows, *q_features, *dy_features, *dscore_panels;
  T* dy;
  float *along_y, *exact_weights, *dk, *dv, *dq, *sums;
  int64_t pitch;  // of weights, dscores and exact_weights
  BackwardMemory(Memory& m, int64_t n, int64_t d) {
    constexpr int64_t kRows = kBlockRows<T>;
    const int64_t queries = n < kQueries ? round_up(n, kPanel) : kQueries;
    k = m.take<Element<T>>(left_size<T>(n + kRows, d));
    v = m.take<Element<T>>(left_size<T>(n + kRows, d));
    k_transposed = m.take<Element<T>>(left_size<T>(d, round_up(n, kPanel)));
    pitch = left_pitch<T>(queries);
    weights = m.take<Element<T>>(kRows * pitch);
    dscores = m.take<Element<T>>(kRows * pitch);
    q_rows = m.take<Word<T>>(panels_of(n) * kPanel * words<T>(d));
    dy_rows = m.take<Word<T>>(panels_of(n) * kPanel * words<T>(d));
    q_features = m.take<Word<T>>(panels_of(d) * kPanel * token_words<T>(n));
    dy_features = m.take<Word<T>>(panels_of(d) * kPanel * token_words<T>(n));
    dscore_panels = m.take<Word<T>>(queries * token_words<T>(n));
    dy = m.take<T>(n * d);
    along_y = m.take<float>(round_up(n, kPanel));
    exact_weights = m.take<float>(kRows * pitch);
    dk = m.take<float>(n * round_up(d, kPanel));
    dv = m.take<float>(n * round_up(d, kPanel));
    dq = m.take<float>(round_up(d, 16) * kPanel);
    sums = m.take<float>(sums_size<T>(d + kRows));
  }
};

// k^T as a left operand of d rows, tokens padded with zeros to whole panels. panel: room for words(d) x kPanel.
template <class T>
Left<T> transpose(const Head<const T>& k, int64_t n, int64_t d, Element<T>* out, Word<T>* panel) {
  const Left<T> left = {out, left_pitch<T>(round_up(n, kPanel)), d};
  for (int64_t first = 0; first < n; first += kPanel) {
    pack_transposed(k.row(first), k.pitch, n - first < kPanel ? n - first : kPanel, d, panel);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        Element<T>* to = out + i * left.pitch + first + j;
        if constexpr (kPairs<T>) {
          const vi pair = read<vi>(panel + i / 2 * kPanel + j);
          const vh half = __builtin_convertvector(
              i % 2 ? (vi)((unsigned __attribute__((vector_size(4 * kLanes)))) pair >> 16) : pair & 0xffff, vh);
          memcpy(to, &half, sizeof half);
        } else {
          store(to, load(panel + i * kPanel + j));
        }
      }
  }
  return left;
}

// dy, what it contributes to dv where the own value was excluded, and dy . y; row t of one query head.
template <class T>
PGOLF_INLINE float through_exclusion(const T* dy, const T* y, const T* v, int64_t d, T* out, float* dv) {
  const float length = sqrtf(dot(v, v, d)), divisor = fmaxf(length, 1e-12f);
  const float dy_along = dot(dy, v, d) / divisor, y_along = dot(y, v, d) / divisor;
  // The unit vector's gradient along itself vanishes unless v was too short to be normalised.
  const float own = length < 1e-12f ? 0 : 2 * dy_along * y_along;
  float total = 0;
  for (int64_t i = 0; i < d; ++i) {
    const float unit = load_one(v + i) / divisor, g = load_one(dy + i), value = load_one(y + i);
    dv[i] += (own * unit - dy_along * value - y_along * g) / divisor;
    const float left = g - dy_along * unit;
    store_one(out + i, left);
    total += left * value;
  }
  return total;
}

template <class T>
void backward_as(const Problem& p, const Backward& a, int64_t b, int64_t kv, char* memory) {
  constexpr int64_t kRows = kBlockRows<T>;
  const int64_t n = p.T, d = p.d, group = p.H / p.Hkv, d_words = words<T>(d), t_words = token_words<T>(n);
  const int64_t feature_panels = panels_of(d), feature_pitch = round_up(d, kPanel);
  const float root = 1 / sqrtf(float(d)), scale = kLog2E * root;
  Memory pieces = {memory};
  const BackwardMemory<T> m(pieces, n, d);
  const auto k = head_of((const T*)a.k, p, b, p.Hkv, kv), v = head_of((const T*)a.v, p, b, p.Hkv, kv);
  const TileScope tiles;
  (void)tiles;
  const auto k_left = pack_left<T>(n, d, m.k, [&](int64_t i) { return k.row(i); });
  const auto v_left = pack_left<T>(n, d, m.v, [&](int64_t i) { return v.row(i); });
  const auto k_transposed = transpose<T>(k, n, d, m.k_transposed, m.q_rows);
  memset(m.along_y + n, 0, (round_up(n, kPanel) - n) * sizeof(float));
  memset(m.dk, 0, n * feature_pitch * sizeof(float));
  memset(m.dv, 0, n * feature_pitch * sizeof(float));
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const auto q = head_of((const T*)a.q, p, b, p.H, h), y = head_of((const T*)a.y_with_self, p, b, p.H, h);
    auto dy = head_of((const T*)a.dy, p, b, p.H, h);
    const auto dq = head_of((T*)a.dq, p, b, p.H, h);
    const float* lse = a.lse + (b * p.H + h) * n;
    for (int64_t t = 0; t < n; ++t) {
      m.along_y[t] = p.exclude_self
                         ? through_exclusion(dy.row(t), y.row(t), v.row(t), d, m.dy + t * d, m.dv + t * feature_pitch)
                         : dot(dy.row(t), y.row(t), d);
    }
    if (p.exclude_self) dy = {m.dy, d};
    pack_rows<T>(q, n, d, m.q_rows);
    pack_rows<T>(dy, n, d, m.dy_rows);
    pack_features<T>(q, n, d, m.q_features);
    pack_features<T>(dy, n, d, m.dy_features);
    for (int64_t start = 0; start < n; start += kQueries) {
      const int64_t end = n - start < kQueries ? n : start + kQueries;
      const int64_t start_panel = start / kPanel, end_panel = panels_of(end);
      for (int64_t key = 0; key < end; key += kRows) {
        const int64_t count = n - key < kRows ? n - key : kRows;
        const int64_t first = key / kPanel > start_panel ? key / kPanel : start_panel;
        const int64_t depth = (end_panel - first) * kPanel;
        // P^T = 2^(scores^T - lse), nothing for queries before the key.
        product<T>(
            {k_left.data + key * k_left.pitch, k_left.pitch, count}, d, first, end_panel, m.sums, from_the_start,
            [&](int64_t panel, int64_t word, int64_t) { return m.q_rows + (panel * d_words + word) * kPanel; },
            [&](int64_t i, int64_t panel, const float* c) __attribute__((always_inline)) {
              for (int64_t j = 0; j < kPanel; j += kLanes) {
                const int64_t query = panel * kPanel + j, at = i * m.pitch + (panel - first) * kPanel + j;
                vf e;
                if (query >= key + i && query + kLanes <= n) {
                  e = weight_of<T>(load(c + j) * scale - load(lse + query));
                } else {
                  float lanes[kLanes] = {};
                  for (int64_t l = 0; l < kLanes && query + l < n; ++l) lanes[l] = lse[query + l];
                  const int64_t before = key + i - query;  // lanes whose query comes before the key
                  const vi after = ~first_lanes(int(before < 0 ? 0 : before < kLanes ? before : kLanes));
                  const vi inside = first_lanes(int(n - query < kLanes ? (n > query ? n - query : 0) : kLanes));
                  e = keep(weight_of<T>(load(c + j) * scale - load(lanes)), after & inside);
                }
                store(m.exact_weights + at, e);
                store(m.weights + at, e);
              }
            });
        // dS^T = P^T (v dy^T - dy . y) / sqrt(d), as rows and as panels.
        product<T>(
            {v_left.data + key * v_left.pitch, v_left.pitch, count}, d, first, end_panel, m.sums, from_the_start,
            [&](int64_t panel, int64_t word, int64_t) { return m.dy_rows + (panel * d_words + word) * kPanel; },
            [&](int64_t i, int64_t panel, const float* c) __attribute__((always_inline)) {
              Word<T>* panels_at = m.dscore_panels + ((panel - start_panel) * t_words + (key + i) / kPerWord<T>)*kPanel;
              for (int64_t j = 0; j < kPanel; j += kLanes) {
                const int64_t at = i * m.pitch + (panel - first) * kPanel + j;
                const vf e = load(m.exact_weights + at);
                const vf ds = e * (load(c + j) - load(m.along_y + panel * kPanel + j)) * root;
                store(m.dscores + at, ds);
                if constexpr (kPairs<T>) {
                  const vi own = __builtin_convertvector(read<vh>(m.dscores + at), vi);
                  const vi pair =
                      i % 2 ? __builtin_convertvector(read<vh>(m.dscores + at - m.pitch), vi) | own << 16 : own;
                  memcpy(panels_at + j, &pair, sizeof pair);
                } else {
                  store(panels_at + j, ds);
                }
              }
            });
        const auto accumulate = [&](const Element<T>* left, const Word<T>* features, float* sum_to) {
          product<T>(
              {(Element<T>*)left, m.pitch, count}, depth, 0, feature_panels, m.sums, from_the_start,
              [&](int64_t panel, int64_t word, int64_t) {
                return features + (panel * t_words + first * kPanel / kPerWord<T> + word) * kPanel;
              },
              [&](int64_t i, int64_t panel, const float* c) __attribute__((always_inline)) {
                float* out = sum_to + (key + i) * feature_pitch + panel * kPanel;
                store(out, load(out) + load(c));
                store(out + kLanes, load(out + kLanes) + load(c + kLanes));
              });
        };
        accumulate(m.weights, m.dy_features, m.dv);
        accumulate(m.dscores, m.q_features, m.dk);
      }
      for (int64_t panel = start_panel; panel < end_panel; ++panel) {
        const int64_t keys = (panel + 1) * kPanel < n ? (panel + 1) * kPanel : n;
        Word<T>* right = m.dscore_panels + (panel - start_panel) * t_words * kPanel;
        const int64_t written = (keys + kPerWord<T> - 1) / kPerWord<T>;
        memset(right + written * kPanel, 0, (words<T>(keys) - written) * kPanel * 4);
        product<T>(
            k_transposed, keys, panel, panel + 1, m.sums, from_the_start,
            [&](int64_t, int64_t word, int64_t) { return right + word * kPanel; },
            [&](int64_t i, int64_t, const float* c) __attribute__((always_inline)) {
              store(m.dq + i * kPanel, load(c));
              store(m.dq + i * kPanel + kLanes, load(c + kLanes));
            });
        const int64_t query = panel * kPanel;
        store_transposed(m.dq, d, dq.pitch, n - query < kPanel ? n - query : kPanel, dq.row(query));
      }
    }
  }
  const auto dk = head_of((T*)a.dk, p, b, p.Hkv, kv), dv = head_of((T*)a.dv, p, b, p.Hkv, kv);
  for (int64_t t = 0; t < n; ++t) {
    store_row(dk.row(t), m.dk + t * feature_pitch, d);
    store_row(dv.row(t), m.dv + t * feature_pitch, d);
  }
}

template <template <class> class Pieces, class T>
int64_t bytes_of(const Problem& p) {
  Memory measure = {nullptr};
  Pieces<T>(measure, p.T, p.d);
  return (int64_t)measure.at;
}

int64_t forward_bytes(const Problem& p) {
  return p.dtype == DType::float32 ? bytes_of<ForwardMemory, float>(p) : bytes_of<ForwardMemory, bf16>(p);
}

int64_t backward_bytes(const Problem& p) {
  return p.dtype == DType::float32 ? bytes_of<BackwardMemory, float>(p) : bytes_of<BackwardMemory, bf16>(p);
}

void forward(const Problem& p, const Forward& a, int64_t b, int64_t kv, char* memory) {
  p.dtype == DType::float32 ? forward_as<float>(p, a, b, kv, memory) : forward_as<bf16>(p, a, b, kv, memory);
}

void backward(const Problem& p, const Backward& a, int64_t b, int64_t kv, char* memory) {
  p.dtype == DType::float32 ? backward_as<float>(p, a, b, kv, memory) : backward_as<bf16>(p, a, b, kv, memory);
}

}  // namespace

const Kernels kKernels = {forward_bytes, backward_bytes, forward, backward};

}  // namespace pgolf::causal_attention::PGOLF_ISA
