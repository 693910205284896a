// The Python module pgolf_kernels._cuda: device pointers and a stream as integers, sizes. The only C++ file of the CUDA
// build that knows Python; the callers in pgolf_kernels/ops check every argument before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/device.h"
#include "int6_linear/int6_linear_cuda.h"
#include "slot/slot_cuda.h"

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
  m.attr("SLOT_SEGMENT_ROWS") = kSegmentRows;
  m.attr("SLOT_MAX_VOCAB") = kMaxVocab;
  const auto problem = [](Address hidden, Address weight, Address targets, std::array<int64_t, 4> sizes, bool bf16,
                          float softcap, bool before, int device, Address stream) {
    const auto [B, T, D, V] = sizes;
    return Problem{
        at<void>(hidden), at<void>(weight), at<int64_t>(targets), B, T, D, V, bf16, softcap, before, device, stream};
  };
  py::class_<Problem>(m, "SlotProblem", py::module_local())
      .def(py::init(problem), py::kw_only(), "hidden"_a, "weight"_a, "targets"_a, "sizes"_a, "bf16"_a, "softcap"_a,
           "before"_a, "device"_a, "stream"_a);
  const auto rows = [](std::vector<int64_t> num_rows, Address hidden, Address logits, int64_t stride, Address source,
                       Address target, Address weight, Address output, Address segment, Address window) {
    return Rows{std::move(num_rows),  at<void>(hidden),    at<void>(logits),  stride,
                at<int32_t>(source),  at<int32_t>(target), at<float>(weight), at<int32_t>(output),
                at<int32_t>(segment), at<int32_t>(window)};
  };
  py::class_<Rows>(m, "SlotRows", py::module_local())
      .def(py::init(rows), py::kw_only(), "num_rows"_a, "hidden"_a, "logits"_a, "stride"_a, "source"_a, "target"_a,
           "weight"_a, "output"_a, "segment"_a, "window"_a);
  m.def(
      "slot_gather",
      [](const Problem& p, const Rows& rows, Address weights, Address wanted) {
        gather(p, rows, at<float>(weights), at<bool>(wanted));
      },
      py::arg(), py::arg(), py::kw_only(), "weights"_a, "wanted"_a);
  m.def(
      "slot_fit_adamw",
      [](const Problem& p, const Rows& rows, std::vector<double> learning_rates, double beta1, double beta2, double eps,
         double weight_decay, bool delta, bool bias, bool shared, Address x, Address losses, Address moments,
         Address shift, Address sums, Address partial, Address bias_partial, Address depth_partial, Address row_partial,
         Address slope, Address loss_partial) {
        fit(p, rows, {std::move(learning_rates), beta1, beta2, eps, weight_decay},
            {delta, bias, shared, at<float>(x), at<float>(losses), at<float>(moments), at<float>(shift),
             at<float>(sums), at<float>(partial), at<float>(bias_partial), at<float>(depth_partial),
             at<float>(row_partial), at<float>(slope), at<double>(loss_partial)});
      },
      py::arg(), py::arg(), py::kw_only(), "learning_rates"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a,
      "delta"_a, "bias"_a, "shared"_a, "x"_a, "losses"_a, "moments"_a, "shift"_a, "sums"_a, "partial"_a,
      "bias_partial"_a, "depth_partial"_a, "row_partial"_a, "slope"_a, "loss_partial"_a);
  m.def(
      "slot_score",
      [](const Problem& p, const Rows& rows, Address delta, int64_t delta_stride, Address bias, int64_t bias_stride,
         Address shift, Address nll) {
        score(p, rows, at<float>(delta), delta_stride, at<float>(bias), bias_stride, at<float>(shift), at<float>(nll));
      },
      py::arg(), py::arg(), py::kw_only(), "delta"_a, "delta_stride"_a, "bias"_a, "bias_stride"_a, "shift"_a, "nll"_a);
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
}
