// SPDX-License-Identifier: BSD-3-Clause
// The edge between storage and arithmetic: a thread loads and stores several neighbouring values in one instruction and
// computes on them in acc_t. Conversions are spelled out: torch's flags switch the implicit ones of CUDA's types off.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../cells/zoneout.h"

namespace fastrnn {

template <>
inline constexpr Rounding kRounding<__half> = kRoundingOfHalf;

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t to_acc(scalar_t value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

// Rounds to nearest even.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ scalar_t from_acc(acc_t value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// N values that one instruction moves: N * sizeof(T) is 2, 4, 8 or 16 and the address a multiple of it.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  static_assert(N * sizeof(T) <= 16 && (N & (N - 1)) == 0);
  T value[N];
};

template <int N, typename acc_t, typename scalar_t>
__device__ __forceinline__ void load(acc_t (&values)[N], const scalar_t* from) {
  const Vec<scalar_t, N> vec = *reinterpret_cast<const Vec<scalar_t, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_acc<acc_t>(vec.value[i]);
}

__device__ __forceinline__ uint32_t bits(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ uint32_t bits(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

template <int N, typename acc_t, typename scalar_t>
__device__ __forceinline__ void store(scalar_t* to, const acc_t (&values)[N]) {
  if constexpr (sizeof(scalar_t) == 2 && N == 4) {  // left to the compiler, it may become two stores or four
    const auto pair = [&](int i) {
      return bits(from_acc<scalar_t>(values[i])) | bits(from_acc<scalar_t>(values[i + 1])) << 16;
    };
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(pair(0), pair(2)));
  } else {
    Vec<scalar_t, N> vec;
#pragma unroll
    for (int i = 0; i < N; ++i) vec.value[i] = from_acc<scalar_t>(values[i]);
    *reinterpret_cast<Vec<scalar_t, N>*>(to) = vec;
  }
}

// Whether load and store of N values may be used on these pointers; null is never loaded.
template <int N, typename... T>
bool aligned_for(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (N * sizeof(T)) == 0) && ...);
}

}  // namespace fastrnn
