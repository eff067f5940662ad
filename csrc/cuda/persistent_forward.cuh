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
struct ForwardPass {
  using C = Cell<float>;
  using scalar_t = typename Products::scalar_t;
  using Params = PersistentForward<scalar_t>;
  static constexpr Pass kPass = Pass::forward;

  const Params& p;
  const Tiling& tiling;
  const Place& place;
  float* states;  // [kStates, batch tiles, items]
  float* biases;  // [G, packets_per_block * slots]
  scalar_t x_gates[kItems][C::kGates];

  static __device__ __forceinline__ int64_t rounds(int64_t T) { return T; }

  __device__ ForwardPass(const Params& p, const Place& place, float* states, float* biases)
      : p(p), tiling(p.tiling), place(place), states(states), biases(biases) {
    for_own_items([&](int tile, int i, const Item& item) {
      state(0, tile, i) = item.exists ? to_acc<float>(p.h0[item.row * p.H + item.unit]) : 0.0f;
      if (C::kStates == 2) state(1, tile, i) = item.exists ? to_acc<float>(p.c0[item.row * p.H + item.unit]) : 0.0f;
    });
    const int units = tiling.packets_per_block * tiling.slots;
    for (int i = threadIdx.x; i < C::kGates * units; i += kThreads) {
      const int packet = i % units / tiling.slots, slot = i % tiling.slots;
      const int unit = (place.rank * tiling.packets_per_block + packet) * tiling.units_per_packet + slot;
      const bool exists = p.b_hh && slot < tiling.units_per_packet && unit < p.H;
      biases[i] = exists ? to_acc<float>(p.b_hh[i / units * p.H + unit]) : 0.0f;
    }
  }

  // Packet `packet` of the team's states as the columns of W_hh, of the block's row `row`.
  __device__ Packet weight(int row, int packet) const {
    const int local_unit = row / C::kGates, gate = row % C::kGates;
    const int unit = place.rank * tiling.packets_per_block * tiling.units_per_packet + local_unit;
    if (local_unit >= tiling.packets_per_block * tiling.units_per_packet || unit >= p.H) return {};
    return load_packet(p.w_hh + (gate * p.H + unit) * p.H, packet);
  }

  // h0, for the place `at` of a tile's packets.
  __device__ Packet initial(int tile, int at) const {
    const int64_t row = row_at(tile, at);
    return row < p.steps.B ? load_packet(p.h0 + row * p.H, packet_at(at)) : Packet{};
  }
  __device__ __forceinline__ bool is_published(int tile, int at) const {
    return row_at(tile, at) < p.steps.B && packet_at(at) < tiling.blocks * tiling.packets_per_block;
  }

  __device__ __forceinline__ void prefetch(int64_t round, int tile) {
    const StepRows rows(p.steps, round);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;
      const Item item(tiling, place, p.steps.B, p.H, tile, i);
      if (!item.exists || item.row >= rows.count) continue;
      const scalar_t* from = p.x_gates + (rows.begin + item.row) * C::kGates * p.H + item.unit;
#pragma unroll
      for (int k = 0; k < C::kGates; ++k) x_gates[n][k] = from[k * p.H];
    }
  }

  template <class Exchange>
  __device__ __forceinline__ void finish(int64_t round, int tile, const float* sums, const Exchange& exchange) {
    const StepRows rows(p.steps, round);
    const bool last = round + 1 == p.steps.T;
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i >= tiling.items()) break;  // whole warps: a tile's items are a multiple of 32
      const Item item(tiling, place, p.steps.B, p.H, tile, i);
      if (item.exists && item.row < rows.count) step(rows.begin + item.row, tile, n, i, item, sums);
      if (last) continue;
      uint32_t bits = Exchange::kTellsStep && item.slot == tiling.units_per_packet ? exchange.step_bits(round + 1) : 0;
      if (item.exists) bits = Products::bits(from_acc<scalar_t>(state(0, tile, i)));
      const Packet values = gather<Products>(bits);
      if (item.row < p.steps.B) {
        exchange.publish(round + 1, tile, place.rank * tiling.packets_per_block + item.packet, item.column, values,
                         item.slot);
      }
    }
  }

  __device__ void end() {
    for_own_items([&](int tile, int i, const Item& item) {
      if (!item.exists) return;
      p.h_n[item.row * p.H + item.unit] = from_acc<scalar_t>(state(0, tile, i));
      if (C::kStates == 2) p.c_n[item.row * p.H + item.unit] = from_acc<scalar_t>(state(1, tile, i));
    });
  }

 private:
  __device__ __forceinline__ float& state(int which, int tile, int i) const {
    return states[(which * tiling.batch_tiles() + tile) * tiling.items() + i];
  }
  template <class F>
  __device__ void for_own_items(const F& f) const {
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      for (int i = threadIdx.x; i < tiling.items(); i += kThreads) {
        f(tile, i, Item(tiling, place, p.steps.B, p.H, tile, i));
      }
    }
  }

  __device__ __forceinline__ int64_t row_at(int tile, int at) const {
    const int within = at % (tiling.columns() * 4);
    return int64_t{place.team} * tiling.rows_per_team + tile * kBatch + within / 32 * 8 + within % 32 / 4;
  }
  __device__ __forceinline__ int packet_at(int at) const { return at / (tiling.columns() * 4) * 4 + at % 4; }

  // Values of a row [H], as a packet holds them; zero beyond its units and beyond the row.
  __device__ Packet load_packet(const scalar_t* row, int packet) const {
    uint32_t words[4] = {};
#pragma unroll
    for (int slot = 0; slot < Products::kSlots; ++slot) {
      const int64_t unit = int64_t{packet} * tiling.units_per_packet + slot;
      if (slot < tiling.units_per_packet && unit < p.H)
        words[slot * 4 / Products::kSlots] |= Products::bits(row[unit]) << slot % (Products::kSlots / 4) * 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }

  // The cell, for one row of the batch and one unit. `row` is a row of the sequence.
  __device__ __forceinline__ void step(int64_t row, int tile, int n, int i, const Item& item, const float* sums) {
    const int local_unit = item.packet * tiling.units_per_packet + item.slot;
    const int units = tiling.packets_per_block * tiling.slots;
    Values<float, C::kGates> gx, gh;
    Values<float, C::kStates> prev, next;
    Values<float, C::kSaved> saved;
#pragma unroll
    for (int k = 0; k < C::kGates; ++k) {
      gx[k] = to_acc<float>(x_gates[n][k]);
      gh[k] = total(tiling, sums, local_unit * C::kGates + k, item.column) +
              biases[k * units + item.packet * tiling.slots + item.slot];
    }
#pragma unroll
    for (int k = 0; k < C::kStates; ++k) prev[k] = state(k, tile, i);
    C::forward(gx, gh, prev, next, saved);
#pragma unroll
    for (int k = 0; k < C::kStates; ++k) state(k, tile, i) = next[k];
    p.output[row * p.H + item.unit] = from_acc<scalar_t>(next[0]);
    if (p.saved_gates) {
#pragma unroll
      for (int k = 0; k < C::kSaved; ++k) {
        p.saved_gates[(row * C::kSaved + k) * p.H + item.unit] = from_acc<scalar_t>(saved[k]);
      }
    }
    if constexpr (C::kStates == 2) {
      if (p.saved_c) p.saved_c[row * p.H + item.unit] = next[1];
    }
  }
};

template <template <typename> class Cell, class Products>
CudaStatus launch_forward(const PersistentForward<typename Products::scalar_t>& p, CudaStream stream) {
  return launch_persistent<ForwardPass<Cell, Products>, Products>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace fastrnn
