// SPDX-License-Identifier: BSD-3-Clause
// CUDA, path "gates": one matrix product and one fused gate kernel per step, for any shape and type. Enqueues on
// torch's current stream, never waits for the device, and can be captured in a graph.
#pragma once

#include <cstdlib>
#include <cstring>

#include "layer.h"

#if !defined(FASTRNN_EMULATE)
// Weak: torch's CPU builds lack it, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#include <torch/csrc/stable/accelerator.h>
#endif

// CUDA's 16-bit types. Only pointers to them pass through here, so that this file needs no CUDA header.
struct __half;
struct __nv_bfloat16;

namespace fastrnn {

// Makes the device of a tensor current, and knows its stream.
class OnDevice {
 public:
#if defined(FASTRNN_EMULATE)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "fastrnn: this torch was built without CUDA");
    check_torch(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  CudaStream stream() const { return stream_; }

 private:
#if !defined(FASTRNN_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  CudaStream stream_ = nullptr;
};

#if !defined(FASTRNN_EMULATE) && !defined(FASTRNN_WITH_PERSISTENT)
// The one path of this build: FASTRNN_PATH may ask for no other.
inline void check_path() {
  const char* path = std::getenv("FASTRNN_PATH");
  check(!path || std::strcmp(path, "gates") == 0, "fastrnn: expected FASTRNN_PATH to be gates, got ", path ? path : "",
        ": build with FASTRNN_PERSISTENT=1 for the persistent kernels");
}
#else
inline void check_path() {}  // PersistentPath chooses
#endif

inline void check_launch(CudaStatus status) { check(status == 0, "fastrnn: CUDA error: ", cuda_status_string(status)); }

template <typename Storage, typename Acc>
struct Types {
  using storage = Storage;
  using acc = Acc;
};

// Calls f with the C++ types of a storage type.
template <typename F>
void dispatch_storage(ScalarType t, const F& f) {
  switch (t) {
    case ScalarType::Double:
      return f(Types<double, double>{});
    case ScalarType::Float:
      return f(Types<float, float>{});
    case ScalarType::Half:
      return f(Types<__half, float>{});
    case ScalarType::BFloat16:
      return f(Types<__nv_bfloat16, float>{});
    default:
      check(false, "fastrnn: unsupported dtype ", dtype_name(t));
  }
}

template <template <typename> class Cell>
struct GatesPath {
  using C = Cell<float>;
  static ScalarType compute(ScalarType storage, bool /*save*/) { return storage; }

  // The row'th row of a matrix, or null.
  template <typename T>
  static T* to(const MaybeTensor& t, int64_t row) {
    if (!t) return nullptr;
    char* first = static_cast<char*>(t->mutable_data_ptr());
    return reinterpret_cast<T*>(first + row * t->size(t->dim() - 1) * static_cast<int64_t>(t->element_size()));
  }
  template <typename T>
  static const T* at(const MaybeTensor& t, int64_t row) {
    return to<T>(t, row);
  }

  static ForwardResult forward(const Layer& l, bool save) {
    check_path();
    const OnDevice device(l.input);
    const ScalarType t = l.storage, acc = acc_dtype(t);
    ForwardResult r;
    r.output = l.input.dim() == 2 ? empty(l.input, {l.N, l.P}, t) : empty(l.input, {l.T, l.B, l.P}, t);
    r.h_n = empty(l.input, {l.B, l.P}, t);
    copy_to(r.h_n, l.h0);
    if (C::kStates == 2) {
      r.c_n = empty(l.input, {l.B, l.H}, acc);
      copy_to(*r.c_n, *l.c0);
    }
    if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
    if (save && C::kStates == 2) r.saved_c = empty(l.input, {l.N, l.H}, acc);
    if (save && l.w_hr) r.saved_m = empty(l.input, {l.N, l.H}, t);

    const Tensor x_gates = flat(dense(l.w_ih ? linear(l.input, *l.w_ih, l.b_ih) : l.input), l.N);
    const Tensor h_gates = empty(l.input, {l.B, C::kGates * l.H}, t);
    const Tensor w_hh_t = transposed(l.w_hh);
    const Tensor output = flat(r.output, l.N);
    const MaybeTensor m = l.w_hr && !save ? MaybeTensor(empty(l.input, {l.B, l.H}, t)) : std::nullopt;

    for (int64_t s = 0; s < l.T; ++s) {
      const int64_t row = l.row_begin[l.steps.time(s)], count = l.steps.count(s);
      const int64_t started = std::min(l.steps.count(s - 1), count);
      // Rows that have a step before this one, then rows that start here.
      step(l, r, x_gates, h_gates, w_hh_t, m, device, row, 0, started,
           s > 0 ? rows(output, l.row_begin[l.steps.time(s - 1)], started) : l.h0);
      step(l, r, x_gates, h_gates, w_hh_t, m, device, row, started, count, rows(l.h0, started, count - started));
      const int64_t ended = std::min(l.steps.count(s + 1), count);
      if (ended < count) copy_to(rows(r.h_n, ended, count - ended), rows(output, row + ended, count - ended));
    }
    return r;
  }

  // Rows [begin, end) of the step whose first row is `first`.
  static void step(const Layer& l, const ForwardResult& r, const Tensor& x_gates, const Tensor& h_gates,
                   const Tensor& w_hh_t, const MaybeTensor& m, const OnDevice& device, int64_t first, int64_t begin,
                   int64_t end, const Tensor& h_prev) {
    if (begin == end) return;
    const Tensor products = rows(h_gates, begin, end - begin);
    mm_out(products, h_prev, w_hh_t);
    const Tensor output = flat(r.output, l.N);
    const MaybeTensor unprojected = r.saved_m ? r.saved_m : m;
    const int64_t m_row = r.saved_m ? first + begin : begin;
    dispatch_storage(l.storage, [&](auto types) {
      using T = typename decltype(types)::storage;
      using A = typename decltype(types)::acc;
      check_launch(
          launch_gates_forward<Cell, T, A>({end - begin, l.H, at<T>(x_gates, first + begin), in<T>(products),
                                            in<T>(l.b_hh), l.w_hr ? nullptr : in<T>(h_prev), to<A>(r.c_n, begin),
                                            l.w_hr ? to<T>(unprojected, m_row) : to<T>(output, first + begin),
                                            to<T>(r.saved_gates, first + begin), to<A>(r.saved_c, first + begin)},
                                           device.stream()));
    });
    if (l.w_hr) {
      mm_out(rows(output, first + begin, end - begin), rows(*unprojected, m_row, end - begin), transposed(*l.w_hr));
    }
  }

  static GateGradients backward(const Layer& l, const ForwardResult& saved, const MaybeTensor& d_output,
                                const MaybeTensor& d_h_n, const MaybeTensor& d_c_n) {
    const OnDevice device(l.input);
    const ScalarType t = l.storage, acc = acc_dtype(t);
    const auto carried = [&](int64_t width, const MaybeTensor& d_final) {
      const Tensor d = empty(l.input, {l.B, width}, acc);
      if (d_final) {
        copy_to(d, *d_final);
      } else {
        set_zero(d);
      }
      return d;
    };
    GateGradients g;
    g.d_x_gates = empty(l.input, {l.N, C::kGates * l.H}, t);
    g.d_h_gates = C::kGateGradsDiffer ? empty(l.input, {l.N, C::kGates * l.H}, t) : g.d_x_gates;
    g.d_h0 = carried(l.P, d_h_n);
    if (C::kStates == 2) g.d_c0 = carried(l.H, d_c_n);
    const Backward b{l,
                     saved,
                     g,
                     d_output ? MaybeTensor(flat(dense(*d_output), l.N)) : std::nullopt,
                     flat(saved.output, l.N),
                     l.c0 ? MaybeTensor(to_dtype(*l.c0, acc)) : std::nullopt,
                     empty(l.input, {l.B, l.P}, t),
                     device};
    if (l.w_hr) g.d_projected = empty(l.input, {l.N, l.P}, t);

    for (int64_t s = l.T - 1; s >= 0; --s) {
      const int64_t row = l.row_begin[l.steps.time(s)], count = l.steps.count(s);
      const int64_t going_on = std::min(l.steps.count(s + 1), count), started = std::min(l.steps.count(s - 1), count);
      if (going_on > 0) {
        mm_out(rows(b.products, 0, going_on), rows(g.d_h_gates, l.row_begin[l.steps.time(s + 1)], going_on), l.w_hh);
      }
      // The two boundaries cut the rows into those with and without a following step, a step before.
      int64_t begin = 0;
      for (const int64_t end : {std::min(going_on, started), std::max(going_on, started), count}) {
        if (begin < end) b.step(s, row, begin, end, begin < going_on, begin < started);
        begin = end;
      }
      if (started < count) {  // their way through W_hh ends in h0
        const Tensor d_h0 = rows(g.d_h0, started, count - started);
        const Tensor product = mm(rows(g.d_h_gates, row + started, count - started), l.w_hh);
        copy_to(d_h0, add(d_h0, to_dtype(product, acc)));
      }
    }
    return g;
  }

  static Tensor input_gradient(const Layer& l, const Tensor& d_x_gates) { return mm(d_x_gates, *l.w_ih); }

  static WeightAndBias input_weight_gradient(const Layer& l, const GateGradients& g, bool bias) {
    return {l.w_ih ? MaybeTensor(mm(transposed(g.d_x_gates), flat(l.input, l.N))) : std::nullopt,
            bias ? MaybeTensor(sum_rows(g.d_x_gates)) : std::nullopt};
  }
  static WeightAndBias recurrent_weight_gradient(const Layer& l, const GateGradients& g, const ForwardResult& saved,
                                                 bool bias) {
    return {mm(transposed(g.d_h_gates), l.h_before(saved.output)),
            bias ? MaybeTensor(sum_rows(g.d_h_gates)) : std::nullopt};
  }
  static Tensor projection_gradient(const Layer&, const GateGradients& g, const ForwardResult& saved) {
    return mm(transposed(*g.d_projected), *saved.saved_m);
  }

  struct Backward {
    const Layer& l;
    const ForwardResult& saved;
    const GateGradients& g;
    const MaybeTensor d_output;  // [N, P]
    const Tensor output;         // [N, P]
    const MaybeTensor c0;        // [B, H]  in the type of c
    const Tensor products;       // [B, P]  d_h_gates of the following step times W_hh
    const OnDevice& device;

    void step(int64_t s, int64_t first, int64_t begin, int64_t end, bool following, bool before) const {
      const int64_t count = end - begin, row = first + begin;
      Tensor d_h = rows(products, begin, count);
      if (l.w_hr) {
        const Tensor carried = rows(g.d_h0, begin, count);
        Tensor sum = following ? add(carried, to_dtype(d_h, carried.scalar_type())) : carried;
        if (d_output) sum = add(sum, to_dtype(rows(*d_output, row, count), carried.scalar_type()));
        const Tensor d_projected = rows(*g.d_projected, row, count);
        copy_to(d_projected, sum);
        set_zero(carried);
        d_h = mm(d_projected, *l.w_hr);
      }
      const int64_t row_before = before ? l.row_begin[l.steps.time(s - 1)] + begin : begin;
      // With a projection the kernel's d_h carry has nothing to carry: it starts from zero at every step.
      const MaybeTensor carry = l.w_hr ? MaybeTensor(zeros(count, l.H)) : MaybeTensor(rows(g.d_h0, begin, count));
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        check_launch(launch_gates_backward<Cell, T, A>(
            {count, l.H, at<T>(saved.saved_gates, row), l.w_hr ? nullptr : at<T>(before ? output : l.h0, row_before),
             l.w_hr ? nullptr : at<T>(output, row), at<A>(before ? saved.saved_c : c0, row_before),
             at<A>(saved.saved_c, row), l.w_hr ? nullptr : at<T>(d_output, row),
             following || l.w_hr ? in<T>(d_h) : nullptr, out<A>(carry), to<A>(g.d_c0, begin), to<T>(g.d_x_gates, row),
             to<T>(g.d_h_gates, row)},
            device.stream()));
      });
    }

    Tensor zeros(int64_t count, int64_t width) const {
      const Tensor z = empty(l.input, {count, width}, acc_dtype(l.storage));
      set_zero(z);
      return z;
    }
  };
};

}  // namespace fastrnn
