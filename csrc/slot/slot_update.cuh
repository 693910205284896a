// What a step does between two sweeps: sums over segments, the two products with the weight, AdamW.
//
// Nothing is added up by atomics: a segment's sums are reduced in the order of the segments, products with the weight
// in an order that depends on V and D alone.
#pragma once
#include "common/cuda.h"
#include "slot/slot_cuda.h"
#include "slot/slot_sweep.cuh"

namespace pgolf::slot::cuda {

constexpr int kSlices = 8;         // threads that share one sum over segments
constexpr int kGroupsAtOnce = 8;   // groups that share one reading of the weight
constexpr int kDepthTile = 512;    // elements of delta per group in shared memory
constexpr int kChunkColumns = 64;  // of the vocabulary, whose share of the gradient in delta one block adds up
static_assert(kThreads == 32 * kSlices, "a block is kSlices rows of 32 columns");

// The windows behind each group of parameters.
struct Groups {
  const int32_t *first_segment, *found;  // as in Rows
  int num_windows, num_segments;
  bool shared, joint;
  const int* done;  // as in Sweep

  __device__ bool is_done(int group) const { return done && done[shared || joint ? 0 : group]; }
  __device__ int first(int group) const { return shared ? 0 : first_segment[group]; }
  __device__ int last(int group) const { return shared ? num_segments : first_segment[group + 1]; }
  // 1: has rows; 0: has none; -1: impossible, its results are NaN.
  __device__ int state(int group) const {
    int result = 0;
    for (int i = shared ? 0 : group; i < (shared ? num_windows : group + 1); ++i) {
      if (found[i] < 0) return -1;
      if (found[i] > 0) result = 1;
    }
    return result;
  }
};

struct Project {
  const void* weight;  // [V, D]
  const float* delta;  // rows of [D]
  const float* bias;   // rows of [V], or null
  int64_t delta_stride, bias_stride;
  int V, D, num_groups;
  float* out;  // [G, V]
};

// out = weight delta + bias: a warp per column of the logits, for kGroupsAtOnce groups.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_project_kernel(const __grid_constant__ Project a) {
  __shared__ float delta[kGroupsAtOnce][kDepthTile];
  const int v = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.y * kGroupsAtOnce;
  const int count = a.num_groups - first < kGroupsAtOnce ? a.num_groups - first : kGroupsAtOnce;
  float acc[kGroupsAtOnce] = {};
  for (int start = 0; start < a.D; start += kDepthTile) {
    const int width = a.D - start < kDepthTile ? a.D - start : kDepthTile;
    __syncthreads();
    for (int i = threadIdx.x; i < kGroupsAtOnce * kDepthTile; i += kThreads) {
      const int g = i / kDepthTile, d = i % kDepthTile;
      delta[g][d] = g < count && d < width ? a.delta[(first + g) * a.delta_stride + start + d] : 0.0f;
    }
    __syncthreads();
    if (v >= a.V) continue;
    const T* w = static_cast<const T*>(a.weight) + int64_t(v) * a.D + start;
#pragma unroll 4
    for (int d = lane; d < width; d += 32) {
      const float x = load(w + d);
#pragma unroll
      for (int g = 0; g < kGroupsAtOnce; ++g) acc[g] = fmaf(x, delta[g][d], acc[g]);
    }
  }
  if (v >= a.V) return;
#pragma unroll
  for (int g = 0; g < kGroupsAtOnce; ++g) {
    const float total = warp_sum(acc[g]);
    if (lane == 0 && g < count)
      a.out[int64_t(first + g) * a.V + v] = total + (a.bias ? a.bias[(first + g) * a.bias_stride + v] : 0.0f);
  }
}

struct PullBack {
  const void* weight;
  const float* sums;  // [G, V]
  int V, D, num_groups;
  float* out;  // [chunks, G, D]
};

// out = sums weight, for kChunkColumns rows of the weight and kGroupsAtOnce groups; a thread per column of the weight.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_pull_back_kernel(const __grid_constant__ PullBack a) {
  __shared__ float sums[kGroupsAtOnce][kChunkColumns];
  const int first_v = blockIdx.x * kChunkColumns, first = blockIdx.y * kGroupsAtOnce;
  const int rows = a.V - first_v < kChunkColumns ? a.V - first_v : kChunkColumns;
  const int count = a.num_groups - first < kGroupsAtOnce ? a.num_groups - first : kGroupsAtOnce;
  for (int i = threadIdx.x; i < kGroupsAtOnce * kChunkColumns; i += kThreads) {
    const int g = i / kChunkColumns, v = i % kChunkColumns;
    sums[g][v] = g < count && v < rows ? a.sums[int64_t(first + g) * a.V + first_v + v] : 0.0f;
  }
  __syncthreads();
  const int d = blockIdx.z * kThreads + threadIdx.x;
  if (d >= a.D) return;
  const T* w = static_cast<const T*>(a.weight) + int64_t(first_v) * a.D + d;
  float acc[kGroupsAtOnce] = {};
#pragma unroll 8
  for (int v = 0; v < rows; ++v) {
    const float x = load(w + int64_t(v) * a.D);
#pragma unroll
    for (int g = 0; g < kGroupsAtOnce; ++g) acc[g] = fmaf(x, sums[g][v], acc[g]);
  }
#pragma unroll
  for (int g = 0; g < kGroupsAtOnce; ++g)
    if (g < count) a.out[(int64_t(blockIdx.x) * a.num_groups + first + g) * a.D + d] = acc[g];
}

struct AddRows {
  const void* hidden;                                           // [R, D]
  const float* slope;                                           // [R]
  const int32_t *segment_window, *segment_count, *segment_row;  // [S]
  const float* delta;                                           // rows of [D]
  int64_t delta_stride;
  int D;
  bool shared;
  float* out;  // [S, D]
};

// out = sum over the segment's rows of slope (h + delta): what delta does through the norm.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_add_rows_kernel(const __grid_constant__ AddRows a) {
  __shared__ float slope[kSegmentRows];
  const int segment = blockIdx.x, count = a.segment_count[segment], d = blockIdx.y * kThreads + threadIdx.x;
  const int64_t first = a.segment_row[segment], group = a.shared ? 0 : a.segment_window[segment];
  if (int(threadIdx.x) < count) slope[threadIdx.x] = a.slope[first + threadIdx.x];
  __syncthreads();
  if (d >= a.D) return;
  const T* h = static_cast<const T*>(a.hidden) + first * a.D + d;
  const float shift = a.delta[group * a.delta_stride + d];
  float total = 0;
#pragma unroll 8
  for (int i = 0; i < count; ++i) total = fmaf(slope[i], load(h + int64_t(i) * a.D) + shift, total);
  a.out[int64_t(segment) * a.D + d] = total;
}

// What one step of AdamW multiplies by.
struct Scale {
  float keep, step, correction;
};

// Where a coordinate's gradient goes: into AdamW, or out, for L-BFGS.
struct Update {
  float* gradient;  // rows `stride` apart, like the others; or null
  float *x, *m, *v;
  int64_t stride;
  float beta1, beta2, rest1, rest2, eps;
  Scale scale;
  bool first;  // the moments are zero, and hold nothing yet

  Update from(int64_t offset) const {
    Update u = *this;
    u.x += offset;
    gradient ? u.gradient += offset : (u.m += offset, u.v += offset);
    return u;
  }
};

__device__ __forceinline__ void adamw(const Update& a, const Scale& scale, bool first, int64_t at, float g) {
  const float m = (first ? 0.0f : a.beta1 * a.m[at]) + a.rest1 * g;
  const float v = (first ? 0.0f : a.beta2 * a.v[at]) + a.rest2 * g * g;
  a.m[at] = m;
  a.v[at] = v;
  a.x[at] = a.x[at] * scale.keep - scale.step * m / (sqrtf(v * scale.correction) + a.eps);
}

__device__ __forceinline__ void update(const Update& a, int64_t at, float g) {
  if (a.gradient) {
    a.gradient[at] = g;
  } else {
    adamw(a, a.scale, a.first, at, g);
  }
}

// Sum of values[i * stride] over i in [first, last): each of kSlices threads takes every kSlices-th, thread 0 the sums.
// Complete in the threads of slice 0. A block is kSlices rows of 32 columns.
template <class T>
__device__ __forceinline__ T sliced_sum(const T* values, int64_t first, int64_t last, int64_t stride, bool inside,
                                        T (*parts)[32]) {
  const int slice = threadIdx.x / 32, column = threadIdx.x % 32;
  T total = 0;
#pragma unroll 4
  for (int64_t i = first + slice; inside && i < last; i += kSlices) total += values[i * stride];
  __syncthreads();
  parts[slice][column] = total;
  __syncthreads();
  total = parts[0][column];
  for (int i = 1; i < kSlices; ++i) total += parts[i][column];
  return total;
}

struct Reduce {
  const float *partial, *bias_partial;  // [S, V]; the second is the bias's own, or null
  const double* loss_partial;           // [S]
  Groups groups;
  int V;
  bool bias;
  float* sums;           // [G, V] or null
  float* losses;         // [G] or null
  double* exact_losses;  // the same for L-BFGS
  Update update;
};

// Block (g, j): 32 columns of group g.
__global__ void __launch_bounds__(kThreads) slot_reduce_kernel(const __grid_constant__ Reduce a) {
  __shared__ float parts[kSlices][32];
  __shared__ double loss_parts[kSlices][32];
  const int group = blockIdx.x, v = blockIdx.y * 32 + threadIdx.x % 32;
  if (a.groups.is_done(group)) return;
  const int first = a.groups.first(group), last = a.groups.last(group), state = a.groups.state(group);
  if (blockIdx.y == 0) {
    double loss = sliced_sum(a.loss_partial, first, last, 1, true, loss_parts);
    loss = state < 0 ? double(NAN) : loss;
    if (threadIdx.x == 0) (a.losses ? void(a.losses[group] = float(loss)) : void(a.exact_losses[group] = loss));
  }
  if (!state && !a.update.gradient) return;  // a group without rows keeps its parameters
  const bool inside = v < a.V, writes = inside && threadIdx.x < 32;
  float g = 0;
  if (a.partial) g = sliced_sum(a.partial + v, first, last, a.V, inside, parts);
  if (a.sums && writes) a.sums[int64_t(group) * a.V + v] = state < 0 ? NAN : g;
  if (a.bias_partial) g = sliced_sum(a.bias_partial + v, first, last, a.V, inside, parts);
  if (a.bias && writes) update(a.update, group * a.update.stride + v, state < 0 ? NAN : g);
}

struct Descend {
  const float* depth_partial;  // [chunks, G, D]
  const float* row_partial;    // [S, D] or null
  Groups groups;
  int D, num_groups, num_chunks;
  Update update;
};

// Block (g, j): 32 elements of group g's delta.
__global__ void __launch_bounds__(kThreads) slot_descend_kernel(const __grid_constant__ Descend a) {
  __shared__ float parts[kSlices][32];
  const int group = blockIdx.x, d = blockIdx.y * 32 + threadIdx.x % 32;
  if (a.groups.is_done(group)) return;
  const int first = a.groups.first(group), last = a.groups.last(group), state = a.groups.state(group);
  if (!state && !a.update.gradient) return;
  const bool inside = d < a.D;
  const int64_t stride = int64_t(a.num_groups) * a.D;
  float g = sliced_sum(a.depth_partial + int64_t(group) * a.D + d, 0, a.num_chunks, stride, inside, parts);
  if (a.row_partial) g -= sliced_sum(a.row_partial + d, first, last, a.D, inside, parts);
  if (inside && threadIdx.x < 32) update(a.update, group * a.update.stride + d, state < 0 ? NAN : g);
}

}  // namespace pgolf::slot::cuda
