// SPDX-License-Identifier: BSD-3-Clause
// What kernels need beyond CUDA C++ itself, and the only file with PTX and shared memory declarations; launch.cuh is
// its half for the host.
//
// Kernels write the words of CUDA C++ that the compiler knows (threadIdx, __syncthreads, __syncwarp, __shfl_xor_sync,
// __ballot_sync, atomicAdd on integers, __threadfence) and the wrappers below for everything else. Each wrapper has a
// twin of the same name and meaning in tests/emulation/emulated_device.h, so that the tests run the same kernel sources
// on a CPU; tests/cuda compares the two on a GPU.
//
// Wrappers marked (sm_90) trap on older devices: the plan never picks a kernel that uses them there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fastrnn {

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  unsigned cluster = 1;      // blocks along x that form a cluster (sm_90)
  bool cooperative = false;  // all blocks resident at once, or the launch is refused
};

struct DeviceAttributes {
  int capability;  // 90 for sm_90
  int multiprocessors;
  int shared_per_block;  // bytes of shared memory, the most that a kernel may ask for
  int l2_bytes;
};

// Blocks of a kernel that run at once on a device.
struct Room {
  cudaError_t status;
  int blocks;
};

template <typename T>
struct NonDeduced {
  using Type = T;
};

}  // namespace fastrnn

#ifdef FASTRNN_EMULATE
#include "emulated_device.h"
#else

// FASTRNN_SHARED(float, partial, [4][32]) declares static shared memory.
#define FASTRNN_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTRNN_ASM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define FASTRNN_ASM_SM90(...) __trap()
#endif

namespace fastrnn {

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

// Dynamic shared memory is carved array by array, each aligned to 128 bytes.
class SharedCarver {
 public:
  template <typename T>
  __device__ __forceinline__ T* take(size_t count) {
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    T* array = reinterpret_cast<T*>(dynamic_shared + offset_);
    offset_ = (offset_ + count * sizeof(T) + 127) / 128 * 128;
    return array;
  }

 private:
  size_t offset_ = 0;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------------------------------------------------------------
// Named barriers: `threads` threads, a multiple of 32, meet at barrier `id` in 1..15.

__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters (sm_90)

// Every thread of the cluster arrives (release), then waits (acquire): work of its own fits between the two.
__device__ __forceinline__ void cluster_arrive() {
  FASTRNN_ASM_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
__device__ __forceinline__ void cluster_wait() {
  FASTRNN_ASM_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}
// The address, in the block of that rank, of what `pointer` is in this block: both have the same shared memory layout.
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* pointer, unsigned rank) {
  uint64_t mapped = 0;
  FASTRNN_ASM_SM90("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory order

// Between two threads: before the relaxed store of one and after the relaxed load of the other that sees it. Cheaper
// than __threadfence, which is sequentially consistent as well.
__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Polling: the value as it is in memory, in one piece, ordering nothing else. 16 bytes in one piece let data carry
// their own flag: the reader polls until the step number inside is right. Addresses in global memory, aligned to their
// size.
__device__ __forceinline__ uint32_t ld_relaxed_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(address)) : "memory");
  return value;
}
__device__ __forceinline__ uint4 ld_relaxed_gpu(const uint4* address) {
  uint64_t low, high;
  asm volatile(
      "{ .reg .b128 both;\n"
      "ld.relaxed.gpu.global.b128 both, [%2];\n"
      "mov.b128 {%0, %1}, both; }"
      : "=l"(low), "=l"(high)
      : "l"(__cvta_generic_to_global(address))
      : "memory");
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}
__device__ __forceinline__ void st_relaxed_gpu(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(value) : "memory");
}
__device__ __forceinline__ void st_relaxed_gpu(uint4* address, uint4 value) {
  const uint64_t low = uint64_t{value.y} << 32 | value.x;
  const uint64_t high = uint64_t{value.w} << 32 | value.z;
  asm volatile(
      "{ .reg .b128 both;\n"
      "mov.b128 both, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], both; }" ::"l"(__cvta_generic_to_global(address)),
      "l"(low), "l"(high)
      : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

// 16 bytes from global to shared memory, both aligned to 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores: the whole warp calls. g = lane / 4, t = lane % 4; a 32-bit register holds two 16-bit values, the one
// with the lower column (of A) or row (of B) in the low half.

#define FASTRNN_MMA(shape, types)                                                     \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                        \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// C [16, 8] += A [16, 16] B [16, 8].
//   a[0..3]: A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]    b[0..1]: B[2t..][g], B[2t+8..][g]
//   c[0..3]: C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FASTRNN_MMA("m16n8k16", "bf16.bf16");
}
__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FASTRNN_MMA("m16n8k16", "f16.f16");
}
// C [16, 8] += A [16, 8] B [8, 8], of values from to_tf32. C as above.
//   a[0..3]: A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]    b[0..1]: B[t][g], B[t+4][g]
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FASTRNN_MMA("m16n8k8", "tf32.tf32");
}
#undef FASTRNN_MMA

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

// Round to nearest, ties away from zero, to 10 explicit bits of mantissa: relative error at most 2^-11.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace fastrnn

#include "launch.cuh"
#endif

namespace fastrnn {

// ---------------------------------------------------------------------------------------------------------------------
// Compositions

__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace fastrnn
