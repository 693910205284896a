// The loops of causal attention that exist once per instruction set, as a table of functions.
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::causal_attention {

// q, y, dy, dq [B, T, H, d] and k, v, dk, dv [B, T, Hkv, d], all contiguous; query head h reads head h / (H / Hkv).
struct Problem {
  int64_t B, T, H, Hkv, d;
  DType dtype;
  bool exclude_self;  // take the component along the position's own value out of each output
};

struct Forward {
  const void *q, *k, *v;
  void* y;
  void* y_with_self;  // y before its own value is excluded; only with exclude_self
  float* lse;         // [B, H, T] log2 of the sum of 2^(scores in base 2)
};

struct Backward {
  const void *q, *k, *v, *dy;
  const void* y_with_self;  // y if nothing was excluded
  const float* lse;
  void *dq, *dk, *dv;
};

struct Kernels {
  // Bytes of working memory of one call below.
  int64_t (*forward_bytes)(const Problem&);
  int64_t (*backward_bytes)(const Problem&);
  // All query heads of batch b that read key/value head kv.
  void (*forward)(const Problem&, const Forward&, int64_t b, int64_t kv, char* memory);
  void (*backward)(const Problem&, const Backward&, int64_t b, int64_t kv, char* memory);
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::causal_attention
