// SPDX-License-Identifier: BSD-3-Clause
// A layer as the kernels want it: sizes, the place of each step, and the arguments laid out.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "arguments.h"

namespace fastrnn {

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

// Of zoneout: one share for all in place of [R, H].
inline bool is_one_value(const MaybeTensor& zone) { return zone && zone->dim() == 1; }

// Sizes, the place of each step, and the arguments made contiguous in the type that the kernels read.
struct Layer {
  int64_t T, B, I, H, P, N;
  std::vector<int64_t> row_begin;
  Steps steps;
  Tensor input;  // last dimension contiguous
  MaybeTensor w_ih;
  Tensor w_hh;
  MaybeTensor b_ih, b_hh, w_hr, w_cell, packed;
  Tensor h0;
  MaybeTensor c0;
  MaybeTensor lengths, reset, h_mask, zone_h, zone_c;
  double grad_clip;
  bool is_controlled;
  ScalarType storage;  // of the arguments and results

  // sorts: whether the path runs sequences of different lengths in the order of their lengths. Others run all steps of
  // all sequences, and leave out what lies past the end.
  Layer(const Arguments& a, int gates, ScalarType compute, bool sorts) : storage(a.input.scalar_type()) {
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
    const ControlArguments& c = a.controls;
    lengths = c.lengths ? MaybeTensor(dense(*c.lengths)) : std::nullopt;
    if (lengths && sorts) sort_by_length();
    reset = c.reset ? MaybeTensor(dense(*c.reset)) : std::nullopt;
    h_mask = prepare(c.h_mask);
    zone_h = prepare(c.zone_h);
    zone_c = prepare(c.zone_c);
    grad_clip = c.grad_clip;
    is_controlled = c.any();
    input = to_dtype(a.input, compute);
    if (I != 1 && input.stride(input.dim() - 1) != 1) input = dense(input);
    w_ih = prepare(a.w_ih);
    w_hh = *prepare(a.w_hh);
    b_ih = prepare(a.b_ih);
    b_hh = prepare(a.b_hh);
    w_hr = prepare(a.w_hr);
    w_cell = prepare(a.w_cell);
    packed = a.packed;
    h0 = *prepare(a.h0);
    c0 = prepare(a.c0);
  }
  Layer(const Layer&) = delete;  // steps points into row_begin and order

  // Rows in the form of the input: [T, B, width] or packed [N, width].
  Tensor empty_like_input(int64_t width, ScalarType t) const {
    return input.dim() == 2 ? empty(input, {N, width}, t) : empty(input, {T, B, width}, t);
  }

  InputRows input_rows() const {
    const bool packed = input.dim() == 2;
    return {packed, input.stride(packed ? 0 : 1), input.stride(0)};
  }
  int64_t real_rows() const { return row_begin[T]; }  // N but for lengths, where memory is there for T*B

  template <typename scalar_t>
  Controls<scalar_t> controls() const {
    return {in<uint8_t>(reset),
            in<scalar_t>(h_mask),
            {in<scalar_t>(zone_h), in<scalar_t>(zone_c)},
            {is_one_value(zone_h), is_one_value(zone_c)},
            grad_clip};
  }

 private:
  std::vector<int64_t> order;

  void sort_by_length() {
    const int64_t* length = lengths->const_data_ptr<int64_t>();
    order.resize(B);
    std::iota(order.begin(), order.end(), 0);
    // Equal ones in order: std::stable_sort would, but in libstdc++ 12 clang 15 and later warn of it.
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return length[a] != length[b] ? length[a] > length[b] : a < b; });
    int64_t alive = B;
    for (int64_t t = 0; t < T; ++t) {
      while (alive > 0 && length[order[alive - 1]] <= t) --alive;
      row_begin[t + 1] = row_begin[t] + alive;
    }
    steps.order = order.data();
    steps.B = B;
  }
};

inline Tensor or_nothing(const MaybeTensor& t, const Tensor& like) {
  return t ? *t : empty(like, {0}, like.scalar_type());
}

// What is asked of a layer.
struct ForwardCall {
  Arguments arguments;
  bool save, return_cells;

  bool asks_as(const ForwardCall& other) const { return save == other.save && return_cells == other.return_cells; }
};

struct ForwardResult {
  Tensor output, h_n;
  MaybeTensor c_n, cells, saved_gates, saved_c, saved_m, h_in;
};

// The gradients of what a layer returns.
struct ResultGradients {
  MaybeTensor output, h_n, c_n, cells;
};

struct WeightAndBias {
  MaybeTensor weight, bias;
};

struct GateGradients {
  Tensor d_x_gates, d_h_gates;  // [N, G*H]; one tensor for cells whose gate gradients agree
  MaybeTensor d_projected;      // [N, P]
  Tensor d_h0;
  MaybeTensor d_c0;
  MaybeTensor d_w_rows;  // [N, kParameters*H]  what the gradient of w_cell is the sum of; of the path "gates"
  MaybeTensor d_w_cell;  // [kParameters*H]
};

}  // namespace fastrnn
