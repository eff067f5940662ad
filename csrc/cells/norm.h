// SPDX-License-Identifier: BSD-3-Clause
// Layer normalisation in the recurrence (Ba, Kiros, Hinton, "Layer normalization", 2016): the products of a step are
// normalised before the cell sees them, and an LSTM normalises c' before its output.
//
//   LN(a) = (a - mean(a)) / sqrt(var(a) + eps)      over a group of gates, all units of it together
//   gx = gain_x LN(W_ih x) + bias_x                 gh = gain_h LN(W_hh h) + bias_h
//   an LSTM: h' = o tanh(gain_c LN(c') + bias_c)
//
// One group for the four gates of an LSTM; for a GRU one for r and z, and one for n.
// The parameters, one value of each per unit: gain_x of every gate, bias_x of every gate, gain_h, bias_h, gain_c,
// bias_c.
#pragma once

#include "gru.h"
#include "lstm.h"

namespace fastrnn {

inline constexpr double kNormEps = 1e-5;  // that of torch.nn.LayerNorm

// P: the cell between the normalisations, which sees one unit at a time.
template <class P>
struct NormCell {
  using Plain = P;
  static constexpr int kGates = P::kGates;
  static constexpr int kStates = P::kStates;
  static constexpr int kParameters = 2 * (2 * P::kGates + (P::kStates > 1));
  static constexpr int kSaved = P::kSaved + 2 * P::kGates;  // what the plain cell saves, W_ih x and W_hh h
  static constexpr bool kGateGradsDiffer = true;            // d_gx and d_gh are those of the products
  // Values per unit that a CUDA kernel sets aside: the gradients of the gates, and two for c.
  static constexpr int kScratch = 2 * (P::kGates + (P::kStates > 1));
};

// Group k: the gates from group_begin(k) to group_begin(k + 1), each of them group_share(k) of it.
template <typename T>
struct NormLstmCell : NormCell<LstmGates<T>> {
  static constexpr int kGroups = 1;
  FASTRNN_HD static constexpr int group_begin(int k) { return k * 4; }
  FASTRNN_HD static constexpr float group_share(int /*k*/) { return 0.25f; }
};
template <typename T>
struct NormGruCell : NormCell<GruCell<T>> {
  static constexpr int kGroups = 2;
  FASTRNN_HD static constexpr int group_begin(int k) { return k == 0 ? 0 : k + 1; }
  FASTRNN_HD static constexpr float group_share(int k) { return k == 0 ? 0.5f : 1.0f; }
};

// Any other cell is its own plain one.
template <class Cell, typename = void>
struct PlainOf {
  using type = Cell;
};
template <class Cell>
struct PlainOf<Cell, std::void_t<typename Cell::Plain>> {
  using type = typename Cell::Plain;
};
template <class Cell>
inline constexpr bool kNormalises = !std::is_same_v<typename PlainOf<Cell>::type, Cell>;
template <class Cell>
inline constexpr bool kNormalisesC = kNormalises<Cell> && Cell::kStates > 1;

// LN, and its gradient. T is a value type, S the scalar of the statistics.
template <typename S>
struct Statistics {
  S mean, scale;  // scale = 1 / sqrt(var + eps)

  FASTRNN_HD static Statistics of(S mean, S variance) {
    return {mean, 1 / std::sqrt(variance + static_cast<S>(kNormEps))};
  }
  // The variance is the mean of this.
  template <typename T>
  FASTRNN_HD static T squared_deviation(T a, S mean) {
    const T deviation = a - mean;
    return deviation * deviation;
  }

  template <typename T>
  FASTRNN_HD T normalised(T a) const {
    return (a - mean) * scale;
  }
  // d_a, from LN(a), d_normalised and the means over the group of d_normalised and of d_normalised LN(a).
  template <typename T>
  FASTRNN_HD T gradient(T normalised, T d_normalised, S mean_d, S mean_d_normalised) const {
    return (d_normalised - mean_d - normalised * mean_d_normalised) * scale;
  }
};

}  // namespace fastrnn
