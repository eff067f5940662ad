// SPDX-License-Identifier: BSD-3-Clause
// Which path runs a problem on CUDA, and why: pure functions of sizes and machine facts, so that they can be asked and
// tested anywhere.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "cells/math.h"
#include "plan.h"

namespace fastrnn {

// How the recurrent product is computed; sums are in float, double is served by the path "gates" alone.
enum class Arithmetic { fp16, bf16, tf32, fp32, fp64 };
constexpr int storage_bytes(Arithmetic a) {
  return a == Arithmetic::fp64 ? 8 : a == Arithmetic::tf32 || a == Arithmetic::fp32 ? 4 : 2;
}

enum class CudaPath { gates, persistent };

struct CudaProblem {
  int64_t T, B, H;
  int gates, states;
  bool projection;
  Arithmetic arithmetic;
  Pass pass;
  int layers = 1;  // layers of these sizes that share the device
};

struct CudaDevice {
  int capability;        // 90 for sm_90
  int multiprocessors;   // that this process may use
  int shared_per_block;  // bytes, the most that a kernel may ask for
  int l2_bytes;
  // Of 2, 4, 8 and 16 blocks that have a multiprocessor each: how many run at once. A cluster lies within one of the
  // parts that a device is made of, so multiprocessors are left over, and devices differ in how large their parts are.
  std::array<int, 4> clusters;
  bool measured = false;             // whether persistent kernels have been timed on devices of this class
  bool wavefronts_measured = false;  // and wavefronts of them

  int teams_at_once(int grade, int blocks) const {
    if (grade != 2) return multiprocessors / blocks;
    for (int i = 0; i < 4; ++i) {
      if (blocks == 2 << i) return clusters[i];
    }
    return 0;
  }
};

// What tests and the benchmark ask for; the default leaves everything to the plan.
struct CudaForce {
  std::optional<CudaPath> path;
  int grade = 0;              // 0: any
  int blocks = 0;             // of a team; 0: as few as hold the weights
  int teams = 0;              // at most; 0: as many as the device has room for
  int groups_in_shared = -1;  // at most, of a warp; -1: as many as shared memory has room for
  int chunks = 0;             // of a wavefront; 1: none; 0: as the plan finds
};

// How the persistent kernels share a layer. Hidden states travel in packets of 16 bytes: units_per_packet neighbouring
// units of one row of the batch. A block owns packets_per_block packets, so some hidden units with all their gates, and
// their rows of the weight; its warps share the product as warps_m groups of rows by warps_k slices of its depth. The
// blocks of a team exchange states with each other and with nobody else.
//
// A warp holds the weight of the first groups of its slice in registers, of the next ones in shared memory. What is
// left is streamed: it lies in global memory, where the L2 cache keeps it, and passes through kStages places of shared
// memory at every step.
struct PersistentTiling {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBatch = 16;      // rows of the batch that a product takes at once
  static constexpr int kItems = 4;       // values of one tile of the batch that a thread owns, at most
  static constexpr int kSumStride = 17;  // kBatch, padded against bank conflicts
  static constexpr int kMaxCluster = 16;
  static constexpr int kStages = 4;    // groups of a warp's weight that are on their way: hides the latency of L2
  static constexpr int kInFlight = 4;  // packets of the operand that a thread asks for before it looks at the first
  static constexpr int kWindow = 4;    // groups of a small window

  int grade;  // 1: a team is one block; 2: a cluster; 3: blocks anywhere on the device
  int layers;
  int teams, blocks;  // of a layer; of a team
  int rows_per_team;  // of the batch, a multiple of 8
  int slots;          // values that a packet has room for
  int units_per_packet, packets_per_block;
  int weight_tiles;      // of 16 rows: the rows of the weight that a block owns
  int groups;            // of 4 packets: the depth of the product
  int warps_m, warps_k;  // warps_m * warps_k == kWarps
  int groups_per_warp, groups_in_registers, groups_in_shared;
  int window;  // groups of a warp whose operand grade 3 fetches at once: all, or kWindow to leave the weight more room
  int states;
  int gates;

  FASTRNN_HD int all_teams() const { return layers * teams; }
  FASTRNN_HD int batch_tiles() const { return (rows_per_team + kBatch - 1) / kBatch; }
  FASTRNN_HD int column_bits() const { return rows_per_team < kBatch ? 3 : 4; }
  FASTRNN_HD int columns() const { return 1 << column_bits(); }                   // rows of the batch in a tile
  FASTRNN_HD int items() const { return packets_per_block * columns() * slots; }  // of a tile
  FASTRNN_HD int groups_on_chip() const { return groups_in_registers + groups_in_shared; }  // of a warp, at most
  FASTRNN_HD int groups_streamed() const {                                                  // of a warp
    return groups_per_warp > groups_on_chip() ? groups_per_warp - groups_on_chip() : 0;
  }
  FASTRNN_HD int packets_of(int groups) const { return groups * weight_tiles * 64; }  // of the weight, of warps_m warps
  FASTRNN_HD int operand_packets() const { return groups * columns() * 4; }           // of one tile of the batch
  // Elements of the arrays in shared memory, in the order in which persistent_kernel takes them; the emulation fails
  // where shared_bytes() is not the end of the last one.
  FASTRNN_HD int weight_places() const {
    return warps_k * packets_of(groups_in_shared + (groups_streamed() > 0 ? kStages : 0));
  }
  FASTRNN_HD int operand_places() const {
    return grade == 3 ? warps_k * window * columns() * 4 : 2 * batch_tiles() * operand_packets();
  }
  FASTRNN_HD int sums() const { return warps_k * weight_tiles * 16 * kSumStride; }  // twice
  FASTRNN_HD int state_values() const { return states * batch_tiles() * items(); }
  FASTRNN_HD int biases() const { return gates * packets_per_block * slots; }
  int64_t shared_bytes() const {
    const auto aligned = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
    return aligned(int64_t{weight_places()} * 16) + aligned(int64_t{operand_places()} * 16) +
           aligned(int64_t{sums()} * 2 * 4) + aligned(int64_t{state_values()} * 4) + int64_t{biases()} * 4;
  }
  // Packets in global memory through which a team of grade 3 exchanges: two buffers for each tile of each team.
  int64_t exchange_packets() const {
    return grade == 3 ? int64_t{2} * all_teams() * batch_tiles() * operand_packets() : 0;
  }
  // Packets in global memory that are streamed, of all blocks.
  int64_t streamed_packets() const { return int64_t{all_teams()} * blocks * warps_k * packets_of(groups_streamed()); }
};

struct CudaPlan {
  CudaPath path;
  std::string reason;
  // of the path "persistent"
  PersistentTiling tiling = {};
  Arithmetic arithmetic = {};
};

// 16-row tiles of the weight that a warp owns, and groups of packets whose weights it holds in registers: 8 registers
// for each group of each tile.
FASTRNN_HD constexpr int weight_tiles_per_warp(Pass pass) { return pass == Pass::forward ? 2 : 1; }
FASTRNN_HD constexpr int groups_in_registers(Pass pass, Arithmetic a) {
  // Sums of plain multiply-adds take more registers themselves; 16 leave too few for what else a thread of an LSTM
  // holds.
  const int fragments = a == Arithmetic::fp32 ? 8 : 15;
  return fragments / weight_tiles_per_warp(pass);
}

constexpr int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounding up

// With grade 3 one slot tells the step.
constexpr int units_per_packet(Arithmetic a, int grade) { return 16 / storage_bytes(a) - (grade == 3); }
// Of the weight, for a packet that a block owns.
constexpr int rows_per_packet(const CudaProblem& p, int grade) {
  return units_per_packet(p.arithmetic, grade) * (p.pass == Pass::forward ? p.gates : 1);
}

// Gives each group of the weight its place. As much as possible stays on the chip; a smaller window of the operand goes
// before streaming. Whether there is room at all.
inline bool place_groups(PersistentTiling& t, const CudaDevice& device, int most_in_shared) {
  using Tiling = PersistentTiling;
  const int overflow = std::max(0, t.groups_per_warp - t.groups_in_registers);
  const auto fits = [&](int window, int in_shared) {
    t.window = window;
    t.groups_in_shared = in_shared;
    return t.shared_bytes() <= device.shared_per_block;
  };
  const bool all_in_shared = most_in_shared < 0 || most_in_shared >= overflow;
  if (all_in_shared && fits(t.groups_per_warp, overflow)) return true;
  const int window = t.grade == 3 ? std::min(t.groups_per_warp, Tiling::kWindow) : t.groups_per_warp;
  if (all_in_shared && fits(window, overflow)) return true;
  if (overflow == 0 || !fits(window, 0)) return false;
  const int64_t room = (device.shared_per_block - t.shared_bytes()) / (int64_t{t.warps_k} * t.packets_of(1) * 16);
  t.groups_in_shared = static_cast<int>(std::min<int64_t>(room, overflow - 1));
  if (most_in_shared >= 0) t.groups_in_shared = std::min(t.groups_in_shared, most_in_shared);
  return true;
}

// The tiling with teams of that many blocks, or nothing when a block's share is too large for it.
inline std::optional<PersistentTiling> persistent_tiling(const CudaProblem& p, const CudaDevice& device,
                                                         const CudaForce& force, int grade, int blocks,
                                                         int wanted_teams) {
  using Tiling = PersistentTiling;
  Tiling t{};
  t.grade = grade;
  t.layers = p.layers;
  t.states = p.states;
  t.gates = p.gates;
  t.slots = 16 / storage_bytes(p.arithmetic);
  t.units_per_packet = units_per_packet(p.arithmetic, grade);
  const int64_t packets = divide(p.H, t.units_per_packet), per_block = divide(packets, blocks);
  const int vectors = p.pass == Pass::forward ? 1 : p.gates;
  const int64_t weight_tiles = divide(per_block * rows_per_packet(p, grade), 16);
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

  const int at_once = device.teams_at_once(grade, t.blocks), room = std::max(1, at_once / t.layers);
  if (force.teams > 0) wanted_teams = force.teams;
  const int64_t most_teams = wanted_teams > 0 ? std::min(wanted_teams, room) : room, eights = divide(p.B, 8);
  int64_t rows_per_team = 8 * divide(eights, most_teams);
  if (rows_per_team > Tiling::kBatch) rows_per_team = Tiling::kBatch * divide(rows_per_team, Tiling::kBatch);
  if (rows_per_team > 1024) return {};
  t.rows_per_team = static_cast<int>(rows_per_team);
  t.teams = static_cast<int>(divide(p.B, rows_per_team));
  if (t.all_teams() > at_once) return {};  // those of grade 3 wait for each other, others would take turns
  if (!place_groups(t, device, force.groups_in_shared)) return {};
  // More would come from memory at every step; a quarter of the cache is for what else passes through it.
  if (t.streamed_packets() * 16 > device.l2_bytes / 4 * 3) return {};
  return t;
}

// Clock cycles, estimated. PROVISIONAL: throughputs are those of an H100's data sheet, latencies are published
// measurements of others; they rank tilings and paths until this project has measured its own.
inline constexpr int kLaunchCycles = 8000;                    // of a kernel by the host, its operators included
inline constexpr int kL2Bytes = 3200, kL2BytesPerBlock = 64;  // a cycle, of the device and of a block
inline constexpr int kMemoryBytes = 1900;                     // a cycle
inline constexpr int kWarpsPerScheduler = PersistentTiling::kWarps / 4;

// To bring so many bytes through L2 to each block.
inline int64_t l2_cycles(const PersistentTiling& t, const CudaDevice& device, int64_t bytes) {
  const int64_t at_once = std::min<int64_t>(int64_t{t.all_teams()} * t.blocks, device.multiprocessors);
  return std::max(bytes / kL2BytesPerBlock, bytes * at_once / kL2Bytes);
}

inline int64_t step_cycles(const PersistentTiling& t, const CudaProblem& p, const CudaDevice& device) {
  using Tiling = PersistentTiling;
  constexpr int kSharedBytes = 128, kSharedLatency = 30, kBarrier = 40;  // a cycle; cycles
  // Instructions of a thread, counted in the machine code for sm_90a: for a value, and for each of its gates; to ask
  // for a packet of grade 3, look at it and put it down. A scheduler starts one of one of its warps a cycle.
  constexpr int kValue = 120, kGate = 110, kPacket = 75;
  constexpr int kClusterExchange = 400;  // stores to another block, and a barrier
  constexpr int kGlobalExchange = 1000;  // a store and on average 1.5 loads through L2
  constexpr int kL2Latency = 600;
  const int column_tiles = t.columns() / 8, tiles_per_warp = std::min(weight_tiles_per_warp(p.pass), t.weight_tiles);
  const bool plain = p.arithmetic == Arithmetic::fp32;

  const int64_t products = int64_t{t.groups_per_warp} * tiles_per_warp * column_tiles * kWarpsPerScheduler;
  const int64_t product = products * (plain ? 64 : 16);  // of 16 rows, 8 columns and a group, on one scheduler
  const int64_t reads = int64_t{t.groups_per_warp} * column_tiles * (plain ? 8 * 128 : 512) +
                        (int64_t{t.groups_in_shared} + 2 * t.groups_streamed()) * tiles_per_warp * 1024;
  const int64_t streamed = l2_cycles(t, device, int64_t{t.warps_k} * t.packets_of(t.groups_streamed()) * 16);
  const int64_t operands = std::max({product, reads * Tiling::kWarps / kSharedBytes, streamed});
  const int64_t sums = int64_t{t.sums()} * 4 * 2 / kSharedBytes + 2 * kSharedLatency + kBarrier;
  const int64_t cells = divide(t.items(), Tiling::kThreads) * kWarpsPerScheduler * (kValue + kGate * p.gates);
  const int64_t work = operands + sums + cells, fetched = int64_t{t.operand_packets()} * 16;
  if (t.grade == 1) return t.batch_tiles() * work + kBarrier;
  if (t.grade == 2) return t.batch_tiles() * (work + fetched / (kSharedBytes / 2)) + kClusterExchange;
  const int64_t turns = divide(int64_t{t.window} * t.columns() * 4, int64_t{t.warps_m} * 32 * Tiling::kInFlight) *
                        divide(t.groups_per_warp, t.window);
  const int64_t packets = divide(int64_t{t.groups_per_warp} * t.columns() * 4, int64_t{t.warps_m} * 32);  // of a thread
  const int64_t fetch =
      std::max({l2_cycles(t, device, fetched), (turns - 1) * kL2Latency, packets * kWarpsPerScheduler * kPacket});
  return std::max(t.batch_tiles() * (work + fetch), work + fetch + kGlobalExchange);  // tiles hide each other's latency
}

// Of a pass: the launches, bringing the weight onto the chip, and the steps.
inline int64_t pass_cycles(const PersistentTiling& t, const CudaProblem& p, const CudaDevice& device) {
  constexpr int kValue = 10;                  // instructions of a thread for a value of the weight
  const int launches = t.grade == 3 ? 2 : 1;  // the first makes what is exchanged zero
  const int64_t packets = int64_t{t.groups_per_warp} * std::min(weight_tiles_per_warp(p.pass), t.weight_tiles) * 2;
  const int64_t weight = p.layers * p.gates * p.H * p.H * storage_bytes(p.arithmetic);
  const int64_t start = std::max({packets * t.slots * kValue * kWarpsPerScheduler, weight / kMemoryBytes,
                                  l2_cycles(t, device, int64_t{t.warps_k} * t.packets_of(t.groups_per_warp) * 16)});
  const int64_t rounds = p.T + (p.pass == Pass::backward);
  return launches * kLaunchCycles + start + rounds * step_cycles(t, p, device);
}

// Of a pass on the path "gates": at each step the host launches a product and a kernel, while the device is at those
// before; a device that is slower waits for memory, or for the product's multiply-adds.
inline int64_t gates_cycles(const CudaProblem& p, const CudaDevice& device) {
  constexpr int kKernel = 4000;  // of the device, from one kernel to the next
  // Multiply-adds of a multiprocessor in a cycle.
  const int rate = p.arithmetic == Arithmetic::fp32 ? 128 : p.arithmetic == Arithmetic::tf32 ? 512 : 1024;
  const int64_t weights = p.gates * p.H * p.H, weight_bytes = weights * storage_bytes(p.arithmetic);
  const int64_t values = p.B * p.H * (2 * p.gates + 4 * p.states) * storage_bytes(p.arithmetic);
  const int64_t product = std::max(p.B * weights / (int64_t{rate} * device.multiprocessors),
                                   weight_bytes / (weight_bytes < device.l2_bytes ? kL2Bytes : kMemoryBytes));
  return p.layers * p.T * std::max<int64_t>(2 * kLaunchCycles, product + values / kL2Bytes + 2 * kKernel);
}

// The tiling with the fewest cycles.
inline std::optional<PersistentTiling> persistent_tiling(const CudaProblem& p, const CudaDevice& device,
                                                         const CudaForce& force) {
  std::optional<PersistentTiling> best;
  const auto consider = [&](int grade, int blocks, int teams) {
    if ((force.grade != 0 && force.grade != grade) || (force.blocks != 0 && force.blocks != blocks)) return;
    const auto t = persistent_tiling(p, device, force, grade, blocks, teams);
    if (t && (!best || pass_cycles(*t, p, device) < pass_cycles(*best, p, device))) best = t;
  };
  consider(1, 1, 0);
  for (int blocks = 2; blocks <= PersistentTiling::kMaxCluster; blocks *= 2) consider(2, blocks, 0);
  // As many blocks as there are; or fewer that own as many packets as fill the 16-row tiles of the weight that they
  // would take anyway.
  const int64_t packets = divide(p.H, units_per_packet(p.arithmetic, 3)), rows = rows_per_packet(p, 3);
  const int64_t eights = divide(p.B, 8);
  for (int teams = 1; teams <= std::min<int64_t>(eights, device.multiprocessors / p.layers); teams *= 2) {
    const int most = force.blocks > 0 ? force.blocks : device.multiprocessors / (teams * p.layers);
    consider(3, most, teams);
    consider(3, static_cast<int>(divide(packets, divide(divide(packets, most) * rows, 16) * 16 / rows)), teams);
  }
  return best;
}

// Why the path "gates" serves, whether or not the weight fits on the device; null where that alone decides. fp32 and
// tf32 have the same reasons.
inline const char* reason_for_gates(const CudaProblem& p, const CudaDevice& device, const CudaForce& force) {
  if (force.path == CudaPath::gates) return "forced";
  if (p.arithmetic == Arithmetic::fp64) return "float64 has no persistent kernel";
  if (p.projection) return "a projection has no persistent kernel";
  if (device.capability < 80) return "persistent kernels need sm_80 or later";
  if (p.T == 0 || p.B == 0) return "there is nothing to compute";
  if (!force.path && !device.measured) return "no persistent kernel has been measured on a device of this class yet";
  return nullptr;
}

inline CudaPlan plan_cuda(const CudaProblem& p, const CudaDevice& device, const CudaForce& force = {}) {
  if (const char* reason = reason_for_gates(p, device, force)) return {CudaPath::gates, reason};
  const auto tiling = persistent_tiling(p, device, force);
  if (!tiling) return {CudaPath::gates, "the recurrent weight does not fit on the chip, nor what is left of it in L2"};
  if (p.layers > 1 && force.chunks < 2) {
    CudaProblem alone = p;
    alone.layers = 1;
    const auto t = persistent_tiling(alone, device, force);
    if (t && p.layers * pass_cycles(*t, alone, device) < pass_cycles(*tiling, p, device)) {
      return {CudaPath::gates, "one after the other is faster"};
    }
  }
  std::string reason = force.path ? "forced" : "it is estimated to be the faster path";
  if (gates_cycles(p, device) <= pass_cycles(*tiling, p, device)) {
    const bool slow = gates_cycles(p, device) <= p.T * step_cycles(*tiling, p, device);
    const char* why = slow ? "its steps are estimated to be faster"
                           : "the sequence is too short to pay for bringing the recurrent weight onto the chip";
    if (!force.path) return {CudaPath::gates, why};
    reason += slow ? "; steps of path gates are estimated to be faster"
                   : "; path gates is estimated to be faster for a sequence this short";
  }
  if (tiling->groups_streamed() > 0) reason += "; a part of the recurrent weight is read from L2 at each step";
  return {CudaPath::persistent, reason, *tiling, p.arithmetic};
}

// Two layers of a stack as a wavefront over chunks of time: while the upper one runs a chunk, the lower one runs the
// next, in the same launch.
struct Wavefront {
  int64_t steps;  // of a chunk; 0: one layer after the other
  std::string reason;
};

// PROVISIONAL. Of a wave, by the host, which makes it while the device is at the one before: 0.1 ms.
inline constexpr int kWaveCycles = 200000;

// p: of one of the layers; where it asks for backward, forward counts too.
inline Wavefront plan_wavefront(const CudaProblem& p, const CudaDevice& device, const CudaForce& force = {}) {
  constexpr int kMostChunks = 64;
  const bool forced = force.chunks > 0;
  if (force.chunks == 1) return {0, "forced"};
  if (!forced && !device.wavefronts_measured) {
    return {0, "no wavefront has been measured on a device of this class yet"};
  }
  std::string problem;
  const auto cycles_of = [&](int layers, int64_t T, int64_t least) -> std::optional<int64_t> {
    int64_t cycles = 0;
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      if (pass == Pass::backward && p.pass == Pass::forward) break;
      CudaProblem launch = p;
      launch.layers = layers;
      launch.T = T;
      launch.pass = pass;
      const CudaPlan plan = plan_cuda(launch, device, force);
      if (plan.path != CudaPath::persistent) {
        problem = plan.reason;
        return {};
      }
      cycles += std::max(least, pass_cycles(plan.tiling, launch, device));
    }
    return cycles;
  };
  const auto one = cycles_of(1, p.T, 0);
  if (!one) return {0, problem};
  const char* const in_turn = "one layer after the other is estimated to be faster";
  Wavefront best{0, in_turn};
  int64_t fewest = 2 * *one;
  for (int64_t chunks = forced ? force.chunks : 2; chunks <= (forced ? force.chunks : kMostChunks); chunks *= 2) {
    const int64_t steps = divide(p.T, chunks);
    const auto wave = cycles_of(2, steps, kWaveCycles);
    const int64_t waves = divide(p.T, steps) + 1;  // the first and the last of one layer alone
    const bool faster = wave && waves * *wave < fewest;
    if (forced && !wave) return {0, problem};
    if (forced) return {steps, faster ? "forced" : std::string("forced; ") + in_turn};
    if (!faster) continue;
    fewest = waves * *wave;
    best = {steps, "it is estimated to be faster"};
  }
  return best;
}

}  // namespace fastrnn
