// Runs the kernels of a .cu file on the CPU, for tests without a GPU: g++ -x c++ -DPGOLF_EMULATE_CUDA
// -fno-strict-aliasing.
//
// Every thread of a block is a fiber, which runs until a barrier or shuffle stops it. A barrier or shuffle that not all
// its threads reach aborts with a message. One order of running hides most races: forwards, a thread finds what those
// before it have written, barrier or not. So the order can be chosen, and a barrier left out to see that it is missed
// (conduct). The surprise is what this cannot see: memory ordering, and the hardware's approximate functions, whose
// documented error bounds stand in for them here (tanh_approx). `__shared__` variables are one copy for all blocks, so
// kernels of launch_resident use shared_memory<T>().
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
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
  int barrier;              // of the block, that it waits for; -1: for the counter
  uint64_t generation;      // of that barrier when it arrived
  const unsigned* counter;  // of a group of blocks
  unsigned target;
};

struct Block {
  static constexpr int kNamed = 16;  // barrier 0 is __syncthreads(); the warps' own come after the named ones
  static constexpr size_t kStackBytes = 96 << 10;
  dim3 index;
  std::vector<Fiber> fibers;
  std::array<int, kNamed + 32> arrived{};
  std::array<uint64_t, kNamed + 32> generation{};
  std::array<uint64_t, 2 * 1024> exchange{};  // what shuffles pass, twice: a lane may be one shuffle ahead
  std::array<unsigned, 1024> shuffles{};
  std::unique_ptr<char[]> shared;
};

constexpr size_t kSharedBytes = 48 << 10;
constexpr int kResidentBlocks = 24;  // few, so that tests reach what is launched in several parts

inline std::vector<std::unique_ptr<Block>> blocks;  // kept for their stacks
inline Block* block;
inline unsigned current;  // the running fiber of `block`
inline dim3 grid_dim, block_dim;
inline std::function<void()> body;
inline jmp_buf scheduler;

constexpr unsigned kReversed = 1;
inline unsigned order;  // of blocks, warps and threads: 0 forwards, 1 backwards, else at random by this seed
inline std::mt19937 random_bits;
inline std::string missing;  // barrier, "csrc/.../file.cuh:12 __syncthreads"; or none

// For tests: how the launches from now on run, and which barrier none of their threads waits at.
inline void conduct(unsigned new_order, const std::string& new_missing) {
  order = new_order;
  random_bits.seed(new_order);
  missing = new_missing;
}

inline bool is_missing(const char* file, int line, const char* name) {
  return !missing.empty() && std::string(file) + ':' + std::to_string(line) + ' ' + name == missing;
}

inline void pause() {
  Fiber& fiber = block->fibers[current];
  if (!_setjmp(fiber.resume)) _longjmp(scheduler, 1);
}

inline void wait(int barrier, int threads) {
  if (++block->arrived[barrier] == threads) {
    block->arrived[barrier] = 0;
    ++block->generation[barrier];
    return;
  }
  Fiber& fiber = block->fibers[current];
  fiber.barrier = barrier;
  fiber.generation = block->generation[barrier];
  pause();
}

inline bool waits(const Block& b, const Fiber& fiber) {
  if (!fiber.started) return false;
  return fiber.barrier < 0 ? *fiber.counter < fiber.target : b.generation[fiber.barrier] == fiber.generation;
}

template <class T>
uint64_t* exchange(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  const unsigned thread = current, warp = thread / 32;
  uint64_t* slots = &block->exchange[block->shuffles[thread]++ % 2 * 1024];
  memcpy(&slots[thread], &value, sizeof value);
  const unsigned threads = block_dim.x - warp * 32;
  wait(Block::kNamed + int(warp), threads < 32 ? int(threads) : 32);
  return &slots[warp * 32];
}

inline void enter() {
  body();
  block->fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void prepare(Block& b, dim3 index) {
  const unsigned threads = block_dim.x;
  b.index = index;
  if (!b.shared) b.shared.reset(new char[kSharedBytes]);
  memset(b.shared.get(), 0xff, kSharedBytes);
  if (b.fibers.size() < threads) b.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[Block::kStackBytes]);
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Block::kStackBytes;
    makecontext(&fiber.start, enter, 0);
  }
}

// 0 to count - 1 in the order of `order`.
inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (order == kReversed) std::reverse(result.begin(), result.end());
  if (order > kReversed) std::shuffle(result.begin(), result.end(), random_bits);
  return result;
}

// Let a thread run until it waits or ends.
[[gnu::noinline]] inline void run_thread(Block& b, unsigned thread) {
  Fiber& fiber = b.fibers[thread];
  block = &b;
  current = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Run the first `count` blocks at the same time, to their end; a block, and in it a warp, until all its threads wait:
// as far ahead of the others as barriers let it.
inline void run_blocks(unsigned count) {
  const unsigned threads = block_dim.x;
  unsigned left = count * threads;
  const auto run_warp = [&](Block& b, const std::vector<unsigned>& lanes, unsigned warp) {
    bool moved = false;
    for (const unsigned lane : lanes) {
      const unsigned thread = warp * 32 + lane;
      if (thread >= threads || b.fibers[thread].done || waits(b, b.fibers[thread])) continue;
      run_thread(b, thread);
      left -= b.fibers[thread].done;
      moved = true;
    }
    return moved;
  };
  const auto run_block = [&](Block& b) {
    bool moved = false;
    for (const unsigned warp : in_order((threads + 31) / 32))
      for (const std::vector<unsigned> lanes = in_order(32); run_warp(b, lanes, warp);) moved = true;
    return moved;
  };
  for (const std::vector<unsigned> ordered = in_order(count); left;) {
    bool moved = false;
    for (const unsigned i : ordered)
      while (run_block(*blocks[i])) moved = true;
    if (!moved) {
      fprintf(stderr, "cuda emulation: %u threads wait at barriers that the others never reach\n", left);
      abort();
    }
  }
}

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, uintptr_t, const Args& args) {
  grid_dim = grid;
  block_dim = dim3(threads);
  body = [&] { kernel(args); };
  if (blocks.empty()) blocks.push_back(std::make_unique<Block>());
  for (const unsigned i : in_order(grid.x * grid.y * grid.z)) {
    prepare(*blocks[0], dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y));
    run_blocks(1);
  }
}

template <class Args>
void launch_resident(void (*kernel)(Args), unsigned count, unsigned threads, uintptr_t, const Args& args) {
  if (count > kResidentBlocks) {
    fprintf(stderr, "cuda emulation: %u blocks cannot be resident\n", count);
    abort();
  }
  grid_dim = dim3(count);
  block_dim = dim3(threads);
  body = [&] { kernel(args); };
  while (blocks.size() < count) blocks.push_back(std::make_unique<Block>());
  for (unsigned i = 0; i < count; ++i) prepare(*blocks[i], dim3(i));
  run_blocks(count);
}

template <class Args>
int max_resident_blocks(void (*)(Args), int, int) {
  return kResidentBlocks;
}

}  // namespace pgolf::emulation

#define threadIdx (dim3(::pgolf::emulation::current))
#define blockIdx (::pgolf::emulation::block->index)
#define blockDim (::pgolf::emulation::block_dim)
#define gridDim (::pgolf::emulation::grid_dim)

// Barriers know the place in the source that calls them, which is what `missing` names.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (::pgolf::emulation::is_missing(file, line, "__syncthreads")) return;
  ::pgolf::emulation::wait(0, int(::pgolf::emulation::block_dim.x));
}

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
using emulation::launch_resident;
using emulation::max_resident_blocks;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class T>
T& shared_memory() {
  static_assert(sizeof(T) <= emulation::kSharedBytes, "no GPU has more without asking");
  return *reinterpret_cast<T*>(emulation::block->shared.get());
}

inline void group_barrier(unsigned* counter, unsigned target, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  const bool is_missing = emulation::is_missing(file, line, "group_barrier");
  if (!is_missing) __syncthreads();
  if (threadIdx.x == 0) {
    ++*counter;  // also where it is missing: without, the next one would wait for ever
    auto& fiber = emulation::block->fibers[emulation::current];
    fiber.barrier = -1, fiber.counter = counter, fiber.target = target;
    if (*counter < target && !is_missing) emulation::pause();
  }
  if (!is_missing) __syncthreads();
}

inline void named_barrier(int id, int threads, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::is_missing(file, line, "named_barrier")) emulation::wait(id, threads);
}
inline float exp2_approx(float x) { return exp2f(x); }
// As wrong as the instruction may be: 2^-10.987 relative, with a sign that changes with x.
inline float tanh_approx(float x) {
  const float y = tanhf(x);
  return y + y * 4.9e-4f * sinf(40 * x);
}

}  // namespace pgolf
