// SPDX-License-Identifier: BSD-3-Clause
// The sLSTM cell (Beck et al., "xLSTM: extended long short-term memory", 2024, with the sigmoid forget gate). Gates in
// the row order i, f, z, o.
//
//   z = tanh(gx_z + gh_z)    o = sigmoid(gx_o + gh_o)    i~ = gx_i + gh_i    log f = log sigmoid(gx_f + gh_f)
//   m' = max(log f + m, i~)  i = exp(i~ - m')            f = exp(log f + m - m')
//   c' = f c + i z           n' = f n + i                h' = o c' / n'
//
// m keeps the exponentials in range. It cancels in c' / n', so it has no gradient. Where n is 0, nothing has been
// stored: then m' = i~ and f = 0, so that zero states are the beginning; from the first step on n is 1 or more.
#pragma once

#include "math.h"

namespace fastrnn {

template <typename T>
struct SlstmCell {
  static constexpr int kGates = 4;   // i, f, z, o
  static constexpr int kStates = 4;  // h, c, n, m
  static constexpr int kParameters = 0;
  static constexpr int kSaved = 5;  // i, f, z, o, and 1 - sigmoid(gx_f + gh_f)
  static constexpr bool kGateGradsDiffer = false;

  FASTRNN_HD static void forward(const Values<T, kGates>& gx, const Values<T, kGates>& gh,
                                 const Values<T, kParameters>& /*w*/, const Values<T, kStates>& prev,
                                 Values<T, kStates>& next, Values<T, kSaved>& saved) {
    const T c = prev[1], n = prev[2], m = prev[3];
    const T log_i = gx[0] + gh[0], f_input = gx[1] + gh[1];
    const T kept = log_sigmoid(f_input) + m;
    const T larger = kept > log_i ? kept : log_i;
    const T m_next = n > 0.0f ? larger : log_i;
    const T i = exp(log_i - m_next);
    const T f_stored = exp(kept - m_next);
    const T f = n > 0.0f ? f_stored : T{};
    const T z = tanh(gx[2] + gh[2]);
    const T o = sigmoid(gx[3] + gh[3]);
    next[1] = f * c + i * z;
    next[2] = f * n + i;
    next[3] = m_next;
    next[0] = o * next[1] / next[2];
    saved[0] = i;
    saved[1] = f;
    saved[2] = z;
    saved[3] = o;
    saved[4] = sigmoid(-f_input);
  }

  FASTRNN_HD static void backward(const Values<T, kParameters>& /*w*/, const Values<T, kSaved>& saved,
                                  const Values<T, kStates>& prev, const Values<T, kStates>& next,
                                  const Values<T, kStates>& d_next, Values<T, kStates>& d_prev, Values<T, kGates>& d_gx,
                                  Values<T, kGates>& d_gh) {
    const T i = saved[0], f = saved[1], z = saved[2], o = saved[3];
    const T quotient = next[1] / next[2];
    const T d_quotient = d_next[0] * o / next[2];
    const T d_c = d_next[1] + d_quotient;
    const T d_n = d_next[2] - d_quotient * quotient;
    d_gx[0] = i * (d_c * z + d_n);
    d_gx[1] = f * (d_c * prev[1] + d_n * prev[2]) * saved[4];
    d_gx[2] = d_c * i * tanh_grad(z);
    d_gx[3] = d_next[0] * quotient * sigmoid_grad(o);
    for (int k = 0; k < kGates; ++k) d_gh[k] = d_gx[k];
    d_prev[0] = T{};
    d_prev[1] = d_c * f;
    d_prev[2] = d_n * f;
    d_prev[3] = T{};
  }
};

}  // namespace fastrnn
