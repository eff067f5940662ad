// SPDX-License-Identifier: BSD-3-Clause
// A small recurrent layer as one persistent kernel, with each way of exchanging h between blocks, and each with faults
// planted on request: what the emulation and the sanitizers must find. test_emulation_faults.py says who finds which.
//
//   h' = min(relu(x + W h), 15), for integers: exact in bfloat16 whatever the order of the sums.
//
// A block owns kUnits hidden units and keeps their rows of W in shared memory; its warps split K; h [slice, B, kUnits]
// is double-buffered, a slice per block.
#include <cstring>

#include "cuda/device.cuh"

namespace fastrnn {
namespace {

constexpr int kBlocks = 4, kThreads = 64, kWarps = kThreads / 32;
constexpr int kUnits = 16, kH = kBlocks * kUnits, kB = 8;
constexpr int kSlice = kB * kUnits, kState = kBlocks * kSlice, kRow = kH + 8;  // a row of W, padded against conflicts
static_assert(kState * sizeof(__nv_bfloat16) == kThreads * 16, "a thread copies 16 bytes of h");

enum class Exchange {
  kGridFences,      // h in global memory, one counter with relaxed accesses and fences
  kClusterBarrier,  // h in distributed shared memory
};

enum class Fault {
  kNone,
  kNoCopyWait,
  kNoBarrierAfterCopy,
  kNoBarrierBeforeSum,
  kNoBarrierBetweenSteps,
  kNoFence,
  kSingleBuffer,
  kSwappedFragment,
  kOverrun,
  kDivergentBarrier,
  kMissingLane,
  kNotCooperative,
  kEarlyExit,
  kTooLittleShared,
};

struct Params {
  int64_t T;
  const float* x;             // [T, B, H]
  const __nv_bfloat16* w;     // [H, H]
  const __nv_bfloat16* h0;    // [slice, B, kUnits]
  __nv_bfloat16* h_exchange;  // [2, slice, B, kUnits]
  uint32_t* arrived;          // [1]
  float* output;              // [T, B, H]
};

struct Arrays {
  __nv_bfloat16 *w, *h;
  float* partial;

  static constexpr size_t kBytes =
      (kUnits * kRow + 2 * kState) * sizeof(__nv_bfloat16) + kWarps * kSlice * sizeof(float);
  static_assert(kUnits * kRow * sizeof(__nv_bfloat16) % 128 == 0 && kState * sizeof(__nv_bfloat16) % 128 == 0);

  __device__ Arrays() {
    SharedCarver carver;
    w = carver.take<__nv_bfloat16>(kUnits * kRow);
    h = carver.take<__nv_bfloat16>(2 * kState);
    partial = carver.take<float>(kWarps * kSlice);
  }
};

template <Fault fault>
__device__ __forceinline__ void copy_state(__nv_bfloat16* shared, const __nv_bfloat16* global, bool last) {
  cp_async_16(shared + threadIdx.x * 8, global + threadIdx.x * 8);
  cp_async_commit();
  if (fault != Fault::kNoCopyWait || last) cp_async_wait<0>();
  if (fault != Fault::kNoBarrierAfterCopy) __syncthreads();
}

// partial[warp] [kUnits, B] = W [kUnits, the warp's share of K] h.
template <Fault fault>
__device__ __forceinline__ void multiply(const Arrays& shared, const __nv_bfloat16* h) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  constexpr int kSlicesPerWarp = kBlocks / kWarps;
  float c[4] = {};
  for (int slice = warp * kSlicesPerWarp; slice < (warp + 1) * kSlicesPerWarp; ++slice) {
    const auto weight = [&](int row, int pair) {
      return reinterpret_cast<const uint32_t*>(shared.w + row * kRow + slice * kUnits)[pair];
    };
    uint32_t a[4] = {weight(g, t), weight(g + 8, t), weight(g, t + 4), weight(g + 8, t + 4)};
    if (fault == Fault::kSwappedFragment) {
      const uint32_t first = a[1];
      a[1] = a[2];
      a[2] = first;
    }
    const auto* row = reinterpret_cast<const uint32_t*>(h + slice * kSlice + g * kUnits);
    const uint32_t b[2] = {row[t], row[t + 4]};
    mma_bf16(c, a, b);
  }
  float* sum = shared.partial + warp * kSlice;
  sum[g * kB + 2 * t] = c[0];
  sum[g * kB + 2 * t + 1] = c[1];
  sum[(g + 8) * kB + 2 * t] = c[2];
  sum[(g + 8) * kB + 2 * t + 1 + (fault == Fault::kOverrun && g == 7 ? kB : 0)] = c[3];
  if (fault == Fault::kDivergentBarrier) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != Fault::kNoBarrierBeforeSum) {
    __syncthreads();
  }
  if (fault == Fault::kMissingLane && lane != 5) __syncwarp();
}

template <Fault fault>
__device__ __forceinline__ void wait_for_grid(const Params& p, uint32_t target) {
  __syncthreads();
  if (fault == Fault::kNoBarrierBetweenSteps) return;
  if (threadIdx.x == 0) {
    if (fault != Fault::kNoFence) fence_acq_rel_gpu();
    atomicAdd(p.arrived, 1u);
    while (ld_relaxed_gpu(p.arrived) < target) {
    }
    fence_acq_rel_gpu();
  }
  __syncthreads();
}

template <Exchange exchange, Fault fault>
__global__ void __launch_bounds__(kThreads) layer_kernel(const Params p) {
  constexpr bool kGlobal = exchange == Exchange::kGridFences;
  const Arrays shared;
  const int block = blockIdx.x;
  const auto other = [](int64_t t) { return fault == Fault::kSingleBuffer ? 0 : (t + 1) % 2; };

  for (int i = threadIdx.x; i < kUnits * kH; i += kThreads) {
    shared.w[i / kH * kRow + i % kH] = p.w[block * kUnits * kH + i];
  }
  copy_state<fault>(shared.h, p.h0, true);
  if (!kGlobal) cluster_barrier();

  for (int64_t t = 0; t < p.T; ++t) {
    const __nv_bfloat16* h = shared.h + (fault == Fault::kSingleBuffer ? 0 : t % 2) * kState;
    const bool last = t + 1 == p.T;
    if (kGlobal && t > 0) {
      copy_state<fault>(const_cast<__nv_bfloat16*>(h), p.h_exchange + other(t - 1) * kState, last);
    }
    multiply<fault>(shared, h);

    for (int i = threadIdx.x; i < kSlice; i += kThreads) {
      const int unit = i / kB, b = i % kB, column = block * kUnits + unit;
      float sum = p.x[(t * kB + b) * kH + column];
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.partial[warp * kSlice + i];
      sum = sum < 0 ? 0 : sum > 15 ? 15 : sum;
      p.output[(t * kB + b) * kH + column] = sum;
      const __nv_bfloat16 value = __float2bfloat16_rn(sum);
      const int place = block * kSlice + b * kUnits + unit;
      if (kGlobal) {
        p.h_exchange[other(t) * kState + place] = value;
      } else {
        for (int rank = 0; rank < kBlocks; ++rank) {
          *map_shared_rank(shared.h + other(t) * kState + place, rank) = value;
        }
      }
    }
    if (kGlobal && !last) wait_for_grid<fault>(p, static_cast<uint32_t>((t + 1) * kBlocks));
    if (!kGlobal && !(last && fault == Fault::kEarlyExit)) {
      if (fault == Fault::kNoBarrierBetweenSteps) {
        __syncthreads();
      } else {
        cluster_barrier();
      }
    }
  }
  if (!kGlobal && fault == Fault::kNoBarrierBetweenSteps) cluster_barrier();  // this fault is not an early exit too
}

template <Exchange exchange, Fault fault>
cudaError_t run(const Params& p, cudaStream_t stream) {
  constexpr bool kGlobal = exchange == Exchange::kGridFences;
  LaunchConfig config{dim3(kBlocks), dim3(kThreads), Arrays::kBytes};
  if (kGlobal) config.cooperative = fault != Fault::kNotCooperative;
  if (!kGlobal) config.cluster = kBlocks;
  if (fault == Fault::kTooLittleShared) config.shared_bytes -= 4;
  return launch(layer_kernel<exchange, fault>, config, stream, p);
}

struct Variant {
  const char* name;
  cudaError_t (*run)(const Params&, cudaStream_t);
};
#define FASTRNN_VARIANT(exchange, fault) {#exchange "/" #fault, run<Exchange::exchange, Fault::fault>}
const Variant kVariants[] = {
    FASTRNN_VARIANT(kGridFences, kNone),
    FASTRNN_VARIANT(kClusterBarrier, kNone),
#ifdef FASTRNN_EMULATE  // faults are for the emulation: on a device they may hang it
    FASTRNN_VARIANT(kGridFences, kNoCopyWait),
    FASTRNN_VARIANT(kGridFences, kNoBarrierAfterCopy),
    FASTRNN_VARIANT(kGridFences, kNoBarrierBeforeSum),
    FASTRNN_VARIANT(kGridFences, kNoBarrierBetweenSteps),
    FASTRNN_VARIANT(kGridFences, kNoFence),
    FASTRNN_VARIANT(kGridFences, kSingleBuffer),
    FASTRNN_VARIANT(kGridFences, kSwappedFragment),
    FASTRNN_VARIANT(kGridFences, kOverrun),
    FASTRNN_VARIANT(kGridFences, kDivergentBarrier),
    FASTRNN_VARIANT(kGridFences, kMissingLane),
    FASTRNN_VARIANT(kGridFences, kNotCooperative),
    FASTRNN_VARIANT(kGridFences, kTooLittleShared),
    FASTRNN_VARIANT(kClusterBarrier, kNoBarrierBetweenSteps),
    FASTRNN_VARIANT(kClusterBarrier, kSingleBuffer),
    FASTRNN_VARIANT(kClusterBarrier, kEarlyExit),
#endif
};

}  // namespace
}  // namespace fastrnn

// The name of the i-th variant, or null after the last one.
extern "C" const char* fastrnn_layer_name(unsigned i) {
  using fastrnn::kVariants;
  return i < sizeof kVariants / sizeof *kVariants ? kVariants[i].name : nullptr;
}

// Returns null, or what went wrong. Pointers as in Params; `arrived` is zero.
extern "C" const char* fastrnn_layer_run(unsigned i, int64_t T, const float* x, const void* w, const void* h0,
                                         void* h_exchange, uint32_t* arrived, float* output, void* stream) {
  using bfloat16 = __nv_bfloat16;
  const fastrnn::Params params{T,
                               x,
                               static_cast<const bfloat16*>(w),
                               static_cast<const bfloat16*>(h0),
                               static_cast<bfloat16*>(h_exchange),
                               arrived,
                               output};
  const cudaError_t status = fastrnn::kVariants[i].run(params, static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? nullptr : fastrnn::status_string(status);
}
