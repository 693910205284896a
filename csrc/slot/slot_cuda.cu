// SLOT on a GPU: gather the rows, then per step a sweep over the logits and the sums that turn it into an AdamW update.
//
// Nothing is added up by atomics: a segment's sums are reduced in the order of the segments, products with the weight
// in an order that depends on V and D alone. The surprise is that nothing here is a matrix product: the caller
// multiplies once, and what a step needs of the weight are two matrix-vector products per window.
#include "slot/slot_cuda.h"

#include <math.h>

#include "common/cuda.h"
#include "slot/slot_sweep.cuh"

namespace pgolf::slot::cuda {
namespace {

constexpr int kSlices = 8;           // threads that share one sum over segments
constexpr int kGroupsAtOnce = 8;     // groups that share one reading of the weight
constexpr int kDepthTile = 512;      // elements of delta per group in shared memory
constexpr int kLayoutWindows = 256;  // what fits into a kernel's arguments

struct Gather {
  const void* hidden;
  const int64_t* targets;
  const float* weights;
  const bool* wanted;
  int64_t T;
  int D, first_window, num_segments;
  int32_t first_segment[kLayoutWindows + 1];
  int32_t first_row[kLayoutWindows];
  int32_t num_rows[kLayoutWindows];
  int32_t *source, *target, *output, *segment, *window;
  float* weight;
};

// One block per window: list its rows, and mark the padding by source -1.
__global__ void __launch_bounds__(kThreads) slot_index_kernel(const __grid_constant__ Gather a) {
  __shared__ int counts[kWarps];
  const int own = blockIdx.x, window = a.first_window + own, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_segment = a.first_segment[own], last_segment = a.first_segment[own + 1], most = a.num_rows[own];
  const int64_t first = int64_t(first_segment) * kSegmentRows, last = int64_t(last_segment) * kSegmentRows;
  int found = 0;
  for (int64_t start = 0; start < a.T; start += kThreads) {
    const int64_t t = start + threadIdx.x, at = window * a.T + t;
    const bool takes_part = t < a.T && (a.weights ? a.weights[at] > 0 : a.wanted[at]);
    const unsigned ballot = __ballot_sync(~0u, takes_part);
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int slot = found + __popc(ballot & ((1u << lane) - 1));
    for (int i = 0; i < kWarps; ++i) {
      slot += i < warp ? counts[i] : 0;
      found += counts[i];
    }
    __syncthreads();
    if (!takes_part || slot >= most) continue;
    a.source[first + slot] = int32_t(t);
    a.target[first + slot] = int32_t(a.targets[at]);
    if (a.weight) a.weight[first + slot] = a.weights[at];
    if (a.output) a.output[first + slot] = a.first_row[own] + slot;
  }
  found = found < most ? found : most;
  for (int64_t i = first + found + threadIdx.x; i < last; i += kThreads) a.source[i] = -1;
  for (int i = first_segment + threadIdx.x; i < last_segment; i += kThreads) {
    const int left = found - (i - first_segment) * kSegmentRows;
    a.segment[i] = window;
    a.segment[a.num_segments + i] = left < 0 ? 0 : left < kSegmentRows ? left : kSegmentRows;
  }
  if (threadIdx.x == 0) {
    a.window[window] = first_segment;
    a.window[window + 1] = last_segment;
  }
}

struct Copy {
  const void* hidden;
  const int32_t *source, *segment;
  int64_t T, words;  // per row
  void* out;
};

// Copy the rows of a segment, Word by Word.
template <class Word>
__global__ void __launch_bounds__(kThreads) slot_gather_kernel(const __grid_constant__ Copy a) {
  const int segment = blockIdx.x;
  for (int i = threadIdx.x / 32; i < kSegmentRows; i += kWarps) {
    const int64_t row = int64_t(segment) * kSegmentRows + i, t = a.source[row];
    const Word* in = static_cast<const Word*>(a.hidden) + (a.segment[segment] * a.T + t) * a.words;
    Word* out = static_cast<Word*>(a.out) + row * a.words;
    for (int64_t k = threadIdx.x % 32; k < a.words; k += 32) out[k] = t < 0 ? Word{} : in[k];
  }
}

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

// out = sums weight, for kSegmentRows rows of the weight and kGroupsAtOnce groups; a thread per column of the weight.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_pull_back_kernel(const __grid_constant__ PullBack a) {
  __shared__ float sums[kGroupsAtOnce][kSegmentRows];
  const int first_v = blockIdx.x * kSegmentRows, first = blockIdx.y * kGroupsAtOnce;
  const int rows = a.V - first_v < kSegmentRows ? a.V - first_v : kSegmentRows;
  const int count = a.num_groups - first < kGroupsAtOnce ? a.num_groups - first : kGroupsAtOnce;
  for (int i = threadIdx.x; i < kGroupsAtOnce * kSegmentRows; i += kThreads) {
    const int g = i / kSegmentRows, v = i % kSegmentRows;
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
  const void* hidden;      // [R, D]
  const float* slope;      // [R]
  const int32_t* segment;  // [2, S]
  const float* delta;      // rows of [D]
  int64_t delta_stride;
  int D, num_segments;
  bool shared;
  float* out;  // [S, D]
};

// out = sum over the segment's rows of slope (h + delta): what delta does through the norm.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_add_rows_kernel(const __grid_constant__ AddRows a) {
  __shared__ float slope[kSegmentRows];
  const int segment = blockIdx.x, count = a.segment[a.num_segments + segment], d = blockIdx.y * kThreads + threadIdx.x;
  const int64_t first = int64_t(segment) * kSegmentRows, group = a.shared ? 0 : a.segment[segment];
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

struct Moments {
  float *x, *m, *v;  // rows of the group's parameters, `stride` apart
  int64_t stride;
  float beta1, beta2, rest1, rest2, keep, step, correction, eps;
  bool first;  // the moments are zero, and hold nothing yet
};

__device__ __forceinline__ void adamw(const Moments& a, int64_t at, float g) {
  const float m = (a.first ? 0.0f : a.beta1 * a.m[at]) + a.rest1 * g;
  const float v = (a.first ? 0.0f : a.beta2 * a.v[at]) + a.rest2 * g * g;
  a.m[at] = m;
  a.v[at] = v;
  a.x[at] = a.x[at] * a.keep - a.step * m / (sqrtf(v * a.correction) + a.eps);
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
  const int32_t* window;                // [B + 1]
  int V, num_segments;
  bool shared, bias;
  float* sums;    // [G, V] or null
  float* losses;  // [G]
  Moments moments;
};

// Block (g, j): 32 columns of group g.
__global__ void __launch_bounds__(kThreads) slot_reduce_kernel(const __grid_constant__ Reduce a) {
  static_assert(kThreads == 32 * kSlices, "a block is kSlices rows of 32 columns");
  __shared__ float parts[kSlices][32];
  __shared__ double loss_parts[kSlices][32];
  const int group = blockIdx.x, v = blockIdx.y * 32 + threadIdx.x % 32;
  const int first = a.shared ? 0 : a.window[group], last = a.shared ? a.num_segments : a.window[group + 1];
  if (blockIdx.y == 0) {
    const double loss = sliced_sum(a.loss_partial, first, last, 1, true, loss_parts);
    if (threadIdx.x == 0) a.losses[group] = float(loss);
  }
  if (first == last) return;  // a group without rows keeps its parameters
  const bool inside = v < a.V, writes = inside && threadIdx.x < 32;
  float g = 0;
  if (a.partial) g = sliced_sum(a.partial + v, first, last, a.V, inside, parts);
  if (a.sums && writes) a.sums[int64_t(group) * a.V + v] = g;
  if (a.bias_partial) g = sliced_sum(a.bias_partial + v, first, last, a.V, inside, parts);
  if (a.bias && writes) adamw(a.moments, group * a.moments.stride + v, g);
}

struct Descend {
  const float* depth_partial;  // [chunks, G, D]
  const float* row_partial;    // [S, D] or null
  const int32_t* window;
  int D, num_groups, num_chunks, num_segments;
  bool shared;
  Moments moments;
};

// Block (g, j): 32 elements of group g's delta.
__global__ void __launch_bounds__(kThreads) slot_descend_kernel(const __grid_constant__ Descend a) {
  __shared__ float parts[kSlices][32];
  const int group = blockIdx.x, d = blockIdx.y * 32 + threadIdx.x % 32;
  const int first = a.shared ? 0 : a.window[group], last = a.shared ? a.num_segments : a.window[group + 1];
  if (first == last) return;
  const bool inside = d < a.D;
  const int64_t stride = int64_t(a.num_groups) * a.D;
  float g = sliced_sum(a.depth_partial + int64_t(group) * a.D + d, 0, a.num_chunks, stride, inside, parts);
  if (a.row_partial) g -= sliced_sum(a.row_partial + d, first, last, a.D, inside, parts);
  if (inside && threadIdx.x < 32) adamw(a.moments, group * a.moments.stride + d, g);
}

struct Score {
  const void *hidden, *logits;  // [R, D], [R, stride]
  const int32_t *target, *output, *segment;
  const float *shift, *bias, *delta;  // rows `..._stride` apart, or null
  int64_t stride, shift_stride, bias_stride, delta_stride;
  int V, D, num_segments;
  float cap;
  bool before;
  float* nll;
};

// A warp per row: the scores go out once, so this is exact in every form, and as slow as that is.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_score_kernel(const __grid_constant__ Score a) {
  const int segment = blockIdx.x, window = a.segment[segment], count = a.segment[a.num_segments + segment];
  const int lane = threadIdx.x % 32, i = blockIdx.y * kWarps + threadIdx.x / 32;
  if (i >= count) return;
  const int64_t row = int64_t(segment) * kSegmentRows + i;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  const float* shift = a.shift ? a.shift + window * a.shift_stride : nullptr;
  const float* bias = a.bias ? a.bias + window * a.bias_stride : nullptr;
  const float* delta = a.delta ? a.delta + window * a.delta_stride : nullptr;
  const float r = a.before ? inverse_rms(static_cast<const T*>(a.hidden) + row * a.D, delta, a.D) : 1.0f;
  const auto logit = [&](int v) {
    const float z = r * (load(logits + v) + (shift ? shift[v] : 0.0f)) + (bias ? bias[v] : 0.0f);
    return a.cap > 0 ? a.cap * tanhf(z / a.cap) : z;
  };
  float largest = 0;
  if (a.cap <= 0 || a.cap > kLargestPlainCap) {
    largest = -INFINITY;
    for (int v = lane; v < a.V; v += 32) largest = fmaxf(largest, logit(v));
    largest = warp_max(largest);
  }
  float total = 0;
#pragma unroll 4
  for (int v = lane; v < a.V; v += 32) total += exp2_approx((logit(v) - largest) * kLog2e);
  total = warp_sum(total);
  if (lane == 0) a.nll[a.output[row]] = logf(total) + (largest - logit(a.target[row]));
}

int num_blocks(int64_t n, int64_t per_block) { return int((n + per_block - 1) / per_block); }

int num_segments(const Rows& rows) {
  int64_t total = 0;
  for (const int64_t n : rows.num_rows) total += num_blocks(n, kSegmentRows);
  return int(total);
}

template <class T>
void project(const Problem& p, const Project& a) {
  launch(slot_project_kernel<T>, dim3(num_blocks(p.V, kWarps), num_blocks(a.num_groups, kGroupsAtOnce)), kThreads,
         p.stream, a);
}

template <class T>
void sweep(const Problem& p, const Sweep& a) {
  const bool plain = 0 < p.cap && p.cap <= kLargestPlainCap && p.V % kVector == 0;
  auto* kernel = p.before ? (plain ? slot_sweep_kernel<T, true, true> : slot_sweep_kernel<T, true, false>)
                          : (plain ? slot_sweep_kernel<T, false, true> : slot_sweep_kernel<T, false, false>);
  launch(kernel, dim3(a.num_segments), kThreads, p.stream, a);
}

template <class T>
void fit_as(const Problem& p, const Rows& rows, const AdamW& adamw, const Fit& f) {
  const int S = num_segments(rows), D = int(p.D), V = int(p.V), G = f.shared ? 1 : int(p.B);
  const int64_t P = (f.delta ? D : 0) + (f.bias ? V : 0);
  float* bias = f.x + (f.delta ? D : 0);
  const int chunks = num_blocks(V, kSegmentRows);

  // In the logits, a bias is one more shift; through the norm it is not.
  const Project projection = {p.weight, f.x, f.bias && !p.before ? bias : nullptr, P, P, V, D, G, f.shift};
  Sweep s = {rows.hidden, rows.logits, rows.target, rows.weight, rows.segment};
  s.shift = f.delta ? f.shift : p.before ? nullptr : bias;
  s.shift_stride = f.delta ? V : P;
  s.bias = p.before && f.bias ? bias : nullptr;
  s.delta = p.before && f.delta ? f.x : nullptr;
  s.parameter_stride = P, s.stride = rows.stride;
  s.D = D, s.V = V, s.num_segments = S;
  for (s.team_warps = 1; s.team_warps * 32 * kColumns < V;) s.team_warps *= 2;
  s.cap = p.cap, s.shared = f.shared;
  s.partial = f.partial, s.bias_partial = f.bias_partial, s.slope = f.slope, s.loss_partial = f.loss_partial;
  const PullBack pull_back = {p.weight, f.sums, V, D, G, f.depth_partial};
  const AddRows add_rows = {rows.hidden, f.slope, rows.segment, f.x, P, D, S, f.shared, f.row_partial};

  Moments moments = {f.x, f.moments, f.moments + G * P, P};
  moments.beta1 = float(adamw.beta1), moments.beta2 = float(adamw.beta2), moments.eps = float(adamw.eps);
  // From the doubles: 1 - beta2 in float is 1e-5 off.
  moments.rest1 = float(1 - adamw.beta1), moments.rest2 = float(1 - adamw.beta2);
  double power1 = 1, power2 = 1;
  for (size_t k = 0; k < adamw.learning_rates.size(); ++k) {
    const double lr = adamw.learning_rates[k];
    power1 *= adamw.beta1, power2 *= adamw.beta2;
    moments.keep = float(1 - lr * adamw.weight_decay), moments.step = float(lr / (1 - power1));
    moments.correction = float(1 / (1 - power2));
    moments.first = k == 0;

    if (f.delta) project<T>(p, projection);
    if (S) sweep<T>(p, s);
    Reduce reduce = {f.partial, f.bias_partial, f.loss_partial, rows.window, V, S, f.shared, f.bias};
    reduce.sums = f.sums, reduce.losses = f.losses + k * G;
    reduce.moments = moments;
    reduce.moments.x += bias - f.x, reduce.moments.m += bias - f.x, reduce.moments.v += bias - f.x;
    launch(slot_reduce_kernel, dim3(G, num_blocks(V, 32)), kThreads, p.stream, reduce);
    if (!f.delta || !S) continue;
    const dim3 grid(chunks, num_blocks(G, kGroupsAtOnce), num_blocks(D, kThreads));
    launch(slot_pull_back_kernel<T>, grid, kThreads, p.stream, pull_back);
    if (p.before) launch(slot_add_rows_kernel<T>, dim3(S, num_blocks(D, kThreads)), kThreads, p.stream, add_rows);
    const Descend descend = {f.depth_partial, f.row_partial, rows.window, D, G, chunks, S, f.shared, moments};
    launch(slot_descend_kernel, dim3(G, num_blocks(D, 32)), kThreads, p.stream, descend);
  }
}

template <class T>
void score_as(const Problem& p, const Rows& rows, const float* delta, int64_t delta_stride, const float* bias,
              int64_t bias_stride, float* shift, float* nll) {
  const int V = int(p.V), D = int(p.D), S = num_segments(rows);
  if (delta) project<T>(p, {p.weight, delta, nullptr, delta_stride, 0, V, D, delta_stride ? int(p.B) : 1, shift});
  Score s = {rows.hidden, rows.logits, rows.target, rows.output, rows.segment};
  s.shift = delta ? shift : nullptr, s.bias = bias, s.delta = delta;
  s.stride = rows.stride, s.shift_stride = delta_stride ? V : 0;
  s.bias_stride = bias_stride, s.delta_stride = delta_stride;
  s.V = V, s.D = D, s.num_segments = S, s.cap = p.cap, s.before = p.before, s.nll = nll;
  launch(slot_score_kernel<T>, dim3(S, kSegmentRows / kWarps), kThreads, p.stream, s);
}

}  // namespace

void gather(const Problem& p, const Rows& rows, const float* weights, const bool* wanted) {
  const DeviceGuard guard(p.device);
  const int S = num_segments(rows);
  Gather a = {p.hidden, p.targets, weights, wanted, p.T, int(p.D), 0, S};
  a.source = rows.source, a.target = rows.target, a.output = rows.output, a.segment = rows.segment;
  a.window = rows.window, a.weight = rows.weight;
  int32_t segment = 0, row = 0;
  for (int64_t first = 0; first < p.B; first += kLayoutWindows) {
    const int count = int(p.B - first < kLayoutWindows ? p.B - first : kLayoutWindows);
    a.first_window = int(first);
    for (int i = 0; i < count; ++i) {
      a.first_segment[i] = segment, a.first_row[i] = row;
      a.num_rows[i] = int32_t(rows.num_rows[first + i]);
      segment += num_blocks(a.num_rows[i], kSegmentRows), row += a.num_rows[i];
    }
    a.first_segment[count] = segment;
    launch(slot_index_kernel, dim3(count), kThreads, p.stream, a);
  }
  if (!S) return;
  const int64_t bytes = p.D * (p.bf16 ? 2 : 4);
  const bool wide = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.hidden) % 16 == 0;
  const Copy copy = {p.hidden, rows.source, rows.segment, p.T, wide ? bytes / 16 : p.D, rows.hidden};
  launch(wide     ? slot_gather_kernel<uint4>
         : p.bf16 ? slot_gather_kernel<uint16_t>
                  : slot_gather_kernel<float>,
         dim3(S), kThreads, p.stream, copy);
}

void fit(const Problem& p, const Rows& rows, const AdamW& adamw, const Fit& f) {
  const DeviceGuard guard(p.device);
  p.bf16 ? fit_as<Bf16>(p, rows, adamw, f) : fit_as<float>(p, rows, adamw, f);
}

void score(const Problem& p, const Rows& rows, const float* delta, int64_t delta_stride, const float* bias,
           int64_t bias_stride, float* shift, float* nll) {
  if (!num_segments(rows)) return;
  const DeviceGuard guard(p.device);
  p.bf16 ? score_as<Bf16>(p, rows, delta, delta_stride, bias, bias_stride, shift, nll)
         : score_as<float>(p, rows, delta, delta_stride, bias, bias_stride, shift, nll);
}

}  // namespace pgolf::slot::cuda
