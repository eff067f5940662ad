// SPDX-License-Identifier: BSD-3-Clause
// The Elman RNN cell of torch.nn.RNN, and the template for new cells.
//
//   h' = activation(W_ih x + b_ih + W_hh h + b_hh)
//
// A cell takes values and gives values: no pointer, no storage type, no loop over units. It sees the input gates
// gx = W_ih x + b_ih and the hidden gates gh = W_hh h + b_hh apart, and w, its parameters beside the weights: one
// value of each per unit. A cell with a matrix product between its gates takes a step in two halves: GruBeforeCell.
#pragma once

#include "math.h"

namespace fastrnn {

// value(x), and the gradient of x from y = value(x) and its gradient.
struct Tanh {
  template <typename T>
  FASTRNN_HD static T value(T x) {
    return tanh(x);
  }
  template <typename T>
  FASTRNN_HD static T backward(T y, T d_y) {
    return d_y * tanh_grad(y);
  }
};

struct Relu {
  template <typename T>
  FASTRNN_HD static T value(T x) {
    return relu(x);
  }
  template <typename T>
  FASTRNN_HD static T backward(T y, T d_y) {
    return y <= 0.0f ? T{} : d_y;  // as torch: infinite gradients of inactive units are 0, NaN is no inactive unit
  }
};

// max(x, 0.01 x): the slope of torch.nn.LeakyReLU.
struct LeakyRelu {
  template <typename T>
  static constexpr auto kSlope = static_cast<typename ValueTraits<T>::Scalar>(0.01);
  template <typename T>
  FASTRNN_HD static T value(T x) {
    return x < 0.0f ? x * kSlope<T> : x;
  }
  template <typename T>
  FASTRNN_HD static T backward(T y, T d_y) {
    return y > 0.0f ? d_y : d_y * kSlope<T>;
  }
};

template <typename T, class Activation>
struct RnnCell {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;                // h
  static constexpr int kParameters = 0;            // beside weights and biases
  static constexpr int kSaved = 0;                 // backward needs h' alone
  static constexpr bool kGateGradsDiffer = false;  // d_gx == d_gh

  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& /*w*/, const Values<T, kStates>& /*prev*/,
                                 Values<T, kStates>& next, Values<T, kSaved>& /*saved*/) {
    next[0] = Activation::value(gx[0] + gh[0]);
  }

  // d_next: gradient of every state after the step, summed over its uses. d_prev leaves out the way through
  // W_hh, which is a matrix product: the kernels add it.
  FASTRNN_HD static void backward(const Values<T, kParameters>& /*w*/, const Values<T, kSaved>& /*saved*/,
                                  const Values<T, kStates>& /*prev*/, const Values<T, kStates>& next,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, Values<T, kGates>& d_gx,
                                  Values<T, kGates>& d_gh) {
    d_gx[0] = Activation::backward(next[0], d_next[0]);
    d_gh[0] = d_gx[0];
    d_prev[0] = T{};
  }
};

template <typename T>
using RnnTanhCell = RnnCell<T, Tanh>;
template <typename T>
using RnnReluCell = RnnCell<T, Relu>;
template <typename T>
using RnnLeakyReluCell = RnnCell<T, LeakyRelu>;

}  // namespace fastrnn
