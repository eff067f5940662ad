// SPDX-License-Identifier: BSD-3-Clause
// The registered operators. Together with the headers layer.h, tensor.h and *_path.h the only code that knows torch,
// through its stable interface alone: one binary serves every torch from 2.10 on.
//
// One operator runs one layer in one direction. x_gates = input W_ih^T + b_ih, or the input itself where w_ih is None.
// With save, forward also returns what backward needs; without, those results are None. A gradient that is not asked
// for comes back empty: torch.autograd.grad(is_grads_batched=True) takes no operator whose results may be None.
//
// An operator _*_both runs two layers that do not wait for each other, the directions of a bidirectional one: its
// arguments and its results are those of one layer, then those of the other.
//
// Where a path can pack the weights of a layer before its calls, an operator _*_pack does so, and _*_packed takes what
// it made in the place of save: the layer without what backward needs. They are for fastrnn/packing.py, which knows
// when weights have changed.
//
// An operator _*_stack runs all layers of a module of torch.nn's cells, without what backward needs.
#include <array>
#include <string>
#include <tuple>

#include "layer.h"
#include "stack.h"

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

// Of the operators of a cell, for messages.
struct Names {
  const char *forward, *packed, *backward, *pack;
};
template <template <typename> class Cell>
constexpr Names kNames = {};
#define FASTRNN_NAMES(name, Cell)                                                                 \
  template <>                                                                                     \
  constexpr Names kNames<Cell> = {"fastrnn::" #name "_layer", "fastrnn::_" #name "_layer_packed", \
                                  "fastrnn::" #name "_layer_backward", "fastrnn::_" #name "_layer_pack"};
FASTRNN_FOR_EACH_CELL(FASTRNN_NAMES)
#undef FASTRNN_NAMES

template <template <typename> class Cell>
constexpr CellFacts kFacts = {Cell<float>::kGates + kResetsBefore<Cell<float>>, Cell<float>::kStates,
                              Cell<float>::kParameters, kResetsBefore<Cell<float>>,
                              kResetsBefore<Cell<float>> || kNormalises<Cell<float>>};

// What is asked of backward.
struct BackwardCall {
  Arguments arguments;
  ForwardResult saved;
  ResultGradients d;
  bool need_input, need_weights, need_states;

  bool asks_as(const BackwardCall&) const { return true; }  // each is given the gradients that it needs
};

// The gradients of the arguments, those that are needed.
struct Gradients {
  MaybeTensor input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell, h0, c0;
};

template <template <typename> class Cell, template <template <typename> class> class Path>
struct Operator {
  using C = Cell<float>;
  using P = Path<Cell>;

  static ForwardResult run(const ForwardCall& call) { return run(layer_of(call.arguments), call); }
  static Gradients run(const BackwardCall& call) { return run(layer_of(call.arguments), call); }

  static std::vector<Tensor> stack(const Tensor& input, std::vector<Tensor> weights, std::vector<Tensor> packed,
                                   std::vector<Tensor> states, const MaybeTensor& batch_sizes, bool has_biases,
                                   int64_t runs, int64_t directions) {
    const LayerStack layers{kNames<Cell>.forward,
                            std::move(weights),
                            std::move(packed),
                            std::move(states),
                            batch_sizes,
                            has_biases,
                            runs,
                            directions};
    layers.check_all(C::kStates);
    return run_stack<Operator>(layers, input);
  }

  static Tensor pack(const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& w_hr) {
    // The weight in the place of the input: what they are compared with.
    const Arguments a{kNames<Cell>.pack, w_hh, w_ih, w_hh, {}, {}, w_hr, {}, w_hh, {}, {}, false, {}};
    a.check_dtype("w_hh", w_hh.scalar_type());
    a.check_recurrent(kFacts<Cell>.gates);
    a.check_weights(kFacts<Cell>.gates, w_ih && w_ih->dim() == 2 ? w_ih->size(1) : 0, w_hh.size(1));
    return P::pack(w_ih, w_hh, w_hr);
  }

  // Two layers that do not wait for each other: together where the path has a way to do so that pays.
  template <typename Call>
  static auto run_both(const Call& call_a, const Call& call_b) {
    const Layer a = layer_of(call_a.arguments), b = layer_of(call_b.arguments);
    if constexpr (P::kRunsBoth) {
      if (call_a.asks_as(call_b) && P::runs_both(a, b)) return run_together(a, b, call_a, call_b);
    }
    return std::array{run(a, call_a), run(b, call_b)};
  }

 private:
  static Layer layer_of(const Arguments& a) {
    a.check_all(kFacts<Cell>);
    return Layer(a, kFacts<Cell>.gates, P::compute(a.input.scalar_type()), P::kSorts);
  }

  static void check_packed(const Layer& layer, const Arguments& a) {
    if constexpr (P::kPacks) {
      if (!a.packed) return;
      const int64_t bytes = P::packed_bytes(layer);
      a.expect_shape("packed", *a.packed, {bytes});
      a.expect_dtype("packed", *a.packed, ScalarType::Byte);
      check(a.packed->is_contiguous(), a.op, ": expected packed to be contiguous, got a strided tensor");
      a.expect_device("packed", *a.packed);
    }
  }

  // Kernels read what was saved at the places that the sizes of the arguments tell.
  static void check_saved(const Layer& layer, const BackwardCall& call) {
    const Arguments& a = call.arguments;
    const auto expect = [&](const char* name, const MaybeTensor& t, bool is_saved, int64_t rows, int64_t width,
                            ScalarType dtype) {
      check(t.has_value() == is_saved, a.op, ": expected ", name, " to be ",
            is_saved ? "a tensor, got None" : "None, got a tensor");
      if (!t) return;
      a.expect_shape(name, *t, {rows, width});
      a.expect_dtype(name, *t, dtype);
      a.expect_device(name, *t);
    };
    const int64_t N = layer.N, H = layer.H, P = layer.P;
    const ForwardResult& saved = call.saved;
    expect("saved_gates", saved.saved_gates, C::kSaved > 0, N, C::kSaved * H, layer.storage);
    expect("saved_c", saved.saved_c, C::kStates > 1, (C::kStates - 1) * N, H, acc_dtype(layer.storage));
    expect("saved_m", saved.saved_m, a.w_hr.has_value(), N, H, layer.storage);
    expect("h_in", saved.h_in, a.controls.h_mask.has_value(), N, P, layer.storage);

    std::vector<int64_t> of_output = sizes_of(a.input), of_cells = of_output;
    of_output.back() = P;
    of_cells.back() = H;
    a.expect("output", saved.output, of_output);
    const auto expect_gradient = [&](const char* name, const MaybeTensor& t, const auto& sizes) {
      if (!t) return;
      a.expect_shape(name, *t, sizes);
      a.expect_device(name, *t);
    };
    expect_gradient("grad_output", call.d.output, of_output);
    expect_gradient("grad_h_n", call.d.h_n, sizes_of(a.h0));
    if (a.c0) expect_gradient("grad_c_n", call.d.c_n, sizes_of(*a.c0));
    expect_gradient("grad_cells", call.d.cells, of_cells);
  }

  static ForwardResult run(const Layer& layer, const ForwardCall& call) {
    check_packed(layer, call.arguments);
    return stored(P::forward(layer, call.save, call.return_cells), call);
  }
  static Gradients run(const Layer& layer, const BackwardCall& call) {
    check_saved(layer, call);
    return gradients(layer, P::backward(layer, call.saved, call.d, call.need_states), call);
  }

  static std::array<ForwardResult, 2> run_together(const Layer& layer_a, const Layer& layer_b, const ForwardCall& a,
                                                   const ForwardCall& b) {
    check_packed(layer_a, a.arguments);
    check_packed(layer_b, b.arguments);
    const auto [of_a, of_b] = P::forward_both(layer_a, layer_b, a.save, a.return_cells);
    return {stored(of_a, a), stored(of_b, b)};
  }
  static std::array<Gradients, 2> run_together(const Layer& layer_a, const Layer& layer_b, const BackwardCall& a,
                                               const BackwardCall& b) {
    check_saved(layer_a, a);
    check_saved(layer_b, b);
    const auto [of_a, of_b] =
        P::backward_both(layer_a, layer_b, a.saved, b.saved, a.d, b.d, a.need_states || b.need_states);
    return {gradients(layer_a, of_a, a), gradients(layer_b, of_b, b)};
  }

  static ForwardResult stored(ForwardResult r, const ForwardCall& call) {
    const ScalarType storage = call.arguments.input.scalar_type();
    r.output = to_dtype(r.output, storage);
    r.h_n = to_dtype(r.h_n, storage);
    r.c_n = to_dtype(r.c_n, storage);
    r.cells = to_dtype(r.cells, storage);
    r.saved_gates = to_dtype(r.saved_gates, storage);
    r.saved_c = to_dtype(r.saved_c, acc_dtype(storage));
    r.saved_m = to_dtype(r.saved_m, storage);
    r.h_in = call.save ? to_dtype(r.h_in, storage) : std::nullopt;
    return r;
  }

  static Gradients gradients(const Layer& layer, const GateGradients& g, const BackwardCall& call) {
    const Arguments& a = call.arguments;
    const auto store = [&](const Tensor& t) { return to_dtype(t, layer.storage); };
    Gradients r;
    if (call.need_input) {
      const Tensor d_input = store(layer.w_ih || layer.lengths ? P::input_gradient(layer, g.d_x_gates) : g.d_x_gates);
      r.input = d_input.dim() == a.input.dim() ? d_input : torch::stable::reshape(d_input, {layer.T, layer.B, layer.I});
    }
    if (call.need_weights) {
      const auto store_both = [&](const WeightAndBias& d, MaybeTensor& weight, MaybeTensor& bias) {
        if (d.weight) weight = store(*d.weight);
        if (d.bias) bias = store(*d.bias);
      };
      const auto [of_x, of_h] = P::weight_gradients(layer, g, call.saved, a.b_ih.has_value(), a.b_hh.has_value());
      store_both(of_x, r.w_ih, r.b_ih);
      store_both(of_h, r.w_hh, r.b_hh);
      if (layer.w_hr) r.w_hr = store(P::projection_gradient(layer, g, call.saved));
      if constexpr (C::kParameters > 0) r.w_cell = store(P::parameter_gradient(layer, g, call.saved));
    }
    if (call.need_states) {
      r.h0 = store(g.d_h0);
      if (g.d_c0) r.c0 = store(*g.d_c0);
    }
    return r;
  }
};

// Whether to save, or the packed weights: in their place in the schema stands the one or the other.
inline const char* name_for(const Names& names, bool) { return names.forward; }
inline const char* name_for(const Names& names, const Tensor&) { return names.packed; }
inline bool saves(bool save) { return save; }
inline bool saves(const Tensor&) { return false; }
inline MaybeTensor packed_weights(bool) { return std::nullopt; }
inline MaybeTensor packed_weights(const Tensor& packed) { return packed; }

// What torch hands over and takes back. Cells with the state h alone, then those with h and c.

template <template <typename> class Cell, typename SaveOrPacked>
ForwardCall h_forward(const Tensor& input, const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
                      const MaybeTensor& b_hh, const MaybeTensor& w_cell, const Tensor& h0,
                      const MaybeTensor& batch_sizes, bool reverse, SaveOrPacked how, const MaybeTensor& lengths,
                      const MaybeTensor& reset, const MaybeTensor& h_mask, const MaybeTensor& zone_h,
                      double grad_clip) {
  return {{name_for(kNames<Cell>, how),
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
           {lengths, reset, h_mask, zone_h, std::nullopt, grad_clip},
           packed_weights(how)},
          saves(how),
          false};
}

template <template <typename> class Cell>
BackwardCall h_backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const Tensor& input,
                        const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh,
                        const MaybeTensor& w_cell, const Tensor& h0, const MaybeTensor& batch_sizes, bool reverse,
                        const Tensor& output, const MaybeTensor& saved_gates, const MaybeTensor& h_in, bool need_input,
                        bool need_weights, bool need_states, const MaybeTensor& lengths, const MaybeTensor& reset,
                        const MaybeTensor& h_mask, const MaybeTensor& zone_h, double grad_clip) {
  ForwardCall forward = h_forward<Cell, bool>(input, w_ih, w_hh, b_ih, b_hh, w_cell, h0, batch_sizes, reverse, true,
                                              lengths, reset, h_mask, zone_h, grad_clip);
  forward.arguments.op = kNames<Cell>.backward;
  return {std::move(forward.arguments),
          {output, {}, {}, {}, dense(saved_gates), {}, {}, dense(h_in)},
          {grad_output, grad_h_n, std::nullopt, std::nullopt},
          need_input,
          need_weights,
          need_states};
}

struct HResults {
  static auto of(const ForwardResult& r, const ForwardCall&) {
    return std::tuple(r.output, r.h_n, r.saved_gates, r.h_in);
  }
  static auto of(const Gradients& g, const BackwardCall& call) {
    const Tensor& input = call.arguments.input;
    return std::tuple(or_nothing(g.input, input), or_nothing(g.w_ih, input), or_nothing(g.w_hh, input),
                      or_nothing(g.b_ih, input), or_nothing(g.b_hh, input), or_nothing(g.w_cell, input),
                      or_nothing(g.h0, input));
  }
};

template <template <typename> class Cell, typename SaveOrPacked>
ForwardCall c_forward(const Tensor& input, const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
                      const MaybeTensor& b_hh, const MaybeTensor& w_hr, const MaybeTensor& w_cell, const Tensor& h0,
                      const Tensor& c0, const MaybeTensor& batch_sizes, bool reverse, SaveOrPacked how,
                      const MaybeTensor& lengths, const MaybeTensor& reset, const MaybeTensor& h_mask,
                      const MaybeTensor& zone_h, double grad_clip, const MaybeTensor& zone_c, bool return_cells) {
  return {{name_for(kNames<Cell>, how),
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
           {lengths, reset, h_mask, zone_h, zone_c, grad_clip},
           packed_weights(how)},
          saves(how),
          return_cells};
}

template <template <typename> class Cell>
BackwardCall c_backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
                        const MaybeTensor& grad_cells, const Tensor& input, const MaybeTensor& w_ih, const Tensor& w_hh,
                        const MaybeTensor& b_ih, const MaybeTensor& b_hh, const MaybeTensor& w_hr,
                        const MaybeTensor& w_cell, const Tensor& h0, const Tensor& c0, const MaybeTensor& batch_sizes,
                        bool reverse, const Tensor& output, const MaybeTensor& saved_gates, const MaybeTensor& saved_c,
                        const MaybeTensor& saved_m, const MaybeTensor& h_in, bool need_input, bool need_weights,
                        bool need_states, const MaybeTensor& lengths, const MaybeTensor& reset,
                        const MaybeTensor& h_mask, const MaybeTensor& zone_h, double grad_clip,
                        const MaybeTensor& zone_c, bool return_cells) {
  ForwardCall forward = c_forward<Cell, bool>(input, w_ih, w_hh, b_ih, b_hh, w_hr, w_cell, h0, c0, batch_sizes, reverse,
                                              true, lengths, reset, h_mask, zone_h, grad_clip, zone_c, return_cells);
  forward.arguments.op = kNames<Cell>.backward;
  return {std::move(forward.arguments),
          {output, {}, {}, {}, dense(saved_gates), dense(saved_c), dense(saved_m), dense(h_in)},
          {grad_output, grad_h_n, grad_c_n, return_cells ? grad_cells : std::nullopt},
          need_input,
          need_weights,
          need_states};
}

struct CResults {
  static auto of(const ForwardResult& r, const ForwardCall&) {
    return std::tuple(r.output, r.h_n, *r.c_n, r.cells, r.saved_gates, r.saved_c, r.saved_m, r.h_in);
  }
  static auto of(const Gradients& g, const BackwardCall& call) {
    const Tensor& input = call.arguments.input;
    return std::tuple(or_nothing(g.input, input), or_nothing(g.w_ih, input), or_nothing(g.w_hh, input),
                      or_nothing(g.b_ih, input), or_nothing(g.b_hh, input), or_nothing(g.w_hr, input),
                      or_nothing(g.w_cell, input), or_nothing(g.h0, input), or_nothing(g.c0, input));
  }
};

// What torch calls: one layer, and two with the arguments and results of the one before those of the other.
template <class Operator, class Results, auto call>
struct Entry;
template <class Operator, class Results, typename Call, typename... Args, Call (*call)(Args...)>
struct Entry<Operator, Results, call> {
  static auto one(Args... args) {
    const Call asked = call(args...);
    return Results::of(Operator::run(asked), asked);
  }
  static auto both(Args... a, Args... b) {
    const Call asked_a = call(a...), asked_b = call(b...);
    const auto [of_a, of_b] = Operator::run_both(asked_a, asked_b);
    return std::tuple_cat(Results::of(of_a, asked_a), Results::of(of_b, asked_b));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Registration. Fake kernels are in fastrnn/fakes.py, autograd in fastrnn/autograd.py.

using Library = torch::stable::detail::StableLibrary;

// Arguments or results of a schema twice: with the names name_0, then name_1, and without defaults.
std::string twice(const std::string& list) {
  std::string both;
  for (const char* suffix : {"_0", "_1"}) {
    for (size_t begin = 0; begin < list.size();) {
      const size_t end = std::min(list.find(", ", begin), list.size());
      const std::string item = list.substr(begin, end - begin);
      both += (both.empty() ? "" : ", ") + item.substr(0, item.find('=')) + suffix;
      begin = end + 2;
    }
  }
  return both;
}

// The operator that runs two layers.
std::string both_of(const std::string& op) { return (op[0] == '_' ? "" : "_") + op + "_both"; }

template <template <typename> class Cell>
void define(Library& m, const std::string& name) {
  const bool has_c = Cell<float>::kStates > 1;
  const std::string floats =
      std::string("Tensor input, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, ") +
      (has_c ? "Tensor? w_hr, Tensor? w_cell, Tensor h0, Tensor c0, " : "Tensor? w_cell, Tensor h0, ") +
      "Tensor? batch_sizes, bool reverse, ";
  const std::string controls =
      std::string(
          "Tensor? lengths=None, Tensor? reset=None, Tensor? h_mask=None, Tensor? zone_h=None, "
          "float grad_clip=0") +
      (has_c ? ", Tensor? zone_c=None, bool return_cells=False" : "");
  const std::string saved = has_c ? "Tensor? saved_gates, Tensor? saved_c, Tensor? saved_m, Tensor? h_in"
                                  : "Tensor? saved_gates, Tensor? h_in";
  const std::string results = std::string("Tensor output, Tensor h_n, ") + (has_c ? "Tensor c_n, Tensor? cells, " : "");
  const std::string gradients =
      std::string("Tensor grad_input, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh, ") +
      (has_c ? "Tensor grad_w_hr, Tensor grad_w_cell, Tensor grad_h0, Tensor grad_c0"
             : "Tensor grad_w_cell, Tensor grad_h0");
  const auto def = [&](const std::string& op, const std::string& arguments, const std::string& returns) {
    m.def((op + "(" + arguments + ") -> (" + returns + ")").c_str());
    m.def((both_of(op) + "(" + twice(arguments) + ") -> (" + twice(returns) + ")").c_str());
  };
  def(name + "_layer", floats + "bool save, " + controls, results + saved);
  def("_" + name + "_layer_packed", floats + "Tensor packed, " + controls, results + saved);
  m.def(("_" + name + "_layer_pack(Tensor? w_ih, Tensor w_hh, Tensor? w_hr) -> Tensor").c_str());
  if (kIsTorchCell<Cell>) {
    m.def(("_" + name +
           "_layer_stack(Tensor input, Tensor[] weights, Tensor[] packed, Tensor[] states, Tensor? batch_sizes, "
           "bool has_biases, int runs, int directions) -> Tensor[]")
              .c_str());
  }
  def(name + "_layer_backward",
      std::string("Tensor? grad_output, Tensor? grad_h_n, ") + (has_c ? "Tensor? grad_c_n, Tensor? grad_cells, " : "") +
          floats + "Tensor output, " + saved + ", bool need_input, bool need_weights, bool need_states, " + controls,
      gradients);
}

template <class Run, class Results, auto forward, auto packed, auto backward, bool packs>
void implement(Library& m, const std::string& layer) {
  const auto impl = [&](const std::string& op, auto one, auto both) {
    m.impl(op.c_str(), one);
    m.impl(both_of(op).c_str(), both);
  };
  using Forward = Entry<Run, Results, forward>;
  using Backward = Entry<Run, Results, backward>;
  impl(layer, TORCH_BOX(&Forward::one), TORCH_BOX(&Forward::both));
  impl(layer + "_backward", TORCH_BOX(&Backward::one), TORCH_BOX(&Backward::both));
  if constexpr (packs) {
    using Packed = Entry<Run, Results, packed>;
    impl("_" + layer + "_packed", TORCH_BOX(&Packed::one), TORCH_BOX(&Packed::both));
    m.impl(("_" + layer + "_pack").c_str(), TORCH_BOX(&Run::pack));
  }
}

template <template <typename> class Cell, template <template <typename> class> class Path>
void implement(Library& m, const std::string& name) {
  using Run = Operator<Cell, Path>;
  if constexpr (kIsTorchCell<Cell>) m.impl(("_" + name + "_layer_stack").c_str(), TORCH_BOX(&Run::stack));
  constexpr bool packs = Path<Cell>::kPacks;
  if constexpr (Cell<float>::kStates > 1) {
    implement<Run, CResults, &c_forward<Cell, bool>, &c_forward<Cell, const Tensor&>, &c_backward<Cell>, packs>(
        m, name + "_layer");
  } else {
    implement<Run, HResults, &h_forward<Cell, bool>, &h_forward<Cell, const Tensor&>, &h_backward<Cell>, packs>(
        m, name + "_layer");
  }
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
#define FASTRNN_DEFINE(name, Cell) fastrnn::define<fastrnn::Cell>(m, #name);
  FASTRNN_FOR_EACH_CELL(FASTRNN_DEFINE)
}

#define FASTRNN_CPU(name, Cell) fastrnn::implement<fastrnn::Cell, fastrnn::FASTRNN_CPU_PATH>(m, #name);
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { FASTRNN_FOR_EACH_CELL(FASTRNN_CPU) }
#if defined(FASTRNN_CUDA_PATH)
#define FASTRNN_CUDA(name, Cell) fastrnn::implement<fastrnn::Cell, fastrnn::FASTRNN_CUDA_PATH>(m, #name);
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { FASTRNN_FOR_EACH_CELL(FASTRNN_CUDA) }
#endif
