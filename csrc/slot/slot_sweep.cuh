// The sweep over the logits of one segment: loss and gradient in the logits, which is all a step of SLOT needs of them.
//
// A row belongs to one team of warps, a thread to the same 32 columns of every row, so the sums over rows stay in
// registers. What bounds it are two instructions of the special function unit per logit (tanh, exp), 8 cycles a warp
// each; everything else must fit into the 16 issue slots beside them.
#pragma once
#include "common/cuda.h"
#include "slot/slot_cuda.h"

namespace pgolf::slot::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;                    // neighbouring columns of one thread
constexpr int kVectors = 4;                   // vectors of one thread
constexpr int kColumns = kVector * kVectors;  // columns of one thread
constexpr float kRmsEps = 1.1920928955078125e-7f;
constexpr float kLog2e = 1.44269504f;
// Up to this softcap, sums of exp(l) over a vocabulary stay inside float32 without subtracting a maximum.
constexpr float kLargestPlainCap = 60.0f;
static_assert(kMaxVocab == kThreads * kColumns, "a block holds one row of the largest vocabulary");

struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const Bf16* p) { return __uint_as_float(unsigned(p->bits) << 16); }

// 8 values at a 16-byte boundary.
__device__ __forceinline__ void load_vector(const Bf16* p, float (&x)[kVector]) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void load_vector(const float* p, float (&x)[kVector]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// The fast form is as exact as a bfloat16 logit asks for: it errs by 5e-4 where the logit is rounded by 2e-3.
template <bool kFast>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (kFast) {
    return tanh_approx(x);
  } else {
    return tanhf(x);
  }
}

// (mean((h + delta)^2) + eps)^(-1/2), by one warp; delta may be null.
template <class T>
__device__ __forceinline__ float inverse_rms(const T* h, const float* delta, int D) {
  float total = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    const float x = load(h + d) + (delta ? delta[d] : 0.0f);
    total += x * x;
  }
  return 1.0f / sqrtf(warp_sum(total) / float(D) + kRmsEps);
}

struct Sweep {
  const void* hidden;                                           // [R, D]
  const void* logits;                                           // of the rows from first_row on, [.., stride]
  const int32_t* target;                                        // [R]
  const float* weight;                                          // [R]
  const int32_t *segment_window, *segment_count, *segment_row;  // [S]
  const float* shift;  // rows of [V] shift_stride apart, added to the logits; null: zeros
  const float* bias;   // rows of [V] parameter_stride apart, added after the norm's factor (before only); or null
  const float* delta;  // rows of [D] parameter_stride apart (before only); or null
  int64_t stride, first_row, shift_stride, parameter_stride;
  int D, V, team_warps;
  float cap;
  bool shared, joint;
  const int* done;                        // [G], [1] if joint: these groups want nothing any more; or null
  float *partial, *bias_partial, *slope;  // [S, V], [S, V], [R]; the last two may be null
  double* loss_partial;                   // [S]
};

// One value per row of the segment.
struct RowSums {
  float norm[kSegmentRows];   // r, or 1
  float total[kSegmentRows];  // of exp(l - largest)
  float largest[kSegmentRows];
  float slope[kSegmentRows];  // sum of exp(l - largest) (1 - u^2) s
  float term[kSegmentRows];   // of the target in the gradient
  float weighted_term[kSegmentRows];
  float weight[kSegmentRows];
  int target[kSegmentRows];
};

// What a block keeps in shared memory.
struct SweepShared {
  alignas(16) float sums[kThreads * kColumns];
  RowSums rows;
  float slots[2][kWarps];
};

// A team's sum or maximum, the same bits in all its threads. `slots` are two sets, so that one barrier is enough.
template <bool kMax>
__device__ __forceinline__ float team_reduce(float x, int team, int team_warps, float (*slots)[kWarps], int& turn) {
  x = kMax ? warp_max(x) : warp_sum(x);
  if (team_warps == 1) return x;
  float* own = slots[turn] + team * team_warps;
  turn ^= 1;
  if (threadIdx.x % 32 == 0) own[threadIdx.x / 32 % team_warps] = x;
  named_barrier(1 + team, team_warps * 32);
  x = own[0];
  for (int i = 1; i < team_warps; ++i) x = kMax ? fmaxf(x, own[i]) : x + own[i];
  return x;
}

// Add up the teams' accumulators, subtract the targets' terms and write the segment's column sums.
__device__ __forceinline__ void write_columns(const Sweep& a, const float (&acc)[kColumns], const RowSums& rows,
                                              const float* terms, int count, float* sums, float* out) {
  const int team_threads = a.team_warps * 32, team = threadIdx.x / team_threads, thread = threadIdx.x % team_threads;
  const int width = team_threads * kColumns;
#pragma unroll
  for (int c = 0; c < kVectors; ++c)
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      sums[team * width + (c * team_threads + thread) * kVector + j] = acc[c * kVector + j];
  __syncthreads();
  for (int v = threadIdx.x; v < a.V; v += kThreads) {
    float total = sums[v];
    for (int i = 1; i < kWarps / a.team_warps; ++i) total += sums[i * width + v];
    sums[v] = total;
  }
  __syncthreads();
  // Rows with the same target: the first of them subtracts all their terms, in order.
  if (int(threadIdx.x) < count) {
    const int y = rows.target[threadIdx.x];
    bool first = true;
    float total = 0;
    for (int i = 0; i < count; ++i) {
      if (rows.target[i] != y) continue;
      first = first && i >= int(threadIdx.x);
      total += terms[i];
    }
    if (first) sums[y] -= total;
  }
  __syncthreads();
  for (int v = threadIdx.x; v < a.V; v += kThreads) out[v] = sums[v];
  __syncthreads();
}

// kPlain: 0 < cap <= kLargestPlainCap and V is a multiple of kVector. Else any cap or none, any V, and a maximum per
// row.
template <class T, bool kBefore, bool kPlain>
__device__ __forceinline__ void sweep_segment(const Sweep& a, int segment, SweepShared& shared) {
  constexpr bool kFast = kPlain && sizeof(T) == 2;
  auto& [sums, rows, slots] = shared;
  const int group = a.shared ? 0 : a.segment_window[segment], count = a.segment_count[segment];
  const int64_t first = a.segment_row[segment];
  const T* logits = static_cast<const T*>(a.logits) + (first - a.first_row) * a.stride;
  const float* shift = a.shift ? a.shift + group * a.shift_stride : nullptr;
  const float* bias = kBefore && a.bias ? a.bias + group * a.parameter_stride : nullptr;
  const float* delta = kBefore && a.delta ? a.delta + group * a.parameter_stride : nullptr;
  const int team_threads = a.team_warps * 32, team = threadIdx.x / team_threads, thread = threadIdx.x % team_threads;
  const bool capped = kPlain || a.cap > 0;
  const float inverse = capped ? 1 / a.cap : 1.0f, cap = capped ? a.cap : 1.0f, scale = cap * kLog2e;

  if constexpr (kBefore) {
    for (int i = threadIdx.x / 32; i < count; i += kWarps) {
      const float r = inverse_rms(static_cast<const T*>(a.hidden) + (first + i) * a.D, delta, a.D);
      if (threadIdx.x % 32 == 0) rows.norm[i] = r;
    }
  }
  if (int(threadIdx.x) < count) {
    rows.target[threadIdx.x] = a.target[first + threadIdx.x];
    rows.weight[threadIdx.x] = a.weight[first + threadIdx.x];
  }

  float b[kColumns], beta[kBefore ? kColumns : 1];  // in units of the cap
  float acc[kColumns] = {}, bias_acc[kBefore ? kColumns : 1] = {};
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int v = (i / kVector * team_threads + thread) * kVector + i % kVector;
    b[i] = shift && v < a.V ? shift[v] * inverse : 0.0f;
    if constexpr (kBefore) beta[i] = bias && v < a.V ? bias[v] * inverse : 0.0f;
  }
  __syncthreads();

  int turn = 0;
  for (int i = team; i < count; i += kWarps / a.team_warps) {
    const T* row = logits + i * a.stride;
    const float r = kBefore ? rows.norm[i] : 1.0f;
    float d[kColumns], total = 0, slope = 0, largest = 0;
    if constexpr (!kPlain) {
      largest = -INFINITY;
#pragma unroll
      for (int c = 0; c < kVectors; ++c) {
        const int v = (c * team_threads + thread) * kVector;
        float x[kVector] = {};
        if (v < a.V) load_vector(row + v, x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const int at = c * kVector + j;
          float z = fmaf(x[j], inverse, b[at]);
          if constexpr (kBefore) z = fmaf(r, z, beta[at]);
          d[at] = v + j < a.V ? (capped ? tanhf(z) : z) : -INFINITY;
          largest = fmaxf(largest, d[at]);
        }
      }
      largest = team_reduce<true>(largest, team, a.team_warps, slots, turn);
    }
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      const int v = (c * team_threads + thread) * kVector;
      if (v >= a.V) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) d[c * kVector + j] = 0;
        continue;
      }
      float x[kVector];
      if constexpr (kPlain || kBefore) load_vector(row + v, x);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int at = c * kVector + j;
        float s = 0, u, e;  // in units of the cap: the logit before the bias; tanh of it with the bias
        if constexpr (kBefore) s = r * fmaf(x[j], inverse, b[at]);
        if constexpr (kPlain) {
          u = tanh_of<kFast>(kBefore ? s + beta[at] : fmaf(x[j], inverse, b[at]));
          e = exp2_approx(scale * u);
        } else {
          u = d[at];
          e = exp2_approx(scale * (u - largest));  // 0 beyond V
        }
        total += e;
        d[at] = capped ? e * fmaf(-u, u, 1.0f) : e;
        if constexpr (!kPlain) d[at] = v + j < a.V ? d[at] : 0.0f;
        if constexpr (kBefore) slope += kPlain || v + j < a.V ? d[at] * s : 0.0f;
      }
    }
    total = team_reduce<false>(total, team, a.team_warps, slots, turn);
    if constexpr (kBefore) slope = team_reduce<false>(slope, team, a.team_warps, slots, turn);
    const float factor = rows.weight[i] / total;
#pragma unroll
    for (int at = 0; at < kColumns; ++at) {
      acc[at] = fmaf(kBefore ? factor * r : factor, d[at], acc[at]);
      if constexpr (kBefore) bias_acc[at] = fmaf(factor, d[at], bias_acc[at]);
    }
    if (thread == 0) rows.total[i] = total, rows.largest[i] = largest, rows.slope[i] = slope * cap;
  }
  __syncthreads();

  double loss = 0;
  if (int(threadIdx.x) < count) {
    const int i = threadIdx.x, y = rows.target[i];
    const float m = rows.weight[i], r = kBefore ? rows.norm[i] : 1.0f;
    const float z = fmaf(load(logits + i * a.stride + y), inverse, shift ? shift[y] * inverse : 0.0f);
    const float s = r * z, biased = kBefore && bias ? s + bias[y] * inverse : s;
    const float u = capped ? tanh_of<kFast>(biased) : biased;
    const float term = capped ? m * fmaf(-u, u, 1.0f) : m;
    loss = double(m) * (logf(rows.total[i]) + cap * (rows.largest[i] - u));
    rows.term[i] = term;
    rows.weighted_term[i] = term * r;
    if (a.slope) a.slope[first + i] = r * r / float(a.D) * (m * rows.slope[i] / rows.total[i] - term * s * cap);
  }
  static_assert(kSegmentRows == 64, "two warps hold the losses");
  double* halves = reinterpret_cast<double*>(sums);
  if (threadIdx.x < kSegmentRows) loss = warp_sum(loss);
  if (threadIdx.x == 32) halves[0] = loss;
  __syncthreads();
  if (threadIdx.x == 0) a.loss_partial[segment] = loss + halves[0];
  __syncthreads();

  const int64_t out = int64_t(segment) * a.V;
  if (a.partial) write_columns(a, acc, rows, kBefore ? rows.weighted_term : rows.term, count, sums, a.partial + out);
  if constexpr (kBefore) {
    if (a.bias_partial) write_columns(a, bias_acc, rows, rows.term, count, sums, a.bias_partial + out);
  }
}

template <class T, bool kBefore, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBefore || !kPlain ? 1 : 2)
    slot_sweep_kernel(const __grid_constant__ Sweep a) {
  __shared__ SweepShared shared;
  if (a.done && a.done[a.joint ? 0 : a.shared ? 0 : a.segment_window[blockIdx.x]]) return;
  sweep_segment<T, kBefore, kPlain>(a, blockIdx.x, shared);
}

inline bool is_plain(const Problem& p) { return 0 < p.cap && p.cap <= kLargestPlainCap && p.V % kVector == 0; }

}  // namespace pgolf::slot::cuda
