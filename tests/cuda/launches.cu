// SPDX-License-Identifier: BSD-3-Clause
// The host's half of a launch, on a runtime that keeps and refuses what CUDA's does: linked with this file in place of
// the CUDA runtime, so that it needs no GPU. Says what is wrong and ends with 1.
#include <cstdio>
#include <functional>
#include <set>

#include "../../csrc/cuda/persistent_cuda.cu"

namespace {

[[maybe_unused]] constexpr int kMultiprocessors = 132, kShared = 232448, kMostClusters[] = {66, 32, 16, 8};
std::map<const void*, int> allowed_shared;
std::set<const void*> allowed_clusters;
bool has_clusters_of_16 = true;
int tried = 0, launched = 0, asked = 0, major_capability = 9;
std::function<void()> meanwhile;  // what another thread does just before the next launch

}  // namespace

#ifndef __CUDA_ARCH__  // in code for a device CUDA's headers define some of them
namespace {

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) return config.attrs[i].val.cooperative;
  }
  return false;
}

bool allows_cluster(const void* kernel, unsigned cluster) {
  return cluster <= 8 || (cluster == 16 && has_clusters_of_16 && allowed_clusters.count(kernel));
}

}  // namespace

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaHostAlloc(void**, size_t, unsigned) { return cudaErrorMemoryAllocation; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? kMultiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kShared
                                                                  : major_capability;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) allowed_clusters.insert(kernel);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) allowed_shared[kernel] = value;
  return value <= kShared ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 1, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  *clusters = 0;
  ++asked;
  if (major_capability < 9) return cudaErrorNotSupported;
  if (!allows_cluster(kernel, cluster_of(*config))) return cudaErrorInvalidClusterSize;
  for (int i = 0; i < 4; ++i) {
    if (cluster_of(*config) == 2u << i) *clusters = kMostClusters[i];
  }
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  if (meanwhile) std::exchange(meanwhile, nullptr)();
  ++tried;
  if (config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  const int allowed = allowed_shared.count(kernel) ? allowed_shared[kernel] : 48 * 1024;
  if (config->dynamicSmemBytes > static_cast<size_t>(allowed)) return cudaErrorInvalidValue;
  if (!allows_cluster(kernel, cluster_of(*config))) return cudaErrorInvalidClusterSize;
  if (is_cooperative(*config) && config->gridDim.x > kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  return ++launched, cudaSuccess;
}
// What the compiler calls to make kernels known.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
}
#endif

namespace fastrnn {

__global__ void first_kernel() {}
__global__ void second_kernel() {}
__global__ void third_kernel() {}

int failures = 0;
void expect(bool holds, const char* what) {
  if (!holds) std::printf("does not hold: %s\n", what), ++failures;
}

void check_launches() {
  major_capability = 8;
  expect(cuda_device().clusters == std::array<int, 4>{} && asked == 0,
         "a device without clusters is not asked for them");
  major_capability = 9;

  const LaunchConfig large{dim3(16), dim3(256), 200 << 10, 16}, small{dim3(4), dim3(256), 60 << 10, 2};
  cudaError_t other = cudaErrorUnknown;
  meanwhile = [&] { other = launch(first_kernel, small, nullptr); };
  expect(launch(first_kernel, large, nullptr) == cudaSuccess, "a launch beside a smaller one of the same kernel");
  expect(other == cudaSuccess, "the smaller one");
  expect(launched == 2, "two launches were made");

  tried = 0;
  LaunchConfig too_many{dim3(133), dim3(256)};
  too_many.cooperative = true;
  expect(launch_refused(launch(first_kernel, too_many, nullptr)), "133 blocks at once are refused");
  has_clusters_of_16 = false;
  expect(launch_refused(launch(second_kernel, large, nullptr)), "a cluster of 16 is refused where there is none");
  expect(tried == 0, "what has no room is not tried: it may end the capture of a graph");

  const LaunchConfig wrong{dim3(4), dim3(2048)};
  const cudaError_t mistake = launch(third_kernel, wrong, nullptr);
  expect(mistake == cudaErrorInvalidConfiguration && !launch_refused(mistake), "a mistake is no lack of room");
  expect(cuda_device().clusters == std::array<int, 4>{66, 32, 16, 0}, "the device is asked which clusters it runs");
}

}  // namespace fastrnn

int main() {
  fastrnn::check_launches();
  return fastrnn::failures > 0;
}
