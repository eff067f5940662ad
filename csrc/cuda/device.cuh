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

// Dynamic shared memory is carved array by array, each aligned to 128 bytes. The host adds up the same calls in the
// same order to learn what the launch must ask for.
class SharedSize {
 public:
  template <typename T>
  constexpr SharedSize& take(size_t count) {
    bytes_ = (bytes_ + 127) / 128 * 128 + count * sizeof(T);
    return *this;
  }
  constexpr size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
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

// An object of 8 bytes in shared memory that counts arrivals and the bytes of asynchronous copies, phase after phase.
using Mbarrier = uint64_t;

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
// Named barriers: `threads` threads, a multiple of 32, meet at barrier `id` in 1..15; some only announce themselves.

__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(unsigned id, unsigned threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
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
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  FASTRNN_ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The address, in the block of that rank, of what `pointer` is in this block: both have the same shared memory layout.
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* pointer, unsigned rank) {
  uint64_t mapped = 0;
  FASTRNN_ASM_SM90("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory order. At gpu scope flags lie in global memory; at cluster scope also in shared memory of any of its blocks.

__device__ __forceinline__ uint32_t ld_acquire_gpu(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}
__device__ __forceinline__ void st_release_gpu(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}
__device__ __forceinline__ void red_add_release_gpu(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t ld_acquire_cluster(const uint32_t* flag) {  // (sm_90)
  uint32_t value = 0;
  FASTRNN_ASM_SM90("ld.acquire.cluster.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void st_release_cluster(uint32_t* flag, uint32_t value) {  // (sm_90)
  FASTRNN_ASM_SM90("st.release.cluster.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void red_add_release_cluster(uint32_t* flag, uint32_t value) {  // (sm_90)
  FASTRNN_ASM_SM90("red.release.cluster.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
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
// mbarrier, in shared memory of this block unless said

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Between mbarrier_init and the barrier after which other blocks or asynchronous copies use it. (sm_90)
__device__ __forceinline__ void fence_mbarrier_init() {
  FASTRNN_ASM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile(
      "{ .reg .b64 state;\n"
      "mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier))
      : "memory");
}
// One arrival, and `bytes` more that copies will bring before the phase is complete. (sm_90)
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes) {
  FASTRNN_ASM_SM90("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                   "r"(bytes) : "memory");
}
// `barrier` lies in any block of the cluster, an address from map_shared_rank; its waiters use mbarrier_wait_cluster.
// (sm_90)
__device__ __forceinline__ void mbarrier_arrive_cluster(Mbarrier* barrier) {
  FASTRNN_ASM_SM90(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until the phase of that parity (0 for the first, then 1, 0, ...) is complete.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{ .reg .pred complete;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, complete; }"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// The same, and what other blocks of the cluster did before they arrived is visible. (sm_90)
__device__ __forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier, unsigned parity) {
  uint32_t complete = 0;
  while (!complete) {
    FASTRNN_ASM_SM90(
        "{ .reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete; }" : "=r"(complete) : "r"(shared_address(barrier)),
        "r"(parity) : "memory");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

// 16 bytes from global to shared memory, the bytes from `valid` (0..16) on filled with zeros. Both aligned to 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, unsigned valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
// The same for 4 bytes, aligned to 4.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, unsigned valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bulk copies (sm_90): one thread asks, the bytes are counted at `barrier` when they have arrived. Addresses and size
// are multiples of 16. What threads wrote into the source themselves needs their fence_proxy_async first.
__device__ __forceinline__ void bulk_copy_to_shared(void* shared, const void* global, unsigned bytes,
                                                    Mbarrier* barrier) {
  FASTRNN_ASM_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(shared)),
                   "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// `target` and `barrier` lie in the same other block of the cluster.
__device__ __forceinline__ void bulk_copy_to_cluster(void* target, const void* shared, unsigned bytes,
                                                     Mbarrier* barrier) {
  FASTRNN_ASM_SM90("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(target)),
                   "r"(shared_address(shared)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// A store of 4 or 16 bytes to another block of the cluster, counted at `barrier` of that block. (sm_90)
__device__ __forceinline__ void st_async(uint32_t* target, uint32_t value, Mbarrier* barrier) {
  FASTRNN_ASM_SM90(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(shared_address(target)),
      "r"(value), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void st_async(uint4* target, uint4 value, Mbarrier* barrier) {
  FASTRNN_ASM_SM90(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          shared_address(target)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(shared_address(barrier)) : "memory");
}
// This thread's earlier reads and writes come before the bulk copies that follow. (sm_90)
__device__ __forceinline__ void fence_proxy_async() { FASTRNN_ASM_SM90("fence.proxy.async;" :: : "memory"); }

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores: the whole warp calls. g = lane / 4, t = lane % 4; a 32-bit register holds two 16-bit values, the one
// with the lower column (of A) or row (of B) in the low half.

// Lane l gives the address, aligned to 16, of row l % 8 (8 values of 16 bits) of matrix l / 8; r[m] gets row g, columns
// 2t and 2t+1 of matrix m. Transposed: rows 2t and 2t+1, column g.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices: the addresses of lanes 0..15 count.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

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
// C [8, 8] += A [8, 4] B [4, 8].    a: A[g][t]    b: B[t][g]    c[0..1]: C[g][2t], C[g][2t+1]
__device__ __forceinline__ void mma_fp64(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

// Round to nearest, ties away from zero, to 10 explicit bits of mantissa: relative error at most 2^-11.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
// tanh in one instruction, maximum relative error 2^-11 (PTX ISA): for 16-bit results.
__device__ __forceinline__ float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastrnn

#include "launch.cuh"
#endif

namespace fastrnn {

// ---------------------------------------------------------------------------------------------------------------------
// Compositions

// Every thread of every block of a cooperative launch with one-dimensional blocks. `arrived` is 0 before the launch and
// only grows: the n-th barrier of the launch, from 1, has target n * (number of blocks). The polls are relaxed, with
// one fence after them: an acquiring load throws the multiprocessor's L1 cache away each time.
__device__ __forceinline__ void grid_barrier(uint32_t* arrived, uint32_t target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    red_add_release_gpu(arrived, 1);
    while (static_cast<int32_t>(ld_relaxed_gpu(arrived) - target) < 0) {
    }
    fence_acq_rel_gpu();
  }
  __syncthreads();
}

__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace fastrnn
