// SPDX-License-Identifier: BSD-3-Clause
// The twin of every wrapper of csrc/cuda/device.cuh, in the same order and with the same meaning; documented there.
// Memory accesses of a lane happen here, in code that the sanitizers instrument, not in the runtime.
#pragma once

#include "cuda_language.h"

#define FASTRNN_SHARED(type, name, ...)                                                 \
  static const char name##_key = 0;                                                     \
  typedef type name##_array __VA_ARGS__;                                                \
  name##_array& name = *static_cast<name##_array*>(::fastrnn::emulation::static_shared( \
      &name##_key, sizeof(name##_array), alignof(name##_array), ::fastrnn::emulation::Location::here()))

namespace fastrnn {

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

class SharedCarver {
 public:
  template <typename T>
  T* take(size_t count, FASTRNN_WHERE) {
    T* array = static_cast<T*>(emulation::dynamic_shared(offset_, count * sizeof(T), where));
    offset_ = (offset_ + count * sizeof(T) + 127) / 128 * 128;
    return array;
  }

 private:
  size_t offset_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Named barriers

inline void named_barrier_sync(unsigned id, unsigned threads, FASTRNN_WHERE) {
  emulation::named_barrier(id, threads, true, where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters

inline void cluster_arrive(FASTRNN_WHERE) { emulation::cluster_arrive(where); }
inline void cluster_wait(FASTRNN_WHERE) { emulation::cluster_wait(where); }
template <typename T>
T* map_shared_rank(T* pointer, unsigned rank, FASTRNN_WHERE) {
  return static_cast<T*>(emulation::map_shared_rank(pointer, rank, where));
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory order

inline void fence_acq_rel_gpu(FASTRNN_WHERE) { emulation::fence(where); }

inline uint32_t ld_relaxed_gpu(const uint32_t* address, FASTRNN_WHERE) {
  emulation::poll(where);
  const uint32_t value = __atomic_load_n(address, __ATOMIC_RELAXED);
  emulation::note_atomic_read(address);
  return value;
}
// No other thread runs between the four pieces.
inline uint4 ld_relaxed_gpu(const uint4* address, FASTRNN_WHERE) {
  emulation::require_alignment(address, 16, "ld_relaxed_gpu", where);
  emulation::poll(where);
  const uint4 value{__atomic_load_n(&address->x, __ATOMIC_RELAXED), __atomic_load_n(&address->y, __ATOMIC_RELAXED),
                    __atomic_load_n(&address->z, __ATOMIC_RELAXED), __atomic_load_n(&address->w, __ATOMIC_RELAXED)};
  emulation::note_atomic_read(address);
  return value;
}
inline void st_relaxed_gpu(uint32_t* address, uint32_t value) {
  emulation::note_atomic_write(address);
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}
inline void st_relaxed_gpu(uint4* address, uint4 value, FASTRNN_WHERE) {
  emulation::require_alignment(address, 16, "st_relaxed_gpu", where);
  emulation::note_atomic_write(address);
  __atomic_store_n(&address->x, value.x, __ATOMIC_RELAXED);
  __atomic_store_n(&address->y, value.y, __ATOMIC_RELAXED);
  __atomic_store_n(&address->z, value.z, __ATOMIC_RELAXED);
  __atomic_store_n(&address->w, value.w, __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

inline void cp_async_16(void* shared, const void* global, FASTRNN_WHERE) {
  emulation::cp_async(shared, global, 16, where);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

namespace emulation {

struct Bf16 {
  static float value(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};
struct Fp16 {
  static float value(uint16_t bits) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
};

struct MmaLane {
  const uint32_t *a, *b;
  float* c;
};

// Products are exact in float; sums here are in double and rounded once, a device rounds in ways it does not document.
template <int K>
void multiply(void* const lanes[32], const float (&A)[16][K], const float (&B)[K][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      float& c = static_cast<MmaLane*>(lanes[lane])->c[i];
      double sum = c;
      for (int k = 0; k < K; ++k) sum += static_cast<double>(A[row][k]) * B[k][column];
      c = static_cast<float>(sum);
    }
  }
}

template <typename Format>
void mma_16bit(void* const lanes[32], uint32_t) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        A[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = Format::value(static_cast<uint16_t>(mine.a[r] >> 16 * half));
      }
      for (int r = 0; r < 2; ++r) {
        B[2 * t + half + 8 * r][g] = Format::value(static_cast<uint16_t>(mine.b[r] >> 16 * half));
      }
    }
  }
  multiply(lanes, A, B);
}

inline void mma_tf32(void* const lanes[32], uint32_t) {
  const auto value = [](uint32_t bits) { return __uint_as_float(bits & 0xFFFFE000); };  // the low 13 bits are not read
  float A[16][8], B[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) A[g + 8 * (r % 2)][t + 4 * (r / 2)] = value(mine.a[r]);
    for (int r = 0; r < 2; ++r) B[t + 4 * r][g] = value(mine.b[r]);
  }
  multiply(lanes, A, B);
}

}  // namespace emulation

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTRNN_WHERE) {
  emulation::MmaLane lane{a, b, c};
  emulation::warp_collective("mma_bf16", ~0u, &lane, emulation::mma_16bit<emulation::Bf16>, false, where);
}
inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTRNN_WHERE) {
  emulation::MmaLane lane{a, b, c};
  emulation::warp_collective("mma_fp16", ~0u, &lane, emulation::mma_16bit<emulation::Fp16>, false, where);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTRNN_WHERE) {
  emulation::MmaLane lane{a, b, c};
  emulation::warp_collective("mma_tf32", ~0u, &lane, emulation::mma_tf32, false, where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

inline uint32_t to_tf32(float x) { return x != x ? 0x7FFFFFFF : (__float_as_uint(x) + 0x1000) & 0xFFFFE000; }

// ---------------------------------------------------------------------------------------------------------------------
// Launch: runs to its end before it returns.

namespace emulation {
struct LaunchPlace {  // a stream turns into the place of the launch that names it
  LaunchPlace(cudaStream_t, FASTRNN_WHERE) : where(where) {}
  Location where;
};
}  // namespace emulation

template <typename... Params>
Room room_for(void (* /*kernel*/)(Params...), unsigned threads, unsigned cluster) {
  emulation::GridLaunch grid;
  grid.block = {threads, 1, 1};
  grid.cluster = {cluster, 1, 1};
  grid.shared_bytes = emulation::config().device->shared_per_block;
  return {cudaSuccess, static_cast<int>(emulation::resident_blocks(grid))};
}

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config, emulation::LaunchPlace place,
                   typename NonDeduced<Params>::Type... arguments) {
  auto body = [&] { kernel(arguments...); };
  emulation::GridLaunch grid;
  grid.grid = {config.grid.x, config.grid.y, config.grid.z};
  grid.block = {config.block.x, config.block.y, config.block.z};
  grid.cluster = {config.cluster, 1, 1};
  grid.shared_bytes = config.shared_bytes;
  grid.cooperative = config.cooperative;
  grid.where = place.where;
  const auto call = [](void* body_of_thread) { (*static_cast<decltype(body)*>(body_of_thread))(); };
  switch (emulation::run_grid(grid, call, &body)) {
    case emulation::Outcome::kCompleted:
      return cudaSuccess;
    case emulation::Outcome::kNoRoom:
      return grid.cooperative ? cudaErrorCooperativeLaunchTooLarge : cudaErrorInvalidClusterSize;
    case emulation::Outcome::kRefused:
      return cudaErrorInvalidConfiguration;
    default:
      return cudaErrorLaunchFailure;
  }
}

inline const char* status_string(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulation::last_error().c_str();
}

inline DeviceAttributes current_device() {
  const emulation::DeviceLimits& device = *emulation::config().device;
  return {device.cluster_blocks > 1 ? 90 : 80, static_cast<int>(device.multiprocessors),
          static_cast<int>(device.shared_per_block), device.l2_bytes};
}

inline uint32_t* host_visible_word() { return new uint32_t(0); }

}  // namespace fastrnn
