// SPDX-License-Identifier: BSD-3-Clause
// The forward pass of one layer in one direction. Compiled once for each instruction set, after weights.h.
//
// What is fused: the recurrent product of a tile, the gates and the state update; a step reads h, the packed W_hh and
// its input gates, and writes h (and, for training, what backward needs). The input gates are made for a chunk of steps
// at a time, small enough to stay in the cache of the core until the recurrence reads them; or for all steps where
// these are few: W_ih is then packed a panel at a time, in a place that stays in cache.

namespace fastrnn::FASTRNN_ISA {

// Bytes of input gates per chunk and thread: half of a usual L2, the other half is for the weights. Where W_ih is
// larger than that, it comes from an outer cache for every chunk, and these are a quarter of it. And of an only chunk.
inline constexpr int64_t kChunkBytes = 512 * 1024, kMostChunkBytes = 16 * kChunkBytes,
                         kOnlyChunkBytes = 4 * kChunkBytes;

// S: the type that rows and weights are stored in. Sums, gates and c are of type T. What products read is of type R:
// where that is not S, a thread widens the rows of a chunk, and those of h once a step.
template <template <typename> class CellOf, typename S>
class Forward {
 public:
  using T = typename TypesOf<S>::acc_t;
  using R = Operand<S>;
  using Word = WordOf<S>;
  using V = Vec<T>;
  using Cell = CellOf<V>;
  using Plain = typename PlainOf<Cell>::type;
  using Gates = PanelShape<T, Cell::kGates>;
  using Projection = PanelShape<T, 1>;
  static constexpr int kMostRows = std::max(kTileRows<Gates::kVectors>, kTileRows<Projection::kVectors>);

  // layers: that are to run together.
  Forward(const SequenceForward<S>& p, int layers, const ThreadPool& pool)
      : p_(p),
        pool_(pool),
        plan_(plan_cpu({p.steps.T, p.B, p.I, p.H, p.P, Cell::kGates, pool.threads, p.w_hr != nullptr, kNormalises<Cell>,
                        layers, kWidens<S>, Pass::forward, p.packed != nullptr})),
        panels_(Gates::panels(p.H)),
        packs_own_panels_(plan_.split == Split::units || plan_.threads == 1),
        w_(p),
        team_(plan_.threads, p.B * Cell::kGates * p.H * p.P / plan_.threads) {}

  // What comes before the threads share the work.
  void prepare() {
    const int lanes = plan_.split == Split::units ? 1 : plan_.threads;
    const std::vector<int64_t> rows = split_rows(p_.steps, p_.B, lanes);
    for (int i = 0; i < lanes; ++i) lanes_.emplace_back(*this, rows[i], rows[i + 1], plan_.threads / lanes);
    prepare_weights();
    if (p_.w_hr) m_ = Buffer<R>(p_.B * p_.H);
    if (kResetsBefore<Cell>) z_ = Buffer<T>(p_.B * p_.H);
    if (kNormalises<Cell>) products_ = Buffer<T>(p_.B * 2 * Cell::kGates * p_.H);
    if (p_.controls.reset) {
      zeros_ = Buffer<S>(p_.P);
      std::fill_n(zeros_.get(), p_.P, S{});
    }
    if (p_.h_in) mask_h0();
  }

  // The shares [begin, end) of the plan's threads.
  void run_shares(int64_t begin, int64_t end) {
    if (plan_.split == Split::units) {
      Team::Member member(team_, {begin, end});
      if (p_.steps.T > 1) member.join();
      if (!member.goes_on()) return;
      const auto my_units = [&] { return units_of<T>(member.shares(), p_.H, plan_.threads); };
      run_lane(lanes_[0], member.shares().begin, my_units(), [&](int64_t step, Units& units) {
        member.barrier(step);
        units = my_units();
        return member.goes_on();
      });
    } else {
      for (int64_t i = begin; i < end; ++i) run_lane(lanes_[i], 0, {0, p_.H}, [](int64_t, Units&) { return true; });
    }
  }

  void finish() {}
  const CpuPlan& plan() const { return plan_; }

 private:
  // One position at one step.
  struct StepRow {
    int64_t b, row, place, state;  // the position; its row of what is packed, of input and output, of the states
    int64_t in_chunk;              // of the chunk
    const S* h;                    // before the step
    const R* operand;              // h as the recurrent product reads it: masked, widened
    bool reset;
  };

  // Rows of the batch that run together, and what they share. Its memory is taken before the threads start: in one of
  // them, running out of it would leave the others waiting.
  struct Lane {
    int64_t begin, end;           // rows of the batch
    int64_t chunk_steps;          // steps whose input gates are made at a time
    std::vector<const S*> input;  // every input row of the lane, in the order of the run
    Buffer<T> x_gates;            // [panels, rows of a chunk, G*kBlock]
    struct Own {
      Buffer<StepRow> rows;          // [rows]
      Buffer<R> wide_input, wide_h;  // [rows of a chunk, I], [rows, P], if S is widened
    };
    std::vector<Own> own;  // of each thread

    Lane(const Forward& f, int64_t row_begin, int64_t row_end, int threads) : begin(row_begin), end(row_end) {
      const SequenceForward<S>& p = f.p_;
      for (int64_t s = 0; s < p.steps.T; ++s) {
        for (int64_t b = begin; b < std::min(end, p.steps.count(s)); ++b) input.push_back(f.input_row(s, b));
      }
      const auto steps_in = [&](int64_t bytes, int64_t row_bytes) {
        return std::max<int64_t>(1, std::min(p.steps.T, bytes / std::max<int64_t>(1, (end - begin) * row_bytes)));
      };
      const int64_t gate_bytes = f.panels_ * Gates::kColumns * static_cast<int64_t>(sizeof(T));
      chunk_steps = steps_in(threads * kOnlyChunkBytes, gate_bytes);
      const int64_t chunk_bytes = std::clamp(gate_bytes * p.I / threads / 4, kChunkBytes, kMostChunkBytes);
      if (chunk_steps < p.steps.T) chunk_steps = steps_in(threads * chunk_bytes, gate_bytes);
      if (kWidens<S> && p.w_ih) {
        chunk_steps = std::min(chunk_steps, steps_in(kChunkBytes, p.I * static_cast<int64_t>(sizeof(R))));
      }
      if (p.w_ih) x_gates = Buffer<T>(chunk_steps * (end - begin) * f.panels_ * Gates::kColumns);
      const int64_t rows = end - begin, widened = kWidens<S> ? rows : 0;
      for (int i = 0; i < threads; ++i) {
        own.push_back(
            {Buffer<StepRow>(rows), Buffer<R>(p.w_ih ? chunk_steps * widened * p.I : 0), Buffer<R>(widened * p.P)});
      }
    }
    int64_t count(const Steps& steps, int64_t s) const {  // its rows at the s-th step
      return std::max<int64_t>(0, std::min(end, steps.count(s)) - begin);
    }
  };

  // The part of a lane that one thread does. barrier(step, units) returns whether it goes on, and gives the units.
  template <typename Barrier>
  void run_lane(const Lane& lane, int64_t thread, Units units, const Barrier& barrier) const {
    for (int k = 0; k < Cell::kStates - 1; ++k) {
      for (int64_t b = lane.begin; b < lane.end; ++b) {
        const int64_t row = k * p_.B + p_.steps.state(b);
        copy_columns(p_.c0 + row * p_.H, p_.c_n + row * p_.H, units);
      }
    }

    if (packs_own_panels_ && !hh_shares_place_) w_.hh.pack(units, panel_of(units));
    const typename Lane::Own& own = lane.own[thread];
    int64_t done = 0;  // rows of the lane before this step
    Chunk chunk{};
    for (int64_t s = 0; s < p_.steps.T; ++s) {
      if (s % lane.chunk_steps == 0) {
        chunk = {lane.input.data() + done, 0, lane.x_gates.get(), own.wide_input.get()};
        for (int64_t i = s; i < std::min(p_.steps.T, s + lane.chunk_steps); ++i) chunk.rows += lane.count(p_.steps, i);
        if constexpr (kWidens<S>) {
          for (int64_t row = 0; p_.w_ih && row < chunk.rows; ++row) {
            widen(chunk.input[row], p_.I, chunk.wide_input + row * p_.I);
          }
        }
        // A panel is used while it is hot from packing.
        for_each_panel<Gates>(p_.w_ih ? units : Units{}, [&](Units in_panel) {
          const int64_t place = ih_shares_place_ ? thread : panel_of(in_panel);
          if (packs_own_panels_ && s == 0) w_.ih.pack(in_panel, place);
          input_gates(in_panel, place, chunk);
        });
      }
      const int64_t count = lane.count(p_.steps, s), in_chunk = lane.input.data() + done - chunk.input;
      StepRow* const rows = own.rows.get();
      for (int64_t i = 0; i < count; ++i) rows[i] = step_row(s, lane.begin + i, in_chunk + i, own.wide_h.get(), i);
      const LaneStep at{s, chunk, rows, count};
      const auto step_in_panel = [&](Units in_panel) {
        const int64_t place = hh_shares_place_ ? thread : panel_of(in_panel);
        if (hh_shares_place_) w_.hh.pack(in_panel, place);
        step(at, in_panel, place);
      };
      for_each_panel<Gates>(units, step_in_panel, is_upwards(s, count));
      if constexpr (kNormalises<Cell>) {
        for (int64_t i = 0; i < count; ++i) finish_row(s, rows[i]);
      }
      if (p_.w_hr) project(at);
      done += count;
      if (s + 1 < p_.steps.T && !barrier(s + 1, units)) return;
    }
    copy_h_n(lane, p_.w_hr ? Units{0, p_.P} : units);
  }

  const S* input_row(int64_t s, int64_t b) const { return p_.input + p_.input_rows.offset(p_.steps, s, b); }

  // Position b ends with the last step that it has a part in; one without a step keeps h0.
  void copy_h_n(const Lane& lane, Units units) const {
    for (int64_t b = lane.begin; b < lane.end; ++b) {
      const int64_t state = p_.steps.state(b);
      copy_columns(p_.h0 + state * p_.P, p_.h_n + state * p_.P, units);
    }
    for (int64_t s = 0; s < p_.steps.T; ++s) {
      const int64_t ended = std::max(lane.begin, p_.steps.count(s + 1));
      for (int64_t b = ended; b < lane.begin + lane.count(p_.steps, s); ++b) {
        copy_columns(p_.output + p_.steps.place(s, b) * p_.P, p_.h_n + p_.steps.state(b) * p_.P, units);
      }
    }
  }

  template <typename U>
  static void copy_columns(const U* from, U* to, Units columns) {
    std::copy(from + columns.begin, from + columns.end, to + columns.begin);
  }

  // What the product reads at the first step of each position; the rows of later steps follow from the step before.
  void mask_h0() const {
    for (int64_t s = 0; s < p_.steps.T; ++s) {
      for (int64_t b = std::max<int64_t>(0, p_.steps.count(s - 1)); b < p_.steps.count(s); ++b) {
        for_each_vector<T>(0, p_.P, p_.P, [&](int64_t j, auto lanes) {
          store_h_in(s, b, j, load(p_.h0 + p_.steps.state(b) * p_.P + j, lanes), lanes);
        });
      }
    }
  }

  // h before the s-th step of position b as the product is to read it.
  template <typename Lanes>
  void store_h_in(int64_t s, int64_t b, int64_t j, V h, Lanes lanes) const {
    const bool reset = p_.controls.reset && p_.controls.reset[p_.steps.place(s, b)];
    const V masked = reset ? V{} : h * load(p_.controls.h_mask + p_.steps.state(b) * p_.P + j, lanes);
    store(p_.h_in + p_.steps.row(s, b) * p_.P + j, masked, lanes);
  }

  // The room for packed weights, and what is packed before the lanes start.
  void prepare_weights() {
    if (p_.packed) return w_.take(static_cast<const Word*>(p_.packed), plan_);
    if (plan_.pack_recurrent) {
      hh_shares_place_ = packs_own_panels_ && p_.steps.T == 1;
      w_.hh.make_room(hh_shares_place_ ? plan_.threads : panels_);
      if (p_.w_hr) {
        w_.hr.make_room(Projection::panels(p_.P));
        w_.hr.pack({0, p_.P}, 0);
      }
    }
    if (p_.w_ih && plan_.pack_input) {
      ih_shares_place_ = packs_own_panels_ && lanes_[0].chunk_steps == p_.steps.T;
      w_.ih.make_room(ih_shares_place_ ? plan_.threads : panels_);
    }
    if (packs_own_panels_) return;
    in_parallel(pool_, panels_, [&](int64_t begin, int64_t end) {
      const Units units{begin * Gates::kBlock, std::min(p_.H, end * Gates::kBlock)};
      w_.hh.pack(units, begin);
      w_.ih.pack(units, begin);
    });
  }

  struct Chunk {
    const S* const* input;  // [rows]
    int64_t rows;
    T* x_gates;     // [panels, rows, G*kBlock]
    R* wide_input;  // [rows, I]
  };

  // A row as products read it: where it is, or the n-th of the rows [.., K] that are widened.
  static const R* operand(const S* row, const R* wide, int64_t n, int64_t K) {
    if constexpr (kWidens<S>) {
      return wide + n * K;
    } else {
      return row;
    }
  }

  static int64_t panel_of(Units units) { return units.begin / Gates::kBlock; }  // the first
  // Where the input gates of a row of the chunk begin, from the first of these units on.
  static T* x_gates(const Chunk& chunk, Units units, int64_t row) {
    return chunk.x_gates + (panel_of(units) * chunk.rows + row) * Gates::kColumns + units.begin % Gates::kBlock;
  }

  // place: where the panel of W_ih lies if it is packed.
  void input_gates(Units units, int64_t place, const Chunk& chunk) const {
    Ahead ahead = w_.ih.ahead(place + 1);
    for_each_tile(0, chunk.rows, kTileRows<Gates::kVectors>, [&](int64_t first, int count) {
      const R* rows[kMostRows] = {};
      for (int r = 0; r < count; ++r) rows[r] = operand(chunk.input[first + r], chunk.wide_input, first + r, p_.I);
      w_.ih.times(units, place, count, rows, x_gates(chunk, units, first), ahead);
    });
  }

  const S* h_before(int64_t s, int64_t b) const {
    const S* h = fastrnn::h_before(p_.steps, p_.controls.reset, p_.h0, p_.output, p_.P, s, b);
    return h ? h : zeros_.get();
  }

  // wide_h: where the n-th position of the lane has room for what is widened.
  StepRow step_row(int64_t s, int64_t b, int64_t in_chunk, R* wide_h, int64_t n) const {
    const int64_t row = p_.steps.row(s, b), place = p_.steps.place(s, b);
    const S* const h = h_before(s, b);
    const S* const masked = p_.h_in ? p_.h_in + row * p_.P : h;
    if constexpr (kWidens<S>) widen(masked, p_.P, wide_h + n * p_.P);
    return {b,
            row,
            place,
            p_.steps.state(b),
            in_chunk,
            h,
            operand(masked, wide_h, n, p_.P),
            p_.controls.reset && p_.controls.reset[place]};
  }

  // The positions of a lane at one step.
  struct LaneStep {
    int64_t s;
    const Chunk& chunk;
    const StepRow* rows;  // [count]
    int64_t count;
  };

  // place: where the panel of W_hh lies if it is packed.
  void step(const LaneStep& at, Units units, int64_t place) const {
    const Chunk& chunk = at.chunk;
    constexpr int kRows = kTileRows<Gates::kVectors>;
    Ahead ahead = w_.hh.ahead(place + (is_upwards(at.s, at.count) ? 1 : -1));
    for_each_tile(0, at.count, kRows, [&](int64_t first, int count) {
      alignas(64) T h_gates[kRows * Gates::kColumns];
      const StepRow* const rows = at.rows + first;
      const R* operands[kMostRows] = {};
      for (int r = 0; r < count; ++r) operands[r] = rows[r].operand;
      w_.hh.times(units, place, count, operands, h_gates, ahead);
      const auto take = [&](const auto& x_gates_of, int64_t x_stride) {
        if constexpr (kNormalises<Cell>) {
          keep_products(units, rows, count, x_gates_of, x_stride, h_gates);
        } else {
          update(units, at.s, rows, count, x_gates_of, x_stride, h_gates, Gates::kBlock);
        }
      };
      if (p_.w_ih) {
        const T* const of_first = x_gates(chunk, units, rows[0].in_chunk);
        take([&](int r) { return of_first + r * Gates::kColumns; }, Gates::kBlock);
      } else {
        take([&](int r) { return chunk.input[rows[r].in_chunk] + units.begin; }, p_.H);
      }
    });
  }

  // The cell, for some units of a tile of positions: x_gates_of(r) and h_gates [count, G, h_stride] from the first of
  // them on. The strides lie between gates. Where a cell ends with an output of o and c', these take the places of its
  // first two gates: tanh is a long wait, which several rows can share. Where it normalises c', finish_row goes on.
  template <typename XGatesOf>
  void update(Units units, int64_t s, const StepRow* rows, int count, const XGatesOf& x_gates_of, int64_t x_stride,
              T* h_gates, int64_t h_stride) const {
    const int64_t H = p_.H;
    for_each_vector<T>(units.begin, units.end, H, [&](int64_t j, auto lanes) FASTRNN_INLINE {
      const int64_t in_panel = j - units.begin;
      Values<V, Plain::kParameters> w;
      for (int k = 0; k < Plain::kParameters; ++k) w[k] = load(p_.w_cell + k * H + j, lanes);
      for (int r = 0; r < count; ++r) {
        const StepRow& at = rows[r];
        const auto* const gx_row = x_gates_of(r) + in_panel;
        T* const gh_row = h_gates + r * Cell::kGates * h_stride + in_panel;
        Values<V, Cell::kGates> gx, gh;
        for (int g = 0; g < Cell::kGates; ++g) {
          gx[g] = load(gx_row + g * x_stride, lanes);
          gh[g] = load(gh_row + g * h_stride, lanes);
        }
        Values<V, Cell::kStates> prev, next;
        Values<V, Plain::kSaved> saved;
        // As the product reads it; or not at all, where a projection gives it another width than the cell's.
        if constexpr (kResetsBefore<Cell>) prev[0] = load(at.operand + j, lanes);
        if constexpr (!kResetsBefore<Cell>) prev[0] = p_.w_hr ? V{} : load(at.h + j, lanes);
        for (int k = 1; k < Cell::kStates; ++k) {
          prev[k] = at.reset ? V{} : load(p_.c_n + ((k - 1) * p_.B + at.state) * H + j, lanes);
        }
        GatesOf<Plain>::type::forward(gx, gh, w, prev, next, saved);
        if constexpr (kHasOutput<Plain> || kNormalisesC<Cell>) {
          for (int k = 0; k < Cell::kStates; ++k) store(gh_row + k * h_stride, next[k], lanes);
        } else {
          keep_h(s, at, j, prev[0], next[0], lanes);
        }
        if constexpr (kResetsBefore<Cell>) store(z_.get() + at.b * H + j, saved[1], lanes);
        if (p_.saved_gates) {
          for (int k = 0; k < Plain::kSaved; ++k) {
            store(p_.saved_gates + (at.row * Cell::kSaved + k) * H + j, saved[k], lanes);
          }
        }
        constexpr int kC = Cell::kStates > 1;
        if (Cell::kStates == kZonedStates && p_.controls.zone[kC]) {
          next[kC] = zoned(zone_share(p_.controls, kC, at.place * H + j, lanes), prev[kC], next[kC]);
        }
        for (int k = 1; k < Cell::kStates; ++k) {
          store(p_.c_n + ((k - 1) * p_.B + at.state) * H + j, next[k], lanes);
          if (p_.saved_c) store(p_.saved_c + ((k - 1) * p_.N + at.row) * H + j, next[k], lanes);
        }
        if (Cell::kStates > 1 && p_.cells) store(p_.cells + at.place * H + j, next[kC], lanes);
      }
      if constexpr (kHasOutput<Plain>) {
        for (int r = 0; r < count; ++r) {
          const T* const o = h_gates + r * Cell::kGates * h_stride + in_panel;
          const V before = p_.controls.zone[0] ? load(rows[r].h + j, lanes) : V{};
          keep_h(s, rows[r], j, before, lstm_output(load(o, lanes), load(o + h_stride, lanes)), lanes);
        }
      }
    });
  }

  // h after the s-th step of position b, as the cell made it: to where the next step, a projection or a second product
  // read it.
  template <typename Lanes>
  FASTRNN_HD void keep_h(int64_t s, const StepRow& at, int64_t j, V before, V h, Lanes lanes) const {
    if (p_.w_hr) {
      store(m_.get() + at.b * p_.H + j, h, lanes);
      if (p_.saved_m) store(p_.saved_m + at.row * p_.H + j, h, lanes);
      return;
    }
    if (p_.controls.zone[0]) h = zoned(zone_share(p_.controls, 0, at.place * p_.H + j, lanes), before, h);
    store(p_.output + at.place * p_.P + j, h, lanes);
    if (p_.h_in && at.b < p_.steps.count(s + 1)) store_h_in(s + 1, at.b, j, h, lanes);
  }

  // Of a cell that normalises: a tile's products of a panel, which split by rows only.
  template <typename XGatesOf>
  void keep_products(Units units, const StepRow* rows, int count, const XGatesOf& x_gates_of, int64_t x_stride,
                     const T* h_gates) const {
    for (int i = 0; i < count * Cell::kGates; ++i) {
      const int r = i / Cell::kGates, g = i % Cell::kGates;
      T* const of_x = products_.get() + (rows[r].b * 2 * Cell::kGates + g) * p_.H;
      for_each_vector<T>(units.begin, units.end, p_.H, [&](int64_t j, auto lanes) FASTRNN_INLINE {
        store(of_x + j, load(x_gates_of(r) + g * x_stride + j - units.begin, lanes), lanes);
        store(of_x + Cell::kGates * p_.H + j, load(h_gates + i * Gates::kBlock + j - units.begin), lanes);
      });
    }
  }

  // The rest of a step whose products are complete.
  void finish_row(int64_t s, const StepRow& at) const {
    const int64_t H = p_.H, all = 2 * Cell::kGates * H;
    T *const x_gates = products_.get() + at.b * all, *const h_gates = x_gates + all / 2;
    if (p_.saved_gates) {
      S* const saved = p_.saved_gates + (at.row * Cell::kSaved + Plain::kSaved) * H;
      for_each_vector<T>(0, all, all, [&](int64_t j, auto lanes) FASTRNN_INLINE {
        store(saved + j, load(x_gates + j, lanes), lanes);
      });
    }
    const T* gain = p_.w_cell;
    for (T* const gates : {x_gates, h_gates}) {
      for (int k = 0; k < Cell::kGroups; ++k) {
        const int64_t first = Cell::group_begin(k) * H, count = Cell::group_begin(k + 1) * H - first;
        normalise(gates + first, gain + first, gain + all / 2 + first, count,
                  [&](int64_t j, V y, auto lanes) FASTRNN_INLINE { store(gates + first + j, y, lanes); });
      }
      gain += all;
    }
    update({0, H}, s, &at, 1, [&](int) { return x_gates; }, H, h_gates, H);
    if constexpr (kNormalisesC<Cell>) {
      const T *o = h_gates, *c = o + H, *gain_c = gain;
      normalise(c, gain_c, gain_c + H, H, [&](int64_t j, V y, auto lanes) FASTRNN_INLINE {
        const V before = p_.controls.zone[0] ? load(at.h + j, lanes) : V{};
        keep_h(s, at, j, before, lstm_output(load(o + j, lanes), y), lanes);
      });
    }
  }

  void project(const LaneStep& at) const {
    constexpr int kRows = kTileRows<Projection::kVectors>;
    for_each_panel<Projection>({0, p_.P}, [&](Units units) {
      Ahead ahead = w_.hr.ahead(units.begin / Projection::kBlock + 1);
      for_each_tile(0, at.count, kRows, [&](int64_t first, int count) {
        const R* rows[kMostRows] = {};
        for (int r = 0; r < count; ++r) rows[r] = m_.get() + at.rows[first + r].b * p_.H;
        alignas(64) T h[kRows * Projection::kColumns];
        w_.hr.times(units, units.begin / Projection::kBlock, count, rows, h, ahead);
        for (int r = 0; r < count; ++r) {
          const StepRow& row = at.rows[first + r];
          const bool goes_on = row.b < p_.steps.count(at.s + 1);
          for_each_vector<T>(units.begin, units.end, p_.P, [&](int64_t j, auto lanes) {
            V h_next = load(h + r * Projection::kColumns + j - units.begin);
            if constexpr (kResetsBefore<Cell>) h_next = finish(at, row, j, h_next, lanes);
            store(p_.output + row.place * p_.P + j, h_next, lanes);
            if (p_.h_in && goes_on) store_h_in(at.s + 1, row.b, j, h_next, lanes);
          });
        }
      });
    });
  }

  // Of a cell that resets before: h after the step, from the second product.
  template <typename Lanes>
  V finish(const LaneStep& at, const StepRow& row, int64_t j, V product, Lanes lanes) const {
    const S* const gx_n = at.chunk.input[row.in_chunk] + Cell::kGates * p_.H;
    const V before = load(row.h + j, lanes), z = load(z_.get() + row.b * p_.H + j, lanes);
    V n;
    const V h_next = Cell::finish(load(gx_n + j, lanes) + product, z, before, n);
    if (p_.saved_gates) store(p_.saved_gates + (row.row * Cell::kSaved + 2) * p_.H + j, n, lanes);
    if (!p_.controls.zone[0]) return h_next;
    return zoned(zone_share(p_.controls, 0, row.place * p_.H + j, lanes), before, h_next);
  }

  const SequenceForward<S>& p_;
  const ThreadPool& pool_;
  const CpuPlan plan_;
  const int64_t panels_;
  const bool packs_own_panels_;  // each thread those that it multiplies with, else all threads together for all
  Weights<CellOf, S> w_;
  // One place for the panels of a weight that a thread packs, each used once.
  bool ih_shares_place_ = false, hh_shares_place_ = false;
  Buffer<R> m_;         // [B, H]  h before the projection, or r h
  Buffer<T> z_;         // [B, H]  of a cell that resets before
  Buffer<T> products_;  // [B, 2, G, H]  of a cell that normalises: W_ih x and W_hh h
  Buffer<S> zeros_;     // [P]  h after a reset
  std::vector<Lane> lanes_;
  Team team_;
};

}  // namespace fastrnn::FASTRNN_ISA
