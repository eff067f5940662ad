// SPDX-License-Identifier: BSD-3-Clause
// One small kernel per wrapper of device.cuh, words in, words out. What each must give is stated independently, in
// numpy, in probes.py; on a GPU the device's words are compared with the emulation's too. `out` is zero before the
// launch.
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/vec.cuh"

namespace fastrnn {
namespace {

constexpr unsigned kAll = 0xFFFFFFFF;

__device__ __forceinline__ float as_float(uint32_t word) { return __uint_as_float(word); }
__device__ __forceinline__ unsigned lane() { return threadIdx.x % 32; }

// ---------------------------------------------------------------------------------------------------------------------
// Warps and blocks

__global__ void shuffles(const uint32_t* in, uint32_t* out) {  // [64] -> [7, 64]
  const unsigned i = threadIdx.x;
  const uint32_t value = in[i];
  out[i] = __shfl_sync(kAll, value, static_cast<int>(lane() * 5 + 3) % 32);
  out[64 + i] = __shfl_sync(kAll, value, static_cast<int>(lane()) + 1, 8);
  out[128 + i] = __shfl_xor_sync(kAll, value, 5);
  out[192 + i] = __shfl_xor_sync(kAll, value, 12, 8);
  out[256 + i] = __shfl_up_sync(kAll, value, 3, 16);
  out[320 + i] = __shfl_down_sync(kAll, value, 7);
  if (lane() >= 8) out[384 + i] = __shfl_sync(0xFFFFFF00, value, 9);
}

__global__ void votes(const uint32_t* in, uint32_t* out) {  // [64] -> [6, 64]
  const unsigned i = threadIdx.x;
  const bool odd = in[i] % 2;
  out[i] = __ballot_sync(kAll, odd);
  out[64 + i] = __any_sync(kAll, in[i] % 64 == 0);
  out[128 + i] = __all_sync(kAll, in[i] % 64 != 0);
  out[192 + i] = __syncthreads_count(odd);
  out[256 + i] = __syncthreads_and(in[i] % 8) != 0;
  out[320 + i] = __syncthreads_or(in[i] % 64 == 0) != 0;
}

__global__ void integer_atomics(const uint32_t* in, uint32_t* out) {  // [64] -> [4]
  atomicAdd(&out[0], in[threadIdx.x]);
  atomicMax(&out[1], in[threadIdx.x]);
  if (threadIdx.x == 7) atomicExch(&out[2], in[7]);
  atomicCAS(&out[3], 0u, in[0]);
}

__global__ void shared_memory(const uint32_t* in, uint32_t* out) {  // [64] -> [2, 64]: reversed, in static and dynamic
  FASTRNN_SHARED(uint32_t, fixed, [64]);
  SharedCarver carver;
  uint8_t* bytes = carver.take<uint8_t>(3);  // the next array is aligned all the same
  auto* carved = carver.take<uint4>(16);
  if (threadIdx.x < 3) bytes[threadIdx.x] = 0xFF;
  fixed[threadIdx.x] = in[threadIdx.x];
  reinterpret_cast<uint32_t*>(carved)[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = fixed[63 - threadIdx.x];
  if (threadIdx.x < 16) reinterpret_cast<uint4*>(out + 64)[threadIdx.x] = carved[15 - threadIdx.x];
}

// One warp produces, two consume, with a barrier for each direction.
__global__ void named_barriers(const uint32_t* in, uint32_t* out) {  // [4, 32] -> [2, 4, 32]
  FASTRNN_SHARED(uint32_t, slot, [32]);
  constexpr unsigned kFull = 1, kEmpty = 15;
  const unsigned warp = threadIdx.x / 32;
  for (unsigned i = 0; i < 4; ++i) {
    if (warp == 0) {
      if (i > 0) named_barrier_sync(kEmpty, 96);
      slot[lane()] = in[i * 32 + lane()];
      named_barrier_sync(kFull, 96);
    } else {
      named_barrier_sync(kFull, 96);
      out[((warp - 1) * 4 + i) * 32 + lane()] = slot[lane()] + warp;
      if (i < 3) named_barrier_sync(kEmpty, 96);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Grid and memory order

// A chain of blocks: each adds its number to what the block before it told of, by a flag and fences.
__global__ void fences(const uint32_t* in, uint32_t* out) {  // [32] -> [8, 32] and flags
  uint32_t* flags = out + 8 * 32;
  const unsigned block = blockIdx.x;
  if (threadIdx.x == 0 && block > 0) {
    while (ld_relaxed_gpu(&flags[block]) != 1) {
    }
    fence_acq_rel_gpu();
  }
  __syncthreads();
  const uint32_t* before = block ? out + (block - 1) * 32 : in;
  out[block * 32 + threadIdx.x] = before[threadIdx.x] + block;
  __syncthreads();
  if (threadIdx.x == 0 && block + 1 < gridDim.x) {
    if (block % 2) {
      fence_acq_rel_gpu();
    } else {
      __threadfence();
    }
    st_relaxed_gpu(&flags[block + 1], 1);
  }
}

// Data that carry their own flag: three words and, last, the round, in one store of 16 bytes.
__global__ void flag_in_data(const uint32_t* in, uint32_t* out) {  // [32, 3] -> [32, 3] and slots
  auto* slots = reinterpret_cast<uint4*>(out + 128);
  const unsigned i = threadIdx.x;
  if (blockIdx.x == 0) {
    st_relaxed_gpu(&slots[i], uint4{in[3 * i], in[3 * i + 1], in[3 * i + 2], 1});
    return;
  }
  uint4 value;
  do {
    value = ld_relaxed_gpu(&slots[i]);
  } while (value.w != 1);
  out[3 * i] = value.x;
  out[3 * i + 1] = value.y;
  out[3 * i + 2] = value.z;
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters

__global__ void clusters(const uint32_t* in, uint32_t* out) {  // [8, 32] -> [8, 32] twice: two clusters of 4
  FASTRNN_SHARED(uint32_t, mine, [32]);
  const unsigned rank = blockIdx.x % 4, i = threadIdx.x;
  mine[i] = in[blockIdx.x * 32 + i];
  cluster_barrier();
  out[blockIdx.x * 32 + i] = *map_shared_rank(&mine[31 - i], (rank + 1) % 4);
  cluster_arrive();
  cluster_wait();
  *map_shared_rank(&mine[i], (rank + 3) % 4) = in[blockIdx.x * 32 + i] + rank;
  cluster_barrier();
  out[256 + blockIdx.x * 32 + i] = mine[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

__global__ void cp_asyncs(const uint32_t* in, uint32_t* out) {  // [2, 32, 4] -> [2, 32, 4]
  FASTRNN_SHARED(uint4, copied, [2][32]);
  const unsigned i = threadIdx.x;
  for (unsigned group = 0; group < 2; ++group) {
    cp_async_16(&copied[group][i], in + 128 * group + 4 * i);
    cp_async_commit();
  }
  cp_async_wait<1>();
  reinterpret_cast<uint4*>(out)[i] = copied[0][i];
  cp_async_wait<0>();
  __syncthreads();
  reinterpret_cast<uint4*>(out + 128)[i] = copied[1][31 - i];
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores and arithmetic

enum class Product { kBf16, kFp16, kTf32 };
template <Product product>
__global__ void mma(const uint32_t* in, uint32_t* out) {  // a [32, 4], b [32, 2], c [32, 4] -> c
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = in[lane() * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = in[128 + lane() * 2 + i];
  for (int i = 0; i < 4; ++i) c[i] = as_float(in[192 + lane() * 4 + i]);
  if constexpr (product == Product::kBf16) mma_bf16(c, a, b);
  if constexpr (product == Product::kFp16) mma_fp16(c, a, b);
  if constexpr (product == Product::kTf32) mma_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) out[lane() * 4 + i] = __float_as_uint(c[i]);
}

__global__ void rounding(const uint32_t* in, uint32_t* out) {  // [256] floats -> tf32, through half, through bfloat16
  const float x = as_float(in[threadIdx.x]);
  out[threadIdx.x] = to_tf32(x);
  out[256 + threadIdx.x] = __float_as_uint(to_acc<float>(from_acc<__half>(x)));
  out[512 + threadIdx.x] = __float_as_uint(to_acc<float>(from_acc<__nv_bfloat16>(x)));
}

struct Probe {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*);
  LaunchConfig config;
};

LaunchConfig grid_of(unsigned blocks, unsigned threads, size_t shared = 0) {
  return {dim3(blocks), dim3(threads), shared, 1, blocks > 1};
}
LaunchConfig clusters_of(unsigned blocks, unsigned cluster, unsigned threads, size_t shared = 0) {
  return {dim3(blocks), dim3(threads), shared, cluster, false};
}

const Probe kProbes[] = {
    {"shuffles", shuffles, grid_of(1, 64)},
    {"votes", votes, grid_of(1, 64)},
    {"integer_atomics", integer_atomics, grid_of(1, 64)},
    {"shared_memory", shared_memory, grid_of(1, 64, 128 + 16 * sizeof(uint4))},
    {"named_barriers", named_barriers, grid_of(1, 96)},
    {"fences", fences, grid_of(8, 32)},
    {"flag_in_data", flag_in_data, grid_of(2, 32)},
    {"clusters", clusters, clusters_of(8, 4, 32)},
    {"cp_asyncs", cp_asyncs, grid_of(1, 32)},
    {"mma_bf16", mma<Product::kBf16>, grid_of(1, 32)},
    {"mma_fp16", mma<Product::kFp16>, grid_of(1, 32)},
    {"mma_tf32", mma<Product::kTf32>, grid_of(1, 32)},
    {"rounding", rounding, grid_of(1, 256)},
};

}  // namespace
}  // namespace fastrnn

// The name of the i-th probe, or null after the last one.
extern "C" const char* fastrnn_probe_name(unsigned i) {
  return i < sizeof fastrnn::kProbes / sizeof *fastrnn::kProbes ? fastrnn::kProbes[i].name : nullptr;
}

// Returns null, or what went wrong. `in` and `out` are on the device.
extern "C" const char* fastrnn_probe_run(unsigned i, const uint32_t* in, uint32_t* out, void* stream) {
  const fastrnn::Probe& probe = fastrnn::kProbes[i];
  const cudaError_t status = fastrnn::launch(probe.kernel, probe.config, static_cast<cudaStream_t>(stream), in, out);
  return status == cudaSuccess ? nullptr : fastrnn::status_string(status);
}
