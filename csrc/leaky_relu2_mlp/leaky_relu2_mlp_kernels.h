// The loops of the MLP that exist once per instruction set and dtype, as a table of functions. leaky_relu2_mlp_cpu.cpp
// calls them; packed operands, left and right, are those of common/operands.h.
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::leaky_relu2_mlp {

struct Forward {
  const void* x;     // [M, D]
  const void* up;    // w_up in panels of its rows
  const void* down;  // w_down in panels of its rows
  void* y;           // [M, D]
  void* a;           // [M, H] or null
  int64_t D, H;
  float negative_slope;
};

// Rows count from the first row of a stretch whose dp is kept; see Loops::chunk.
struct Backward {
  const void* dy;    // [rows, D]
  const void* a;     // [rows, H]
  const void* down;  // w_down in panels of its columns
  const void* up;    // w_up in panels of its columns
  void* dx;          // [rows, D] or null
  void* dp;          // [chunks][panels of H][words of a chunk][panel] or null
  int64_t rows, D, H;
  float negative_slope;
};

// left^T right over the rows of a stretch: dw_up^T = x^T dp, dw_down = dy^T a.
struct WeightGradient {
  const void* left;  // x^T or dy^T: [chunks], each the left operand that Loops::transpose makes
  const void* dp;    // as in Backward, or null:
  const void* a;     // [rows, H]
  int64_t rows, D, H;
  float* sums;     // [panels of H][D][panel], from one stretch to the next
  bool add;        // to the sums of the stretches before
  void* gradient;  // null until the last stretch; then [H, D] if dp else [D, H]
};

struct Loops {
  int64_t panel;       // columns of a panel
  int64_t block_rows;  // pieces of rows are best whole blocks
  int64_t chunk;       // rows that gradients of weights add up at a time; dp is kept for stretches of whole chunks
  int64_t tile_bytes;  // left operands that stay in the second-level cache
  int64_t element_bytes;

  int64_t (*panel_bytes)(int64_t depth);
  // Bytes of a left operand; the rows are whole blocks.
  int64_t (*left_bytes)(int64_t rows, int64_t depth);
  // Panel p of w [columns, depth], column j of the product being row j of w; or of w [depth, columns].
  void (*pack_rows)(const void* w, int64_t columns, int64_t depth, int64_t p, void* out);
  void (*pack_columns)(const void* w, int64_t columns, int64_t depth, int64_t p, void* out);

  // Bytes of working memory: for forward and backward; for weight_gradient of so many rows of D and panels of H.
  int64_t (*rows_memory)(int64_t rows, int64_t D, int64_t H);
  int64_t (*gradient_memory)(int64_t rows, int64_t panels);
  void (*forward)(const Forward&, int64_t first, int64_t rows, void* memory);
  void (*backward)(const Backward&, int64_t first, int64_t rows, void* memory);
  // The left operand x^T [D, rows] of x [rows, D], rows <= chunk.
  void (*transpose)(const void* x, int64_t rows, int64_t D, void* left);
  // Rows [first, last) of D, from a whole block on, and panels [first_panel, last_panel) of H.
  void (*weight_gradient)(const WeightGradient&, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
                          void* memory);
};

struct Kernels {
  Loops float32, bfloat16;
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::leaky_relu2_mlp
