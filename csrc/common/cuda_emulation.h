// Runs the kernels of a .cu file on the CPU, for tests without a GPU: g++ -x c++ -DPGOLF_EMULATE_CUDA
// -fno-strict-aliasing.
//
// Every thread of a block is a fiber; blocks run one after another. A barrier or shuffle that not all its threads reach
// aborts with a message. The surprise is what this cannot see: races between barriers, memory ordering, and the
// hardware's approximate functions, whose documented error bounds stand in for them here (tanh_approx).
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <array>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace pgolf::emulation {

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  bool started, done;
  int barrier;          // the one it waits for
  uint64_t generation;  // of that barrier when it arrived
};

struct Block {
  static constexpr int kNamed = 16;  // barrier 0 is __syncthreads(); the warps' own come after the named ones
  static constexpr size_t kStackBytes = 256 << 10;
  dim3 grid_dim, block_dim, block_idx;
  unsigned current = 0;
  std::vector<Fiber> fibers;
  std::array<int, kNamed + 32> arrived{};
  std::array<uint64_t, kNamed + 32> generation{};
  std::array<uint64_t, 2 * 1024> exchange{};  // what shuffles pass, twice: a lane may be one shuffle ahead
  std::array<unsigned, 1024> shuffles{};
  std::function<void()> body;
  ucontext_t caller;
  jmp_buf scheduler;
};

inline Block block;

inline void wait(int barrier, int threads) {
  if (++block.arrived[barrier] == threads) {
    block.arrived[barrier] = 0;
    ++block.generation[barrier];
    return;
  }
  Fiber& fiber = block.fibers[block.current];
  fiber.barrier = barrier;
  fiber.generation = block.generation[barrier];
  if (!_setjmp(fiber.resume)) _longjmp(block.scheduler, 1);
}

template <class T>
uint64_t* exchange(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  const unsigned thread = block.current, warp = thread / 32;
  uint64_t* slots = &block.exchange[block.shuffles[thread]++ % 2 * 1024];
  memcpy(&slots[thread], &value, sizeof value);
  const unsigned threads = block.block_dim.x - warp * 32;
  wait(Block::kNamed + int(warp), threads < 32 ? int(threads) : 32);
  return &slots[warp * 32];
}

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  _longjmp(block.scheduler, 1);
}

inline void run_block() {
  const unsigned threads = block.block_dim.x;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[Block::kStackBytes]);
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Block::kStackBytes;
    makecontext(&fiber.start, enter, 0);
  }
  for (volatile unsigned left = threads; left;) {
    volatile bool moved = false;
    for (volatile unsigned i = 0; i < threads; i = i + 1) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done || (fiber.started && block.generation[fiber.barrier] == fiber.generation)) continue;
      moved = true;
      block.current = i;
      if (!_setjmp(block.scheduler)) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        setcontext(&fiber.start);
      }
      left = left - block.fibers[i].done;
    }
    if (!moved) {
      fprintf(stderr, "cuda emulation: %u threads wait at barriers that the others never reach\n", left);
      abort();
    }
  }
}

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, uintptr_t, const Args& args) {
  block.grid_dim = grid;
  block.block_dim = dim3(threads);
  block.body = [&] { kernel(args); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.block_idx = dim3(x, y, z);
        run_block();
      }
}

}  // namespace pgolf::emulation

#define threadIdx (dim3(::pgolf::emulation::block.current))
#define blockIdx (::pgolf::emulation::block.block_idx)
#define blockDim (::pgolf::emulation::block.block_dim)
#define gridDim (::pgolf::emulation::block.grid_dim)

inline void __syncthreads() { ::pgolf::emulation::wait(0, int(::pgolf::emulation::block.block_dim.x)); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned lane = threadIdx.x % 32;
  T result;
  memcpy(&result, ::pgolf::emulation::exchange(value) + (lane ^ mask), sizeof result);
  return result;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* all = ::pgolf::emulation::exchange(uint64_t(predicate));
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32 && threadIdx.x / 32 * 32 + lane < blockDim.x; ++lane) bits |= all[lane] << lane;
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

// The bytes of y:x that the digits of `selector` name, the lowest first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | uint64_t(y) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((low | uint64_t(high) << 32) >> (shift & 31));
}

inline unsigned __float_as_uint(float x) {
  unsigned result;
  memcpy(&result, &x, sizeof result);
  return result;
}
inline float __uint_as_float(unsigned x) {
  float result;
  memcpy(&result, &x, sizeof result);
  return result;
}

namespace pgolf {

using emulation::launch;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline void named_barrier(int id, int threads) { emulation::wait(id, threads); }
inline float exp2_approx(float x) { return exp2f(x); }
// As wrong as the instruction may be: 2^-10.987 relative, with a sign that changes with x.
inline float tanh_approx(float x) {
  const float y = tanhf(x);
  return y + y * 4.9e-4f * sinf(40 * x);
}

}  // namespace pgolf
