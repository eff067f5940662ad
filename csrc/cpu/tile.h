// SPDX-License-Identifier: BSD-3-Clause
// Packed weights and the one matrix product of the CPU kernels. Compiled once for each instruction set, after vector.h.

namespace fastrnn::FASTRNN_ISA {

// A tile is a few rows times one panel: kVectors vectors of columns. Its sums stay in registers; what is left of them
// holds one row of the panel and a broadcast or, where that makes room for more rows, one vector of the panel and a
// broadcast of each row. There both factors of a product are needed again: without a multiply-add, as in SSE, it takes
// a register of its own.
inline constexpr int kProductRegisters = FASTRNN_VECTOR_BYTES == 16 ? 1 : 0;
template <int kVectors>
inline constexpr int kTileRows = std::max((FASTRNN_REGISTERS - kVectors - 1) / kVectors,
                                          (FASTRNN_REGISTERS - 1 - kProductRegisters) / (kVectors + 1));
template <int kVectors, int kRows>
inline constexpr bool kHoldsPanelRow = kRows * kVectors + kVectors + 1 <= FASTRNN_REGISTERS;
// Vectors of units in a panel of one gate: enough sums in flight to hide the latency of a multiply-add.
inline constexpr int kUnitVectors = FASTRNN_REGISTERS >= 32 ? 4 : 2;
inline constexpr int kMaxTileRows = 16;
static_assert(kTileRows<kUnitVectors> <= kMaxTileRows && kTileRows<3> <= kMaxTileRows && kTileRows<4> >= 1);

// How a panel maps to the rows of a weight: kGates gates times a block of kBlock units.
template <typename T, int gates>
struct PanelShape {
  static constexpr int kGates = gates;
  static constexpr int kVectorsPerGate = gates == 1 ? kUnitVectors : 1;
  static constexpr int kVectors = gates * kVectorsPerGate;
  static constexpr int kBlock = kVectorsPerGate * kWidth<T>;
  static constexpr int kColumns = gates * kBlock;
  static int64_t panels(int64_t units) { return (units + kBlock - 1) / kBlock; }
};

// Neighbouring units, from the first one of a vector on.
struct Units {
  int64_t begin, end;
};
// Of some shares of all `shares`.
template <typename T>
Units units_of(Team::Range mine, int64_t units, int64_t shares) {
  const auto first_of = [&](int64_t share) { return unit_share(units, kWidth<T>, share, shares); };
  return {first_of(mine.begin), first_of(mine.end)};
}
// Whether a step of so many rows takes its panels upwards. With few of them it waits for weights: every other step goes
// the other way then, as the panels that the step before ended with are still in the nearest cache. More rows gain less
// by that than they lose: what a processor fetches ahead lies upwards.
constexpr bool is_upwards(int64_t s, int64_t rows) {
  constexpr int64_t kFewRows = 8;
  return rows > kFewRows || s % 2 == 0;
}
// Calls f(units) for the part of each panel that `some` units have in it.
template <typename Shape, typename F>
FASTRNN_HD void for_each_panel(Units some, F f, bool ascending = true) {
  constexpr int64_t kBlock = Shape::kBlock;
  const int64_t first = some.begin / kBlock, end = some.begin < some.end ? (some.end + kBlock - 1) / kBlock : first;
  for (int64_t i = 0; i < end - first; ++i) {
    const int64_t panel = ascending ? first + i : end - 1 - i;
    f(Units{std::max(some.begin, panel * kBlock), std::min(some.end, (panel + 1) * kBlock)});
  }
}

// Transposes a square of vectors: swaps the two off-diagonal quarters of ever smaller squares along the diagonal.
template <typename T, int kHalf, bool kUpper, size_t... lane>
FASTRNN_HD Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
  constexpr size_t kW = kWidth<T>;
  return __builtin_shufflevector(a, b,
                                 (lane & kHalf ? kW + lane - (kUpper ? 0 : kHalf) : lane + (kUpper ? kHalf : 0))...);
}
template <typename T, int kHalf = kWidth<T> / 2>
FASTRNN_HD void transpose(Vec<T> (&square)[kWidth<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i & kHalf) continue;
    const Vec<T> a = square[i], b = square[i + kHalf];
    square[i] = interleave<T, kHalf, false>(a, b, std::make_index_sequence<kWidth<T>>());
    square[i + kHalf] = interleave<T, kHalf, true>(a, b, std::make_index_sequence<kWidth<T>>());
  }
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(square);
}

// Words of K values.
template <typename S>
constexpr int64_t words_of(int64_t K) {
  constexpr int64_t kDepth = Multiply<S>::kDepth;
  return (K + kDepth - 1) / kDepth;
}

// Packs the panels of w [G*units, K] that have a part of `some` units, that part of them, so that a product reads them
// front to back: [panels][K / kDepth][G][kBlock] words, with zeros past the last unit of a vector and past K.
template <typename S, int kGates>
void pack_gates(const S* w, int64_t units, int64_t K, Units some, WordOf<S>* packed) {
  using M = Multiply<S>;
  using Word = typename M::Word;
  using Shape = PanelShape<Word, kGates>;
  constexpr int kW = kWidth<Word>, kDepth = M::kDepth;
  const int64_t words = words_of<S>(K);
  for_each_panel<Shape>(some, [&](Units in_panel) {
    Word* to = packed + (in_panel.begin / Shape::kBlock - some.begin / Shape::kBlock) * words * Shape::kColumns;
    const int64_t vectors = (in_panel.end - in_panel.begin + kW - 1) / kW;
    for (int64_t i = 0; i < kGates * vectors; ++i) {
      const int64_t g = i / vectors, unit = in_panel.begin + i % vectors * kW;
      const int64_t column = g * Shape::kBlock + unit % Shape::kBlock, here = std::min<int64_t>(kW, units - unit);
      const S* from = w + (g * units + unit) * K;
      // The rows of a gate lie together, those of the next gate far from them: they are asked for in time.
      const S* const next = g + 1 < kGates ? from + units * K : w + (unit + kW) * K;
      int64_t k = 0;  // in words
      for (; here == kW && (k + kW) * kDepth <= K; k += kW) {
        Vec<Word> square[kW];
#pragma GCC unroll 16
        for (int j = 0; j < kW; ++j) square[j] = M::along(from + j * K + k * kDepth, AllLanes{});
#pragma GCC unroll 16
        for (int j = 0; kGates > 1 && j < kW; ++j) __builtin_prefetch(next + j * K + k * kDepth);
        transpose<Word>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i) store(to + (k + i) * Shape::kColumns + column, square[i]);
      }
      for (; k < words; ++k) {
        const int64_t depth = std::min<int64_t>(kDepth, K - k * kDepth);
        for (int64_t j = 0; j < kW; ++j) {
          to[k * Shape::kColumns + column + j] = j < here ? M::word(from + j * K + k * kDepth, depth) : Word{};
        }
      }
    }
  });
}

// Packs one panel, for products with a matrix [K, ..] itself: `columns` columns of it from row(k) on, k in [0, K).
// [K / kDepth][kBlock] words, with zeros past the last column of a vector and past K.
template <typename S, typename Row>
void pack_columns(int64_t K, int64_t columns, const Row& row, WordOf<S>* packed) {
  using M = Multiply<S>;
  using Word = typename M::Word;
  for (int64_t k = 0; k < K; k += M::kDepth, packed += PanelShape<Word, 1>::kBlock) {
    const S *first = row(k), *second = k + 1 < std::min<int64_t>(K, k + M::kDepth) ? row(k + 1) : nullptr;
    for_each_vector<Word>(0, columns, columns, [&](int64_t j, auto lanes) FASTRNN_INLINE {
      store(packed + j, M::words(first + j, second ? second + j : nullptr, lanes));
    });
  }
}

// An empty instruction that reads and writes a sum: clang 19 would begin with the next row of a tile before, and be one
// register short.
template <typename V>
FASTRNN_HD void added_before_the_next_row([[maybe_unused]] V& sum) {
#if defined(__clang__) && defined(__x86_64__)
  asm("" : "+v"(sum));
#endif
}

// The part that later products read of something packed. A product asks for a cache line of it with every word, so that
// it comes from an outer cache to the second one meanwhile. What is packed may be there already, if it is small.
class Ahead {
 public:
  Ahead() = default;
  template <typename Word>
  Ahead(const Word* part, int64_t words, int64_t all_words) {
    constexpr int64_t kSecondCache = 1 << 20, kBytes = sizeof(Word);
    if (all_words * kBytes > kSecondCache) next_ = reinterpret_cast<const char*>(part), left_ = words * kBytes;
  }
  // The first of as many lines as a product has words, or null.
  const char* take(int64_t words) {
    if (left_ <= 0) return nullptr;
    const char* const lines = next_;
    next_ += words * kLine, left_ -= words * kLine;
    return lines;
  }
  static constexpr int64_t kLine = 64;

 private:
  const char* next_ = nullptr;
  int64_t left_ = 0;
};

// out [kRows, kVectors*W] = start + rows [kRows, K] * panel [K / kDepth, kVectors*W], the rows of the panel `stride`
// elements apart: words, or values, [K, kVectors*W]. start: one row for all; null for zero; or `out`, which
// is added to. Only the first kUsed vectors are read and written. ahead: lines to ask for, one a word, or null.
template <typename R, int kVectors, int kUsed, int kRows, typename Panel>
void product_exact(int64_t K, const R* const* rows, const Panel* panel, int64_t stride, const Sum<R>* start,
                   Sum<R>* out, const char* ahead) {
  using M = Multiply<R>;
  using T = Sum<R>;
  using Words = Vec<typename M::Word>;
  constexpr int kW = kWidth<T>;
  // Few sums would wait for each other: even and odd k get sums of their own. All vectors count, so that a unit's sum
  // does not depend on how many are used.
  constexpr int kChains = kRows * kVectors >= 8 ? 1 : 2;
  Vec<T> sum[kChains][kRows][kUsed]{};
  if (start) {
    const int64_t next_row = start == out ? kVectors * kW : 0;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kUsed; ++v) sum[0][r][v] = load(start + r * next_row + v * kW);
    }
  }
  const R* row[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];

  const auto add = [&](int c, int64_t word, int64_t depth) FASTRNN_INLINE {
    const auto of_row = [&](int r) FASTRNN_INLINE { return M::repeat(row[r] + word * M::kDepth, depth); };
    const auto of_panel = [&](int v) FASTRNN_INLINE {
      if constexpr (M::kDepth > 1 && std::is_same_v<Panel, R>) {
        const R* const first = panel + word * M::kDepth * stride + v * kW;
        return M::words(first, depth > 1 ? first + stride : nullptr, AllLanes{});
      } else {
        return load(panel + word * stride + v * kW, AllLanes{});
      }
    };
    if constexpr (kHoldsPanelRow<kVectors, kRows>) {
      Words w[kUsed];
#pragma GCC unroll 16
      for (int v = 0; v < kUsed; ++v) w[v] = of_panel(v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Words x = of_row(r);
#pragma GCC unroll 16
        for (int v = 0; v < kUsed; ++v) M::add(sum[c][r][v], x, w[v]);
#pragma GCC unroll 16
        for (int v = 0; v < kUsed; ++v) added_before_the_next_row(sum[c][r][v]);
      }
    } else {
      Words x[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) x[r] = of_row(r);
#pragma GCC unroll 16
      for (int v = 0; v < kUsed; ++v) {
        const Words w = of_panel(v);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) M::add(sum[c][r][v], x[r], w);
      }
    }
  };
  const int64_t words = K / M::kDepth;
  int64_t word = 0;
  // With fewer rows the product itself waits for memory.
  if constexpr (kChains == 1 && kUsed == kVectors && kRows > 2 && kRows + 1 >= kTileRows<kVectors>) {
    for (; ahead && word < words; ++word) {
      __builtin_prefetch(ahead + word * Ahead::kLine, 0, 2);
      add(0, word, M::kDepth);
    }
  }
  for (; word + kChains <= words; word += kChains) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) add(c, word + c, M::kDepth);
  }
  for (; word < words; ++word) add(0, word, M::kDepth);
  if (words * M::kDepth < K) add(0, words, K - words * M::kDepth);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kUsed; ++v) {
      if constexpr (kChains == 2) sum[0][r][v] += sum[1][r][v];
      store(out + (r * kVectors + v) * kW, sum[0][r][v]);
    }
  }
}

template <typename R, int kVectors, int kUsed = kVectors, int kRows = kTileRows<kVectors>, typename Panel>
void product(int count, int64_t K, const R* const* rows, const Panel* panel, int64_t stride, const Sum<R>* start,
             Sum<R>* out, const char* ahead) {
  if (count == kRows) {
    product_exact<R, kVectors, kUsed, kRows>(K, rows, panel, stride, start, out, ahead);
  } else if constexpr (kRows > 1) {
    product<R, kVectors, kUsed, kRows - 1>(count, K, rows, panel, stride, start, out, ahead);
  }
}
// With a panel of Shape, or its part from some unit on, from which on there are `units`: vectors of a panel of one gate
// that hold none of them are left out.
template <typename R, typename Shape, int kUsed = Shape::kVectors, typename Panel>
void product_of_units(int64_t units, int count, int64_t K, const R* const* rows, const Panel* panel, int64_t stride,
                      const Sum<R>* start, Sum<R>* out, Ahead& ahead) {
  if constexpr (Shape::kGates == 1 && kUsed > 1) {
    if (units <= (kUsed - 1) * kWidth<Sum<R>>) {
      return product_of_units<R, Shape, kUsed - 1>(units, count, K, rows, panel, stride, start, out, ahead);
    }
  }
  product<R, Shape::kVectors, kUsed>(count, K, rows, panel, stride, start, out, ahead.take(words_of<R>(K)));
}

// Lane i: the sum of the lanes of v[i]. v is used up.
template <typename T, int kHalf = kWidth<T> / 2>
FASTRNN_HD Vec<T> lane_sums(Vec<T>* v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    constexpr auto kLanes = std::make_index_sequence<kWidth<T>>();
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      v[i] = interleave<T, kHalf, false>(v[i], v[i + kHalf], kLanes) +
             interleave<T, kHalf, true>(v[i], v[i + kHalf], kLanes);
    }
    return lane_sums<T, kHalf / 2>(v);
  }
}

// The lanes of a, then those of b.
template <typename T, typename HalfVec, size_t... lane>
FASTRNN_HD Vec<T> joined(HalfVec a, HalfVec b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, lane...);
}
// Lanes 0, 2, 4, .. of both, or 1, 3, 5, ..
template <int kFirst, typename V, size_t... lane>
FASTRNN_HD V every_other(V a, V b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, 2 * lane + kFirst...);
}

// How dots() adds up: kValues of a row x, or the first `count` of them, times those of a row of w, in the lanes of a
// vector.
template <typename S>
struct Dot {
  using M = Multiply<S>;
  using V = Vec<typename M::T>;
  using X = Vec<typename M::Word>;
  static constexpr int kValues = kWidth<typename M::T> * M::kDepth;
  template <typename Count>
  FASTRNN_HD static X read(const S* x, Count count) {
    return M::along(x, count);
  }
  template <typename Count>
  FASTRNN_HD static void add(V& sum, const X& x, const S* w, Count count) {
    M::add(sum, x, M::along(w, count));
  }
};
#if defined(FASTRNN_WIDEN)
// Of `count` values, how many are among the `width` from `first` on.
FASTRNN_HD AllLanes count_within(AllLanes, int /*first*/, int /*width*/) { return {}; }
FASTRNN_HD int count_within(int count, int first, int width) { return std::clamp(count - first, 0, width); }
// Words of two values each: their widening is a shift, or a mask.
template <>
struct Dot<WidenedBf16> {
  using V = Vec<float>;
  static constexpr int kWords = kWidth<float>, kValues = 2 * kWords;
  struct X {
    V even, odd;
  };
  template <typename Count>
  FASTRNN_HD static X read(const float* x, Count count) {
    const V first = load(x, count_within(count, 0, kWords));
    const V second = load(x + kWords, count_within(count, kWords, kWords));
    constexpr auto kLanes = std::make_index_sequence<kWords>();
    return {every_other<0>(first, second, kLanes), every_other<1>(first, second, kLanes)};
  }
  template <typename Count>
  FASTRNN_HD static void add(V& sum, const X& x, const WidenedBf16* w, Count count) {
    const auto words = load_bits<Vec<uint32_t>>(w, count);
    sum += x.even * bit_cast<V>(words << 16);
    sum += x.odd * bit_cast<V>(words & 0xFFFF0000);
  }
};
// Vectors of 8: wider conversions take more than twice the time on the processors that split them. A whole cache line
// of them, if there are registers for it.
template <>
struct Dot<Half> {
  typedef float V __attribute__((vector_size(32)));
  static constexpr int kParts = FASTRNN_REGISTERS >= 32 ? 4 : 1, kValues = 8 * kParts;
  struct X {
    V part[kParts];
  };
  template <typename Count>
  FASTRNN_HD static X read(const float* x, Count count) {
    constexpr int kW = kWidth<float>;
    Vec<float> vectors[kValues / kW];
    for (int i = 0; i < kValues / kW; ++i) vectors[i] = load(x + i * kW, count_within(count, i * kW, kW));
    return bit_cast<X>(vectors);
  }
  template <typename Count>
  FASTRNN_HD static void add(V& sum, const X& x, const Half* w, Count count) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      sum += x.part[i] * (V)_mm256_cvtph_ps(load_bits<__m128i>(w + 8 * i, count_within(count, 8 * i, 8)));
    }
  }
};
#endif

// The dot products of x [K] with `lanes` rows of w [lanes, K]. Lanes past them repeat the last one.
template <typename S, typename Lanes, typename T = Sum<S>>
FASTRNN_HD Vec<T> dots(int64_t K, const Operand<S>* x, const S* w, Lanes lanes) {
  using D = Dot<S>;
  constexpr int kW = kWidth<T>, kValues = D::kValues;
  typename D::V sums[kW];
#pragma GCC unroll 16
  for (int j = 0; j < kW; ++j) sums[j] = typename D::V{};
  // A pointer to every fourth row, and the others at fixed distances: one for each would not fit the registers.
  constexpr bool kAll = std::is_same_v<Lanes, AllLanes>;
  const S* fourth[(kW + 3) / 4];
  for (int i = 0; i < (kW + 3) / 4; ++i) fourth[i] = w + i * 4 * K;
  const auto row = [&](int j) FASTRNN_INLINE {
    if constexpr (kAll) {
      return fourth[j / 4] + j % 4 * K;
    } else {
      return w + std::min(j, lanes - 1) * K;
    }
  };
  int64_t k = 0;
  const auto add = [&](auto count) FASTRNN_INLINE {
    const typename D::X values = D::read(x + k, count);
#pragma GCC unroll 16
    for (int j = 0; j < kW; ++j) D::add(sums[j], values, row(j) + k, count);
  };
  for (; k + kValues <= K; k += kValues) add(AllLanes{});
  if (k < K) add(static_cast<int>(K - k));
  if constexpr (sizeof sums[0] == sizeof(Vec<T>)) {
    return lane_sums<T>(sums);
  } else {  // halves of vectors: the first of their steps comes for free
    Vec<T> pairs[kW / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kW / 2; ++i) pairs[i] = joined<T>(sums[i], sums[i + kW / 2], std::make_index_sequence<kW>());
    return lane_sums<T, kW / 4>(pairs);
  }
}

// A product with `some` units of a panel of w [G*units, K] as it is, with its bias [G*units] or null: what product()
// gives for the packed panel.
template <typename S, int kGates>
void product_unpacked(int count, int64_t K, const Operand<S>* const* rows, const S* w, const Sum<S>* bias,
                      int64_t units, Units some, Sum<S>* out) {
  using T = Sum<S>;
  using Shape = PanelShape<T, kGates>;
  for (int g = 0; g < kGates; ++g) {
    for_each_vector<T>(some.begin, some.end, units, [&](int64_t unit, auto lanes) FASTRNN_INLINE {
      const int64_t row = g * units + unit, column = g * Shape::kBlock + unit - some.begin;
      const Vec<T> start = bias ? load(bias + row, lanes) : Vec<T>{};
      for (int r = 0; r < count; ++r) {
        store(out + r * Shape::kColumns + column, start + dots(K, rows[r], w + row * K, lanes));
      }
    });
  }
}

// Calls f(first row, rows) over [begin, end) in tiles of at most `most` rows, of sizes as even as can be: 6, 5, 5 is
// faster than 6, 6, 4.
template <typename F>
FASTRNN_HD void for_each_tile(int64_t begin, int64_t end, int most, F f) {
  const int64_t count = end - begin;
  const int64_t tiles = (count + most - 1) / most;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = begin + count * i / tiles;
    f(first, static_cast<int>(begin + count * (i + 1) / tiles - first));
  }
}

}  // namespace fastrnn::FASTRNN_ISA
