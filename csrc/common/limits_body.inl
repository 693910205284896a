// The loops of limits_kernels.h, compiled once per instruction set by limits_<isa>.cpp, which defines PGOLF_ISA.
#include "common/limits_kernels.h"
#include "common/product.h"

namespace pgolf::limits::PGOLF_ISA {
namespace {

using namespace pgolf::PGOLF_ISA;

// One block of rows, one chunk of a panel, one block of sums: what product.h's innermost loop works on.
template <class T>
struct Operands {
  alignas(64) Element<T> left[kBlockRows<T> * kChunk<T>];
  alignas(64) Word<T> panel[kChunk<T> / kPerWord<T> * kPanel];
  alignas(64) float sums[kBlockRows<T> * kPanel];
};

int64_t operand_bytes(DType dtype) {
  return dtype == DType::float32 ? sizeof(Operands<float>) : sizeof(Operands<bf16>);
}

// Dense mantissas between 1 and 2, of both signs: zeros and ones run at a higher clock than a model's numbers do.
template <class T>
void fill_as(Operands<T>& o) {
  uint32_t state = 1;
  const auto next = [&state](int mantissa_bits) {
    state = state * 1664525u + 1013904223u;
    const uint32_t mantissa = state >> (32 - mantissa_bits), sign = state >> 3 & 1;
    return mantissa_bits == 7 ? mantissa | 0x3f80u | sign << 15 : mantissa | 0x3f800000u | sign << 31;
  };
  constexpr int kMantissa = kPairs<T> ? 7 : 23;
  for (auto& x : o.left) {
    const uint32_t bits = next(kMantissa);
    memcpy(&x, &bits, sizeof x);
  }
  for (auto& x : o.panel) {
    uint32_t bits = next(kMantissa);
    if constexpr (kPairs<T>) bits |= next(kMantissa) << 16;
    memcpy(&x, &bits, sizeof x);
  }
}

void fill(DType dtype, void* operands) {
  dtype == DType::float32 ? fill_as(*(Operands<float>*)operands) : fill_as(*(Operands<bf16>*)operands);
}

template <class T>
double multiply_as(Operands<T>& o, int64_t repeats) {
  const TileScope tiles;
  (void)tiles;
  for (int64_t i = 0; i < repeats; ++i)
    multiply<T, false>(o.left, kChunk<T>, o.panel, kChunk<T> / kPerWord<T>, o.sums,
                       [](int) __attribute__((always_inline)) {});
  return 2.0 * kBlockRows<T> * kPanel * kChunk<T> * repeats;
}

double multiply_repeatedly(DType dtype, void* operands, int64_t repeats) {
  return dtype == DType::float32 ? multiply_as(*(Operands<float>*)operands, repeats)
                                 : multiply_as(*(Operands<bf16>*)operands, repeats);
}

float read_all(const float* x, int64_t n) {
  vf total[8] = {};
  for (int64_t i = 0; i < n; i += 8 * kLanes)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) total[j] += load(x + i + j * kLanes);
  for (int j = 1; j < 8; ++j) total[0] += total[j];
  return sum(total[0]);
}

}  // namespace

const Kernels kKernels = {operand_bytes, fill, multiply_repeatedly, read_all};

}  // namespace pgolf::limits::PGOLF_ISA
