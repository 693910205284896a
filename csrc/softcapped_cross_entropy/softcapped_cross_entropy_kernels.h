// The loops of the soft-capped cross-entropy that exist once per instruction set, as a table of functions.
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::softcapped_cross_entropy {

struct Problem {
  const void* hidden;      // [T, D]
  const void* weight;      // [V, D]
  const int64_t* targets;  // [T]
  int64_t T, D, V;
  DType dtype;  // of hidden, weight and dlogits
  float softcap;
  int64_t ignore_index;
  float row_weight;  // of each counted row in the loss whose gradient dlogits is
};

struct Outputs {
  float* losses;  // [T] not weighted; 0 where ignored, NaN where the target is unknown
  void* dlogits;  // [T, V], rows `pitch` numbers apart; null: no gradient
  int64_t pitch;
};

struct Kernels {
  int64_t panel;  // columns of the vocabulary packed at a time
  int64_t (*panel_bytes)(const Problem&);
  void (*pack)(const Problem&, int64_t p, void* out);
  int64_t (*rows)(const Problem&);    // rows that one call below takes
  int64_t (*memory)(const Problem&);  // bytes that it needs
  // Rows [first, first + rows) of the outputs; packed: all panels, one after the other.
  void (*loss_and_grad)(const Problem&, const Outputs&, const void* packed, int64_t first, char* memory);
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::softcapped_cross_entropy
