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
template <typename T, typename Enable = void>
struct ValueTraits {  // vectors
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<T&>()[0])>>;
  typedef uint32_t Bits __attribute__((vector_size(sizeof(T))));
};
template <>
struct ValueTraits<float> {
  using Scalar = float;
  using Bits = uint32_t;
};
template <>
struct ValueTraits<double> {
  using Scalar = double;
  using Bits = uint64_t;
};

template <typename To, typename From>
FASTRNN_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp(x) = 2^n (1 + m) with |x - n ln 2| <= ln 2 / 2, for float and vectors of float. Valid for -88 <= x <= 89; from
// 88.4 on 2^n is infinity, below -88.4 its bits would be those of a negative number.
// Keeping m = expm1(x - n ln 2) apart from the 1 is what gives tanh its relative accuracy near 0.
template <typename T>
struct ExpParts {
  T scale;  // 2^n, exact for n >= -126
  T m;
};

template <typename T>
FASTRNN_HD ExpParts<T> exp_parts(T x) {
  using Bits = typename ValueTraits<T>::Bits;
  // Adding 1.5 * 2^23 rounds to an integer, n, held in the low bits; 127 more, and they are the exponent of 2^n.
  constexpr float kShift = 12582912.0f + 127;
  constexpr float kLn2High = 0.693145751953125f;  // 15 bits: n * kLn2High is exact
  constexpr float kLn2Low = 1.42860677e-06f;
  const T shifted = x * 1.44269504f + kShift;
  const T n = shifted - kShift;
  const T r = x - n * kLn2High - n * kLn2Low;
  // (expm1(r) - r) / r^2 on |r| <= 0.3466, minimax: m is off by 2.4e-10 of itself.
  T p = r * 1.99141707e-04f + 1.39410083e-03f;
  p = p * r + 8.33327305e-03f;
  p = p * r + 4.16663547e-02f;
  p = p * r + 1.66666668e-01f;
  p = p * r + 5.00000005e-01f;
  const T m = (r * r) * p + r;
  return {bit_cast<T>(bit_cast<Bits>(shifted) << 23), m};
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

// Calls a libm function lane by lane: double is there to be right, not fast.
template <typename T, typename Function>
FASTRNN_HD T map_lanes(T x, Function function) {
  if constexpr (std::is_floating_point_v<T>) {
    return function(x);
  } else {
    for (unsigned i = 0; i < sizeof(T) / sizeof(x[0]); ++i) x[i] = function(x[i]);
    return x;
  }
}

template <typename T>
inline constexpr bool kIsDouble = std::is_same_v<typename ValueTraits<T>::Scalar, double>;

// 1 / (1 + exp(-x)). Float: max error 2.49 ulp where the result is normal, 8.9e-8 absolute; 0 below x = -88.38,
// 1 above 17.4. Measured by tests/native/cells_test.cpp.
template <typename T>
FASTRNN_HD T sigmoid(T x) {
  if constexpr (kIsDouble<T>) {
    return 1.0f / (1.0f + map_lanes(-x, [](double v) { return ::exp(v); }));
  } else {
    const ExpParts<T> e = exp_parts(-clamp(x, -89.0f, 87.0f));  // at -89, 2^n is infinity and the quotient 0
    return 1.0f / (e.scale * (1.0f + e.m) + 1.0f);
  }
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2). Float: max error 2.5 ulp everywhere, near 0 too; 1.5e-7 absolute. Measured
// likewise.
template <typename T>
FASTRNN_HD T tanh(T x) {
  if constexpr (kIsDouble<T>) {
    return map_lanes(x, [](double v) { return ::tanh(v); });
  } else {
    const ExpParts<T> e = exp_parts(clamp(x + x, -20.0f, 20.0f));
    const T expm1 = e.scale * e.m + (e.scale - 1.0f);
    return expm1 / (expm1 + 2.0f);
  }
}

// exp(x), 0 below -87. Float: relative error below 2e-7 for x <= 0, where the cells use it. Measured likewise.
template <typename T>
FASTRNN_HD T exp(T x) {
  if constexpr (kIsDouble<T>) {
    return map_lanes(x, [](double v) { return ::exp(v); });
  } else {
    const ExpParts<T> e = exp_parts(clamp(x, -87.0f, 88.0f));
    const T y = e.scale * (1.0f + e.m);
    return x < -87.0f ? T{} : y;
  }
}

// log(sigmoid(x)) = min(x, 0) - log1p(exp(-|x|)). Float: max error 2e-7 (1 + |x|), absolute. Measured likewise.
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
