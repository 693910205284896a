// y = x W^T + bias on the CPU with int6 W. Raw pointers and sizes; the maths is in
// pgolf_kernels/ops/int6_linear/reference.py, the packed layout in weight.py.
//
// A row of y depends on its own row of x alone, and on how many rows there are: their number chooses the kernel.
#pragma once
#include <string>

#include "int6_linear/int6_linear_kernels.h"

namespace pgolf::int6_linear {

// packed_bytes: what p.packed points to. threads: at most. isa: "" for the best of this CPU.
void forward(const Problem& p, int64_t packed_bytes, int threads, const std::string& isa);

}  // namespace pgolf::int6_linear
