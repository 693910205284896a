// y = x W^T + bias on a GPU with int6 W, for few rows of x. Device pointers and sizes; the maths is in
// pgolf_kernels/ops/int6_linear/reference.py, the packed layout in weight.py.
#pragma once
#include <stdint.h>

#include "common/dtype.h"

namespace pgolf::int6_linear::cuda {

constexpr int kRowsAtOnce = 16;  // rows of x that share one reading of the weight; more rows read it again

constexpr int64_t kMaxSize = int64_t(1) << 30;

struct Problem {
  const void* x;          // [M, K]
  const uint8_t* packed;  // [N, 3 ceil(K / 4)]
  const uint16_t* scale;  // [N], float16
  const void* bias;       // [N], or null
  void* y;                // [M, N]
  int64_t M, N, K;        // K > 0; N and K at most kMaxSize
  DType dtype;            // of x, bias and y
};

// A row of y depends on its own row of x alone, to the bit. packed_bytes: what p.packed points to.
void forward(const Problem& p, int64_t packed_bytes, int device, uintptr_t stream);

}  // namespace pgolf::int6_linear::cuda
