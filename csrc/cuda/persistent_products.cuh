// SPDX-License-Identifier: BSD-3-Clause
// The products of the persistent kernels, in each precision: 16 rows of the weight times 8 rows of the batch, over one
// group of packets. Partial sums are in float.
//
// `low` and `high` are the lane's packets of rows g and g+8. A product reads kReads packets of the batch, read i from
// the place of lane source(i). After complete(), sum.c is laid out as mma leaves it: rows g, g, g+8, g+8, columns 2t,
// 2t+1, 2t, 2t+1.
#pragma once

#include "../cuda_plan.h"
#include "device.cuh"

namespace fastrnn {

using Packet = uint4;
using Tiling = PersistentTiling;

// Tensor cores on 16-bit values.
template <typename scalar>
struct Products16 {
  using scalar_t = scalar;
  static constexpr Arithmetic kArithmetic = std::is_same_v<scalar_t, __half> ? Arithmetic::fp16 : Arithmetic::bf16;
  static constexpr int kSlots = 8, kReads = 1;
  struct Sum {
    float c[4];
  };

  static __device__ __forceinline__ int source(int /*read*/, int lane) { return lane; }
  static __device__ __forceinline__ void multiply(Sum& sum, const Packet& low, const Packet& high, const Packet& batch,
                                                  int /*read*/) {
    const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
    const uint32_t b0[2] = {batch.x, batch.y}, b1[2] = {batch.z, batch.w};
    if constexpr (std::is_same_v<scalar_t, __half>) {
      mma_fp16(sum.c, a0, b0);
      mma_fp16(sum.c, a1, b1);
    } else {
      mma_bf16(sum.c, a0, b0);
      mma_bf16(sum.c, a1, b1);
    }
  }
  static __device__ __forceinline__ void complete(Sum&, int /*lane*/) {}

  static __device__ __forceinline__ uint32_t bits(scalar_t value) {
    if constexpr (std::is_same_v<scalar_t, __half>) {
      return __half_as_ushort(value);
    } else {
      return __bfloat16_as_ushort(value);
    }
  }
};

// Tensor cores on float values rounded to TF32.
struct ProductsTf32 {
  using scalar_t = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::tf32;
  static constexpr int kSlots = 4, kReads = 1;
  struct Sum {
    float c[4];
  };

  static __device__ __forceinline__ int source(int /*read*/, int lane) { return lane; }
  static __device__ __forceinline__ void multiply(Sum& sum, const Packet& low, const Packet& high, const Packet& batch,
                                                  int /*read*/) {
    const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
    const uint32_t b0[2] = {batch.x, batch.y}, b1[2] = {batch.z, batch.w};
    mma_tf32(sum.c, a0, b0);
    mma_tf32(sum.c, a1, b1);
  }
  static __device__ __forceinline__ void complete(Sum&, int /*lane*/) {}

  static __device__ __forceinline__ uint32_t bits(float value) { return to_tf32(value); }
};

// Multiply-adds in float. A lane adds up its packets' terms for rows g and g+8 and all 8 rows of the batch; at the end
// the 4 lanes with the same g add theirs.
struct ProductsFp32 {
  using scalar_t = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::fp32;
  static constexpr int kSlots = 4, kReads = 8;
  struct Sum {
    float c[16];  // [2 rows][8 rows of the batch]
  };

  static __device__ __forceinline__ int source(int read, int lane) { return read * 4 + lane % 4; }
  static __device__ __forceinline__ void multiply(Sum& sum, const Packet& low, const Packet& high, const Packet& batch,
                                                  int read) {
    sum.c[read] = dot(sum.c[read], low, batch);
    sum.c[8 + read] = dot(sum.c[8 + read], high, batch);
  }
  static __device__ __forceinline__ void complete(Sum& sum, int lane) {
    const bool upper = lane & 2, odd = lane & 1;
    float half[8];  // [2 rows][4 rows of the batch]: 0..3 or 4..7
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int first = i / 4 * 8 + i % 4;
      const float mine = upper ? sum.c[first + 4] : sum.c[first], other = upper ? sum.c[first] : sum.c[first + 4];
      half[i] = mine + __shfl_xor_sync(~0u, other, 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = i / 2 * 4 + i % 2;
      const float mine = odd ? half[first + 2] : half[first], other = odd ? half[first] : half[first + 2];
      sum.c[i] = mine + __shfl_xor_sync(~0u, other, 1);
    }
  }

  static __device__ __forceinline__ uint32_t bits(float value) { return __float_as_uint(value); }

 private:
  static __device__ __forceinline__ float dot(float sum, const Packet& a, const Packet& b) {
    sum = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), sum);
    sum = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), sum);
    sum = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), sum);
    return fmaf(__uint_as_float(a.w), __uint_as_float(b.w), sum);
  }
};

// The packet of the lanes that hold its values, lane 0 of them the first: all of them get it. The whole warp calls.
template <class Products>
__device__ __forceinline__ Packet gather(uint32_t bits) {
  const int first = threadIdx.x % 32 / Products::kSlots * Products::kSlots;
  constexpr int kLanesPerWord = Products::kSlots / 4;
  if (kLanesPerWord == 2) bits |= __shfl_down_sync(~0u, bits, 1) << 16;
  return {__shfl_sync(~0u, bits, first), __shfl_sync(~0u, bits, first + kLanesPerWord),
          __shfl_sync(~0u, bits, first + 2 * kLanesPerWord), __shfl_sync(~0u, bits, first + 3 * kLanesPerWord)};
}

// A packet of the values that f(slot) gives, in the precision of products. Slots without a unit are zero.
template <class Products, class F>
__device__ Packet make_packet(const Tiling& tiling, const F& f) {
  uint32_t words[4] = {};
#pragma unroll
  for (int slot = 0; slot < Products::kSlots; ++slot) {
    if (slot < tiling.units_per_packet) {
      words[slot * 4 / Products::kSlots] |= Products::bits(f(slot)) << slot % (Products::kSlots / 4) * 16;
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace fastrnn
