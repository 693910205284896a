// The loops of Newton-Schulz that exist once per instruction set, as a table of functions. newton_schulz_cpu.cpp calls
// them.
//
// A matrix of the iteration is row-major in the format of the products: bfloat16 where the CPU multiplies pairs of it,
// float elsewhere. X is [short, long], so that a tall g is transposed; all others are symmetric, [short, short].
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::newton_schulz {

// One matrix of the caller's as lines of neighbouring numbers.
struct Lines {
  const void* data;
  int64_t count, length, stride;
  DType dtype;
};

// out = alpha left right + beta (u + u_low) + gamma v, rounded once. Any of u, u_low and v may be null.
struct Product {
  const void* left;   // [rows, depth]
  const void* right;  // [depth, columns]; transposed: [columns, depth]
  int64_t rows, depth, columns;
  bool transposed;
  // The result is known to be symmetric: only panels on and below the diagonal are computed, and mirrored.
  bool symmetric;
  float alpha, beta, gamma;
  const void *u, *u_low, *v;
  void* out;        // not an operand, unless out = u = right, not symmetric
  void* out_low;    // null, or what the rounding of out has lost, on and below the diagonal
  float* diagonal;  // [rows] if symmetric: the diagonal before it is rounded
};

struct Loops {
  bool keeps_low;                                   // whether out_low is worth having: products run in 16 bits
  int64_t (*bytes)(int64_t rows, int64_t columns);  // of a matrix
  int64_t (*product_bytes)(int64_t rows);           // working memory of a product
  void (*clear)(void* matrix, int64_t rows, int64_t columns);  // zeros around it; the other functions keep them
  // Squares of g summed along each row of g; part [length of a line] is working memory.
  void (*squares)(const Lines&, bool lines_are_rows, float* part, float* sums);
  // x [rows, columns] = g or its transpose, each row of g divided by its divisor, then by norm.
  void (*normalize)(const Lines&, bool lines_are_rows, const float* divisors, float norm, bool transpose, void* x,
                    int64_t rows, int64_t columns);
  // Panels [first, last) of a product.
  void (*multiply)(const Product&, int64_t first, int64_t last, void* memory);
  // The mean m of a symmetric matrix's true diagonal, shift + `diagonal`; the matrix's becomes what that is off m, and
  // low's, if not null, what rounding loses of it.
  float (*take_mean)(double shift, const float* diagonal, int64_t n, void* matrix, void* low);
  // out = x, or its transpose; out is contiguous.
  void (*store)(const void* x, int64_t rows, int64_t columns, bool transpose, void* out);
};

struct Kernels {
  int64_t panel;  // columns
  Loops float32, bfloat16;
  Loops precise;  // bfloat16 outside, float inside
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::newton_schulz
