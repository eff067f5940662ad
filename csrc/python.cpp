// SPDX-License-Identifier: BSD-3-Clause
// fastrnn._C: what Python cannot know by itself, the facts of this build and of the processor and the plan of a layer.
// It holds no op, so it needs no torch. setup.py defines the FASTRNN_* strings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/isa.h"
#include "cuda_plan.h"
#include "plan.h"

#ifdef __clang__
#define FASTRNN_COMPILER __VERSION__
#else
#define FASTRNN_COMPILER "GCC " __VERSION__
#endif

namespace py = pybind11;

namespace {

// One of the named values, or a ValueError.
template <typename T, size_t N>
T named(const char* what, const std::string& name, const std::pair<const char*, T> (&values)[N]) {
  for (const auto& [known, value] : values) {
    if (name == known) return value;
  }
  throw std::invalid_argument(std::string("unknown ") + what + " " + name);
}

fastrnn::Arithmetic arithmetic_named(const std::string& name) {
  using fastrnn::Arithmetic;
  return named<Arithmetic>("arithmetic", name,
                           {{"fp16", Arithmetic::fp16},
                            {"bf16", Arithmetic::bf16},
                            {"tf32", Arithmetic::tf32},
                            {"fp32", Arithmetic::fp32},
                            {"fp64", Arithmetic::fp64}});
}

fastrnn::CudaPath path_named(const std::string& name) {
  using fastrnn::CudaPath;
  return named<CudaPath>("path", name, {{"gates", CudaPath::gates}, {"persistent", CudaPath::persistent}});
}

}  // namespace

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
  module.def("cpu_takes", [](const std::string& dtype) {
    const auto taken = named<fastrnn::Taken>("dtype", dtype,
                                             {{"float16", fastrnn::takes_half()}, {"bfloat16", fastrnn::takes_bf16()}});
    return taken == fastrnn::Taken::multiplied ? "multiplied"
           : taken == fastrnn::Taken::widened  ? "widened"
                                               : "converted";
  });

  py::class_<fastrnn::CpuPlan>(module, "CpuPlan")
      .def_property_readonly(
          "split", [](const fastrnn::CpuPlan& plan) { return plan.split == fastrnn::Split::rows ? "rows" : "units"; })
      .def_readonly("threads", &fastrnn::CpuPlan::threads)
      .def_readonly("reason", &fastrnn::CpuPlan::reason)
      .def_readonly("pack_input", &fastrnn::CpuPlan::pack_input)
      .def_readonly("pack_recurrent", &fastrnn::CpuPlan::pack_recurrent)
      .def_readonly("side_by_side", &fastrnn::CpuPlan::side_by_side);
  module.def(
      "plan_cpu",
      [](int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int gates, int threads, bool two_products,
         bool normalises, int layers, bool widens, bool backward, bool packed) {
        const fastrnn::Pass pass = backward ? fastrnn::Pass::backward : fastrnn::Pass::forward;
        return fastrnn::plan_cpu(
            {T, B, I, H, P, gates, threads, two_products, normalises, layers, widens, pass, packed});
      },
      py::kw_only(), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"), py::arg("P"), py::arg("gates"),
      py::arg("threads"), py::arg("two_products") = false, py::arg("normalises") = false, py::arg("layers") = 1,
      py::arg("widens") = false, py::arg("backward") = false, py::arg("packed") = false);

  py::class_<fastrnn::CudaPlan>(module, "CudaPlan")
      .def_property_readonly(
          "path",
          [](const fastrnn::CudaPlan& plan) { return plan.path == fastrnn::CudaPath::gates ? "gates" : "persistent"; })
      .def_property_readonly("grade", [](const fastrnn::CudaPlan& plan) { return plan.tiling.grade; })
      .def_property_readonly("teams", [](const fastrnn::CudaPlan& plan) { return plan.tiling.teams; })
      .def_property_readonly("blocks", [](const fastrnn::CudaPlan& plan) { return plan.tiling.blocks; })
      .def_property_readonly("rows_per_team", [](const fastrnn::CudaPlan& plan) { return plan.tiling.rows_per_team; })
      .def_property_readonly(
          "units_per_block",
          [](const fastrnn::CudaPlan& plan) { return plan.tiling.units_per_packet * plan.tiling.packets_per_block; })
      .def_property_readonly("shared_bytes", [](const fastrnn::CudaPlan& plan) { return plan.tiling.shared_bytes(); })
      .def_property_readonly("streamed_bytes",
                             [](const fastrnn::CudaPlan& plan) { return plan.tiling.streamed_packets() * 16; })
      .def_readonly("reason", &fastrnn::CudaPlan::reason);
  py::class_<fastrnn::Wavefront>(module, "Wavefront")
      .def_readonly("steps", &fastrnn::Wavefront::steps)
      .def_readonly("reason", &fastrnn::Wavefront::reason);
  const auto define_plan = [&](const char* name, auto plan) {
    module.def(
        name,
        [plan](int64_t T, int64_t B, int64_t H, int gates, int states, bool projection, const std::string& arithmetic,
               bool backward, int capability, int multiprocessors, int shared_per_block, int l2_bytes,
               const std::array<int, 4>& clusters, const std::string& path, int grade, int blocks, int teams,
               int groups_in_shared, int chunks, int layers, bool measured, bool wavefronts_measured) {
          fastrnn::CudaForce force{std::nullopt, grade, blocks, teams, groups_in_shared, chunks};
          if (!path.empty()) force.path = path_named(path);
          return plan(
              {T, B, H, gates, states, projection, arithmetic_named(arithmetic),
               backward ? fastrnn::Pass::backward : fastrnn::Pass::forward, layers},
              {capability, multiprocessors, shared_per_block, l2_bytes, clusters, measured, wavefronts_measured},
              force);
        },
        py::kw_only(), py::arg("T"), py::arg("B"), py::arg("H"), py::arg("gates"), py::arg("states"),
        py::arg("projection") = false, py::arg("arithmetic"), py::arg("backward") = false, py::arg("capability") = 90,
        py::arg("multiprocessors") = 132, py::arg("shared_per_block") = 232448, py::arg("l2_bytes") = 50 << 20,
        py::arg("clusters") = std::array<int, 4>{66, 32, 16, 8}, py::arg("path") = "", py::arg("grade") = 0,
        py::arg("blocks") = 0, py::arg("teams") = 0, py::arg("groups_in_shared") = -1, py::arg("chunks") = 0,
        py::arg("layers") = 1, py::arg("measured") = false, py::arg("wavefronts_measured") = false);
  };
  define_plan("plan_cuda", &fastrnn::plan_cuda);
  define_plan("plan_wavefront", &fastrnn::plan_wavefront);
}
