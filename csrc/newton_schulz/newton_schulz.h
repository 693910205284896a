// Newton-Schulz on a bank of matrices on the CPU. Raw pointers and sizes; the maths is in newton_schulz_kernels.h.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace pgolf::newton_schulz {

struct Problem {
  // g [matrices, m, n], never written, as lines of neighbouring numbers: its rows, or its columns.
  const void* g;
  int64_t matrices, m, n;
  int64_t matrix_stride, line_stride;  // numbers from matrix to matrix, and from line to line
  bool lines_are_rows;
  DType g_dtype;

  void* out;                                 // [matrices, m, n], contiguous
  DType dtype;                               // of out; products run in it where the CPU has them, else in float32
  std::vector<std::array<double, 3>> steps;  // (a, b, c)
  std::vector<int64_t> blocks;               // how many steps each block takes; they add up to all
  bool row_normalize;
  double eps;
  int threads;      // at most; no result depends on it
  std::string isa;  // "": the best of this CPU
};

void run(const Problem&);

}  // namespace pgolf::newton_schulz
