// The LeakyReLU^2 MLP on the CPU, forward and backward. Raw pointers and sizes, everything row-major and contiguous;
// the maths is in pgolf_kernels/ops/leaky_relu2_mlp/reference.py.
//
// A row of y and dx is computed alone, and the sums over rows of the weights' gradients run in chunks of a fixed
// length: no result depends on the number of threads.
#pragma once
#include <string>

#include "common/dtype.h"

namespace pgolf::leaky_relu2_mlp {

struct Problem {
  const void* x;       // [M, D]
  const void* w_up;    // [H, D]
  const void* w_down;  // [D, H]
  int64_t M, D, H;
  DType dtype;  // of every tensor
  float negative_slope;
  int threads;      // at most
  std::string isa;  // "": the best of this CPU
};

// A weight [rows, columns] in the form that forward multiplies by, for callers who keep it.
int64_t packed_bytes(int64_t rows, int64_t columns, DType, const std::string& isa);
void pack(const void* weight, int64_t rows, int64_t columns, DType, int threads, const std::string& isa, void* out);

// y [M, D]; a [M, H], what backward needs, or null. The packed weights may be null: they are then packed here.
void forward(const Problem&, const void* packed_up, const void* packed_down, void* y, void* a);

// dx [M, D], dw_up [H, D] and dw_down [D, H] from dy [M, D] and forward's `a`; each may be null.
void backward(const Problem&, const void* dy, const void* a, void* dx, void* dw_up, void* dw_down);

// A hash of 64 of the array's cache lines, spread evenly.
uint64_t fingerprint(const void* data, int64_t bytes);

}  // namespace pgolf::leaky_relu2_mlp
