// SPDX-License-Identifier: BSD-3-Clause
// Runs a grid of CUDA threads on the CPU: every CUDA thread is a fiber, one OS thread runs them all, and the order in
// which they run, the contents of fresh shared memory and the moments at which asynchronous copies land follow from a
// seed.
//
// This is what cuda_language.h and emulated_device.h are written on. No CUDA header here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastrnn::emulation {

// A place in a kernel's source. As the default argument of a function it is the place of the call.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  size_t count() const { return static_cast<size_t>(x) * y * z; }
};

// Which threads run when.
enum class Schedule {
  kRoundRobin,
  kRandom,    // each turn is late by a bounded random amount
  kPriority,  // fixed random priorities of blocks, warps and threads: some block or warp lags far behind the others
};

// What a device refuses. The numbers of real ones are in scheduler.cpp.
struct DeviceLimits {
  const char* name;
  unsigned multiprocessors;
  unsigned threads_per_multiprocessor;
  unsigned blocks_per_multiprocessor;
  size_t shared_per_multiprocessor;
  size_t shared_per_block;
  int l2_bytes;
  unsigned cluster_blocks;  // 1: no clusters
  unsigned parts;           // that a cluster lies within one of: GPCs, of as many pairs of multiprocessors as can be
};

// Read at every launch. From the environment at first: FASTRNN_EMULATION_SEED (a number), FASTRNN_EMULATION_SCHEDULE
// (round_robin, random, priority), FASTRNN_EMULATION_DEVICE (h200, a100, l4) and FASTRNN_EMULATION_RESIDENT_BLOCKS.
struct Config {
  uint64_t seed =
      0;  // launch n of a process uses seed and n, so that one run sees many orders and a second run the same
  Schedule schedule = Schedule::kRoundRobin;
  const DeviceLimits* device = nullptr;
  unsigned resident_blocks = 0;  // overrides what fits on the device; 0: as the device
};
Config& config();

struct GridLaunch {
  Dim grid, block, cluster;
  size_t shared_bytes = 0;
  bool cooperative = false;
  Location where = Location::here();
};

// What a kernel sees of its own position.
struct ThreadPosition {
  Dim thread, block;
};
const ThreadPosition& position();
const GridLaunch& current_launch();
unsigned lane_id();

// Other than completed: last_error() says why. Refused: the launch is wrong on any device; no room: on this one.
enum class Outcome { kCompleted, kRefused, kNoRoom, kAborted };
size_t resident_blocks(const GridLaunch&);  // how many of its blocks the device holds at once
Outcome run_grid(const GridLaunch&, void (*body)(void*), void* argument);
const std::string& last_error();

// Aborts the launch from inside a kernel.
[[noreturn]] void fail(const std::string& what, Location);

// ---------------------------------------------------------------------------------------------------------------------
// Synchronisation

// All lanes of `mask` meet; the last one runs `combine` on what every lane brought.
using Combine = void (*)(void* const lanes[32], uint32_t mask);
void warp_collective(const char* name, uint32_t mask, void* io, Combine combine, bool orders_memory, Location);

void block_barrier(Location);
enum class Reduction { kCount, kAnd, kOr };
int block_reduce(bool predicate, Reduction, Location);
void named_barrier(unsigned id, unsigned threads, bool wait, Location);
void cluster_arrive(Location);
void cluster_wait(Location);

// A step of a spin loop: lets others run.
void poll(Location);

// ---------------------------------------------------------------------------------------------------------------------
// Memory. Every array of shared memory is an allocation of its own, so that AddressSanitizer sees its bounds.

void* static_shared(const void* key, size_t bytes, size_t alignment, Location);
void* dynamic_shared(size_t offset, size_t bytes, Location);
void* map_shared_rank(const void* pointer, unsigned rank, Location);
void require_shared(const void* pointer, const char* what, Location);  // of this block
void require_alignment(const void* pointer, size_t bytes, const char* what, Location);

void fence(Location);                         // orders earlier accesses before later atomics, and the reverse
void note_atomic_write(const void* address);  // before the write
void note_atomic_read(const void* address);   // after the read

// Reads through the read-only path must not see memory that the same launch writes: verified when the launch ends.
void note_readonly(const void* address, size_t bytes);

// cp.async: lands at the earliest or, by seed, at the latest legal moment.
void cp_async(void* target, const void* source, size_t bytes, Location);
void cp_async_commit();
void cp_async_wait(unsigned pending);

}  // namespace fastrnn::emulation
