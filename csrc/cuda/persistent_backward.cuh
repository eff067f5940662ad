// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of the path "persistent". A round is a step, from the last to the first, and one more for the
// gradient of h0; what is exchanged are the gradients of the gates, in storage precision, a packet for each gate of a
// packet of units; a block multiplies them with the columns of W_hh that belong to its hidden units:
//
//   d_h (before the step) = d_prev of the cell + d_h_gates W_hh
//
// A row of the batch that does not take a step adds nothing: it publishes zeros and its gradients wait. The gradients
// of the states of a block's own units stay in float. Saved tensors are read only.
#pragma once

#include "persistent.cuh"

namespace fastrnn {

template <template <typename> class Cell, class Products>
struct BackwardPass : PassBase<PersistentBackward<typename Products::scalar_t>, Products::kSlots> {
  using C = Cell<float>;
  using scalar_t = typename Products::scalar_t;
  using Params = PersistentBackward<scalar_t>;
  using Base = PassBase<Params, Products::kSlots>;
  using Base::p, Base::own, Base::tiling, Base::place, Base::state, Base::item;
  static constexpr Pass kPass = Pass::backward;
  static constexpr int kVectors = C::kGates;

  // Of the step under way, for the values that this thread owns.
  struct Loaded {
    Values<scalar_t, C::kSaved> gates;
    scalar_t h_prev, h_next, d_output;
    float c_prev, c_next;
  };
  Loaded loaded[kItems];
  Values<scalar_t, C::kGates> d_x_gates[kItems], d_h_gates[kItems];

  __device__ __forceinline__ int64_t rounds() const { return own.T + 1; }

  __device__ BackwardPass(const Params& p, const Place& place, float* states, float* /*biases*/)
      : Base(p, place, states) {
    this->for_own_items([&](int tile, int i, const Item& item) {
      const int64_t at = item.row * p.H + item.unit;
      state(0, tile, i) = item.exists && own.d_h_n ? to_acc<float>(own.d_h_n[at]) : 0.0f;
      if (C::kStates == 2) state(1, tile, i) = item.exists && own.d_c_n ? to_acc<float>(own.d_c_n[at]) : 0.0f;
    });
  }

  // Columns of W_hh: a row of the block is a unit, a packet is of a gate of units.
  __device__ Packet weight(int row, int packet) const {
    const int unit = this->first_unit() + row, gate = packet % C::kGates;
    if (row >= this->units() || unit >= p.H) return {};
    const int64_t first = int64_t{packet / C::kGates} * tiling.units_per_packet;
    return make_packet<Products>(tiling, [&](int slot) {
      return first + slot < p.H ? own.w_hh[(gate * p.H + first + slot) * p.H + unit] : from_acc<scalar_t>(0.0f);
    });
  }
  __device__ Packet initial(int /*tile*/, int /*at*/) const { return {}; }

  __device__ __forceinline__ void prefetch(int64_t round, int tile) {
    const int64_t s = own.T - 1 - round;
    if (s < 0) return;
    const StepRows rows(p.steps, own, s);
    const StepRows before(p.steps, own, s > 0 ? s - 1 : 0);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;
      const Item mine = item(tile, n);
      if (!mine.exists || mine.row >= rows.count) continue;
      const bool started = s > 0 && mine.row < before.count;
      const int64_t at = (rows.begin + mine.row) * p.H + mine.unit;
      const int64_t at_before = (started ? before.begin + mine.row : mine.row) * p.H + mine.unit;
      Loaded& to = loaded[n];
#pragma unroll
      for (int k = 0; k < C::kSaved; ++k) {
        to.gates[k] = own.saved_gates[((rows.begin + mine.row) * C::kSaved + k) * p.H + mine.unit];
      }
      to.h_next = own.output[at];
      to.h_prev = (started ? own.output : own.h0)[at_before];
      if (own.d_output) to.d_output = own.d_output[at];
      if (C::kStates == 2) {
        to.c_next = own.saved_c[at];
        to.c_prev = started ? own.saved_c[at_before] : to_acc<float>(own.c0[at_before]);
      }
    }
  }

  template <class Exchange>
  __device__ __forceinline__ void finish(int64_t round, int tile, const float* sums, const Exchange& exchange) {
    const int64_t s = own.T - 1 - round;
    const StepRows rows(p.steps, own, s < 0 ? 0 : s);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;  // whole warps: a tile's items are a multiple of 32
      const Item mine = item(tile, n);
#pragma unroll
      for (int k = 0; k < C::kGates; ++k) d_h_gates[n][k] = from_acc<scalar_t>(0.0f);
      if (mine.exists) {
        state(0, tile, i) += total(tiling, sums, this->local_unit(mine), mine.column);
        if (s >= 0 && mine.row < rows.count) step(tile, n, i);
      }
      if (s < 0) continue;
#pragma unroll
      for (int k = 0; k < C::kGates; ++k) {
        const uint32_t bits = mine.slot < tiling.units_per_packet ? Products::bits(d_h_gates[n][k])
                                                                  : exchange.step_bits(mine.slot, round + 1);
        const Packet values = gather<Products>(bits);
        if (mine.row < p.steps.B) {
          const int packet = (place.rank * tiling.packets_per_block + mine.packet) * C::kGates + k;
          exchange.publish(round + 1, tile, packet, mine.column, values, mine.slot);
        }
      }
    }
  }

  __device__ __forceinline__ void write(int64_t round, int tile) const {
    const int64_t s = own.T - 1 - round;
    if (s < 0) return;
    const StepRows rows(p.steps, own, s);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;
      const Item mine = item(tile, n);
      if (!mine.exists || mine.row >= rows.count) continue;
      const int64_t first = (rows.begin + mine.row) * C::kGates * p.H + mine.unit;
#pragma unroll
      for (int k = 0; k < C::kGates; ++k) {
        own.d_x_gates[first + k * p.H] = C::kGateGradsDiffer ? d_x_gates[n][k] : d_h_gates[n][k];
        if constexpr (C::kGateGradsDiffer) own.d_h_gates[first + k * p.H] = d_h_gates[n][k];
      }
    }
  }

  __device__ void end() {
    this->for_own_items([&](int tile, int i, const Item& item) {
      if (!item.exists) return;
      own.d_h0[item.row * p.H + item.unit] = from_acc<scalar_t>(state(0, tile, i));
      if (C::kStates == 2) own.d_c0[item.row * p.H + item.unit] = from_acc<scalar_t>(state(1, tile, i));
    });
  }

 private:
  // The cell, for one row of the batch and one unit.
  __device__ __forceinline__ void step(int tile, int n, int i) {
    const Loaded& from = loaded[n];
    Values<float, C::kSaved> saved;
    Values<float, C::kStates> prev, next, d_next, d_prev;
    Values<float, C::kGates> d_gx, d_gh;
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) saved[k] = to_acc<float>(from.gates[k]);
    prev[0] = to_acc<float>(from.h_prev);
    next[0] = to_acc<float>(from.h_next);
    if constexpr (C::kStates == 2) {
      prev[1] = from.c_prev;
      next[1] = from.c_next;
    }
#pragma unroll
    for (int k = 0; k < C::kStates; ++k) d_next[k] = state(k, tile, i);
    if (own.d_output) d_next[0] += to_acc<float>(from.d_output);
    const Values<float, C::kParameters> w = {};
    C::backward(w, saved, prev, next, d_next, d_prev, d_gx, d_gh);
#pragma unroll
    for (int k = 0; k < C::kStates; ++k) state(k, tile, i) = d_prev[k];
#pragma unroll
    for (int k = 0; k < C::kGates; ++k) {
      d_x_gates[n][k] = from_acc<scalar_t>(d_gx[k]);
      d_h_gates[n][k] = from_acc<scalar_t>(d_gh[k]);
    }
  }
};

}  // namespace fastrnn
