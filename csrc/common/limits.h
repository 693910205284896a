// What this CPU can do at best, measured: what benchmarks report a share of.
#pragma once
#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace pgolf {

// Operations per second of matrix products on `threads` threads whose operands stay in the first-level caches.
double peak_operations(DType, int threads, const std::string& isa);

// Bytes per second that `threads` threads read, each from `bytes` of its own, over and over.
double read_bandwidth(int64_t bytes, int threads, const std::string& isa);

}  // namespace pgolf
