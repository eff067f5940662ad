// SPDX-License-Identifier: BSD-3-Clause
// The products over all steps at once that end a backward pass. Compiled once for each instruction set, after tile.h.

namespace fastrnn::FASTRNN_ISA {

// d_input = d_gates W: a block of rows stays in L2 while the panels of W pass.
template <typename S>
void input_gradient(const InputGradient<S>& p, const ThreadPool& all_threads) {
  using T = Sum<S>;
  using Panel = PanelShape<T, 1>;
  constexpr int kRows = kTileRows<Panel::kVectors>;
  constexpr int64_t kRowsPerBlock = 16 * kRows;
  const ThreadPool& pool = worth_threads(p.N * p.M * p.I) ? all_threads : kOneThread;
  const Columns<S> w(p.w_ih, p.I, p.M, p.N >= kRowsWorthPacking, pool);
  const auto block_of = [&](int64_t first, int64_t last, Units units) {
    for_each_tile(first, last, kRows, [&](int64_t n, int count) {
      alignas(64) T tile[kRows * Panel::kColumns];
      w.times(units, p.d_gates, n, count, tile);
      for (int r = 0; r < count; ++r) {
        for_each_vector<T>(units.begin, units.end, p.I, [&](int64_t j, auto lanes) FASTRNN_INLINE {
          store(p.d_input[n + r] + j, load(tile + r * Panel::kColumns + j - units.begin), lanes);
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

// d_weight = d_gates^T rows, and the sum of d_gates. The sum over N runs in blocks: those of the rows, packed, and of
// d_gates, transposed, stay in L2. Threads share the rows of d_weight and, where these are few, the panels of its
// columns.
template <typename S>
class WeightGradients {
 public:
  WeightGradients(const WeightGradient<S>& p, const ThreadPool& pool)
      : p_(p), pool_(worth_threads(p.N * p.M * p.K) ? pool : kOneThread) {}

  void run() const {
    const int64_t columns = p_.d_weight ? p_.K : 0;
    const ProductShares split(p_.M, kW, columns, Panel::kBlock, pool_.threads, kTranspose, kPack);
    std::vector<Share> shares;
    for (int64_t i = 0; i < split.count(); ++i) shares.emplace_back(split[i], p_.N);
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
  static constexpr int kW = kWidth<T>;
  static constexpr int kRows = kTileRows<Panel::kVectors>;
  static constexpr int64_t kRowsPerBlock = 256 * M::kDepth;
  // Rows of d_weight whose d_gates are transposed at a time: whole squares and, if possible, tiles.
  static constexpr int64_t kGroup = 48;
  static_assert(kGroup % kW == 0);
  // What a thread does beside products, of 16 rows with a panel: transposes 16 of d_gates, packs a panel of rows.
  static constexpr double kTranspose = 0.2, kPack = 0.2;
  static constexpr bool kNarrows = !std::is_same_v<S, T>;

  struct Share : ProductShares::Share {
    Buffer<Word> packed;   // [panels, words of a block, kBlock]
    Buffer<T> sums, bias;  // [rows, columns], [rows]: over the blocks so far, if the results are of 16 bits

    Share(const ProductShares::Share& share, int64_t N)
        : ProductShares::Share(share), packed(Panel::panels(columns()) * panel_words(kRowsPerBlock)) {
      if (!kNarrows || N <= kRowsPerBlock) return;
      sums = Buffer<T>(rows() * columns());
      bias = Buffer<T>(rows());
    }
    int64_t rows() const { return row_end - row_begin; }
    int64_t columns() const { return column_end - column_begin; }
    static int64_t panel_words(int64_t depth) { return words_of<S>(depth) * Panel::kColumns; }
    Word* panel(Units units, int64_t depth) const {
      return packed.get() + (units.begin - column_begin) / Panel::kBlock * panel_words(depth);
    }
  };

  // Rows of N, and of d_weight.
  struct Block {
    int64_t n0, depth, m0, count;
    const R* gates;  // [count, depth]
  };

  void run_share(const Share& share) const {
    for (int64_t n0 = 0; n0 < p_.N; n0 += kRowsPerBlock) {
      const int64_t depth = std::min(kRowsPerBlock, p_.N - n0);
      pack_rows(share, n0, depth);
      for_each_tile(share.row_begin / kW, (share.row_end + kW - 1) / kW, kGroup / kW, [&](int64_t first, int squares) {
        alignas(64) R gates[kGroup * kRowsPerBlock];
        const int64_t m0 = first * kW;
        const Block block{n0, depth, m0, std::min<int64_t>(squares * kW, share.row_end - m0), gates};
        transpose_gates(block, gates);
        if (p_.d_bias && share.column_begin == 0) add_bias(share, block);
        if (p_.d_weight) add_products(share, block);
      });
    }
    if (p_.N == 0) clear(share);
  }

  void clear(const Share& share) const {
    const int64_t begin = share.row_begin, end = share.row_end;
    if (p_.d_weight) std::fill(p_.d_weight + begin * p_.K, p_.d_weight + end * p_.K, S{});
    if (p_.d_bias) std::fill(p_.d_bias + begin, p_.d_bias + end, S{});
  }

  void pack_rows(const Share& share, int64_t n0, int64_t depth) const {
    if (!p_.d_weight) return;
    for_each_panel<Panel>({share.column_begin, share.column_end}, [&](Units units) {
      const auto row = [&](int64_t n) { return p_.rows[n0 + n] + units.begin; };
      pack_columns<S>(depth, units.end - units.begin, row, share.panel(units, depth));
    });
  }

  void transpose_gates(const Block& block, R* gates) const {
    const int64_t depth = block.depth;
    const auto row = [&](int64_t n) { return p_.d_gates + (block.n0 + n) * p_.M + block.m0; };
    for (int64_t m = 0; m < block.count; m += kW) {
      const int64_t here = std::min<int64_t>(kW, block.count - m);
      int64_t n = 0;
      for (; here == kW && n + kW * M::kDepth <= depth; n += kW * M::kDepth) {
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
      for (; n < depth; ++n) {
        for (int64_t j = 0; j < here; ++j) gates[(m + j) * depth + n] = row(n)[m + j];
      }
    }
  }

  // The sums over the blocks of N gather in the results or, where those are of 16 bits, at wide(), lest each sum be
  // rounded. The last block gives the results.
  template <typename Wide, typename Lanes>
  FASTRNN_HD void add_up(const Block& block, Vec<T> sum, S* result, const Wide& wide, Lanes lanes) const {
    const auto so_far = [&] {
      if constexpr (kNarrows) {
        return wide();
      } else {
        return result;
      }
    };
    if (block.n0 > 0) sum += load(so_far(), lanes);
    if (block.n0 + block.depth < p_.N) {
      store(so_far(), sum, lanes);
    } else {
      store(result, sum, lanes);
    }
  }

  void add_bias(const Share& share, const Block& block) const {
    const R ones[2] = {M::kOne, M::kOne};
    const auto one = M::repeat(ones, M::kDepth);
    for (int64_t m = 0; m < block.count; ++m) {
      const R* const gates = block.gates + m * block.depth;
      Vec<T> sums{};
      int64_t n = 0;
      for (; n + kW * M::kDepth <= block.depth; n += kW * M::kDepth) M::add(sums, one, M::along(gates + n, AllLanes{}));
      T sum = 0;
      for (; n < block.depth; ++n) sum += M::widen(gates[n]);
      for (int i = 0; i < kW; ++i) sum += sums[i];
      const int64_t row = block.m0 + m;
      const auto wide = [&] { return share.bias.get() + row - share.row_begin; };
      add_up(block, broadcast<Vec<T>>(sum), p_.d_bias + row, wide, 1);
    }
  }

  void add_products(const Share& share, const Block& block) const {
    for_each_panel<Panel>({share.column_begin, share.column_end}, [&](Units units) {
      const Word* const panel = share.panel(units, block.depth);
      for_each_tile(0, block.count, kRows, [&](int64_t first, int count) {
        const R* rows[kMaxTileRows];
        for (int r = 0; r < count; ++r) rows[r] = block.gates + (first + r) * block.depth;
        alignas(64) T tile[kRows * Panel::kColumns];
        product_of_units<R, Panel>(units.end - units.begin, count, block.depth, rows, panel, Panel::kColumns, nullptr,
                                   tile);
        for (int r = 0; r < count; ++r) {
          const int64_t m = block.m0 + first + r;
          for_each_vector<T>(units.begin, units.end, p_.K, [&](int64_t j, auto lanes) FASTRNN_INLINE {
            const Vec<T> sum = load(tile + r * Panel::kColumns + j - units.begin);
            const auto wide = [&] {
              return share.sums.get() + (m - share.row_begin) * share.columns() + j - share.column_begin;
            };
            add_up(block, sum, p_.d_weight + m * p_.K + j, wide, lanes);
          });
        }
      });
    });
  }

  const WeightGradient<S>& p_;
  const ThreadPool& pool_;
};

}  // namespace fastrnn::FASTRNN_ISA
