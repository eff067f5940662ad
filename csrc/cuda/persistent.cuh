// SPDX-License-Identifier: BSD-3-Clause
// The path "persistent": one launch runs the whole sequence, the recurrent weight stays on chip as far as it fits.
//
// Per step only x_gates comes from memory and only the states leave for it; the weight is read once per launch. What
// bounds a step is the exchange of states between blocks, and what is here is shaped by that:
//
//   fetch    the states of the step's start, from the blocks that own them, into shared memory
//   product  with the block's rows of the weight, which the warps hold in registers, what is too much in shared memory
//            and what is too much for that in L2; sums of the warps that share rows meet in shared memory
//   finish   the cell for each hidden unit of the block: sums, new states
//   publish  the new states to the blocks of the team
//   write    the outputs, while the exchange is under way; with them what finish needs of the next step is asked for
//
// What is multiplied is a pass (forward: the states, rows of W_hh; backward: gate gradients, columns of W_hh). Packets
// of 16 bytes are the unit of everything that is multiplied. In the product of a group of 4 packets, lane (g, t) of a
// warp holds packet t of rows g and g+8 of the weight and packet t of row g of the batch: both operands lie in memory
// lane by lane, and since the order of the terms of a sum is free, that is all the layout that mma needs.
//
// With grade 3 the last slot of a packet tells its step. A 16-byte store and a 16-byte load are each one piece, so a
// reader that finds the right step has the right values: no flag, no fence, one trip through the L2 cache. The weight
// for that slot is zero.
//
// What of the weight is streamed from L2 each lane writes there itself, once, and copies back what it wrote, round
// after round, some groups ahead of the product: that needs no layout and no synchronisation beyond the lane's own, and
// goes on while the block waits for the exchange.
#pragma once

#include "../persistent.h"
#include "persistent_exchange.cuh"
#include "vec.cuh"

namespace fastrnn {

constexpr int kItems = Tiling::kItems;
constexpr int kSumStride = Tiling::kSumStride;
constexpr int kColumnTiles = kBatch / 8;
static_assert(kBatch == 16 && kThreads % 32 == 0);

// The rows of a step: row_begin + b for b in 0..count.
struct StepRows {
  int64_t begin, count;

  template <class Layer>
  __device__ StepRows(const DeviceSteps& steps, const Layer& layer, int64_t s) {
    const int64_t t = layer.reverse ? layer.T - 1 - s : s;
    begin = steps.row_begin ? steps.row_begin[t] : t * steps.B;
    count = steps.row_begin ? steps.row_begin[t + 1] - begin : steps.B;
  }
};

// A value of a tile of the batch that a thread owns. It is found at every step: by shifts, since a division by a number
// that the compiler does not know takes some twenty instructions.
struct Item {
  int packet;  // of the block
  int column;  // of the tile
  int slot;    // of the packet
  int row;     // of the batch: a device holds no more than 1024 times its multiprocessors
  int unit;    // of the layer
  bool exists;

  // The n-th of the thread: all have their slot and column in common.
  __device__ __forceinline__ Item(const Tiling& tiling, const Place& place, unsigned slots, int64_t B, int64_t H,
                                  int tile, int n) {
    slot = threadIdx.x % slots;
    column = threadIdx.x / slots & (tiling.columns() - 1);
    packet = (threadIdx.x / slots >> tiling.column_bits()) + n * (kThreads / slots >> tiling.column_bits());
    row = place.part * tiling.rows_per_team + tile * kBatch + column;
    unit = (place.rank * tiling.packets_per_block + packet) * tiling.units_per_packet + slot;
    exists = slot < tiling.units_per_packet && unit < H && row < B;
  }
};

// The sum of the warps' sums of one row of the weight and one row of the batch.
__device__ __forceinline__ float total(const Tiling& tiling, const float* sums, int row, int column) {
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < Tiling::kWarps; ++warp) {
    if (warp < tiling.warps_k) total += sums[(warp * tiling.weight_tiles * 16 + row) * kSumStride + column];
  }
  return total;
}

// What passes have in common. A pass says what is multiplied and what becomes of the products:
//   Params, kPass, kVectors: exchanged packets for each packet of units
//   rounds()               products one after the other
//   weight(row, packet)    what multiplies a packet, for a row of the block's share
//   initial(tile, at)      a packet of the first round
//   prefetch(round, tile)  loads what finish will need, while the exchange is under way
//   finish(round, tile, sums, exchange)
//   write(round, tile)     to global memory, what finish has left, while the exchange is under way
//   end()
template <class Params, unsigned kSlots>
struct PassBase {
  const Params& p;
  const typename Params::Layer& own;
  const Tiling& tiling;
  const Place& place;
  float* states;  // [kStates, batch tiles, items]: of the units that the block owns

  __device__ PassBase(const Params& p, const Place& place, float* states)
      : p(p), own(p.layers[place.layer]), tiling(p.tiling), place(place), states(states) {}

  __device__ __forceinline__ float& state(int which, int tile, int i) const {
    return states[(which * tiling.batch_tiles() + tile) * tiling.items() + i];
  }
  __device__ __forceinline__ Item item(int tile, int n) const {
    return Item(tiling, place, kSlots, p.steps.B, p.H, tile, n);
  }
  // Calls f(tile, i, item) for everything that this thread owns.
  template <class F>
  __device__ void for_own_items(const F& f) const {
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      for (int n = 0, i = threadIdx.x; i < tiling.items(); ++n, i += kThreads) f(tile, i, item(tile, n));
    }
  }

  // The row of the batch, and the packet, of the place `at` in a tile's packets.
  __device__ __forceinline__ int row_at(int tile, int at) const {
    const int within = at & (tiling.columns() * 4 - 1);
    return place.part * tiling.rows_per_team + tile * kBatch + (within >> 5) * 8 + (within >> 2 & 7);
  }
  __device__ __forceinline__ int packet_at(int at) const { return (at >> (tiling.column_bits() + 2)) * 4 + (at & 3); }

  // The first hidden unit of the block.
  __device__ __forceinline__ int first_unit() const {
    return place.rank * tiling.packets_per_block * tiling.units_per_packet;
  }
  __device__ __forceinline__ int units() const { return tiling.packets_per_block * tiling.units_per_packet; }
  __device__ __forceinline__ int local_unit(const Item& item) const {
    return item.packet * tiling.units_per_packet + item.slot;
  }
};

template <class Pass, class Products, class Exchange>
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ typename Pass::Params p) {
  constexpr int kTiles = weight_tiles_per_warp(Pass::kPass);
  constexpr int kHeld = groups_in_registers(Pass::kPass, Products::kArithmetic);
  const Tiling& tiling = p.tiling;
  const Place place(tiling);
  const int lane = threadIdx.x % 32;
  SharedCarver carver;
  Packet* const weights = tiling.weight_places() > 0 ? carver.take<Packet>(tiling.weight_places()) : nullptr;
  Packet* const operands = carver.take<Packet>(tiling.operand_places());
  float* const sums = carver.take<float>(2 * tiling.sums());
  float* const states = carver.take<float>(tiling.state_values());
  float* const biases = carver.take<float>(tiling.biases());
  Pass pass(p, place, states, biases);
  Exchange exchange(p, place, operands);

  // The weight: the first groups of the warp's slice into registers, the next ones behind each other into shared
  // memory, with kStages places for those to stream behind them, the rest into global memory.
  const int my_groups = place.last_group - place.first_group;
  const int my_tiles = max(0, min(kTiles, tiling.weight_tiles - place.warp_m * kTiles));
  Packet held[kHeld][kTiles][2];
  const auto weight = [&](int group, int tile, int half) {
    return pass.weight((place.warp_m * kTiles + tile) * 16 + half * 8 + lane / 4,
                       (place.first_group + group) * 4 + lane % 4);
  };
  const int on_chip = kHeld + tiling.groups_in_shared, one_group = tiling.packets_of(1);
  const int stages = tiling.groups_streamed() > 0 ? Tiling::kStages : 0, my_streamed = max(0, my_groups - on_chip);
  const int my_rows = place.warp_m * kTiles * 64 + lane;
  Packet* const in_shared = weights + place.warp_k * tiling.packets_of(tiling.groups_in_shared + stages) + my_rows;
  const int my_stream =
      (blockIdx.x * tiling.warps_k + place.warp_k) * tiling.packets_of(tiling.groups_streamed()) + my_rows;
  const auto streamed = [&](int group) {
    return static_cast<Packet*>(p.streamed) + my_stream + (group - on_chip) * one_group;
  };
#pragma unroll
  for (int group = 0; group < kHeld; ++group) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool mine = group < my_groups && tile < my_tiles;
        held[group][tile][half] = mine ? weight(group, tile, half) : Packet{};
      }
    }
  }
  for (int group = kHeld; group < my_groups; ++group) {
    Packet* to = group < on_chip ? in_shared + (group - kHeld) * one_group : streamed(group);
    for (int tile = 0; tile < my_tiles; ++tile) {
      to[tile * 64] = weight(group, tile, 0);
      to[tile * 64 + 32] = weight(group, tile, 1);
    }
  }
  exchange.start(pass);

  // The groups to stream follow each other round after round; `stage` is that of the next to be used.
  int stage = 0;
  const auto ask = [&](int position, int group) {
    while (group >= my_groups) group -= my_streamed;
    Packet* to = in_shared + position * one_group;
    const Packet* from = streamed(group);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile < my_tiles) {
        cp_async_16(to + tile * 64, from + tile * 64);
        cp_async_16(to + tile * 64 + 32, from + tile * 64 + 32);
      }
    }
    cp_async_commit();
  };
  // An asynchronous copy reads as another thread would: what this one has stored comes before it by a fence alone.
  if (my_streamed > 0) fence_acq_rel_gpu();
  for (int i = 0; i < Tiling::kStages && my_streamed > 0; ++i) ask(tiling.groups_in_shared + i, on_chip + i);

  const int column_tiles = tiling.columns() / 8;
  if (pass.rounds() > 0) pass.prefetch(0, 0);
  for (int64_t round = 0; round < pass.rounds(); ++round) {
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      typename Products::Sum sum[kTiles][kColumnTiles] = {};
      const Packet* operand;  // of the groups of a window
      const auto multiply = [&](int group, const Packet(&a)[kTiles][2]) {
#pragma unroll
        for (int columns = 0; columns < kColumnTiles; ++columns) {
          if (columns < column_tiles) {
#pragma unroll
            for (int read = 0; read < Products::kReads; ++read) {
              const Packet batch = operand[(group * column_tiles + columns) * 32 + Products::source(read, lane)];
#pragma unroll
              for (int m = 0; m < kTiles; ++m) {
                if (m < my_tiles) Products::multiply(sum[m][columns], a[m][0], a[m][1], batch, read);
              }
            }
          }
        }
      };
      for (int window = 0; window < my_groups; window += tiling.window) {
        operand = exchange.fetch(pass, round, tile, window);
        const int end = min(my_groups, window + tiling.window);
#pragma unroll
        for (int group = 0; group < kHeld; ++group) {
          if (group >= window && group < end) multiply(group - window, held[group]);
        }
        for (int group = max(kHeld, window); group < end; ++group) {
          const bool is_streamed = group >= on_chip;
          if (is_streamed) cp_async_wait<Tiling::kStages - 1>();
          const int position = is_streamed ? tiling.groups_in_shared + stage : group - kHeld;
          const Packet* from = in_shared + position * one_group;
          Packet a[kTiles][2];
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            if (m < my_tiles) {
              a[m][0] = from[m * 64];
              a[m][1] = from[m * 64 + 32];
            }
          }
          multiply(group - window, a);
          if (is_streamed) {
            ask(position, group + Tiling::kStages);
            stage = (stage + 1) % Tiling::kStages;
          }
        }
      }

      // The sums alternate between two places: one barrier lets them be read, and none is needed before the next.
      // Every other pair of rows stores its odd columns first: two lanes meet in a bank then, not four.
      const int odd = lane / 8 & 1;
      float* const round_sums = sums + (round * tiling.batch_tiles() + tile) % 2 * tiling.sums();
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if (m < my_tiles) {
#pragma unroll
          for (int columns = 0; columns < kColumnTiles; ++columns) {
            if (columns < column_tiles) {
              Products::complete(sum[m][columns], lane);
              float* to =
                  round_sums +
                  ((place.warp_k * tiling.weight_tiles + place.warp_m * kTiles + m) * 16 + lane / 4) * kSumStride +
                  columns * 8 + lane % 4 * 2;
              const auto& c = sum[m][columns].c;
              to[odd] = odd ? c[1] : c[0];
              to[1 - odd] = odd ? c[0] : c[1];
              to[8 * kSumStride + odd] = odd ? c[3] : c[2];
              to[8 * kSumStride + 1 - odd] = odd ? c[2] : c[3];
            }
          }
        }
      }
      __syncthreads();
      pass.finish(round, tile, round_sums, exchange);

      // A thread arrives at the barrier of a cluster when its earlier stores are done, those to global memory too: they
      // come after.
      const bool ends_round = tile + 1 == tiling.batch_tiles(), goes_on = !ends_round || round + 1 < pass.rounds();
      if (ends_round && goes_on) exchange.arrive();
      pass.write(round, tile);
      if (goes_on) pass.prefetch(ends_round ? round + 1 : round, ends_round ? 0 : tile + 1);
      if (ends_round && goes_on) exchange.wait();
    }
  }
  cp_async_wait<0>();
  pass.end();
}

template <class Pass, class Products>
CudaStatus launch_persistent(const typename Pass::Params& p, CudaStream on) {
  const auto stream = static_cast<cudaStream_t>(on);
  LaunchConfig config{dim3(static_cast<unsigned>(p.tiling.all_teams() * p.tiling.blocks)), dim3(kThreads),
                      static_cast<size_t>(p.tiling.shared_bytes())};
  if (p.tiling.grade == 3) {
    config.cooperative = true;
    return launch(persistent_kernel<Pass, Products, GlobalExchange>, config, stream, p);
  }
  config.cluster = static_cast<unsigned>(p.tiling.blocks);
  return launch(persistent_kernel<Pass, Products, SharedExchange>, config, stream, p);
}

}  // namespace fastrnn
