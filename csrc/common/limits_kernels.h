// The loops of limits.h that exist once per instruction set.
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::limits {

struct Kernels {
  int64_t (*operand_bytes)(DType);  // working memory of multiply: random bits of a mild size, set up by `fill`
  void (*fill)(DType, void* operands);
  // Multiply the operands, which stay in the first-level cache, `repeats` times; returns the operations done.
  double (*multiply)(DType, void* operands, int64_t repeats);
  // The sum of n floats, n a multiple of 256.
  float (*read)(const float* x, int64_t n);
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::limits
