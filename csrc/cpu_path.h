// SPDX-License-Identifier: BSD-3-Clause
// CPU: the kernels run the whole sequence. Where they have no form for a 16-bit type, it is converted to float on the
// way in and back on the way out.
#pragma once

#include "cpu/isa.h"
#include "layer.h"

namespace fastrnn {

inline const ThreadPool& torch_threads() {
  thread_local ThreadPool pool{[](int64_t count, ThreadPool::Body body, void* context) {
                                 check_torch(torch_parallel_for(0, count, 1, body, context));
                               },
                               1};
  pool.threads = static_cast<int>(torch::stable::get_num_threads());
  return pool;
}

template <template <typename> class Cell>
struct CpuPath {
  // The type of the tensors in a Layer.
  static ScalarType compute(ScalarType storage, bool save) {
    const bool bf16 = storage == ScalarType::BFloat16 && !save && best_isa() == Isa::avx512_bf16;
    return bf16 ? storage : acc_dtype(storage);
  }

  static ForwardResult forward(const Layer& l, bool save) {
    using C = Cell<float>;
    const ScalarType t = compute(l.storage, save), acc = acc_dtype(t);
    ForwardResult r;
    r.output = l.input.dim() == 2 ? empty(l.input, {l.N, l.P}, t) : empty(l.input, {l.T, l.B, l.P}, t);
    r.h_n = empty(l.input, {l.B, l.P}, t);
    if (C::kStates == 2) r.c_n = empty(l.input, {l.B, l.H}, acc);
    if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
    if (save && C::kStates == 2) r.saved_c = empty(l.input, {l.N, l.H}, t);
    if (save && l.w_hr) r.saved_m = empty(l.input, {l.N, l.H}, t);
    if (t == ScalarType::BFloat16) {
      sequence_forward_bf16_cpu<Cell>(parameters<Bf16>(l, r, in_acc(l.b_ih), in_acc(l.b_hh), in_acc(l.c0)),
                                      torch_threads());
    } else {
      dispatch_compute(t, [&](auto zero) {
        using T = decltype(zero);
        sequence_forward_cpu<Cell, T>(parameters<T>(l, r, l.b_ih, l.b_hh, l.c0), torch_threads());
      });
    }
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

  static Tensor input_gradient(const Layer& l, const Tensor& d_x_gates) {
    const Tensor d_input = empty(d_x_gates, {l.N, l.I}, d_x_gates.scalar_type());
    dispatch_compute(d_x_gates.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      input_gradient_cpu<T>({l.N, d_x_gates.size(1), l.I, in<T>(d_x_gates), in<T>(l.w_ih), out<T>(d_input)},
                            torch_threads());
    });
    return d_input;
  }

  static WeightAndBias input_weight_gradient(const Layer& l, const GateGradients& g, bool bias) {
    return weight_gradient(l, g.d_x_gates, l.I, l.w_ih.has_value(), bias, [&](auto zero, auto& rows) {
      using T = decltype(zero);
      const bool packed = l.input.dim() == 2;
      const int64_t stride = l.input.stride(packed ? 0 : 1);
      for (int64_t t = 0; t < l.T; ++t) {
        const T* first = in<T>(l.input) + (packed ? l.row_begin[t] * stride : t * l.input.stride(0));
        for (int64_t b = 0; b < l.row_begin[t + 1] - l.row_begin[t]; ++b) rows.push_back(first + b * stride);
      }
    });
  }

  static WeightAndBias recurrent_weight_gradient(const Layer& l, const GateGradients& g, const ForwardResult& saved,
                                                 bool bias) {
    const Tensor output = dense(to_dtype(saved.output, g.d_h_gates.scalar_type()));
    return weight_gradient(l, g.d_h_gates, l.P, true, bias, [&](auto zero, auto& rows) {
      using T = decltype(zero);
      rows.resize(l.N);
      for (int64_t s = 0; s < l.T; ++s) {
        const int64_t row = l.row_begin[l.steps.time(s)], started = l.steps.count(s - 1);
        const T* before = s > 0 ? in<T>(output) + l.row_begin[l.steps.time(s - 1)] * l.P : nullptr;
        for (int64_t b = 0; b < l.steps.count(s); ++b) rows[row + b] = (b < started ? before : in<T>(l.h0)) + b * l.P;
      }
    });
  }

  static Tensor projection_gradient(const Layer& l, const GateGradients& g, const ForwardResult& saved) {
    const Tensor m = dense(to_dtype(*saved.saved_m, g.d_projected->scalar_type()));
    const auto rows_of_m = [&](auto zero, auto& rows) {
      for (int64_t n = 0; n < l.N; ++n) rows.push_back(in<decltype(zero)>(m) + n * l.H);
    };
    return *weight_gradient(l, *g.d_projected, l.H, true, false, rows_of_m).weight;
  }

 private:
  static MaybeTensor in_acc(const MaybeTensor& t) {
    return t ? MaybeTensor(to_dtype(*t, ScalarType::Float)) : std::nullopt;
  }

  template <typename S, typename T = typename AccOf<S>::type>
  static SequenceForward<S> parameters(const Layer& l, const ForwardResult& r, const MaybeTensor& b_ih,
                                       const MaybeTensor& b_hh, const MaybeTensor& c0) {
    const bool packed = l.input.dim() == 2;
    SequenceForward<S> p{};
    p.B = l.B;
    p.I = l.I;
    p.H = l.H;
    p.P = l.P;
    p.steps = l.steps;
    p.input = in<S>(l.input);
    p.input_stride = l.input.stride(packed ? 0 : 1);
    p.input_stride_t = packed ? 0 : l.input.stride(0);
    p.w_ih = in<S>(l.w_ih);
    p.w_hh = in<S>(l.w_hh);
    p.b_ih = in<T>(b_ih);
    p.b_hh = in<T>(b_hh);
    p.w_hr = in<S>(l.w_hr);
    p.h0 = in<S>(l.h0);
    p.c0 = in<T>(c0);
    p.output = out<S>(r.output);
    p.h_n = out<S>(r.h_n);
    p.c_n = out<T>(r.c_n);
    p.saved_gates = out<T>(r.saved_gates);
    p.saved_c = out<T>(r.saved_c);
    p.saved_m = out<T>(r.saved_m);
    return p;
  }

  // list(zero, rows) appends the N rows that the weight was multiplied with.
  template <typename ListRows>
  static WeightAndBias weight_gradient(const Layer& l, const Tensor& d_gates, int64_t K, bool weight, bool bias,
                                       const ListRows& list) {
    const ScalarType t = d_gates.scalar_type();
    const int64_t M = d_gates.size(1);
    WeightAndBias d;
    if (weight) d.weight = empty(d_gates, {M, K}, t);
    if (bias) d.bias = empty(d_gates, {M}, t);
    dispatch_compute(t, [&](auto zero) {
      using T = decltype(zero);
      std::vector<const T*> rows;
      rows.reserve(l.N);
      if (weight) list(zero, rows);
      weight_gradient_cpu<T>({l.N, M, K, in<T>(d_gates), rows.data(), out<T>(d.weight), out<T>(d.bias)},
                             torch_threads());
    });
    return d;
  }
};

}  // namespace fastrnn
