// SPDX-License-Identifier: BSD-3-Clause
// The words of CUDA C++ for a host compiler: included before every kernel source. CUDA's own headers give the vector
// types and the 16-bit types; what only nvcc knows is here.
//
// __shared__ is left undefined on purpose: it would be one variable for all blocks. Kernels write FASTRNN_SHARED.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (fastrnn::emulation::position().thread)
#define blockIdx (fastrnn::emulation::position().block)
#define blockDim (fastrnn::emulation::current_launch().block)
#define gridDim (fastrnn::emulation::current_launch().grid)
constexpr int warpSize = 32;

#define FASTRNN_WHERE fastrnn::emulation::Location where = fastrnn::emulation::Location::here()

inline void __syncthreads(FASTRNN_WHERE) { fastrnn::emulation::block_barrier(where); }
inline int __syncthreads_count(int predicate, FASTRNN_WHERE) {
  return fastrnn::emulation::block_reduce(predicate, fastrnn::emulation::Reduction::kCount, where);
}
inline int __syncthreads_and(int predicate, FASTRNN_WHERE) {
  return fastrnn::emulation::block_reduce(predicate, fastrnn::emulation::Reduction::kAnd, where);
}
inline int __syncthreads_or(int predicate, FASTRNN_WHERE) {
  return fastrnn::emulation::block_reduce(predicate, fastrnn::emulation::Reduction::kOr, where);
}
inline void __syncwarp(unsigned mask = ~0u, FASTRNN_WHERE) {
  fastrnn::emulation::warp_collective("__syncwarp", mask, nullptr, nullptr, true, where);
}
inline void __threadfence(FASTRNN_WHERE) { fastrnn::emulation::fence(where); }
inline void __nanosleep(unsigned, FASTRNN_WHERE) { fastrnn::emulation::poll(where); }
[[noreturn]] inline void __trap(FASTRNN_WHERE) { fastrnn::emulation::fail("__trap", where); }

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles and votes

namespace fastrnn::emulation {

struct Exchanged {
  uint64_t given, taken;
  int source;  // lane, or -1: its own
};

inline void shuffle(void* const lanes[32], uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& mine = *static_cast<Exchanged*>(lanes[lane]);
    if (mine.source < 0) {
      mine.taken = mine.given;
    } else if (mask >> mine.source & 1) {
      mine.taken = static_cast<Exchanged*>(lanes[mine.source])->given;
    } else {
      mine.taken = 0xDEADBEEFDEADBEEF;  // undefined on a device
    }
  }
}

inline void ballot(void* const lanes[32], uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && static_cast<Exchanged*>(lanes[lane])->given) votes |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<Exchanged*>(lanes[lane])->taken = votes;
  }
}

template <typename T>
T shuffle_from(const char* name, unsigned mask, T value, int source, Location where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Exchanged exchanged{0, 0, source};
  std::memcpy(&exchanged.given, &value, sizeof value);
  warp_collective(name, mask, &exchanged, shuffle, false, where);
  std::memcpy(&value, &exchanged.taken, sizeof value);
  return value;
}

}  // namespace fastrnn::emulation

// A lane exchanges within its segment of `width` lanes, a power of two.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FASTRNN_WHERE) {
  const int segment = static_cast<int>(fastrnn::emulation::lane_id()) & ~(width - 1);
  return fastrnn::emulation::shuffle_from("__shfl_sync", mask, value, segment + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, FASTRNN_WHERE) {
  const int lane = static_cast<int>(fastrnn::emulation::lane_id()), source = lane ^ bits;
  const bool above = source / width > lane / width;
  return fastrnn::emulation::shuffle_from("__shfl_xor_sync", mask, value, above ? -1 : source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, FASTRNN_WHERE) {
  const int lane = static_cast<int>(fastrnn::emulation::lane_id()), source = lane + static_cast<int>(distance);
  const bool beyond = source / width != lane / width;
  return fastrnn::emulation::shuffle_from("__shfl_down_sync", mask, value, beyond ? -1 : source, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, FASTRNN_WHERE) {
  const int lane = static_cast<int>(fastrnn::emulation::lane_id()), source = lane - static_cast<int>(distance);
  const bool beyond = source < (lane & ~(width - 1));
  return fastrnn::emulation::shuffle_from("__shfl_up_sync", mask, value, beyond ? -1 : source, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTRNN_WHERE) {
  fastrnn::emulation::Exchanged exchanged{predicate != 0, 0, -1};
  fastrnn::emulation::warp_collective("__ballot_sync", mask, &exchanged, fastrnn::emulation::ballot, false, where);
  return static_cast<unsigned>(exchanged.taken);
}
inline int __any_sync(unsigned mask, int predicate, FASTRNN_WHERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FASTRNN_WHERE) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Atomics on integers: relaxed, as on the device. Instrumented, so that the sanitizers see them.

namespace fastrnn::emulation {
template <typename T>
struct NonDeducedValue {
  using Type = T;
};
template <typename T, typename Operation>
T atomic_update(T* address, Operation operation) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  note_atomic_write(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, operation(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  note_atomic_read(address);
  return old;
}
}  // namespace fastrnn::emulation

template <typename T>
T atomicAdd(T* address, typename fastrnn::emulation::NonDeducedValue<T>::Type value) {
  return fastrnn::emulation::atomic_update(address, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, typename fastrnn::emulation::NonDeducedValue<T>::Type value) {
  return fastrnn::emulation::atomic_update(address, [value](T old) { return std::max(old, value); });
}
template <typename T>
T atomicExch(T* address, typename fastrnn::emulation::NonDeducedValue<T>::Type value) {
  return fastrnn::emulation::atomic_update(address, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, typename fastrnn::emulation::NonDeducedValue<T>::Type expected,
            typename fastrnn::emulation::NonDeducedValue<T>::Type value) {
  return fastrnn::emulation::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads, stores and bits

template <typename T>
T __ldg(const T* address) {
  fastrnn::emulation::note_readonly(address, sizeof(T));
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, typename fastrnn::emulation::NonDeducedValue<T>::Type value) {
  *address = value;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <typename T>
void __stwb(T* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
