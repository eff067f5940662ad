// SPDX-License-Identifier: BSD-3-Clause
// CUDA, path "gates": one matrix product and one fused gate kernel per step, for any shape and type. Enqueues on
// torch's current stream, never waits for the device, and can be captured in a graph.
#pragma once

#include <cstdlib>
#include <cstring>

#include "layer.h"

#if !defined(FASTRNN_EMULATE)
// Weak: torch's CPU builds lack it, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#include <torch/csrc/stable/accelerator.h>
#endif

// CUDA's 16-bit types. Only pointers to them pass through here, so that this file needs no CUDA header.
struct __half;
struct __nv_bfloat16;

namespace fastrnn {

// Makes the device of a tensor current, and knows its stream.
class OnDevice {
 public:
#if defined(FASTRNN_EMULATE)
  explicit OnDevice(int32_t /*index*/) {}
#else
  explicit OnDevice(int32_t index) : guard_(index) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "fastrnn: this torch was built without CUDA");
    check_torch(aoti_torch_get_current_cuda_stream(index, &stream_));
  }
#endif
  explicit OnDevice(const Tensor& t) : OnDevice(t.get_device_index()) {}
  CudaStream stream() const { return stream_; }

 private:
#if !defined(FASTRNN_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  CudaStream stream_ = nullptr;
};

#if !defined(FASTRNN_EMULATE) && !defined(FASTRNN_WITH_PERSISTENT)
// The one path of this build: FASTRNN_PATH may ask for no other.
inline void check_path() {
  const char* path = std::getenv("FASTRNN_PATH");
  check(!path || !*path || std::strcmp(path, "gates") == 0, "fastrnn: expected FASTRNN_PATH to be gates, got ",
        path ? path : "", ": build with FASTRNN_PERSISTENT=1 for the persistent kernels");
}
#else
inline void check_path() {}  // PersistentPath chooses
#endif

inline void check_launch(CudaStatus status) { check(status == 0, "fastrnn: CUDA error: ", cuda_status_string(status)); }

template <typename Storage, typename Acc>
struct Types {
  using storage = Storage;
  using acc = Acc;
};

// Calls f with the C++ types of a storage type.
template <typename F>
void dispatch_storage(ScalarType t, const F& f) {
  switch (t) {
    case ScalarType::Double:
      return f(Types<double, double>{});
    case ScalarType::Float:
      return f(Types<float, float>{});
    case ScalarType::Half:
      return f(Types<__half, float>{});
    case ScalarType::BFloat16:
      return f(Types<__nv_bfloat16, float>{});
    default:
      check(false, "fastrnn: unsupported dtype ", dtype_name(t));
  }
}

template <template <typename> class Cell>
struct GatesPath {
  using C = Cell<float>;
  static ScalarType compute(ScalarType storage) { return storage; }

  // The row'th row of a matrix, or null.
  template <typename T>
  static T* to(const MaybeTensor& t, int64_t row) {
    if (!t) return nullptr;
    char* first = static_cast<char*>(t->mutable_data_ptr());
    return reinterpret_cast<T*>(first + row * t->size(t->dim() - 1) * static_cast<int64_t>(t->element_size()));
  }
  template <typename T>
  static const T* at(const MaybeTensor& t, int64_t row) {
    return to<T>(t, row);
  }

  // Lengths stay on the device: every step runs for every row, and leaves out those that have ended.
  static constexpr bool kSorts = false;

  // Whether two layers can run at once.
  static constexpr bool kRunsBoth = false;

  // Whether weights can be packed before a call.
  static constexpr bool kPacks = false;

  // The controls of the rows [begin, ...) of the s-th step.
  template <typename T>
  static StepControls<T> controls(const Layer& l, int64_t s, int64_t begin) {
    const int64_t row = l.row_begin[l.steps.time(s)] + begin;
    const auto zone = [&](const MaybeTensor& z) { return is_one_value(z) ? in<T>(z) : at<T>(z, row); };
    return {l.lengths ? in<int64_t>(l.lengths) + begin : nullptr,
            l.steps.time(s),
            l.reset ? in<uint8_t>(l.reset) + row : nullptr,
            {zone(l.zone_h), zone(l.zone_c)},
            {is_one_value(l.zone_h), is_one_value(l.zone_c)}};
  }

  static ForwardResult forward(const Layer& l, bool save, bool cells) {
    check_path();
    const OnDevice device(l.input);
    const ScalarType t = l.storage, acc = acc_dtype(t);
    ForwardResult r;
    r.output = l.empty_like_input(l.P, t);
    r.h_n = empty(l.input, {l.B, l.P}, t);  // h after the last step of each row so far
    copy_to(r.h_n, l.h0);
    if (C::kStates > 1) {
      r.c_n = empty(l.input, sizes_of(*l.c0), acc);
      copy_to(*r.c_n, *l.c0);
    }
    if (cells) r.cells = l.empty_like_input(l.H, t);
    if (save && C::kSaved > 0) r.saved_gates = empty(l.input, {l.N, C::kSaved * l.H}, t);
    if (save && C::kStates > 1) r.saved_c = empty(l.input, {(C::kStates - 1) * l.N, l.H}, acc);
    if (save && l.w_hr) r.saved_m = empty(l.input, {l.N, l.H}, t);
    if (save && l.h_mask) r.h_in = empty(l.input, {l.N, l.P}, t);

    const Tensor x_gates = flat(dense(l.w_ih ? linear(l.input, *l.w_ih, l.b_ih) : l.input), l.N);
    const Tensor h_gates = empty(l.input, {l.B, C::kGates * l.H}, t);
    const Tensor w_hh_t = transposed(first_weight(l));
    MaybeTensor w_hr_t;
    if (l.w_hr) w_hr_t = transposed(*l.w_hr);
    const Tensor output = flat(r.output, l.N);
    MaybeTensor unprojected = r.saved_m;
    if (l.w_hr && !save) unprojected = empty(l.input, {l.B, l.H}, t);
    const bool changes_h = l.h_mask || l.reset;  // before the product
    const MaybeTensor h_in = changes_h && !r.h_in ? MaybeTensor(empty(l.input, {l.B, l.P}, t)) : std::nullopt;

    const MaybeTensor scratch = make_scratch(l);
    std::optional<SecondProduct> second;
    if (kTwoProducts) second = SecondProduct(l);

    for (int64_t s = 0; s < l.T; ++s) {
      const int64_t row = l.row_begin[l.steps.time(s)], count = l.steps.count(s);
      Tensor h = rows(r.h_n, 0, count);
      if (changes_h) {
        h = r.h_in ? rows(*r.h_in, row, count) : rows(*h_in, 0, count);
        make_product_input(l, s, r.h_n, h, device);
      }
      const Tensor products = rows(h_gates, 0, count);
      mm_out(products, h, w_hh_t);
      if constexpr (kTwoProducts) {
        second->forward(l, s, r, x_gates, products, h, output, device);
        continue;
      }
      const int64_t m_row = save ? row : 0;
      dispatch_storage(t, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        const T* h_prev = l.w_hr ? nullptr : in<T>(r.h_n);
        GatesForward<T, A> p{};
        p.B = count;
        p.H = l.H;
        p.x_gates = at<T>(x_gates, row);
        p.h_gates = in<T>(products);
        p.b_hh = in<T>(l.b_hh);
        p.w_cell = in<T>(l.w_cell);
        p.h_prev = h_prev;
        p.controls = controls<T>(l, s, 0);
        p.c = out<A>(r.c_n);
        p.c_stride = l.B * l.H;
        p.h_next = l.w_hr ? to<T>(unprojected, m_row) : to<T>(output, row);
        p.h_state = l.w_hr ? nullptr : out<T>(r.h_n);
        p.cells = to<T>(r.cells, row);
        p.saved_gates = to<T>(r.saved_gates, row);
        p.saved_c = to<A>(r.saved_c, row);
        p.saved_c_stride = l.N * l.H;
        p.scratch = out<A>(scratch);
        if constexpr (kNormalises<C>) {
          check_launch(launch_norm_forward<Cell>(p, device.stream()));
        } else if constexpr (!kTwoProducts) {
          check_launch(launch_gates_forward<Cell>(p, device.stream()));
        }
        if (!l.w_hr) return;
        mm_out(rows(output, row, count), rows(*unprojected, m_row, count), *w_hr_t);
        check_launch(launch_update_h(
            count, l.P, KeepLiving<T>{at<T>(output, row), in<int64_t>(l.lengths), l.steps.time(s), out<T>(r.h_n)},
            device.stream()));
      });
    }
    return r;
  }

  static constexpr bool kTwoProducts = kResetsBefore<C>;
  // The rows of W_hh that multiply h. Of a cell with two products, the last gate's multiply r h.
  static Tensor first_weight(const Layer& l) { return kTwoProducts ? rows(l.w_hh, 0, C::kGates * l.H) : l.w_hh; }
  static Tensor second_weight(const Layer& l) { return rows(l.w_hh, C::kGates * l.H, l.H); }

  // The rest of a step of a cell that resets before, and what it sets aside.
  struct SecondProduct {
    Tensor z, m, product;  // [B, H]
    Tensor weight_t;       // [H, H]

    explicit SecondProduct(const Layer& l)
        : z(empty(l.input, {l.B, l.H}, acc_dtype(l.storage))),
          m(empty(l.input, {l.B, l.H}, l.storage)),
          product(empty(l.input, {l.B, l.H}, l.storage)),
          weight_t(transposed(second_weight(l))) {}

    void forward(const Layer& l, int64_t s, const ForwardResult& r, const Tensor& x_gates, const Tensor& h_gates,
                 const Tensor& h_in, const Tensor& output, const OnDevice& device) const {
      const int64_t row = l.row_begin[l.steps.time(s)], count = l.steps.count(s);
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        const StepControls<T> c = controls<T>(l, s, 0);
        const ResetForward<T, A> gates{l.H, at<T>(x_gates, row), in<T>(h_gates), in<T>(h_in),
                                       c,   out<A>(z),           out<T>(m),      to<T>(r.saved_gates, row)};
        check_launch(launch_update_h(count, l.H, gates, device.stream()));
        mm_out(rows(product, 0, count), rows(m, 0, count), weight_t);
        const ResetFinish<T, A> finish{
            l.H,           at<T>(x_gates, row),      in<T>(product), in<T>(r.h_n), in<A>(z), c, to<T>(output, row),
            out<T>(r.h_n), to<T>(r.saved_gates, row)};
        check_launch(launch_update_h(count, l.H, finish, device.stream()));
      });
    }
  };

  // What a kernel that normalises sets aside for a row.
  static MaybeTensor make_scratch(const Layer& l) {
    if constexpr (kNormalises<C>) return empty(l.input, {l.B, C::kScratch * l.H}, acc_dtype(l.storage));
    return std::nullopt;
  }

  // to = what the product of the s-th step reads, from h before it.
  static void make_product_input(const Layer& l, int64_t s, const Tensor& h, const Tensor& to, const OnDevice& device) {
    dispatch_storage(l.storage, [&](auto types) {
      using T = typename decltype(types)::storage;
      const ProductInput<T> update{in<T>(h), in<T>(l.h_mask), controls<T>(l, s, 0).reset, out<T>(to)};
      check_launch(launch_update_h(l.steps.count(s), l.P, update, device.stream()));
    });
  }

  static GateGradients backward(const Layer& l, const ForwardResult& saved, const ResultGradients& d,
                                bool need_states) {
    const OnDevice device(l.input);
    const ScalarType t = l.storage, acc = acc_dtype(t);
    const auto carried = [&](const std::vector<int64_t>& sizes, const MaybeTensor& d_final) {
      const Tensor d_state = empty(l.input, sizes, acc);
      if (d_final) {
        copy_to(d_state, *d_final);
      } else {
        set_zero(d_state);
      }
      return d_state;
    };
    const auto by_rows = [&](const MaybeTensor& d_rows) {
      return d_rows ? MaybeTensor(flat(dense(*d_rows), l.N)) : std::nullopt;
    };
    GateGradients g;
    g.d_x_gates = empty(l.input, {l.N, l.w_hh.size(0)}, t);
    g.d_h_gates = C::kGateGradsDiffer ? empty(l.input, {l.N, C::kGates * l.H}, t) : g.d_x_gates;
    g.d_h0 = carried({l.B, l.P}, d.h_n);
    if (C::kStates > 1) g.d_c0 = carried(sizes_of(*l.c0), d.c_n);
    if (l.w_hr || kTwoProducts) g.d_projected = empty(l.input, {l.N, l.P}, t);
    if (C::kParameters > 0) {
      g.d_w_rows = empty(l.input, {kNormalises<C> ? l.B : l.N, C::kParameters * l.H}, acc);
      if (kNormalises<C>) set_zero(*g.d_w_rows);
    }
    const Backward b{
        l, saved, g, by_rows(d.output), by_rows(d.cells), flat(saved.output, l.N),
        // Else the rows before are those of the step before.
        (l.lengths && l.steps.reverse) || kTwoProducts ? MaybeTensor(h_before(l, saved, device)) : std::nullopt,
        l.c0 ? MaybeTensor(to_dtype(*l.c0, acc)) : std::nullopt, empty(l.input, {l.B, l.P}, t),
        l.w_hr ? MaybeTensor(empty(l.input, {l.B, l.H}, t)) : std::nullopt,
        l.w_hr ? MaybeTensor(carried({l.B, l.H}, std::nullopt)) : std::nullopt, make_scratch(l), device};
    for (int64_t s = l.T - 1; s >= 0; --s) b.step(s, s > 0 || need_states);
    return g;
  }

  static Tensor input_gradient(const Layer& l, const Tensor& d_x_gates) {
    return l.w_ih ? mm(d_x_gates, *l.w_ih) : d_x_gates;
  }

  // Of W_ih and of W_hh.
  static std::array<WeightAndBias, 2> weight_gradients(const Layer& l, const GateGradients& g,
                                                       const ForwardResult& saved, bool bias_ih, bool bias_hh) {
    return {input_weight_gradient(l, g, bias_ih), recurrent_weight_gradient(l, g, saved, bias_hh)};
  }
  static WeightAndBias input_weight_gradient(const Layer& l, const GateGradients& g, bool bias) {
    return {l.w_ih ? MaybeTensor(mm(transposed(g.d_x_gates), real_input(l))) : std::nullopt,
            bias ? MaybeTensor(sum_rows(g.d_x_gates)) : std::nullopt};
  }
  // The rows of the input. What lies past the ends may be NaN, and zero gates times NaN are not zero.
  static Tensor real_input(const Layer& l) {
    const Tensor input = flat(l.input, l.N);
    if (!l.lengths) return input;
    const OnDevice device(l.input);
    const Tensor from = dense(input), real = empty(input, {l.N, l.I}, l.storage);
    dispatch_storage(l.storage, [&](auto types) {
      using T = typename decltype(types)::storage;
      const RealRows<T> update{in<T>(from), in<int64_t>(l.lengths), l.B, out<T>(real)};
      check_launch(launch_update_h(l.N, l.I, update, device.stream()));
    });
    return real;
  }

  static WeightAndBias recurrent_weight_gradient(const Layer& l, const GateGradients& g, const ForwardResult& saved,
                                                 bool bias) {
    const OnDevice device(l.input);
    const Tensor h = saved.h_in ? *saved.h_in : h_before(l, saved, device);
    Tensor d_w_hh = mm(transposed(g.d_h_gates), h);
    if constexpr (kTwoProducts) {
      const Tensor m = empty(h, {l.N, l.H}, l.storage);
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        const ResetProduct<T> update{l.H, in<T>(saved.saved_gates), in<T>(h), out<T>(m)};
        check_launch(launch_update_h(l.N, l.H, update, device.stream()));
      });
      d_w_hh = cat_rows(d_w_hh, mm(transposed(*g.d_projected), m));
    }
    return {d_w_hh, bias ? MaybeTensor(sum_rows(g.d_h_gates)) : std::nullopt};
  }
  static Tensor projection_gradient(const Layer&, const GateGradients& g, const ForwardResult& saved) {
    return mm(transposed(*g.d_projected), *saved.saved_m);
  }

  static Tensor parameter_gradient(const Layer&, const GateGradients& g, const ForwardResult&) {
    return sum_rows(*g.d_w_rows);
  }

  // h before each row's step, [N, P]; zero where the row is dead or reset.
  static Tensor h_before(const Layer& l, const ForwardResult& saved, const OnDevice& device) {
    const Tensor output = dense(saved.output), h = empty(output, {l.N, l.P}, l.storage);
    const HBefore p{l.steps,
                    l.P * static_cast<int64_t>(h.element_size()),
                    in<int64_t>(l.lengths),
                    in<uint8_t>(l.reset),
                    in<void>(l.h0),
                    in<void>(output),
                    out<void>(h)};
    check_launch(launch_h_before(p, device.stream()));
    return h;
  }

  struct Backward {
    const Layer& l;
    const ForwardResult& saved;
    const GateGradients& g;
    const MaybeTensor d_output;   // [N, P]
    const MaybeTensor d_cells;    // [N, H]
    const Tensor output;          // [N, P]
    const MaybeTensor h_prev;     // [N, P] or null: rows of output and h0
    const MaybeTensor c0;         // [C, B, H]  in the type of c
    const Tensor products;        // [B, P]  d_h_gates of a step times W_hh
    const MaybeTensor d_m;        // [B, H]  with a projection: gradient of a step's h before it
    const MaybeTensor d_m_carry;  // [B, H]  with a projection, the kernel's carry: stays zero, h has no other way
    const MaybeTensor scratch;
    const OnDevice& device;

    // Whether the gradient that leaves a step is made apart. Else the kernel of the step before adds the product
    // itself.
    bool folds() const { return l.w_hr || l.lengths || l.reset || l.h_mask || l.grad_clip != 0 || kTwoProducts; }

    // goes_on: whether the gradient that leaves the step is wanted.
    void step(int64_t s, bool goes_on) const {
      const int64_t row = l.row_begin[l.steps.time(s)], count = l.steps.count(s);
      const int64_t started = std::min(l.steps.count(s - 1), count);                 // rows with a step before
      const int64_t going_on = folds() ? 0 : std::min(l.steps.count(s + 1), count);  // rows with a product to add
      if (l.w_hr) {
        take_projected(s);
        mm_out(rows(*d_m, 0, count), rows(*g.d_projected, row, count), *l.w_hr);
      }
      int64_t begin = kTwoProducts ? count : 0;
      if constexpr (kTwoProducts) reset_gates(s, row, count);
      for (const int64_t end : {std::min(going_on, started), std::max(going_on, started), count}) {
        if (begin < end) gates(s, row, begin, end, begin < started, begin < going_on ? MaybeTensor(products) : d_m);
        begin = end;
      }
      if (!goes_on) return;
      mm_out(rows(products, 0, count), rows(g.d_h_gates, row, count), first_weight(l));
      leave(s, folds() ? 0 : started, count);
    }

    // Of rows [begin, end): the gradient that leaves the step becomes what is carried, in the end d_h0.
    void leave(int64_t s, int64_t begin, int64_t end) const {
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        const StepControls<T> c = controls<T>(l, s, begin);
        const ThroughStep<T, A> update{
            at<T>(products, begin), at<T>(l.h_mask, begin), c.lengths, c.t, c.reset, l.grad_clip, to<A>(g.d_h0, begin)};
        check_launch(launch_update_h(end - begin, l.P, update, device.stream()));
      });
    }

    // Of a cell that resets before: the gradients of all gates.
    void reset_gates(int64_t s, int64_t row, int64_t count) const {
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        const StepControls<T> c = controls<T>(l, s, 0);
        const ResetFinishBackward<T, A> finish{l.H,
                                               at<T>(saved.saved_gates, row),
                                               at<T>(h_prev, row),
                                               at<T>(d_output, row),
                                               c,
                                               out<A>(g.d_h0),
                                               to<T>(g.d_x_gates, row),
                                               to<T>(g.d_h_gates, row),
                                               to<T>(g.d_projected, row)};
        check_launch(launch_update_h(count, l.H, finish, device.stream()));
        mm_out(rows(products, 0, count), rows(*g.d_projected, row, count), second_weight(l));
        const ResetBackward<T, A> reset{l.H,
                                        at<T>(saved.saved_gates, row),
                                        at<T>(h_prev, row),
                                        in<T>(l.h_mask),
                                        in<T>(products),
                                        c,
                                        out<A>(g.d_h0),
                                        to<T>(g.d_x_gates, row),
                                        to<T>(g.d_h_gates, row)};
        check_launch(launch_update_h(count, l.H, reset, device.stream()));
      });
    }

    void take_projected(int64_t s) const {
      const int64_t row = l.row_begin[l.steps.time(s)];
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        const StepControls<T> c = controls<T>(l, s, 0);
        const TakeProjected<T, A> update{at<T>(d_output, row), c.lengths, c.t, out<A>(g.d_h0),
                                         to<T>(g.d_projected, row)};
        check_launch(launch_update_h(l.steps.count(s), l.P, update, device.stream()));
      });
    }

    // Rows [begin, end) of a step, all with a step before or all without. d_h: rows of what is added to what is
    // carried.
    void gates(int64_t s, int64_t first, int64_t begin, int64_t end, bool has_before, const MaybeTensor& d_h) const {
      const int64_t row = first + begin, before = has_before ? l.row_begin[l.steps.time(s - 1)] + begin : begin;
      dispatch_storage(l.storage, [&](auto types) {
        using T = typename decltype(types)::storage;
        using A = typename decltype(types)::acc;
        const T* h = h_prev ? at<T>(h_prev, row) : at<T>(has_before ? output : l.h0, before);
        GatesBackward<T, A> p{};
        p.B = end - begin;
        p.H = l.H;
        p.w_cell = in<T>(l.w_cell);
        p.saved_gates = at<T>(saved.saved_gates, row);
        p.h_prev = l.w_hr ? nullptr : h;
        p.h_next = l.w_hr ? nullptr : at<T>(output, row);
        p.c_prev = at<A>(has_before ? saved.saved_c : c0, before);
        p.c_prev_stride = (has_before ? l.N : l.B) * l.H;
        p.c_next = at<A>(saved.saved_c, row);
        p.c_next_stride = l.N * l.H;
        p.d_output = l.w_hr ? nullptr : at<T>(d_output, row);
        p.d_h_product = at<T>(d_h, begin);
        p.d_cells = at<T>(d_cells, row);
        p.controls = controls<T>(l, s, begin);
        p.grad_clip = l.grad_clip;
        p.d_h = l.w_hr ? to<A>(d_m_carry, begin) : to<A>(g.d_h0, begin);
        p.d_c = to<A>(g.d_c0, begin);
        p.d_c_stride = l.B * l.H;
        p.d_x_gates = to<T>(g.d_x_gates, row);
        p.d_h_gates = to<T>(g.d_h_gates, row);
        p.d_w_rows = to<A>(g.d_w_rows, kNormalises<C> ? begin : row);
        p.scratch = to<A>(scratch, begin);
        if constexpr (kNormalises<C>) {
          check_launch(launch_norm_backward<Cell>(p, device.stream()));
        } else if constexpr (!kTwoProducts) {
          check_launch(launch_gates_backward<Cell>(p, device.stream()));
        }
      });
    }
  };
};

}  // namespace fastrnn
