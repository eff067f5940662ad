// SPDX-License-Identifier: BSD-3-Clause
// CUDA, path "persistent": one launch runs the whole sequence. Serves what the plan gives it and leaves the rest to the
// path "gates".
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "gates_path.h"
#include "persistent.h"

namespace fastrnn {

// What the environment asks for: FASTRNN_PATH (gates, persistent), and for tests of the persistent kernels
// FASTRNN_PERSISTENT_GRADE (1, 2, 3), FASTRNN_PERSISTENT_BLOCKS (of a team), FASTRNN_PERSISTENT_TEAMS (at most) and
// FASTRNN_PERSISTENT_GROUPS_IN_SHARED (at most, of a warp). Read at every call.
inline CudaForce forced_by_environment() {
  CudaForce force;
  const auto number = [](const char* name, int& to) {
    if (const char* value = std::getenv(name); value && *value) to = std::atoi(value);
  };
  if (const char* path = std::getenv("FASTRNN_PATH"); path && *path) {
    const bool gates = std::strcmp(path, "gates") == 0;
    check(gates || std::strcmp(path, "persistent") == 0,
          "fastrnn: expected FASTRNN_PATH to be gates or persistent, got ", path);
    force.path = gates ? CudaPath::gates : CudaPath::persistent;
  }
  number("FASTRNN_PERSISTENT_GRADE", force.grade);
  number("FASTRNN_PERSISTENT_BLOCKS", force.blocks);
  number("FASTRNN_PERSISTENT_TEAMS", force.teams);
  number("FASTRNN_PERSISTENT_GROUPS_IN_SHARED", force.groups_in_shared);
  return force;
}

// What the type of the arguments asks for. torch's switch may turn fp32 into tf32.
inline Arithmetic arithmetic(ScalarType storage) {
  switch (storage) {
    case ScalarType::Half:
      return Arithmetic::fp16;
    case ScalarType::BFloat16:
      return Arithmetic::bf16;
    case ScalarType::Float:
      return Arithmetic::fp32;
    default:
      return Arithmetic::fp64;
  }
}

// torch's switch of TF32 in recurrent layers is beyond its stable interface, so that it is asked through an operator:
// fastrnn/_library.py implements it for Python with a key that goes before this one. A program without Python says it
// by FASTRNN_TF32=1.
inline bool environment_allows_tf32() {
  const char* value = std::getenv("FASTRNN_TF32");
  return value && std::strcmp(value, "1") == 0;
}
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn, m) { m.def("allows_tf32() -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("allows_tf32", TORCH_BOX(&environment_allows_tf32));
}

inline void check_no_failure() {
  uint32_t* word = failure_word();
  if (!word || *static_cast<volatile uint32_t*>(word) == 0) return;
  *static_cast<volatile uint32_t*>(word) = 0;
  check(
      false,
      "fastrnn: an earlier persistent kernel gave up waiting for a block that did not run, and results of it are NaN; "
      "FASTRNN_PATH=gates avoids such kernels");
}

// Launches of this process that a device refused, where the path "gates" then ran: torch.ops.fastrnn.refused_launches.
inline std::atomic<int64_t> refusals = 0;
inline int64_t refused_launches() { return refusals; }
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn, m) { m.def("refused_launches() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("refused_launches", TORCH_BOX(&refused_launches));
}

// Whether a launch was made. A device may have less room than the plan knows (MIG, MPS): then the path "gates" serves,
// but not where "persistent" was asked for.
inline bool launched(CudaStatus status) {
  if (!launch_refused(status)) {
    check_launch(status);
    return true;
  }
  check(forced_by_environment().path != CudaPath::persistent,
        "fastrnn: FASTRNN_PATH=persistent cannot serve this layer: the device refused the launch: ",
        cuda_status_string(status));
  if (refusals++ == 0) {
    aoti_torch_warn(
        __func__, __FILE__, __LINE__,
        "fastrnn: the device has no room for a persistent kernel; the path \"gates\" runs in its place, here "
        "and wherever this happens again");
  }
  return false;
}

template <template <typename> class Cell>
constexpr bool kHasPersistentKernel = false;
#define FASTRNN_HAS_KERNEL(name, Cell) \
  template <>                          \
  constexpr bool kHasPersistentKernel<Cell> = true;
FASTRNN_FOR_EACH_TORCH_CELL(FASTRNN_HAS_KERNEL)
#undef FASTRNN_HAS_KERNEL

template <template <typename> class Cell>
struct PersistentPath : GatesPath<Cell> {
  using C = Cell<float>;
  using Gates = GatesPath<Cell>;

  static ForwardResult forward(const Layer& l, bool save, bool cells) {
    const OnDevice device(l.input);
    const CudaPlan plan = plan_for(l, cells, Pass::forward);
    if constexpr (kHasPersistentKernel<Cell>) {
      if (plan.path == CudaPath::persistent) {
        if (const auto r = forward(l, save, plan, device)) return *r;
      }
    }
    return Gates::forward(l, save, cells);
  }

  static GateGradients backward(const Layer& l, const ForwardResult& saved, const ResultGradients& d,
                                bool need_states) {
    const OnDevice device(l.input);
    const CudaPlan plan = plan_for(l, d.cells.has_value(), Pass::backward);
    if constexpr (kHasPersistentKernel<Cell>) {
      if (plan.path == CudaPath::persistent) {
        if (const auto g = backward(l, saved, d, plan, device)) return *g;
      }
    }
    return Gates::backward(l, saved, d, need_states);
  }

 private:
  // Nothing where the device refuses the launch.
  static std::optional<ForwardResult> forward(const Layer& l, bool save, const CudaPlan& plan, const OnDevice& device) {
    check_no_failure();
    const ScalarType t = l.storage;
    ForwardResult r;
    r.output = l.input.dim() == 2 ? empty(l.input, {l.N, l.H}, t) : empty(l.input, {l.T, l.B, l.H}, t);
    r.h_n = empty(l.input, {l.B, l.H}, t);
    if (C::kStates == 2) r.c_n = empty(l.input, {l.B, l.H}, t);
    if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
    if (save && C::kStates == 2) r.saved_c = empty(l.input, {l.N, l.H}, ScalarType::Float);

    const Tensor x_gates = flat(dense(l.w_ih ? linear(l.input, *l.w_ih, l.b_ih) : l.input), l.N);
    const Workspace workspace(l, plan.tiling, device);
    const CudaStatus status = dispatch_float(t, [&](auto types) {
      using T = typename decltype(types)::storage;
      return launch_persistent_forward<Cell, T>(
          {workspace.steps(l), l.H, plan.tiling, in<T>(x_gates), in<T>(l.w_hh), in<T>(l.b_hh), in<T>(l.h0), in<T>(l.c0),
           out<T>(r.output), out<T>(r.h_n), out<T>(r.c_n), out<T>(r.saved_gates), out<float>(r.saved_c),
           out<void>(workspace.exchange), out<void>(workspace.streamed), failure_word()},
          plan.arithmetic, device.stream());
    });
    if (!launched(status)) return std::nullopt;
    return r;
  }

  static std::optional<GateGradients> backward(const Layer& l, const ForwardResult& saved, const ResultGradients& d,
                                               const CudaPlan& plan, const OnDevice& device) {
    check_no_failure();
    const ScalarType t = l.storage;
    const auto prepare = [](const MaybeTensor& d) { return d ? MaybeTensor(dense(*d)) : std::nullopt; };
    const MaybeTensor d_out = prepare(d.output), d_h = prepare(d.h_n), d_c = prepare(d.c_n);
    GateGradients g;
    g.d_x_gates = empty(l.input, {l.N, C::kGates * l.H}, t);
    g.d_h_gates = C::kGateGradsDiffer ? empty(l.input, {l.N, C::kGates * l.H}, t) : g.d_x_gates;
    g.d_h0 = empty(l.input, {l.B, l.H}, t);
    if (C::kStates == 2) g.d_c0 = empty(l.input, {l.B, l.H}, t);

    const Workspace workspace(l, plan.tiling, device);
    const CudaStatus status = dispatch_float(t, [&](auto types) {
      using T = typename decltype(types)::storage;
      return launch_persistent_backward<Cell, T>(
          {workspace.steps(l), l.H, plan.tiling, in<T>(l.w_hh), in<T>(l.h0), in<T>(l.c0), in<T>(saved.output),
           in<T>(saved.saved_gates), in<float>(saved.saved_c), in<T>(d_out), in<T>(d_h), in<T>(d_c),
           out<T>(g.d_x_gates), out<T>(g.d_h_gates), out<T>(g.d_h0), out<T>(g.d_c0), out<void>(workspace.exchange),
           out<void>(workspace.streamed), failure_word()},
          plan.arithmetic, device.stream());
    });
    if (!launched(status)) return std::nullopt;
    return g;
  }

  static CudaPlan plan_for(const Layer& l, bool cells, Pass pass) {
    const CudaForce force = forced_by_environment();
    const CudaDevice device = cuda_device();
    CudaProblem p{l.T, l.B, l.H, C::kGates, C::kStates, l.w_hr.has_value(), arithmetic(l.storage), pass};
    if (p.arithmetic == Arithmetic::fp32 && !reason_for_gates(p, device, force) &&
        call<bool>("fastrnn::allows_tf32", "")) {
      p.arithmetic = Arithmetic::tf32;
    }
    CudaPlan plan = plan_cuda(p, device, force);
    if (!kHasPersistentKernel<Cell>) plan = {CudaPath::gates, "this cell has no persistent kernel"};
    if (l.is_controlled || cells) plan = {CudaPath::gates, "persistent kernels leave the states alone"};
    check(plan.path == CudaPath::persistent || force.path != CudaPath::persistent,
          "fastrnn: FASTRNN_PATH=persistent cannot serve this layer: ", plan.reason);
    return plan;
  }

  template <typename F>
  static CudaStatus dispatch_float(ScalarType t, const F& f) {
    if (t == ScalarType::Half) return f(Types<__half, float>{});
    if (t == ScalarType::BFloat16) return f(Types<__nv_bfloat16, float>{});
    return f(Types<float, float>{});
  }

  // What a launch needs on the device beside its arguments.
  struct Workspace {
    MaybeTensor exchange, streamed, row_begin;

    Workspace(const Layer& l, const PersistentTiling& tiling, const OnDevice& device) {
      if (const int64_t packets = tiling.exchange_packets()) {
        exchange = empty(l.input, {packets * 2}, ScalarType::Long);
        set_zero(*exchange);
      }
      if (const int64_t packets = tiling.streamed_packets()) {
        streamed = empty(l.input, {packets * 2}, ScalarType::Long);
      }
      if (l.input.dim() == 2) {
        row_begin = empty(l.input, {l.T + 1}, ScalarType::Long);
        check_launch(launch_write(l.row_begin.data(), l.T + 1, out<int64_t>(row_begin), device.stream()));
      }
    }
    DeviceSteps steps(const Layer& l) const { return {l.T, l.B, in<int64_t>(row_begin), l.steps.reverse}; }
  };
};

}  // namespace fastrnn
