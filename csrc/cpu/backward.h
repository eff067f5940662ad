// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of one layer in one direction. Compiled once for each instruction set, after weights.h.
//
// What is fused: d_h = d_output + carried d_h + d_h_gates W_hh of the following step, and the gate gradients from it.
// The gradients of the weights and of the input are products over all steps at once, which the caller makes.

namespace fastrnn::FASTRNN_ISA {

// S: the type that rows and weights are stored in. Sums, c and what is carried from step to step are of type T, and
// what products read of type R.
template <template <typename> class CellOf, typename S>
class Backward {
 public:
  using T = typename TypesOf<S>::acc_t;
  using R = Operand<S>;
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Plain = typename PlainOf<Cell>::type;
  using Panel = PanelShape<T, 1>;

  // layers: that are to run together.
  Backward(const SequenceBackward<S>& p, int layers, const ThreadPool& pool)
      : p_(p),
        pool_(pool),
        plan_(plan_cpu({p.steps.T, p.B, 0, p.H, p.P, Cell::kGates, pool.threads, p.w_hr != nullptr, kNormalises<Cell>,
                        layers, kWidens<S>, Pass::backward})),
        team_(plan_.threads, p.B * Cell::kGates * p.H * p.P / plan_.threads) {}

  const CpuPlan& plan() const { return plan_; }

  // What comes before the threads share the work.
  void prepare() {
    const ThreadPool& pool = plan_.threads > 1 || plan_.side_by_side ? pool_ : kOneThread;
    // Words of several rows are put together at every step, unless they are packed.
    const bool pack = plan_.pack_recurrent || (Multiply<S>::kDepth > 1 && p_.steps.T > 2);
    if (p_.steps.T > 1 || p_.need_states) hh_ = Columns<S>(p_.w_hh, p_.P, Cell::kGates * p_.H, pack, pool);
    if (p_.w_hr) hr_ = Columns<S>(p_.w_hr, p_.H, p_.P, pack, pool);
    if constexpr (kNormalises<Cell>) {
      for (int i = 0; i < plan_.threads; ++i) rows_.emplace_back(p_.H);
    }
    if (plan_.split == Split::rows) row_ends_ = split_rows(p_.steps, p_.B, plan_.threads);
  }

  // The shares [begin, end) of the plan's threads.
  void run_shares(int64_t begin, int64_t end) {
    if (plan_.split == Split::units) {
      Team::Member member(team_, {begin, end});
      member.join();
      if (!member.goes_on()) return;
      const auto my_units = [&] { return units_of<T>(member.shares(), p_.H, plan_.threads); };
      run_part({0, p_.B, my_units()}, [&](int64_t step, Part& part) {
        member.barrier(step);
        part.units = my_units();
        return member.goes_on();
      });
    } else {
      for (int64_t i = begin; i < end; ++i) {
        run_part({row_ends_[i], row_ends_[i + 1], {0, p_.H}, rows_.empty() ? nullptr : &rows_[i]},
                 [](int64_t, Part&) { return true; });
      }
    }
  }

  void finish() {
    if constexpr (kNormalises<Cell>) {
      std::fill_n(p_.d_w_cell, Cell::kParameters * p_.H, T(0));
      for (const WholeRow& row : rows_) {
        for (int64_t j = 0; j < Cell::kParameters * p_.H; ++j) p_.d_w_cell[j] += row.d_w[j];
      }
    }
  }

 private:
  static constexpr int kRows = kTileRows<Panel::kVectors>;
  static constexpr auto kNothing = [](int64_t, int) {};

  // Of a cell that normalises: what the panels of a row share, one row after the other in a thread.
  struct WholeRow {
    int64_t width;  // H, and the rest of the last panel
    Buffer<T> memory;
    T* d_h;      // [tile rows, width]  then d_o
    T* d_gates;  // [2, G*H]  gradients of the normalised products, of x and of h
    T* c;        // [H]  c as the cell made it
    T* d_c;      // [width]  the way through h; before that, gradient of the normalised c
    T* d_w;      // [kParameters*H]  sums

    explicit WholeRow(int64_t H)
        : width(Panel::panels(H) * Panel::kBlock),
          memory((kRows + 1) * width + (2 * Cell::kGates + 1 + Cell::kParameters) * H) {
      d_h = memory.get();
      d_c = d_h + kRows * width;
      d_gates = d_c + width;
      c = d_gates + 2 * Cell::kGates * H;
      d_w = c + H;
      std::fill_n(d_w, Cell::kParameters * H, T(0));
    }
  };

  // What one thread does: rows of the batch and hidden units.
  struct Part {
    int64_t row_begin, row_end;
    Units units;
    WholeRow* whole = nullptr;
  };

  // barrier(step, part) returns whether the thread goes on, and gives its part.
  template <typename Barrier>
  void run_part(Part part, const Barrier& barrier) const {
    // A row takes up the gradients of its final states at its last step: they are what is carried into it.
    set_columns(p_.d_h0, p_.d_h_n, p_.P, part, p_.w_hr ? p_.P : part.units.end);
    for (int k = 0; k < Cell::kStates - 1; ++k) {
      const int64_t first = k * p_.B * p_.H;
      set_columns(p_.d_c0 + first, p_.d_c_n ? p_.d_c_n + first : nullptr, p_.H, part, part.units.end);
    }

    for (int64_t s = p_.steps.T - 1; s >= 0; --s) {
      const int64_t end = std::clamp(p_.steps.count(s), part.row_begin, part.row_end);
      const int64_t going_on = std::clamp(p_.steps.count(s + 1), part.row_begin, end);  // rows with a following step
      const int64_t started = std::clamp(p_.steps.count(s - 1), part.row_begin, end);   // rows with a step before
      if (p_.w_hr) {
        const auto project_panel = [&](Units units) { project(units, s, part.row_begin, going_on, end); };
        for_each_panel<Panel>({0, p_.P}, project_panel, is_upwards(s, end - part.row_begin));
      }
      if constexpr (kNormalises<Cell>) {
        const int64_t width = part.whole->width;
        const auto tile = [&](int64_t b, int count, bool following) {
          const auto tile_of_panel = [&](Units units) {
            hidden_gradients(
                units, s, b, following ? b + count : b, b + count, kNothing, [&](int64_t, int, const T* d_h) {
                  for (int r = 0; r < count; ++r) {
                    std::copy_n(d_h + r * Panel::kColumns, Panel::kBlock, part.whole->d_h + r * width + units.begin);
                  }
                });
          };
          for_each_panel<Panel>({0, p_.H}, tile_of_panel, is_upwards(s, count));
          for (int r = 0; r < count; ++r) update_row(s, b + r, part.whole->d_h + r * width, *part.whole);
        };
        for_each_tile(part.row_begin, going_on, kRows, [&](int64_t b, int count) { tile(b, count, true); });
        for_each_tile(going_on, end, kRows, [&](int64_t b, int count) { tile(b, count, false); });
      } else {
        const auto step_in_panel = [&](Units units) {
          const auto before = [&](int64_t b, int count) {
            if (!kResetsBefore<Cell>) prefetch_rows(units, s, b, count);
          };
          hidden_gradients(units, s, part.row_begin, going_on, end, before, [&](int64_t b, int count, const T* d_h) {
            for (int r = 0; r < count; ++r) {
              if constexpr (kResetsBefore<Cell>) {
                reset_gate(units, s, b + r, d_h + r * Panel::kColumns);
              } else {
                update(units, s, b + r, d_h + r * Panel::kColumns, nullptr);
              }
            }
          });
        };
        for_each_panel<Panel>(part.units, step_in_panel, is_upwards(s, end - part.row_begin));
      }
      if (!barrier(p_.steps.T - s, part)) return;
      if (!p_.need_states) continue;
      // Rows that start here: their way through W_hh ends in h0.
      for_each_panel<Panel>({part.units.begin, p_.w_hr ? p_.P : part.units.end}, [&](Units units) {
        hh_.times(units, gate_gradients(s), started, end, kNothing, [&](int64_t b, int count, const T* d_h) {
          for (int r = 0; r < count; ++r) {
            T* d_h0 = p_.d_h0 + p_.steps.state(b + r) * p_.P;
            for_each_vector<T>(units.begin, units.end, p_.P, [&](int64_t j, auto lanes) {
              store(d_h0 + j, through_step(s, b + r, j, d_h + r * Panel::kColumns - units.begin, lanes), lanes);
            });
          }
        });
      });
    }
  }

  // What update() reads and writes for the rows [b, b + count), which lies in memory since the forward pass.
  void prefetch_rows(Units units, int64_t s, int64_t b, int count) const {
    const int64_t j = units.begin, width = units.end - j;
    for (int r = 0; r < count; ++r) {
      const int64_t row = p_.steps.row_begin[p_.steps.time(s)] + b + r;
      for (int k = 0; k < Cell::kSaved; ++k) {
        prefetch(p_.saved_gates + (row * Cell::kSaved + k) * p_.H + j, width, false);
      }
      if (Cell::kStates > 1) prefetch(p_.saved_c + row * p_.H + j, width, false);
      if (p_.d_output && !p_.w_hr) prefetch(p_.d_output + p_.steps.place(s, b + r) * p_.P + j, width, false);
      for (int g = 0; g < Cell::kGates; ++g) {
        prefetch(p_.d_x_gates + (row * Cell::kGates + g) * p_.H + j, width, true);
        if (Cell::kGateGradsDiffer) prefetch(p_.d_h_gates + (row * Cell::kGates + g) * p_.H + j, width, true);
      }
    }
  }

  // The gradient that leaves the s-th step of position b for h before it: through the product and beside it.
  template <typename Lanes>
  FASTRNN_HD V through_step(int64_t s, int64_t b, int64_t j, const T* product, Lanes lanes) const {
    const Controls<S>& c = p_.controls;
    const int64_t state = p_.steps.state(b);
    if (c.reset && c.reset[p_.steps.place(s, b)]) return V{};
    V d_product = load(product + j);
    if (c.h_mask) d_product *= load(c.h_mask + state * p_.P + j, lanes);
    return clipped(d_product + load(p_.d_h0 + state * p_.P + j, lanes));
  }

  FASTRNN_HD V clipped(V gradient) const { return fastrnn::clipped(gradient, static_cast<T>(p_.controls.grad_clip)); }

  // Of the s-th step, those that W_hh is multiplied with: [positions, G*H].
  const R* gate_gradients(int64_t s) const { return p_.d_h_gates + p_.steps.row(s, 0) * Cell::kGates * p_.H; }

  // For the positions [begin, end) at the s-th step, in tiles: calls before(b, count), and f(b, count, d_h) with the
  // gradient of the units of h, of which those up to going_on have a following step.
  template <typename Before, typename F>
  void hidden_gradients(Units units, int64_t s, int64_t begin, int64_t going_on, int64_t end, Before before,
                        F f) const {
    if (p_.w_hr) {
      hr_.times(units, p_.d_projected + p_.steps.row(s, 0) * p_.P, begin, end, before, f, is_upwards(s, end - begin));
    } else {
      output_gradients(units, s, begin, going_on, end, before, f);
    }
  }

  // The same of the output: d_output, and what the following step or d_h_n gives.
  template <typename Before, typename F>
  void output_gradients(Units units, int64_t s, int64_t begin, int64_t going_on, int64_t end, Before before,
                        F f) const {
    const auto add = [&](int64_t b, int count, bool following, T* d_h) {
      for (int r = 0; r < count; ++r) {
        const int64_t state = p_.steps.state(b + r), place = p_.steps.place(s, b + r);
        T* product = d_h + r * Panel::kColumns - units.begin;
        for_each_vector<T>(units.begin, units.end, p_.P, [&](int64_t j, auto lanes) FASTRNN_INLINE {
          V sum = following ? through_step(s + 1, b + r, j, product, lanes) : load(p_.d_h0 + state * p_.P + j, lanes);
          if (p_.d_output) sum += load(p_.d_output + place * p_.P + j, lanes);
          store(product + j, sum);
        });
      }
      f(b, count, d_h);
    };
    if (begin < going_on) {
      const auto add_following = [&](int64_t b, int count, T* d_h) { add(b, count, true, d_h); };
      hh_.times(units, gate_gradients(s + 1), begin, going_on, before, add_following, is_upwards(s, end - begin));
    }
    for_each_tile(going_on, end, kRows, [&](int64_t b, int count) {
      alignas(64) T d_h[kRows * Panel::kColumns];
      before(b, count);
      add(b, count, false, d_h);
    });
  }

  // With a projection: d_projected = d_h of the projected state. Nothing is carried beside W_hh.
  void project(Units units, int64_t s, int64_t begin, int64_t going_on, int64_t end) const {
    output_gradients(units, s, begin, going_on, end, kNothing, [&](int64_t b, int count, const T* d_h) {
      for (int r = 0; r < count; ++r) {
        if constexpr (kResetsBefore<Cell>) {
          finish(units, s, b + r, d_h + r * Panel::kColumns);
          continue;
        }
        for_each_vector<T>(units.begin, units.end, p_.P, [&](int64_t j, auto lanes) {
          store(p_.d_projected + p_.steps.row(s, b + r) * p_.P + j, load(d_h + r * Panel::kColumns + j - units.begin),
                lanes);
        });
        T* const carried = p_.d_h0 + p_.steps.state(b + r) * p_.P;
        std::fill(carried + units.begin, carried + units.end, T(0));
      }
    });
  }

  // Of a cell that resets before: the gradients of n and z from that of h, and what is carried beside the products.
  void finish(Units units, int64_t s, int64_t b, const T* d_h) const {
    const int64_t row = p_.steps.row(s, b), place = p_.steps.place(s, b);
    const S* const h_prev = h_before(s, b);
    for_each_vector<T>(units.begin, units.end, p_.H, [&](int64_t j, auto lanes) FASTRNN_INLINE {
      Values<V, Cell::kSaved> saved;
      for (int k = 0; k < Cell::kSaved; ++k) {
        saved[k] = load(p_.saved_gates + (row * Cell::kSaved + k) * p_.H + j, lanes);
      }
      V d_next = load(d_h + j - units.begin), d_prev, d_gates_z, d_gates_n, kept{};
      if (p_.controls.zone[0]) {
        const V share = zone_share(p_.controls, 0, place * p_.H + j, lanes);
        kept = share * d_next;
        d_next = (1.0f - share) * d_next;
      }
      const V before = h_prev ? load(h_prev + j, lanes) : V{};
      Cell::finish_backward(saved, before, d_next, d_prev, d_gates_z, d_gates_n);
      store(p_.d_projected + row * p_.H + j, d_gates_n, lanes);
      store(p_.d_x_gates + (row * 3 + 2) * p_.H + j, d_gates_n, lanes);
      store(p_.d_x_gates + (row * 3 + 1) * p_.H + j, d_gates_z, lanes);
      store(p_.d_h_gates + (row * 2 + 1) * p_.H + j, d_gates_z, lanes);
      store(p_.d_h0 + p_.steps.state(b) * p_.H + j, d_prev + kept, lanes);
    });
  }

  // The gradient of r, from that of r h.
  void reset_gate(Units units, int64_t s, int64_t b, const T* d_m) const {
    const int64_t row = p_.steps.row(s, b), state = p_.steps.state(b);
    const S* const h_prev = h_before(s, b);
    for_each_vector<T>(units.begin, units.end, p_.H, [&](int64_t j, auto lanes) FASTRNN_INLINE {
      Values<V, Cell::kSaved> saved;
      saved[0] = load(p_.saved_gates + row * Cell::kSaved * p_.H + j, lanes);
      V mask = broadcast<V>(1);
      if (p_.controls.h_mask) mask = load(p_.controls.h_mask + state * p_.H + j, lanes);
      const Values<V, 1> prev = {h_prev ? load(h_prev + j, lanes) * mask : V{}}, d_next = {load(d_m + j - units.begin)};
      Values<V, 1> d_prev;
      V d_gates_r;
      Cell::backward(saved, prev, d_next, d_prev, d_gates_r);
      store(p_.d_x_gates + row * 3 * p_.H + j, d_gates_r, lanes);
      store(p_.d_h_gates + row * 2 * p_.H + j, d_gates_r, lanes);
      T* carried = p_.d_h0 + state * p_.H + j;
      store(carried, load(carried, lanes) + d_prev[0] * mask, lanes);
    });
  }

  const S* h_before(int64_t s, int64_t b) const {
    return fastrnn::h_before(p_.steps, p_.controls.reset, p_.h0, p_.output, p_.P, s, b);
  }

  // The cell, for some units of one position. whole: of a cell that normalises.
  void update(Units units, int64_t s, int64_t b, const T* d_h, const WholeRow* whole) const {
    const Controls<S>& controls = p_.controls;
    const int64_t row = p_.steps.row(s, b), place = p_.steps.place(s, b), state = p_.steps.state(b);
    const bool reset = controls.reset && controls.reset[place];
    const S* const h_prev = h_before(s, b);
    const auto c_before = states_before(s, b);  // no structured binding: lambdas capture none before C++20
    for_each_vector<T>(units.begin, units.end, p_.H, [&](int64_t j, auto lanes) FASTRNN_INLINE {
      Values<V, Plain::kSaved> saved;
      for (int k = 0; k < Plain::kSaved; ++k) {
        saved[k] = load(p_.saved_gates + (row * Cell::kSaved + k) * p_.H + j, lanes);
      }
      Values<V, Plain::kParameters> w;
      for (int k = 0; k < Plain::kParameters; ++k) w[k] = load(p_.w_cell + k * p_.H + j, lanes);
      Values<V, Cell::kStates> prev, next, d_next, d_prev;
      prev[0] = p_.w_hr || reset ? V{} : load(h_prev + j, lanes);
      next[0] = p_.w_hr ? V{} : load(p_.output + place * p_.P + j, lanes);
      d_next[0] = load(d_h + j - units.begin);
      for (int k = 1; k < Cell::kStates; ++k) {
        prev[k] = reset ? V{} : load(c_before.first + (k - 1) * c_before.second + j, lanes);
        next[k] = load(p_.saved_c + ((k - 1) * p_.N + row) * p_.H + j, lanes);
        d_next[k] = load(p_.d_c0 + ((k - 1) * p_.B + state) * p_.H + j, lanes);
      }
      if constexpr (Cell::kStates > 1) {
        if (p_.d_cells) d_next[1] += load(p_.d_cells + place * p_.H + j, lanes);
      }
      ZoneBackward<Plain, V, S> zone{{}, controls.rounding};
      for (int k = kNormalisesC<Cell>; k < std::min(Cell::kStates, kZonedStates); ++k) {
        if (!controls.zone[k]) continue;
        zone.before_cell(k, zone_share(controls, k, place * p_.H + j, lanes), saved, prev, next, d_next);
      }
      if constexpr (kNormalisesC<Cell>) d_next[1] += load(whole->d_c + j);
      Values<V, Cell::kGates> d_gx, d_gh;
      Plain::backward(w, saved, prev, next, d_next, d_prev, d_gx, d_gh);
      for (int k = 0; k < std::min(Cell::kStates, kZonedStates); ++k) {
        if (controls.zone[k]) d_prev[k] += zone.kept[k];
      }
      for (int g = 0; g < Cell::kGates; ++g) {
        if constexpr (kNormalises<Cell>) {
          store(whole->d_gates + g * p_.H + j, d_gx[g], lanes);
          store(whole->d_gates + (Cell::kGates + g) * p_.H + j, d_gh[g], lanes);
          continue;
        }
        const int64_t at = (row * Cell::kGates + g) * p_.H + j;
        store(p_.d_x_gates + at, d_gx[g], lanes);
        if constexpr (Cell::kGateGradsDiffer) store(p_.d_h_gates + at, d_gh[g], lanes);
      }
      if (!p_.w_hr && !kNormalisesC<Cell>) store(p_.d_h0 + state * p_.P + j, d_prev[0], lanes);
      for (int k = 1; k < Cell::kStates; ++k) {
        store(p_.d_c0 + ((k - 1) * p_.B + state) * p_.H + j, reset ? V{} : clipped(d_prev[k]), lanes);
      }
    });
  }

  // The states beside h before the s-th step of position b, and the distance between them.
  std::pair<const T*, int64_t> states_before(int64_t s, int64_t b) const {
    if (b >= p_.steps.count(s - 1)) return {p_.c0 + p_.steps.state(b) * p_.H, p_.B * p_.H};  // the first step
    return {p_.saved_c + p_.steps.row(s - 1, b) * p_.H, p_.N * p_.H};
  }

  // Of a cell that normalises: a position's whole step. d_h [width] is used up.
  void update_row(int64_t s, int64_t b, T* d_h, const WholeRow& whole) const {
    const int64_t H = p_.H, row = p_.steps.row(s, b);
    const int64_t gates = Cell::kGates * H;
    if constexpr (kNormalisesC<Cell>) {
      const T *const c = make_c(s, b, whole.c), *const gain_c = p_.w_cell + 4 * gates;
      const S* const o = p_.saved_gates + (row * Cell::kSaved + 3) * H;
      T* const carried = p_.w_hr ? nullptr : p_.d_h0 + p_.steps.state(b) * p_.P;
      normalise(c, gain_c, gain_c + H, H, [&](int64_t j, V y, auto lanes) FASTRNN_INLINE {
        V d = load(d_h + j), kept{}, d_o, d_y;
        if (p_.controls.zone[0]) {
          const V share = zone_share(p_.controls, 0, p_.steps.place(s, b) * H + j, lanes);
          kept = share * d;
          d = (1.0f - share) * d;
        }
        lstm_output_gradient(load(o + j, lanes), y, d, d_o, d_y);
        store(d_h + j, d_o);
        store(whole.d_c + j, d_y);
        if (carried) store(carried + j, kept, lanes);
      });
      T* const d_gain_c = whole.d_w + 4 * gates;
      normalise_backward(c, gain_c, whole.d_c, H, d_gain_c, d_gain_c + H,
                         [&](int64_t j, V d_c, auto) FASTRNN_INLINE { store(whole.d_c + j, d_c); });
    }
    update({0, H}, s, b, d_h, &whole);
    const S* products = p_.saved_gates + (row * Cell::kSaved + Plain::kSaved) * H;
    const T *gain = p_.w_cell, *d = whole.d_gates;
    T* d_gain = whole.d_w;
    for (R* const d_products : {p_.d_x_gates + row * gates, p_.d_h_gates + row * gates}) {
      for (int k = 0; k < Cell::kGroups; ++k) {
        const int64_t first = Cell::group_begin(k) * H, count = Cell::group_begin(k + 1) * H - first;
        normalise_backward(products + first, gain + first, d + first, count, d_gain + first, d_gain + gates + first,
                           [&](int64_t j, V d_a, auto lanes)
                               FASTRNN_INLINE { store(d_products + first + j, d_a, lanes); });
      }
      products += gates, gain += 2 * gates, d += gates, d_gain += 2 * gates;
    }
  }

  // c as the cell made it at the s-th step of position b: what was saved or, where zoneout kept some of c, restored.
  const T* make_c(int64_t s, int64_t b, T* c) const {
    const int64_t row = p_.steps.row(s, b), H = p_.H;
    if (!p_.controls.zone[1]) return p_.saved_c + row * H;
    const bool reset = p_.controls.reset && p_.controls.reset[p_.steps.place(s, b)];
    const T* const before = states_before(s, b).first;
    for_each_vector<T>(0, H, H, [&](int64_t j, auto lanes) FASTRNN_INLINE {
      Values<V, Plain::kSaved> saved;
      for (int k = 0; k < Plain::kSaved; ++k) saved[k] = load(p_.saved_gates + (row * Cell::kSaved + k) * H + j, lanes);
      const Values<V, Cell::kStates> prev = {V{}, reset ? V{} : load(before + j, lanes)};
      store(c + j, Plain::restore_c(saved, prev), lanes);
    });
    return c;
  }

  // to [B, width] = from, or zero: the part's rows, and the columns from its first unit on up to `end`.
  void set_columns(T* to, const T* from, int64_t width, const Part& part, int64_t end) const {
    for (int64_t b = part.row_begin; b < part.row_end; ++b) {
      const int64_t row = p_.steps.state(b) * width, first = row + part.units.begin, last = row + end;
      if (from) {
        std::copy(from + first, from + last, to + first);
      } else {
        std::fill(to + first, to + last, T(0));
      }
    }
  }

  const SequenceBackward<S>& p_;
  const ThreadPool& pool_;
  const CpuPlan plan_;
  Columns<S> hh_;               // [G*H, P]
  Columns<S> hr_;               // [P, H]
  std::vector<WholeRow> rows_;  // one for each thread
  std::vector<int64_t> row_ends_;
  Team team_;
};

}  // namespace fastrnn::FASTRNN_ISA
