// SPDX-License-Identifier: BSD-3-Clause
// The state of a running grid, shared by the sources of the runtime.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace fastrnn::emulation {

struct Block;

// An object for ThreadSanitizer to hang a vector clock on.
struct Clock {
  char place = 0;
};
// One clock for even and one for odd generations: the arrival of a fast thread at the next barrier must not order the
// waking of a slow thread from this one.
using ClockPair = Clock[2];

struct CpAsync {
  void* target;
  const void* source;
  size_t bytes;
};

struct Thread : ThreadPosition {
  Fiber fiber;
  Block* home = nullptr;
  unsigned warp = 0, lane = 0;
  uint64_t priority = 0;
  const char* waits_in = nullptr;  // null: it can run
  Location where{"", 0};

  std::vector<CpAsync> open_copies;
  std::vector<std::vector<CpAsync>> copy_groups;

  bool cluster_arrived = false;
  unsigned cluster_generation = 0;

  const void* recently_read[4] = {};  // by atomics: what a fence after them acquires
  unsigned reads = 0;
  bool fenced = false;
  Clock fence_clock;
};

struct Barrier {
  unsigned arrived = 0, expected = 0, generation = 0;
  std::vector<Thread*> waiting;
  Location first{"", 0};
  ClockPair clock;
  struct {
    int count, all, any;
  } reduction[2] = {};
};

// Lanes of one warp that meet in a primitive with one mask.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* name = "";
  unsigned generation = 0;
  Location where{"", 0};
  void* io[32] = {};
  Thread* lane[32] = {};
  ClockPair clock;
};

struct Warp {
  uint32_t lanes = 0;
  std::deque<Meeting> meetings;
};

struct SharedArray {
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, nullptr};
  size_t bytes = 0;
  bool contains(const void* p) const { return p >= memory.get() && p < memory.get() + bytes; }
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  Dim index;
  std::shared_ptr<Cluster> cluster;
  std::vector<std::unique_ptr<Thread>> threads;
  size_t live = 0;
  std::vector<Warp> warps;
  Barrier barrier;  // __syncthreads
  std::map<unsigned, Barrier> named;
  std::map<const void*, SharedArray> statics;  // by the declaration's key
  std::map<size_t, SharedArray> dynamics;      // by offset
  size_t static_bytes = 0;
};

struct Ready {
  uint64_t key, order;
  Thread* thread;
  bool operator<(const Ready& other) const {  // for a priority_queue whose top is the smallest
    return key != other.key ? key > other.key : order > other.order;
  }
};

struct Grid {
  GridLaunch launch;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::mt19937_64 random;
  std::string error;

  std::deque<std::unique_ptr<Block>> blocks;
  std::priority_queue<Ready> ready;
  uint64_t turn = 0, yields = 0;
  uint64_t idle = 0;  // polls since anything else happened
  Thread* running = nullptr;
  size_t live_threads = 0;

  std::map<const void*, std::vector<char>> readonly;
  Clock start, end;
};

// The grid that runs, or null.
extern Grid* grid;

inline Thread& self() { return *grid->running; }
std::string describe(Location);
std::string describe(const Thread&);

// Scheduling.
void make_ready(Thread*, bool yielded = false);
void wait_in(const char* what, Location);
void wake(std::vector<Thread*>& waiting);

// Between threads and memory.
void check_arrays_of(const Block&);  // of shared memory
void check_readonly();
void set_error(const std::string& what);

}  // namespace fastrnn::emulation
