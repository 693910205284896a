// Fit and score SLOT on a GPU. Device pointers and sizes; the maths is in pgolf_kernels/ops/slot/reference.py.
//
// The rows that take part are first gathered: window i's rows lie together, in the order of their positions, and are
// padded to whole segments of kSegmentRows rows. A segment belongs to one window and is the unit of every sum over
// rows, so a window's sums are the same whatever else is in the batch.
#pragma once
#include <stdint.h>

#include <vector>

namespace pgolf::slot::cuda {

constexpr int kSegmentRows = 64;
constexpr int kMaxVocab = 8192;  // a block of 256 threads keeps a whole row in registers, 32 columns each

struct Problem {
  const void* hidden;      // [B, T, D]
  const void* weight;      // [V, D]
  const int64_t* targets;  // [B, T]
  int64_t B, T, D, V;
  bool bf16;    // dtype of hidden, weight and logits; else float32
  float cap;    // softcap; 0: none
  bool before;  // delta joins before the final RMSNorm
  int device;
  uintptr_t stream;
};

// The gathered rows. R = kSegmentRows * S, S = the sum over windows of ceil(num_rows / kSegmentRows).
struct Rows {
  std::vector<int64_t> num_rows;  // of each window
  void* hidden;                   // [R, D]; zeros in the padding
  const void* logits;             // [R, stride] hidden weight^T, filled in by the caller after gather()
  int64_t stride;                 // a multiple of 8
  int32_t* source;                // [R] position in the window
  int32_t* target;                // [R] target; score(): where the score goes is in `output`
  float* weight;                  // [R] null in a score
  int32_t* output;                // [R] null in a fit
  int32_t* segment;               // [2, S] window of each segment, and how many of its rows are no padding
  int32_t* window;                // [B + 1] first segment of each window
};

struct AdamW {
  std::vector<double> learning_rates;  // one per step
  double beta1, beta2, eps, weight_decay;
};

// Parameters x [G, P]: delta [D], then bias [V]; G = 1 if shared, else B. Updated in place.
struct Fit {
  bool delta, bias, shared;
  float* x;
  float* losses;         // [steps, G]
  float* moments;        // [2, G, P]
  float* shift;          // [G, V] weight delta (+ bias), if delta
  float* sums;           // [G, V] of the gradient in the logits, if delta
  float* partial;        // [S, V] the same of each segment
  float* bias_partial;   // [S, V] if before: partial without the factor of the norm
  float* depth_partial;  // [ceil(V / kSegmentRows), G, D] if delta
  float* row_partial;    // [S, D] if before and delta
  float* slope;          // [R] if before and delta
  double* loss_partial;  // [S]
};

// Fill rows.hidden, source, target, segment, window, and weight from weights [B, T] or output from wanted [B, T] (the
// other is null): rows of weight 0, or not wanted, are left out.
void gather(const Problem&, const Rows&, const float* weights, const bool* wanted);

void fit(const Problem&, const Rows&, const AdamW&, const Fit&);

// nll [number of rows]. delta, bias: null, or rows `stride` floats apart (0: one for all windows). shift [G, V]:
// workspace for weight delta, where delta is not null; G = 1 if delta_stride is 0, else B.
void score(const Problem&, const Rows&, const float* delta, int64_t delta_stride, const float* bias,
           int64_t bias_stride, float* shift, float* nll);

}  // namespace pgolf::slot::cuda
