// The loops of int6_linear that exist once per instruction set, as a table of functions. int6_linear_cpu.cpp calls
// them.
//
// Which loop runs is decided by M, the number of rows of x, because unpacking a weight costs as much as multiplying it
// with five of them.
//   bytes       the fewest rows of bfloat16, on CPUs with dot products of bytes: codes are bytes already, and x becomes
//               two planes of bytes, x ~ step (256 high + low): 16 bits below the row's largest
//   dots        few rows: a weight is unpacked to a number in a register and meets up to 12 rows of x there
//   multiply_x  more: unpacked weights are the left operand of the product, x its panels, and the result is turned. No
//               weight is unpacked twice, nor are rows of x padded to a block of the product
//   multiply    many: x is the left operand, and all weights are unpacked once, to panels
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::int6_linear {

struct Problem {
  const void* x;          // [M, K]
  const uint8_t* packed;  // [N, row_bytes(K)]
  const uint16_t* scale;  // [N] float16
  const void* bias;       // [N] or null
  void* y;                // [M, N]
  int64_t M, N, K;
  DType dtype;  // of x, bias and y
};

constexpr int64_t row_bytes(int64_t K) { return (K + 3) / 4 * 3; }

constexpr int64_t kPieceRows = 48;           // weight rows of a piece of dots: 18 KB of codes at K = 512
constexpr int64_t kChunk = 64;               // codes in 48 bytes
constexpr int64_t kMaxBytesDepth = 1 << 16;  // K up to which sums of 16-bit numbers fit 32 bits

// float32, with zeros from N to a multiple of kPieceRows; another kPieceRows may be read.
struct Columns {
  float *scale, *bias;
};

// The rows of x as `bytes` and `dots` read them: chunk by chunk, because one address then reaches all rows. Zeros from
// K to the end of the last chunk.
struct Activations {
  void* rows;      // [chunks, M, kChunk] the product's elements, for rows with step 0
  int8_t* planes;  // [chunks, M, 2, kChunk] high and low bytes, for the others
  float* step;     // [M] 0: not in bytes
  float* offset;   // [M] what the codes' offset of 32 adds to a sum
};

struct Kernels {
  int64_t panel;             // rows of x in a panel
  int64_t block_rows[2];     // weight rows per block of the product; float32, bfloat16
  int64_t max_bytes_rows;    // 0: no such loop
  int64_t max_dots_rows[2];  // float32, bfloat16

  void (*columns)(const Problem&, const Columns&);

  // Row m as planes. False, and step[m] = 0, if its largest magnitude is not a moderate number.
  bool (*quantize)(const Problem&, int64_t m, const Activations&);
  // Row m as elements.
  void (*convert)(const Problem&, int64_t m, const Activations&);
  int64_t (*dots_work)(const Problem&);  // bytes of working memory
  // Columns [first, first + kPieceRows) of y, by bytes or dots as each row's step says.
  void (*dots)(const Problem&, const Activations&, const Columns&, int64_t first, char* work);

  // Either operand of the product can be the one in panels.
  int64_t (*panel_bytes)(const Problem&);

  void (*pack_x)(const Problem&, int64_t index, void* panel);
  int64_t (*multiply_x_work)(const Problem&, int64_t rows);
  // Columns [first, first + rows) of y, in the rows of x's panels [first_panel, last_panel).
  void (*multiply_x)(const Problem&, const void* panels, const Columns&, int64_t first, int64_t rows,
                     int64_t first_panel, int64_t last_panel, char* work);

  int64_t (*unpack_work)(const Problem&);
  void (*unpack)(const Problem&, int64_t index, void* panel, char* work);
  int64_t (*multiply_work)(const Problem&, int64_t rows);
  // Rows [first, first + rows) of y, in the columns of the weight's panels [first_panel, last_panel).
  void (*multiply)(const Problem&, const void* panels, const Columns&, int64_t first, int64_t rows, int64_t first_panel,
                   int64_t last_panel, char* work);
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::int6_linear
