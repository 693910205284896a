// The Python module pgolf_kernels._cpu: raw pointers as integers, sizes, a thread count. The only C++ file of the CPU
// build that knows Python; the callers in pgolf_kernels/ops check every argument before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "causal_attention/causal_attention.h"
#include "common/isa.h"
#include "common/limits.h"
#include "int6_linear/int6_linear.h"
#include "leaky_relu2_mlp/leaky_relu2_mlp.h"
#include "newton_schulz/newton_schulz.h"
#include "slot/slot.h"
#include "softcapped_cross_entropy/softcapped_cross_entropy.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Address = uintptr_t;  // tensor.data_ptr()

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

pgolf::DType dtype(bool bf16) { return bf16 ? pgolf::DType::bfloat16 : pgolf::DType::float32; }

void bind_isa(py::module_& m) {
  m.def("isa", [] { return pgolf::kIsaLevels[pgolf::default_level()]; }, "The instruction set level kernels run with.");
  m.def(
      "isa_levels",
      [] { return std::vector<std::string>(pgolf::kIsaLevels, pgolf::kIsaLevels + pgolf::cpu_level() + 1); },
      "The levels this CPU can run, worst first.");
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const auto& [name, present] : pgolf::cpu_features()) features[name] = present;
        return features;
      },
      "Which of the features that kernels use this CPU and its OS offer.");
}

void bind_limits(py::module_& m) {
  m.def(
      "peak_operations",
      [](bool bf16, int threads, const std::string& isa) {
        py::gil_scoped_release release;
        return pgolf::peak_operations(dtype(bf16), threads, isa);
      },
      py::kw_only(), "bf16"_a, "threads"_a, "isa"_a = "",
      "Operations per second of matrix products whose operands stay in the first-level caches.");
  m.def(
      "read_bandwidth",
      [](int64_t bytes, int threads, const std::string& isa) {
        py::gil_scoped_release release;
        return pgolf::read_bandwidth(bytes, threads, isa);
      },
      py::kw_only(), "bytes"_a, "threads"_a, "isa"_a = "",
      "Bytes per second that threads read, each from `bytes` of its own.");
}

void bind_causal_attention(py::module_& m) {
  using namespace pgolf::causal_attention;
  py::class_<Problem>(m, "CausalAttention")
      .def(py::init([](std::array<int64_t, 5> sizes, bool bf16, bool exclude_self) {
             const auto [B, T, H, Hkv, d] = sizes;
             return Problem{B, T, H, Hkv, d, dtype(bf16), exclude_self};
           }),
           py::kw_only(), "sizes"_a, "bf16"_a, "exclude_self"_a)
      .def(
          "forward",
          [](const Problem& p, Address q, Address k, Address v, Address y, Address y_with_self, Address lse,
             int threads, const std::string& isa) {
            py::gil_scoped_release release;
            forward(p, {at<void>(q), at<void>(k), at<void>(v), at<void>(y), at<void>(y_with_self), at<float>(lse)},
                    threads, isa);
          },
          py::kw_only(), "q"_a, "k"_a, "v"_a, "y"_a, "y_with_self"_a, "lse"_a, "threads"_a, "isa"_a = "")
      .def(
          "backward",
          [](const Problem& p, Address q, Address k, Address v, Address dy, Address y_with_self, Address lse,
             Address dq, Address dk, Address dv, int threads, const std::string& isa) {
            py::gil_scoped_release release;
            backward(p,
                     {at<void>(q), at<void>(k), at<void>(v), at<void>(dy), at<void>(y_with_self), at<float>(lse),
                      at<void>(dq), at<void>(dk), at<void>(dv)},
                     threads, isa);
          },
          py::kw_only(), "q"_a, "k"_a, "v"_a, "dy"_a, "y_with_self"_a, "lse"_a, "dq"_a, "dk"_a, "dv"_a, "threads"_a,
          "isa"_a = "");
}

void bind_softcapped_cross_entropy(py::module_& m) {
  using namespace pgolf::softcapped_cross_entropy;
  m.def(
      "softcapped_cross_entropy",
      [](Address hidden, Address weight, Address targets, std::array<int64_t, 3> sizes, bool bf16, float softcap,
         int64_t ignore_index, float row_weight, Address losses, Address dlogits, int64_t pitch, int threads,
         const std::string& isa) {
        py::gil_scoped_release release;
        const auto [T, D, V] = sizes;
        loss_and_grad({at<void>(hidden), at<void>(weight), at<int64_t>(targets), T, D, V, dtype(bf16), softcap,
                       ignore_index, row_weight},
                      {at<float>(losses), at<void>(dlogits), pitch}, threads, isa);
      },
      py::kw_only(), "hidden"_a, "weight"_a, "targets"_a, "sizes"_a, "bf16"_a, "softcap"_a, "ignore_index"_a,
      "row_weight"_a, "losses"_a, "dlogits"_a, "pitch"_a, "threads"_a, "isa"_a = "");
}

void bind_leaky_relu2_mlp(py::module_& m) {
  using namespace pgolf::leaky_relu2_mlp;
  const auto problem = [](Address x, Address w_up, Address w_down, std::array<int64_t, 3> sizes, bool bf16,
                          float negative_slope, int threads, const std::string& isa) {
    const auto [M, D, H] = sizes;
    return Problem{at<void>(x), at<void>(w_up), at<void>(w_down), M, D, H, dtype(bf16), negative_slope, threads, isa};
  };
  py::class_<Problem>(m, "MlpProblem")
      .def(py::init(problem), py::kw_only(), "x"_a, "w_up"_a, "w_down"_a, "sizes"_a, "bf16"_a, "negative_slope"_a,
           "threads"_a, "isa"_a = "");
  m.def(
      "mlp_packed_bytes",
      [](int64_t rows, int64_t columns, bool bf16, const std::string& isa) {
        return packed_bytes(rows, columns, dtype(bf16), isa);
      },
      "rows"_a, "columns"_a, py::kw_only(), "bf16"_a, "isa"_a = "");
  m.def(
      "mlp_pack",
      [](Address weight, int64_t rows, int64_t columns, bool bf16, int threads, const std::string& isa, Address out) {
        py::gil_scoped_release release;
        pack(at<void>(weight), rows, columns, dtype(bf16), threads, isa, at<void>(out));
      },
      py::kw_only(), "weight"_a, "rows"_a, "columns"_a, "bf16"_a, "threads"_a, "isa"_a = "", "out"_a);
  m.def(
      "mlp_forward",
      [](const Problem& p, Address packed_up, Address packed_down, Address y, Address a) {
        py::gil_scoped_release release;
        forward(p, at<void>(packed_up), at<void>(packed_down), at<void>(y), at<void>(a));
      },
      py::arg(), py::kw_only(), "packed_up"_a = 0, "packed_down"_a = 0, "y"_a, "a"_a = 0);
  m.def(
      "mlp_backward",
      [](const Problem& p, Address dy, Address a, Address dx, Address dw_up, Address dw_down) {
        py::gil_scoped_release release;
        backward(p, at<void>(dy), at<void>(a), at<void>(dx), at<void>(dw_up), at<void>(dw_down));
      },
      py::arg(), py::kw_only(), "dy"_a, "a"_a, "dx"_a = 0, "dw_up"_a = 0, "dw_down"_a = 0);
  m.def(
      "mlp_fingerprint", [](Address data, int64_t bytes) { return fingerprint(at<void>(data), bytes); },
      "A hash of 64 of the array's cache lines.");
}

void bind_newton_schulz(py::module_& m) {
  m.def(
      "newton_schulz",
      [](Address g, std::array<int64_t, 3> sizes, std::array<int64_t, 2> strides, bool lines_are_rows, bool g_bf16,
         Address out, bool bf16, std::vector<std::array<double, 3>> steps, std::vector<int64_t> blocks,
         bool row_normalize, double eps, int threads, const std::string& isa) {
        py::gil_scoped_release release;
        const auto [matrices, rows, columns] = sizes;
        const auto [matrix_stride, line_stride] = strides;
        pgolf::newton_schulz::run({at<void>(g), matrices, rows, columns, matrix_stride, line_stride, lines_are_rows,
                                   dtype(g_bf16), at<void>(out), dtype(bf16), std::move(steps), std::move(blocks),
                                   row_normalize, eps, threads, isa});
      },
      py::arg(), py::kw_only(), "sizes"_a, "strides"_a, "lines_are_rows"_a, "g_bf16"_a, "out"_a, "bf16"_a, "steps"_a,
      "blocks"_a, "row_normalize"_a, "eps"_a, "threads"_a, "isa"_a = "");
}

void bind_int6_linear(py::module_& m) {
  // Positional throughout: at one row of x the look-up of keywords would show in the time of a call.
  m.def("int6_linear", [](Address x, Address packed, int64_t packed_bytes, Address scale, Address bias, Address y,
                          int64_t M, int64_t N, int64_t K, bool bf16, int threads, const std::string& isa) {
    py::gil_scoped_release release;
    pgolf::int6_linear::forward(
        {at<void>(x), at<uint8_t>(packed), at<uint16_t>(scale), at<void>(bias), at<void>(y), M, N, K, dtype(bf16)},
        packed_bytes, threads, isa);
  });
}

void bind_slot(py::module_& m) {
  using namespace pgolf::slot;
  const auto problem = [](Address hidden, Address weight, Address targets, std::array<int64_t, 4> sizes, bool bf16,
                          float softcap, bool before, int threads, const std::string& isa) {
    const auto [B, T, D, V] = sizes;
    return Problem{at<void>(hidden),
                   at<void>(weight),
                   at<int64_t>(targets),
                   B,
                   T,
                   D,
                   V,
                   dtype(bf16),
                   softcap,
                   before,
                   threads,
                   isa};
  };
  py::class_<Problem>(m, "SlotProblem")
      .def(py::init(problem), py::kw_only(), "hidden"_a, "weight"_a, "targets"_a, "sizes"_a, "bf16"_a, "softcap"_a,
           "before"_a, "threads"_a, "isa"_a = "");
  py::class_<Objective>(m, "SlotObjective")
      .def(py::init([](Address weights, bool delta, bool bias, bool shared) {
             return Objective{at<float>(weights), delta, bias, shared};
           }),
           py::kw_only(), "weights"_a, "delta"_a, "bias"_a, "shared"_a);
  m.def(
      "slot_fit_adamw",
      [](const Problem& p, const Objective& objective, std::vector<double> learning_rates, double beta1, double beta2,
         double eps, double weight_decay, Address x, Address losses) {
        py::gil_scoped_release release;
        fit(p, objective, {std::move(learning_rates), beta1, beta2, eps, weight_decay}, at<float>(x),
            at<float>(losses));
      },
      py::arg(), py::arg(), py::kw_only(), "learning_rates"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "x"_a,
      "losses"_a);
  m.def(
      "slot_score",
      [](const Problem& p, Address rows, Address delta, int64_t delta_stride, Address bias, int64_t bias_stride,
         Address nll) {
        py::gil_scoped_release release;
        score(p, at<bool>(rows), at<float>(delta), delta_stride, at<float>(bias), bias_stride, at<float>(nll));
      },
      py::arg(), py::kw_only(), "rows"_a, "delta"_a, "delta_stride"_a, "bias"_a, "bias_stride"_a, "nll"_a);
  py::class_<Evaluator>(m, "SlotEvaluator")
      .def(py::init<const Problem&, const Objective&>(), py::call_guard<py::gil_scoped_release>())
      .def(
          "evaluate",
          [](Evaluator& self, const std::vector<int64_t>& groups, Address x, Address losses, Address gradients) {
            py::gil_scoped_release release;
            self.evaluate(groups.data(), int64_t(groups.size()), at<float>(x), at<double>(losses),
                          at<float>(gradients));
          },
          "groups"_a, py::kw_only(), "x"_a, "losses"_a, "gradients"_a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pgolf_kernels on raw pointers.";
  bind_isa(m);
  bind_limits(m);
  bind_causal_attention(m);
  bind_softcapped_cross_entropy(m);
  bind_leaky_relu2_mlp(m);
  bind_newton_schulz(m);
  bind_int6_linear(m);
  bind_slot(m);
}
