#include "common/device.h"

#include "common/cuda.h"

namespace pgolf {

#ifdef PGOLF_EMULATE_CUDA
std::string why_not_cuda(int) { return ""; }
#else
namespace {

// Compiled for the same architectures as every other kernel.
__global__ void probe_kernel() {}

}  // namespace

std::string why_not_cuda(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, probe_kernel), "its machine code");
  } catch (const std::exception& error) {
    cudaGetLastError();  // or the caller's next call would report it again
    return error.what();
  }
  return "";
}
#endif

}  // namespace pgolf
