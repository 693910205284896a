// SLOT on a GPU: the rows are gathered, then per step a sweep over the logits and the sums that turn it into an update.
//
// Launches: count and gather one each (per 256 windows), then
//     AdamW, a window's steps in one launch    1 for as many windows as are resident at once (8 of 2048 rows on an
//     H200) AdamW, batch-shared or before the norm   2 a step for a bias, 5 with delta, 6 through the norm L-BFGS those
//     per evaluation, and 1 that moves every problem on scores                                   1, and 1 for delta
// and none of them waits for the host. The surprise is that nothing here is a matrix product: the caller multiplies
// once, and what a step needs of the weight are two matrix-vector products per window.
#include "slot/slot_cuda.h"

#include <math.h>

#include <algorithm>

#include "common/cuda.h"
#include "slot/slot_lbfgs.cuh"
#include "slot/slot_one_launch.cuh"
#include "slot/slot_rows.cuh"
#include "slot/slot_sweep.cuh"
#include "slot/slot_update.cuh"

namespace pgolf::slot::cuda {
namespace {

struct Score {
  const void *hidden, *logits;  // [R, D], [.., stride] from first_row on
  const int32_t *target, *segment_window, *segment_count, *segment_row, *first_segment, *first_output, *found;
  const float *shift, *bias, *delta;  // rows `.._stride` apart, or null
  int64_t stride, first_row, shift_stride, bias_stride, delta_stride;
  int V, D, first_block_segment;
  float cap;
  bool before;
  float* nll;
};

// A warp per row: the scores go out once, so this is exact in every form, and as slow as that is.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_score_kernel(const __grid_constant__ Score a) {
  const int segment = a.first_block_segment + int(blockIdx.x), window = a.segment_window[segment];
  const int lane = threadIdx.x % 32, i = blockIdx.y * kWarps + threadIdx.x / 32;
  const int64_t row = int64_t(a.segment_row[segment]) + i;
  const int64_t at = row - a.segment_row[a.first_segment[window]];  // among the window's rows
  const int room = a.first_output[window + 1] - a.first_output[window];
  if (i >= rows_per_segment(room) || at >= room) return;
  float* nll = a.nll + a.first_output[window] + at;
  if (i >= a.segment_count[segment] || a.found[window] < 0) {  // fewer rows than there is room for, or impossible ones
    if (lane == 0) *nll = NAN;
    return;
  }
  const T* logits = static_cast<const T*>(a.logits) + (row - a.first_row) * a.stride;
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
  if (lane == 0) *nll = logf(total) + (largest - logit(a.target[row]));
}

int num_blocks(int64_t n, int64_t per_block) { return int((n + per_block - 1) / per_block); }

// Cuts one piece of memory into arrays at multiples of 256 bytes; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(size_t n) {
    T* result = memory_ && n ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (n * sizeof(T) + 255) / 256 * 256;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

struct Sizes {
  int S, D, V, G, chunks;
  int64_t R, P;

  Sizes(const Problem& p, const Layout& layout, const Form& f)
      : S(layout.num_segments()),
        D(int(p.D)),
        V(int(p.V)),
        G(f.shared ? 1 : int(p.B)),
        chunks(num_blocks(p.V, kChunkColumns)),
        R(layout.num_rows()),
        P((f.delta ? D : 0) + (f.bias ? V : 0)) {}
};

// What an evaluation of loss and gradient needs.
struct Workspace {
  float *shift, *sums;                 // [G, V], if delta
  float *partial, *bias_partial;       // [S, V]; the second if before
  float *depth_partial, *row_partial;  // [max(chunks G, S), D] if delta; [S, D] if before and delta
  float* slope;                        // [R] if before and delta
  double* loss_partial;                // [S]
  float* moments;                      // [2, G, P] of AdamW

  Workspace(const Problem& p, const Sizes& n, const Form& f, bool has_moments, Arena& arena) {
    const size_t S = n.S, through = f.delta && p.before, chunks = size_t(n.chunks) * n.G;
    shift = arena.take<float>(f.delta ? size_t(n.G) * n.V : 0);
    sums = arena.take<float>(f.delta ? size_t(n.G) * n.V : 0);
    partial = arena.take<float>(f.delta || !p.before ? S * n.V : 0);
    bias_partial = arena.take<float>(f.bias && p.before ? S * n.V : 0);
    depth_partial = arena.take<float>(f.delta ? (chunks > S ? chunks : S) * n.D : 0);
    row_partial = arena.take<float>(through ? S * n.D : 0);
    slope = arena.take<float>(through ? n.R : 0);
    loss_partial = arena.take<double>(S);
    moments = arena.take<float>(has_moments ? 2 * n.G * n.P : 0);
  }
};

Update adamw_update(const AdamW& adamw, float* x, float* moments, const Sizes& n) {
  Update u = {nullptr, x, moments, moments + n.G * n.P, n.P};
  u.beta1 = float(adamw.beta1), u.beta2 = float(adamw.beta2), u.eps = float(adamw.eps);
  // From the doubles: 1 - beta2 in float is 1e-5 off.
  u.rest1 = float(1 - adamw.beta1), u.rest2 = float(1 - adamw.beta2);
  return u;
}

// Of each step.
std::vector<Scale> scales(const AdamW& adamw) {
  std::vector<Scale> result;
  double power1 = 1, power2 = 1;
  for (const double lr : adamw.learning_rates) {
    power1 *= adamw.beta1, power2 *= adamw.beta2;
    result.push_back({float(1 - lr * adamw.weight_decay), float(lr / (1 - power1)), float(1 / (1 - power2))});
  }
  return result;
}

Sweep make_sweep(const Problem& p, const Rows& rows, const Logits& logits, const Form& f, const Sizes& n,
                 const Workspace& w, const float* x) {
  const float* bias = x + (f.delta ? n.D : 0);
  Sweep s = {rows.hidden, logits.data, rows.target, rows.weight};
  s.segment_window = rows.segment_window, s.segment_count = rows.segment_count, s.segment_row = rows.segment_row;
  // In the logits, a bias is one more shift; through the norm it is not.
  s.shift = f.delta ? w.shift : p.before ? nullptr : bias;
  s.shift_stride = f.delta ? n.V : n.P;
  s.bias = p.before && f.bias ? bias : nullptr;
  s.delta = p.before && f.delta ? x : nullptr;
  s.parameter_stride = n.P, s.stride = logits.stride, s.first_row = logits.first_row;
  s.D = n.D, s.V = n.V;
  for (s.team_warps = 1; s.team_warps * 32 * kColumns < n.V;) s.team_warps *= 2;
  s.cap = p.cap, s.shared = f.shared;
  s.partial = w.partial, s.bias_partial = w.bias_partial, s.slope = w.slope, s.loss_partial = w.loss_partial;
  return s;
}

// Loss and gradient of every group at x, and what `update` makes of it.
template <class T>
void evaluate(const Problem& p, const Rows& rows, const Logits& logits, const Form& f, const Sizes& n,
              const Workspace& w, const Groups& groups, float* x, const Update& update, float* losses,
              double* exact_losses) {
  const int bias_at = f.delta ? n.D : 0;
  if (f.delta) {
    const float* bias = f.bias && !p.before ? x + bias_at : nullptr;
    const Project a = {p.weight, x, bias, n.P, n.P, n.V, n.D, n.G, w.shift};
    const dim3 grid(num_blocks(n.V, kWarps), num_blocks(n.G, kGroupsAtOnce));
    launch(slot_project_kernel<T>, grid, kThreads, p.stream, a);
  }
  Sweep s = make_sweep(p, rows, logits, f, n, w, x);
  s.done = groups.done, s.joint = groups.joint;
  auto* kernel = p.before ? (is_plain(p) ? slot_sweep_kernel<T, true, true> : slot_sweep_kernel<T, true, false>)
                          : (is_plain(p) ? slot_sweep_kernel<T, false, true> : slot_sweep_kernel<T, false, false>);
  if (n.S) launch(kernel, dim3(n.S), kThreads, p.stream, s);
  const Reduce reduce = {w.partial, w.bias_partial, w.loss_partial, groups,       n.V,
                         f.bias,    w.sums,         losses,         exact_losses, update.from(bias_at)};
  launch(slot_reduce_kernel, dim3(n.G, num_blocks(n.V, 32)), kThreads, p.stream, reduce);
  if (!f.delta || !n.S) return;
  const dim3 grid(n.chunks, num_blocks(n.G, kGroupsAtOnce), num_blocks(n.D, kThreads));
  launch(slot_pull_back_kernel<T>, grid, kThreads, p.stream,
         PullBack{p.weight, w.sums, n.V, n.D, n.G, w.depth_partial});
  if (p.before) {
    const AddRows a = {rows.hidden, w.slope,  rows.segment_window, rows.segment_count, rows.segment_row, x, n.P,
                       n.D,         f.shared, w.row_partial};
    launch(slot_add_rows_kernel<T>, dim3(n.S, num_blocks(n.D, kThreads)), kThreads, p.stream, a);
  }
  const Descend descend = {w.depth_partial, w.row_partial, groups, n.D, n.G, n.chunks, update};
  launch(slot_descend_kernel, dim3(n.G, num_blocks(n.D, 32)), kThreads, p.stream, descend);
}

template <class T>
void fit_as(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f,
            const AdamW& adamw, float* x, float* losses, void* workspace) {
  const Sizes n(p, layout, f);
  Arena arena(workspace);
  const Workspace w(p, n, f, true, arena);
  const Groups groups = {rows.first_segment, rows.found, layout.num_windows(), n.S, f.shared};
  Update update = adamw_update(adamw, x, w.moments, n);
  update.first = true;
  for (const Scale& scale : scales(adamw)) {
    update.scale = scale;
    evaluate<T>(p, rows, logits, f, n, w, groups, x, update, losses, nullptr);
    update.first = false;
    losses += n.G;
  }
}

using OneLaunchKernel = void (*)(OneLaunch);

OneLaunchKernel one_launch_kernel(const Problem& p) {
  if (p.bf16) return is_plain(p) ? slot_one_launch_kernel<Bf16, true> : slot_one_launch_kernel<Bf16, false>;
  return is_plain(p) ? slot_one_launch_kernel<float, true> : slot_one_launch_kernel<float, false>;
}

// What L-BFGS needs beside an evaluation.
struct LbfgsWorkspace {
  int num_problems, num_parts;
  int64_t N;
  float *point, *gradient, *vectors;
  double *loss, *rho, *sums;
  LbfgsState* states;
  unsigned* arrivals;
  int* done;

  LbfgsWorkspace(const Sizes& n, const Lbfgs& o, Arena& arena)
      : num_problems(o.joint ? 1 : n.G), N(o.joint ? n.G * n.P : n.P) {
    const int most = num_blocks(N, kElementsPerBlock);
    num_parts = !o.joint ? 1 : most < 1 ? 1 : most < kMaxParts ? most : kMaxParts;
    const size_t size = size_t(n.G) * n.P, blocks = size_t(num_problems) * num_parts;
    point = arena.take<float>(size);
    gradient = arena.take<float>(size);
    vectors = arena.take<float>(size * (1 + kSlots + 2 * o.history));
    loss = arena.take<double>(n.G);
    rho = arena.take<double>(blocks * o.history);
    sums = arena.take<double>(2 * kMaxParts);
    states = arena.take<LbfgsState>(blocks);
    arrivals = arena.take<unsigned>(1);
    done = arena.take<int>(num_problems);
  }
};

template <class T>
void fit_as(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f,
            const Lbfgs& lbfgs, float* x, float* losses, void* workspace) {
  const Sizes n(p, layout, f);
  Arena arena(workspace);
  const Workspace w(p, n, f, false, arena);
  const LbfgsWorkspace own(n, lbfgs, arena);
  const Groups groups = {rows.first_segment, rows.found, layout.num_windows(), n.S, f.shared, lbfgs.joint, own.done};
  LbfgsStep step = {lbfgs, groups, true, own.N, lbfgs.joint ? n.G : 1, own.num_parts, x, own.point, own.gradient};
  step.loss = own.loss, step.vectors = own.vectors, step.states = own.states, step.rho = own.rho;
  step.sums = own.sums, step.arrivals = own.arrivals, step.done = own.done, step.losses = losses;
  const unsigned blocks = unsigned(own.num_problems) * own.num_parts;
  const auto advance = [&] {
    if (own.num_parts == 1) {
      launch(slot_lbfgs_kernel, dim3(blocks), kThreads, p.stream, step);
    } else {
      launch_resident(slot_lbfgs_kernel, blocks, kThreads, p.stream, step);
    }
  };
  advance();
  step.initialize = false;
  const Update update = {own.gradient, own.point, nullptr, nullptr, n.P};
  // The start, then per step: a search begins with at most max_eval - 1 evaluations spent, and makes at least one.
  const int64_t per_step =
      (lbfgs.max_eval > 1 ? lbfgs.max_eval : 1) + (lbfgs.max_line_search > 0 ? int64_t(lbfgs.max_line_search) : 0);
  for (int64_t i = 0; i < (lbfgs.steps ? 1 + lbfgs.steps * per_step : 0); ++i) {
    evaluate<T>(p, rows, logits, f, n, w, groups, own.point, update, nullptr, own.loss);
    advance();
  }
}

template <class T>
void score_as(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, int first, int last,
              const float* delta, int64_t delta_stride, const float* bias, int64_t bias_stride, float* shift,
              float* nll) {
  const int V = int(p.V), D = int(p.D), first_segment = layout.first_segment[first];
  if (delta && first == 0) {
    const Project a = {p.weight, delta, nullptr, delta_stride, 0, V, D, delta_stride ? int(p.B) : 1, shift};
    const dim3 grid(num_blocks(V, kWarps), num_blocks(a.num_groups, kGroupsAtOnce));
    launch(slot_project_kernel<T>, grid, kThreads, p.stream, a);
  }
  Score s = {rows.hidden, logits.data, rows.target, rows.segment_window, rows.segment_count, rows.segment_row};
  s.first_segment = rows.first_segment, s.first_output = rows.first_output, s.found = rows.found;
  s.shift = delta ? shift : nullptr, s.bias = bias, s.delta = delta;
  s.stride = logits.stride, s.first_row = logits.first_row, s.shift_stride = delta_stride ? V : 0;
  s.bias_stride = bias_stride, s.delta_stride = delta_stride;
  s.V = V, s.D = D, s.first_block_segment = first_segment, s.cap = p.cap, s.before = p.before, s.nll = nll;
  int longest = 0;  // segment of these windows
  for (int i = first; i < last; ++i) longest = std::max(longest, rows_per_segment(layout.room[i]));
  launch(slot_score_kernel<T>, dim3(layout.first_segment[last] - first_segment, longest / kWarps), kThreads, p.stream,
         s);
}

}  // namespace

Layout::Layout(const std::vector<int64_t>& rooms) : first_segment{0}, first_row{0}, first_output{0} {
  for (const int64_t n : rooms) {
    const int segments =
        std::max(1, num_blocks(n, rows_per_segment(n)));  // one even for no rows: it writes the results
    room.push_back(int32_t(n));
    first_segment.push_back(first_segment.back() + segments);
    first_row.push_back(first_row.back() + segments * rows_per_segment(n));
    first_output.push_back(first_output.back() + int32_t(n));
  }
}

Rows::Rows(const Layout& layout, int32_t* integers, float* weight, void* hidden) : hidden(hidden), weight(weight) {
  const auto take = [&](size_t n) {
    int32_t* result = integers;
    integers += n;
    return result;
  };
  const size_t S = layout.num_segments(), windows = layout.room.size() + 1;
  target = take(layout.num_rows());
  segment_window = take(S), segment_count = take(S), segment_row = take(S);
  first_segment = take(windows), first_output = take(windows), found = take(windows);
  arrivals = reinterpret_cast<unsigned*>(take(windows));
}

void count(const Problem& p, int64_t* facts) {
  const DeviceGuard guard(p.device);
  launch(slot_count_kernel, dim3(unsigned(p.B)), kThreads, p.stream,
         Count{p.targets, p.mask, p.mask_type, p.B, p.T, facts});
}

void gather(const Problem& p, const Layout& layout, const Rows& rows, const int64_t* facts) {
  const DeviceGuard guard(p.device);
  const int64_t bytes = p.D * (p.bf16 ? 2 : 4);
  const bool wide = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.hidden) % 16 == 0;
  Gather a = {p.hidden, p.mask, p.targets, facts, p.mask_type, p.whole_batch, p.B, p.T, p.V, wide ? bytes / 16 : p.D};
  a.target = rows.target, a.segment_window = rows.segment_window, a.segment_count = rows.segment_count;
  a.segment_row = rows.segment_row, a.window_segment = rows.first_segment, a.window_output = rows.first_output;
  a.found = rows.found, a.arrivals = rows.arrivals, a.weight = rows.weight, a.out = rows.hidden;
  for (int64_t first = 0; first < p.B; first += kLayoutWindows) {
    const int count = int(std::min<int64_t>(p.B - first, kLayoutWindows));
    a.first_window = int(first), a.num_windows = count;
    for (int i = 0; i <= count; ++i) {
      a.first_segment[i] = layout.first_segment[first + i], a.first_row[i] = layout.first_row[first + i];
      a.first_output[i] = layout.first_output[first + i];
    }
    launch(wide     ? slot_gather_kernel<uint4>
           : p.bf16 ? slot_gather_kernel<uint16_t>
                    : slot_gather_kernel<float>,
           dim3(count + a.first_segment[count] - a.first_segment[0]), kThreads, p.stream, a);
  }
}

bool fits_one_launch(const Problem& p, const Form& f) {
  if (p.before || f.shared) return false;
  const DeviceGuard guard(p.device);
  const int most =
      std::max(num_blocks(std::min<int64_t>(p.T, kShortWindow), kShortSegmentRows), num_blocks(p.T, kSegmentRows));
  return most <= max_resident_blocks(one_launch_kernel(p), kThreads, p.device);
}

size_t adamw_bytes(const Problem& p, const Layout& layout, const Form& f) {
  Arena arena(nullptr);
  Workspace(p, Sizes(p, layout, f), f, true, arena);
  return arena.used();
}

size_t lbfgs_bytes(const Problem& p, const Layout& layout, const Form& f, const Lbfgs& lbfgs) {
  Arena arena(nullptr);
  const Sizes n(p, layout, f);
  Workspace(p, n, f, false, arena);
  LbfgsWorkspace(n, lbfgs, arena);
  return arena.used();
}

void fit(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f,
         const AdamW& adamw, float* x, float* losses, void* workspace) {
  const DeviceGuard guard(p.device);
  p.bf16 ? fit_as<Bf16>(p, layout, rows, logits, f, adamw, x, losses, workspace)
         : fit_as<float>(p, layout, rows, logits, f, adamw, x, losses, workspace);
}

void fit(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f,
         const Lbfgs& lbfgs, float* x, float* losses, void* workspace) {
  const DeviceGuard guard(p.device);
  p.bf16 ? fit_as<Bf16>(p, layout, rows, logits, f, lbfgs, x, losses, workspace)
         : fit_as<float>(p, layout, rows, logits, f, lbfgs, x, losses, workspace);
}

void fit_in_one_launch(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f,
                       const AdamW& adamw, int first, int last, float* x, float* losses, void* workspace) {
  const DeviceGuard guard(p.device);
  const Sizes n(p, layout, f);
  Arena arena(workspace);
  const Workspace w(p, n, f, true, arena);
  const OneLaunchKernel kernel = one_launch_kernel(p);
  const int most = max_resident_blocks(kernel, kThreads, p.device);
  OneLaunch a = {make_sweep(p, rows, logits, f, n, w, x), p.weight, rows.first_segment, rows.found, rows.arrivals};
  a.num_groups = n.G, a.delta = f.delta, a.bias = f.bias;
  a.update = adamw_update(adamw, x, w.moments, n);
  a.shift = w.shift, a.depth_partial = w.depth_partial, a.losses = losses;
  const std::vector<Scale> all = scales(adamw);
  const int* segments = layout.first_segment.data();
  for (int end; first < last; first = end) {
    for (end = first + 1; end < last && segments[end + 1] - segments[first] <= most;) ++end;
    a.first_block_segment = segments[first];
    for (size_t k = 0; k < all.size(); k += kStepsAtOnce) {
      a.first_step = int(k), a.num_steps = int(std::min<size_t>(all.size() - k, kStepsAtOnce));
      a.update.first = k == 0;
      std::copy_n(all.begin() + k, a.num_steps, a.scales);
      launch_resident(kernel, unsigned(segments[end] - segments[first]), kThreads, p.stream, a);
    }
  }
}

void score(const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, int first, int last,
           const float* delta, int64_t delta_stride, const float* bias, int64_t bias_stride, float* shift, float* nll) {
  if (!layout.first_output.back()) return;
  const DeviceGuard guard(p.device);
  p.bf16 ? score_as<Bf16>(p, layout, rows, logits, first, last, delta, delta_stride, bias, bias_stride, shift, nll)
         : score_as<float>(p, layout, rows, logits, first, last, delta, delta_stride, bias, bias_stride, shift, nll);
}

}  // namespace pgolf::slot::cuda
