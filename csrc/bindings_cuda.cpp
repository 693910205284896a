// The Python module pgolf_kernels._cuda: device pointers and a stream as integers, sizes. The only C++ file of the CUDA
// build that knows Python; the callers in pgolf_kernels/ops check every argument before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/device.h"
#include "int6_linear/int6_linear_cuda.h"
#include "slot/slot_cuda.h"
#ifdef PGOLF_EMULATE_CUDA
#include "common/cuda_emulation.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Address = uintptr_t;  // tensor.data_ptr(), or 0

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_slot(py::module_& m) {
  using namespace pgolf::slot::cuda;
  m.attr("SLOT_MAX_VOCAB") = kMaxVocab;
  m.attr("SLOT_MAX_HISTORY") = kMaxHistory;
  py::enum_<Mask>(m, "SlotMask", py::module_local())
      .value("boolean", Mask::boolean)
      .value("float32", Mask::float32)
      .value("float64", Mask::float64);
  const auto problem = [](Address hidden, Address weight, Address targets, Address mask, Mask mask_type,
                          bool whole_batch, std::array<int64_t, 4> sizes, bool bf16, float softcap, bool before,
                          int device, Address stream) {
    const auto [B, T, D, V] = sizes;
    return Problem{at<void>(hidden),
                   at<void>(weight),
                   at<int64_t>(targets),
                   at<void>(mask),
                   mask_type,
                   whole_batch,
                   B,
                   T,
                   D,
                   V,
                   bf16,
                   softcap,
                   before,
                   device,
                   stream};
  };
  py::class_<Problem>(m, "SlotProblem", py::module_local())
      .def(py::init(problem), py::kw_only(), "hidden"_a, "weight"_a, "targets"_a, "mask"_a, "mask_type"_a,
           "whole_batch"_a, "sizes"_a, "bf16"_a, "softcap"_a, "before"_a, "device"_a, "stream"_a);
  py::class_<Layout>(m, "SlotLayout", py::module_local())
      .def(py::init<std::vector<int64_t>>(), "room"_a)
      .def_readonly("first_row", &Layout::first_row)
      .def_property_readonly("num_segments", &Layout::num_segments)
      .def_property_readonly("num_integers", &Layout::num_integers);
  const auto rows = [](const Layout& layout, Address integers, Address weight, Address hidden) {
    return Rows(layout, at<int32_t>(integers), at<float>(weight), at<void>(hidden));
  };
  py::class_<Rows>(m, "SlotRows", py::module_local())
      .def(py::init(rows), py::arg(), py::kw_only(), "integers"_a, "weight"_a, "hidden"_a);
  const auto logits = [](Address data, int64_t stride, int64_t first_row) {
    return Logits{at<void>(data), stride, first_row};
  };
  py::class_<Logits>(m, "SlotLogits", py::module_local())
      .def(py::init(logits), py::kw_only(), "data"_a, "stride"_a, "first_row"_a);
  const auto form = [](bool delta, bool bias, bool shared) { return Form{delta, bias, shared}; };
  py::class_<Form>(m, "SlotForm", py::module_local())
      .def(py::init(form), py::kw_only(), "delta"_a, "bias"_a, "shared"_a);
  const auto adamw = [](std::vector<double> learning_rates, double beta1, double beta2, double eps,
                        double weight_decay) {
    return AdamW{std::move(learning_rates), beta1, beta2, eps, weight_decay};
  };
  py::class_<AdamW>(m, "SlotAdamW", py::module_local())
      .def(py::init(adamw), py::kw_only(), "learning_rates"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a);
  const auto lbfgs = [](double lr, double tolerance_grad, double tolerance_change, int steps, int max_iter, int history,
                        int max_eval, int max_line_search, bool joint) {
    return Lbfgs{lr, tolerance_grad, tolerance_change, steps, max_iter, history, max_eval, max_line_search, joint};
  };
  py::class_<Lbfgs>(m, "SlotLbfgs", py::module_local())
      .def(py::init(lbfgs), py::kw_only(), "lr"_a, "tolerance_grad"_a, "tolerance_change"_a, "steps"_a, "max_iter"_a,
           "history"_a, "max_eval"_a, "max_line_search"_a, "joint"_a);

  m.def("slot_count", [](const Problem& p, Address facts) { count(p, at<int64_t>(facts)); });
  m.def("slot_gather", [](const Problem& p, const Layout& layout, const Rows& rows, Address facts) {
    gather(p, layout, rows, at<int64_t>(facts));
  });
  m.def("slot_fits_one_launch", &fits_one_launch);
  m.def("slot_adamw_bytes", &adamw_bytes);
  m.def("slot_lbfgs_bytes", &lbfgs_bytes);
  const auto fit_by = [](const auto& optimizer) {
    using Optimizer = std::decay_t<decltype(optimizer)>;
    return [](const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f,
              const Optimizer& o, Address x, Address losses, Address workspace) {
      fit(p, layout, rows, logits, f, o, at<float>(x), at<float>(losses), at<void>(workspace));
    };
  };
  m.def("slot_fit", fit_by(AdamW{}), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::kw_only(),
        "x"_a, "losses"_a, "workspace"_a);
  m.def("slot_fit", fit_by(Lbfgs{}), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::kw_only(),
        "x"_a, "losses"_a, "workspace"_a);
  m.def(
      "slot_fit_in_one_launch",
      [](const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, const Form& f, const AdamW& o,
         int first, int last, Address x, Address losses, Address workspace) {
        fit_in_one_launch(p, layout, rows, logits, f, o, first, last, at<float>(x), at<float>(losses),
                          at<void>(workspace));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::kw_only(), "x"_a,
      "losses"_a, "workspace"_a);
  m.def(
      "slot_score",
      [](const Problem& p, const Layout& layout, const Rows& rows, const Logits& logits, int first, int last,
         Address delta, int64_t delta_stride, Address bias, int64_t bias_stride, Address shift, Address nll) {
        score(p, layout, rows, logits, first, last, at<float>(delta), delta_stride, at<float>(bias), bias_stride,
              at<float>(shift), at<float>(nll));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::kw_only(), "delta"_a, "delta_stride"_a,
      "bias"_a, "bias_stride"_a, "shift"_a, "nll"_a);
}

void bind_int6_linear(py::module_& m) {
  using namespace pgolf::int6_linear::cuda;
  m.attr("INT6_MAX_SIZE") = kMaxSize;
  // dtype: 0 float32, 1 bfloat16, 2 float16.
  m.def("int6_linear", [](Address x, Address packed, int64_t packed_bytes, Address scale, Address bias, Address y,
                          int64_t M, int64_t N, int64_t K, int dtype, int device, Address stream) {
    forward({at<void>(x), at<uint8_t>(packed), at<uint16_t>(scale), at<void>(bias), at<void>(y), M, N, K,
             pgolf::DType(dtype)},
            packed_bytes, device, stream);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of pgolf_kernels on raw pointers.";
  m.def("why_not", pgolf::why_not_cuda, py::arg("device"));
  bind_int6_linear(m);
  bind_slot(m);
#ifdef PGOLF_EMULATE_CUDA
  m.def("conduct", &pgolf::emulation::conduct, "order"_a = 0, "missing"_a = "");
#endif
}
