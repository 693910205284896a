// All AdamW steps of some windows in one launch: a block per segment, and the blocks of a window wait for each other.
//
// A step is what the kernels of slot_update.cuh do, dealt to the window's blocks: each sweeps its segment, then owns a
// slice of the vocabulary and of delta. The surprise is why this pays: not for the launches alone, but because the base
// logits of as many windows as fit the multiprocessors (8 of 2048 rows: 32 MB) stay in the second-level cache over all
// steps, where one launch per step streams the whole batch's from memory each time.
#pragma once
#include "common/cuda.h"
#include "slot/slot_cuda.h"
#include "slot/slot_sweep.cuh"
#include "slot/slot_update.cuh"

namespace pgolf::slot::cuda {

constexpr int kStepsAtOnce = 128;  // what fits into a kernel's arguments

struct OneLaunch {
  Sweep sweep;
  const void* weight;                    // [V, D]
  const int32_t *first_segment, *found;  // as in Rows
  unsigned* arrivals;
  int first_block_segment, num_groups, first_step, num_steps;
  bool delta, bias;
  Update update;         // of delta, then bias
  float* shift;          // [G, V], if delta
  float* depth_partial;  // [S, D], if delta
  float* losses;         // [steps, G]
  Scale scales[kStepsAtOnce];
};

struct OneLaunchShared {
  SweepShared sweep;
  float parts[kSlices][32];
  // What a block is to its window; here, since the sweep needs every register.
  int window, first, last;               // segments of the window
  int first_v, last_v, first_d, last_d;  // this block's slices
  unsigned target;                       // arrivals at the next barrier
};

// use(c, sum of values[i * stride + c] over i in [first, last)) for each c in [begin, end), by one thread.
template <class Use>
__device__ __forceinline__ void column_sums(const float* values, int64_t stride, int first, int last, int begin,
                                            int end, float (*parts)[32], const Use& use) {
  if (last - first <= kSlices) {
    for (int c = begin + threadIdx.x; c < end; c += kThreads) {
      float total = 0;
#pragma unroll 8
      for (int64_t i = first; i < last; ++i) total += values[i * stride + c];
      use(c, total);
    }
    return;
  }
  for (int start = begin; start < end; start += 32) {
    const int c = start + threadIdx.x % 32;
    const float total = sliced_sum(values + c, first, last, stride, c < end, parts);
    if (c < end && threadIdx.x < 32) use(c, total);
  }
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 2 : 1)
    slot_one_launch_kernel(const __grid_constant__ OneLaunch a) {
  auto& shared = shared_memory<OneLaunchShared>();
  float* sums = shared.sweep.sums;  // of this block's columns: at most kMaxVocab
  const int segment = a.first_block_segment + int(blockIdx.x), V = a.sweep.V, D = a.sweep.D;
  if (threadIdx.x == 0) {
    const int window = a.sweep.segment_window[segment], first = a.first_segment[window];
    const int last = a.first_segment[window + 1], parts = last - first, part = segment - first;
    const int width_v = (V + parts - 1) / parts, width_d = (D + parts - 1) / parts;
    shared.window = window, shared.first = first, shared.last = last;
    shared.first_v = part * width_v < V ? part * width_v : V;
    shared.last_v = shared.first_v + width_v < V ? shared.first_v + width_v : V;
    shared.first_d = part * width_d < D ? part * width_d : D;
    shared.last_d = shared.first_d + width_d < D ? shared.first_d + width_d : D;
    shared.target = unsigned(a.first_step * (a.delta ? 4 : 2) * parts);
  }
  __syncthreads();
  const int found = a.found[shared.window];
  if (found <= 0) {  // no rows: loss 0, and the parameters stay; impossible: NaN
    const float value = found ? NAN : 0.0f;
    if (segment != shared.first) return;
    for (int k = threadIdx.x; k < a.num_steps; k += kThreads)
      a.losses[int64_t(a.first_step + k) * a.num_groups + shared.window] = value;
    for (int i = threadIdx.x; found < 0 && i < a.update.stride; i += kThreads)
      a.update.x[shared.window * a.update.stride + i] = value;
    return;
  }

  const auto wait_for_the_others = [&] {
    const unsigned parts = shared.last - shared.first;
    unsigned target = 0;
    if (threadIdx.x == 0) target = shared.target += parts;  // group_barrier wants it of this thread alone
    parts == 1 ? __syncthreads() : group_barrier(a.arrivals + shared.window, target);
  };
  const auto delta_at = [&] { return shared.window * a.update.stride; };
  const auto bias_at = [&] { return shared.window * a.update.stride + (a.delta ? D : 0); };
  const T* weight = static_cast<const T*>(a.weight);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (int k = 0; k < a.num_steps; ++k) {
    if (a.delta) {
      const float *delta = a.update.x + delta_at(), *bias = a.update.x + bias_at();
      for (int v = shared.first_v + warp; v < shared.last_v; v += kWarps) {
        const T* w = weight + int64_t(v) * D;
        float total = 0;
#pragma unroll 8
        for (int d = lane; d < D; d += 32) total = fmaf(load(w + d), delta[d], total);
        total = warp_sum(total);
        if (lane == 0) a.shift[int64_t(shared.window) * V + v] = total + (a.bias ? bias[v] : 0.0f);
      }
      wait_for_the_others();
    }
    sweep_segment<T, false, kPlain>(a.sweep, segment, shared.sweep);
    wait_for_the_others();

    const bool is_first = a.update.first && k == 0;
    const int first = shared.first, last = shared.last;
    if (segment == first && warp == 0) {
      double loss = 0;
      for (int i = first + lane; i < last; i += 32) loss += a.sweep.loss_partial[i];
      loss = warp_sum(loss);
      if (lane == 0) a.losses[int64_t(a.first_step + k) * a.num_groups + shared.window] = float(loss);
    }
    const auto move = [&](int64_t at, float g) { adamw(a.update, a.scales[k], is_first, at, g); };
    column_sums(a.sweep.partial, V, first, last, shared.first_v, shared.last_v, shared.parts, [&](int v, float g) {
      if (a.delta) sums[v - shared.first_v] = g;
      if (a.bias) move(bias_at() + v, g);
    });
    if (a.delta) {
      __syncthreads();
      const T* w = weight + int64_t(shared.first_v) * D;
      const int count = shared.last_v - shared.first_v;
      for (int d = threadIdx.x; d < D; d += kThreads) {
        float total = 0;
#pragma unroll 8
        for (int v = 0; v < count; ++v) total = fmaf(load(w + int64_t(v) * D + d), sums[v], total);
        a.depth_partial[int64_t(segment) * D + d] = total;
      }
      wait_for_the_others();
      column_sums(a.depth_partial, D, first, last, shared.first_d, shared.last_d, shared.parts,
                  [&](int d, float g) { move(delta_at() + d, g); });
    }
    wait_for_the_others();
  }
}

}  // namespace pgolf::slot::cuda
