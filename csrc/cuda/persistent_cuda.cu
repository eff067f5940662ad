// SPDX-License-Identifier: BSD-3-Clause
// What the host does for the path "persistent" beside its launches.
#include <algorithm>

#include "../persistent.h"
#include "device.cuh"

namespace fastrnn {
namespace {

constexpr int kWritten = 448;  // values of one launch: parameters end at 4 KB

struct Written {
  int64_t values[kWritten];
};

__global__ void write_kernel(const __grid_constant__ Written from, int64_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.values[i];
}

}  // namespace

CudaStatus launch_write(const int64_t* values, int64_t count, int64_t* to, CudaStream stream) {
  for (int64_t i = 0; i < count; i += kWritten) {
    Written part;
    const int64_t size = std::min<int64_t>(kWritten, count - i);
    std::copy_n(values + i, size, part.values);
    const cudaError_t status = launch(write_kernel, {dim3(1), dim3(128)}, static_cast<cudaStream_t>(stream), part,
                                      to + i, static_cast<int>(size));
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

CudaDevice cuda_device() {
  const DeviceAttributes device = current_device();
  CudaDevice facts{device.capability, device.multiprocessors, device.shared_per_block, device.l2_bytes, {}};
  if (facts.capability < 90) return facts;  // without clusters
  int blocks = 1;
  // Any kernel will do: with all the shared memory a block takes a multiprocessor, as one of a persistent kernel does.
  for (int& clusters : facts.clusters) {
    blocks *= 2;
    clusters = room_for(write_kernel, PersistentTiling::kThreads, blocks).blocks / blocks;
  }
  return facts;
}

// What else a launch fails with (cudaErrorInvalidConfiguration, cudaErrorLaunchOutOfResources) is a mistake in it.
bool launch_refused(CudaStatus status) {
  return status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorInvalidClusterSize;
}

uint32_t* failure_word() {
  static uint32_t* const word = host_visible_word();
  return word;
}

}  // namespace fastrnn
