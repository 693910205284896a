// Fit and score SLOT on the CPU. Raw pointers and sizes; the maths is in pgolf_kernels/ops/slot/reference.py.
//
// A window is one piece of work, done by one thread in an order of its own, so its result depends neither on the other
// windows nor on the number of threads.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "common/scratch.h"
#include "slot/slot_kernels.h"

namespace pgolf::slot {

struct Problem {
  const void* hidden;      // [B, T, D]
  const void* weight;      // [V, D]
  const int64_t* targets;  // [B, T]
  int64_t B, T, D, V;
  DType dtype;      // of hidden and weight
  float cap;        // softcap; 0: none
  bool before;      // delta joins before the final RMSNorm
  int threads;      // at most
  std::string isa;  // "": the best of this CPU
};

struct Objective {
  const float* weights;  // [B, T] share of each row in the loss; rows of weight 0 take no part
  bool delta, bias;      // which parameters there are; x = delta [D], then bias [V]
  bool shared;           // one x for all windows, else one per window
};

struct AdamW {
  std::vector<double> learning_rates;  // one per step
  double beta1, beta2, eps, weight_decay;
};

// x [G, P] in place; losses [steps, G]. G = 1 if shared, else B. A group without rows is left alone and loses 0.
void fit(const Problem&, const Objective&, const AdamW&, float* x, float* losses);

// nll [number of rows where rows [B, T] is true], window by window. delta and bias: null, or rows `stride` floats apart
// (0: one for all windows).
void score(const Problem&, const bool* rows, const float* delta, int64_t delta_stride, const float* bias,
           int64_t bias_stride, float* nll);

class Group;

// The objective for optimisers that live elsewhere: the base logits of every window stay in memory.
class Evaluator {
 public:
  Evaluator(const Problem&, const Objective&);
  ~Evaluator();
  // For each of the n groups: losses[i] and gradients[i] [P] at x[i] [P].
  void evaluate(const int64_t* groups, int64_t n, const float* x, double* losses, float* gradients);

 private:
  Problem problem_;
  std::unique_ptr<struct Context> context_;
  std::vector<std::unique_ptr<Group>> groups_;
};

}  // namespace pgolf::slot
