// SLOT's driver: which rows, which windows on which thread, and the optimiser. The loops are in slot_body.inl.
#include "slot/slot.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"

namespace pgolf::slot {

static const Unit<Kernels> kUnits[] = {PGOLF_UNITS};

// Rows whose gradients are summed apart before they join the window's: at 2048 rows half the error of one float32 sum.
constexpr int64_t kRowsPerSum = 64;
constexpr int64_t kRowsPerScore = 112;  // their logits stay in cache until they are scored

// What every window shares: the problem, its head in packed form, the chosen loops.
struct Context {
  const Problem& p;
  const Kernels& kernels;
  Head head;
  Scratch<uint32_t> packed;
  int64_t words_per_row, scratch_bytes;

  explicit Context(const Problem& problem) : p(problem), kernels(choose(kUnits, problem.isa, "slot")) {
    PGOLF_CHECK(p.V > 0 && p.V < INT32_MAX - kColumnMultiple, "slot: V must be in [1, 2^31), got ", p.V);
    PGOLF_CHECK(p.T < INT32_MAX, "slot: T must be below 2^31, got ", p.T);
    const int64_t stride = (p.V + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
    head = {p.weight, nullptr, p.V, p.D, stride, p.dtype};
    words_per_row = kernels.words_per_row(head);
    scratch_bytes = kernels.scratch_bytes(head);
    const int64_t panel = kernels.panel;
    head.packed = packed.need(stride * words_per_row);
    parallel_for(stride / panel, p.threads,
                 [&](int64_t i, int) { kernels.pack(head, i, packed.get() + i * panel * words_per_row); });
  }

  const char* hidden(int64_t window) const {
    return static_cast<const char*>(p.hidden) + window * p.T * p.D * size_of(p.dtype);
  }
  // Whether a step moves each row's 1 / rms; if it does not, norm="before" is norm="after" on normalised rows.
  bool through_norm(bool delta) const { return p.before && delta; }
  // The form of the base logits; see slot_kernels.h.
  bool u_form(bool delta) const { return !through_norm(delta) && p.cap > 0 && p.cap <= kLargestPlainCap; }
};

// What a step moves the logits by, for all windows of a group; [stride] each.
struct Shift {
  const float* b;      // W delta + bias; through the norm: W delta
  const float* w;      // u form: k tanh((b - b0) / c), and after it [stride] the same over k^2
  const float* bias;   // z form: the bias if it does not pass through the norm, else zeros
  const float* delta;  // [D] or null
  bool own_bias;       // bias has a gradient of its own
};

// One window: its rows, their base logits, and its part of the gradient.
struct Window {
  int64_t number = -1;
  std::vector<int32_t> index, target;
  std::vector<float> weight, r0, r, rho, nll, slope;
  Scratch<char> base, freeze_scratch;
  Scratch<float> gradient, bias_gradient, part, bias_part, d_hidden, scratch;
  double loss = 0;

  Rows rows(const Context& c) const {
    return {c.hidden(number), index.data(), target.data(), weight.data(), int64_t(index.size())};
  }

  // Take the rows t in [from, T) for which weight_of(t) > 0, at most `limit`; return the first t not looked at.
  template <class WeightOf>
  int64_t select(const Context& c, int64_t window, int64_t from, size_t limit, const WeightOf& weight_of) {
    number = window;
    index.clear(), target.clear(), weight.clear();
    int64_t t = from;
    for (; t < c.p.T && index.size() < limit; ++t) {
      const float w = weight_of(t);
      if (!(w > 0)) continue;
      const int64_t y = c.p.targets[window * c.p.T + t];
      PGOLF_CHECK(y >= 0 && y < c.p.V, "slot: targets of the used rows must be in [0, ", c.p.V, "), got ", y);
      index.push_back(int32_t(t)), target.push_back(int32_t(y)), weight.push_back(w);
    }
    for (auto* v : {&r0, &r, &rho, &nll, &slope}) v->assign(index.size(), 1.0f);
    return t;
  }

  void freeze(const Context& c, const float* b0, bool u_form) {
    const size_t element = c.p.dtype == DType::float32 ? 4 : c.kernels.half_bytes;
    base.need(index.size() * c.head.stride * element);
    if (c.p.before) c.kernels.inverse_rms(c.head, rows(c), nullptr, r0.data());
    c.kernels.freeze(c.head, rows(c), u_form ? c.p.cap : 0, u_form ? b0 : nullptr, c.p.before ? r0.data() : nullptr,
                     false, freeze_scratch.need(c.scratch_bytes), base.get());
  }

  // Loss, gradient in b [stride], in a bias of its own [stride], and d_hidden [D]: what delta does through the norm.
  void sweep(const Context& c, const Shift& shift) {
    const int64_t n = index.size(), stride = c.head.stride, D = c.p.D;
    const bool u_form = c.u_form(shift.delta), through_norm = c.through_norm(shift.delta);
    if (through_norm) {
      c.kernels.inverse_rms(c.head, rows(c), shift.delta, r.data());
      for (int64_t i = 0; i < n; ++i) rho[i] = r[i] / r0[i];
    }
    std::fill_n(gradient.need(stride), stride, 0.0f);
    if (shift.own_bias) std::fill_n(bias_gradient.need(stride), stride, 0.0f);
    Sweep s;
    s.base = base.get();
    s.cap = c.p.cap;
    s.b = u_form ? shift.w : shift.b;
    s.w_over_square = shift.w + stride;
    s.bias = shift.bias;
    s.gradient = part.need(stride);
    s.bias_gradient = shift.own_bias ? bias_part.need(stride) : nullptr;
    s.scratch = scratch.need(stride);
    const int64_t bytes_per_row = stride * (c.p.dtype == DType::float32 ? 4 : c.kernels.half_bytes);
    for (int64_t first = 0; first < n; first += kRowsPerSum) {
      s.rows = {c.hidden(number), &index[first], &target[first], &weight[first], std::min(kRowsPerSum, n - first)};
      s.base = base.get() + first * bytes_per_row;
      s.rho = &rho[first], s.r = &r[first], s.nll = &nll[first], s.slope = &slope[first];
      std::fill_n(s.gradient, stride, 0.0f);
      if (s.bias_gradient) std::fill_n(s.bias_gradient, stride, 0.0f);
      u_form ? c.kernels.sweep_u(c.head, s) : c.kernels.sweep_z(c.head, s);
      for (int64_t v = 0; v < stride; ++v) gradient.get()[v] += s.gradient[v];
      for (int64_t v = 0; s.bias_gradient && v < stride; ++v) bias_gradient.get()[v] += s.bias_gradient[v];
    }
    loss = 0;
    for (int64_t i = 0; i < n; ++i) loss += double(weight[i]) * nll[i];
    if (!through_norm) return;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += slope[i] = r[i] * r[i] / float(D) * slope[i];
    std::fill_n(d_hidden.need(D), D, 0.0f);
    c.kernels.add_rows(c.head, rows(c), slope.data(), d_hidden.get());
    for (int64_t d = 0; d < D; ++d) d_hidden.get()[d] += float(total) * shift.delta[d];
  }
};

// The windows that share one parameter vector x.
class Group {
 public:
  Group(const Context& context, const Objective& objective, int threads)
      : c_(context), objective_(objective), threads_(threads) {}

  int64_t num_parameters() const { return (objective_.delta ? c_.p.D : 0) + (objective_.bias ? c_.p.V : 0); }

  // Use windows [first, last), keeping the memory of earlier ones. Returns whether any row takes part.
  bool assign(int64_t first, int64_t last) {
    frozen_ = false;
    windows_.resize(last - first);
    parallel_for(last - first, threads_, [&](int64_t i, int) {
      const float* weights = objective_.weights + (first + i) * c_.p.T;
      windows_[i].select(c_, first + i, 0, SIZE_MAX, [&](int64_t t) { return weights[t]; });
    });
    windows_.erase(std::remove_if(windows_.begin(), windows_.end(), [](const Window& w) { return w.index.empty(); }),
                   windows_.end());
    return !windows_.empty();
  }

  double evaluate(const float* x, float* gradient) {
    const int64_t D = c_.p.D, V = c_.p.V, stride = c_.head.stride;
    const float* delta = objective_.delta ? x : nullptr;
    const float* bias = objective_.bias ? x + (delta ? D : 0) : nullptr;
    const bool u_form = c_.u_form(delta), own_bias = bias && c_.through_norm(delta);
    c_.kernels.project(c_.head, delta, own_bias ? nullptr : bias, b_.need(stride));
    c_.kernels.project(c_.head, nullptr, own_bias ? bias : nullptr, bias_.need(stride));
    const bool freeze = !frozen_ || (u_form && too_far_from_base());
    if (freeze) std::copy_n(b_.get(), stride, b0_.need(stride));
    frozen_ = true;
    float* w = w_.need(2 * stride);
    if (u_form) c_.kernels.shift(c_.head, b_.get(), b0_.get(), c_.p.cap, w, w + stride);
    const Shift shift = {b_.get(), w, bias_.get(), delta, own_bias};
    parallel_for(windows_.size(), threads_, [&](int64_t i, int) {
      if (freeze) windows_[i].freeze(c_, b0_.get(), u_form);
      windows_[i].sweep(c_, shift);
    });

    double loss = 0;
    for (const Window& window : windows_) loss += window.loss;
    const auto total = [&](int64_t n, float* out, const Scratch<float> Window::* part, float sign) {
      for (const Window& window : windows_)
        for (int64_t i = 0; i < n; ++i) out[i] += sign * (window.*part).get()[i];
    };
    float* g = g_.need(stride);
    std::fill_n(g, stride, 0.0f);
    total(V, g, &Window::gradient, 1);
    if (delta) c_.kernels.pull_back(c_.head, g, gradient);
    if (c_.through_norm(delta)) total(D, gradient, &Window::d_hidden, -1);
    if (bias) std::fill_n(gradient + (bias - x), V, 0.0f);
    if (bias) total(V, gradient + (bias - x), own_bias ? &Window::bias_gradient : &Window::gradient, 1);
    return loss;
  }

 private:
  // The addition formula magnifies the storage's rounding by up to exp(2 max|b - b0| / c): fold b into the base again
  // before that exceeds 2.
  bool too_far_from_base() const {
    float farthest = 0;
    for (int64_t v = 0; v < c_.p.V; ++v) farthest = std::max(farthest, std::fabs(b_.get()[v] - b0_.get()[v]));
    return !(farthest <= 0.34f * c_.p.cap);
  }

  const Context& c_;
  const Objective objective_;
  const int threads_;
  std::vector<Window> windows_;
  Scratch<float> b_, b0_, w_, bias_, g_;
  bool frozen_ = false;
};

static void descend(Group& group, const AdamW& adamw, float* x, float* losses, int64_t loss_stride) {
  const int64_t n = group.num_parameters();
  std::vector<float> g(n), m(n, 0.0f), v(n, 0.0f);
  const float beta1 = float(adamw.beta1), beta2 = float(adamw.beta2), eps = float(adamw.eps);
  const float rest1 = float(1 - adamw.beta1), rest2 = float(1 - adamw.beta2);  // 1 - beta2 in float is 1e-5 off
  double power1 = 1, power2 = 1;
  for (size_t k = 0; k < adamw.learning_rates.size(); ++k) {
    losses[k * loss_stride] = float(group.evaluate(x, g.data()));
    const double lr = adamw.learning_rates[k];
    power1 *= adamw.beta1, power2 *= adamw.beta2;
    const float keep = float(1 - lr * adamw.weight_decay), step = float(lr / (1 - power1));
    const float correction = float(1 / (1 - power2));
    for (int64_t i = 0; i < n; ++i) {
      m[i] = beta1 * m[i] + rest1 * g[i];
      v[i] = beta2 * v[i] + rest2 * g[i] * g[i];
      x[i] = x[i] * keep - step * m[i] / (std::sqrt(v[i] * correction) + eps);
    }
  }
}

void fit(const Problem& problem, const Objective& objective, const AdamW& adamw, float* x, float* losses) {
  const Context context(problem);
  const int64_t num_groups = objective.shared ? 1 : problem.B;
  std::fill_n(losses, adamw.learning_rates.size() * num_groups, 0.0f);
  if (objective.shared) {
    Group group(context, objective, problem.threads);
    if (group.assign(0, problem.B)) descend(group, adamw, x, losses, 1);
    return;
  }
  std::vector<std::unique_ptr<Group>> own(std::max(1, problem.threads));  // one per worker, for its memory
  parallel_for(problem.B, problem.threads, [&](int64_t i, int worker) {
    auto& group = own[worker];
    if (!group) group = std::make_unique<Group>(context, objective, 1);
    if (group->assign(i, i + 1)) descend(*group, adamw, x + i * group->num_parameters(), losses + i, num_groups);
  });
}

void score(const Problem& problem, const bool* rows, const float* delta, int64_t delta_stride, const float* bias,
           int64_t bias_stride, float* nll) {
  const Context c(problem);
  std::vector<float*> start;  // where each window's scores begin
  for (int64_t i = 0; i < problem.B; ++i) {
    start.push_back(nll);
    nll += std::count(rows + i * problem.T, rows + (i + 1) * problem.T, true);
  }
  struct Worker {
    Window window;
    Scratch<float> b, bias, base;
  };
  std::vector<Worker> workers(std::max(1, problem.threads));
  parallel_for(problem.B, problem.threads, [&](int64_t i, int worker) {
    auto& [window, b, bias_row, base] = workers[worker];
    const float* d = delta ? delta + i * delta_stride : nullptr;
    c.kernels.project(c.head, d, nullptr, b.need(c.head.stride));
    c.kernels.project(c.head, nullptr, bias ? bias + i * bias_stride : nullptr, bias_row.need(c.head.stride));
    Sweep s = {};  // loss only
    s.base = base.need(kRowsPerScore * c.head.stride);
    s.cap = problem.cap;
    s.b = b.get();
    s.bias = bias_row.get();
    s.nll = start[i];
    s.scratch = window.scratch.need(c.head.stride);
    const bool* wanted = rows + i * problem.T;
    for (int64_t t = 0; t < problem.T;) {  // in blocks whose logits stay in cache
      t = window.select(c, i, t, kRowsPerScore, [&](int64_t t) { return float(wanted[t]); });
      s.rows = window.rows(c);
      s.rho = s.r = window.r.data();
      if (problem.before) c.kernels.inverse_rms(c.head, s.rows, d, window.r.data());
      c.kernels.freeze(c.head, s.rows, 0, nullptr, nullptr, true, window.freeze_scratch.need(c.scratch_bytes),
                       base.get());
      c.kernels.sweep_z(c.head, s);
      s.nll += s.rows.n;
    }
  });
}

Evaluator::Evaluator(const Problem& problem, const Objective& objective)
    : problem_(problem), context_(std::make_unique<Context>(problem_)) {
  const int64_t num_groups = objective.shared ? 1 : problem.B;
  for (int64_t i = 0; i < num_groups; ++i) {
    groups_.push_back(std::make_unique<Group>(*context_, objective, objective.shared ? problem.threads : 1));
    groups_.back()->assign(i, objective.shared ? problem.B : i + 1);
  }
}

Evaluator::~Evaluator() = default;

void Evaluator::evaluate(const int64_t* groups, int64_t n, const float* x, double* losses, float* gradients) {
  // A shared group spreads its windows over the threads itself.
  const int threads = groups_.size() == 1 ? 1 : problem_.threads;
  parallel_for(n, threads, [&](int64_t i, int) {
    Group& group = *groups_[groups[i]];
    const int64_t num_parameters = group.num_parameters();
    losses[i] = group.evaluate(x + i * num_parameters, gradients + i * num_parameters);
  });
}

}  // namespace pgolf::slot
