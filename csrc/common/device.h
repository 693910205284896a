// Whether this library's CUDA kernels can run on a device.
#pragma once
#include <string>

namespace pgolf {

// Empty, or the CUDA runtime's reason: no driver, no such device, no machine code for it.
std::string why_not_cuda(int device);

}  // namespace pgolf
