// SPDX-License-Identifier: BSD-3-Clause
// Launches, and what the host asks of a device: a part of device.cuh, with twins in the emulation as all of it.
#pragma once

#include <map>
#include <mutex>
#include <new>
#include <tuple>

#include "device.cuh"

namespace fastrnn {

// The room for blocks of a kernel that have a multiprocessor each, with all its shared memory, in clusters of that
// size. Asked once for each kernel and device, and only then is the kernel allowed what takes a permission. A
// permission is of the kernel, not of a launch: one that grew and shrank from launch to launch would fail those of
// other threads.
template <typename... Params>
Room room_for(void (*kernel)(Params...), unsigned threads, unsigned cluster) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Params...), int, unsigned, unsigned>, Room> known;
  constexpr unsigned kPortableCluster = 8;
  int device = 0, multiprocessors = 0, shared = 0, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find({kernel, device, threads, cluster});
  if (at != known.end()) return at->second;

  // A kernel that is loaded here, while a graph is captured, would end that in its default mode.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaFuncAttributes attributes{};
  const auto then = [&](auto call) {
    if (status == cudaSuccess) status = call();
  };
  then([&] { return cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device); });
  then([&] { return cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); });
  then([&] { return cudaFuncGetAttributes(&attributes, kernel); });
  shared -= static_cast<int>(attributes.sharedSizeBytes);
  then([&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared); });
  if (cluster == 1) {
    then([&] { return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared); });
    count *= multiprocessors;
  } else {
    if (cluster > kPortableCluster) {
      then([&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1); });
    }
    cudaLaunchAttribute in_clusters{};
    in_clusters.id = cudaLaunchAttributeClusterDimension;
    in_clusters.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = cluster;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.attrs = &in_clusters;
    config.numAttrs = 1;
    then([&] { return cudaOccupancyMaxActiveClusters(&count, kernel, &config); });
    count *= static_cast<int>(cluster);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (status != cudaSuccess) cudaGetLastError();
  const Room room{status, status == cudaSuccess ? count : 0};
  if (status == cudaSuccess || status == cudaErrorInvalidClusterSize) known[{kernel, device, threads, cluster}] = room;
  return room;
}

// An error is returned, not left behind for the next caller of cudaGetLastError.
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config, cudaStream_t stream,
                   typename NonDeduced<Params>::Type... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = stream;
  launch_config.attrs = attributes;
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (config.shared_bytes > kSharedWithoutAsking || config.cooperative || config.cluster > 1) {
    // What has no room is not tried: a launch that fails may end the capture of a graph.
    const Room room = room_for(kernel, config.block.x * config.block.y * config.block.z, config.cluster);
    if (room.status != cudaSuccess) return room.status;
    if (config.cluster > 1 && room.blocks == 0) return cudaErrorInvalidClusterSize;
    const unsigned blocks = config.grid.x * config.grid.y * config.grid.z;
    if (config.cooperative && blocks > static_cast<unsigned>(room.blocks)) return cudaErrorCooperativeLaunchTooLarge;
  }
  const cudaError_t status = cudaLaunchKernelEx(&launch_config, kernel, arguments...);
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

inline const char* status_string(cudaError_t status) { return cudaGetErrorString(status); }

// Of the current device. All zero where there is none.
inline DeviceAttributes current_device() {
  int device = 0, major = 0, minor = 0;
  DeviceAttributes attributes{};
  const auto ask = [&](int& value, cudaDeviceAttr attribute) { cudaDeviceGetAttribute(&value, attribute, device); };
  if (cudaGetDevice(&device) != cudaSuccess) return attributes;
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  ask(attributes.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(attributes.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(attributes.l2_bytes, cudaDevAttrL2CacheSize);
  attributes.capability = major * 10 + minor;
  return attributes;
}

// A zero in page-locked memory that every device and the host can access, never freed; null when there is none left.
inline uint32_t* host_visible_word() {
  // The call that asks first may be captured into a graph: an allocation would end that in its default mode.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* word = nullptr;
  const cudaError_t error = cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocPortable | cudaHostAllocMapped);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) return new (word) uint32_t(0);
  cudaGetLastError();
  return nullptr;
}

}  // namespace fastrnn
