// Causal attention on the CPU. Raw pointers and sizes; the maths is in pgolf_kernels/ops/causal_attention/reference.py.
//
// A key/value head of one sequence, with all query heads that read it, is one piece of work: its gradients are summed
// by one thread in an order of its own.
#pragma once
#include <string>

#include "causal_attention/causal_attention_kernels.h"

namespace pgolf::causal_attention {

void forward(const Problem&, const Forward&, int threads, const std::string& isa);
void backward(const Problem&, const Backward&, int threads, const std::string& isa);

}  // namespace pgolf::causal_attention
