// SPDX-License-Identifier: BSD-3-Clause
// How many blocks of a kernel one multiprocessor holds, by NVIDIA's own calculation, for a device that is not here.
#include <cuda_occupancy.h>

// Returns -1 where the calculation refuses its arguments. Shared memory in bytes.
extern "C" int fastrnn_blocks_per_multiprocessor(int major, int minor, int threads_per_multiprocessor,
                                                 int shared_per_multiprocessor, int shared_per_block, int registers,
                                                 int threads, int static_shared, int dynamic_shared) {
  cudaOccDeviceProp device{};
  device.computeMajor = major;
  device.computeMinor = minor;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = threads_per_multiprocessor;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerBlockOptin = static_cast<size_t>(shared_per_block);
  device.sharedMemPerMultiprocessor = static_cast<size_t>(shared_per_multiprocessor);
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = 1;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = static_cast<size_t>(static_shared);
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = static_cast<size_t>(shared_per_block - static_shared);
  const cudaOccDeviceState state{};
  cudaOccResult result{};
  const auto status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                              static_cast<size_t>(dynamic_shared));
  return status == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}
