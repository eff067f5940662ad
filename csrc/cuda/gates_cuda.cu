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
#include "gates.cuh"

namespace fastrnn {
namespace {

constexpr int kThreads = RowTiling::kThreads;

// Cells of more than two states own half as many units: their values would take too many registers.
template <template <typename> class Cell, typename acc_t>
constexpr int kUnits = 16 / sizeof(acc_t) / (Cell<acc_t>::kStates > 2 ? 2 : 1);
static_assert(kUnits<LstmCell, float> * sizeof(__half) == 8 && kUnits<LstmCell, double> * sizeof(double) == 16);

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

template <template <typename> class Cell, typename scalar_t, typename acc_t, int N, bool kControlled>
__global__ void __launch_bounds__(kThreads) gates_forward_kernel(const GatesForward<scalar_t, acc_t> p) {
  using C = Cell<acc_t>;
  const int64_t unit = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (unit >= p.H) return;
  const int64_t first_row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (int64_t row = first_row; row < p.B; row += int64_t{gridDim.y} * blockDim.y) {
    const int64_t state = row * p.H + unit;
    const int64_t gates = row * C::kGates * p.H + unit;
    Values<acc_t, C::kGates> gx[N], gh[N];
    Values<acc_t, C::kStates> prev[N] = {}, next[N];
    Values<acc_t, C::kParameters> w[N];
    Values<acc_t, C::kSaved> saved[N];
    acc_t values[N];

    if (kControlled &&
        !lives(p.controls, row)) {  // what is saved of c stays what is carried, so that a step finds it before itself
      for (int i = 0; i < N; ++i) values[i] = 0;
      store(p.h_next + state, values);
      if (p.cells) store(p.cells + state, values);
#pragma unroll
      for (int k = 1; k < C::kStates; ++k) {
        load(values, p.c + (k - 1) * p.c_stride + state);
        if (p.saved_c) store(p.saved_c + (k - 1) * p.saved_c_stride + state, values);
      }
      continue;
    }

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
#pragma unroll
    for (int k = 0; k < C::kParameters; ++k) {
      load(values, p.w_cell + k * p.H + unit);
      for (int i = 0; i < N; ++i) w[i][k] = values[i];
    }
    if (!(kControlled && is_reset(p.controls, row))) {
      if (p.h_prev) {
        load(values, p.h_prev + state);
        for (int i = 0; i < N; ++i) prev[i][0] = values[i];
      }
#pragma unroll
      for (int k = 1; k < C::kStates; ++k) {
        load(values, p.c + (k - 1) * p.c_stride + state);
        for (int i = 0; i < N; ++i) prev[i][k] = values[i];
      }
    }

#pragma unroll
    for (int i = 0; i < N; ++i) C::forward(gx[i], gh[i], w[i], prev[i], next[i], saved[i]);
    if constexpr (kControlled) {
#pragma unroll
      for (int k = 0; k < kZones<C>; ++k) {
        if (!p.controls.zone[k]) continue;
        zone_share(p.controls, k, state, values);
        for (int i = 0; i < N; ++i) next[i][k] = zoned(values[i], prev[i][k], next[i][k]);
      }
    }

    for (int i = 0; i < N; ++i) values[i] = next[i][0];
    store(p.h_next + state, values);
    if (p.h_state) store(p.h_state + state, values);
    if (p.saved_gates) {
#pragma unroll
      for (int k = 0; k < C::kSaved; ++k) {
        for (int i = 0; i < N; ++i) values[i] = saved[i][k];
        store(p.saved_gates + row * C::kSaved * p.H + k * p.H + unit, values);
      }
    }
#pragma unroll
    for (int k = 1; k < C::kStates; ++k) {
      for (int i = 0; i < N; ++i) values[i] = next[i][k];
      store(p.c + (k - 1) * p.c_stride + state, values);
      if (p.saved_c) store(p.saved_c + (k - 1) * p.saved_c_stride + state, values);
      if (kControlled && k == 1 && p.cells) store(p.cells + state, values);
    }
  }
}

template <template <typename> class Cell, typename scalar_t, typename acc_t, int N, bool kControlled>
__global__ void __launch_bounds__(kThreads) gates_backward_kernel(const GatesBackward<scalar_t, acc_t> p) {
  using C = Cell<acc_t>;
  const acc_t grad_clip = static_cast<acc_t>(p.grad_clip);
  const int64_t unit = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (unit >= p.H) return;
  const int64_t first_row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (int64_t row = first_row; row < p.B; row += int64_t{gridDim.y} * blockDim.y) {
    const int64_t state = row * p.H + unit;
    const int64_t gates = row * C::kGates * p.H + unit;
    Values<acc_t, C::kSaved> saved[N];
    Values<acc_t, C::kParameters> w[N];
    Values<acc_t, C::kStates> prev[N] = {}, next[N] = {}, d_next[N], d_prev[N];
    Values<acc_t, C::kGates> d_gx[N], d_gh[N];
    acc_t values[N];

    if (kControlled && !lives(p.controls, row)) {  // the gradients of the states stay what they are
      for (int i = 0; i < N; ++i) values[i] = 0;
#pragma unroll
      for (int k = 0; k < C::kGates; ++k) {
        store(p.d_x_gates + gates + k * p.H, values);
        if constexpr (C::kGateGradsDiffer) store(p.d_h_gates + gates + k * p.H, values);
      }
#pragma unroll
      for (int k = 0; k < C::kParameters; ++k) store(p.d_w_rows + (row * C::kParameters + k) * p.H + unit, values);
      continue;
    }
    const bool reset = kControlled && is_reset(p.controls, row);

#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) {
      load(values, p.saved_gates + row * C::kSaved * p.H + k * p.H + unit);
      for (int i = 0; i < N; ++i) saved[i][k] = values[i];
    }
#pragma unroll
    for (int k = 0; k < C::kParameters; ++k) {
      load(values, p.w_cell + k * p.H + unit);
      for (int i = 0; i < N; ++i) w[i][k] = values[i];
    }
    if (p.h_prev && !reset) {
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
#pragma unroll
    for (int k = 1; k < C::kStates; ++k) {
      if (!reset) {
        load(values, p.c_prev + (k - 1) * p.c_prev_stride + state);
        for (int i = 0; i < N; ++i) prev[i][k] = values[i];
      }
      load(values, p.c_next + (k - 1) * p.c_next_stride + state);
      for (int i = 0; i < N; ++i) next[i][k] = values[i];
      load(values, p.d_c + (k - 1) * p.d_c_stride + state);
      for (int i = 0; i < N; ++i) d_next[i][k] = values[i];
      if (kControlled && k == 1 && p.d_cells) {
        load(values, p.d_cells + state);
        for (int i = 0; i < N; ++i) d_next[i][k] += values[i];
      }
    }
    ZoneBackward<C, acc_t, scalar_t> zone[N] = {};
    if constexpr (kControlled) {
#pragma unroll
      for (int k = 0; k < kZones<C>; ++k) {
        if (!p.controls.zone[k]) continue;
        zone_share(p.controls, k, state, values);
        for (int i = 0; i < N; ++i) zone[i].before_cell(k, values[i], saved[i], prev[i], next[i], d_next[i]);
      }
    }

#pragma unroll
    for (int i = 0; i < N; ++i) C::backward(w[i], saved[i], prev[i], next[i], d_next[i], d_prev[i], d_gx[i], d_gh[i]);
    if constexpr (kControlled) {
#pragma unroll
      for (int k = 0; k < kZones<C>; ++k) {
        for (int i = 0; i < N; ++i) d_prev[i][k] += zone[i].kept[k];
      }
    }

#pragma unroll
    for (int k = 0; k < C::kGates; ++k) {
      for (int i = 0; i < N; ++i) values[i] = d_gx[i][k];
      store(p.d_x_gates + gates + k * p.H, values);
      if constexpr (C::kGateGradsDiffer) {
        for (int i = 0; i < N; ++i) values[i] = d_gh[i][k];
        store(p.d_h_gates + gates + k * p.H, values);
      }
    }
    if constexpr (C::kParameters > 0) {
#pragma unroll
      for (int k = 0; k < C::kParameters; ++k) {
        for (int i = 0; i < N; ++i) {
          values[i] = d_gx[i][C::parameter_gate(k)] * (C::parameter_sees_next(k) ? next[i][1] : prev[i][1]);
        }
        store(p.d_w_rows + (row * C::kParameters + k) * p.H + unit, values);
      }
    }
    for (int i = 0; i < N; ++i) values[i] = d_prev[i][0];
    store(p.d_h + state, values);
#pragma unroll
    for (int k = 1; k < C::kStates; ++k) {
      for (int i = 0; i < N; ++i)
        values[i] = reset ? acc_t(0) : kControlled ? clipped(d_prev[i][k], grad_clip) : d_prev[i][k];
      store(p.d_c + (k - 1) * p.d_c_stride + state, values);
    }
  }
}

// The updates of h, of one value each: at is its place in [rows, width].
template <typename scalar_t>
using AccOfStorage = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
__device__ __forceinline__ void update_h(const ProductInput<scalar_t>& p, int64_t row, int64_t at) {
  using acc_t = AccOfStorage<scalar_t>;
  acc_t value = p.reset && p.reset[row] ? acc_t(0) : to_acc<acc_t>(p.from[at]);
  if (p.mask) value *= to_acc<acc_t>(p.mask[at]);
  p.to[at] = from_acc<scalar_t>(value);
}
template <typename scalar_t>
__device__ __forceinline__ void update_h(const KeepLiving<scalar_t>& p, int64_t row, int64_t at) {
  if (!p.lengths || p.t < p.lengths[row]) p.state[at] = p.from[at];
}
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void update_h(const ThroughStep<scalar_t, acc_t>& p, int64_t row, int64_t at) {
  if (p.lengths && p.t >= p.lengths[row]) return;
  const acc_t product = to_acc<acc_t>(p.product[at]);
  const acc_t masked = p.mask ? product * to_acc<acc_t>(p.mask[at]) : product;
  p.d_h[at] = p.reset && p.reset[row] ? acc_t(0) : clipped(masked + p.d_h[at], static_cast<acc_t>(p.grad_clip));
}
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void update_h(const TakeProjected<scalar_t, acc_t>& p, int64_t row, int64_t at) {
  const bool living = !p.lengths || p.t < p.lengths[row];
  const acc_t d_output = p.d_output ? to_acc<acc_t>(p.d_output[at]) : acc_t(0);
  p.d_projected[at] = from_acc<scalar_t>(living ? p.d_h[at] + d_output : acc_t(0));
  if (living) p.d_h[at] = 0;
}

template <typename scalar_t>
__device__ __forceinline__ void update_h(const RealRows<scalar_t>& p, int64_t row, int64_t at) {
  const bool living = row / p.B < p.lengths[row % p.B];
  p.to[at] = living ? p.from[at] : from_acc<scalar_t>(AccOfStorage<scalar_t>(0));
}

// The steps of a cell that resets before, of one unit each.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void update_h(const ResetForward<scalar_t, acc_t>& p, int64_t row, int64_t at) {
  using C = GruBeforeCell<acc_t>;
  const int64_t unit = at - row * p.H, gates = 3 * row * p.H + unit;
  Values<acc_t, C::kGates> gx, gh;
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) {
    gx[g] = to_acc<acc_t>(p.x_gates[gates + g * p.H]);
    gh[g] = to_acc<acc_t>(p.h_gates[(row * C::kGates + g) * p.H + unit]);
  }
  const Values<acc_t, C::kParameters> none{};
  const Values<acc_t, C::kStates> prev = {to_acc<acc_t>(p.h_in[at])};
  Values<acc_t, C::kStates> next{};
  Values<acc_t, C::kSaved> saved{};  // zero where the row is dead: the product again, of all rows, is to have no NaN
  if (lives(p.controls, row)) C::forward(gx, gh, none, prev, next, saved);
  p.z[at] = saved[1];
  p.m[at] = from_acc<scalar_t>(next[0]);
  if (!p.saved_gates) return;
  p.saved_gates[gates] = from_acc<scalar_t>(saved[0]);
  p.saved_gates[gates + p.H] = from_acc<scalar_t>(saved[1]);
}
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void update_h(const ResetFinish<scalar_t, acc_t>& p, int64_t row, int64_t at) {
  const int64_t n_gate = (3 * row + 2) * p.H + at - row * p.H;
  if (!lives(p.controls, row)) {
    p.h_next[at] = from_acc<scalar_t>(acc_t(0));
    return;
  }
  const acc_t before = is_reset(p.controls, row) ? acc_t(0) : to_acc<acc_t>(p.h_prev[at]);
  const acc_t gates_n = to_acc<acc_t>(p.x_gates[n_gate]) + to_acc<acc_t>(p.product[at]);
  acc_t n, share[1];
  acc_t h = GruBeforeCell<acc_t>::finish(gates_n, p.z[at], before, n);
  if (p.controls.zone[0]) {
    zone_share(p.controls, 0, at, share);
    h = zoned(share[0], before, h);
  }
  if (p.saved_gates) p.saved_gates[n_gate] = from_acc<scalar_t>(n);
  p.h_next[at] = p.h_state[at] = from_acc<scalar_t>(h);
}
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void update_h(const ResetFinishBackward<scalar_t, acc_t>& p, int64_t row, int64_t at) {
  using C = GruBeforeCell<acc_t>;
  const int64_t unit = at - row * p.H, gates = 3 * row * p.H + unit;
  acc_t d_gates_z = 0, d_gates_n = 0;
  if (lives(p.controls, row)) {
    Values<acc_t, C::kSaved> saved;
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) saved[k] = to_acc<acc_t>(p.saved_gates[gates + k * p.H]);
    acc_t d_next = p.d_h[at], d_prev, kept = 0, share[1];
    if (p.d_output) d_next += to_acc<acc_t>(p.d_output[at]);
    if (p.controls.zone[0]) {
      zone_share(p.controls, 0, at, share);
      kept = share[0] * d_next;
      d_next = (1 - share[0]) * d_next;
    }
    const acc_t before = is_reset(p.controls, row) ? acc_t(0) : to_acc<acc_t>(p.h_prev[at]);
    C::finish_backward(saved, before, d_next, d_prev, d_gates_z, d_gates_n);
    p.d_h[at] = d_prev + kept;
  }
  p.d_projected[at] = p.d_x_gates[gates + 2 * p.H] = from_acc<scalar_t>(d_gates_n);
  p.d_h_gates[(2 * row + 1) * p.H + unit] = p.d_x_gates[gates + p.H] = from_acc<scalar_t>(d_gates_z);
}
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void update_h(const ResetBackward<scalar_t, acc_t>& p, int64_t row, int64_t at) {
  using C = GruBeforeCell<acc_t>;
  const int64_t unit = at - row * p.H, gates = 3 * row * p.H + unit;
  acc_t d_gates_r = 0;
  if (lives(p.controls, row)) {
    const acc_t mask = p.h_mask ? to_acc<acc_t>(p.h_mask[at]) : acc_t(1);
    const acc_t before = is_reset(p.controls, row) ? acc_t(0) : to_acc<acc_t>(p.h_prev[at]);
    const Values<acc_t, C::kSaved> saved = {to_acc<acc_t>(p.saved_gates[gates])};
    const Values<acc_t, C::kStates> prev = {before * mask}, d_next = {to_acc<acc_t>(p.d_m[at])};
    Values<acc_t, C::kStates> d_prev;
    C::backward(saved, prev, d_next, d_prev, d_gates_r);
    p.d_h[at] += d_prev[0] * mask;
  }
  p.d_h_gates[2 * row * p.H + unit] = p.d_x_gates[gates] = from_acc<scalar_t>(d_gates_r);
}
template <typename scalar_t>
__device__ __forceinline__ void update_h(const ResetProduct<scalar_t>& p, int64_t row, int64_t at) {
  using acc_t = AccOfStorage<scalar_t>;
  const acc_t r = to_acc<acc_t>(p.saved_gates[2 * row * p.H + at]);
  p.m[at] = from_acc<scalar_t>(r * to_acc<acc_t>(p.h_in[at]));
}

template <class Update>
__global__ void __launch_bounds__(kThreads) update_h_kernel(int64_t rows, int64_t width, const Update update) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < rows * width; at += stride) {
    update_h(update, at / width, at);
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Launch

// Steps that the controls touch run one unit a thread: in the other kernels nothing of them is left.
template <typename scalar_t>
bool touches(const StepControls<scalar_t>& c) {
  return c.lengths || c.reset || c.zone[0] || c.zone[1];
}

template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_gates_forward(const GatesForward<scalar_t, acc_t>& p, CudaStream stream) {
  if (p.B == 0 || p.H == 0) return cudaSuccess;
  constexpr int N = kUnits<Cell, acc_t>;
  const bool controlled = touches(p.controls) || p.cells;
  const bool vectors = !controlled && p.H % N == 0 &&
                       aligned_for<N>(p.x_gates, p.h_gates, p.b_hh, p.w_cell, p.h_prev, p.c, p.h_next, p.h_state,
                                      p.saved_gates, p.saved_c);
  const RowTiling tiling(p.B, vectors ? p.H / N : p.H);
  return launch(controlled ? gates_forward_kernel<Cell, scalar_t, acc_t, 1, true>
                : vectors  ? gates_forward_kernel<Cell, scalar_t, acc_t, N, false>
                           : gates_forward_kernel<Cell, scalar_t, acc_t, 1, false>,
                {tiling.grid, tiling.block}, static_cast<cudaStream_t>(stream), p);
}

template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_gates_backward(const GatesBackward<scalar_t, acc_t>& p, CudaStream stream) {
  if (p.B == 0 || p.H == 0) return cudaSuccess;
  constexpr int N = kUnits<Cell, acc_t>;
  const bool controlled = touches(p.controls) || p.d_cells || p.grad_clip != 0;
  const bool vectors = !controlled && p.H % N == 0 &&
                       aligned_for<N>(p.w_cell, p.saved_gates, p.h_prev, p.h_next, p.c_prev, p.c_next, p.d_output,
                                      p.d_h_product, p.d_h, p.d_c, p.d_x_gates, p.d_h_gates, p.d_w_rows);
  const RowTiling tiling(p.B, vectors ? p.H / N : p.H);
  return launch(controlled ? gates_backward_kernel<Cell, scalar_t, acc_t, 1, true>
                : vectors  ? gates_backward_kernel<Cell, scalar_t, acc_t, N, false>
                           : gates_backward_kernel<Cell, scalar_t, acc_t, 1, false>,
                {tiling.grid, tiling.block}, static_cast<cudaStream_t>(stream), p);
}

template <class Update>
CudaStatus launch_update_h(int64_t rows, int64_t width, const Update& update, CudaStream stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  constexpr int64_t kMostBlocks = 4096;
  const int64_t blocks = std::min((rows * width + kThreads - 1) / kThreads, kMostBlocks);
  return launch(update_h_kernel<Update>, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
                static_cast<cudaStream_t>(stream), rows, width, update);
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
FASTRNN_FOR_EACH_UNIT_CELL(FASTRNN_INSTANTIATE_CELL)

#define FASTRNN_INSTANTIATE_UPDATE(...) \
  template CudaStatus launch_update_h(int64_t, int64_t, const __VA_ARGS__&, CudaStream);
#define FASTRNN_INSTANTIATE_UPDATES(scalar_t, acc_t)               \
  FASTRNN_INSTANTIATE_UPDATE(ProductInput<scalar_t>)               \
  FASTRNN_INSTANTIATE_UPDATE(KeepLiving<scalar_t>)                 \
  FASTRNN_INSTANTIATE_UPDATE(RealRows<scalar_t>)                   \
  FASTRNN_INSTANTIATE_UPDATE(ThroughStep<scalar_t, acc_t>)         \
  FASTRNN_INSTANTIATE_UPDATE(TakeProjected<scalar_t, acc_t>)       \
  FASTRNN_INSTANTIATE_UPDATE(ResetForward<scalar_t, acc_t>)        \
  FASTRNN_INSTANTIATE_UPDATE(ResetFinish<scalar_t, acc_t>)         \
  FASTRNN_INSTANTIATE_UPDATE(ResetFinishBackward<scalar_t, acc_t>) \
  FASTRNN_INSTANTIATE_UPDATE(ResetBackward<scalar_t, acc_t>)       \
  FASTRNN_INSTANTIATE_UPDATE(ResetProduct<scalar_t>)
FASTRNN_INSTANTIATE_UPDATES(float, float)
FASTRNN_INSTANTIATE_UPDATES(double, double)
FASTRNN_INSTANTIATE_UPDATES(__half, float)
FASTRNN_INSTANTIATE_UPDATES(__nv_bfloat16, float)

}  // namespace fastrnn
