// Soft-capped cross-entropy on the CPU: head, loss and d(logits) in one sweep over blocks of rows. Raw pointers and
// sizes; the maths is in pgolf_kernels/ops/softcapped_cross_entropy/reference.py.
#pragma once
#include <string>

#include "softcapped_cross_entropy/softcapped_cross_entropy_kernels.h"

namespace pgolf::softcapped_cross_entropy {

void loss_and_grad(const Problem&, const Outputs&, int threads, const std::string& isa);

}  // namespace pgolf::softcapped_cross_entropy
