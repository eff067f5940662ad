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
  in_parallel(pool, (p.N + kRowsPerBlock - 1) / kRowsPerBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t panel = 0; panel < Panel::panels(p.I); ++panel) {
        const int64_t j0 = panel * Panel::kBlock;
        const int64_t last = std::min(p.N, (block + 1) * kRowsPerBlock);
        for_each_tile(block * kRowsPerBlock, last, kRows, [&](int64_t first, int count) {
          alignas(64) T tile[kRows * Panel::kColumns];
          w.times(panel, p.d_gates, first, count, tile);
          for (int r = 0; r < count; ++r) {
            for_each_vector<T>(j0, j0 + Panel::kBlock, p.I, [&](int64_t j, auto lanes) FASTRNN_INLINE {
              store(p.d_input[first + r] + j, load(tile + r * Panel::kColumns + j - j0), lanes);
            });
          }
        });
      }
    }
  });
}

// d_weight = d_gates^T rows, and the sum of d_gates. The sum over N runs in blocks: those of the rows, packed, and of
// d_gates, transposed, stay in L2. Threads split the rows of d_weight.
template <typename S>
class WeightGradients {
 public:
  WeightGradients(const WeightGradient<S>& p, const ThreadPool& pool)
      : p_(p), pool_(worth_threads(p.N * p.M * p.K) ? pool : kOneThread) {}

  void run() const {
    const int64_t groups = (p_.M + kGroup - 1) / kGroup;
    const int64_t shares = std::min<int64_t>(pool_.threads, groups);
    std::vector<Buffer<Word>> packed;
    const int64_t words = Panel::panels(p_.K) * words_of<S>(kRowsPerBlock) * Panel::kColumns;
    for (int64_t i = 0; i < shares; ++i) packed.emplace_back(words);
    in_parallel(pool_, shares, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) share(groups * i / shares, groups * (i + 1) / shares, packed[i].get());
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
  // Rows of d_weight whose d_gates are transposed at a time: whole tiles and squares.
  static constexpr int64_t kGroup = 48;
  static_assert(kGroup % kW == 0);

  void share(int64_t group_begin, int64_t group_end, Word* packed) const {
    for (int64_t n0 = 0; n0 < p_.N; n0 += kRowsPerBlock) {
      const int64_t depth = std::min(kRowsPerBlock, p_.N - n0);
      pack_rows(n0, depth, packed);
      for (int64_t group = group_begin; group < group_end; ++group) {
        const int64_t m0 = group * kGroup, count = std::min(kGroup, p_.M - m0);
        alignas(64) R gates[kGroup * kRowsPerBlock];  // [count, depth]
        transpose_gates(n0, depth, m0, count, gates);
        if (p_.d_bias) add_bias(n0, depth, m0, count, gates);
        if (p_.d_weight) add_products(n0, depth, m0, count, gates, packed);
      }
    }
    if (p_.N == 0) clear(group_begin * kGroup, std::min(p_.M, group_end * kGroup));
  }

  void clear(int64_t begin, int64_t end) const {
    if (p_.d_weight) std::fill(p_.d_weight + begin * p_.K, p_.d_weight + end * p_.K, T(0));
    if (p_.d_bias) std::fill(p_.d_bias + begin, p_.d_bias + end, T(0));
  }

  void pack_rows(int64_t n0, int64_t depth, Word* packed) const {
    if (!p_.d_weight) return;
    for (int64_t panel = 0; panel < Panel::panels(p_.K); ++panel) {
      const int64_t j0 = panel * Panel::kBlock, width = std::min<int64_t>(Panel::kBlock, p_.K - j0);
      pack_columns<S>(
          depth, width, [&](int64_t n) { return p_.rows[n0 + n] + j0; },
          packed + panel * words_of<S>(depth) * Panel::kColumns);
    }
  }

  void transpose_gates(int64_t n0, int64_t depth, int64_t m0, int64_t count, R* gates) const {
    const auto row = [&](int64_t n) { return p_.d_gates + (n0 + n) * p_.M + m0; };
    for (int64_t m = 0; m < count; m += kW) {
      const int64_t here = std::min<int64_t>(kW, count - m);
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

  void add_bias(int64_t n0, int64_t depth, int64_t m0, int64_t count, const R* gates) const {
    const R ones[2] = {M::kOne, M::kOne};
    const auto one = M::repeat(ones, M::kDepth);
    for (int64_t m = 0; m < count; ++m) {
      Vec<T> sums{};
      int64_t n = 0;
      for (; n + kW * M::kDepth <= depth; n += kW * M::kDepth) {
        M::add(sums, one, M::along(gates + m * depth + n, AllLanes{}));
      }
      T sum = n0 == 0 ? T(0) : p_.d_bias[m0 + m];
      for (; n < depth; ++n) sum += M::widen(gates[m * depth + n]);
      for (int i = 0; i < kW; ++i) sum += sums[i];
      p_.d_bias[m0 + m] = sum;
    }
  }

  void add_products(int64_t n0, int64_t depth, int64_t m0, int64_t count, const R* gates, const Word* packed) const {
    for (int64_t panel = 0; panel < Panel::panels(p_.K); ++panel) {
      const int64_t j0 = panel * Panel::kBlock;
      for_each_tile(0, count, kRows, [&](int64_t m, int tile_rows) {
        const R* rows[kMaxTileRows];
        for (int r = 0; r < tile_rows; ++r) rows[r] = gates + (m + r) * depth;
        alignas(64) T tile[kRows * Panel::kColumns];
        product_packed<R, Panel>(p_.K - j0, tile_rows, depth, rows,
                                 packed + panel * words_of<S>(depth) * Panel::kColumns, nullptr, tile);
        for (int r = 0; r < tile_rows; ++r) {
          for_each_vector<T>(j0, j0 + Panel::kBlock, p_.K, [&](int64_t j, auto lanes) FASTRNN_INLINE {
            T* to = p_.d_weight + (m0 + m + r) * p_.K + j;
            const Vec<T> part = load(tile + r * Panel::kColumns + j - j0);
            store(to, n0 == 0 ? part : part + load(to, lanes), lanes);
          });
        }
      });
    }
  }

  const WeightGradient<S>& p_;
  const ThreadPool& pool_;
};

}  // namespace fastrnn::FASTRNN_ISA
