// SPDX-License-Identifier: BSD-3-Clause
// Vectors, packed weights and the one matrix product of the CPU kernels. Compiled once for each instruction set, in a
// namespace of its own: the including file defines
//   FASTRNN_ISA           the namespace
//   FASTRNN_VECTOR_BYTES  the width of a vector register
//   FASTRNN_REGISTERS     how many there are
//   FASTRNN_BF16          if there is an instruction that multiplies pairs of bfloat16
// and includes the standard headers before it switches the instruction set on.

// Inlined wherever it is called, or the sums would leave the registers.
#define FASTRNN_INLINE __attribute__((always_inline))

namespace fastrnn::FASTRNN_ISA {

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct VecOf<Bf16> {};  // bfloat16 is widened to float
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
inline constexpr int kWidth = FASTRNN_VECTOR_BYTES / sizeof(T);

template <typename T>
FASTRNN_HD Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
FASTRNN_HD void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}
// The first `lanes` lanes only: at the end of a row of units. The others read as 0.
template <typename T>
Vec<T> load(const T* from, int lanes) {
  Vec<T> v{};
  std::memcpy(&v, from, sizeof(T) * lanes);
  return v;
}
template <typename T>
void store(T* to, Vec<T> v, int lanes) {
  std::memcpy(to, &v, sizeof(T) * lanes);
}
// All lanes, known when compiling.
struct AllLanes {};
template <typename T>
FASTRNN_HD Vec<T> load(const T* from, AllLanes) {
  return load(from);
}
template <typename T>
FASTRNN_HD void store(T* to, Vec<T> v, AllLanes) {
  store(to, v);
}
// Calls f(unit, lanes) for the vectors of units [begin, min(end, units)): the hot ones without a question about lanes.
template <typename T, typename F>
FASTRNN_HD void for_each_vector(int64_t begin, int64_t end, int64_t units, F f) {
  for (int64_t j = begin; j < std::min(end, units); j += kWidth<T>) {
    if (j + kWidth<T> <= units) {
      f(j, AllLanes{});
    } else {
      f(j, static_cast<int>(units - j));
    }
  }
}

// Asks for a block of a row that will be read or written after the product that comes first: it takes longer than
// memory.
template <typename T>
FASTRNN_HD void prefetch(const T* block, int64_t count, bool to_write) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) {
    if (to_write) {
      __builtin_prefetch(block + i, 1);
    } else {
      __builtin_prefetch(block + i, 0);
    }
  }
}

// How elements of type S are multiplied. An element group of kDepth values of K fills one lane, and a Word of them is
// what a lane of a packed panel holds.
template <typename S>
struct Multiply {
  using T = S;
  using Word = S;
  static constexpr int kDepth = 1;
  static constexpr S kOne = 1;
  FASTRNN_HD static T widen(S x) { return x; }
  // The words of kDepth rows of a matrix; a second row that is null is zero.
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> words(const S* row, const S* /*second*/, Lanes lanes) {
    return load(row, lanes);
  }
  FASTRNN_HD static Vec<T> repeat(const S* x, int64_t /*count*/) { return broadcast<Vec<T>>(*x); }
  FASTRNN_HD static void add(Vec<T>& sum, Vec<Word> x, Vec<Word> w) { sum += x * w; }
};

template <typename S>
using Sum = typename Multiply<S>::T;

#if defined(FASTRNN_BF16)
template <>
struct Multiply<Bf16> {
  using T = float;
  using Word = int32_t;
  static constexpr int kDepth = 2;
  static constexpr Bf16 kOne{0x3F80};
  FASTRNN_HD static T widen(Bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> words(const Bf16* row, const Bf16* second, Lanes lanes) {
    const Vec<Word> low = bits(row, lanes);
    return second ? low | bits(second, lanes) << 16 : low;
  }
  FASTRNN_HD static Vec<Word> repeat(const Bf16* x, int64_t count) {
    Word pair = x[0].bits;
    if (count > 1) std::memcpy(&pair, x, sizeof pair);
    return Vec<Word>{} + pair;
  }
  FASTRNN_HD static void add(Vec<T>& sum, Vec<Word> x, Vec<Word> w) {
    sum = (Vec<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  // The bits of a row, zero-extended.
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> bits(const Bf16* from, Lanes lanes) {
    typedef uint16_t Half __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));
    Half half{};
    if constexpr (std::is_same_v<Lanes, AllLanes>) {
      std::memcpy(&half, from, sizeof half);
    } else {
      std::memcpy(&half, from, sizeof(Bf16) * lanes);
    }
    return __builtin_convertvector(half, Vec<Word>);
  }
};

// Rows of bfloat16 as vectors of float. Stores round to nearest even; NaN stays NaN.
template <typename Lanes>
FASTRNN_HD Vec<float> load(const Bf16* from, Lanes lanes) {
  return bit_cast<Vec<float>>(Multiply<Bf16>::bits(from, lanes) << 16);
}
template <typename Lanes>
FASTRNN_HD void store(Bf16* to, Vec<float> v, Lanes lanes) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  if constexpr (std::is_same_v<Lanes, AllLanes>) {
    std::memcpy(to, &half, sizeof half);
  } else {
    std::memcpy(to, &half, sizeof(Bf16) * lanes);
  }
}
#endif

// The share of state k that zoneout keeps of the units from `at` on, counted in [R, H].
template <typename S, typename Lanes>
FASTRNN_HD Vec<Sum<S>> zone_share(const Controls<S>& controls, int k, int64_t at, Lanes lanes) {
  return controls.zone_is_one_value[k] ? broadcast<Vec<Sum<S>>>(load(controls.zone[k], 1)[0])
                                       : load(controls.zone[k] + at, lanes);
}

// A tile is a few rows times one panel: kVectors vectors of columns. Its sums stay in registers; what is left of them
// holds one row of the panel and a broadcast.
template <int kVectors>
inline constexpr int kTileRows = (FASTRNN_REGISTERS - kVectors - 1) / kVectors;
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

// Packs the panels [begin, end) of w [G*units, K], so that a product reads them front to back:
// [panel - begin][K / kDepth][G][kBlock] words, with zeros past the last unit and past K.
template <typename S, int kGates>
void pack_gates(const S* w, int64_t units, int64_t K, int64_t begin, int64_t end, S* packed) {
  using Word = typename Multiply<S>::Word;
  using Shape = PanelShape<Word, kGates>;
  constexpr int kW = kWidth<Word>, kDepth = Multiply<S>::kDepth;
  const int64_t words = (K + kDepth - 1) / kDepth;
  for (int64_t panel = begin; panel < end; ++panel) {
    S* to = packed + (panel - begin) * words * Shape::kColumns * kDepth;
    for (int64_t column = 0; column < Shape::kColumns; column += kW) {
      const int64_t g = column / Shape::kBlock, unit = panel * Shape::kBlock + column % Shape::kBlock;
      const int64_t here = std::clamp<int64_t>(units - unit, 0, kW);
      const S* from = w + (g * units + unit) * K;
      int64_t k = 0;  // in words
      for (; here == kW && (k + kW) * kDepth <= K; k += kW) {
        Vec<Word> square[kW];
#pragma GCC unroll 16
        for (int j = 0; j < kW; ++j) std::memcpy(&square[j], from + j * K + k * kDepth, sizeof square[j]);
        transpose<Word>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i) {
          std::memcpy(to + ((k + i) * Shape::kColumns + column) * kDepth, &square[i], sizeof square[i]);
        }
      }
      for (; k < words; ++k) {
        for (int64_t j = 0; j < kW; ++j) {
          for (int64_t d = 0; d < kDepth; ++d) {
            const bool there = j < here && k * kDepth + d < K;
            to[(k * Shape::kColumns + column + j) * kDepth + d] = there ? from[j * K + k * kDepth + d] : S{};
          }
        }
      }
    }
  }
}

// Packs one panel, for products with a matrix [K, ..] itself: `columns` columns of it from row(k) on, k in [0, K).
// [K / kDepth][kBlock] words, with zeros past the last column and past K.
template <typename S, typename Row>
void pack_columns(int64_t K, int64_t columns, const Row& row, S* packed) {
  using M = Multiply<S>;
  using Word = typename M::Word;
  constexpr int kW = kWidth<Word>;
  constexpr int64_t kBlock = PanelShape<Word, 1>::kBlock;
  for (int64_t k = 0; k < K; k += M::kDepth) {
    const S *first = row(k), *second = k + 1 < std::min<int64_t>(K, k + M::kDepth) ? row(k + 1) : nullptr;
    for (int64_t j = 0; j < kBlock; j += kW, packed += kW * M::kDepth) {
      Vec<Word> words{};
      const S* also = second ? second + j : nullptr;
      if (j + kW <= columns) {
        words = M::words(first + j, also, AllLanes{});
      } else if (j < columns) {
        words = M::words(first + j, also, static_cast<int>(columns - j));
      }
      std::memcpy(packed, &words, sizeof words);
    }
  }
}

// K rounded up to whole words.
template <typename S>
constexpr int64_t padded(int64_t K) {
  constexpr int64_t kDepth = Multiply<S>::kDepth;
  return (K + kDepth - 1) / kDepth * kDepth;
}

// out [kRows, kVectors*W] = start + rows [kRows, K] * panel [K, kVectors*W], the rows of the panel `stride` elements
// apart. start: one row for all, or null for zero.
template <typename S, int kVectors, int kRows>
void product_exact(int64_t K, const S* const* rows, const S* panel, int64_t stride, const Sum<S>* start, Sum<S>* out) {
  using M = Multiply<S>;
  using T = Sum<S>;
  using Words = Vec<typename M::Word>;
  constexpr int kW = kWidth<T>;
  // Few sums would wait for each other: even and odd k get sums of their own.
  constexpr int kChains = kRows * kVectors >= 8 ? 1 : 2;
  Vec<T> sum[kChains][kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sum[0][r][v] = start ? load(start + v * kW) : Vec<T>{};
      if constexpr (kChains == 2) sum[1][r][v] = Vec<T>{};
    }
  }
  const S* row[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];

  const auto add = [&](int c, int64_t word, int64_t depth) FASTRNN_INLINE {
    Words w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) std::memcpy(&w[v], panel + word * stride + v * kW * M::kDepth, sizeof w[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Words x = M::repeat(row[r] + word * M::kDepth, depth);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) M::add(sum[c][r][v], x, w[v]);
    }
  };
  const int64_t words = K / M::kDepth;
  int64_t word = 0;
  for (; word + kChains <= words; word += kChains) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) add(c, word + c, M::kDepth);
  }
  for (; word < words; ++word) add(0, word, M::kDepth);
  if (words * M::kDepth < K) add(0, words, K - words * M::kDepth);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kChains == 2) sum[0][r][v] += sum[1][r][v];
      store(out + (r * kVectors + v) * kW, sum[0][r][v]);
    }
  }
}

template <typename S, int kVectors, int kRows = kTileRows<kVectors>>
void product(int count, int64_t K, const S* const* rows, const S* panel, int64_t stride, const Sum<S>* start,
             Sum<S>* out) {
  if (count == kRows) {
    product_exact<S, kVectors, kRows>(K, rows, panel, stride, start, out);
  } else if constexpr (kRows > 1) {
    product<S, kVectors, kRows - 1>(count, K, rows, panel, stride, start, out);
  }
}
// With a packed panel.
template <typename S, int kVectors>
void product(int count, int64_t K, const S* const* rows, const S* panel, const Sum<S>* start, Sum<S>* out) {
  product<S, kVectors>(count, K, rows, panel, kVectors * kWidth<Sum<S>> * Multiply<S>::kDepth, start, out);
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

// The dot products of x [K] with `lanes` rows of w [lanes, K]. Lanes past them repeat the last one.
template <typename S, typename Lanes, typename T = typename Multiply<S>::T>
FASTRNN_HD Vec<T> dots(int64_t K, const S* x, const S* w, Lanes lanes) {
  using M = Multiply<S>;
  using Words = Vec<typename M::Word>;
  constexpr int kW = kWidth<T>;
  Vec<T> sums[kW];
#pragma GCC unroll 16
  for (int j = 0; j < kW; ++j) sums[j] = Vec<T>{};
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
  const auto add = [&](int64_t k, size_t bytes) FASTRNN_INLINE {
    Words v{}, u{};
    std::memcpy(&v, x + k, bytes);
#pragma GCC unroll 16
    for (int j = 0; j < kW; ++j) {
      std::memcpy(&u, row(j) + k, bytes);
      M::add(sums[j], v, u);
    }
  };
  constexpr int64_t kStep = kW * M::kDepth;
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) add(k, sizeof(Words));
  if (k < K) add(k, (K - k) * sizeof(S));
  return lane_sums<T>(sums);
}

// A product with panel `panel` of w [G*units, K] as it is, with its bias [G*units] or null: what product() gives for
// the packed panel.
template <typename S, int kGates>
void product_unpacked(int count, int64_t K, const S* const* rows, const S* w, const Sum<S>* bias, int64_t units,
                      int64_t panel, Sum<S>* out) {
  using T = Sum<S>;
  using Shape = PanelShape<T, kGates>;
  const int64_t first = panel * Shape::kBlock;
  for (int g = 0; g < kGates; ++g) {
    for_each_vector<T>(first, first + Shape::kBlock, units, [&](int64_t unit, auto lanes) FASTRNN_INLINE {
      const int64_t row = g * units + unit, column = g * Shape::kBlock + unit - first;
      const Vec<T> start = bias ? load(bias + row, lanes) : Vec<T>{};
      for (int r = 0; r < count; ++r) {
        store(out + r * Shape::kColumns + column, start + dots(K, rows[r], w + row * K, lanes));
      }
    });
  }
}

// A matrix w [K, columns] to multiply rows with from the left. All its panels are packed; or, where few rows come, only
// a last one that is not full, the others being read where they are.
template <typename S>
class Columns {
 public:
  using Panel = PanelShape<Sum<S>, 1>;

  Columns() = default;
  Columns(const S* w, int64_t columns, int64_t K, bool pack, const ThreadPool& pool) : w_(w), columns_(columns), K_(K) {
    const bool all = pack || Multiply<S>::kDepth > 1;  // no row of w holds words of several rows
    first_packed_ = all ? 0 : columns / Panel::kBlock;
    const int64_t panels = Panel::panels(columns) - first_packed_;
    packed_ = Buffer<S>(panels * padded<S>(K) * Panel::kColumns);
    in_parallel(all ? pool : kOneThread, panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t j0 = (first_packed_ + panel) * Panel::kBlock;
        pack_columns<S>(
            K, std::min<int64_t>(Panel::kBlock, columns - j0), [&](int64_t k) { return w + k * columns + j0; },
            packed_.get() + panel * padded<S>(K) * Panel::kColumns);
      }
    });
  }

  // out [count, kBlock] = rows from first_row on of a matrix [.., K] * a panel.
  void times(int64_t panel, const S* from, int64_t first_row, int count, Sum<S>* out) const {
    const S* rows[kMaxTileRows];
    for (int r = 0; r < count; ++r) rows[r] = from + (first_row + r) * K_;
    if (panel >= first_packed_) {
      const S* packed = packed_.get() + (panel - first_packed_) * padded<S>(K_) * Panel::kColumns;
      product<S, Panel::kVectors>(count, K_, rows, packed, nullptr, out);
    } else {
      product<S, Panel::kVectors>(count, K_, rows, w_ + panel * Panel::kBlock, columns_, nullptr, out);
    }
  }

 private:
  const S* w_ = nullptr;
  int64_t columns_ = 0, K_ = 0, first_packed_ = 0;
  Buffer<S> packed_;  // [panels from first_packed on, padded K, kBlock]
};

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
