// SPDX-License-Identifier: BSD-3-Clause
// The GRU cell of torch.nn.GRU: the reset gate multiplies after the recurrent product. Gates in torch's row order r, z,
// n.
//
//   r = sigmoid(gx_r + gh_r)    z = sigmoid(gx_z + gh_z)    n = tanh(gx_n + r gh_n)
//   h' = (1 - z) n + z h
//
// And the GRU as it was published (Cho et al., "Learning phrase representations using RNN encoder-decoder for
// statistical machine translation", 2014), which resets before the product: n = tanh(gx_n + W_hn (r h)).
#pragma once

#include "math.h"

namespace fastrnn {

template <typename T>
struct GruCell {
  static constexpr int kGates = 3;                // r, z, n
  static constexpr int kStates = 1;               // h
  static constexpr int kParameters = 0;           // beside weights and biases
  static constexpr int kSaved = 4;                // r, z, n after their activations, and gh_n
  static constexpr bool kGateGradsDiffer = true;  // d_gh_n = r d_gx_n

  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& /*w*/, const Values<T, kStates>& prev,
                                 Values<T, kStates>& next, Values<T, kSaved>& saved) {
    const T r = sigmoid(gx[0] + gh[0]);
    const T z = sigmoid(gx[1] + gh[1]);
    const T n = tanh(gx[2] + r * gh[2]);
    next[0] = n + z * (prev[0] - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = gh[2];
  }

  // d_prev[0] is the direct way, through z h.
  FASTRNN_HD static void backward(const Values<T, kParameters>& /*w*/, const Values<T, kSaved>& saved,
                                  const Values<T, kStates>& prev, const Values<T, kStates>& /*next*/,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, Values<T, kGates>& d_gx,
                                  Values<T, kGates>& d_gh) {
    const T r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
    const T d_n = d_next[0] * (1.0f - z) * tanh_grad(n);
    d_gx[0] = d_gh[0] = d_n * gh_n * sigmoid_grad(r);
    d_gx[1] = d_gh[1] = d_next[0] * (prev[0] - n) * sigmoid_grad(z);
    d_gx[2] = d_n;
    d_gh[2] = d_n * r;
    d_prev[0] = d_next[0] * z;
  }
};

// Whether a cell multiplies r h, not h, with the weights of its last gate: a step has a second product then, between
// forward and finish, and the cell makes its result in both.
template <class Cell>
inline constexpr bool kResetsBefore = false;

template <typename T>
struct GruBeforeCell {
  static constexpr int kGates = 2;  // r, z: of the first product; gx_n goes into finish
  static constexpr int kStates = 1;
  static constexpr int kParameters = 0;
  static constexpr int kSaved = 3;                // r, z, n after their activations
  static constexpr bool kGateGradsDiffer = true;  // d_gh has no n

  // next[0] is r h, what the second product reads. prev[0] is h as the first one read it.
  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& /*w*/, const Values<T, kStates>& prev,
                                 Values<T, kStates>& next, Values<T, kSaved>& saved) {
    saved[0] = sigmoid(gx[0] + gh[0]);
    saved[1] = sigmoid(gx[1] + gh[1]);
    saved[2] = T{};  // for finish
    next[0] = saved[0] * prev[0];
  }

  // h' and n, from gates_n = gx_n + W_hn (r h).
  FASTRNN_HD static T finish(T gates_n, T z, T h_prev, T& n) {
    n = tanh(gates_n);
    return n + z * (h_prev - n);
  }

  FASTRNN_HD static void finish_backward(const Values<T, kSaved>& saved, T h_prev, T d_next, T& d_prev, T& d_gates_z,
                                         T& d_gates_n) {
    const T z = saved[1], n = saved[2];
    d_gates_z = d_next * (h_prev - n) * sigmoid_grad(z);
    d_gates_n = d_next * (1.0f - z) * tanh_grad(n);
    d_prev = d_next * z;
  }

  // The gradients through r h, of which d_next[0] is that: d_gx[0] and the way to prev[0].
  FASTRNN_HD static void backward(const Values<T, kSaved>& saved, const Values<T, kStates>& prev,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, T& d_gates_r) {
    d_gates_r = d_next[0] * prev[0] * sigmoid_grad(saved[0]);
    d_prev[0] = d_next[0] * saved[0];
  }
};
template <typename T>
inline constexpr bool kResetsBefore<GruBeforeCell<T>> = true;

}  // namespace fastrnn
