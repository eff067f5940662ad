// SPDX-License-Identifier: BSD-3-Clause
// The arguments of a layer: checked, and laid out for the kernels. Shared by both passes and every path.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace fastrnn {

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}
inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string s = "[";
  for (size_t d = 0; d < sizes.size(); ++d) s += (d ? ", " : "") + std::to_string(sizes[d]);
  return s + "]";
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another type";
  }
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

// The arguments of a layer, checked. Tensors as they came: contiguity is the business of the path.
struct Arguments {
  std::string op;
  Tensor input;
  MaybeTensor w_ih;
  Tensor w_hh;
  MaybeTensor b_ih, b_hh, w_hr;
  Tensor h0;
  MaybeTensor c0;
  MaybeTensor batch_sizes;
  bool reverse;

  void check_all(int gates) const {
    const ScalarType dtype = input.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
              dtype == ScalarType::BFloat16,
          op, ": expected input of dtype float16, bfloat16, float32 or float64, got ", dtype_name(dtype));
    const int64_t dims = batch_sizes ? 2 : 3;
    check(input.dim() == dims, op, ": expected input of ", dims, " dimensions ", batch_sizes ? "(packed)" : "(T, B, I)",
          ", got shape ", shape_of(input));
    check(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(0) % gates == 0 && w_hh.size(1) > 0, op,
          ": expected w_hh of shape [", gates, "*H, ", w_hr ? "P" : "H", "], got ", shape_of(w_hh));
    const int64_t G_H = w_hh.size(0), H = G_H / gates, width = input.size(dims - 1);
    int64_t P = w_hh.size(1);  // of three tensors that hold it, two that agree are right
    if (w_hr && w_hr->dim() == 2 && h0.dim() == 2 && w_hr->size(0) == h0.size(1)) P = h0.size(1);
    expect("w_hh", w_hh, {G_H, w_hr ? P : H});
    if (w_hr) expect("w_hr", *w_hr, {P, H});
    if (w_ih) {
      expect("w_ih", *w_ih, {G_H, width});
    } else {
      check(width == G_H, op, ": expected input to hold x_gates of width ", G_H, " where w_ih is None, got ",
            shape_of(input));
      check(!b_ih, op, ": expected b_ih to be None where w_ih is None, got a tensor");
    }
    if (b_ih) expect("b_ih", *b_ih, {G_H});
    if (b_hh) expect("b_hh", *b_hh, {G_H});
    if (batch_sizes) check_batch_sizes();
    check(h0.dim() == 2, op, ": expected h0 of shape [B, ", P, "], got ", shape_of(h0));
    const int64_t B = batch_sizes ? h0.size(0) : input.size(1);
    expect("h0", h0, {B, P});
    if (c0) expect("c0", *c0, {B, H});
  }

  void expect(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes[d];
    check(same, op, ": expected ", name, " of shape ", shape_of(sizes), ", got ", shape_of(t));
    check(t.scalar_type() == input.scalar_type(), op, ": expected ", name, " of dtype ",
          dtype_name(input.scalar_type()), " like input, got ", dtype_name(t.scalar_type()));
    check(t.device() == input.device(), op, ": expected ", name, " on ", device_name(input), " like input, got ",
          device_name(t));
  }

  void check_batch_sizes() const {
    const Tensor& sizes = *batch_sizes;
    check(sizes.is_cpu() && sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1, op,
          ": expected batch_sizes of shape [T], dtype int64, on cpu, got shape ", shape_of(sizes), ", dtype ",
          dtype_name(sizes.scalar_type()), ", on ", device_name(sizes));
    const Tensor row = dense(sizes);
    const int64_t* size = row.const_data_ptr<int64_t>();
    int64_t total = 0;
    const int64_t B = h0.dim() > 0 ? h0.size(0) : 0;
    for (int64_t t = 0; t < row.size(0); ++t) {
      check(size[t] > 0, op, ": expected batch_sizes to be positive, got ", size[t], " at step ", t);
      const int64_t most = t > 0 ? size[t - 1] : B;
      check(size[t] <= most, op, ": expected batch_sizes ", t > 0 ? "not to increase" : "of at most the rows of h0",
            ", got ", size[t], t > 0 ? " after " : " for ", most);
      total += size[t];
    }
    check(input.size(0) == total, op, ": expected input of sum(batch_sizes) = ", total, " rows, got ", input.size(0));
  }
};

// Sizes, the place of each step, and the arguments made contiguous in the type that the kernels read.
struct Layer {
  int64_t T, B, I, H, P, N;
  std::vector<int64_t> row_begin;
  Steps steps;
  Tensor input;  // last dimension contiguous
  MaybeTensor w_ih;
  Tensor w_hh;
  MaybeTensor b_ih, b_hh, w_hr;
  Tensor h0;
  MaybeTensor c0;
  ScalarType storage;  // of the arguments and results

  Layer(const Arguments& a, int gates, ScalarType compute) : storage(a.input.scalar_type()) {
    const auto prepare = [&](const MaybeTensor& t) -> MaybeTensor {
      if (!t) return std::nullopt;
      return dense(to_dtype(*t, compute));
    };
    H = a.w_hh.size(0) / gates;
    P = a.w_hh.size(1);
    I = a.input.size(a.input.dim() - 1);
    if (a.batch_sizes) {
      const Tensor sizes = dense(*a.batch_sizes);
      T = sizes.size(0);
      B = a.h0.size(0);
      row_begin.assign(T + 1, 0);
      for (int64_t t = 0; t < T; ++t) row_begin[t + 1] = row_begin[t] + sizes.const_data_ptr<int64_t>()[t];
    } else {
      T = a.input.size(0);
      B = a.input.size(1);
      row_begin.resize(T + 1);
      for (int64_t t = 0; t <= T; ++t) row_begin[t] = t * B;
    }
    N = row_begin[T];
    steps = {T, row_begin.data(), a.reverse};
    input = to_dtype(a.input, compute);
    if (I != 1 && input.stride(input.dim() - 1) != 1) input = dense(input);
    w_ih = prepare(a.w_ih);
    w_hh = *prepare(a.w_hh);
    b_ih = prepare(a.b_ih);
    b_hh = prepare(a.b_hh);
    w_hr = prepare(a.w_hr);
    h0 = *prepare(a.h0);
    c0 = prepare(a.c0);
  }
  Layer(const Layer&) = delete;  // steps points into row_begin

  // h before each row's step, [N, P].
  Tensor h_before(const Tensor& output) const {
    const Tensor h = empty(output, {N, P}, output.scalar_type());
    const Tensor flat_output = flat(output, N);
    if (N == T * B) {
      const int64_t first = T > 0 ? steps.time(0) * B : 0;
      const int64_t shifted = N - (T > 0 ? B : 0);
      if (T > 0) copy_to(rows(h, first, B), h0);
      if (shifted > 0) {
        copy_to(rows(h, steps.reverse ? 0 : B, shifted), rows(flat_output, steps.reverse ? B : 0, shifted));
      }
      return h;
    }
    for (int64_t s = 0; s < T; ++s) {
      const int64_t to = row_begin[steps.time(s)], count = steps.count(s),
                    going_on = std::min(steps.count(s - 1), count);
      if (going_on > 0) copy_to(rows(h, to, going_on), rows(flat_output, row_begin[steps.time(s - 1)], going_on));
      if (count > going_on) copy_to(rows(h, to + going_on, count - going_on), rows(h0, going_on, count - going_on));
    }
    return h;
  }
};

inline ScalarType acc_dtype(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Calls f with a value of the C++ type.
template <typename F>
void dispatch_compute(ScalarType t, const F& f) {
  if (t == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

template <typename T>
const T* in(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <typename T>
T* out(const MaybeTensor& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

inline Tensor nothing(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }
inline Tensor or_nothing(const MaybeTensor& t, const Tensor& like) { return t ? *t : nothing(like); }
inline MaybeTensor if_there(const Tensor& t) { return t.numel() > 0 ? MaybeTensor(t) : std::nullopt; }

struct ForwardResult {
  Tensor output, h_n;
  MaybeTensor c_n, saved_gates, saved_c, saved_m;
};

struct WeightAndBias {
  MaybeTensor weight, bias;
};

struct GateGradients {
  Tensor d_x_gates, d_h_gates;  // [N, G*H]; one tensor for cells whose gate gradients agree
  MaybeTensor d_projected;      // [N, P]
  Tensor d_h0;
  MaybeTensor d_c0;
};

}  // namespace fastrnn
