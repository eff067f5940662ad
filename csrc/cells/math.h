// SPDX-License-Identifier: BSD-3-Clause
// The elementary functions of the cells, written once for every value type.
//
// A value type T is float or double (CUDA threads, native tests), or a vector of them (the CPU kernels use the
// compiler's vector extension). Every function is branch-free so that one body serves all of them; `a ? b : c` with a
// vector condition selects lane by lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__ __forceinline__
#elif defined(FASTRNN_TARGET)  // clang passes wide vectors only between functions of the same instruction set
#define FASTRNN_HD inline __attribute__((always_inline, target(FASTRNN_TARGET)))
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

namespace fastrnn {

// N values of type T. A cell without saved values still gets an array, of one unused element: C++ has no empty arrays.
template <typename T, int N>
using Values = T[N > 0 ? N : 1];

// The scalar behind a value type, and unsigned integers for its bits: of them, overflow and shifts are defined whatever
// the value is, NaN included.
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == sizeof(double), uint64_t, uint32_t>;
template <typename T, typename Enable = void>
struct ValueTraits {  // vectors
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<T&>()[0])>>;
  typedef BitsOf<Scalar> Bits __attribute__((vector_size(sizeof(T))));
};
template <typename T>
struct ValueTraits<T, std::enable_if_t<std::is_floating_point_v<T>>> {
  using Scalar = T;
  using Bits = BitsOf<T>;
};
template <typename T>
inline constexpr bool kIsDouble = std::is_same_v<typename ValueTraits<T>::Scalar, double>;

template <typename To, typename From>
FASTRNN_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp(x) = 2^n (1 + m) with |x - n ln 2| <= ln 2 / 2. Valid for -88 <= x <= 89, of doubles -708 <= x <= 710; from 88.4
// and 709.5 on 2^n is infinity, far enough below its bits would be those of a negative number.
// Keeping m = expm1(x - n ln 2) apart from the 1 is what gives tanh its relative accuracy near 0.
template <typename T>
struct ExpParts {
  T scale;  // 2^n, exact: n is an exponent of normal numbers
  T m;
};

template <typename T>
FASTRNN_HD ExpParts<T> exp_parts(T x) {
  using Scalar = typename ValueTraits<T>::Scalar;
  using Bits = typename ValueTraits<T>::Bits;
  constexpr bool kWide = kIsDouble<T>;
  constexpr int kMantissa = kWide ? 52 : 23;
  // Adding 1.5 * 2^kMantissa rounds to an integer, n, held in the low bits; the bias more, and they are the exponent of
  // 2^n.
  constexpr Scalar kShift = kWide ? 6755399441055744.0 + 1023 : 12582912.0 + 127;
  constexpr auto kLog2E = static_cast<Scalar>(1.4426950408889634);
  // Of so few bits, 15 and 32, that n * kLn2High is exact.
  constexpr Scalar kLn2High = kWide ? 0.69314718036912382 : 0.693145751953125;
  constexpr auto kLn2Low = static_cast<Scalar>(kWide ? 1.9082149292705877e-10 : 1.42860677e-06);
  const T shifted = x * kLog2E + kShift;
  const T n = shifted - kShift;
  const T r = x - n * kLn2High - n * kLn2Low;
  // (expm1(r) - r) / r^2 on |r| <= 0.3466, minimax: m is off by 2.4e-10 of itself, of doubles by 6.7e-19.
  T p;
  if constexpr (kWide) {
    p = r * 2.0924439744951785e-09 + 2.5109045180029243e-08;
    p = p * r + 2.7557242773265849e-07;
    p = p * r + 2.7557244181099259e-06;
    p = p * r + 2.4801587360537111e-05;
    p = p * r + 1.9841269886159311e-04;
    p = p * r + 1.3888888888866849e-03;
    p = p * r + 8.3333333333216156e-03;
    p = p * r + 4.1666666666666701e-02;
    p = p * r + 1.6666666666666677e-01;
    p = p * r + 0.5;
  } else {
    p = r * 1.99141707e-04f + 1.39410083e-03f;
    p = p * r + 8.33327305e-03f;
    p = p * r + 4.16663547e-02f;
    p = p * r + 1.66666668e-01f;
    p = p * r + 5.00000005e-01f;
  }
  const T m = (r * r) * p + r;
  return {bit_cast<T>(bit_cast<Bits>(shifted) << kMantissa), m};
}

// x - 0 is x; x + 0 is not where x is -0, and would be computed.
template <typename T>
FASTRNN_HD T broadcast(typename ValueTraits<T>::Scalar value) {
  return value - T{};
}

// min(x, high) and max(x, low) where NaN stays NaN and -0 stays -0. Vectors that have an instruction for it get it from
// vector.h: compilers make a comparison and a selection of this.
template <typename T>
struct Limit {
  FASTRNN_HD static T at_most(T x, T high) { return x > high ? high : x; }
  FASTRNN_HD static T at_least(T x, T low) { return x < low ? low : x; }
};

template <typename T, typename S>
FASTRNN_HD T clamp(T x, S low, S high) {
  return Limit<T>::at_least(Limit<T>::at_most(x, broadcast<T>(high)), broadcast<T>(low));
}

// A gradient within +-most; 0: as it is.
template <typename T, typename S>
FASTRNN_HD T clipped(T gradient, S most) {
  if (most == 0) return gradient;
  return clamp(gradient, -most, most);
}

// 1 / (1 + exp(-x)). Max error 2.49 ulp where the result is normal, of floats 8.9e-8 absolute; 0 below x = -88.38, of
// doubles -709.4; 1 above 17.4, of doubles 36.8. Measured by tests/native/cells_test.cpp.
template <typename T>
FASTRNN_HD T sigmoid(T x) {
  // At the lowest x, 2^n is infinity and the quotient 0.
  const ExpParts<T> e = kIsDouble<T> ? exp_parts(-clamp(x, -710, 708)) : exp_parts(-clamp(x, -89, 87));
  return 1.0f / (e.scale * (1.0f + e.m) + 1.0f);
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2). Max error 2.5 ulp everywhere, near 0 too; of floats 1.5e-7 absolute. Measured
// likewise.
template <typename T>
FASTRNN_HD T tanh(T x) {
  constexpr int kMost = kIsDouble<T> ? 40 : 20;
  const ExpParts<T> e = exp_parts(clamp(x + x, -kMost, kMost));
  const T expm1 = e.scale * e.m + (e.scale - 1.0f);
  return expm1 / (expm1 + 2.0f);
}

// exp(x), 0 below -87, of doubles -708. Relative error below 2e-7, of doubles 2e-16, for x <= 0, where the cells use
// it. Measured likewise.
template <typename T>
FASTRNN_HD T exp(T x) {
  constexpr int kLowest = kIsDouble<T> ? -708 : -87;
  const ExpParts<T> e = exp_parts(clamp(x, kLowest, -kLowest));
  const T y = e.scale * (1.0f + e.m);
  return x < kLowest ? T{} : y;
}

// Calls a libm function lane by lane.
template <typename T, typename Function>
FASTRNN_HD T map_lanes(T x, Function function) {
  if constexpr (std::is_floating_point_v<T>) {
    return function(x);
  } else {
    for (unsigned i = 0; i < sizeof(T) / sizeof(x[0]); ++i) x[i] = function(x[i]);
    return x;
  }
}

// log(sigmoid(x)) = min(x, 0) - log1p(exp(-|x|)). Max error 2e-7 (1 + |x|), of doubles 2e-16 (1 + |x|), absolute.
// Measured likewise.
template <typename T>
FASTRNN_HD T log_sigmoid(T x) {
  const T below = x > 0.0f ? T{} : x, y = exp(x > 0.0f ? -x : x);
  if constexpr (kIsDouble<T>) {
    return below - map_lanes(y, [](double v) { return ::log1p(v); });
  } else {
    // log1p(y) = 2 artanh(y / (2 + y)), for 0 <= y <= 1: truncation below 3e-9 relative.
    const T s = y / (2.0f + y), q = s * s;
    T p = q * (2.0f / 15) + 2.0f / 13;
    p = p * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    p = p * q + 2.0f;
    return below - s * p;
  }
}

template <typename T>
FASTRNN_HD T relu(T x) {
  return Limit<T>::at_least(x, T{});
}

// Derivatives, from the value of the function: what the forward pass has at hand.
template <typename T>
FASTRNN_HD T sigmoid_grad(T y) {
  return y * (1.0f - y);
}
template <typename T>
FASTRNN_HD T tanh_grad(T y) {
  return 1.0f - y * y;
}
}  // namespace fastrnn
