// SPDX-License-Identifier: BSD-3-Clause
// The seam of the CUDA path "persistent": one launch runs one layer in one direction over the whole sequence, or two of
// the same sizes that do not wait for each other: the two directions of a layer, or two layers of a stack, each at a
// chunk of its own. Letters, types and layouts are those of kernels.h; there is no projection, so P == H.
#pragma once

#include "cuda_plan.h"
#include "kernels.h"

namespace fastrnn {

// Where the steps live, as in Steps, on the device.
struct DeviceSteps {
  int64_t B;
  const int64_t* row_begin;  // [T + 1], or null: dense, T*B rows
};

template <typename scalar_t>
struct PersistentForward {
  DeviceSteps steps;
  int64_t H;
  PersistentTiling tiling;
  struct Layer {
    int64_t T;  // packed: the same for all
    bool reverse;
    // inputs
    const scalar_t* x_gates;  // [N, G*H]
    const scalar_t* w_hh;     // [G*H, H]
    const scalar_t* b_hh;     // [G*H] or null
    const scalar_t* h0;       // [B, H]
    const scalar_t* c0;       // [B, H]; null for cells without c
    // outputs
    scalar_t* output;       // [N, H]
    scalar_t* h_n;          // [B, H]
    scalar_t* c_n;          // [B, H]; null for cells without c
    scalar_t* saved_gates;  // [N, kSaved*H]; null in inference
    float* saved_c;         // [N, H]  c after each step; null in inference and for cells without c
  } layers[2];              // as many as tiling.layers
  // workspace
  void* exchange;    // [tiling.exchange_packets()] of 16 bytes, aligned to 16, zero; null below grade 3
  void* streamed;    // [tiling.streamed_packets()] of 16 bytes, aligned to 16; null where there are none
  uint32_t* failed;  // null, or set to 1 when a block waited in vain for another: what it missed is NaN
};

template <typename scalar_t>
struct PersistentBackward {
  DeviceSteps steps;
  int64_t H;
  PersistentTiling tiling;
  struct Layer {
    int64_t T;  // packed: the same for all
    bool reverse;
    // inputs
    const scalar_t* w_hh;         // [G*H, H]
    const scalar_t* h0;           // [B, H]
    const scalar_t* c0;           // [B, H]; null for cells without c
    const scalar_t* output;       // [N, H]
    const scalar_t* saved_gates;  // [N, kSaved*H]
    const float* saved_c;         // [N, H]; null for cells without c
    const scalar_t* d_output;     // [N, H] or null: zero
    const scalar_t* d_h_n;        // [B, H] or null: zero
    const scalar_t* d_c_n;        // [B, H] or null: zero
    // outputs
    scalar_t* d_x_gates;  // [N, G*H]
    scalar_t* d_h_gates;  // [N, G*H]; aliases d_x_gates unless Cell::kGateGradsDiffer
    scalar_t* d_h0;       // [B, H]
    scalar_t* d_c0;       // [B, H]; null for cells without c
  } layers[2];
  // workspace, as forward
  void* exchange;
  void* streamed;
  uint32_t* failed;
};

#if defined(FASTRNN_WITH_CUDA) || defined(FASTRNN_EMULATE)
template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_forward(const PersistentForward<scalar_t>&, Arithmetic, CudaStream);
template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_backward(const PersistentBackward<scalar_t>&, Arithmetic, CudaStream);

// Copies `count` host values to the device without waiting for it, also while a graph is captured.
CudaStatus launch_write(const int64_t* values, int64_t count, int64_t* to, CudaStream);

// The current device.
CudaDevice cuda_device();
// Whether a launch came to nothing because the device has no room for its blocks: what fits is less than the plan knows
// where other processes or a partition of the device take their share.
bool launch_refused(CudaStatus);
// A word that kernels and the host both see, zero until a persistent kernel fails; null where there is none.
uint32_t* failure_word();
#endif

}  // namespace fastrnn
