// The formats tensors come in.
#pragma once
#include <stdint.h>

namespace pgolf {

enum class DType { float32, bfloat16, float16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace pgolf
