// SPDX-License-Identifier: BSD-3-Clause
// The exchange of the persistent kernels: how the packets of one round, of one tile of the batch, come from the blocks
// that own them. Packets lie as [group, column / 8, lane]; a round is a step, or the one after the last.
#pragma once

#include "persistent_products.cuh"

namespace fastrnn {

constexpr int kThreads = Tiling::kThreads;
constexpr int kBatch = Tiling::kBatch;

__device__ __forceinline__ int packet_place(const Tiling& tiling, unsigned packet, unsigned column) {
  return (packet / 4 << (tiling.column_bits() + 2)) + column / 8 * 32 + column % 8 * 4 + packet % 4;
}

// The place of a block, and of a warp in it.
struct Place {
  int team, layer, part;  // part: of the batch
  int rank, warp_m, warp_k;
  int first_group, last_group;  // of the warp's slice, the last one excluded

  __device__ explicit Place(const Tiling& tiling)
      : team(blockIdx.x / tiling.blocks),
        layer(team / tiling.teams),
        part(team % tiling.teams),
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
    for (int i = threadIdx.x; i < tiling.operand_places(); i += kThreads) buffers[i] = Packet{};
    __syncthreads();
    for (int tile = 0; tile < tiling.batch_tiles(); ++tile) {
      for (int i = threadIdx.x; i < tiling.operand_packets(); i += kThreads) buffer(0, tile)[i] = pass.initial(tile, i);
    }
    if (meets_others()) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
  // The operand of the warp's slice, from its group `window` on.
  template <class Pass>
  __device__ __forceinline__ const Packet* fetch(const Pass&, int64_t round, int tile, int window) const {
    return buffer(round, tile) + (place.first_group + window) * tiling.columns() * 4;
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
  // A round ends: this thread has published its part of the next one, and then all have.
  __device__ __forceinline__ void arrive() const {
    if (meets_others()) cluster_arrive();
  }
  __device__ __forceinline__ void wait() const {
    if (meets_others()) {
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ bool meets_others() const { return tiling.blocks > 1; }
};

// Grade 3: through global memory. Two buffers suffice: a block publishes round r + 1 after it has all of round r, and
// then every block is done with round r - 1. The warps that share a slice of the product's depth fetch it together, a
// window after the other.
struct GlobalExchange {
  static constexpr int kInFlight = Tiling::kInFlight;
  static constexpr uint32_t kMostPolls = 1u << 23;  // of one wait; a poll takes about 0.5 us
  const Tiling& tiling;
  const Place& place;
  Packet* staging;  // [warps_k, a window]
  Packet* packets;  // [all teams, 2, batch tiles, operand_packets()] in global memory
  uint32_t* failed;
  bool gave_up = false;

  template <class Params>
  __device__ GlobalExchange(const Params& p, const Place& place, Packet* staging)
      : tiling(p.tiling), place(place), staging(staging), packets(static_cast<Packet*>(p.exchange)), failed(p.failed) {}

  __device__ __forceinline__ Packet* buffer(int64_t round, int tile) const {
    return packets + ((place.team * 2 + round % 2) * tiling.batch_tiles() + tile) * tiling.operand_packets();
  }

  template <class Pass>
  __device__ void start(const Pass&) const {}

  template <class Pass>
  __device__ __forceinline__ const Packet* fetch(const Pass& pass, int64_t round, int tile, int window) {
    const int per_group = tiling.columns() * 4, threads = tiling.warps_m * 32;
    const int begin = (place.first_group + window) * per_group;  // of the window, in the tile's packets
    const int count = min(tiling.window * per_group, place.last_group * per_group - begin);
    const int first = place.warp_m * 32 + threadIdx.x % 32;
    Packet* const staged = staging + place.warp_k * tiling.window * per_group;
    if (window > 0) meet();  // for the products with the last window
    if (round == 0) {
      for (int i = first; i < count; i += threads) staged[i] = pass.initial(tile, begin + i);
    } else {
      // What is published, and so waited for, are packets of the blocks' units, for the batch's rows. A thread's have
      // their place in 32 in common: they are of one row, or of two that are 8 apart.
      const int with_units =
          (tiling.blocks * tiling.packets_per_block * Pass::kVectors - first % 4 + 3) / 4 * per_group;
      const int published = min(count, with_units - begin);
      const int rows = static_cast<int>(pass.p.steps.B) - pass.row_at(tile, first % 32);
      const auto has_row = [&](int at) { return (at & (per_group - 32)) / 4 < rows; };
      const Packet* from = buffer(round, tile) + begin;
      const uint32_t expected = step_bits(tiling.units_per_packet, round);
      for (int i = first; i < count; i += kInFlight * threads) {
        Packet values[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int at = i + j * threads;
          values[j] = {};
          if (at < published && has_row(at)) {
            values[j] = ld_relaxed_gpu(from + at);
          }
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int at = i + j * threads;
          // Rows past the batch keep what was fetched there before: a column of the product comes from one row alone,
          // and theirs are not read.
          if (at >= count || !has_row(at)) continue;
          uint32_t polls = 0;
          while (at < published && values[j].w >> step_shift() != expected) {
            if (given_up(++polls)) {
              values[j] = {~0u, ~0u, ~0u, ~0u};  // NaN in every precision
              break;
            }
            values[j] = ld_relaxed_gpu(from + at);
          }
          staged[at] = values[j];
        }
      }
    }
    meet();
    return staged;
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
  __device__ __forceinline__ void arrive() const {}
  __device__ __forceinline__ void wait() const {}

 private:
  __device__ __forceinline__ void meet() const {  // the warps that share a slice
    if (tiling.warps_m == 1) {
      __syncwarp();
    } else {
      named_barrier_sync(1 + place.warp_k, tiling.warps_m * 32);
    }
  }
  __device__ __forceinline__ int step_shift() const { return tiling.slots == 8 ? 16 : 0; }
  // A thread that has waited in vain for seconds says so and never waits again: the launch ends, and what it computes
  // from the missing packets is NaN.
  __device__ __forceinline__ bool given_up(uint32_t polls) {
    if (polls == kMostPolls) {
      gave_up = true;
      if (failed) st_relaxed_gpu(failed, 1);
    }
    return gave_up;
  }
};

}  // namespace fastrnn
