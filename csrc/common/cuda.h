// What every CUDA kernel here starts from: launches, the device guard, a barrier between blocks, and the few
// instructions that have no C++ name. Under PGOLF_EMULATE_CUDA the same source runs on the CPU.
#pragma once
#include <stdint.h>

#ifdef PGOLF_EMULATE_CUDA
#include "common/cuda_emulation.h"
#else
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pgolf {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current for a scope: this library has a CUDA runtime, and so a current device, of its own.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_;
};

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, uintptr_t stream, const Args& args) {
  void* arguments[] = {const_cast<Args*>(&args)};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments, 0,
                              reinterpret_cast<cudaStream_t>(stream)),
             "kernel launch");
}

// As launch, but all blocks run at the same time, so that they may wait for each other (group_barrier).
template <class Args>
void launch_resident(void (*kernel)(Args), unsigned blocks, unsigned threads, uintptr_t stream, const Args& args) {
  void* arguments[] = {const_cast<Args*>(&args)};
  check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments,
                                         0, reinterpret_cast<cudaStream_t>(stream)),
             "cooperative kernel launch");
}

// How many blocks launch_resident can start; asked once per kernel and device.
template <class Args>
int max_resident_blocks(void (*kernel)(Args), int threads, int device) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Args), int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, device}];
  if (!blocks) {
    int per_multiprocessor, multiprocessors;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0), "occupancy");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    blocks = per_multiprocessor * multiprocessors;
  }
  return blocks;
}

// The block's one object in shared memory, uninitialised.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  alignas(16) __shared__ unsigned char bytes[sizeof(T)];
  return reinterpret_cast<T&>(bytes);
}

// Wait until `counter` has been raised `target` times; each block of a group, all of them resident, raises it once.
// What they wrote before is visible after it: the fences order it, and the second one empties the first-level cache.
__device__ __forceinline__ void group_barrier(unsigned* counter, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (*static_cast<volatile unsigned*>(counter) < target) {
    }
    __threadfence();
  }
  __syncthreads();
}

// Barrier `id` (1 to 15) of `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 2^x to 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh to 2^-10.987 relative: one instruction of the special function unit.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pgolf
#endif

namespace pgolf {

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

}  // namespace pgolf
