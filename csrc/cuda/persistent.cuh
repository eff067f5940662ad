// SPDX-License-Identifier: BSD-3-Clause
// The path "persistent": one launch runs the whole sequence, the recurrent weight stays on chip.
//
// Per step only x_gates comes from memory and only the states leave for it; the weight is read once per launch. What
// bounds a step is the exchange of states between blocks, and what is here is shaped by that:
//
//   fetch    the states of the step's start, from the blocks that own them, into shared memory
//   product  with the block's rows of the weight, which the warps hold in registers and, what is too much, in shared
//            memory; sums of the warps that share rows meet in shared memory
//   finish   the cell for each hidden unit of the block: sums, outputs, new states
//   publish  the new states to the blocks of the team
//
// What is multiplied is a pass (forward: the states, rows of W_hh; backward: gate gradients, columns of W_hh). Packets
// of 16 bytes are the unit of everything that is multiplied. In the product of a group of 4 packets, lane (g, t) of a
// warp holds packet t of rows g and g+8 of the weight and packet t of row g of the batch: both operands lie in memory
// lane by lane, and since the order of the terms of a sum is free, that is all the layout that mma needs.
//
// With grade 3 the last slot of a packet tells its step. A 16-byte store and a 16-byte load are each one piece, so a
// reader that finds the right step has the right values: no flag, no fence, one trip through the L2 cache. The weight
// for that slot is zero.
#pragma once

#include "../persistent.h"
#include "device.cuh"
#include "vec.cuh"

namespace fastrnn {

using Packet = uint4;
using Tiling = PersistentTiling;

constexpr int kThreads = Tiling::kThreads;
constexpr int kWarps = Tiling::kWarps;
constexpr int kBatch = Tiling::kBatch;
constexpr int kItems = Tiling::kItems;
constexpr int kSumStride = Tiling::kSumStride;
constexpr int kColumnTiles = kBatch / 8;
static_assert(kBatch % 8 == 0 && kThreads % 32 == 0);

// ---------------------------------------------------------------------------------------------------------------------
// Products: 16 rows of the weight times 8 rows of the batch, over one group of packets. Partial sums are in float.
// `low` and `high` are the lane's packets of rows g and g+8. A product reads kReads packets of the batch, read i from
// the place of lane source(i). After complete(), sum.c is laid out as mma leaves it: rows g, g, g+8, g+8, columns 2t,
// 2t+1, 2t, 2t+1.

// Tensor cores on 16-bit values.
template <typename scalar>
struct Products16 {
  using scalar_t = scalar;
  static constexpr Arithmetic kArithmetic = std::is_same_v<scalar_t, __half> ? Arithmetic::fp16 : Arithmetic::bf16;
  static constexpr int kSlots = 8, kReads = 1;
  struct Sum {
    float c[4];
  };

  static __device__ __forceinline__ int source(int /*read*/, int lane) { return lane; }
  static __device__ __forceinline__ void multiply(Sum& sum, const Packet& low, const Packet& high, const Packet& batch,
                                                  int /*read*/) {
    const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
    const uint32_t b0[2] = {batch.x, batch.y}, b1[2] = {batch.z, batch.w};
    if constexpr (std::is_same_v<scalar_t, __half>) {
      mma_fp16(sum.c, a0, b0);
      mma_fp16(sum.c, a1, b1);
    } else {
      mma_bf16(sum.c, a0, b0);
      mma_bf16(sum.c, a1, b1);
    }
  }
  static __device__ __forceinline__ void complete(Sum&, int /*lane*/) {}

  static __device__ __forceinline__ uint32_t bits(scalar_t value) {
    if constexpr (std::is_same_v<scalar_t, __half>) {
      return __half_as_ushort(value);
    } else {
      return __bfloat16_as_ushort(value);
    }
  }
};

// Tensor cores on float values rounded to TF32.
struct ProductsTf32 {
  using scalar_t = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::tf32;
  static constexpr int kSlots = 4, kReads = 1;
  struct Sum {
    float c[4];
  };

  static __device__ __forceinline__ int source(int /*read*/, int lane) { return lane; }
  static __device__ __forceinline__ void multiply(Sum& sum, const Packet& low, const Packet& high, const Packet& batch,
                                                  int /*read*/) {
    const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
    const uint32_t b0[2] = {batch.x, batch.y}, b1[2] = {batch.z, batch.w};
    mma_tf32(sum.c, a0, b0);
    mma_tf32(sum.c, a1, b1);
  }
  static __device__ __forceinline__ void complete(Sum&, int /*lane*/) {}

  static __device__ __forceinline__ uint32_t bits(float value) { return to_tf32(value); }
};

// Multiply-adds in float. A lane adds up its packets' terms for rows g and g+8 and all 8 rows of the batch; at the end
// the 4 lanes with the same g add theirs.
struct ProductsFp32 {
  using scalar_t = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::fp32;
  static constexpr int kSlots = 4, kReads = 8;
  struct Sum {
    float c[16];  // [2 rows][8 rows of the batch]
  };

  static __device__ __forceinline__ int source(int read, int lane) { return read * 4 + lane % 4; }
  static __device__ __forceinline__ void multiply(Sum& sum, const Packet& low, const Packet& high, const Packet& batch,
                                                  int read) {
    sum.c[read] = dot(sum.c[read], low, batch);
    sum.c[8 + read] = dot(sum.c[8 + read], high, batch);
  }
  static __device__ __forceinline__ void complete(Sum& sum, int lane) {
    const bool upper = lane & 2, odd = lane & 1;
    float half[8];  // [2 rows][4 rows of the batch]: 0..3 or 4..7
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int first = i / 4 * 8 + i % 4;
      const float mine = upper ? sum.c[first + 4] : sum.c[first], other = upper ? sum.c[first] : sum.c[first + 4];
      half[i] = mine + __shfl_xor_sync(~0u, other, 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = i / 2 * 4 + i % 2;
      const float mine = odd ? half[first + 2] : half[first], other = odd ? half[first] : half[first + 2];
      sum.c[i] = mine + __shfl_xor_sync(~0u, other, 1);
    }
  }

  static __device__ __forceinline__ uint32_t bits(float value) { return __float_as_uint(value); }

 private:
  static __device__ __forceinline__ float dot(float sum, const Packet& a, const Packet& b) {
    sum = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), sum);
    sum = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), sum);
    sum = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), sum);
    return fmaf(__uint_as_float(a.w), __uint_as_float(b.w), sum);
  }
};

// The packet of the lanes that hold its values, lane 0 of them the first: all of them get it. The whole warp calls.
template <class Products>
__device__ __forceinline__ Packet gather(uint32_t bits) {
  const int first = threadIdx.x % 32 / Products::kSlots * Products::kSlots;
  constexpr int kLanesPerWord = Products::kSlots / 4;
  if (kLanesPerWord == 2) bits |= __shfl_down_sync(~0u, bits, 1) << 16;
  return {__shfl_sync(~0u, bits, first), __shfl_sync(~0u, bits, first + kLanesPerWord),
          __shfl_sync(~0u, bits, first + 2 * kLanesPerWord), __shfl_sync(~0u, bits, first + 3 * kLanesPerWord)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Exchange: how the packets of one round, of one tile of the batch, come from the blocks that own them. Packets lie as
// [group, column / 8, lane]; a round is a step, or the one after the last.

__device__ __forceinline__ int packet_place(const Tiling& tiling, int packet, int column) {
  return packet / 4 * tiling.columns() * 4 + column / 8 * 32 + column % 8 * 4 + packet % 4;
}

// The place of a block, and of a warp in it.
struct Place {
  int team, rank, warp_m, warp_k;
  int first_group, last_group;  // of the warp's slice, the last one excluded

  __device__ explicit Place(const Tiling& tiling)
      : team(blockIdx.x / tiling.blocks),
        rank(blockIdx.x % tiling.blocks),
        warp_m(threadIdx.x / 32 % tiling.warps_m),
        warp_k(threadIdx.x / 32 / tiling.warps_m),
        first_group(min(warp_k * tiling.groups_per_warp, tiling.groups)),
        last_group(min(first_group + tiling.groups_per_warp, tiling.groups)) {}
};

// Grades 1 and 2: through the shared memory of the blocks of a cluster, or of the only block. Two buffers for each tile
// of the batch: a block writes the next round while another one still reads this one, and a barrier ends each round.
struct SharedExchange {
  const Tiling& tiling;
  const Place& place;
  Packet* buffers;  // [2, batch tiles, operand_packets()]

  template <class Params>
  __device__ SharedExchange(const Params& p, const Place& place, Packet* buffers)
      : tiling(p.tiling), place(place), buffers(buffers) {}

  __device__ __forceinline__ Packet* buffer(int64_t round, int tile) const {
    return buffers + (round % 2 * tiling.batch_tiles() + tile) * tiling.operand_packets();
  }

  template <class Pass>
  __device__ void start(const Pass& pass) const {
    for (int i = threadIdx.x; i < tiling.operand_buffers() * tiling.operand_packets(); i += kThreads) {
      buffers[i] = Packet{};
    }
    __syncthreads();
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      for (int i = threadIdx.x; i < tiling.operand_packets(); i += kThreads) buffer(0, tile)[i] = pass.initial(tile, i);
    }
    barrier();
  }
  template <class Pass>
  __device__ __forceinline__ const Packet* fetch(const Pass&, int64_t round, int tile) const {
    return buffer(round, tile);
  }
  __device__ __forceinline__ uint32_t step_bits(int /*slot*/, int64_t /*round*/) const { return 0; }
  // The lanes of the packet's values call; all have it.
  __device__ __forceinline__ void publish(int64_t round, int tile, int packet, int column, const Packet& values,
                                          int slot) const {
    Packet* to = buffer(round, tile) + packet_place(tiling, packet, column);
    if (tiling.blocks == 1) {
      if (slot == 0) *to = values;
    } else {
      for (int rank = slot; rank < tiling.blocks; rank += tiling.slots) *map_shared_rank(to, rank) = values;
    }
  }
  __device__ __forceinline__ void end_round() const { barrier(); }

 private:
  __device__ __forceinline__ void barrier() const {
    if (tiling.blocks == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }
};

// Grade 3: through global memory. Two buffers suffice: a block publishes round r + 1 after it has all of round r, and
// then every block is done with round r - 1. The warps that share a slice of the product's depth fetch it together.
struct GlobalExchange {
  static constexpr int kInFlight = 4;               // loads of a thread before it looks at the first
  static constexpr uint32_t kMostPolls = 1u << 23;  // of one wait; a poll takes about 0.5 us
  const Tiling& tiling;
  const Place& place;
  Packet* staging;  // [operand_packets()]
  Packet* packets;  // [2, teams, batch tiles, operand_packets()] in global memory
  uint32_t* failed;
  bool gave_up = false;

  template <class Params>
  __device__ GlobalExchange(const Params& p, const Place& place, Packet* staging)
      : tiling(p.tiling), place(place), staging(staging), packets(static_cast<Packet*>(p.exchange)), failed(p.failed) {}

  __device__ __forceinline__ Packet* buffer(int64_t round, int tile) const {
    const int64_t tiles = tiling.batch_tiles();
    return packets + ((round % 2 * tiling.teams + place.team) * tiles + tile) * tiling.operand_packets();
  }

  template <class Pass>
  __device__ void start(const Pass&) const {
    for (int i = threadIdx.x; i < tiling.operand_packets(); i += kThreads) staging[i] = Packet{};
    __syncthreads();
  }

  template <class Pass>
  __device__ __forceinline__ const Packet* fetch(const Pass& pass, int64_t round, int tile) {
    const int per_group = tiling.columns() * 4, threads = tiling.warps_m * 32;
    const int begin = place.first_group * per_group, end = place.last_group * per_group;
    const int first = begin + place.warp_m * 32 + threadIdx.x % 32;
    if (round == 0) {
      for (int i = first; i < end; i += threads) staging[i] = pass.initial(tile, i);
    } else {
      const Packet* from = buffer(round, tile);
      const uint32_t expected = step_bits(tiling.units_per_packet, round);
      for (int i = first; i < end; i += kInFlight * threads) {
        Packet values[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int at = i + j * threads;
          if (at < end && is_published(pass, tile, at)) values[j] = ld_relaxed_gpu(from + at);
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int at = i + j * threads;
          if (at < end && is_published(pass, tile, at)) {
            uint32_t polls = 0;
            while (values[j].w >> step_shift() != expected && !given_up(++polls)) values[j] = ld_relaxed_gpu(from + at);
            staging[at] = values[j];
          }
        }
      }
    }
    if (tiling.warps_m == 1) {
      __syncwarp();
    } else {
      named_barrier_sync(1 + place.warp_k, threads);
    }
    return staging;
  }
  // What a slot without a unit holds: in the last slot the round. Never zero, the buffers' first content; of two rounds
  // in one buffer, never the same. Small: times zero it is zero.
  __device__ __forceinline__ uint32_t step_bits(int slot, int64_t round) const {
    return slot == tiling.units_per_packet ? 1 + round / 2 % 2 : 0;
  }
  __device__ __forceinline__ void publish(int64_t round, int tile, int packet, int column, const Packet& values,
                                          int slot) const {
    if (slot == 0) st_relaxed_gpu(buffer(round, tile) + packet_place(tiling, packet, column), values);
  }
  __device__ __forceinline__ void end_round() const {}

 private:
  template <class Pass>
  __device__ __forceinline__ bool is_published(const Pass& pass, int tile, int at) const {
    return pass.row_at(tile, at) < pass.p.steps.B &&
           pass.packet_at(at) < tiling.blocks * tiling.packets_per_block * Pass::kVectors;
  }
  __device__ __forceinline__ int step_shift() const { return tiling.slots == 8 ? 16 : 0; }
  // A thread that has waited in vain for seconds says so and never waits again: the launch ends, with wrong results.
  __device__ __forceinline__ bool given_up(uint32_t polls) {
    if (polls == kMostPolls) {
      gave_up = true;
      if (failed) st_relaxed_gpu(failed, 1);
    }
    return gave_up;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

// The rows of a step: row_begin + b for b in 0..count.
struct StepRows {
  int64_t begin, count;

  __device__ StepRows(const DeviceSteps& steps, int64_t s) {
    const int64_t t = steps.reverse ? steps.T - 1 - s : s;
    begin = steps.row_begin ? steps.row_begin[t] : t * steps.B;
    count = steps.row_begin ? steps.row_begin[t + 1] - begin : steps.B;
  }
};

// A value of a tile of the batch that a thread owns.
struct Item {
  int packet;   // of the block
  int column;   // of the tile
  int slot;     // of the packet
  int64_t row;  // of the batch
  int unit;     // of the layer
  bool exists;

  __device__ Item(const Tiling& tiling, const Place& place, int64_t B, int64_t H, int tile, int i) {
    slot = i % tiling.slots;
    column = i / tiling.slots % tiling.columns();
    packet = i / tiling.slots / tiling.columns();
    row = int64_t{place.team} * tiling.rows_per_team + tile * kBatch + column;
    unit = (place.rank * tiling.packets_per_block + packet) * tiling.units_per_packet + slot;
    exists = slot < tiling.units_per_packet && unit < H && row < B;
  }
};

// The sum of the warps' sums of one row of the weight and one row of the batch.
__device__ __forceinline__ float total(const Tiling& tiling, const float* sums, int row, int column) {
  float total = 0;
  for (int warp = 0; warp < tiling.warps_k; ++warp) {
    total += sums[(warp * tiling.weight_tiles * 16 + row) * kSumStride + column];
  }
  return total;
}

// What passes have in common. A pass says what is multiplied and what becomes of the products:
//   Params, kPass, kVectors: exchanged packets for each packet of units
//   rounds(T)              products one after the other
//   weight(row, packet)    what multiplies a packet, for a row of the block's share
//   initial(tile, at)      a packet of the first round
//   prefetch(round, tile)  loads what finish will need, while the exchange is under way
//   finish(round, tile, sums, exchange), end()
template <class Params>
struct PassBase {
  const Params& p;
  const Tiling& tiling;
  const Place& place;
  float* states;  // [kStates, batch tiles, items]: of the units that the block owns

  __device__ PassBase(const Params& p, const Place& place, float* states)
      : p(p), tiling(p.tiling), place(place), states(states) {}

  __device__ __forceinline__ float& state(int which, int tile, int i) const {
    return states[(which * tiling.batch_tiles() + tile) * tiling.items() + i];
  }
  __device__ __forceinline__ Item item(int tile, int i) const { return Item(tiling, place, p.steps.B, p.H, tile, i); }
  // Calls f(tile, i, item) for everything that this thread owns.
  template <class F>
  __device__ void for_own_items(const F& f) const {
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      for (int i = threadIdx.x; i < tiling.items(); i += kThreads) f(tile, i, item(tile, i));
    }
  }

  // The row of the batch, and the packet, of the place `at` in a tile's packets.
  __device__ __forceinline__ int64_t row_at(int tile, int at) const {
    const int within = at % (tiling.columns() * 4);
    return int64_t{place.team} * tiling.rows_per_team + tile * kBatch + within / 32 * 8 + within % 32 / 4;
  }
  __device__ __forceinline__ int packet_at(int at) const { return at / (tiling.columns() * 4) * 4 + at % 4; }

  // The first hidden unit of the block.
  __device__ __forceinline__ int first_unit() const {
    return place.rank * tiling.packets_per_block * tiling.units_per_packet;
  }
  __device__ __forceinline__ int units() const { return tiling.packets_per_block * tiling.units_per_packet; }
  __device__ __forceinline__ int local_unit(const Item& item) const {
    return item.packet * tiling.units_per_packet + item.slot;
  }
};

// A packet of the values that f(slot) gives, in the precision of products. Slots without a unit are zero.
template <class Products, class F>
__device__ Packet make_packet(const Tiling& tiling, const F& f) {
  uint32_t words[4] = {};
#pragma unroll
  for (int slot = 0; slot < Products::kSlots; ++slot) {
    if (slot < tiling.units_per_packet) {
      words[slot * 4 / Products::kSlots] |= Products::bits(f(slot)) << slot % (Products::kSlots / 4) * 16;
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class Pass, class Products, class Exchange>
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ typename Pass::Params p) {
  constexpr int kTiles = weight_tiles_per_warp(Pass::kPass);
  constexpr int kHeld = groups_in_registers(Pass::kPass, Products::kArithmetic);
  const Tiling& tiling = p.tiling;
  const Place place(tiling);
  const int lane = threadIdx.x % 32;
  SharedCarver carver;
  Packet* const weights = tiling.groups_in_shared() > 0 ? carver.take<Packet>(tiling.weight_packets()) : nullptr;
  Packet* const operands = carver.take<Packet>(tiling.operand_packets() * tiling.operand_buffers());
  float* const sums = carver.take<float>(2 * tiling.sums());
  float* const states = carver.take<float>(tiling.state_values());
  float* const biases = carver.take<float>(tiling.biases());
  Pass pass(p, place, states, biases);
  Exchange exchange(p, place, operands);

  // The weight: the first groups of the warp's slice into registers, the others behind each other into shared memory.
  const int my_groups = place.last_group - place.first_group;
  const int my_tiles = max(0, min(kTiles, tiling.weight_tiles - place.warp_m * kTiles));
  Packet held[kHeld][kTiles][2];
  const auto weight = [&](int group, int tile, int half) {
    return pass.weight((place.warp_m * kTiles + tile) * 16 + half * 8 + lane / 4,
                       (place.first_group + group) * 4 + lane % 4);
  };
  Packet* const overflow =
      weights + (place.warp_k * tiling.groups_in_shared() * tiling.weight_tiles + place.warp_m * kTiles) * 64 + lane;
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
    for (int tile = 0; tile < my_tiles; ++tile) {
      Packet* to = overflow + ((group - kHeld) * tiling.weight_tiles + tile) * 64;
      to[0] = weight(group, tile, 0);
      to[32] = weight(group, tile, 1);
    }
  }
  exchange.start(pass);

  const int column_tiles = tiling.columns() / 8;
  int turn = 0;
  for (int64_t round = 0; round < Pass::rounds(p.steps.T); ++round) {
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      pass.prefetch(round, tile);
      const Packet* operand = exchange.fetch(pass, round, tile) + place.first_group * tiling.columns() * 4;

      typename Products::Sum sum[kTiles][kColumnTiles] = {};
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
#pragma unroll
      for (int group = 0; group < kHeld; ++group) {
        if (group < my_groups) multiply(group, held[group]);
      }
      for (int group = kHeld; group < my_groups; ++group) {
        Packet a[kTiles][2];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          if (m < my_tiles) {
            const Packet* from = overflow + ((group - kHeld) * tiling.weight_tiles + m) * 64;
            a[m][0] = from[0];
            a[m][1] = from[32];
          }
        }
        multiply(group, a);
      }

      // The sums alternate between two places: one barrier lets them be read, and none is needed before the next.
      float* const round_sums = sums + turn * tiling.sums();
      turn ^= 1;
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
              to[0] = sum[m][columns].c[0];
              to[1] = sum[m][columns].c[1];
              to[8 * kSumStride] = sum[m][columns].c[2];
              to[8 * kSumStride + 1] = sum[m][columns].c[3];
            }
          }
        }
      }
      __syncthreads();
      pass.finish(round, tile, round_sums, exchange);
    }
    if (round + 1 < Pass::rounds(p.steps.T)) exchange.end_round();
  }
  pass.end();
}

template <class Pass, class Products>
CudaStatus launch_persistent(const typename Pass::Params& p, CudaStream on) {
  const auto stream = static_cast<cudaStream_t>(on);
  LaunchConfig config{dim3(static_cast<unsigned>(p.tiling.teams * p.tiling.blocks)), dim3(kThreads),
                      static_cast<size_t>(p.tiling.shared_bytes())};
  if (p.tiling.grade == 3) {
    config.cooperative = true;
    return launch(persistent_kernel<Pass, Products, GlobalExchange>, config, stream, p);
  }
  config.cluster = static_cast<unsigned>(p.tiling.blocks);
  return launch(persistent_kernel<Pass, Products, SharedExchange>, config, stream, p);
}

}  // namespace fastrnn
