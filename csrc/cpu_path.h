// SPDX-License-Identifier: BSD-3-Clause
// CPU: the kernels run the whole sequence. 16-bit types are converted to float on the way in, and back on the way out.
#pragma once

#include "layer.h"

namespace fastrnn {

inline const ThreadPool& torch_threads() {
  thread_local ThreadPool pool{[](int64_t count, ThreadPool::Body body, void* context) {
                                 STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
                               },
                               1};
  pool.threads = static_cast<int>(torch::stable::get_num_threads());
  return pool;
}

template <template <typename> class Cell>
struct CpuPath {
  static ScalarType compute(ScalarType storage) { return acc_dtype(storage); }

  static ForwardResult forward(const Layer& l, bool save) {
    using C = Cell<float>;
    const ScalarType t = acc_dtype(l.storage);
    const bool packed = l.input.dim() == 2;
    ForwardResult r;
    r.output = packed ? empty(l.input, {l.N, l.P}, t) : empty(l.input, {l.T, l.B, l.P}, t);
    r.h_n = empty(l.input, {l.B, l.P}, t);
    if (C::kStates == 2) r.c_n = empty(l.input, {l.B, l.H}, t);
    if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
    if (save && C::kStates == 2) r.saved_c = empty(l.input, {l.N, l.H}, t);
    if (save && l.w_hr) r.saved_m = empty(l.input, {l.N, l.H}, t);
    dispatch_compute(t, [&](auto zero) {
      using T = decltype(zero);
      sequence_forward_cpu<Cell, T>({l.B,
                                     l.I,
                                     l.H,
                                     l.P,
                                     l.steps,
                                     in<T>(l.input),
                                     l.input.stride(packed ? 0 : 1),
                                     packed ? 0 : l.input.stride(0),
                                     in<T>(l.w_ih),
                                     in<T>(l.w_hh),
                                     in<T>(l.b_ih),
                                     in<T>(l.b_hh),
                                     in<T>(l.w_hr),
                                     in<T>(l.h0),
                                     in<T>(l.c0),
                                     out<T>(r.output),
                                     out<T>(r.h_n),
                                     out<T>(r.c_n),
                                     out<T>(r.saved_gates),
                                     out<T>(r.saved_c),
                                     out<T>(r.saved_m)},
                                    torch_threads());
    });
    return r;
  }

  static GateGradients backward(const Layer& l, const ForwardResult& r, const MaybeTensor& d_output,
                                const MaybeTensor& d_h_n, const MaybeTensor& d_c_n) {
    using C = Cell<float>;
    const ScalarType t = acc_dtype(l.storage);
    const auto prepare = [&](const MaybeTensor& x) -> MaybeTensor {
      if (!x) return std::nullopt;
      return dense(to_dtype(*x, t));
    };
    const MaybeTensor output = prepare(r.output), gates = prepare(r.saved_gates), c = prepare(r.saved_c);
    const MaybeTensor d_out = prepare(d_output), d_h = prepare(d_h_n), d_c = prepare(d_c_n);
    GateGradients g;
    g.d_x_gates = empty(l.input, {l.N, C::kGates * l.H}, t);
    g.d_h_gates = C::kGateGradsDiffer ? empty(l.input, {l.N, C::kGates * l.H}, t) : g.d_x_gates;
    if (l.w_hr) g.d_projected = empty(l.input, {l.N, l.P}, t);
    g.d_h0 = empty(l.input, {l.B, l.P}, t);
    if (C::kStates == 2) g.d_c0 = empty(l.input, {l.B, l.H}, t);
    dispatch_compute(t, [&](auto zero) {
      using T = decltype(zero);
      sequence_backward_cpu<Cell, T>(
          {l.B, l.H, l.P, l.steps, in<T>(l.w_hh), in<T>(l.w_hr), in<T>(l.h0), in<T>(l.c0), in<T>(output), in<T>(gates),
           in<T>(c), in<T>(d_out), in<T>(d_h), in<T>(d_c), out<T>(g.d_x_gates), out<T>(g.d_h_gates),
           out<T>(g.d_projected), out<T>(g.d_h0), out<T>(g.d_c0)},
          torch_threads());
    });
    return g;
  }
};

}  // namespace fastrnn
