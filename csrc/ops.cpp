// SPDX-License-Identifier: BSD-3-Clause
// The registered operators. Together with the headers layer.h, tensor.h and *_path.h the only code that knows torch,
// through its stable interface alone: one binary serves every torch from 2.10 on.
//
// One operator runs one layer in one direction. x_gates = input W_ih^T + b_ih, or the input itself where w_ih is None.
// With save, forward also returns what backward needs; without, those results are None. A gradient that is not asked
// for comes back empty: torch.autograd.grad(is_grads_batched=True) takes no operator whose results may be None.
#include <string>
#include <tuple>

#include "layer.h"

#if defined(FASTRNN_EMULATE)
#include "persistent_path.h"
#define FASTRNN_CPU_PATH PersistentPath
#else
#include "cpu_path.h"
#define FASTRNN_CPU_PATH CpuPath
#if defined(FASTRNN_WITH_PERSISTENT)
#include "persistent_path.h"
#define FASTRNN_CUDA_PATH PersistentPath
#elif defined(FASTRNN_WITH_CUDA)
#include "gates_path.h"
#define FASTRNN_CUDA_PATH GatesPath
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

template <template <typename> class Cell>
constexpr CellFacts kFacts = {Cell<float>::kGates + kResetsBefore<Cell<float>>, Cell<float>::kStates,
                              Cell<float>::kParameters, kResetsBefore<Cell<float>>,
                              kResetsBefore<Cell<float>> || kNormalises<Cell<float>>};

template <template <typename> class Cell, template <template <typename> class> class Path>
struct Operator {
  using C = Cell<float>;
  using P = Path<Cell>;

  static ForwardResult forward(const Arguments& a, bool save, bool cells) {
    a.check_all(kFacts<Cell>);
    const ScalarType storage = a.input.scalar_type();
    const Layer layer(a, kFacts<Cell>.gates, P::compute(storage), P::kSorts);
    ForwardResult r = P::forward(layer, save, cells);
    const auto store = [&](const MaybeTensor& t, ScalarType type) -> MaybeTensor {
      if (!t) return std::nullopt;
      return to_dtype(*t, type);
    };
    r.output = to_dtype(r.output, storage);
    r.h_n = to_dtype(r.h_n, storage);
    r.c_n = store(r.c_n, storage);
    r.cells = store(r.cells, storage);
    r.saved_gates = store(r.saved_gates, storage);
    r.saved_c = store(r.saved_c, acc_dtype(storage));
    r.saved_m = store(r.saved_m, storage);
    r.h_in = save ? store(r.h_in, storage) : std::nullopt;
    return r;
  }

  struct Gradients {
    MaybeTensor input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell, h0, c0;
  };

  static Gradients backward(const Arguments& a, const ForwardResult& saved, const ResultGradients& d, bool need_input,
                            bool need_weights, bool need_states) {
    a.check_all(kFacts<Cell>);
    const ScalarType storage = a.input.scalar_type();
    const Layer layer(a, kFacts<Cell>.gates, P::compute(storage), P::kSorts);
    const GateGradients g = P::backward(layer, saved, d, need_states);
    const auto store = [&](const Tensor& t) { return to_dtype(t, storage); };

    Gradients r;
    if (need_input) {
      const Tensor d_input = store(layer.w_ih || layer.lengths ? P::input_gradient(layer, g.d_x_gates) : g.d_x_gates);
      r.input = d_input.dim() == a.input.dim() ? d_input : torch::stable::reshape(d_input, {layer.T, layer.B, layer.I});
    }
    if (need_weights) {
      const auto store_both = [&](const WeightAndBias& d, MaybeTensor& weight, MaybeTensor& bias) {
        if (d.weight) weight = store(*d.weight);
        if (d.bias) bias = store(*d.bias);
      };
      store_both(P::input_weight_gradient(layer, g, a.b_ih.has_value()), r.w_ih, r.b_ih);
      store_both(P::recurrent_weight_gradient(layer, g, saved, a.b_hh.has_value()), r.w_hh, r.b_hh);
      if (layer.w_hr) r.w_hr = store(P::projection_gradient(layer, g, saved));
      if constexpr (C::kParameters > 0) r.w_cell = store(P::parameter_gradient(layer, g, saved));
    }
    if (need_states) {
      r.h0 = store(g.d_h0);
      if (g.d_c0) r.c0 = store(*g.d_c0);
    }
    return r;
  }
};

// What torch calls. Cells with the state h alone, then those with h and c.

template <template <typename> class Cell, template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, MaybeTensor, MaybeTensor> h_layer(const Tensor& input, const MaybeTensor& w_ih,
                                                             const Tensor& w_hh, const MaybeTensor& b_ih,
                                                             const MaybeTensor& b_hh, const MaybeTensor& w_cell,
                                                             const Tensor& h0, const MaybeTensor& batch_sizes,
                                                             bool reverse, bool save, const MaybeTensor& lengths,
                                                             const MaybeTensor& reset, const MaybeTensor& h_mask,
                                                             const MaybeTensor& zone_h, double grad_clip) {
  const ForwardResult r = Operator<Cell, Path>::forward({kName<Cell>,
                                                         input,
                                                         w_ih,
                                                         w_hh,
                                                         b_ih,
                                                         b_hh,
                                                         std::nullopt,
                                                         w_cell,
                                                         h0,
                                                         std::nullopt,
                                                         batch_sizes,
                                                         reverse,
                                                         {lengths, reset, h_mask, zone_h, std::nullopt, grad_clip}},
                                                        save, false);
  return {r.output, r.h_n, r.saved_gates, r.h_in};
}

template <template <typename> class Cell, template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> h_layer_backward(
    const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const Tensor& input, const MaybeTensor& w_ih,
    const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh, const MaybeTensor& w_cell, const Tensor& h0,
    const MaybeTensor& batch_sizes, bool reverse, const Tensor& output, const MaybeTensor& saved_gates,
    const MaybeTensor& h_in, bool need_input, bool need_weights, bool need_states, const MaybeTensor& lengths,
    const MaybeTensor& reset, const MaybeTensor& h_mask, const MaybeTensor& zone_h, double grad_clip) {
  ForwardResult saved;
  saved.output = output;
  saved.saved_gates = saved_gates;
  saved.h_in = h_in;
  const auto g = Operator<Cell, Path>::backward({kName<Cell>,
                                                 input,
                                                 w_ih,
                                                 w_hh,
                                                 b_ih,
                                                 b_hh,
                                                 std::nullopt,
                                                 w_cell,
                                                 h0,
                                                 std::nullopt,
                                                 batch_sizes,
                                                 reverse,
                                                 {lengths, reset, h_mask, zone_h, std::nullopt, grad_clip}},
                                                saved, {grad_output, grad_h_n, std::nullopt, std::nullopt}, need_input,
                                                need_weights, need_states);
  return {or_nothing(g.input, input), or_nothing(g.w_ih, input),   or_nothing(g.w_hh, input), or_nothing(g.b_ih, input),
          or_nothing(g.b_hh, input),  or_nothing(g.w_cell, input), or_nothing(g.h0, input)};
}

template <template <typename> class Cell, template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> c_layer(
    const Tensor& input, const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh,
    const MaybeTensor& w_hr, const MaybeTensor& w_cell, const Tensor& h0, const Tensor& c0,
    const MaybeTensor& batch_sizes, bool reverse, bool save, const MaybeTensor& lengths, const MaybeTensor& reset,
    const MaybeTensor& h_mask, const MaybeTensor& zone_h, double grad_clip, const MaybeTensor& zone_c,
    bool return_cells) {
  const ForwardResult r = Operator<Cell, Path>::forward({kName<Cell>,
                                                         input,
                                                         w_ih,
                                                         w_hh,
                                                         b_ih,
                                                         b_hh,
                                                         w_hr,
                                                         w_cell,
                                                         h0,
                                                         c0,
                                                         batch_sizes,
                                                         reverse,
                                                         {lengths, reset, h_mask, zone_h, zone_c, grad_clip}},
                                                        save, return_cells);
  return {r.output, r.h_n, *r.c_n, r.cells, r.saved_gates, r.saved_c, r.saved_m, r.h_in};
}

template <template <typename> class Cell, template <template <typename> class> class Path>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> c_layer_backward(
    const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
    const MaybeTensor& grad_cells, const Tensor& input, const MaybeTensor& w_ih, const Tensor& w_hh,
    const MaybeTensor& b_ih, const MaybeTensor& b_hh, const MaybeTensor& w_hr, const MaybeTensor& w_cell,
    const Tensor& h0, const Tensor& c0, const MaybeTensor& batch_sizes, bool reverse, const Tensor& output,
    const MaybeTensor& saved_gates, const MaybeTensor& saved_c, const MaybeTensor& saved_m, const MaybeTensor& h_in,
    bool need_input, bool need_weights, bool need_states, const MaybeTensor& lengths, const MaybeTensor& reset,
    const MaybeTensor& h_mask, const MaybeTensor& zone_h, double grad_clip, const MaybeTensor& zone_c,
    bool return_cells) {
  ForwardResult saved;
  saved.output = output;
  saved.saved_gates = saved_gates;
  saved.saved_c = saved_c;
  saved.saved_m = saved_m;
  saved.h_in = h_in;
  const auto g =
      Operator<Cell, Path>::backward({kName<Cell>,
                                      input,
                                      w_ih,
                                      w_hh,
                                      b_ih,
                                      b_hh,
                                      w_hr,
                                      w_cell,
                                      h0,
                                      c0,
                                      batch_sizes,
                                      reverse,
                                      {lengths, reset, h_mask, zone_h, zone_c, grad_clip}},
                                     saved, {grad_output, grad_h_n, grad_c_n, return_cells ? grad_cells : std::nullopt},
                                     need_input, need_weights, need_states);
  return {or_nothing(g.input, input),  or_nothing(g.w_ih, input), or_nothing(g.w_hh, input),
          or_nothing(g.b_ih, input),   or_nothing(g.b_hh, input), or_nothing(g.w_hr, input),
          or_nothing(g.w_cell, input), or_nothing(g.h0, input),   or_nothing(g.c0, input)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Registration. Fake kernels and autograd are in fastrnn/ops.py.

using Library = torch::stable::detail::StableLibrary;

template <template <typename> class Cell>
void define(Library& m, const std::string& name) {
  const bool has_c = Cell<float>::kStates > 1;
  const std::string weights = "Tensor input, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, ";
  const std::string floats =
      weights + (has_c ? "Tensor? w_hr, Tensor? w_cell, Tensor h0, Tensor c0, " : "Tensor? w_cell, Tensor h0, ") +
      "Tensor? batch_sizes, bool reverse, ";
  const std::string controls =
      std::string(
          "Tensor? lengths=None, Tensor? reset=None, Tensor? h_mask=None, Tensor? zone_h=None, "
          "float grad_clip=0") +
      (has_c ? ", Tensor? zone_c=None, bool return_cells=False" : "");
  const std::string saved = has_c ? "Tensor? saved_gates, Tensor? saved_c, Tensor? saved_m, Tensor? h_in"
                                  : "Tensor? saved_gates, Tensor? h_in";
  m.def((name + "_layer(" + floats + "bool save, " + controls + ") -> (Tensor output, Tensor h_n, " +
         (has_c ? "Tensor c_n, Tensor? cells, " : "") + saved + ")")
            .c_str());
  m.def((name + "_layer_backward(Tensor? grad_output, Tensor? grad_h_n, " +
         (has_c ? "Tensor? grad_c_n, Tensor? grad_cells, " : "") + floats + "Tensor output, " + saved +
         ", bool need_input, bool need_weights, bool need_states, " + controls +
         ") -> (Tensor grad_input, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh, " +
         (has_c ? "Tensor grad_w_hr, Tensor grad_w_cell, Tensor grad_h0, Tensor grad_c0)"
                : "Tensor grad_w_cell, Tensor grad_h0)"))
            .c_str());
}

template <template <typename> class Cell, template <template <typename> class> class Path>
void implement(Library& m, const std::string& name) {
  if constexpr (Cell<float>::kStates == 1) {
    m.impl((name + "_layer").c_str(), TORCH_BOX((&h_layer<Cell, Path>)));
    m.impl((name + "_layer_backward").c_str(), TORCH_BOX((&h_layer_backward<Cell, Path>)));
  } else {
    m.impl((name + "_layer").c_str(), TORCH_BOX((&c_layer<Cell, Path>)));
    m.impl((name + "_layer_backward").c_str(), TORCH_BOX((&c_layer_backward<Cell, Path>)));
  }
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
#define FASTRNN_DEFINE(name, Cell) fastrnn::define<fastrnn::Cell>(m, #name);
  FASTRNN_FOR_EACH_CELL(FASTRNN_DEFINE)
}

#define FASTRNN_CPU(name, Cell) fastrnn::implement<fastrnn::Cell, fastrnn::FASTRNN_CPU_PATH>(m, #name);
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m){FASTRNN_FOR_EACH_CELL(FASTRNN_CPU)}
#if defined(FASTRNN_CUDA_PATH)
#define FASTRNN_CUDA(name, Cell) fastrnn::implement<fastrnn::Cell, fastrnn::FASTRNN_CUDA_PATH>(m, #name);
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  FASTRNN_FOR_EACH_CELL(FASTRNN_CUDA)
}
#endif
