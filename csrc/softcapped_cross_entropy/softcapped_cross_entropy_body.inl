// The loops of softcapped_cross_entropy_kernels.h, compiled once per instruction set by
// softcapped_cross_entropy_<isa>.cpp, which defines PGOLF_ISA.
//
// Logits of a few blocks of rows exist in float32, in the second-level cache, between the product that makes them and
// the sweep that turns them into d(logits); what leaves is 16 bits wide for bfloat16 input.
#include <math.h>

#include "common/product.h"
#include "softcapped_cross_entropy/softcapped_cross_entropy_kernels.h"

namespace pgolf::softcapped_cross_entropy::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

constexpr int64_t kLogitBytes = 256 << 10;  // of float32 logits at a time

PGOLF_INLINE int64_t columns(const Problem& p) { return round_up(p.V, kPanel); }

template <class T>
PGOLF_INLINE int64_t rows_of(const Problem& p) {
  const int64_t blocks = kLogitBytes / (columns(p) * 4 * kBlockRows<T>);
  return kBlockRows<T> * (blocks < 1 ? 1 : blocks > 8 ? 8 : blocks);
}

template <class T>
PGOLF_INLINE int64_t left_bytes(const Problem& p) {
  return round_up(left_size<T>(rows_of<T>(p), p.D) * (int64_t)sizeof(Element<T>), 64);
}

template <class T>
void pack_as(const Problem& p, int64_t panel, Word<T>* out) {
  const int64_t first = panel * kPanel;
  pack_transposed((const T*)p.weight + first * p.D, p.D, p.V - first < kPanel ? p.V - first : kPanel, p.D, out);
}

// One row: u [columns] float32 logits, overwritten; e [columns] scratch. dlogits: null or where the gradient goes.
template <class T>
PGOLF_INLINE void row(const Problem& p, float* u, float* e, int64_t target, float* loss, T* dlogits) {
  const bool ignored = target == p.ignore_index, known = target >= 0 && target < p.V;
  if (ignored || !known) {
    *loss = ignored ? 0 : NAN;
    const float fill = ignored ? 0 : NAN;
    for (int64_t v = 0; dlogits && v < p.V; v += kLanes) {
      T lanes[kLanes];
      store(lanes, splat(fill));
      memcpy(dlogits + v, lanes, (p.V - v < kLanes ? p.V - v : kLanes) * sizeof(T));
    }
    return;
  }
  const float inverse = 1 / p.softcap, to_log2 = p.softcap * 1.44269504f;
  const int64_t whole = p.V / kLanes * kLanes;
  // exp(c t - c), in [exp(-2c), 1]: no maximum to look for.
  vf total = splat(0);
  const auto exponentiate = [&](int64_t v) __attribute__((always_inline)) {
    const vf t = tanh<true>(load(u + v) * inverse);  // the rough one is 1.2e-5 off where logits saturate
    store(u + v, t);
    return exp2<true>(t - 1.0f, to_log2);
  };
  for (int64_t v = 0; v < whole; v += kLanes) {
    const vf x = exponentiate(v);
    store(e + v, x);
    total += x;
  }
  if (whole < p.V) {
    const vf x = keep(exponentiate(whole), first_lanes(int(p.V - whole)));
    store(e + whole, x);
    total += x;
  }
  const float sum_of_row = sum(total), t = u[target];
  *loss = logf(sum_of_row) + p.softcap * (1 - t);
  if (!dlogits) return;
  const float share = p.row_weight / sum_of_row;
  e[target] -= sum_of_row;  // (softmax - onehot) times the sum
  const auto gradient = [&](int64_t v) __attribute__((always_inline)) {
    const vf saturation = load(u + v);
    return load(e + v) * share * (1.0f - saturation * saturation);
  };
  for (int64_t v = 0; v < whole; v += kLanes) store(dlogits + v, gradient(v));
  if (whole < p.V) {
    T lanes[kLanes];
    store(lanes, gradient(whole));
    memcpy(dlogits + whole, lanes, (p.V - whole) * sizeof(T));
  }
}

template <class T>
void loss_and_grad_as(const Problem& p, const Outputs& out, const Word<T>* packed, int64_t first, char* memory) {
  const int64_t pitch = columns(p), n = words<T>(p.D), rows = rows_of<T>(p);
  const int64_t count = p.T - first < rows ? p.T - first : rows;
  Element<T>* const left_memory = (Element<T>*)memory;
  float* const logits = (float*)(memory + left_bytes<T>(p));
  float *const e = logits + rows * pitch, *const sums = e + pitch;
  const TileScope tiles;
  (void)tiles;
  const auto left =
      pack_left<T>(count, p.D, left_memory, [&](int64_t i) { return (const T*)p.hidden + (first + i) * p.D; });
  product<T>(
      left, p.D, 0, pitch / kPanel, sums, [](int64_t) { return int64_t(0); },
      [&](int64_t panel, int64_t k, int64_t) { return packed + (panel * n + k) * kPanel; },
      [&](int64_t i, int64_t panel, const float* c) __attribute__((always_inline)) {
        float* to = logits + i * pitch + panel * kPanel;
        store(to, load(c));
        store(to + kLanes, load(c + kLanes));
      });
  for (int64_t i = 0; i < count; ++i)
    row<T>(p, logits + i * pitch, e, p.targets[first + i], out.losses + first + i,
           out.dlogits ? (T*)out.dlogits + (first + i) * out.pitch : nullptr);
}

template <class T>
int64_t memory_as(const Problem& p) {
  const int64_t rows = rows_of<T>(p);
  return left_bytes<T>(p) + ((rows + 1) * columns(p) + sums_size<T>(rows)) * (int64_t)sizeof(float);
}

int64_t panel_bytes(const Problem& p) {
  return (p.dtype == DType::float32 ? words<float>(p.D) : words<bf16>(p.D)) * kPanel * 4;
}
void pack(const Problem& p, int64_t panel, void* out) {
  p.dtype == DType::float32 ? pack_as<float>(p, panel, (float*)out) : pack_as<bf16>(p, panel, (Word<bf16>*)out);
}
int64_t rows(const Problem& p) { return p.dtype == DType::float32 ? rows_of<float>(p) : rows_of<bf16>(p); }
int64_t memory(const Problem& p) { return p.dtype == DType::float32 ? memory_as<float>(p) : memory_as<bf16>(p); }
void loss_and_grad(const Problem& p, const Outputs& out, const void* packed, int64_t first, char* memory) {
  p.dtype == DType::float32 ? loss_and_grad_as<float>(p, out, (const float*)packed, first, memory)
                            : loss_and_grad_as<bf16>(p, out, (const Word<bf16>*)packed, first, memory);
}

}  // namespace

const Kernels kKernels = {kPanel, panel_bytes, pack, rows, memory, loss_and_grad};

}  // namespace pgolf::softcapped_cross_entropy::PGOLF_ISA
