// SPDX-License-Identifier: BSD-3-Clause
// Barriers and warp primitives.
#include <string>

#include "grid.h"

namespace fastrnn::emulation {
namespace {

bool same(Location a, Location b) { return a.line == b.line && std::string(a.file) == b.file; }

void complete(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  wake(barrier.waiting);
}

// Arrives, and waits if asked. The last to arrive does not run on by right: it takes its turn like those it wakes.
void arrive(Barrier& barrier, bool wait, const char* what, Location where) {
  const Clock* clock = &barrier.clock[barrier.generation & 1];
  tsan_release(clock);
  if (wait) barrier.waiting.push_back(&self());
  if (++barrier.arrived == barrier.expected) complete(barrier);
  if (!wait) return;
  wait_in(what, where);
  tsan_acquire(clock);
}

void meet_at_block_barrier(Location where) {
  Barrier& barrier = self().home->barrier;
  barrier.expected = static_cast<unsigned>(self().home->threads.size());
  if (barrier.arrived == 0) {
    barrier.first = where;
  } else if (!same(barrier.first, where)) {
    fail("threads of one block meet in different barriers: here and at " + describe(barrier.first), where);
  }
  arrive(barrier, true, "__syncthreads", where);
}

}  // namespace

void warp_collective(const char* name, uint32_t mask, void* io, Combine combine, bool orders_memory, Location where) {
  Quiet quiet;
  Thread& thread = self();
  Warp& warp = thread.home->warps[thread.warp];
  mask &= warp.lanes;
  if (!(mask >> thread.lane & 1)) fail(std::string(name) + " by a lane that its mask leaves out", where);
  Meeting* meeting = nullptr;
  for (Meeting& known : warp.meetings) {
    if (known.mask == mask) meeting = &known;
  }
  if (!meeting) {
    meeting = &warp.meetings.emplace_back();
    meeting->mask = mask;
  }
  if (meeting->arrived == 0) {
    meeting->name = name;
    meeting->where = where;
  } else if (std::string(meeting->name) != name || !same(meeting->where, where)) {
    fail(std::string("lanes of one warp meet in different primitives: ") + name + " here and " + meeting->name +
             " at " + describe(meeting->where),
         where);
  }
  meeting->io[thread.lane] = io;
  meeting->lane[thread.lane] = &thread;
  meeting->arrived |= 1u << thread.lane;
  const Clock* clock = &meeting->clock[meeting->generation & 1];
  if (orders_memory) tsan_release(clock);
  if (meeting->arrived == mask) {
    if (combine) combine(meeting->io, mask);
    meeting->arrived = 0;
    ++meeting->generation;
    grid->idle = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) make_ready(meeting->lane[lane]);
    }
  }
  wait_in(name, where);
  if (orders_memory) tsan_acquire(clock);
}

void block_barrier(Location where) {
  Quiet quiet;
  meet_at_block_barrier(where);
}

int block_reduce(bool predicate, Reduction reduction, Location where) {
  Quiet quiet;
  Barrier& barrier = self().home->barrier;
  auto& result = barrier.reduction[barrier.generation & 1];
  if (barrier.arrived == 0) result = {0, 1, 0};
  result.count += predicate;
  result.all &= predicate;
  result.any |= predicate;
  meet_at_block_barrier(where);
  return reduction == Reduction::kCount ? result.count : reduction == Reduction::kAnd ? result.all : result.any;
}

void named_barrier(unsigned id, unsigned threads, bool wait, Location where) {
  Quiet quiet;
  if (id < 1 || id > 15) fail("named barrier " + std::to_string(id) + ": expected 1..15", where);
  if (threads == 0 || threads % 32) fail("a named barrier counts whole warps, got " + std::to_string(threads), where);
  Barrier& barrier = self().home->named[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.first = where;
  } else if (barrier.expected != threads) {
    fail("named barrier of " + std::to_string(threads) + " threads, " + std::to_string(barrier.expected) + " at " +
             describe(barrier.first),
         where);
  }
  arrive(barrier, wait, "named_barrier_sync", where);
}

void cluster_arrive(Location where) {
  Quiet quiet;
  Thread& thread = self();
  Barrier& barrier = thread.home->cluster->barrier;
  if (thread.cluster_arrived) fail("cluster_arrive twice without cluster_wait", where);
  thread.cluster_arrived = true;
  thread.cluster_generation = barrier.generation;
  arrive(barrier, false, "cluster_arrive", where);
}

void cluster_wait(Location where) {
  Quiet quiet;
  Thread& thread = self();
  Barrier& barrier = thread.home->cluster->barrier;
  if (!thread.cluster_arrived) fail("cluster_wait without cluster_arrive", where);
  thread.cluster_arrived = false;
  if (barrier.generation == thread.cluster_generation) {
    barrier.waiting.push_back(&thread);
    wait_in("cluster_wait", where);
  }
  tsan_acquire(&barrier.clock[thread.cluster_generation & 1]);
}

}  // namespace fastrnn::emulation
