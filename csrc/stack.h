// SPDX-License-Identifier: BSD-3-Clause
// The layers of a module in one call, for calls so short that coming to each layer from Python takes the most of them.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "layer.h"

namespace fastrnn {

// What a module holds. Its runs are the directions of the first layer, then those of the next.
struct LayerStack {
  const char* op;  // of a layer, for messages
  // Of each run W_ih, W_hh, b_ih and b_hh if there are biases, W_hr if there is a projection.
  std::vector<Tensor> weights;
  std::vector<Tensor> packed;  // of each run, or none
  std::vector<Tensor> states;  // h, of an LSTM also c: [runs, B, ..], or [B, ..] for all runs
  MaybeTensor batch_sizes;
  bool has_biases;
  int64_t runs, directions;

  // What arguments() relies on; the rest is checked of each layer. A cell with c may have a projection.
  void check_all(int cell_states) const {
    const auto given = static_cast<int64_t>(weights.size()), least = has_biases ? int64_t{4} : int64_t{2};
    check((directions == 1 || directions == 2) && runs > 0 && runs % directions == 0, op,
          ": expected runs of 1 or 2 directions, got ", runs, " of ", directions);
    check(given == runs * least || (cell_states > 1 && given == runs * (least + 1)), op, ": expected ", least,
          " weights for each of ", runs, " runs, and maybe a projection, got ", given);
    check(packed.empty() || packed.size() == static_cast<size_t>(runs), op, ": expected ", runs,
          " packed tensors, or none, got ", packed.size());
    check(states.size() == static_cast<size_t>(cell_states), op, ": expected ", cell_states, " states, got ",
          states.size());
    for (const Tensor& t : states) {
      check(t.dim() == 2 || (t.dim() == 3 && t.size(0) == runs), op, ": expected states of shape [B, ..] or [", runs,
            ", B, ..], got ", shape_of(t));
    }
  }

  Arguments arguments(int64_t run, const Tensor& input) const {
    const size_t per_run = weights.size() / static_cast<size_t>(runs), first = static_cast<size_t>(run) * per_run;
    const auto weight = [&](size_t i) { return i < per_run ? MaybeTensor(weights[first + i]) : std::nullopt; };
    const auto bias = [&](size_t i) { return has_biases ? weight(i) : std::nullopt; };
    return {op,
            input,
            weight(0),
            *weight(1),
            bias(2),
            bias(3),
            weight(has_biases ? 4 : 2),
            std::nullopt,
            state(0, run),
            states.size() > 1 ? MaybeTensor(state(1, run)) : std::nullopt,
            batch_sizes,
            run % directions == 1,
            {},
            packed.empty() ? std::nullopt : MaybeTensor(packed[static_cast<size_t>(run)])};
  }

 private:
  Tensor state(size_t i, int64_t run) const {
    const Tensor& t = states[i];
    return t.dim() == 2 ? t : torch::stable::reshape(rows(t, run, 1), {t.size(1), t.size(2)});
  }
};

// The output of the last layer, then the final states [runs, B, ..], without what backward needs.
template <class Operator>
std::vector<Tensor> run_stack(const LayerStack& stack, Tensor input) {
  std::vector<Tensor> h_n, c_n;
  const auto call_of = [&](int64_t run) { return ForwardCall{stack.arguments(run, input), false, false}; };
  const auto keep = [&](const ForwardResult& r) {
    h_n.push_back(r.h_n);
    if (r.c_n) c_n.push_back(*r.c_n);
  };
  for (int64_t run = 0; run < stack.runs; run += stack.directions) {
    if (stack.directions == 1) {
      const ForwardResult result = Operator::run(call_of(run));
      keep(result);
      input = result.output;
    } else {
      const auto [ahead, back] = Operator::run_both(call_of(run), call_of(run + 1));
      keep(ahead);
      keep(back);
      input = call("aten::cat", "", std::vector<Tensor>{ahead.output, back.output}, int64_t{-1});
    }
  }
  std::vector<Tensor> results{input};
  for (const std::vector<Tensor>& states : {h_n, c_n}) {
    if (!states.empty()) results.push_back(call("aten::stack", "", states, int64_t{0}));
  }
  return results;
}

}  // namespace fastrnn
