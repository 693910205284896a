// The loops of SLOT that exist once per instruction set, as a table of functions. slot_cpu.cpp calls them.
//
// A window keeps its base logits L = H W^T in one of two forms, [n, stride], float (float32 input) or half (bfloat16);
// for norm="before" the rows of H are normalised first, so that half holds L.
//   u = k tanh((L + b0) / c)  k = c log2(e): logits to base 2. A step adds b by tanh's addition formula, with
//                             w = k tanh((b - b0) / c): (u + w) / (1 + u w / k^2), a reciprocal in place of a tanh.
//   z = L                     without a softcap, or where delta joins before the norm and changes each row's r.
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/units.h"

namespace pgolf::slot {

constexpr int64_t kColumnMultiple = 32;  // stride is V rounded up to this
constexpr float kRmsEps = 1.1920928955078125e-7f;
// Up to this softcap, sums of exp(l) over a vocabulary stay inside float32 without subtracting a maximum.
constexpr float kLargestPlainCap = 60.0f;

struct Head {
  const void* weight;  // [V, D], the caller's
  const void* packed;  // the same in panels, see Kernels::pack
  int64_t V, D, stride;
  DType dtype;
};

// The rows of one window that take part.
struct Rows {
  const void* hidden;     // [T, D], the caller's
  const int32_t* index;   // [n] which rows of hidden
  const int32_t* target;  // [n]
  const float* weight;    // [n]
  int64_t n;
};

struct Sweep {
  Rows rows;
  const void* base;            // [n, stride], u or z
  float cap;                   // 0: none
  const float* b;              // [stride] u form: w; z form: what is added to L, times r
  const float* w_over_square;  // [stride] u form: w / k^2
  const float* bias;           // [stride] z form: added to the logits
  const float* rho;            // [n] z form: factor of base
  const float* r;              // [n] z form: factor of b
  float* nll;                  // [n] out
  float* gradient;             // [stride] added to: sum_t weight r dloss/dz; null: loss only, and base is float
  float* bias_gradient;        // [stride] added to: sum_t weight dloss/dz; null if not wanted (always in u form)
  float* slope;                // [n] out, z form: weight sum_v dloss/dz (z - bias)
  float* scratch;              // [stride]
};

struct Kernels {
  int64_t panel;       // columns per panel of the packed weight
  int64_t half_bytes;  // size of one element of the base, for bfloat16 input

  int64_t (*words_per_row)(const Head&);  // 32-bit words that one row of the weight takes in packed form
  int64_t (*scratch_bytes)(const Head&);  // what freeze needs, 64-byte aligned
  // Panel p of the weight as [words_per_row][panel], zeros beyond V.
  void (*pack)(const Head&, int64_t p, void* out);
  // base = k tanh((scale L + b0) / cap) if cap > 0, else scale L. scale [n] and b0 may be null. exact: float
  // storage for bfloat16 input too.
  void (*freeze)(const Head&, const Rows&, float cap, const float* b0, const float* scale, bool exact, void* scratch,
                 void* base);
  void (*sweep_u)(const Head&, const Sweep&);
  void (*sweep_z)(const Head&, const Sweep&);
  // r[i] = (mean((h_i + delta)^2) + eps)^(-1/2); delta may be null.
  void (*inverse_rms)(const Head&, const Rows&, const float* delta, float* r);
  // out[d] += sum_i q[i] h_i[d]
  void (*add_rows)(const Head&, const Rows&, const float* q, float* out);
  // b[v] = W_v . delta + bias[v]; either may be null. Zeros beyond V.
  void (*project)(const Head&, const float* delta, const float* bias, float* b);
  // d_delta[d] = sum_v g[v] W_v[d]
  void (*pull_back)(const Head&, const float* g, float* d_delta);
  // w[v] = k tanh((b[v] - b0[v]) / cap) and w / k^2 for v in [0, stride)
  void (*shift)(const Head&, const float* b, const float* b0, float cap, float* w, float* w_over_square);
};

PGOLF_DECLARE_UNITS

}  // namespace pgolf::slot
