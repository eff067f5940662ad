// SPDX-License-Identifier: BSD-3-Clause
// The path "gates": what a step of a layer does besides its matrix product, in one kernel forward and one backward.
//
// Fused forward: both biased gate sums, every activation, the new states, rounding to storage, and what backward needs.
// Each value is read and written once. Per hidden unit, in bytes, with s = sizeof(scalar_t) and a = sizeof(acc_t):
//
//                 inference                 training, more            LSTM in half: inference, training
//   RNN           2s + s                    -
//   LSTM          8s + 2a + s               4s + a                    26, 38
//   GRU           6s + s + s                4s
//
// and backward an LSTM reads 4s saved gates, 2s of incoming gradient, 2a of c and 2a of carried gradient, and writes 4s
// and 2a: 44 bytes in half. No value is used twice, so there is nothing to keep in shared memory: the kernels run at
// the speed of memory where B*H is large and at the cost of a launch where it is small, which is the path's limit.
//
// A thread owns kUnits neighbouring units of one row, so that states move 16 bytes an instruction and 16-bit tensors 8,
// while a small step still spreads over many blocks. Where H or an address does not allow it, it owns one unit.
//
// States that a cell does not read cost nothing: the compiler drops their loads. h_prev and h_next are null where their
// width is not H, with a projection, which only cells that do not read them have.
#include <algorithm>

#include "../kernels.h"
#include "device.cuh"
#include "vec.cuh"

namespace fastrnn {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <typename acc_t>
constexpr int kUnits = 16 / sizeof(acc_t);
static_assert(kUnits<float> * sizeof(__half) == 8 && kUnits<double> * sizeof(double) == 16);

// kThreads threads as units across, rows down.
struct Tiling {
  dim3 grid, block;

  Tiling(int64_t rows, int64_t vectors) {
    unsigned across = 1;
    while (across < vectors && across < kThreads) across *= 2;
    const unsigned down = kThreads / across;
    block = dim3(across, down);
    grid = dim3(static_cast<unsigned>((vectors + across - 1) / across),
                static_cast<unsigned>(std::min((rows + down - 1) / down, kMaxGridY)));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

template <template <typename> class Cell, typename scalar_t, typename acc_t, int N>
__global__ void __launch_bounds__(kThreads) gates_forward_kernel(const GatesForward<scalar_t, acc_t> p) {
  using C = Cell<acc_t>;
  static_assert(C::kStates <= 2, "the states are h and c");
  const int64_t unit = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (unit >= p.H) return;
  const int64_t first_row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (int64_t row = first_row; row < p.B; row += int64_t{gridDim.y} * blockDim.y) {
    const int64_t state = row * p.H + unit;
    const int64_t gates = row * C::kGates * p.H + unit;
    Values<acc_t, C::kGates> gx[N], gh[N];
    Values<acc_t, C::kStates> prev[N] = {}, next[N];
    Values<acc_t, C::kSaved> saved[N];
    acc_t values[N];

#pragma unroll
    for (int k = 0; k < C::kGates; ++k) {
      load(values, p.x_gates + gates + k * p.H);
      for (int i = 0; i < N; ++i) gx[i][k] = values[i];
      load(values, p.h_gates + gates + k * p.H);
      for (int i = 0; i < N; ++i) gh[i][k] = values[i];
      if (p.b_hh) {
        load(values, p.b_hh + k * p.H + unit);
        for (int i = 0; i < N; ++i) gh[i][k] += values[i];
      }
    }
    if (p.h_prev) {
      load(values, p.h_prev + state);
      for (int i = 0; i < N; ++i) prev[i][0] = values[i];
    }
    if constexpr (C::kStates == 2) {
      load(values, p.c + state);
      for (int i = 0; i < N; ++i) prev[i][1] = values[i];
    }

#pragma unroll
    for (int i = 0; i < N; ++i) C::forward(gx[i], gh[i], prev[i], next[i], saved[i]);

    for (int i = 0; i < N; ++i) values[i] = next[i][0];
    store(p.h_next + state, values);
    if (p.saved_gates) {
#pragma unroll
      for (int k = 0; k < C::kSaved; ++k) {
        for (int i = 0; i < N; ++i) values[i] = saved[i][k];
        store(p.saved_gates + row * C::kSaved * p.H + k * p.H + unit, values);
      }
    }
    if constexpr (C::kStates == 2) {
      for (int i = 0; i < N; ++i) values[i] = next[i][1];
      store(p.c + state, values);
      if (p.saved_c) store(p.saved_c + state, values);
    }
  }
}

template <template <typename> class Cell, typename scalar_t, typename acc_t, int N>
__global__ void __launch_bounds__(kThreads) gates_backward_kernel(const GatesBackward<scalar_t, acc_t> p) {
  using C = Cell<acc_t>;
  static_assert(C::kStates <= 2, "the states are h and c");
  const int64_t unit = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (unit >= p.H) return;
  const int64_t first_row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (int64_t row = first_row; row < p.B; row += int64_t{gridDim.y} * blockDim.y) {
    const int64_t state = row * p.H + unit;
    const int64_t gates = row * C::kGates * p.H + unit;
    Values<acc_t, C::kSaved> saved[N];
    Values<acc_t, C::kStates> prev[N] = {}, next[N] = {}, d_next[N], d_prev[N];
    Values<acc_t, C::kGates> d_gx[N], d_gh[N];
    acc_t values[N];

#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) {
      load(values, p.saved_gates + row * C::kSaved * p.H + k * p.H + unit);
      for (int i = 0; i < N; ++i) saved[i][k] = values[i];
    }
    if (p.h_prev) {
      load(values, p.h_prev + state);
      for (int i = 0; i < N; ++i) prev[i][0] = values[i];
    }
    if (p.h_next) {
      load(values, p.h_next + state);
      for (int i = 0; i < N; ++i) next[i][0] = values[i];
    }
    load(values, p.d_h + state);
    for (int i = 0; i < N; ++i) d_next[i][0] = values[i];
    if (p.d_output) {
      load(values, p.d_output + state);
      for (int i = 0; i < N; ++i) d_next[i][0] += values[i];
    }
    if (p.d_h_product) {
      load(values, p.d_h_product + state);
      for (int i = 0; i < N; ++i) d_next[i][0] += values[i];
    }
    if constexpr (C::kStates == 2) {
      load(values, p.c_prev + state);
      for (int i = 0; i < N; ++i) prev[i][1] = values[i];
      load(values, p.c_next + state);
      for (int i = 0; i < N; ++i) next[i][1] = values[i];
      load(values, p.d_c + state);
      for (int i = 0; i < N; ++i) d_next[i][1] = values[i];
    }

#pragma unroll
    for (int i = 0; i < N; ++i) C::backward(saved[i], prev[i], next[i], d_next[i], d_prev[i], d_gx[i], d_gh[i]);

#pragma unroll
    for (int k = 0; k < C::kGates; ++k) {
      for (int i = 0; i < N; ++i) values[i] = d_gx[i][k];
      store(p.d_x_gates + gates + k * p.H, values);
      if constexpr (C::kGateGradsDiffer) {
        for (int i = 0; i < N; ++i) values[i] = d_gh[i][k];
        store(p.d_h_gates + gates + k * p.H, values);
      }
    }
    for (int i = 0; i < N; ++i) values[i] = d_prev[i][0];
    store(p.d_h + state, values);
    if constexpr (C::kStates == 2) {
      for (int i = 0; i < N; ++i) values[i] = d_prev[i][1];
      store(p.d_c + state, values);
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Launch

template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_gates_forward(const GatesForward<scalar_t, acc_t>& p, CudaStream stream) {
  if (p.B == 0 || p.H == 0) return cudaSuccess;
  constexpr int N = kUnits<acc_t>;
  const bool vectors =
      p.H % N == 0 && aligned_for<N>(p.x_gates, p.h_gates, p.b_hh, p.h_prev, p.c, p.h_next, p.saved_gates, p.saved_c);
  const Tiling tiling(p.B, vectors ? p.H / N : p.H);
  return launch(
      vectors ? gates_forward_kernel<Cell, scalar_t, acc_t, N> : gates_forward_kernel<Cell, scalar_t, acc_t, 1>,
      {tiling.grid, tiling.block}, static_cast<cudaStream_t>(stream), p);
}

template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_gates_backward(const GatesBackward<scalar_t, acc_t>& p, CudaStream stream) {
  if (p.B == 0 || p.H == 0) return cudaSuccess;
  constexpr int N = kUnits<acc_t>;
  const bool vectors = p.H % N == 0 && aligned_for<N>(p.saved_gates, p.h_prev, p.h_next, p.c_prev, p.c_next, p.d_output,
                                                      p.d_h_product, p.d_h, p.d_c, p.d_x_gates, p.d_h_gates);
  const Tiling tiling(p.B, vectors ? p.H / N : p.H);
  return launch(
      vectors ? gates_backward_kernel<Cell, scalar_t, acc_t, N> : gates_backward_kernel<Cell, scalar_t, acc_t, 1>,
      {tiling.grid, tiling.block}, static_cast<cudaStream_t>(stream), p);
}

const char* cuda_status_string(CudaStatus status) { return status_string(static_cast<cudaError_t>(status)); }

// ---------------------------------------------------------------------------------------------------------------------
// Instantiations: every cell in every storage type

#define FASTRNN_INSTANTIATE(Cell, scalar_t, acc_t)                                                                   \
  template CudaStatus launch_gates_forward<Cell, scalar_t, acc_t>(const GatesForward<scalar_t, acc_t>&, CudaStream); \
  template CudaStatus launch_gates_backward<Cell, scalar_t, acc_t>(const GatesBackward<scalar_t, acc_t>&, CudaStream);
#define FASTRNN_INSTANTIATE_CELL(name, Cell) \
  FASTRNN_INSTANTIATE(Cell, float, float)    \
  FASTRNN_INSTANTIATE(Cell, double, double)  \
  FASTRNN_INSTANTIATE(Cell, __half, float)   \
  FASTRNN_INSTANTIATE(Cell, __nv_bfloat16, float)
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE_CELL)

}  // namespace fastrnn
