// SPDX-License-Identifier: BSD-3-Clause
// What the kernels of the path "gates" share: their grid, and the controls of a step, row by row.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "device.cuh"
#include "vec.cuh"

namespace fastrnn {

// kThreads threads as units across, rows down.
struct RowTiling {
  static constexpr int kThreads = 128;
  static constexpr int64_t kMaxGridY = 65535;
  dim3 grid, block;

  RowTiling(int64_t rows, int64_t vectors) {
    unsigned across = 1;
    while (across < vectors && across < kThreads) across *= 2;
    const unsigned down = kThreads / across;
    block = dim3(across, down);
    grid = dim3(static_cast<unsigned>((vectors + across - 1) / across),
                static_cast<unsigned>(std::min((rows + down - 1) / down, kMaxGridY)));
  }
};

template <typename scalar_t>
__device__ __forceinline__ bool lives(const StepControls<scalar_t>& c, int64_t row) {
  return !c.lengths || c.t < c.lengths[row];
}
template <typename scalar_t>
__device__ __forceinline__ bool is_reset(const StepControls<scalar_t>& c, int64_t row) {
  return c.reset && c.reset[row];
}
// The share of state k that zoneout keeps; at: the first unit's place in [B, H].
template <int N, typename acc_t, typename scalar_t>
__device__ __forceinline__ void zone_share(const StepControls<scalar_t>& c, int k, int64_t at, acc_t (&share)[N]) {
  if (c.zone_is_one_value[k]) {
    for (int i = 0; i < N; ++i) share[i] = to_acc<acc_t>(c.zone[k][0]);
  } else {
    load(share, c.zone[k] + at);
  }
}
template <class C>
constexpr int kZones = C::kStates < kZonedStates ? C::kStates : kZonedStates;

}  // namespace fastrnn
