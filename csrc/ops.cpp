// SPDX-License-Identifier: BSD-3-Clause
// The registered operators. Together with the headers layer.h, tensor.h and *_path.h the only code that knows torch,
// through its stable interface alone: one binary serves every torch from 2.10 on.
//
// One operator runs one layer in one direction. x_gates = input W_ih^T + b_ih, or the input itself where w_ih is None.
// With save, forward also returns what backward needs; without, those results are empty. A gradient that is not asked
// for comes back empty too.
#include <string>
#include <tuple>

#include "layer.h"

#if defined(FASTRNN_EMULATE)
#include "persistent_path.h"
#else
#include "cpu_path.h"
#if defined(FASTRNN_WITH_PERSISTENT)
#include "persistent_path.h"
#elif defined(FASTRNN_WITH_CUDA)
#include "gates_path.h"
#endif
#endif

namespace fastrnn {
namespace {

// "fastrnn::lstm_layer" and the like, for messages.
template <template <typename> class Cell>
constexpr const char* kName = nullptr;
#define FASTRNN_NAME(name, Cell) \
  template <>                    \
  constexpr const char* kName<Cell> = "fastrnn::" #name "_layer";
FASTRNN_FOR_EACH_CELL(FASTRNN_NAME)
#undef FASTRNN_NAME

template <template <typename> class Cell, template <template <typename> class> class Path>
struct Operator {
  using C = Cell<float>;

  static ForwardResult forward(const Arguments& a, bool save) {
    a.check_all(C::kGates);
    const ScalarType storage = a.input.scalar_type();
    const Layer layer(a, C::kGates, Path<Cell>::compute(storage, save));
    ForwardResult r = Path<Cell>::forward(layer, save);
    const auto store = [&](const MaybeTensor& t, ScalarType type) -> MaybeTensor {
      if (!t) return std::nullopt;
      return to_dtype(*t, type);
    };
    r.output = to_dtype(r.output, storage);
    r.h_n = to_dtype(r.h_n, storage);
    r.c_n = store(r.c_n, storage);
    r.saved_gates = store(r.saved_gates, storage);
    r.saved_c = store(r.saved_c, acc_dtype(storage));
    r.saved_m = store(r.saved_m, storage);
    return r;
  }

  struct Gradients {
    MaybeTensor input, w_ih, w_hh, b_ih, b_hh, w_hr;
    Tensor h0;
    MaybeTensor c0;
  };

  static Gradients backward(const Arguments& a, const ForwardResult& saved, const MaybeTensor& d_output,
                            const MaybeTensor& d_h_n, const MaybeTensor& d_c_n, bool need_input, bool need_weights) {
    a.check_all(C::kGates);
    const ScalarType storage = a.input.scalar_type();
    const Layer layer(a, C::kGates, Path<Cell>::compute(storage, true));
    const GateGradients g = Path<Cell>::backward(layer, saved, d_output, d_h_n, d_c_n);
    const auto store = [&](const Tensor& t) { return to_dtype(t, storage); };

    Gradients r;
    if (need_input) {
      const Tensor d_input = store(layer.w_ih ? Path<Cell>::input_gradient(layer, g.d_x_gates) : g.d_x_gates);
      r.input = a.batch_sizes ? d_input : torch::stable::reshape(d_input, {layer.T, layer.B, layer.I});
    }
    if (need_weights) {
      const auto store_both = [&](const WeightAndBias& d, MaybeTensor& weight, MaybeTensor& bias) {
        if (d.weight) weight = store(*d.weight);
        if (d.bias) bias = store(*d.bias);
      };
      using P = Path<Cell>;
      store_both(P::input_weight_gradient(layer, g, a.b_ih.has_value()), r.w_ih, r.b_ih);
      store_both(P::recurrent_weight_gradient(layer, g, saved, a.b_hh.has_value()), r.w_hh, r.b_hh);
      if (layer.w_hr) r.w_hr = store(P::projection_gradient(layer, g, saved));
    }
    r.h0 = store(g.d_h0);
    if (g.d_c0) r.c0 = store(*g.d_c0);
    return r;
  }
};

template <template <typename> class Cell, template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor> one_state_layer(const Tensor& input, const MaybeTensor& w_ih, const Tensor& w_hh,
                                                   const MaybeTensor& b_ih, const MaybeTensor& b_hh, const Tensor& h0,
                                                   const MaybeTensor& batch_sizes, bool reverse, bool save) {
  const ForwardResult r = Operator<Cell, Path>::forward(
      {kName<Cell>, input, w_ih, w_hh, b_ih, b_hh, std::nullopt, h0, std::nullopt, batch_sizes, reverse}, save);
  return {r.output, r.h_n, or_nothing(r.saved_gates, input)};
}

template <template <typename> class Cell, template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> one_state_layer_backward(
    const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const Tensor& input, const MaybeTensor& w_ih,
    const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh, const Tensor& h0,
    const MaybeTensor& batch_sizes, bool reverse, const Tensor& output, const Tensor& saved_gates, bool need_input,
    bool need_weights) {
  const auto g = Operator<Cell, Path>::backward(
      {kName<Cell>, input, w_ih, w_hh, b_ih, b_hh, std::nullopt, h0, std::nullopt, batch_sizes, reverse},
      {output, Tensor(), std::nullopt, if_there(saved_gates), std::nullopt, std::nullopt}, grad_output, grad_h_n,
      std::nullopt, need_input, need_weights);
  return {or_nothing(g.input, input), or_nothing(g.w_ih, input), or_nothing(g.w_hh, input),
          or_nothing(g.b_ih, input),  or_nothing(g.b_hh, input), g.h0};
}

template <template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(const Tensor& input, const MaybeTensor& w_ih,
                                                                      const Tensor& w_hh, const MaybeTensor& b_ih,
                                                                      const MaybeTensor& b_hh, const MaybeTensor& w_hr,
                                                                      const Tensor& h0, const Tensor& c0,
                                                                      const MaybeTensor& batch_sizes, bool reverse,
                                                                      bool save) {
  const ForwardResult r = Operator<LstmCell, Path>::forward(
      {kName<LstmCell>, input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes, reverse}, save);
  return {r.output,
          r.h_n,
          *r.c_n,
          or_nothing(r.saved_gates, input),
          r.saved_c ? *r.saved_c : empty(input, {0}, acc_dtype(input.scalar_type())),
          or_nothing(r.saved_m, input)};
}

template <template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_backward(
    const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n, const Tensor& input,
    const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh,
    const MaybeTensor& w_hr, const Tensor& h0, const Tensor& c0, const MaybeTensor& batch_sizes, bool reverse,
    const Tensor& output, const Tensor& saved_gates, const Tensor& saved_c, const Tensor& saved_m, bool need_input,
    bool need_weights) {
  const auto g = Operator<LstmCell, Path>::backward(
      {kName<LstmCell>, input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, batch_sizes, reverse},
      {output, Tensor(), std::nullopt, saved_gates, saved_c, w_hr ? MaybeTensor(saved_m) : std::nullopt}, grad_output,
      grad_h_n, grad_c_n, need_input, need_weights);
  return {or_nothing(g.input, input),
          or_nothing(g.w_ih, input),
          or_nothing(g.w_hh, input),
          or_nothing(g.b_ih, input),
          or_nothing(g.b_hh, input),
          or_nothing(g.w_hr, input),
          g.h0,
          *g.c0};
}

}  // namespace
}  // namespace fastrnn

// ---------------------------------------------------------------------------------------------------------------------
// Registration. Fake kernels and autograd are in fastrnn/ops.py.

#define FASTRNN_ONE_STATE_SCHEMA(name)                                                                       \
  m.def(#name                                                                                                \
        "_layer(Tensor input, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, "            \
        "Tensor? batch_sizes, bool reverse, bool save) -> (Tensor output, Tensor h_n, Tensor saved_gates)"); \
  m.def(#name                                                                                                \
        "_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? w_ih, Tensor w_hh, "   \
        "Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor? batch_sizes, bool reverse, Tensor output, "          \
        "Tensor saved_gates, bool need_input, bool need_weights) -> (Tensor grad_input, Tensor grad_w_ih, "  \
        "Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh, Tensor grad_h0)");

STABLE_TORCH_LIBRARY(fastrnn, m) {
  FASTRNN_ONE_STATE_SCHEMA(rnn_tanh)
  FASTRNN_ONE_STATE_SCHEMA(rnn_relu)
  FASTRNN_ONE_STATE_SCHEMA(gru)
  m.def(
      "lstm_layer(Tensor input, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h0, "
      "Tensor c0, Tensor? batch_sizes, bool reverse, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, "
      "Tensor saved_gates, Tensor saved_c, Tensor saved_m)");
  m.def(
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? w_ih, "
      "Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h0, Tensor c0, Tensor? batch_sizes, bool reverse, "
      "Tensor output, Tensor saved_gates, Tensor saved_c, Tensor saved_m, bool need_input, bool need_weights) -> "
      "(Tensor grad_input, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh, Tensor grad_w_hr, "
      "Tensor grad_h0, Tensor grad_c0)");
}

#define FASTRNN_ONE_STATE_IMPL(name, Cell, Path)                                                \
  m.impl(#name "_layer", TORCH_BOX((&fastrnn::one_state_layer<fastrnn::Cell, fastrnn::Path>))); \
  m.impl(#name "_layer_backward", TORCH_BOX((&fastrnn::one_state_layer_backward<fastrnn::Cell, fastrnn::Path>)));

#define FASTRNN_IMPL(Path)                                                \
  FASTRNN_ONE_STATE_IMPL(rnn_tanh, RnnTanhCell, Path)                     \
  FASTRNN_ONE_STATE_IMPL(rnn_relu, RnnReluCell, Path)                     \
  FASTRNN_ONE_STATE_IMPL(gru, GruCell, Path)                              \
  m.impl("lstm_layer", TORCH_BOX((&fastrnn::lstm_layer<fastrnn::Path>))); \
  m.impl("lstm_layer_backward", TORCH_BOX((&fastrnn::lstm_layer_backward<fastrnn::Path>)));

#if defined(FASTRNN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m){FASTRNN_IMPL(PersistentPath)}
#else
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m){FASTRNN_IMPL(CpuPath)}
#if defined(FASTRNN_WITH_PERSISTENT)
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m){FASTRNN_IMPL(PersistentPath)}
#elif defined(FASTRNN_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  FASTRNN_IMPL(GatesPath)
}
#endif
#endif
