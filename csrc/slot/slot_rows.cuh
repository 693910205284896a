// Which rows take part: counted per window, then gathered segment by segment, in two launches for 256 windows.
//
// The surprise is that every segment's block scans its window's mask again: that is a few kilobytes of cache, and
// spares the lists of indices that one kernel would have to leave for the next.
#pragma once
#include "common/cuda.h"
#include "slot/slot_cuda.h"
#include "slot/slot_sweep.cuh"

namespace pgolf::slot::cuda {

constexpr int kLayoutWindows = 256;  // what fits into a kernel's arguments

__device__ __forceinline__ double mask_at(const void* mask, Mask type, int64_t at) {
  if (type == Mask::boolean) return static_cast<const uint8_t*>(mask)[at] ? 1.0 : 0.0;
  return type == Mask::float32 ? double(static_cast<const float*>(mask)[at]) : static_cast<const double*>(mask)[at];
}

// The block's total in every thread; `parts` holds kWarps values.
template <class T, class Add>
__device__ __forceinline__ T block_reduce(T x, T* parts, const Add& add) {
  for (int mask = 16; mask; mask /= 2) x = add(x, __shfl_xor_sync(~0u, x, mask));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int i = 1; i < kWarps; ++i) x = add(x, parts[i]);
  return x;
}

struct Count {
  const int64_t* targets;
  const void* mask;
  Mask mask_type;
  int64_t B, T;
  int64_t* facts;
};

// Block per window.
__global__ void __launch_bounds__(kThreads) slot_count_kernel(const __grid_constant__ Count a) {
  __shared__ double totals[kWarps];
  __shared__ int64_t parts[kWarps];
  const int64_t window = blockIdx.x, none = INT64_MAX;
  double total = 0;
  int64_t count = 0, lowest = none, highest = -none, valid = 1;
  for (int64_t t = threadIdx.x; t < a.T; t += kThreads) {
    const int64_t at = window * a.T + t;
    const double m = mask_at(a.mask, a.mask_type, at);
    total += m;
    if (!(m >= 0 && m < INFINITY)) valid = 0;
    if (!(m > 0)) continue;
    const int64_t y = a.targets[at];
    ++count;
    lowest = y < lowest ? y : lowest;
    highest = y > highest ? y : highest;
  }
  const auto sum = [](auto x, auto y) { return x + y; };
  const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
  const auto most = [](int64_t x, int64_t y) { return x < y ? y : x; };
  total = block_reduce(total, totals, sum);
  count = block_reduce(count, parts, sum);
  lowest = block_reduce(lowest, parts, least);
  highest = block_reduce(highest, parts, most);
  valid = block_reduce(valid, parts, least);
  if (threadIdx.x) return;
  int64_t* facts = a.facts + window;
  facts[0] = count, facts[a.B] = lowest, facts[2 * a.B] = highest, facts[3 * a.B] = valid;
  reinterpret_cast<double*>(a.facts)[4 * a.B + window] = total;
}

struct Gather {
  const void *hidden, *mask;
  const int64_t *targets, *facts;
  Mask mask_type;
  bool whole_batch;
  int64_t B, T, V, words;  // of `Word` in a row
  int first_window, num_windows, first_block;
  int32_t first_segment[kLayoutWindows + 1], first_row[kLayoutWindows + 1], first_output[kLayoutWindows + 1];
  int32_t *target, *segment_window, *segment_count, *segment_row, *window_segment, *window_output, *found;
  unsigned* arrivals;
  float* weight;
  void* out;
};

// The first num_windows blocks describe a window each, the others gather a segment each, Word by Word.
template <class Word>
__global__ void __launch_bounds__(kThreads) slot_gather_kernel(const __grid_constant__ Gather a) {
  __shared__ int counts[kWarps];
  __shared__ int64_t source[kSegmentRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_windows = a.num_windows;
  const bool describes = int(blockIdx.x) < num_windows;
  const int segment = a.first_segment[0] + int(blockIdx.x) - num_windows;
  int own = blockIdx.x;
  if (!describes) {  // the last window whose first segment is not behind this one
    int end = num_windows;
    for (own = 0; end - own > 1;) (a.first_segment[(own + end) / 2] <= segment ? own : end) = (own + end) / 2;
  }
  const int64_t window = a.first_window + own;
  const int room = a.first_output[own + 1] - a.first_output[own], unit = rows_per_segment(room);
  const int skipped = describes ? room : (segment - a.first_segment[own]) * unit;
  const int wanted = describes ? 0 : unit;
  const int64_t row = a.first_row[own] + skipped;

  const double* totals = reinterpret_cast<const double*>(a.facts) + 4 * a.B;
  double total = 0;
  if (a.whole_batch) {
    for (int64_t i = 0; i < a.B; ++i) total += totals[i];
  } else {
    total = totals[window];
  }
  const double divisor = total > 0 ? total : 1.0;

  if (int(threadIdx.x) < kSegmentRows) source[threadIdx.x] = -1;
  __syncthreads();
  int found = 0;
  for (int64_t start = 0; start < a.T && (describes || found < skipped + wanted); start += kThreads) {
    const int64_t t = start + threadIdx.x, at = window * a.T + t;
    // A score's weights are 0 and 1, and stay so.
    const float weight = t < a.T ? float(mask_at(a.mask, a.mask_type, at) / (a.weight ? divisor : 1.0)) : 0.0f;
    const bool takes_part = weight > 0;
    const unsigned ballot = __ballot_sync(~0u, takes_part);
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int slot = found - skipped + __popc(ballot & ((1u << lane) - 1));
    for (int i = 0; i < kWarps; ++i) {
      slot += i < warp ? counts[i] : 0;
      found += counts[i];
    }
    if (takes_part && slot >= 0 && slot < wanted) {
      const int64_t y = a.targets[at];
      source[slot] = t;
      a.target[row + slot] = y >= 0 && y < a.V ? int32_t(y) : 0;  // such a window's results are NaN
      if (a.weight) a.weight[row + slot] = weight;
    }
    __syncthreads();
  }

  if (describes) {
    if (threadIdx.x) return;
    const int64_t* facts = a.facts + window;
    const bool possible = facts[3 * a.B] && found <= room && (!facts[0] || (facts[a.B] >= 0 && facts[2 * a.B] < a.V));
    a.found[window] = possible ? found : -1;
    a.arrivals[window] = 0;
    a.window_segment[window] = a.first_segment[own], a.window_segment[window + 1] = a.first_segment[own + 1];
    a.window_output[window] = a.first_output[own], a.window_output[window + 1] = a.first_output[own + 1];
    return;
  }
  if (threadIdx.x == 0) {
    const int left = found - skipped;
    a.segment_window[segment] = int32_t(window), a.segment_row[segment] = int32_t(row);
    a.segment_count[segment] = left < 0 ? 0 : left < unit ? left : unit;
  }
  for (int i = warp; i < unit; i += kWarps) {
    const int64_t t = source[i];
    const Word* in = static_cast<const Word*>(a.hidden) + (window * a.T + t) * a.words;
    Word* out = static_cast<Word*>(a.out) + (row + i) * a.words;
    for (int64_t k = lane; k < a.words; k += 32) out[k] = t < 0 ? Word{} : in[k];
    if (t < 0 && lane == 0) {
      a.target[row + i] = 0;
      if (a.weight) a.weight[row + i] = 0;
    }
  }
}

}  // namespace pgolf::slot::cuda
