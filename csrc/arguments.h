// SPDX-License-Identifier: BSD-3-Clause
// The arguments of a layer, and what is checked of them. Shared by both passes and every path.
#pragma once

#include <sstream>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace fastrnn {

// What a message says of a tensor. Written when the message is: most calls have none.
struct ShapeOf {
  const Tensor& tensor;
};
inline ShapeOf shape_of(const Tensor& t) { return {t}; }

template <typename Sizes>
std::ostream& write_shape(std::ostream& to, const Sizes& sizes) {
  const char* separator = "[";
  for (const int64_t size : sizes) to << std::exchange(separator, ", ") << size;
  return to << (sizes.size() ? "]" : "[]");
}
inline std::ostream& operator<<(std::ostream& to, const ShapeOf& shape) {
  return write_shape(to, sizes_of(shape.tensor));
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

struct DeviceOf {
  const Tensor& tensor;
};
inline DeviceOf device_name(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& to, const DeviceOf& device) {
  const Tensor& t = device.tensor;
  if (t.is_cpu()) return to << "cpu";
  return to << (t.is_cuda() ? "cuda:" : "device ") << t.get_device_index();
}

// What a cell asks of its arguments.
struct CellFacts {
  int gates, states, parameters;
  bool x_gates_only, no_biases;  // where they are elsewhere: in the input, in w_cell
};

// What happens to the states between two steps; see Controls in kernels.h. Nothing: no such thing.
struct ControlArguments {
  MaybeTensor lengths, reset, h_mask, zone_h, zone_c;
  double grad_clip = 0;

  bool any() const { return lengths || reset || h_mask || zone_h || zone_c || grad_clip != 0; }
};

// The arguments of a layer. Tensors as they came: contiguity is the business of the path.
struct Arguments {
  const char* op;
  Tensor input;
  MaybeTensor w_ih;
  Tensor w_hh;
  MaybeTensor b_ih, b_hh, w_hr, w_cell;
  Tensor h0;
  MaybeTensor c0;
  MaybeTensor batch_sizes;
  bool reverse;
  ControlArguments controls;
  MaybeTensor packed = std::nullopt;  // the weights as a path packs them

  void check_all(const CellFacts& cell) const {
    const int gates = cell.gates;
    check_dtype("input", input.scalar_type());
    const int64_t dims = batch_sizes ? 2 : 3;
    check(input.dim() == dims, op, ": expected input of ", dims, " dimensions ", batch_sizes ? "(packed)" : "(T, B, I)",
          ", got shape ", shape_of(input));
    check_recurrent(gates);
    const int64_t G_H = w_hh.size(0), H = G_H / gates, width = input.size(dims - 1);
    check(width > 0, op, ": expected input of 1 feature or more, got shape ", shape_of(input));
    int64_t P = w_hh.size(1);  // of three tensors that hold it, two that agree are right
    if (w_hr && w_hr->dim() == 2 && h0.dim() == 2 && w_hr->size(0) == h0.size(1)) P = h0.size(1);
    check_weights(gates, width, P);
    if (!w_ih) {
      check(width == G_H, op, ": expected input to hold x_gates of width ", G_H, " where w_ih is None, got ",
            shape_of(input));
      check(!b_ih, op, ": expected b_ih to be None where w_ih is None, got a tensor");
    }
    check(!cell.x_gates_only || !w_ih, op, ": expected w_ih to be None, got a tensor");
    check(!cell.no_biases || (!b_ih && !b_hh), op, ": expected b_ih and b_hh to be None, got a tensor");
    if (b_ih) expect("b_ih", *b_ih, {G_H});
    if (b_hh) expect("b_hh", *b_hh, {G_H});
    if (batch_sizes) check_batch_sizes();
    check(h0.dim() == 2, op, ": expected h0 of shape [B, ", P, "], got ", shape_of(h0));
    const int64_t B = batch_sizes ? h0.size(0) : input.size(1);
    expect("h0", h0, {B, P});
    if (c0)
      expect("c0", *c0, cell.states == 2 ? std::vector<int64_t>{B, H} : std::vector<int64_t>{cell.states - 1, B, H});
    check(w_cell.has_value() == (cell.parameters > 0), op, ": expected w_cell to be ",
          cell.parameters > 0 ? "a tensor, got None" : "None, got a tensor");
    if (w_cell) expect("w_cell", *w_cell, {cell.parameters * H});
    if (controls.any()) check_controls(cell, B, H, P);
  }

  void check_dtype(const char* name, ScalarType dtype) const {
    check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
              dtype == ScalarType::BFloat16,
          op, ": expected ", name, " of dtype float16, bfloat16, float32 or float64, got ", dtype_name(dtype));
  }
  void check_recurrent(int gates) const {
    check(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(0) % gates == 0 && w_hh.size(1) > 0, op,
          ": expected w_hh of shape [", gates, "*H, ", w_hr ? "P" : "H", "], got ", shape_of(w_hh));
  }
  void check_weights(int gates, int64_t I, int64_t P) const {
    const int64_t G_H = w_hh.size(0), H = G_H / gates;
    expect("w_hh", w_hh, {G_H, w_hr ? P : H});
    if (w_hr) expect("w_hr", *w_hr, {P, H});
    if (w_ih) expect("w_ih", *w_ih, {G_H, I});
  }

  void check_controls(const CellFacts& cell, int64_t B, int64_t H, int64_t P) const {
    const std::vector<int64_t> leading =
        batch_sizes ? std::vector<int64_t>{input.size(0)} : std::vector<int64_t>{input.size(0), input.size(1)};
    if (controls.lengths) {
      check(!batch_sizes, op, ": expected lengths to be None where batch_sizes are given, got a tensor");
      expect_shape("lengths", *controls.lengths, {B});
      expect_dtype("lengths", *controls.lengths, ScalarType::Long);
      expect_device("lengths", *controls.lengths);
      if (controls.lengths->is_cpu()) check_lengths(input.size(0));
    }
    if (controls.reset) {
      expect_shape("reset", *controls.reset, leading);
      expect_dtype("reset", *controls.reset, ScalarType::Bool);
      expect_device("reset", *controls.reset);
    }
    if (controls.h_mask) expect("h_mask", *controls.h_mask, {B, P});
    const auto check_zone = [&](const char* name, const MaybeTensor& zone, bool allowed) {
      if (!zone) return;
      check(allowed, op, ": expected ", name, " to be None ", w_hr ? "with a projection" : "for this cell",
            ", got a tensor");
      if (zone->numel() == 1 && zone->dim() == 1) return expect(name, *zone, {1});
      std::vector<int64_t> sizes = leading;
      sizes.push_back(H);
      expect(name, *zone, sizes);
    };
    check_zone("zone_h", controls.zone_h, !w_hr && cell.states <= kZonedStates);
    check_zone("zone_c", controls.zone_c, cell.states == 2);
    check(controls.grad_clip >= 0, op, ": expected grad_clip of 0 or more, got ", controls.grad_clip);
  }

  void check_lengths(int64_t T) const {
    const Tensor lengths = dense(*controls.lengths);
    for (int64_t b = 0; b < lengths.size(0); ++b) {
      const int64_t length = lengths.const_data_ptr<int64_t>()[b];
      check(length >= 0 && length <= T, op, ": expected lengths from 0 to ", T, ", got ", length, " for row ", b);
    }
  }

  // The sizes as a list cost nothing where they are right, which they are in all calls but the last.
  template <typename Sizes = std::initializer_list<int64_t>>
  void expect(const char* name, const Tensor& t, const Sizes& sizes) const {
    expect_shape(name, t, sizes);
    if (dtype_number(t) != dtype_number(input)) {
      check(false, op, ": expected ", name, " of dtype ", dtype_name(input.scalar_type()), " like input, got ",
            dtype_name(t.scalar_type()));
    }
    expect_device(name, t);
  }
  template <typename Sizes = std::initializer_list<int64_t>>
  void expect_shape(const char* name, const Tensor& t, const Sizes& sizes) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) same = same && t.size(d++) == size;
    if (same) return;
    std::ostringstream expected;
    write_shape(expected, sizes);
    check(false, op, ": expected ", name, " of shape ", expected.str(), ", got ", shape_of(t));
  }
  void expect_dtype(const char* name, const Tensor& t, ScalarType dtype) const {
    check(t.scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype_name(dtype), ", got ",
          dtype_name(t.scalar_type()));
  }
  void expect_device(const char* name, const Tensor& t) const {
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

}  // namespace fastrnn
