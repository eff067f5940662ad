// SPDX-License-Identifier: BSD-3-Clause
// CPU: the kernels run the whole sequence. They read and write 16-bit types themselves: bfloat16 where the processor
// multiplies it, unless a step has two products; in the cells of torch.nn also bfloat16 where it has AVX2, and float16
// where it has AVX2 and F16C. All else is converted to float on the way in and back on the way out.
#pragma once

#include <array>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/team.h"
#include "layer.h"
#include "plan.h"

namespace fastrnn {

inline const ThreadPool& torch_threads() {
  thread_local ThreadPool pool{[](int64_t count, ThreadPool::Body body, void* context) {
                                 check_torch(torch_parallel_for(0, count, 1, body, context));
                               },
                               1};
  pool.threads = static_cast<int>(torch::stable::get_num_threads());
  return pool;
}

template <template <typename> class Cell>
struct CpuPath {
  static constexpr bool kTwoProducts = kResetsBefore<Cell<float>>;

  // The type of the tensors in a Layer.
  static ScalarType compute(ScalarType storage) {
    return taken(storage) == Taken::converted ? acc_dtype(storage) : storage;
  }
  // That of the gradients of gates, which products read.
  static ScalarType operand(ScalarType storage) {
    return taken(storage) == Taken::multiplied ? storage : acc_dtype(storage);
  }

  // Sequences of different lengths run in the order of their lengths.
  static constexpr bool kSorts = true;

  // The weights of a layer in the form that forward reads, which saves it the work.
  static constexpr bool kPacks = true;
  static Tensor pack(const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& w_hr) {
    const ScalarType t = compute(w_hh.scalar_type());
    const auto prepare = [&](const MaybeTensor& w) { return w ? MaybeTensor(dense(to_dtype(*w, t))) : std::nullopt; };
    const MaybeTensor ih = prepare(w_ih), hh = prepare(w_hh), hr = prepare(w_hr);
    MaybeTensor packed;
    dispatch_storage(t, [&](auto zero) {
      const auto weights = weights_of<decltype(zero)>(ih, *hh, hr);
      packed = empty(w_hh, {pack_weights_cpu<Cell>(weights, nullptr)}, ScalarType::Byte);
      pack_weights_cpu<Cell>(weights, out<char>(packed));
    });
    return *packed;
  }
  static int64_t packed_bytes(const Layer& l) {
    int64_t bytes = 0;
    dispatch_storage(compute(l.storage), [&](auto zero) {
      bytes = pack_weights_cpu<Cell>(weights_of<decltype(zero)>(l.w_ih, l.w_hh, l.w_hr), nullptr);
    });
    return bytes;
  }

  // Whether two layers can run at once, and whether that pays for these.
  static constexpr bool kRunsBoth = true;
  static bool runs_both(const Layer& a, const Layer& b) {
    const auto sizes = [](const Layer& l) { return std::array{l.T, l.B, l.I, l.H, l.P, l.N}; };
    return a.storage == b.storage && sizes(a) == sizes(b) &&
           plan_cpu({a.T, a.B, a.I, a.H, a.P, Cell<float>::kGates, torch_threads().threads, kTwoProducts || a.w_hr,
                     kNormalises<Cell<float>>, 2, taken(a.storage) == Taken::widened})
               .side_by_side;
  }

  static ForwardResult forward(const Layer& l, bool save, bool cells) {
    return std::move(run_forward(std::array{&l}, save, cells)[0]);
  }
  // Of two layers that do not wait for each other.
  static std::array<ForwardResult, 2> forward_both(const Layer& a, const Layer& b, bool save, bool cells) {
    return run_forward(std::array{&a, &b}, save, cells);
  }

  // What the gradients of gates are in: memory of this thread, for its next call as well.
  struct KeptGradients : GateGradients {
    std::vector<Buffer<char>> memory;
  };
  static KeptGradients backward(const Layer& l, const ForwardResult& r, const ResultGradients& d, bool need_states) {
    return std::move(run_backward(std::array{&l}, std::array{&r}, std::array{&d}, need_states)[0]);
  }
  static std::array<KeptGradients, 2> backward_both(const Layer& a, const Layer& b, const ForwardResult& saved_a,
                                                    const ForwardResult& saved_b, const ResultGradients& d_a,
                                                    const ResultGradients& d_b, bool need_states) {
    return run_backward(std::array{&a, &b}, std::array{&saved_a, &saved_b}, std::array{&d_a, &d_b}, need_states);
  }

  // Of the shape of the input.
  static Tensor input_gradient(const Layer& l, const Tensor& d_x_gates) {
    const ScalarType t = l.w_ih ? compute(l.storage) : d_x_gates.scalar_type();
    const Tensor d_input = l.empty_like_input(l.I, t);
    dispatch_storage(t, [&](auto zero) {
      using S = decltype(zero);
      std::vector<S*> rows;
      rows.reserve(l.real_rows());
      S* const first = out<S>(d_input);
      for_each_row(l, [&](int64_t s, int64_t b) { rows.push_back(first + l.steps.place(s, b) * l.I); });
      if (l.w_ih) {
        using R = typename TypesOf<S>::operand_t;
        input_gradient_cpu<S>({l.real_rows(), d_x_gates.size(1), l.I, in<R>(d_x_gates), in<S>(l.w_ih), rows.data()},
                              torch_threads());
      } else {
        const S* d_row = in<S>(d_x_gates);
        for (S* row : rows) std::copy_n(d_row, l.I, row), d_row += l.I;
      }
    });
    if (l.lengths) clear_past_end(l, d_input);
    return d_input;
  }

  // Of W_ih and of W_hh: together where the gradients of their gates are the same.
  static std::array<WeightAndBias, 2> weight_gradients(const Layer& l, const GateGradients& g,
                                                       const ForwardResult& saved, bool bias_ih, bool bias_hh) {
    const auto list_x = [&](auto zero, auto& rows) {
      using T = decltype(zero);
      const T* const input = in<T>(l.input);
      const InputRows places = l.input_rows();
      for_each_row(l, [&](int64_t s, int64_t b) { rows.push_back(input + places.offset(l.steps, s, b)); });
    };
    const ScalarType t = compute(l.storage);
    const Tensor output = dense(to_dtype(saved.output, t));
    const MaybeTensor h_in = dense(to_dtype(saved.h_in, t));
    const MaybeTensor zeros = l.reset ? MaybeTensor(empty(output, {l.P}, t)) : std::nullopt;
    if (zeros) set_zero(*zeros);
    const auto list_h = [&](auto zero, auto& rows) {
      using T = decltype(zero);
      const uint8_t* reset = in<uint8_t>(l.reset);
      const T *h0 = in<T>(l.h0), *outputs = in<T>(output), *masked = in<T>(h_in), *zero_row = in<T>(zeros);
      for_each_row(l, [&](int64_t s, int64_t b) {
        const T* h = masked ? masked + l.steps.row(s, b) * l.P : h_before(l.steps, reset, h0, outputs, l.P, s, b);
        rows.push_back(h ? h : zero_row);
      });
    };
    const Wanted x{l.I, l.w_ih.has_value(), bias_ih, list_x};
    const Wanted h{l.P, true, bias_hh, list_h};
    std::array<WeightAndBias, 2> d;
    if constexpr (Cell<float>::kGateGradsDiffer) {
      d = {gradients_of(l, g.d_x_gates, x)[0], gradients_of(l, g.d_h_gates, h)[0]};
    } else {
      d = gradients_of(l, g.d_x_gates, x, h);
    }
    if constexpr (kTwoProducts) {
      ForwardResult with_m;  // r h again, from the r that was saved
      with_m.saved_m = empty(output, {l.N, l.H}, t);
      dispatch_compute(t, [&](auto zero) {
        using T = decltype(zero);
        std::vector<const T*> h;
        list_h(zero, h);
        const Tensor gates = dense(to_dtype(*saved.saved_gates, t));
        const T* const first_r = in<T>(gates);
        T* const first_m = out<T>(with_m.saved_m);
        in_parallel(threads_for(l), l.real_rows(), [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const T *r = first_r + n * Cell<float>::kSaved * l.H, *h_n = h[n];
            T* m = first_m + n * l.H;
            for (int64_t j = 0; j < l.H; ++j) m[j] = r[j] * h_n[j];
          }
        });
      });
      d[1].weight = cat_rows(*d[1].weight, projection_gradient(l, g, with_m));
    }
    return d;
  }

  // The sum over all rows of the gradient of a gate times c before the step, or as the step made it. A cell that
  // normalises has summed already.
  static Tensor parameter_gradient(const Layer& l, const GateGradients& g, const ForwardResult& r) {
    if constexpr (kNormalises<Cell<float>>) {
      return *g.d_w_cell;
    } else {
      return peephole_gradient(l, g, r);
    }
  }

  static Tensor projection_gradient(const Layer& l, const GateGradients& g, const ForwardResult& saved) {
    const Tensor m = dense(to_dtype(*saved.saved_m, compute(l.storage)));
    const auto rows_of_m = [&](auto zero, auto& rows) {
      const auto* const first = in<decltype(zero)>(m);
      for (int64_t n = 0; n < l.real_rows(); ++n) rows.push_back(first + n * l.H);
    };
    return *gradients_of(l, *g.d_projected, Wanted{l.H, true, false, rows_of_m})[0].weight;
  }

 private:
  // For work on every unit of every row.
  static const ThreadPool& threads_for(const Layer& l) {
    return worth_threads(l.N * l.H) ? torch_threads() : kOneThread;
  }

  static Taken taken(ScalarType storage) {
    const Taken taken = storage == ScalarType::Half       ? takes_half()
                        : storage == ScalarType::BFloat16 ? takes_bf16()
                                                          : Taken::converted;
    const bool has_kernel = taken == Taken::multiplied ? !kTwoProducts : kIsTorchCell<Cell>;
    return has_kernel ? taken : Taken::converted;
  }

  // Of states that were converted to 16 bits after forward: those before a step too, which forward had in float.
  static Rounding rounding_of_converted(ScalarType storage) {
    const Rounding once = storage == ScalarType::Half ? kRounding<Half> : kRounding<Bf16>;
    return {2 * once.share, 2 * once.least};
  }

  // Arguments in the type of the sums.
  struct Wide {
    MaybeTensor b_ih, b_hh, w_cell, c0;

    Wide() = default;
    explicit Wide(const Layer& l) : b_ih(wide(l.b_ih)), b_hh(wide(l.b_hh)), w_cell(wide(l.w_cell)), c0(wide(l.c0)) {}
    static MaybeTensor wide(const MaybeTensor& t) {
      return t ? MaybeTensor(to_dtype(*t, acc_dtype(t->scalar_type()))) : std::nullopt;
    }
  };

  template <size_t n>
  static std::array<ForwardResult, n> run_forward(const std::array<const Layer*, n>& layers, bool save, bool cells) {
    std::array<ForwardResult, n> results;
    std::array<Wide, n> wide;
    for (size_t i = 0; i < n; ++i) {
      results[i] = empty_result(*layers[i], save, cells);
      wide[i] = Wide(*layers[i]);
    }
    dispatch_storage(compute(layers[0]->storage), [&](auto zero) {
      using S = decltype(zero);
      SequenceForward<S> passes[n] = {};
      for (size_t i = 0; i < n; ++i) passes[i] = parameters<S>(*layers[i], results[i], wide[i]);
      sequence_forward_cpu<Cell, S>(passes, n, torch_threads());
    });
    for (size_t i = 0; i < n; ++i) {
      if (!layers[i]->lengths) continue;
      clear_past_end(*layers[i], results[i].output);
      if (cells) clear_past_end(*layers[i], *results[i].cells);
    }
    return results;
  }

  static ForwardResult empty_result(const Layer& l, bool save, bool cells) {
    using C = Cell<float>;
    const ScalarType t = compute(l.storage), acc = acc_dtype(t);
    ForwardResult r;
    r.output = l.empty_like_input(l.P, t);
    r.h_n = empty(l.input, {l.B, l.P}, t);
    if (C::kStates > 1) r.c_n = empty(l.input, sizes_of(*l.c0), acc);
    if (cells) r.cells = l.empty_like_input(l.H, t);
    if (l.h_mask) r.h_in = empty(l.input, {l.N, l.P}, t);
    if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
    if (save && C::kStates > 1) r.saved_c = empty(l.input, {(C::kStates - 1) * l.N, l.H}, acc);
    if (save && l.w_hr) r.saved_m = empty(l.input, {l.N, l.H}, t);
    return r;
  }

  template <size_t n>
  static std::array<KeptGradients, n> run_backward(const std::array<const Layer*, n>& layers,
                                                   const std::array<const ForwardResult*, n>& saved,
                                                   const std::array<const ResultGradients*, n>& d, bool need_states) {
    const ScalarType t = compute(layers[0]->storage), acc = acc_dtype(t);
    std::array<KeptGradients, n> gradients;
    std::array<ForwardResult, n> r;
    std::array<ResultGradients, n> d_r;
    std::array<Wide, n> wide;
    for (size_t i = 0; i < n; ++i) {
      gradients[i] = empty_gradients(*layers[i]);
      r[i].output = dense(to_dtype(saved[i]->output, t));
      r[i].saved_gates = dense(to_dtype(saved[i]->saved_gates, t));
      r[i].saved_c = dense(to_dtype(saved[i]->saved_c, acc));
      d_r[i] = {dense(to_dtype(d[i]->output, t)), dense(to_dtype(d[i]->h_n, acc)), dense(to_dtype(d[i]->c_n, acc)),
                dense(to_dtype(d[i]->cells, t))};
      wide[i] = Wide(*layers[i]);
    }
    dispatch_storage(t, [&](auto zero) {
      using S = decltype(zero);
      SequenceBackward<S> passes[n] = {};
      for (size_t i = 0; i < n; ++i) {
        passes[i] = parameters<S>(*layers[i], r[i], d_r[i], wide[i], gradients[i], need_states);
      }
      sequence_backward_cpu<Cell, S>(passes, n, torch_threads());
    });
    return gradients;
  }

  static KeptGradients empty_gradients(const Layer& l) {
    using C = Cell<float>;
    const ScalarType acc = acc_dtype(compute(l.storage));
    KeptGradients g;
    g.d_x_gates = empty_rows(l, l.w_hh.size(0), g);
    g.d_h_gates = C::kGateGradsDiffer ? empty_rows(l, C::kGates * l.H, g) : g.d_x_gates;
    if (l.w_hr || kTwoProducts) g.d_projected = empty_rows(l, l.P, g);
    g.d_h0 = empty(l.input, {l.B, l.P}, acc);
    if (C::kStates > 1) g.d_c0 = empty(l.input, sizes_of(*l.c0), acc);
    if (kNormalises<C>) g.d_w_cell = empty(l.input, {C::kParameters * l.H}, acc);
    return g;
  }

  static Tensor empty_rows(const Layer& l, int64_t width, KeptGradients& g) {
    const ScalarType t = operand(l.storage);
    if (!l.w_ih) return empty(l.input, {l.N, width}, t);  // the caller gets it: the gradient of the input
    dispatch_storage(compute(l.storage), [&](auto zero) {
      using R = typename TypesOf<decltype(zero)>::operand_t;
      g.memory.emplace_back(l.N * width * static_cast<int64_t>(sizeof(R)));
    });
    return over(g.memory.back().get(), {l.N, width}, t);
  }

  static Tensor peephole_gradient(const Layer& l, const GateGradients& g, const ForwardResult& r) {
    using C = Cell<float>;
    const ScalarType t = acc_dtype(l.storage);
    const Tensor saved_c = dense(to_dtype(*r.saved_c, t)), saved_gates = dense(to_dtype(*r.saved_gates, t));
    const Tensor d_x_gates = to_dtype(g.d_x_gates, t);
    const MaybeTensor first_c = Wide::wide(l.c0);
    const Tensor d_w = empty(l.input, {C::kParameters * l.H}, t);
    set_zero(d_w);
    dispatch_compute(t, [&](auto zero) {
      using T = decltype(zero);
      const T *c = in<T>(saved_c), *gates = in<T>(saved_gates), *d_gates = in<T>(d_x_gates), *c0 = in<T>(first_c);
      const uint8_t* resets = in<uint8_t>(l.reset);
      T* sums = out<T>(d_w);
      const auto add_row = [&](int64_t s, int64_t b, int64_t unit_begin, int64_t unit_end) {
        const int64_t row = l.steps.row(s, b);
        const bool reset = resets && resets[l.steps.place(s, b)];
        const bool first = b >= l.steps.count(s - 1);
        const T* c_before = first ? c0 + l.steps.state(b) * l.H : c + l.steps.row(s - 1, b) * l.H;
        for (int64_t j = unit_begin; j < unit_end; ++j) {
          const Values<T, C::kStates> prev = {T(0), reset ? T(0) : c_before[j]};
          Values<T, C::kSaved> saved;
          for (int k = 0; k < C::kSaved; ++k) saved[k] = gates[(row * C::kSaved + k) * l.H + j];
          const T made = l.zone_c ? Cell<T>::restore_c(saved, prev) : c[row * l.H + j];
          for (int k = 0; k < C::kParameters; ++k) {
            const T d_gate = d_gates[(row * C::kGates + C::parameter_gate(k)) * l.H + j];
            sums[k * l.H + j] += d_gate * (C::parameter_sees_next(k) ? made : prev[1]);
          }
        }
      };
      constexpr int64_t kUnits = 16;  // of a cache line
      in_parallel(threads_for(l), (l.H + kUnits - 1) / kUnits, [&](int64_t begin, int64_t end) {
        const int64_t unit_begin = begin * kUnits, unit_end = std::min(l.H, end * kUnits);
        for_each_row(l, [&](int64_t s, int64_t b) { add_row(s, b, unit_begin, unit_end); });
      });
    });
    return d_w;
  }

  // What the second product of a step multiplies with: the projection, or the rows of the last gate.
  template <typename S>
  static const S* second_weight(const Tensor& w_hh, const MaybeTensor& w_hr) {
    return kTwoProducts ? in<S>(w_hh) + Cell<float>::kGates * w_hh.size(1) * w_hh.size(1) : in<S>(w_hr);
  }

  // Calls f with a value of the type that the kernels read.
  template <typename F>
  static void dispatch_storage(ScalarType t, const F& f) {
    if constexpr (kIsTorchCell<Cell>) {
      if (t == ScalarType::Half) return f(Half{});
      if (t == ScalarType::BFloat16 && takes_bf16() == Taken::widened) return f(WidenedBf16{});
    }
    if constexpr (!kTwoProducts) {
      if (t == ScalarType::BFloat16) return f(Bf16{});
    }
    dispatch_compute(t, f);
  }

  template <typename S>
  static SequenceForward<S> weights_of(const MaybeTensor& w_ih, const Tensor& w_hh, const MaybeTensor& w_hr) {
    SequenceForward<S> p{};
    p.I = w_ih ? w_ih->size(1) : 0;
    p.H = w_hh.size(0) / (Cell<float>::kGates + kTwoProducts);
    p.P = w_hh.size(1);
    p.w_ih = in<S>(w_ih);
    p.w_hh = in<S>(w_hh);
    p.w_hr = second_weight<S>(w_hh, w_hr);
    return p;
  }

  template <typename S, typename T = typename TypesOf<S>::acc_t>
  static SequenceForward<S> parameters(const Layer& l, const ForwardResult& r, const Wide& wide) {
    SequenceForward<S> p = weights_of<S>(l.w_ih, l.w_hh, l.w_hr);
    p.B = l.B;
    p.I = l.I;
    p.N = l.N;
    p.steps = l.steps;
    p.input = in<S>(l.input);
    p.input_rows = l.input_rows();
    p.packed = in<void>(l.packed);
    p.b_ih = in<T>(wide.b_ih);
    p.b_hh = in<T>(wide.b_hh);
    p.w_cell = in<T>(wide.w_cell);
    p.h0 = in<S>(l.h0);
    p.c0 = in<T>(wide.c0);
    p.controls = l.controls<S>();
    p.output = out<S>(r.output);
    p.h_n = out<S>(r.h_n);
    p.c_n = out<T>(r.c_n);
    p.cells = out<S>(r.cells);
    p.saved_gates = out<S>(r.saved_gates);
    p.saved_c = out<T>(r.saved_c);
    p.saved_m = out<S>(r.saved_m);
    p.h_in = out<S>(r.h_in);
    return p;
  }

  template <typename S, typename T = typename TypesOf<S>::acc_t, typename R = typename TypesOf<S>::operand_t>
  static SequenceBackward<S> parameters(const Layer& l, const ForwardResult& r, const ResultGradients& d,
                                        const Wide& wide, const GateGradients& g, bool need_states) {
    SequenceBackward<S> p{};
    p.B = l.B;
    p.H = l.H;
    p.P = l.P;
    p.N = l.N;
    p.steps = l.steps;
    p.w_hh = in<S>(l.w_hh);
    p.w_hr = second_weight<S>(l.w_hh, l.w_hr);
    p.w_cell = in<T>(wide.w_cell);
    p.h0 = in<S>(l.h0);
    p.c0 = in<T>(wide.c0);
    p.controls = l.controls<S>();
    if (compute(l.storage) != l.storage) p.controls.rounding = rounding_of_converted(l.storage);
    p.output = in<S>(r.output);
    p.saved_gates = in<S>(r.saved_gates);
    p.saved_c = in<T>(r.saved_c);
    p.d_output = in<S>(d.output);
    p.d_h_n = in<T>(d.h_n);
    p.d_c_n = in<T>(d.c_n);
    p.d_cells = in<S>(d.cells);
    p.need_states = need_states;
    p.d_x_gates = out<R>(g.d_x_gates);
    p.d_h_gates = out<R>(g.d_h_gates);
    p.d_projected = out<R>(g.d_projected);
    p.d_h0 = out<T>(g.d_h0);
    p.d_c0 = out<T>(g.d_c0);
    p.d_w_cell = out<T>(g.d_w_cell);
    return p;
  }

  // Calls f(step, position) for the rows of what is packed, in their order. Addresses and strides of tensors are asked
  // before: each is a call into torch.
  template <typename F>
  static void for_each_row(const Layer& l, const F& f) {
    for (int64_t t = 0; t < l.T; ++t) {
      const int64_t s = l.steps.time(t);  // the step that runs at time t: reversal is its own inverse
      for (int64_t b = 0; b < l.steps.count(s); ++b) f(s, b);
    }
  }

  // Sets to zero what lies past the ends of the sequences: rows [T, B, width].
  static void clear_past_end(const Layer& l, const Tensor& rows) {
    const int64_t row_bytes = rows.numel() / std::max<int64_t>(1, l.N) * static_cast<int64_t>(rows.element_size());
    char* first = out<char>(rows);
    for (int64_t s = 0; s < l.T; ++s) {
      for (int64_t b = l.steps.count(s); b < l.B; ++b) {
        std::memset(first + l.steps.place(s, b) * row_bytes, 0, static_cast<size_t>(row_bytes));
      }
    }
  }

  // What is to be made of the gradients of gates. list(zero, rows) appends the rows [.., K] that the weight was
  // multiplied with, in the order of what is packed.
  template <typename ListRows>
  struct Wanted {
    int64_t K;
    bool weight, bias;
    const ListRows& list;
  };
  template <typename ListRows>
  Wanted(int64_t, bool, bool, const ListRows&) -> Wanted<ListRows>;

  template <typename... ListRows>
  static std::array<WeightAndBias, sizeof...(ListRows)> gradients_of(const Layer& l, const Tensor& d_gates,
                                                                     const Wanted<ListRows>&... wanted) {
    const ScalarType t = compute(l.storage);
    const int64_t M = d_gates.size(1);
    std::array<WeightAndBias, sizeof...(ListRows)> d;
    dispatch_storage(t, [&](auto zero) {
      using S = decltype(zero);
      std::vector<const S*> rows[2];
      typename WeightGradient<S>::Weight weights[2];
      int i = 0;
      const auto prepare = [&](const auto& of) {
        if (of.weight) d[i].weight = empty(d_gates, {M, of.K}, t);
        if (of.bias) d[i].bias = empty(d_gates, {M}, t);
        rows[i].reserve(l.real_rows());
        if (of.weight) of.list(zero, rows[i]);
        weights[i] = {of.K, rows[i].data(), out<S>(d[i].weight), out<S>(d[i].bias)};
        ++i;
      };
      (prepare(wanted), ...);
      const auto* const gates = in<typename TypesOf<S>::operand_t>(d_gates);
      weight_gradient_cpu<S>({l.real_rows(), M, gates, weights[0], weights[1]}, torch_threads());
    });
    return d;
  }
};

}  // namespace fastrnn
