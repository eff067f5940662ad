// SPDX-License-Identifier: BSD-3-Clause
// fastrnn._C: what Python cannot know by itself, the facts of this build and of the processor and the plan of a layer.
// It holds no op, so it needs no torch. setup.py defines the FASTRNN_* strings.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "plan.h"

#ifdef __clang__
#define FASTRNN_COMPILER __VERSION__
#else
#define FASTRNN_COMPILER "GCC " __VERSION__
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.attr("version") = FASTRNN_VERSION;
  module.attr("compiler") = FASTRNN_COMPILER;
  module.attr("build_type") = FASTRNN_BUILD_TYPE;
  module.attr("torch_target") = FASTRNN_TORCH_TARGET;
#ifdef FASTRNN_CUDA_VERSION
  module.attr("cuda_version") = FASTRNN_CUDA_VERSION;
  module.attr("cuda_archs") = FASTRNN_CUDA_ARCHS;
#else
  module.attr("cuda_version") = py::none();
  module.attr("cuda_archs") = py::none();
#endif

  module.def("isa", [] { return fastrnn::isa_name(fastrnn::best_isa()); });

  py::class_<fastrnn::CpuPlan>(module, "CpuPlan")
      .def_property_readonly(
          "split", [](const fastrnn::CpuPlan& plan) { return plan.split == fastrnn::Split::rows ? "rows" : "units"; })
      .def_readonly("threads", &fastrnn::CpuPlan::threads)
      .def_readonly("reason", &fastrnn::CpuPlan::reason);
  module.def(
      "plan_cpu",
      [](int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int gates, int threads) {
        return fastrnn::plan_cpu({T, B, I, H, P, gates, threads});
      },
      py::kw_only(), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"), py::arg("P"), py::arg("gates"),
      py::arg("threads"));
}
