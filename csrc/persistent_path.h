// SPDX-License-Identifier: BSD-3-Clause
// CUDA, path "persistent": one launch runs the whole sequence. Serves what the plan gives it and leaves the rest to the
// path "gates".
#pragma once

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "gates_path.h"
#include "persistent.h"

namespace fastrnn {

// What the environment asks for: FASTRNN_PATH (gates, persistent), and for tests of the persistent kernels
// FASTRNN_PERSISTENT_GRADE (1, 2, 3), FASTRNN_PERSISTENT_BLOCKS (of a team), FASTRNN_PERSISTENT_TEAMS (at most) and
// FASTRNN_PERSISTENT_GROUPS_IN_SHARED (at most, of a warp); and FASTRNN_PERSISTENT_CHUNKS, of a wavefront. Read at
// every call.
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
  number("FASTRNN_PERSISTENT_CHUNKS", force.chunks);
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

// Whether products of fp32 are made in tf32: the switch is asked where it matters alone.
inline bool takes_tf32(const CudaProblem& p, const CudaDevice& device, const CudaForce& force) {
  return p.arithmetic == Arithmetic::fp32 && !reason_for_gates(p, device, force) &&
         call<bool>("fastrnn::allows_tf32", "");
}

// Of two layers of a stack over an input [T, B, I]: the steps of a chunk where they run as a wavefront, else 0.
inline int64_t wavefront_steps(const Tensor& input, int64_t H, int64_t gates, int64_t states, bool trains) {
#if !defined(FASTRNN_EMULATE)
  if (!input.is_cuda()) return 0;
#endif
  const OnDevice device(input);
  const CudaForce force = forced_by_environment();
  const CudaDevice facts = cuda_device();
  CudaProblem p{input.size(0),
                input.size(1),
                H,
                static_cast<int>(gates),
                static_cast<int>(states),
                false,
                arithmetic(input.scalar_type()),
                trains ? Pass::backward : Pass::forward};
  if (takes_tf32(p, facts, force)) p.arithmetic = Arithmetic::tf32;
  const Wavefront plan = plan_wavefront(p, facts, force);
  check(plan.steps > 0 || force.chunks < 2, "fastrnn: FASTRNN_PERSISTENT_CHUNKS=", force.chunks,
        " cannot serve this stack: ", plan.reason);
  return plan.steps;
}
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def("wavefront_steps(Tensor input, int H, int gates, int states, bool trains) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("wavefront_steps", TORCH_BOX(&wavefront_steps));
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

// Of blocks that have a multiprocessor each, how many clusters a device runs at once.
inline int64_t clusters_at_once(int64_t blocks, int64_t index) {
  const OnDevice device(static_cast<int32_t>(index));
  return cuda_device().teams_at_once(2, static_cast<int>(blocks));
}
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn, m) { m.def("clusters_at_once(int blocks, int device) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("clusters_at_once", TORCH_BOX(&clusters_at_once));
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
struct PersistentPath : GatesPath<Cell> {
  using C = Cell<float>;
  using Gates = GatesPath<Cell>;

  // Two layers that do not wait for each other run at once where they agree in all that the kernels are told once. Of a
  // packed sequence the kernels are told the place of each step.
  static constexpr bool kRunsBoth = kIsTorchCell<Cell>;
  static bool runs_both(const Layer& a, const Layer& b) {
    const auto facts = [](const Layer& l) {
      return std::tuple(l.storage, l.input.get_device_index(), l.input.dim(), l.B, l.H, l.w_hr.has_value());
    };
    const bool same_steps = a.input.dim() == 3 || a.row_begin == b.row_begin;
    return facts(a) == facts(b) && same_steps && !a.is_controlled && !b.is_controlled;
  }

  static ForwardResult forward(const Layer& l, bool save, bool cells) {
    if constexpr (kIsTorchCell<Cell>) {
      if (auto r = run_forward(std::array{&l}, save, cells)) return std::move((*r)[0]);
    } else {
      plan_for(std::array{&l}, cells, Pass::forward);  // raises where the path is forced
    }
    return Gates::forward(l, save, cells);
  }
  static std::array<ForwardResult, 2> forward_both(const Layer& a, const Layer& b, bool save, bool cells) {
    if (auto r = run_forward(std::array{&a, &b}, save, cells)) return *std::move(r);
    return {forward(a, save, cells), forward(b, save, cells)};
  }

  static GateGradients backward(const Layer& l, const ForwardResult& saved, const ResultGradients& d,
                                bool need_states) {
    if constexpr (kIsTorchCell<Cell>) {
      if (auto g = run_backward(std::array{&l}, std::array{&saved}, std::array{&d})) return std::move((*g)[0]);
    } else {
      plan_for(std::array{&l}, d.cells.has_value(), Pass::backward);
    }
    return Gates::backward(l, saved, d, need_states);
  }
  static std::array<GateGradients, 2> backward_both(const Layer& a, const Layer& b, const ForwardResult& saved_a,
                                                    const ForwardResult& saved_b, const ResultGradients& d_a,
                                                    const ResultGradients& d_b, bool need_states) {
    auto g = run_backward(std::array{&a, &b}, std::array{&saved_a, &saved_b}, std::array{&d_a, &d_b});
    if (g) return *std::move(g);
    return {backward(a, saved_a, d_a, need_states), backward(b, saved_b, d_b, need_states)};
  }

 private:
  // In one launch. Nothing where that is not planned, or the device refuses it.
  template <size_t n>
  static std::optional<std::array<ForwardResult, n>> run_forward(const std::array<const Layer*, n>& layers, bool save,
                                                                 bool cells) {
    const Layer& first = *layers[0];
    const OnDevice device(first.input);
    const CudaPlan plan = plan_for(layers, cells, Pass::forward);
    if (plan.path != CudaPath::persistent) return std::nullopt;
    check_no_failure();
    const ScalarType t = first.storage;
    std::array<ForwardResult, n> results;
    std::array<Tensor, n> x_gates;
    for (size_t i = 0; i < n; ++i) {
      const Layer& l = *layers[i];
      ForwardResult& r = results[i];
      r.output = l.empty_like_input(l.H, t);
      r.h_n = empty(l.input, {l.B, l.H}, t);
      if (C::kStates == 2) r.c_n = empty(l.input, {l.B, l.H}, t);
      if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
      if (save && C::kStates == 2) r.saved_c = empty(l.input, {l.N, l.H}, ScalarType::Float);
      x_gates[i] = flat(dense(l.w_ih ? linear(l.input, *l.w_ih, l.b_ih) : l.input), l.N);
    }

    const Workspace workspace(first, plan.tiling, device);
    const CudaStatus status = dispatch_float(t, [&](auto types) {
      using T = typename decltype(types)::storage;
      PersistentForward<T> p{};
      workspace.fill(p, first, plan.tiling);
      for (size_t i = 0; i < n; ++i) {
        const Layer& l = *layers[i];
        const ForwardResult& r = results[i];
        auto& to = p.layers[i];
        to.T = l.T;
        to.reverse = l.steps.reverse;
        to.x_gates = in<T>(x_gates[i]);
        to.w_hh = in<T>(l.w_hh);
        to.b_hh = in<T>(l.b_hh);
        to.h0 = in<T>(l.h0);
        to.c0 = in<T>(l.c0);
        to.output = out<T>(r.output);
        to.h_n = out<T>(r.h_n);
        to.c_n = out<T>(r.c_n);
        to.saved_gates = out<T>(r.saved_gates);
        to.saved_c = out<float>(r.saved_c);
      }
      return launch_persistent_forward<Cell, T>(p, plan.arithmetic, device.stream());
    });
    if (!launched(status)) return std::nullopt;
    return results;
  }

  template <size_t n>
  static std::optional<std::array<GateGradients, n>> run_backward(const std::array<const Layer*, n>& layers,
                                                                  const std::array<const ForwardResult*, n>& saved,
                                                                  const std::array<const ResultGradients*, n>& d) {
    const Layer& first = *layers[0];
    const OnDevice device(first.input);
    const bool cells = std::any_of(d.begin(), d.end(), [](const ResultGradients* d) { return d->cells.has_value(); });
    const CudaPlan plan = plan_for(layers, cells, Pass::backward);
    if (plan.path != CudaPath::persistent) return std::nullopt;
    check_no_failure();
    const ScalarType t = first.storage;
    const auto prepare = [](const MaybeTensor& d) { return d ? MaybeTensor(dense(*d)) : std::nullopt; };
    std::array<ResultGradients, n> given;
    std::array<GateGradients, n> results;
    for (size_t i = 0; i < n; ++i) {
      const Layer& l = *layers[i];
      given[i] = {prepare(d[i]->output), prepare(d[i]->h_n), prepare(d[i]->c_n), std::nullopt};
      GateGradients& g = results[i];
      g.d_x_gates = empty(l.input, {l.N, C::kGates * l.H}, t);
      g.d_h_gates = C::kGateGradsDiffer ? empty(l.input, {l.N, C::kGates * l.H}, t) : g.d_x_gates;
      g.d_h0 = empty(l.input, {l.B, l.H}, t);
      if (C::kStates == 2) g.d_c0 = empty(l.input, {l.B, l.H}, t);
    }

    const Workspace workspace(first, plan.tiling, device);
    const CudaStatus status = dispatch_float(t, [&](auto types) {
      using T = typename decltype(types)::storage;
      PersistentBackward<T> p{};
      workspace.fill(p, first, plan.tiling);
      for (size_t i = 0; i < n; ++i) {
        const Layer& l = *layers[i];
        const ForwardResult& r = *saved[i];
        const GateGradients& g = results[i];
        auto& to = p.layers[i];
        to.T = l.T;
        to.reverse = l.steps.reverse;
        to.w_hh = in<T>(l.w_hh);
        to.h0 = in<T>(l.h0);
        to.c0 = in<T>(l.c0);
        to.output = in<T>(r.output);
        to.saved_gates = in<T>(r.saved_gates);
        to.saved_c = in<float>(r.saved_c);
        to.d_output = in<T>(given[i].output);
        to.d_h_n = in<T>(given[i].h_n);
        to.d_c_n = in<T>(given[i].c_n);
        to.d_x_gates = out<T>(g.d_x_gates);
        to.d_h_gates = out<T>(g.d_h_gates);
        to.d_h0 = out<T>(g.d_h0);
        to.d_c0 = out<T>(g.d_c0);
      }
      return launch_persistent_backward<Cell, T>(p, plan.arithmetic, device.stream());
    });
    if (!launched(status)) return std::nullopt;
    return results;
  }

  // Of one launch: two layers may have none where each alone has one.
  template <size_t n>
  static CudaPlan plan_for(const std::array<const Layer*, n>& layers, bool cells, Pass pass) {
    const CudaForce force = forced_by_environment();
    const CudaDevice device = cuda_device();
    const Layer& l = *layers[0];
    const int64_t T = std::max(l.T, layers[n - 1]->T);
    CudaProblem p{T, l.B, l.H, C::kGates, C::kStates, l.w_hr.has_value(), arithmetic(l.storage), pass, n};
    if (takes_tf32(p, device, force)) p.arithmetic = Arithmetic::tf32;
    CudaPlan plan = plan_cuda(p, device, force);
    if (!kIsTorchCell<Cell>) plan = {CudaPath::gates, "this cell has no persistent kernel"};
    if (l.is_controlled || cells) plan = {CudaPath::gates, "persistent kernels leave the states alone"};
    check(plan.path == CudaPath::persistent || force.path != CudaPath::persistent || n > 1,
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
    // The parameters of a pass, but for its layers.
    template <typename Parameters>
    void fill(Parameters& p, const Layer& first, const PersistentTiling& tiling) const {
      p.steps = {first.B, in<int64_t>(row_begin)};
      p.H = first.H;
      p.tiling = tiling;
      p.exchange = out<void>(exchange);
      p.streamed = out<void>(streamed);
      p.failed = failure_word();
    }
  };
};

}  // namespace fastrnn
