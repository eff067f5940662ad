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
inline void named_barrier_arrive(unsigned id, unsigned threads, FASTRNN_WHERE) {
  emulation::named_barrier(id, threads, false, where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters

inline void cluster_arrive(FASTRNN_WHERE) { emulation::cluster_arrive(where); }
inline void cluster_wait(FASTRNN_WHERE) { emulation::cluster_wait(where); }
inline unsigned cluster_rank() { return emulation::cluster_rank(); }
template <typename T>
T* map_shared_rank(T* pointer, unsigned rank, FASTRNN_WHERE) {
  return static_cast<T*>(emulation::map_shared_rank(pointer, rank, where));
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory order

namespace emulation {
inline uint32_t ld_acquire(const uint32_t* flag, Scope scope, Location where) {
  poll(where);
  const uint32_t value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
  check_acquire(flag, scope, where);
  return value;
}
inline void st_release(uint32_t* flag, uint32_t value, Scope scope) {
  note_release(flag, scope);
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
inline void red_add_release(uint32_t* flag, uint32_t value, Scope scope) {
  note_release(flag, scope);
  __atomic_fetch_add(flag, value, __ATOMIC_RELEASE);
}
}  // namespace emulation

inline uint32_t ld_acquire_gpu(const uint32_t* flag, FASTRNN_WHERE) {
  return emulation::ld_acquire(flag, emulation::Scope::kGpu, where);
}
inline void st_release_gpu(uint32_t* flag, uint32_t value) {
  emulation::st_release(flag, value, emulation::Scope::kGpu);
}
inline void red_add_release_gpu(uint32_t* flag, uint32_t value) {
  emulation::red_add_release(flag, value, emulation::Scope::kGpu);
}
inline uint32_t ld_acquire_cluster(const uint32_t* flag, FASTRNN_WHERE) {
  return emulation::ld_acquire(flag, emulation::Scope::kCluster, where);
}
inline void st_release_cluster(uint32_t* flag, uint32_t value) {
  emulation::st_release(flag, value, emulation::Scope::kCluster);
}
inline void red_add_release_cluster(uint32_t* flag, uint32_t value) {
  emulation::red_add_release(flag, value, emulation::Scope::kCluster);
}

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
// mbarrier. Its word in shared memory is written at initialisation and read at each use, so that a use which no barrier
// orders after the initialisation is a race.

namespace emulation {
inline void touch(const Mbarrier* barrier) { static_cast<void>(*static_cast<const volatile Mbarrier*>(barrier)); }
}  // namespace emulation

inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals, FASTRNN_WHERE) {
  emulation::mbarrier_init(barrier, arrivals, where);
  *barrier = arrivals;
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(Mbarrier* barrier, FASTRNN_WHERE) {
  emulation::touch(barrier);
  emulation::mbarrier_arrive(barrier, 0, false, where);
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes, FASTRNN_WHERE) {
  emulation::touch(barrier);
  emulation::mbarrier_arrive(barrier, bytes, false, where);
}
inline void mbarrier_arrive_cluster(Mbarrier* barrier, FASTRNN_WHERE) {
  emulation::touch(barrier);
  emulation::mbarrier_arrive(barrier, 0, true, where);
}
inline void mbarrier_wait(Mbarrier* barrier, unsigned parity, FASTRNN_WHERE) {
  emulation::touch(barrier);
  emulation::mbarrier_wait(barrier, parity, false, where);
}
inline void mbarrier_wait_cluster(Mbarrier* barrier, unsigned parity, FASTRNN_WHERE) {
  emulation::touch(barrier);
  emulation::mbarrier_wait(barrier, parity, true, where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

inline void cp_async_16(void* shared, const void* global, unsigned valid = 16, FASTRNN_WHERE) {
  emulation::cp_async(shared, global, 16, valid, where);
}
inline void cp_async_4(void* shared, const void* global, unsigned valid = 4, FASTRNN_WHERE) {
  emulation::cp_async(shared, global, 4, valid, where);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}

inline void bulk_copy_to_shared(void* shared, const void* global, unsigned bytes, Mbarrier* barrier, FASTRNN_WHERE) {
  emulation::require_shared(shared, "bulk_copy_to_shared", where);
  emulation::bulk_copy(shared, global, nullptr, bytes, barrier, where);
}
inline void bulk_copy_to_cluster(void* target, const void* shared, unsigned bytes, Mbarrier* barrier, FASTRNN_WHERE) {
  emulation::require_shared(shared, "bulk_copy_to_cluster", where);
  emulation::bulk_copy(target, shared, nullptr, bytes, barrier, where);
}
inline void st_async(uint32_t* target, uint32_t value, Mbarrier* barrier, FASTRNN_WHERE) {
  emulation::bulk_copy(target, nullptr, &value, sizeof value, barrier, where);
}
inline void st_async(uint4* target, uint4 value, Mbarrier* barrier, FASTRNN_WHERE) {
  emulation::bulk_copy(target, nullptr, &value, sizeof value, barrier, where);
}
inline void fence_proxy_async() { emulation::fence_proxy_async(); }

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

namespace emulation {

// A lane reads its row itself; r[m] of lane l then comes from the lane that read that row of matrix m.
template <int kMatrices, bool kTransposed>
void ldmatrix(uint32_t (&r)[kMatrices], const void* row, const char* name, Location where) {
  struct Rows {
    uint16_t row[8];
    uint32_t* out;
  } mine{{}, r};
  if (lane_id() < 8 * kMatrices) {
    require_alignment(row, 16, name, where);
    require_shared(row, name, where);
    for (int i = 0; i < 8; ++i) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  }
  const auto combine = [](void* const lanes[32], uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < kMatrices; ++m) {
        const auto element = [&](int i, int j) -> uint32_t { return static_cast<Rows*>(lanes[8 * m + i])->row[j]; };
        static_cast<Rows*>(lanes[lane])->out[m] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                                              : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
    }
  };
  warp_collective(name, ~0u, &mine, combine, false, where);
}

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

struct MmaFp64Lane {
  double a, b;
  double* c;
};
inline void mma_fp64(void* const lanes[32], uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4, column = lane % 4 * 2 + i;
      double& c = static_cast<MmaFp64Lane*>(lanes[lane])->c[i];
      for (int k = 0; k < 4; ++k) {
        c = std::fma(static_cast<MmaFp64Lane*>(lanes[row * 4 + k])->a,
                     static_cast<MmaFp64Lane*>(lanes[column * 4 + k])->b, c);
      }
    }
  }
}

}  // namespace emulation

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, FASTRNN_WHERE) {
  emulation::ldmatrix<4, false>(r, row, "ldmatrix_x4", where);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, FASTRNN_WHERE) {
  emulation::ldmatrix<4, true>(r, row, "ldmatrix_x4_transposed", where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, FASTRNN_WHERE) {
  emulation::ldmatrix<2, false>(r, row, "ldmatrix_x2", where);
}
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
inline void mma_fp64(double (&c)[2], double a, double b, FASTRNN_WHERE) {
  emulation::MmaFp64Lane lane{a, b, c};
  emulation::warp_collective("mma_fp64", ~0u, &lane, emulation::mma_fp64, false, where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

inline uint32_t to_tf32(float x) { return x != x ? 0x7FFFFFFF : (__float_as_uint(x) + 0x1000) & 0xFFFFE000; }
// Errs by nearly as much as the device may: the result is cut to 12 bits of mantissa.
inline float tanh_approximate(float x) { return __uint_as_float(__float_as_uint(std::tanh(x)) & 0xFFFFF000); }

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
