// SPDX-License-Identifier: BSD-3-Clause
// Which path runs for a problem, and why: pure functions of sizes and machine facts, so that they can be asked and
// tested anywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cells/math.h"

namespace fastrnn {

// How the threads of the CPU share a layer. Rows of the batch need no synchronisation at all; hidden units need one
// barrier per step, but read each weight in one thread only.
enum class Split { rows, units };

struct CpuProblem {
  int64_t T, B, I, H, P;
  int gates;
  int threads;                // that the framework allows
  bool two_products = false;  // a step has a second one, of what the first one gave
  bool normalises = false;    // the products of a row, all of them together
  int layers = 1;             // 1, or 2 of these sizes that do not wait for each other

  constexpr int64_t recurrent_weights() const { return gates * H * P + (P != H || two_products ? P * H : 0); }
  constexpr int64_t multiply_adds() const { return T * B * (recurrent_weights() + gates * H * I); }  // of a layer
};

struct CpuPlan {
  Split split;
  int threads;  // of a layer
  const char* reason;
  bool pack_input, pack_recurrent;  // whether W_ih and W_hh are packed before use, or read where they are
  bool side_by_side = false;        // whether both layers run at once
};

// Starting a parallel region costs about what one thread does in 0.3 million multiply-adds.
constexpr bool worth_threads(int64_t multiply_adds) { return multiply_adds >= 300'000; }

// Packing a weight costs about what this many rows cost that are multiplied with it.
inline constexpr int64_t kRowsWorthPacking = 16;

inline CpuPlan plan_layer(const CpuProblem& p) {
  // A barrier costs about what one thread does with 4096 weights read from its cache.
  constexpr int64_t kMinimumWeightsPerThread = 4096;
  // From here on the weights are read from cache often enough per step that reading them in every thread is free.
  constexpr int64_t kRowsPerThread = 4;
  // A single row reads a weight nearly as fast where it is, so that packing pays only after this many steps; sooner
  // where rows of the weight are so long that they drive each other out of the cache.
  constexpr int64_t kStepsWorthPacking = 128, kLongRow = 512;

  const bool pack = p.T * p.B >= kRowsWorthPacking;
  const bool pack_recurrent =
      pack && (p.B > 1 || p.T >= kStepsWorthPacking || p.T * p.P > kStepsWorthPacking * kLongRow);
  const auto plan = [&](Split split, int64_t threads, const char* reason) {
    return CpuPlan{split, static_cast<int>(threads), reason, pack, pack_recurrent};
  };

  if (p.threads <= 1) return plan(Split::rows, 1, "one thread is allowed");
  if (!worth_threads(p.multiply_adds())) return plan(Split::rows, 1, "too little work for a second thread");
  if (p.B >= kRowsPerThread * p.threads) return plan(Split::rows, p.threads, "enough rows for every thread");
  if (p.P != p.H || p.two_products || p.normalises) {
    const char* reason = p.two_products ? "two products a step split by rows only"
                         : p.normalises ? "layer normalisation splits by rows only"
                                        : "a projection splits by rows only";
    return plan(Split::rows, std::min<int64_t>(p.threads, p.B), reason);
  }
  const int64_t by_units = std::min<int64_t>(p.threads, p.B * p.recurrent_weights() / kMinimumWeightsPerThread);
  const int64_t by_rows = std::min<int64_t>(p.threads, p.B / kRowsPerThread);
  if (by_units > by_rows && by_units > 1) {
    return plan(Split::units, by_units, "few rows: threads share the hidden units");
  }
  return plan(Split::rows, std::max<int64_t>(by_rows, 1), "few rows and few units");
}

// Two layers at once: half of the threads wait less for each other than all of them. But each then holds twice as much
// of a weight: beyond what its cache holds, one layer after the other is faster. Of an odd number of threads one would
// be left over.
inline CpuPlan plan_cpu(const CpuProblem& p) {
  constexpr int64_t kCachedWeights = 1 << 17;
  const CpuPlan in_turn = plan_layer(p);
  if (p.layers < 2 || p.threads < 2) return in_turn;
  CpuProblem half = p;
  half.threads = p.threads / 2;
  const bool shares_units =
      in_turn.split == Split::units && p.threads % 2 == 0 && p.recurrent_weights() <= half.threads * kCachedWeights;
  const bool leaves_half_idle = in_turn.threads <= half.threads && worth_threads(2 * p.multiply_adds());
  if (!shares_units && !leaves_half_idle) return in_turn;
  CpuPlan beside = plan_layer(half);
  beside.side_by_side = true;
  beside.reason = leaves_half_idle ? "threads would be left idle: both directions at once"
                                   : "few rows: both directions at once, each on half of the threads";
  return beside;
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

// How the recurrent product is computed; sums are in float, double is served by the path "gates" alone.
enum class Arithmetic { fp16, bf16, tf32, fp32, fp64 };
constexpr int storage_bytes(Arithmetic a) {
  return a == Arithmetic::fp64 ? 8 : a == Arithmetic::tf32 || a == Arithmetic::fp32 ? 4 : 2;
}

enum class CudaPath { gates, persistent };

enum class Pass { forward, backward };

struct CudaProblem {
  int64_t T, B, H;
  int gates, states;
  bool projection;
  Arithmetic arithmetic;
  Pass pass;
};

struct CudaDevice {
  int capability;        // 90 for sm_90
  int multiprocessors;   // that this process may use
  int shared_per_block;  // bytes, the most that a kernel may ask for
};

// What tests and the benchmark ask for; the default leaves everything to the plan.
struct CudaForce {
  std::optional<CudaPath> path;
  int grade = 0;   // 0: any
  int blocks = 0;  // of a team; 0: as few as hold the weights
  int teams = 0;   // at most; 0: as many as the device has room for
};

// How the persistent kernels share a layer. Hidden states travel in packets of 16 bytes: units_per_packet neighbouring
// units of one row of the batch. A block owns packets_per_block packets, so some hidden units with all their gates, and
// keeps their rows of the weight on chip; its warps share the product as warps_m groups of rows by warps_k slices of
// its depth. The blocks of a team exchange states with each other and with nobody else.
struct PersistentTiling {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBatch = 16;      // rows of the batch that a product takes at once
  static constexpr int kItems = 4;       // values of one tile of the batch that a thread owns, at most
  static constexpr int kSumStride = 17;  // kBatch, padded against bank conflicts
  static constexpr int kMaxCluster = 16;

  int grade;  // 1: a team is one block; 2: a cluster; 3: blocks anywhere on the device
  int teams, blocks;
  int rows_per_team;  // of the batch, a multiple of 8
  int slots;          // values that a packet has room for
  int units_per_packet, packets_per_block;
  int weight_tiles;      // of 16 rows: the rows of the weight that a block owns
  int groups;            // of 4 packets: the depth of the product
  int warps_m, warps_k;  // warps_m * warps_k == kWarps
  int groups_per_warp, groups_in_registers;
  int states;
  int gates;

  FASTRNN_HD int batch_tiles() const { return (rows_per_team + kBatch - 1) / kBatch; }
  FASTRNN_HD int columns() const { return rows_per_team < kBatch ? 8 : kBatch; }  // rows of the batch in a tile
  FASTRNN_HD int items() const { return packets_per_block * columns() * slots; }  // of a tile
  FASTRNN_HD int groups_in_shared() const {                                       // of a warp
    return groups_per_warp > groups_in_registers ? groups_per_warp - groups_in_registers : 0;
  }
  // Elements of the arrays in shared memory, in the order in which they are carved.
  FASTRNN_HD int weight_packets() const { return warps_k * groups_in_shared() * weight_tiles * 64; }
  FASTRNN_HD int operand_packets() const { return groups * columns() * 4; }  // of one tile of the batch
  FASTRNN_HD int operand_buffers() const { return grade == 3 ? 1 : 2 * batch_tiles(); }
  FASTRNN_HD int sums() const { return warps_k * weight_tiles * 16 * kSumStride; }  // twice
  FASTRNN_HD int state_values() const { return states * batch_tiles() * items(); }
  FASTRNN_HD int biases() const { return gates * packets_per_block * slots; }
  int64_t shared_bytes() const {
    const auto aligned = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
    return aligned(int64_t{weight_packets()} * 16) + aligned(int64_t{operand_packets()} * operand_buffers() * 16) +
           aligned(int64_t{sums()} * 2 * 4) + aligned(int64_t{state_values()} * 4) + int64_t{biases()} * 4;
  }
  // Packets in global memory through which a team of grade 3 exchanges: two buffers for each tile of each team.
  constexpr int64_t exchange_packets() const {
    return grade == 3 ? int64_t{2} * teams * batch_tiles() * operand_packets() : 0;
  }
};

struct CudaPlan {
  CudaPath path;
  const char* reason;
  // of the path "persistent"
  PersistentTiling tiling = {};
  Arithmetic arithmetic = {};
};

// 16-row tiles of the weight that a warp owns, and groups of packets whose weights it holds in registers: 8 registers
// for each group of each tile.
FASTRNN_HD constexpr int weight_tiles_per_warp(Pass pass) { return pass == Pass::forward ? 2 : 1; }
FASTRNN_HD constexpr int groups_in_registers(Pass pass, Arithmetic a) {
  const int fragments = a == Arithmetic::fp32 ? 8 : 16;  // sums of plain multiply-adds take more registers themselves
  return fragments / weight_tiles_per_warp(pass);
}

// The tiling with teams of that many blocks, or nothing when a block's share is too large for it.
inline std::optional<PersistentTiling> persistent_tiling(const CudaProblem& p, const CudaDevice& device, int grade,
                                                         int blocks, int forced_teams) {
  using Tiling = PersistentTiling;
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Tiling t{};
  t.grade = grade;
  t.states = p.states;
  t.gates = p.gates;
  t.slots = 16 / storage_bytes(p.arithmetic);
  t.units_per_packet = t.slots - (grade == 3);  // one slot tells the step
  const int64_t packets = divide(p.H, t.units_per_packet), per_block = divide(packets, blocks);
  const int vectors = p.pass == Pass::forward ? 1 : p.gates, rows = p.pass == Pass::forward ? p.gates : 1;
  const int64_t weight_tiles = divide(per_block * t.units_per_packet * rows, 16);
  const int64_t tiles_per_warp = weight_tiles_per_warp(p.pass);
  if (weight_tiles > Tiling::kWarps * tiles_per_warp ||
      per_block * t.slots * Tiling::kBatch > Tiling::kItems * Tiling::kThreads)
    return {};
  t.packets_per_block = static_cast<int>(per_block);
  t.blocks = grade == 3 ? static_cast<int>(divide(packets, per_block)) : blocks;
  t.weight_tiles = static_cast<int>(weight_tiles);
  t.warps_m = 1;
  while (t.warps_m * tiles_per_warp < weight_tiles) t.warps_m *= 2;
  t.warps_k = Tiling::kWarps / t.warps_m;
  t.groups = static_cast<int>(divide(int64_t{t.blocks} * per_block * vectors, 4));
  t.groups_per_warp = static_cast<int>(divide(t.groups, t.warps_k));
  t.groups_in_registers = groups_in_registers(p.pass, p.arithmetic);

  const int64_t room = std::max(1, device.multiprocessors / t.blocks);
  const int64_t most_teams = forced_teams > 0 ? std::min<int64_t>(forced_teams, room) : room, eights = divide(p.B, 8);
  int64_t rows_per_team = 8 * divide(eights, most_teams);
  if (rows_per_team > Tiling::kBatch) rows_per_team = Tiling::kBatch * divide(rows_per_team, Tiling::kBatch);
  if (rows_per_team > 1024) return {};
  t.rows_per_team = static_cast<int>(rows_per_team);
  t.teams = static_cast<int>(divide(p.B, rows_per_team));
  if ((grade == 3 ? t.teams * t.blocks : t.blocks) > device.multiprocessors) return {};
  if (t.shared_bytes() > device.shared_per_block) return {};
  return t;
}

// Clock cycles of a step, estimated. PROVISIONAL: throughputs are those of an H100's data sheet, latencies are
// published measurements of others; they rank tilings until this project has measured its own.
inline int64_t estimated_cycles(const PersistentTiling& t, const CudaProblem& p, const CudaDevice& device) {
  using Tiling = PersistentTiling;
  constexpr int kWarpsPerScheduler = Tiling::kWarps / 4;
  constexpr int kSharedBytes = 128, kSharedLatency = 30, kBarrier = 40;  // a cycle; cycles
  constexpr int kCell = 120;                                             // gate maths and stores of one value a thread
  constexpr int kClusterExchange = 400;                                  // stores to another block, and a barrier
  constexpr int kGlobalExchange = 1000;                                  // a store and on average 1.5 loads through L2
  constexpr int kL2Bytes = 3200, kL2BytesPerBlock = 64;                  // a cycle, of the device and of a block
  const int column_tiles = t.columns() / 8, tiles_per_warp = std::min(weight_tiles_per_warp(p.pass), t.weight_tiles);
  const bool plain = p.arithmetic == Arithmetic::fp32;

  const int64_t products = int64_t{t.groups_per_warp} * tiles_per_warp * column_tiles * kWarpsPerScheduler;
  const int64_t product = products * (plain ? 64 : 16);  // of 16 rows, 8 columns and a group, on one scheduler
  const int64_t reads = int64_t{t.groups_per_warp} * column_tiles * (plain ? 8 * 128 : 512) +
                        int64_t{t.groups_in_shared()} * tiles_per_warp * 1024;
  const int64_t operands = std::max(product, reads * Tiling::kWarps / kSharedBytes);
  const int64_t sums = int64_t{t.sums()} * 4 * 2 / kSharedBytes + 2 * kSharedLatency + kBarrier;
  const int64_t cells = (t.items() + Tiling::kThreads - 1) / Tiling::kThreads * kCell;
  const int64_t work = operands + sums + cells, fetched = int64_t{t.operand_packets()} * 16;
  if (t.grade == 1) return t.batch_tiles() * work + kBarrier;
  if (t.grade == 2) return t.batch_tiles() * (work + fetched / (kSharedBytes / 2)) + kClusterExchange;
  const int64_t blocks = std::min(t.teams * t.blocks, device.multiprocessors);
  const int64_t fetch = std::max(fetched / kL2BytesPerBlock, fetched * blocks / kL2Bytes);
  return std::max(t.batch_tiles() * (work + fetch), work + fetch + kGlobalExchange);  // tiles hide each other's latency
}

// The tiling with the fewest cycles.
inline std::optional<PersistentTiling> persistent_tiling(const CudaProblem& p, const CudaDevice& device,
                                                         const CudaForce& force) {
  std::optional<PersistentTiling> best;
  const auto consider = [&](int grade, int blocks, int teams) {
    if ((force.grade != 0 && force.grade != grade) || (force.blocks != 0 && force.blocks != blocks)) return;
    const auto t = persistent_tiling(p, device, grade, blocks, force.teams > 0 ? force.teams : teams);
    if (t && (!best || estimated_cycles(*t, p, device) < estimated_cycles(*best, p, device))) best = t;
  };
  consider(1, 1, 0);
  for (int blocks = 2; device.capability >= 90 && blocks <= PersistentTiling::kMaxCluster; blocks *= 2) {
    consider(2, blocks, 0);
  }
  const int64_t eights = (p.B + 7) / 8;
  for (int teams = 1; teams <= std::min<int64_t>(eights, device.multiprocessors); teams *= 2) {
    consider(3, force.blocks > 0 ? force.blocks : device.multiprocessors / teams, teams);
  }
  return best;
}

// Why the path "gates" serves, whether or not the weight fits on the chip; null where that alone decides. fp32 and tf32
// have the same reasons.
inline const char* reason_for_gates(const CudaProblem& p, const CudaDevice& device, const CudaForce& force) {
  if (force.path == CudaPath::gates) return "forced";
  if (p.arithmetic == Arithmetic::fp64) return "float64 has no persistent kernel";
  if (p.projection) return "a projection has no persistent kernel";
  if (device.capability < 80) return "persistent kernels need sm_80 or later";
  if (p.T == 0 || p.B == 0) return "there is nothing to compute";
  if (!force.path) return "no persistent kernel has been measured on a device of this class yet";
  return nullptr;
}

inline CudaPlan plan_cuda(const CudaProblem& p, const CudaDevice& device, const CudaForce& force = {}) {
  if (const char* reason = reason_for_gates(p, device, force)) return {CudaPath::gates, reason};
  const auto tiling = persistent_tiling(p, device, force);
  if (!tiling) return {CudaPath::gates, "the recurrent weight does not fit on the chip"};
  return {CudaPath::persistent, "forced", *tiling, p.arithmetic};
}

}  // namespace fastrnn
