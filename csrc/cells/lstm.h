// SPDX-License-Identifier: BSD-3-Clause
// The LSTM cell of torch.nn.LSTM, and two of its relatives. Gates in torch's row order i, f, g, o.
//
//   i = sigmoid(gx_i + gh_i)    f = sigmoid(gx_f + gh_f)    g = tanh(gx_g + gh_g)    o = sigmoid(gx_o + gh_o)
//   c' = f c + i g              h' = o tanh(c')
//
// Coupled (Greff et al., "LSTM: a search space odyssey", 2017): i = 1 - f, so three gates f, g, o.
// Peephole (Gers, Schraudolph, Schmidhuber, "Learning precise timing with LSTM recurrent networks", 2002), elementwise
// products with w: i and f see w_i c and w_f c, o sees w_o c'.
#pragma once

#include "math.h"

namespace fastrnn {

// h' = o tanh(c'), apart from the rest of a step; and its gradients.
template <typename T>
FASTRNN_HD T lstm_output(T o, T c) {
  return o * tanh(c);
}
template <typename T>
FASTRNN_HD void lstm_output_gradient(T o, T c, T d_h, T& d_o, T& d_c) {
  const T tanh_c = tanh(c);
  d_o = d_h * tanh_c;
  d_c = d_h * o * tanh_grad(tanh_c);
}

// The LSTM up to o and c', which take the places of h' and c'.
template <typename T>
struct LstmGates {
  static constexpr int kGates = 4;                 // i, f, g, o
  static constexpr int kStates = 2;                // h, c
  static constexpr int kParameters = 0;            // beside weights and biases
  static constexpr int kSaved = 4;                 // i, f, g, o after their activations
  static constexpr bool kGateGradsDiffer = false;  // d_gx == d_gh

  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& /*w*/, const Values<T, kStates>& prev,
                                 Values<T, kStates>& next, Values<T, kSaved>& saved) {
    const T i = sigmoid(gx[0] + gh[0]);
    const T f = sigmoid(gx[1] + gh[1]);
    const T g = tanh(gx[2] + gh[2]);
    const T o = sigmoid(gx[3] + gh[3]);
    next[0] = o;
    next[1] = f * prev[1] + i * g;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  // c' again, for zoneout: what is kept of c took its place.
  FASTRNN_HD static T restore_c(const Values<T, kSaved>& saved, const Values<T, kStates>& prev) {
    return saved[1] * prev[1] + saved[0] * saved[2];
  }

  // d_prev[0] is 0: h reaches the step only through W_hh.
  FASTRNN_HD static void backward(const Values<T, kParameters>& /*w*/, const Values<T, kSaved>& saved,
                                  const Values<T, kStates>& prev, const Values<T, kStates>& /*next*/,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, Values<T, kGates>& d_gx,
                                  Values<T, kGates>& d_gh) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const T d_o = d_next[0], d_c = d_next[1];
    d_gx[0] = d_c * g * sigmoid_grad(i);
    d_gx[1] = d_c * prev[1] * sigmoid_grad(f);
    d_gx[2] = d_c * i * tanh_grad(g);
    d_gx[3] = d_o * sigmoid_grad(o);
    for (int k = 0; k < kGates; ++k) d_gh[k] = d_gx[k];
    d_prev[0] = T{};
    d_prev[1] = d_c * f;
  }
};

template <typename T>
struct LstmCell : LstmGates<T> {
  using Gates = LstmGates<T>;

  FASTRNN_HD static void forward(const Values<T, Gates::kGates>& gx, const Values<T, Gates::kGates>& gh,
                                 const Values<T, Gates::kParameters>& w, const Values<T, Gates::kStates>& prev,
                                 Values<T, Gates::kStates>& next, Values<T, Gates::kSaved>& saved) {
    Gates::forward(gx, gh, w, prev, next, saved);
    next[0] = lstm_output(next[0], next[1]);
  }

  // With a projection, d_next[0] is the gradient of the value before it, o tanh(c'), and next[0] is not read.
  FASTRNN_HD static void backward(const Values<T, Gates::kParameters>& w, const Values<T, Gates::kSaved>& saved,
                                  const Values<T, Gates::kStates>& prev, const Values<T, Gates::kStates>& next,
                                  const Values<T, Gates::kStates>& d_next, Values<T, Gates::kStates>& d_prev,
                                  Values<T, Gates::kGates>& d_gx, Values<T, Gates::kGates>& d_gh) {
    T d_o, d_c;
    lstm_output_gradient(saved[3], next[1], d_next[0], d_o, d_c);
    const Values<T, Gates::kStates> d_gates = {d_o, d_next[1] + d_c};
    Gates::backward(w, saved, prev, next, d_gates, d_prev, d_gx, d_gh);
  }
};

template <typename T>
struct CoupledLstmCell {
  static constexpr int kGates = 3;  // f, g, o
  static constexpr int kStates = 2;
  static constexpr int kParameters = 0;
  static constexpr int kSaved = 3;  // f, g, o after their activations
  static constexpr bool kGateGradsDiffer = false;

  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& /*w*/, const Values<T, kStates>& prev,
                                 Values<T, kStates>& next, Values<T, kSaved>& saved) {
    const T f = sigmoid(gx[0] + gh[0]);
    const T g = tanh(gx[1] + gh[1]);
    const T o = sigmoid(gx[2] + gh[2]);
    const T c = g + f * (prev[1] - g);
    next[0] = o * tanh(c);
    next[1] = c;
    saved[0] = f;
    saved[1] = g;
    saved[2] = o;
  }

  FASTRNN_HD static T restore_c(const Values<T, kSaved>& saved, const Values<T, kStates>& prev) {
    return saved[1] + saved[0] * (prev[1] - saved[1]);
  }

  FASTRNN_HD static void backward(const Values<T, kParameters>& /*w*/, const Values<T, kSaved>& saved,
                                  const Values<T, kStates>& prev, const Values<T, kStates>& next,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, Values<T, kGates>& d_gx,
                                  Values<T, kGates>& d_gh) {
    const T f = saved[0], g = saved[1], o = saved[2];
    const T tanh_c = tanh(next[1]);
    const T d_c = d_next[1] + d_next[0] * o * tanh_grad(tanh_c);
    d_gx[0] = d_c * (prev[1] - g) * sigmoid_grad(f);
    d_gx[1] = d_c * (1.0f - f) * tanh_grad(g);
    d_gx[2] = d_next[0] * tanh_c * sigmoid_grad(o);
    for (int k = 0; k < kGates; ++k) d_gh[k] = d_gx[k];
    d_prev[0] = T{};
    d_prev[1] = d_c * f;
  }
};

template <typename T>
struct PeepholeLstmCell {
  static constexpr int kGates = 4;
  static constexpr int kStates = 2;
  static constexpr int kParameters = 3;  // w_i, w_f, w_o
  static constexpr int kSaved = 4;       // i, f, g, o after their activations
  static constexpr bool kGateGradsDiffer = false;
  // The gradient of parameter k is the sum of d_gx[parameter_gate(k)] times c before the step, or as the step made it.
  FASTRNN_HD static constexpr int parameter_gate(int k) { return k == 2 ? 3 : k; }
  FASTRNN_HD static constexpr bool parameter_sees_next(int k) { return k == 2; }

  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& w, const Values<T, kStates>& prev,
                                 Values<T, kStates>& next, Values<T, kSaved>& saved) {
    const T i = sigmoid(gx[0] + gh[0] + w[0] * prev[1]);
    const T f = sigmoid(gx[1] + gh[1] + w[1] * prev[1]);
    const T g = tanh(gx[2] + gh[2]);
    const T c = f * prev[1] + i * g;
    const T o = sigmoid(gx[3] + gh[3] + w[2] * c);
    next[0] = o * tanh(c);
    next[1] = c;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  FASTRNN_HD static T restore_c(const Values<T, kSaved>& saved, const Values<T, kStates>& prev) {
    return saved[1] * prev[1] + saved[0] * saved[2];
  }

  FASTRNN_HD static void backward(const Values<T, kParameters>& w, const Values<T, kSaved>& saved,
                                  const Values<T, kStates>& prev, const Values<T, kStates>& next,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, Values<T, kGates>& d_gx,
                                  Values<T, kGates>& d_gh) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const T tanh_c = tanh(next[1]);
    d_gx[3] = d_next[0] * tanh_c * sigmoid_grad(o);
    const T d_c = d_next[1] + d_next[0] * o * tanh_grad(tanh_c) + d_gx[3] * w[2];
    d_gx[0] = d_c * g * sigmoid_grad(i);
    d_gx[1] = d_c * prev[1] * sigmoid_grad(f);
    d_gx[2] = d_c * i * tanh_grad(g);
    for (int k = 0; k < kGates; ++k) d_gh[k] = d_gx[k];
    d_prev[0] = T{};
    d_prev[1] = d_c * f + d_gx[0] * w[0] + d_gx[1] * w[1];
  }
};

// A cell up to o and c', if the CPU is to make its output apart; any other as it is.
template <class Cell>
struct GatesOf {
  using type = Cell;
};
template <typename T>
struct GatesOf<LstmCell<T>> {
  using type = LstmGates<T>;
};
template <class Cell>
inline constexpr bool kHasOutput = !std::is_same_v<typename GatesOf<Cell>::type, Cell>;

}  // namespace fastrnn
