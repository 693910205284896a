// The driver of causal attention: which head on which thread. The loops are in causal_attention_body.inl.
#include "causal_attention/causal_attention.h"

#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pgolf::causal_attention {
namespace {

const Unit<Kernels> kUnits[] = {PGOLF_UNITS};

template <class Piece>
void over_heads(const Problem& p, int64_t bytes, int threads, const Piece& piece) {
  PGOLF_CHECK(p.T < INT32_MAX && p.d < INT32_MAX, "causal_attention: T and d must be below 2^31, got ", p.T, ", ", p.d);
  parallel_for(p.B * p.Hkv, threads, [&](int64_t i, int) {
    static thread_local Scratch<char> memory;
    piece(i / p.Hkv, i % p.Hkv, memory.need(bytes));
  });
}

}  // namespace

void forward(const Problem& p, const Forward& tensors, int threads, const std::string& isa) {
  const Kernels& kernels = choose(kUnits, isa, "causal_attention");
  over_heads(p, kernels.forward_bytes(p), threads,
             [&](int64_t b, int64_t kv, char* memory) { kernels.forward(p, tensors, b, kv, memory); });
}

void backward(const Problem& p, const Backward& tensors, int threads, const std::string& isa) {
  const Kernels& kernels = choose(kUnits, isa, "causal_attention");
  over_heads(p, kernels.backward_bytes(p), threads,
             [&](int64_t b, int64_t kv, char* memory) { kernels.backward(p, tensors, b, kv, memory); });
}

}  // namespace pgolf::causal_attention
