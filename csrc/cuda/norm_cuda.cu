// SPDX-License-Identifier: BSD-3-Clause
// The path "gates" for cells that normalise: a step besides its matrix product, in one kernel forward and one backward.
//
// A block runs a row of the batch, because the statistics are sums over all units of it: its threads stride over the
// units and meet for two sums per group of gates, the mean and the variance of what was subtracted the mean from. What
// a thread needs again after such a sum it wrote itself, into scratch memory of the row, which stays in the cache.
#include <algorithm>
#include <cmath>

#include "gates.cuh"

namespace fastrnn {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocksTogether = 2;  // on a multiprocessor: a quarter of its threads; more would spill
constexpr int64_t kMostBlocks = 65535;

// Sums over the block. Every thread calls, and gets the sum.
template <typename acc_t>
struct BlockSum {
  acc_t* partial;  // [kWarps], shared

  __device__ __forceinline__ acc_t operator()(acc_t value) const {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    acc_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
    __syncthreads();
    return sum;
  }
  // Of f(j), j from 0 to count.
  template <typename F>
  __device__ __forceinline__ acc_t over(int64_t count, const F& f) const {
    acc_t sum = 0;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) sum += f(j);
    return (*this)(sum);
  }
  // Of a(j), j from 0 to count, of which one is `share`: in double a division is a call, and keeps values in memory.
  template <typename A>
  __device__ __forceinline__ Statistics<acc_t> statistics(int64_t count, acc_t share, const A& a) const {
    const acc_t mean = over(count, a) * share;
    const auto term = [&](int64_t j) { return Statistics<acc_t>::squared_deviation(a(j), mean); };
    return Statistics<acc_t>::of(mean, share * over(count, term));
  }
};

// The gradient of the row a, given by a(j), from d [count], that of gain LN(a) + bias; f(j, d_a) takes it. Adds those
// of gain and bias. share: 1 / count.
template <typename acc_t, typename scalar_t, typename A, typename F>
__device__ __forceinline__ void normalise_backward(const BlockSum<acc_t>& sum, int64_t count, acc_t share, const A& a,
                                                   const scalar_t* gain, const acc_t* d, acc_t* d_gain, acc_t* d_bias,
                                                   const F& f) {
  const Statistics<acc_t> s = sum.statistics(count, share, a);
  const auto d_normalised = [&](int64_t j) { return d[j] * to_acc<acc_t>(gain[j]); };
  const acc_t mean = share * sum.over(count, d_normalised);
  const acc_t mean_normalised =
      share * sum.over(count, [&](int64_t j) { return d_normalised(j) * s.normalised(a(j)); });
  for (int64_t j = threadIdx.x; j < count; j += kThreads) {
    const acc_t normalised = s.normalised(a(j)), d_y = d[j];
    d_gain[j] += d_y * normalised;
    d_bias[j] += d_y;
    f(j, s.gradient(normalised, d_normalised(j), mean, mean_normalised));
  }
}

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t zone_share(const StepControls<scalar_t>& c, int k, int64_t at) {
  acc_t share[1];
  zone_share(c, k, at, share);
  return share[0];
}

template <template <typename> class Cell, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    norm_forward_kernel(const GatesForward<scalar_t, acc_t> p) {
  using C = Cell<acc_t>;
  using Plain = typename C::Plain;
  FASTRNN_SHARED(acc_t, partial, [kWarps]);
  const BlockSum<acc_t> sum{partial};
  const int64_t H = p.H, gates = C::kGates * p.H;
  const scalar_t *gain_c = p.w_cell + 4 * gates, *bias_c = gain_c + H;
  const acc_t share = acc_t(1) / static_cast<acc_t>(H);  // of a unit

  for (int64_t row = blockIdx.x; row < p.B; row += gridDim.x) {
    const int64_t state = row * H;
    const scalar_t* const products[2] = {p.x_gates + row * gates, p.h_gates + row * gates};
    scalar_t* const saved_row = p.saved_gates ? p.saved_gates + row * C::kSaved * H : nullptr;
    if (!lives(p.controls, row)) {  // as in gates_forward_kernel
      for (int64_t j = threadIdx.x; j < H; j += kThreads) {
        p.h_next[state + j] = from_acc<scalar_t>(acc_t(0));
        if (p.cells) p.cells[state + j] = from_acc<scalar_t>(acc_t(0));
        if (C::kStates > 1 && p.saved_c) p.saved_c[state + j] = p.c[state + j];
      }
      continue;
    }
    const bool reset = is_reset(p.controls, row);
    const auto keep_h = [&](int64_t j, acc_t before, acc_t h) {
      if (p.controls.zone[0]) h = zoned(zone_share<acc_t>(p.controls, 0, state + j), before, h);
      p.h_next[state + j] = from_acc<scalar_t>(h);
      if (p.h_state) p.h_state[state + j] = from_acc<scalar_t>(h);
    };
    const auto h_before = [&](int64_t j) { return p.h_prev && !reset ? to_acc<acc_t>(p.h_prev[state + j]) : acc_t(0); };

    Statistics<acc_t> statistics[2][C::kGroups];
#pragma unroll
    for (int of = 0; of < 2; ++of) {
#pragma unroll
      for (int k = 0; k < C::kGroups; ++k) {
        const scalar_t* const first = products[of] + C::group_begin(k) * H;
        statistics[of][k] = sum.statistics((C::group_begin(k + 1) - C::group_begin(k)) * H, C::group_share(k) * share,
                                           [&](int64_t j) { return to_acc<acc_t>(first[j]); });
      }
    }
    acc_t* const o = p.scratch + row * C::kScratch * H;  // [H], then c as the cell made it [H]
    for (int64_t j = threadIdx.x; j < H; j += kThreads) {
      Values<acc_t, C::kGates> gx_gh[2];
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        const scalar_t* const gain = p.w_cell + of * 2 * gates;
        int group = 0;
#pragma unroll
        for (int g = 0; g < C::kGates; ++g) {
          if (g == C::group_begin(group + 1)) ++group;
          const int64_t at = g * H + j;
          const acc_t normalised = statistics[of][group].normalised(to_acc<acc_t>(products[of][at]));
          gx_gh[of][g] = to_acc<acc_t>(gain[at]) * normalised + to_acc<acc_t>(gain[gates + at]);
          if (saved_row) saved_row[(Plain::kSaved + of * C::kGates) * H + at] = products[of][at];
        }
      }
      Values<acc_t, C::kStates> prev, next;
      Values<acc_t, Plain::kSaved> saved;
      const Values<acc_t, Plain::kParameters> none{};
      prev[0] = h_before(j);
      if constexpr (C::kStates > 1) prev[1] = reset ? acc_t(0) : p.c[state + j];
      Plain::forward(gx_gh[0], gx_gh[1], none, prev, next, saved);
      if (saved_row) {
#pragma unroll
        for (int k = 0; k < Plain::kSaved; ++k) saved_row[k * H + j] = from_acc<scalar_t>(saved[k]);
      }
      if constexpr (C::kStates == 1) {
        keep_h(j, prev[0], next[0]);
      } else {
        o[j] = next[0];
        o[H + j] = next[1];
        if (p.controls.zone[1]) next[1] = zoned(zone_share<acc_t>(p.controls, 1, state + j), prev[1], next[1]);
        p.c[state + j] = next[1];
        if (p.saved_c) p.saved_c[state + j] = next[1];
        if (p.cells) p.cells[state + j] = from_acc<scalar_t>(next[1]);
      }
    }
    if constexpr (C::kStates > 1) {
      const Statistics<acc_t> s = sum.statistics(H, share, [&](int64_t j) { return o[H + j]; });
      for (int64_t j = threadIdx.x; j < H; j += kThreads) {
        const acc_t y = to_acc<acc_t>(gain_c[j]) * s.normalised(o[H + j]) + to_acc<acc_t>(bias_c[j]);
        keep_h(j, h_before(j), lstm_output(o[j], y));
      }
    }
  }
}

template <template <typename> class Cell, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    norm_backward_kernel(const GatesBackward<scalar_t, acc_t> p) {
  using C = Cell<acc_t>;
  using Plain = typename C::Plain;
  FASTRNN_SHARED(acc_t, partial, [kWarps]);
  const BlockSum<acc_t> sum{partial};
  const int64_t H = p.H, gates = C::kGates * p.H;
  const scalar_t *gain_c = p.w_cell + 4 * gates, *bias_c = gain_c + H;
  const acc_t share = acc_t(1) / static_cast<acc_t>(H);  // of a unit

  for (int64_t row = blockIdx.x; row < p.B; row += gridDim.x) {
    const int64_t state = row * H;
    scalar_t *const d_x_gates = p.d_x_gates + row * gates, *const d_h_gates = p.d_h_gates + row * gates;
    if (!lives(p.controls, row)) {  // the gradients of the states stay what they are
      for (int64_t j = threadIdx.x; j < gates; j += kThreads) {
        d_x_gates[j] = d_h_gates[j] = from_acc<scalar_t>(acc_t(0));
      }
      continue;
    }
    const bool reset = is_reset(p.controls, row);
    const scalar_t* const saved_row = p.saved_gates + row * C::kSaved * H;
    acc_t* const d_w = p.d_w_rows + row * C::kParameters * H;
    acc_t *d_gates = p.scratch + row * C::kScratch * H, *d_o = d_gates + 2 * gates, *d_c = d_o + H;

    const auto load_saved = [&](int64_t j, Values<acc_t, Plain::kSaved>& saved) {
#pragma unroll
      for (int k = 0; k < Plain::kSaved; ++k) saved[k] = to_acc<acc_t>(saved_row[k * H + j]);
    };
    const auto load_before = [&](int64_t j, Values<acc_t, C::kStates>& prev) {
      prev[0] = p.h_prev && !reset ? to_acc<acc_t>(p.h_prev[state + j]) : acc_t(0);
      if constexpr (C::kStates > 1) prev[1] = reset ? acc_t(0) : p.c_prev[state + j];
    };
    const auto hidden_gradient = [&](int64_t j) {
      acc_t d = p.d_h[state + j];
      if (p.d_output) d += to_acc<acc_t>(p.d_output[state + j]);
      if (p.d_h_product) d += to_acc<acc_t>(p.d_h_product[state + j]);
      return d;
    };

    if constexpr (C::kStates > 1) {
      const auto made_c = [&](int64_t j) {
        if (!p.controls.zone[1]) return p.c_next[state + j];
        Values<acc_t, Plain::kSaved> saved;
        Values<acc_t, C::kStates> prev;
        load_saved(j, saved);
        load_before(j, prev);
        return Plain::restore_c(saved, prev);
      };
      const Statistics<acc_t> s = sum.statistics(H, share, made_c);
      for (int64_t j = threadIdx.x; j < H; j += kThreads) {
        const acc_t y = to_acc<acc_t>(gain_c[j]) * s.normalised(made_c(j)) + to_acc<acc_t>(bias_c[j]);
        const acc_t kept = p.controls.zone[0] ? zone_share<acc_t>(p.controls, 0, state + j) : acc_t(0);
        const acc_t d = hidden_gradient(j);
        p.d_h[state + j] = p.controls.zone[0] ? kept * d : acc_t(0);
        lstm_output_gradient(to_acc<acc_t>(saved_row[3 * H + j]), y, (1 - kept) * d, d_o[j], d_c[j]);
      }
      acc_t* const d_gain_c = d_w + 4 * gates;
      normalise_backward(sum, H, share, made_c, gain_c, d_c, d_gain_c, d_gain_c + H,
                         [&](int64_t j, acc_t d) { d_c[j] = d; });
    }

    for (int64_t j = threadIdx.x; j < H; j += kThreads) {
      Values<acc_t, Plain::kSaved> saved;
      const Values<acc_t, Plain::kParameters> none{};
      Values<acc_t, C::kStates> prev, next{}, d_next, d_prev;
      Values<acc_t, C::kGates> d_gx, d_gh;
      load_saved(j, saved);
      load_before(j, prev);
      ZoneBackward<Plain, acc_t> zone{};
      if constexpr (C::kStates == 1) {
        next[0] = to_acc<acc_t>(p.h_next[state + j]);
        d_next[0] = hidden_gradient(j);
        if (p.controls.zone[0]) {
          zone.before_cell(0, zone_share<acc_t>(p.controls, 0, state + j), saved, prev, next, d_next);
        }
        Plain::backward(none, saved, prev, next, d_next, d_prev, d_gx, d_gh);
        p.d_h[state + j] = d_prev[0] + zone.kept[0];
      } else {
        d_next[0] = d_o[j];
        d_next[1] = p.d_c[state + j];
        if (p.d_cells) d_next[1] += to_acc<acc_t>(p.d_cells[state + j]);
        if (p.controls.zone[1]) {
          zone.before_cell(1, zone_share<acc_t>(p.controls, 1, state + j), saved, prev, next, d_next);
        }
        d_next[1] += d_c[j];
        Plain::backward(none, saved, prev, next, d_next, d_prev, d_gx, d_gh);
        p.d_c[state + j] = reset ? acc_t(0) : clipped(d_prev[1] + zone.kept[1], static_cast<acc_t>(p.grad_clip));
      }
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        d_gates[g * H + j] = d_gx[g];
        d_gates[gates + g * H + j] = d_gh[g];
      }
    }
    __syncthreads();  // a group's threads read what others wrote
    for (int of = 0; of < 2; ++of) {
      const scalar_t* const products = saved_row + Plain::kSaved * H + of * gates;
      scalar_t* const d_products = of == 0 ? d_x_gates : d_h_gates;
      for (int k = 0; k < C::kGroups; ++k) {
        const int64_t first = C::group_begin(k) * H, count = C::group_begin(k + 1) * H - first;
        acc_t* const d_gain = d_w + of * 2 * gates + first;
        normalise_backward(
            sum, count, C::group_share(k) * share, [&](int64_t j) { return to_acc<acc_t>(products[first + j]); },
            p.w_cell + of * 2 * gates + first, d_gates + of * gates + first, d_gain, d_gain + gates,
            [&](int64_t j, acc_t d) { d_products[first + j] = from_acc<scalar_t>(d); });
      }
    }
  }
}

LaunchConfig one_block_a_row(int64_t rows) {
  return {dim3(static_cast<unsigned>(std::min(rows, kMostBlocks))), dim3(kThreads)};
}

}  // namespace

template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_norm_forward(const GatesForward<scalar_t, acc_t>& p, CudaStream stream) {
  if (p.B == 0 || p.H == 0) return cudaSuccess;
  return launch(norm_forward_kernel<Cell, scalar_t, acc_t>, one_block_a_row(p.B), static_cast<cudaStream_t>(stream), p);
}

template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_norm_backward(const GatesBackward<scalar_t, acc_t>& p, CudaStream stream) {
  if (p.B == 0 || p.H == 0) return cudaSuccess;
  return launch(norm_backward_kernel<Cell, scalar_t, acc_t>, one_block_a_row(p.B), static_cast<cudaStream_t>(stream),
                p);
}

#define FASTRNN_INSTANTIATE(Cell, scalar_t, acc_t)                                                                  \
  template CudaStatus launch_norm_forward<Cell, scalar_t, acc_t>(const GatesForward<scalar_t, acc_t>&, CudaStream); \
  template CudaStatus launch_norm_backward<Cell, scalar_t, acc_t>(const GatesBackward<scalar_t, acc_t>&, CudaStream);
#define FASTRNN_INSTANTIATE_CELL(name, Cell) \
  FASTRNN_INSTANTIATE(Cell, float, float)    \
  FASTRNN_INSTANTIATE(Cell, double, double)  \
  FASTRNN_INSTANTIATE(Cell, __half, float)   \
  FASTRNN_INSTANTIATE(Cell, __nv_bfloat16, float)
FASTRNN_FOR_EACH_NORM_CELL(FASTRNN_INSTANTIATE_CELL)

}  // namespace fastrnn
