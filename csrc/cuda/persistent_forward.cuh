// SPDX-License-Identifier: BSD-3-Clause
// The forward pass of the path "persistent". A round is a step; what is exchanged are the hidden states, in storage
// precision; a block multiplies them with the rows of W_hh that make the gates of its hidden units. Rows are ordered by
// unit, then gate.
//
// A row of the batch that does not take a step (a packed sequence that has ended or, in reverse, not begun) keeps its
// state and publishes it again. A block keeps the states of its own units in float.
#pragma once

#include "persistent.cuh"

namespace fastrnn {

template <template <typename> class Cell, class Products>
struct ForwardPass : PassBase<PersistentForward<typename Products::scalar_t>, Products::kSlots> {
  using C = Cell<float>;
  using scalar_t = typename Products::scalar_t;
  using Params = PersistentForward<scalar_t>;
  using Base = PassBase<Params, Products::kSlots>;
  using Base::p, Base::own, Base::tiling, Base::place, Base::state, Base::item;
  static constexpr Pass kPass = Pass::forward;
  static constexpr int kVectors = 1;

  float* biases;  // [G, packets_per_block * slots]
  // Of the step under way, for the values that this thread owns.
  scalar_t x_gates[kItems][C::kGates];
  Values<scalar_t, C::kSaved> saved_gates[kItems];

  __device__ __forceinline__ int64_t rounds() const { return own.T; }

  __device__ ForwardPass(const Params& p, const Place& place, float* states, float* biases)
      : Base(p, place, states), biases(biases) {
    this->for_own_items([&](int tile, int i, const Item& item) {
      const int64_t at = item.row * p.H + item.unit;
      state(0, tile, i) = item.exists ? to_acc<float>(own.h0[at]) : 0.0f;
      if (C::kStates == 2) state(1, tile, i) = item.exists ? to_acc<float>(own.c0[at]) : 0.0f;
    });
    for (int i = threadIdx.x; i < C::kGates * this->units(); i += kThreads) {
      const int gate = i / this->units(), unit = this->first_unit() + i % this->units();
      biases[i] = own.b_hh && unit < p.H ? to_acc<float>(own.b_hh[gate * p.H + unit]) : 0.0f;
    }
  }

  // Rows of W_hh: a row of the block is a unit and a gate, a packet is of the states.
  __device__ Packet weight(int row, int packet) const {
    const int unit = this->first_unit() + row / C::kGates, gate = row % C::kGates;
    if (row >= this->units() * C::kGates || unit >= p.H) return {};
    return load_packet(own.w_hh + (gate * p.H + unit) * p.H, packet);
  }
  __device__ Packet initial(int tile, int at) const {
    const int64_t row = this->row_at(tile, at);
    return row < p.steps.B ? load_packet(own.h0 + row * p.H, this->packet_at(at)) : Packet{};
  }

  __device__ __forceinline__ void prefetch(int64_t round, int tile) {
    const StepRows rows(p.steps, own, round);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;
      const Item mine = item(tile, n);
      if (!mine.exists || mine.row >= rows.count) continue;
      const scalar_t* from = own.x_gates + (rows.begin + mine.row) * C::kGates * p.H + mine.unit;
#pragma unroll
      for (int k = 0; k < C::kGates; ++k) x_gates[n][k] = from[k * p.H];
    }
  }

  template <class Exchange>
  __device__ __forceinline__ void finish(int64_t round, int tile, const float* sums, const Exchange& exchange) {
    const StepRows rows(p.steps, own, round);
    const bool last = round + 1 == own.T;
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;  // whole warps: a tile's items are a multiple of 32
      const Item mine = item(tile, n);
      if (mine.exists && mine.row < rows.count) step(tile, n, i, mine, sums);
      if (last) continue;
      uint32_t bits = exchange.step_bits(mine.slot, round + 1);
      if (mine.exists) bits = Products::bits(from_acc<scalar_t>(state(0, tile, i)));
      const Packet values = gather<Products>(bits);
      if (mine.row < p.steps.B) {
        exchange.publish(round + 1, tile, place.rank * tiling.packets_per_block + mine.packet, mine.column, values,
                         mine.slot);
      }
    }
  }

  __device__ __forceinline__ void write(int64_t round, int tile) const {
    const StepRows rows(p.steps, own, round);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;
      const Item mine = item(tile, n);
      if (!mine.exists || mine.row >= rows.count) continue;
      const int64_t row = rows.begin + mine.row, at = row * p.H + mine.unit;
      own.output[at] = from_acc<scalar_t>(state(0, tile, i));
      if (own.saved_gates) {
#pragma unroll
        for (int k = 0; k < C::kSaved; ++k) {
          own.saved_gates[(row * C::kSaved + k) * p.H + mine.unit] = saved_gates[n][k];
        }
      }
      if (C::kStates == 2 && own.saved_c) own.saved_c[at] = state(1, tile, i);
    }
  }

  __device__ void end() {
    this->for_own_items([&](int tile, int i, const Item& item) {
      if (!item.exists) return;
      own.h_n[item.row * p.H + item.unit] = from_acc<scalar_t>(state(0, tile, i));
      if (C::kStates == 2) own.c_n[item.row * p.H + item.unit] = from_acc<scalar_t>(state(1, tile, i));
    });
  }

 private:
  // Units of a row [H] of states or of a weight.
  __device__ Packet load_packet(const scalar_t* row, int packet) const {
    const int64_t first = int64_t{packet} * tiling.units_per_packet;
    return make_packet<Products>(
        tiling, [&](int slot) { return first + slot < p.H ? row[first + slot] : from_acc<scalar_t>(0.0f); });
  }

  // The cell, for one row of the batch and one unit.
  __device__ __forceinline__ void step(int tile, int n, int i, const Item& item, const float* sums) {
    const int unit = this->local_unit(item);
    Values<float, C::kGates> gx, gh;
    Values<float, C::kStates> prev, next;
    Values<float, C::kSaved> saved;
#pragma unroll
    for (int k = 0; k < C::kGates; ++k) {
      gx[k] = to_acc<float>(x_gates[n][k]);
      gh[k] = total(tiling, sums, unit * C::kGates + k, item.column) + biases[k * this->units() + unit];
    }
#pragma unroll
    for (int k = 0; k < C::kStates; ++k) prev[k] = state(k, tile, i);
    C::forward(gx, gh, {}, prev, next, saved);
#pragma unroll
    for (int k = 0; k < C::kStates; ++k) state(k, tile, i) = next[k];
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) saved_gates[n][k] = from_acc<scalar_t>(saved[k]);
  }
};

}  // namespace fastrnn
