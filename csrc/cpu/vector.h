// SPDX-License-Identifier: BSD-3-Clause
// Vectors of the CPU kernels, and the storage that they are read from. Compiled once for each instruction set, in a
// namespace of its own: the including file defines
//   FASTRNN_ISA           the namespace
//   FASTRNN_VECTOR_BYTES  the width of a vector register
//   FASTRNN_REGISTERS     how many there are
//   FASTRNN_BF16          if there is an instruction that multiplies pairs of bfloat16
//   FASTRNN_WIDEN         if 16-bit storage is widened to float as it is read
// and includes the standard headers before it switches the instruction set on.

// Inlined wherever it is called, or the sums would leave the registers.
#define FASTRNN_INLINE __attribute__((always_inline))

namespace fastrnn::FASTRNN_ISA {

template <typename T, typename Enable = void>
struct VecOf {
  typedef T type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <typename S>
struct VecOf<S, std::enable_if_t<sizeof(S) == 2>> {};  // widened to float
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
// The first `lanes` lanes only: at the end of a row of units. The others read as 0. By masks where there are some,
// else one by one: to copy a number of bytes that is not known here is a call, and a vector that waits for it.
#if FASTRNN_VECTOR_BYTES == 64
FASTRNN_HD uint16_t mask_of(int lanes) { return static_cast<uint16_t>((1u << lanes) - 1); }
template <typename T>
FASTRNN_HD Vec<T> load(const T* from, int lanes) {
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_epi32(mask_of(lanes), from);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_epi64(static_cast<uint8_t>(mask_of(lanes)), from);
  }
}
template <typename T>
FASTRNN_HD void store(T* to, Vec<T> v, int lanes) {
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, mask_of(lanes), (__m512i)v);
  } else {
    _mm512_mask_storeu_epi64(to, static_cast<uint8_t>(mask_of(lanes)), (__m512i)v);
  }
}
#elif FASTRNN_VECTOR_BYTES == 32
FASTRNN_HD __m256i mask_of(int lanes, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTRNN_HD __m256i mask_of(int lanes, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTRNN_HD Vec<float> load(const float* from, int lanes) {
  return (Vec<float>)_mm256_maskload_ps(from, mask_of(lanes, 0.f));
}
FASTRNN_HD Vec<double> load(const double* from, int lanes) {
  return (Vec<double>)_mm256_maskload_pd(from, mask_of(lanes, 0.));
}
FASTRNN_HD void store(float* to, Vec<float> v, int lanes) { _mm256_maskstore_ps(to, mask_of(lanes, 0.f), (__m256)v); }
FASTRNN_HD void store(double* to, Vec<double> v, int lanes) { _mm256_maskstore_pd(to, mask_of(lanes, 0.), (__m256d)v); }
#else
template <typename T>
Vec<T> load(const T* from, int lanes) {
  Vec<T> v{};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i < lanes) v[i] = from[i];
  }
  return v;
}
template <typename T>
void store(T* to, Vec<T> v, int lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i < lanes) to[i] = v[i];
  }
}
#endif
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

#if defined(FASTRNN_BF16) || defined(FASTRNN_WIDEN)
// 16-bit storage: the bits of as many values as a vector of float holds, to float and back. Narrowing rounds to nearest
// even; NaN stays NaN.
typedef uint16_t Bits16 __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));

template <typename S>
struct Format;  // of the types that are stored so

FASTRNN_HD Vec<float> widen_bf16(Bits16 bits) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}
#if defined(FASTRNN_BF16)
template <>
struct Format<Bf16> {
  using V = Vec<float>;
  FASTRNN_HD static V widen(Bits16 bits) { return widen_bf16(bits); }
  FASTRNN_HD static Bits16 narrow(V v) { return bit_cast<Bits16>(_mm512_cvtneps_pbh((__m512)v)); }
};
#else
template <>
struct Format<WidenedBf16> {
  using V = Vec<float>;
  FASTRNN_HD static V widen(Bits16 bits) { return widen_bf16(bits); }
  FASTRNN_HD static Bits16 narrow(V v) {
    const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v), half_way = (bits >> 16 & 1) + 0x7FFF;
    return __builtin_convertvector((v == v ? bits + half_way : bits | 0x400000) >> 16, Bits16);
  }
};
template <>
struct Format<Half> {
  using V = Vec<float>;
#if FASTRNN_VECTOR_BYTES == 64
  // Masked, all lanes: g++ takes the plain ones for reads of an uninitialised register.
  FASTRNN_HD static V widen(Bits16 bits) { return (V)_mm512_maskz_cvtph_ps(0xFFFF, bit_cast<__m256i>(bits)); }
  FASTRNN_HD static Bits16 narrow(V v) {
    return bit_cast<Bits16>(_mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  FASTRNN_HD static V widen(Bits16 bits) { return (V)_mm256_cvtph_ps(bit_cast<__m128i>(bits)); }
  FASTRNN_HD static Bits16 narrow(V v) {
    return bit_cast<Bits16>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
};
#endif

// The bits of all values that V has room for, or of the first ones; the others are 0.
template <typename V, typename S>
FASTRNN_HD V load_bits(const S* from, AllLanes) {
  static_assert(sizeof(S) == sizeof(uint16_t));
  V bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
template <typename V, typename S>
FASTRNN_HD V load_bits(const S* from, int count) {
  static_assert(sizeof(S) == sizeof(uint16_t));
#if FASTRNN_VECTOR_BYTES == 64
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(V) == 64) {
    return (V)_mm512_maskz_loadu_epi16(mask, from);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_maskz_loadu_epi16(static_cast<uint16_t>(mask), from);
  } else {
    return (V)_mm_maskz_loadu_epi16(static_cast<uint8_t>(mask), from);
  }
#else
  constexpr int kValues = kWidth<float>;
  if constexpr (sizeof(V) > sizeof(Bits16)) {
    const auto low = load_bits<__m128i>(from, std::min(count, kValues));
    const auto high = load_bits<__m128i>(from + kValues, std::max(count - kValues, 0));
    return (V)_mm256_set_m128i(high, low);
  } else {
    Bits16 bits{};
#pragma GCC unroll 16
    for (int i = 0; i < kValues; ++i) {
      if (i < count) bits[i] = from[i].bits;
    }
    return bit_cast<V>(bits);
  }
#endif
}
template <typename S, typename Lanes>
FASTRNN_HD typename Format<S>::V load(const S* from, Lanes lanes) {
  return Format<S>::widen(load_bits<Bits16>(from, lanes));
}
template <typename S, typename Lanes>
FASTRNN_HD void store(S* to, typename Format<S>::V v, Lanes lanes) {
  const Bits16 bits = Format<S>::narrow(v);
  if constexpr (std::is_same_v<Lanes, AllLanes>) {
    std::memcpy(to, &bits, sizeof bits);
  } else {
#if FASTRNN_VECTOR_BYTES == 64
    _mm256_mask_storeu_epi16(to, mask_of(lanes), (__m256i)bits);
#else
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<float>; ++i) {
      if (i < lanes) to[i].bits = bits[i];
    }
#endif
  }
}
#endif

// How values stored as S are multiplied. A Word holds kDepth neighbours along K: one lane of a product, and of a packed
// panel.
template <typename S>
struct Multiply {
  using T = S;  // of the sums
  using Word = S;
  static constexpr int kDepth = 1;
  static constexpr S kOne = 1;
  FASTRNN_HD static T widen(S x) { return x; }
  // Of kDepth rows of a matrix [K, ..]; a second row that is null is zero.
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> words(const S* row, const S* /*second*/, Lanes lanes) {
    return load(row, lanes);
  }
  // Of a row [K]: as many values as fill a vector, or `count`.
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> along(const S* row, Lanes count) {
    return load(row, count);
  }
  // One of them, of count <= kDepth values.
  FASTRNN_HD static Word word(const S* x, int64_t /*count*/) { return *x; }
  FASTRNN_HD static Vec<Word> repeat(const S* x, int64_t count) { return broadcast<Vec<Word>>(word(x, count)); }
  FASTRNN_HD static void add(Vec<T>& sum, Vec<Word> x, Vec<Word> w) { sum += x * w; }
};

template <typename S>
using Sum = typename Multiply<S>::T;
template <typename S>
using WordOf = typename Multiply<S>::Word;
// The rows that meet a weight. Where S is widened they are, once for all panels of the weight.
template <typename S>
using Operand = typename TypesOf<S>::operand_t;
template <typename S>
inline constexpr bool kWidens = !std::is_same_v<Operand<S>, S>;

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
    const Vec<Word> low = half_words(row, lanes);
    return second ? low | half_words(second, lanes) << 16 : low;
  }
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> along(const Bf16* row, Lanes count) {
    return load_bits<Vec<Word>>(row, count);
  }
  FASTRNN_HD static Word word(const Bf16* x, int64_t count) {
    Word pair = x[0].bits;
    if (count > 1) std::memcpy(&pair, x, sizeof pair);
    return pair;
  }
  FASTRNN_HD static Vec<Word> repeat(const Bf16* x, int64_t count) { return Vec<Word>{} + word(x, count); }
  FASTRNN_HD static void add(Vec<T>& sum, Vec<Word> x, Vec<Word> w) {
    sum = (Vec<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }

 private:
  template <typename Lanes>
  FASTRNN_HD static Vec<Word> half_words(const Bf16* row, Lanes lanes) {
    return __builtin_convertvector(load_bits<Bits16>(row, lanes), Vec<Word>);
  }
};
#endif

#if defined(FASTRNN_WIDEN)
// A weight that is read where it is costs half the memory traffic; words of packed panels are float.
template <typename S>
struct MultiplyWidened : Multiply<float> {
  template <typename Lanes>
  FASTRNN_HD static Vec<float> words(const S* row, const S* /*second*/, Lanes lanes) {
    return load(row, lanes);
  }
  template <typename Lanes>
  FASTRNN_HD static Vec<float> along(const S* row, Lanes count) {
    return load(row, count);
  }
  FASTRNN_HD static float word(const S* x, int64_t count) { return load(x, static_cast<int>(count))[0]; }
};
template <>
struct Multiply<Half> : MultiplyWidened<Half> {};
template <>
struct Multiply<WidenedBf16> : MultiplyWidened<WidenedBf16> {};

template <typename S>
FASTRNN_HD void widen(const S* from, int64_t count, float* to) {
  for_each_vector<float>(0, count, count,
                         [&](int64_t j, auto lanes) FASTRNN_INLINE { store(to + j, load(from + j, lanes), lanes); });
}
#endif

// The share of state k that zoneout keeps of the units from `at` on, counted in [R, H].
template <typename S, typename Lanes>
FASTRNN_HD Vec<Sum<S>> zone_share(const Controls<S>& controls, int k, int64_t at, Lanes lanes) {
  return controls.zone_is_one_value[k] ? broadcast<Vec<Sum<S>>>(load(controls.zone[k], 1)[0])
                                       : load(controls.zone[k] + at, lanes);
}

}  // namespace fastrnn::FASTRNN_ISA

#if defined(__x86_64__)
namespace fastrnn {

// Of NaN and another value the instructions give the second operand.
template <>
struct Limit<FASTRNN_ISA::Vec<float>> {
  using V = FASTRNN_ISA::Vec<float>;
#if FASTRNN_VECTOR_BYTES == 64  // masked, all lanes, as in Format<Half>
  FASTRNN_HD static V at_most(V x, V high) { return (V)_mm512_maskz_min_ps(0xFFFF, (__m512)high, (__m512)x); }
  FASTRNN_HD static V at_least(V x, V low) { return (V)_mm512_maskz_max_ps(0xFFFF, (__m512)low, (__m512)x); }
#elif FASTRNN_VECTOR_BYTES == 32
  FASTRNN_HD static V at_most(V x, V high) { return (V)_mm256_min_ps((__m256)high, (__m256)x); }
  FASTRNN_HD static V at_least(V x, V low) { return (V)_mm256_max_ps((__m256)low, (__m256)x); }
#else
  FASTRNN_HD static V at_most(V x, V high) { return (V)_mm_min_ps((__m128)high, (__m128)x); }
  FASTRNN_HD static V at_least(V x, V low) { return (V)_mm_max_ps((__m128)low, (__m128)x); }
#endif
};

}  // namespace fastrnn
#endif
