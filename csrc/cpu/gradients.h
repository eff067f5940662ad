// SPDX-License-Identifier: BSD-3-Clause
// The products over all steps at once that end a backward pass. Compiled once for each instruction set, after
// weights.h.

namespace fastrnn::FASTRNN_ISA {

// d_input = d_gates W: a block of rows stays in L2 while the panels of W pass.
template <typename S>
void input_gradient(const InputGradient<S>& p, const ThreadPool& all_threads) {
  using T = Sum<S>;
  using Panel = PanelShape<T, 1>;
  constexpr int kRows = kTileRows<Panel::kVectors>;
  constexpr int64_t kRowsPerBlock = 16 * kRows;
  const ThreadPool& pool = worth_threads(p.N * p.M * p.I) ? all_threads : kOneThread;
  // Words of several rows are put together for every tile, unless they are packed.
  const int64_t rows_worth_packing = Multiply<S>::kDepth > 1 ? kRows + 1 : kRowsWorthPacking;
  const Columns<S> w(p.w_ih, p.I, p.M, p.N >= rows_worth_packing, pool);
  const auto block_of = [&](int64_t first, int64_t last, Units units) {
    w.times(
        units, p.d_gates, first, last, [](int64_t, int) {},
        [&](int64_t n, int count, const T* sums) {
          for (int r = 0; r < count; ++r) {
            for_each_vector<T>(units.begin, units.end, p.I, [&](int64_t j, auto lanes) FASTRNN_INLINE {
              store(p.d_input[n + r] + j, load(sums + r * Panel::kColumns + j - units.begin), lanes);
            });
          }
        });
  };
  const ProductShares shares(p.N, kRows, p.I, Panel::kBlock, pool.threads);
  in_parallel(pool, shares.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ProductShares::Share share = shares[i];
      for (int64_t first = share.row_begin; first < share.row_end; first += kRowsPerBlock) {
        for_each_panel<Panel>({share.column_begin, share.column_end}, [&](Units units) {
          block_of(first, std::min(share.row_end, first + kRowsPerBlock), units);
        });
      }
    }
  });
}

// d_weight = d_gates^T rows, of both weights at once, and the sum of d_gates. The sum over N runs in blocks: those of
// the rows, packed, and of d_gates, transposed, stay in L2. Threads share the rows of d_weight and, where these are
// few, the panels of its columns.
template <typename S>
class WeightGradients {
 public:
  WeightGradients(const WeightGradient<S>& p, const ThreadPool& pool)
      : p_(p),
        second_column_(Panel::panels(columns(p.first)) * Panel::kBlock),
        columns_(second_column_ + columns(p.second)),
        block_rows_(block_rows(p.M * columns_)),
        pool_(worth_threads(p.N * p.M * columns_) ? pool : kOneThread) {}

  void run() const {
    const ProductShares split(p_.M, kW, columns_, Panel::kBlock, pool_.threads, kTranspose, kPack);
    std::vector<Share> shares;
    for (int64_t i = 0; i < split.count(); ++i) shares.emplace_back(split[i], p_.N, block_rows_);
    in_parallel(pool_, split.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run_share(shares[i]);
    });
  }

 private:
  using R = Operand<S>;
  using M = Multiply<R>;
  using T = typename M::T;
  using Word = typename M::Word;
  using Panel = PanelShape<T, 1>;
  using Weight = typename WeightGradient<S>::Weight;
  static constexpr int kW = kWidth<T>;
  static constexpr int kRows = kTileRows<Panel::kVectors>;
  // Rows of N that a block takes: 384 words, of float, of a column of d_gates. Large gradients are in memory, where
  // each block adds to them: fewer, longer blocks.
  static constexpr int64_t kMostRows = 3072 / sizeof(Word) * M::kDepth, kManyWeights = 4 << 20;
  static int64_t block_rows(int64_t weights) { return weights > kManyWeights ? kMostRows : kMostRows / 2; }
  // So few rows of N that it takes longer to write their sums than to make them; more where the sums go to memory.
  static constexpr int kFewRows = 8;
  static int64_t few_rows(int64_t weights) { return weights > kManyWeights ? kFewRows : kFewRows / 2; }
  // Rows of d_weight whose d_gates are transposed at a time: whole squares and, if possible, tiles.
  static constexpr int64_t kGroup = 48;
  static_assert(kGroup % kW == 0);
  // What a thread does beside products, of 16 rows with a panel: transposes 16 of d_gates, packs a panel of rows.
  static constexpr double kTranspose = 0.2, kPack = 0.2;
  static constexpr bool kNarrows = !std::is_same_v<S, T>;

  struct Share : ProductShares::Share {
    Buffer<Word> packed;  // [panels, words of a block, kBlock]
    Buffer<T> bias;       // [rows]  sums over the blocks so far
    Buffer<T> sums;       // [rows, columns]  likewise, if the results are of 16 bits

    // block: rows of N in one.
    Share(const ProductShares::Share& share, int64_t N, int64_t block)
        : ProductShares::Share(share),
          packed(Panel::panels(columns()) * panel_words(std::min(N, block))),
          bias(rows()) {
      if (kNarrows && N > block) sums = Buffer<T>(rows() * columns());
    }
    int64_t rows() const { return row_end - row_begin; }
    int64_t columns() const { return column_end - column_begin; }
    static int64_t panel_words(int64_t depth) { return words_of<S>(depth) * Panel::kColumns; }
    // That of a column, counted from the share's first on.
    Word* panel(int64_t column, int64_t depth) const {
      return packed.get() + column / Panel::kBlock * panel_words(depth);
    }
    Ahead panel_after(int64_t column, int64_t depth) const {
      if (column + Panel::kBlock >= columns()) return {};
      return {panel(column + Panel::kBlock, depth), panel_words(depth), Panel::panels(columns()) * panel_words(depth)};
    }
  };

  // Rows of N, and of d_weight.
  struct Block {
    int64_t n0, depth, m0, count;
    const R* gates;  // [count, depth]
  };

  static int64_t columns(const Weight& weight) { return weight.d_weight ? weight.K : 0; }
  // Columns of shares are counted through both weights, each of them from a whole panel on. Calls f(weight, its
  // columns, the first of them in the share).
  template <typename F>
  void for_each_panel_of(const Share& share, const F& f) const {
    for_each_panel<Panel>({share.column_begin, share.column_end}, [&](Units units) {
      const bool second = units.begin >= second_column_;
      const Weight& weight = second ? p_.second : p_.first;
      const int64_t before = second ? second_column_ : 0;
      f(weight, Units{units.begin - before, std::min(weight.K, units.end - before)}, units.begin - share.column_begin);
    });
  }

  void run_share(const Share& share) const {
    if (p_.N <= few_rows(p_.M * columns_)) return write_rows(share);
    for (int64_t n0 = 0; n0 < p_.N; n0 += block_rows_) {
      const int64_t depth = std::min(block_rows_, p_.N - n0);
      for_each_panel_of(share, [&](const Weight& weight, Units units, int64_t column) {
        const auto row = [&](int64_t n) { return weight.rows[n0 + n] + units.begin; };
        pack_columns<S>(depth, units.end - units.begin, row, share.panel(column, depth));
      });
      for_each_tile(share.row_begin / kW, (share.row_end + kW - 1) / kW, kGroup / kW, [&](int64_t first, int squares) {
        alignas(64) R gates[kGroup * kMostRows];
        const int64_t m0 = first * kW;
        const Block block{n0, depth, m0, std::min<int64_t>(squares * kW, share.row_end - m0), gates};
        transpose_gates(block, gates);
        if (share.column_begin == 0) add_bias(share, block);
        add_products(share, block);
      });
    }
  }

  // Of few rows, or none: memory takes one row of d_weight after the other sooner than a tile of them.
  template <int kFew = kFewRows>
  void write_rows(const Share& share) const {
    if constexpr (kFew > 0) {
      if (p_.N < kFew) return write_rows<kFew - 1>(share);
    }
    for (const Weight* weight : {&p_.first, &p_.second}) {
      const int64_t K = columns(*weight), before = weight == &p_.first ? 0 : second_column_;
      const int64_t begin = std::max<int64_t>(0, share.column_begin - before);
      const int64_t end = std::min(K, share.column_end - before);
      for (int64_t m = share.row_begin; m < share.row_end; ++m) {
        Vec<T> gates[std::max(1, kFew)];
        T bias = 0;
#pragma GCC unroll 8
        for (int n = 0; n < kFew; ++n) {
          const T gate = M::widen(p_.d_gates[n * p_.M + m]);
          gates[n] = broadcast<Vec<T>>(gate);
          bias += gate;
        }
        for_each_vector<T>(begin, end, K, [&](int64_t j, auto lanes) FASTRNN_INLINE {
          Vec<T> sum{};
#pragma GCC unroll 8
          for (int n = 0; n < kFew; ++n) sum += gates[n] * load(weight->rows[n] + j, lanes);
          store(weight->d_weight + m * K + j, sum, lanes);
        });
        if (weight->d_bias && share.column_begin == 0) store(weight->d_bias + m, broadcast<Vec<T>>(bias), 1);
      }
    }
  }

  void transpose_gates(const Block& block, R* gates) const {
    const int64_t depth = block.depth, in_squares = block.count / kW * kW;
    const auto row = [&](int64_t n) { return p_.d_gates + (block.n0 + n) * p_.M + block.m0; };
    const auto one_by_one = [&](int64_t n, int64_t first) {
      for (int64_t m = first; m < block.count; ++m) gates[m * depth + n] = row(n)[m];
    };
    int64_t n = 0;
    for (; n + kW * M::kDepth <= depth; n += kW * M::kDepth) {
      for (int64_t m = 0; m < in_squares; m += kW) {
        Vec<Word> square[kW];
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i) {
          const int64_t first = n + i * M::kDepth;
          square[i] = M::words(row(first) + m, row(first + M::kDepth - 1) + m, AllLanes{});
        }
        transpose<Word>(square);
#pragma GCC unroll 16
        for (int j = 0; j < kW; ++j) std::memcpy(gates + (m + j) * depth + n, &square[j], sizeof square[j]);
      }
      for (int64_t i = n; i < n + kW * M::kDepth; ++i) one_by_one(i, in_squares);
    }
    for (; n < depth; ++n) one_by_one(n, 0);
  }

  bool is_last(const Block& block) const { return block.n0 + block.depth == p_.N; }

  void add_bias(const Share& share, const Block& block) const {
    if (!p_.first.d_bias && !p_.second.d_bias) return;
    const R ones[2] = {M::kOne, M::kOne};
    const auto one = M::repeat(ones, M::kDepth);
    for (int64_t m = 0; m < block.count; ++m) {
      const R* const gates = block.gates + m * block.depth;
      Vec<T> sums{};
      int64_t n = 0;
      for (; n + kW * M::kDepth <= block.depth; n += kW * M::kDepth) M::add(sums, one, M::along(gates + n, AllLanes{}));
      T* const sum = share.bias.get() + block.m0 + m - share.row_begin;
      if (block.n0 == 0) *sum = 0;
      for (; n < block.depth; ++n) *sum += M::widen(gates[n]);
      for (int i = 0; i < kW; ++i) *sum += sums[i];
      for (const Weight& of : {p_.first, p_.second}) {
        if (of.d_bias && is_last(block)) store(of.d_bias + block.m0 + m, broadcast<Vec<T>>(*sum), 1);
      }
    }
  }

  // Long sums read each panel once. Short ones wait for the results: a tile of them is written from end to end.
  void add_products(const Share& share, const Block& block) const {
    constexpr int64_t kShort = 32;
    if (block.depth <= kShort) {
      Ahead nothing;
      for_each_tile(0, block.count, kRows, [&](int64_t first, int count) {
        for_each_panel_of(share, [&](const Weight& weight, Units units, int64_t column) {
          add_tile(share, block, weight, units, column, first, count, nothing);
        });
      });
    } else {
      for_each_panel_of(share, [&](const Weight& weight, Units units, int64_t column) {
        Ahead ahead = share.panel_after(column, block.depth);
        for_each_tile(0, block.count, kRows, [&](int64_t first, int count) {
          add_tile(share, block, weight, units, column, first, count, ahead);
        });
      });
    }
  }

  // `count` rows of the block from `first` on, of one panel, whose first column of the share is `column`.
  FASTRNN_HD void add_tile(const Share& share, const Block& block, const Weight& weight, Units units, int64_t column,
                           int64_t first, int count, Ahead& ahead) const {
    const auto result = [&](int r) FASTRNN_INLINE { return weight.d_weight + (block.m0 + first + r) * weight.K; };
    // Sums over the blocks gather in the results or, where narrowing would round each of them, beside.
    const auto so_far = [&](int r, int64_t j) FASTRNN_INLINE {
      if constexpr (kNarrows) {
        const int64_t row = block.m0 + first + r - share.row_begin;
        return share.sums.get() + row * share.columns() + column + j - units.begin;
      } else {
        return result(r) + j;
      }
    };
    const R* rows[kMaxTileRows] = {};
    for (int r = 0; r < count; ++r) {
      rows[r] = block.gates + (first + r) * block.depth;
      if (block.n0 > 0) prefetch(so_far(r, units.begin), units.end - units.begin, true);
    }
    alignas(64) T tile[kRows * Panel::kColumns];
    product_of_units<R, Panel>(units.end - units.begin, count, block.depth, rows, share.panel(column, block.depth),
                               Panel::kColumns, nullptr, tile, ahead);
    for (int r = 0; r < count; ++r) {
      for_each_vector<T>(units.begin, units.end, weight.K, [&](int64_t j, auto lanes) FASTRNN_INLINE {
        Vec<T> sum = load(tile + r * Panel::kColumns + j - units.begin);
        if (block.n0 > 0) sum += load(so_far(r, j), lanes);
        if (is_last(block)) {
          store(result(r) + j, sum, lanes);
        } else {
          store(so_far(r, j), sum, lanes);
        }
      });
    }
  }

  const WeightGradient<S>& p_;
  const int64_t second_column_, columns_, block_rows_;
  const ThreadPool& pool_;
};

}  // namespace fastrnn::FASTRNN_ISA
