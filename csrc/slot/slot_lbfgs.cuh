// L-BFGS on the device: the algorithm of pgolf_kernels/ops/slot/optimizers.py as a machine that each launch moves on by
// one evaluated point.
//
// A problem is one group of parameters, worked on by one block, or all windows' parameters together (joint), dealt to
// several blocks that wait for each other in every inner product. All threads know the same scalars and take the same
// branches, and every block keeps its own copy of the state, so nothing but vectors and sums is shared.
#pragma once
#include "common/cuda.h"
#include "slot/slot_cuda.h"
#include "slot/slot_rows.cuh"
#include "slot/slot_update.cuh"

namespace pgolf::slot::cuda {

constexpr int kSlots = 4;  // gradients that a line search may need again: at its start, at both ends, at the trial
constexpr int kElementsPerBlock = 2048;
constexpr int kMaxParts = 64;

enum class Phase : int { start, bracket, zoom, finished };

struct Trial {
  double t, loss, slope;  // step length, and the loss and its slope there
  int slot;               // of its gradient
};

struct LbfgsState {
  Phase phase;
  int step, num_iter, num_evals, evals, max_tries, num_pairs, newest;
  bool has_direction, stalled;
  double t, loss, h_diag, largest;
  Trial start, low, high;  // while bracketing, `low` is the previous trial
  int slot;                // of the gradient at x
  unsigned turn;           // of the sums between blocks
};

struct LbfgsStep {
  Lbfgs options;
  Groups groups;
  bool initialize;
  int64_t N;              // elements of a problem
  int num_losses;         // of a problem: windows if joint, else 1
  int num_parts;          // blocks of a problem
  float *x, *point;       // [problems, N]; point: where to evaluate next
  const float* gradient;  // [problems, N] at point
  const double* loss;     // [G] at point
  float* vectors;         // [problems, 1 + kSlots + 2 history, N]: direction, gradients, pairs
  LbfgsState* states;     // [problems, parts]
  double* rho;            // [problems, parts, history]: 1 / y.s
  double* sums;           // [2, kMaxParts] of a joint problem's blocks
  unsigned* arrivals;     // of a joint problem
  int* done;              // [problems]
  float* losses;          // [steps, problems]
};

__device__ __forceinline__ double cubic_minimum(Trial a, Trial b, double low, double high) {
  if (a.t > b.t) {
    const Trial c = a;
    a = b, b = c;
  }
  const double middle = (low + high) / 2;
  if (a.t == b.t) return middle;
  const double d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t), square = d1 * d1 - a.slope * b.slope;
  if (!(square >= 0)) return middle;
  const double d2 = sqrt(square), curvature = b.slope - a.slope + 2 * d2;
  if (curvature == 0) return middle;
  const double t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / curvature);
  return t < low ? low : t > high ? high : t;
}

__global__ void __launch_bounds__(kThreads) slot_lbfgs_kernel(const __grid_constant__ LbfgsStep a) {
  struct Shared {
    double parts[kWarps], alpha[kMaxHistory];
  };
  Shared& shared = shared_memory<Shared>();
  const Lbfgs& o = a.options;
  const int problem = blockIdx.x / a.num_parts, part = blockIdx.x % a.num_parts;
  const int num_problems = gridDim.x / a.num_parts, history = o.history;
  const int64_t width = (a.N + a.num_parts - 1) / a.num_parts;
  const int64_t begin = part * width, end = begin + width < a.N ? begin + width : a.N;
  float *x = a.x + problem * a.N, *point = a.point + problem * a.N;
  float* d = a.vectors + problem * (1 + kSlots + 2 * history) * a.N;
  float *gradients = d + a.N, *ys = gradients + kSlots * a.N, *ss = ys + history * a.N;
  LbfgsState& kept = a.states[blockIdx.x];
  double* rho = a.rho + int64_t(blockIdx.x) * history;
  const auto each = [&](const auto& use) {
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) use(i);
  };

  if (a.initialize) {
    each([&](int64_t i) { point[i] = x[i]; });
    const bool has_rows = a.options.joint || a.groups.state(problem) != 0;
    if (threadIdx.x) return;
    kept.phase = has_rows && o.steps ? Phase::start : Phase::finished;
    kept.step = -1, kept.num_pairs = 0, kept.newest = -1, kept.has_direction = false, kept.h_diag = 1, kept.t = 0;
    kept.turn = 0, kept.loss = 0;
    if (part == 0) {
      a.done[problem] = kept.phase == Phase::finished;
      *a.arrivals = 0;
      for (int k = 0; k < o.steps; ++k) a.losses[k * num_problems + problem] = 0;
    }
    return;
  }

  LbfgsState s = kept;
  if (s.phase == Phase::finished) return;
  unsigned turn = s.turn;
  const auto all = [&](double value, const auto& combine) {
    value = block_reduce(value, shared.parts, combine);
    if (a.num_parts == 1) return value;
    double* sums = a.sums + turn % 2 * kMaxParts;
    if (threadIdx.x == 0) sums[part] = value;
    ++turn;
    group_barrier(a.arrivals, turn * a.num_parts);
    value = sums[0];
    for (int i = 1; i < a.num_parts; ++i) value = combine(value, sums[i]);
    return value;
  };
  // Sum, or largest, of term(i) over the problem's elements.
  const auto total = [&](const auto& term) {
    double value = 0;
    each([&](int64_t i) { value += double(term(i)); });
    return all(value, [](double p, double q) { return p + q; });
  };
  const auto most = [&](const auto& term) {
    double value = 0;
    const auto larger = [](double p, double q) { return p >= q || p != p ? p : q; };  // NaN wins
    each([&](int64_t i) { value = larger(value, double(fabsf(term(i)))); });
    return all(value, larger);
  };
  const auto gradient_of = [&](int slot) { return gradients + slot * a.N; };

  double loss = 0;
  for (int i = 0; i < a.num_losses; ++i) loss += a.loss[problem * a.num_losses + i];
  Trial p = {s.t, loss, 0, 0};
  if (s.phase != Phase::start)
    while (p.slot == s.start.slot || p.slot == s.low.slot || p.slot == s.high.slot) ++p.slot;
  const float* g_new = a.gradient + problem * a.N;
  each([&](int64_t i) { gradient_of(p.slot)[i] = g_new[i]; });

  bool stop = false;
  if (s.phase == Phase::start) {
    s.slot = p.slot, s.loss = loss, stop = true;  // the first step begins below
  } else {
    p.slope = total([&](int64_t i) { return double(gradient_of(p.slot)[i]) * d[i]; });
    const int tries = s.evals++;
    const bool decreases = !(p.loss > s.start.loss + 1e-4 * p.t * s.start.slope);
    const bool flat = fabs(p.slope) <= -0.9 * s.start.slope;
    bool accepted = false;
    if (s.phase == Phase::bracket) {
      if (tries >= s.max_tries) {  // out of budget before a bracket was found
        accepted = true;
        if (!(p.loss < s.start.loss)) p = s.start;
      } else if (decreases && !(tries > 1 && p.loss >= s.low.loss) && flat) {
        accepted = true;
      } else if (!decreases || (tries > 1 && p.loss >= s.low.loss) || p.slope >= 0) {
        s.high = p;
        if (!(s.low.loss <= p.loss)) s.high = s.low, s.low = p;
        s.phase = Phase::zoom, s.stalled = false;
        s.largest = most([&](int64_t i) { return d[i]; });
      } else {
        s.t = cubic_minimum(s.low, p, p.t + 0.01 * (p.t - s.low.t), 10 * p.t);
        s.low = s.high = p;
      }
    } else if (!decreases || p.loss >= s.low.loss) {
      if (s.low.loss <= p.loss) {
        s.high = p;
      } else {
        s.high = s.low, s.low = p;
      }
    } else if (flat) {
      accepted = true;
    } else {
      if (p.slope * (s.high.t - s.low.t) >= 0) s.high = s.low;
      s.low = p;
    }
    if (s.phase == Phase::zoom && !accepted) {
      if (tries < s.max_tries && fabs(s.high.t - s.low.t) * s.largest >= o.tolerance_change) {
        const double left = fmin(s.low.t, s.high.t), right = fmax(s.low.t, s.high.t), margin = 0.1 * (right - left);
        double t = cubic_minimum(s.low, s.high, left, right);
        if (fmin(right - t, t - left) >= margin) {
          s.stalled = false;
        } else if (s.stalled || t >= right || t <= left) {  // twice in a row too close to an end: step inside
          t = fabs(t - right) < fabs(t - left) ? right - margin : left + margin;
          s.stalled = false;
        } else {
          s.stalled = true;
        }
        s.t = t;
      } else {
        accepted = true;
        p = s.low;
      }
    }
    if (!accepted) {
      each([&](int64_t i) { point[i] = fmaf(float(s.t), d[i], x[i]); });
      s.turn = turn;
      if (threadIdx.x == 0) kept = s;
      return;
    }
    s.t = p.t, s.loss = p.loss, s.slot = p.slot, s.num_evals += s.evals;
    each([&](int64_t i) { x[i] = fmaf(float(s.t), d[i], x[i]); });
    stop = s.num_evals >= o.max_eval || fabs(s.loss - s.start.loss) < o.tolerance_change ||
           most([&](int64_t i) { return gradient_of(s.slot)[i]; }) <= o.tolerance_grad ||
           most([&](int64_t i) { return float(s.t) * d[i]; }) <= o.tolerance_change;
  }

  for (;;) {
    const float* g = gradient_of(s.slot);
    if (stop || s.num_iter >= o.max_iter) {
      if (++s.step == o.steps) {
        s.phase = Phase::finished;
        break;
      }
      if (part == 0 && threadIdx.x == 0) a.losses[s.step * num_problems + problem] = float(s.loss);
      // Every step evaluates its start, which is the point accepted last: counted, but not computed again.
      s.num_evals = 1, s.num_iter = 0;
      stop = most([&](int64_t i) { return g[i]; }) <= o.tolerance_grad;
      continue;
    }
    ++s.num_iter;
    if (!s.has_direction) {
      s.has_direction = true;
      each([&](int64_t i) { d[i] = -g[i]; });
      s.t = o.lr * fmin(1.0, 1.0 / total([&](int64_t i) { return fabsf(g[i]); }));
    } else {
      const float* before = gradient_of(s.start.slot);
      const float t = float(s.t);
      const double y_s = total([&](int64_t i) { return double(g[i] - before[i]) * (d[i] * t); });
      if (y_s > 1e-10) {
        s.newest = (s.newest + 1) % history;
        s.num_pairs = s.num_pairs < history ? s.num_pairs + 1 : history;
        float *y = ys + s.newest * a.N, *step = ss + s.newest * a.N;
        each([&](int64_t i) { y[i] = g[i] - before[i], step[i] = d[i] * t; });
        if (threadIdx.x == 0) rho[s.newest] = 1 / y_s;
        s.h_diag = y_s / total([&](int64_t i) { return double(y[i]) * y[i]; });
      }
      // d = -(approximate inverse Hessian) g: Nocedal & Wright, algorithm 7.4.
      each([&](int64_t i) { d[i] = -g[i]; });
      for (int k = 0; k < s.num_pairs; ++k) {
        const int at = (s.newest - k + history) % history;
        const float *y = ys + at * a.N, *step = ss + at * a.N;
        const double alpha = rho[at] * total([&](int64_t i) { return double(step[i]) * d[i]; });
        if (threadIdx.x == 0) shared.alpha[at] = alpha;
        each([&](int64_t i) { d[i] -= float(alpha) * y[i]; });
      }
      each([&](int64_t i) { d[i] *= float(s.h_diag); });
      for (int k = s.num_pairs - 1; k >= 0; --k) {
        const int at = (s.newest - k + history) % history;
        const float *y = ys + at * a.N, *step = ss + at * a.N;
        const double beta = rho[at] * total([&](int64_t i) { return double(y[i]) * d[i]; });
        const float rest = float(shared.alpha[at] - beta);
        each([&](int64_t i) { d[i] += rest * step[i]; });
      }
      s.t = o.lr;
    }
    const double slope = total([&](int64_t i) { return double(g[i]) * d[i]; });
    s.start = s.low = s.high = {0, s.loss, slope, s.slot};
    if (slope > -o.tolerance_change) {
      stop = true;
      continue;
    }
    s.evals = 0;
    s.max_tries = o.max_line_search < 0 ? o.max_eval - s.num_evals : o.max_line_search;
    s.phase = Phase::bracket;
    each([&](int64_t i) { point[i] = fmaf(float(s.t), d[i], x[i]); });
    break;
  }
  s.turn = turn;
  if (threadIdx.x) return;
  kept = s;
  if (part == 0) a.done[problem] = s.phase == Phase::finished;
}

}  // namespace pgolf::slot::cuda
