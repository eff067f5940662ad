// SPDX-License-Identifier: BSD-3-Clause
// Admits blocks to the emulated device and runs their threads turn by turn.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "grid.h"

namespace fastrnn::emulation {
namespace {

constexpr DeviceLimits kDevices[] = {
    // name, multiprocessors, threads and blocks of one, shared memory of one and of a block, L2 cache, cluster, parts
    {"h200", 132, 2048, 32, 228 * 1024, 227 * 1024, 50 << 20, 16, 8},
    {"a100", 108, 2048, 32, 164 * 1024, 163 * 1024, 40 << 20, 1, 7},
    {"l4", 58, 1536, 24, 100 * 1024, 99 * 1024, 48 << 20, 1, 5},
};
constexpr size_t kReservedSharedPerBlock = 1024;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr size_t kMaxGridYZ = 65535;
constexpr unsigned kLiveBlocks = 64;  // of a launch that is not cooperative: bounds the memory of the emulation
constexpr size_t kKeptThreads =
    4096;  // ThreadSanitizer knows at most 8128 at once, and forgets those that are destroyed
constexpr uint64_t kRandomDelay = 2048;  // turns; bounded, so that polling threads cannot starve the others
constexpr uint64_t kYieldedKey = uint64_t{1} << 62;

uint64_t launches = 0;
std::string error_of_last_launch;

const DeviceLimits* find_device(const char* name) {
  for (const DeviceLimits& device : kDevices) {
    if (std::strcmp(device.name, name) == 0) return &device;
  }
  std::fprintf(stderr, "FASTRNN_EMULATION_DEVICE: expected h200, a100 or l4, got %s\n", name);
  std::abort();
}

Schedule find_schedule(const char* name) {
  const char* const names[] = {"round_robin", "random", "priority"};
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(names[i], name) == 0) return static_cast<Schedule>(i);
  }
  std::fprintf(stderr, "FASTRNN_EMULATION_SCHEDULE: expected round_robin, random or priority, got %s\n", name);
  std::abort();
}

const char* environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Why every device would refuse the launch; empty if it would not.
std::string mistake(const GridLaunch& launch) {
  const DeviceLimits& device = *config().device;
  const size_t threads = launch.block.count();
  if (launch.grid.count() == 0 || launch.grid.y > kMaxGridYZ || launch.grid.z > kMaxGridYZ) return "invalid grid";
  if (threads == 0 || threads > kMaxThreadsPerBlock) return "invalid block of " + std::to_string(threads) + " threads";
  if (launch.shared_bytes > device.shared_per_block) {
    return std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory, the device has " +
           std::to_string(device.shared_per_block);
  }
  if (launch.grid.x % launch.cluster.x || launch.grid.y % launch.cluster.y || launch.grid.z % launch.cluster.z) {
    return "the grid is not a multiple of the cluster";
  }
  return "";
}

// Why this device has no room for it; empty if it has.
std::string no_room(const GridLaunch& launch, size_t resident) {
  const DeviceLimits& device = *config().device;
  if (launch.cluster.count() > device.cluster_blocks) {
    return "cluster of " + std::to_string(launch.cluster.count()) + " blocks, the device allows " +
           std::to_string(device.cluster_blocks);
  }
  if (launch.cluster.count() > 1 && launch.cluster.count() > resident) {
    return "cluster of " + std::to_string(launch.cluster.count()) + " blocks, " + std::to_string(resident) +
           " fit on the device";
  }
  if (launch.cooperative && launch.grid.count() > resident) {
    return "cooperative launch of " + std::to_string(launch.grid.count()) + " blocks, " + std::to_string(resident) +
           " fit on the device";
  }
  return "";
}

void thread_entry() {
  Thread& thread = self();
  tsan_acquire(&grid->start);
  grid->body(grid->argument);
  if (!thread.open_copies.empty() || !thread.copy_groups.empty()) {
    fail("a thread ends with cp.async copies that it never waited for", thread.where);
  }
  tsan_release(&grid->end);
  thread.fiber.finish();
}

uint64_t random_priority(int shift) { return (grid->random() & 0xFFFF) << shift; }

std::unique_ptr<Block> make_block(Dim index, std::shared_ptr<Cluster> cluster) {
  const Dim shape = grid->launch.block;
  auto block = std::make_unique<Block>();
  block->index = index;
  block->cluster = std::move(cluster);
  block->live = shape.count();
  block->warps.resize((block->live + 31) / 32);
  const uint64_t block_priority = random_priority(32);
  uint64_t warp_priority = 0;
  for (unsigned i = 0; i < block->live; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->thread = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread->block = index;
    thread->home = block.get();
    thread->warp = i / 32;
    thread->lane = i % 32;
    if (thread->lane == 0) warp_priority = random_priority(16);
    thread->priority = block_priority | warp_priority | random_priority(0);
    block->warps[thread->warp].lanes |= 1u << thread->lane;
    make_ready(thread.get());
    block->threads.push_back(std::move(thread));
  }
  grid->live_threads += block->live;
  return block;
}

// Brings clusters onto the device, in an order that follows from the seed.
class Admission {
 public:
  explicit Admission(size_t resident) : resident_(resident) {
    const GridLaunch& launch = grid->launch;
    for (unsigned z = 0; z < launch.grid.z; z += launch.cluster.z) {
      for (unsigned y = 0; y < launch.grid.y; y += launch.cluster.y) {
        for (unsigned x = 0; x < launch.grid.x; x += launch.cluster.x) waiting_.push_back({x, y, z});
      }
    }
    if (config().schedule == Schedule::kRoundRobin) {
      std::reverse(waiting_.begin(), waiting_.end());
    } else {
      std::shuffle(waiting_.begin(), waiting_.end(), grid->random);
    }
  }

  void admit() {
    const Dim shape = grid->launch.cluster;
    while (!waiting_.empty() && (admitted_ == 0 || admitted_ + shape.count() <= resident_)) {
      const Dim corner = waiting_.back();
      waiting_.pop_back();
      auto cluster = std::make_shared<Cluster>();
      for (unsigned rank = 0; rank < shape.count(); ++rank) {
        const Dim index{corner.x + rank % shape.x, corner.y + rank / shape.x % shape.y,
                        corner.z + rank / shape.x / shape.y};
        grid->blocks.push_back(make_block(index, cluster));
        cluster->blocks.push_back(grid->blocks.back().get());
      }
      cluster->barrier.expected = static_cast<unsigned>(shape.count() * grid->launch.block.count());
      admitted_ += shape.count();
    }
  }

  void leave() { --admitted_; }

 private:
  std::vector<Dim> waiting_;
  size_t admitted_ = 0, resident_;
};

void finish_block(Block& block) {
  check_arrays_of(block);
  block.statics.clear();
  block.dynamics.clear();
}

// Threads that have ended stay known to ThreadSanitizer, so that their accesses can still race, up to a limit.
void forget_old_threads() {
  size_t kept = 0;
  for (auto block = grid->blocks.rbegin(); block != grid->blocks.rend(); ++block) {
    if ((*block)->live == 0 && (kept += (*block)->threads.size()) > kKeptThreads) (*block)->threads.clear();
  }
}

std::string deadlock() {
  std::map<std::string, std::pair<size_t, const Thread*>> places;
  for (const auto& block : grid->blocks) {
    for (const auto& thread : block->threads) {
      if (thread->fiber.finished()) continue;
      auto& place = places[std::string(thread->waits_in) + " at " + describe(thread->where)];
      if (place.first++ == 0) place.second = thread.get();
    }
  }
  std::string what = "deadlock; waiting:";
  for (const auto& [name, place] : places) {
    what += "\n    " + std::to_string(place.first) + " threads in " + name + ", first " + describe(*place.second);
  }
  return what;
}

void run_threads(Admission& admission) {
  admission.admit();
  while (grid->error.empty() && !grid->ready.empty()) {
    Thread* thread = grid->ready.top().thread;
    grid->ready.pop();
    thread->waits_in = nullptr;
    grid->running = thread;
    thread->fiber.resume(thread_entry);
    grid->running = nullptr;
    if (!thread->fiber.finished()) continue;
    grid->idle = 0;
    --grid->live_threads;
    if (--thread->home->live == 0 && grid->error.empty()) {
      finish_block(*thread->home);
      forget_old_threads();
      admission.leave();
      admission.admit();
    }
  }
  if (grid->error.empty() && grid->live_threads) set_error(deadlock());
}

}  // namespace

Grid* grid = nullptr;

void set_error(const std::string& what) {
  const char* const schedules[] = {"round_robin", "random", "priority"};
  grid->error = "emulation: kernel launched at " + describe(grid->launch.where) + ": " + what + " [seed " +
                std::to_string(config().seed) + ", launch " + std::to_string(launches) + ", schedule " +
                schedules[static_cast<int>(config().schedule)] + ", device " + config().device->name + "]";
}

Config& config() {
  static Config current = [] {
    Config initial;
    initial.seed = std::strtoull(environment("FASTRNN_EMULATION_SEED", "0"), nullptr, 0);
    initial.schedule = find_schedule(environment("FASTRNN_EMULATION_SCHEDULE", "round_robin"));
    initial.device = find_device(environment("FASTRNN_EMULATION_DEVICE", "h200"));
    initial.resident_blocks =
        static_cast<unsigned>(std::strtoul(environment("FASTRNN_EMULATION_RESIDENT_BLOCKS", "0"), nullptr, 0));
    return initial;
  }();
  return current;
}

const ThreadPosition& position() { return self(); }
const GridLaunch& current_launch() { return grid->launch; }
unsigned lane_id() { return self().lane; }

size_t resident_blocks(const GridLaunch& launch) {
  const DeviceLimits& device = *config().device;
  const size_t cluster = launch.cluster.count(), threads = (launch.block.count() + 31) / 32 * 32;
  if (cluster > device.cluster_blocks) return 0;
  if (config().resident_blocks) return config().resident_blocks / cluster * cluster;
  const size_t per_multiprocessor = std::min(
      {device.threads_per_multiprocessor / std::max<size_t>(threads, 1), size_t{device.blocks_per_multiprocessor},
       device.shared_per_multiprocessor / (launch.shared_bytes + kReservedSharedPerBlock)});
  if (cluster == 1) return per_multiprocessor * device.multiprocessors;
  size_t resident = 0;
  for (unsigned part = 0; part < device.parts; ++part) {
    const unsigned pairs = (device.multiprocessors / 2 + part) / device.parts;
    resident += per_multiprocessor * 2 * pairs / cluster * cluster;
  }
  return resident;
}

const std::string& last_error() { return error_of_last_launch; }

std::string describe(Location where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

std::string describe(const Thread& thread) {
  const auto dim = [](Dim d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  return "block " + dim(thread.block) + " thread " + dim(thread.thread);
}

void make_ready(Thread* thread, bool yielded) {
  uint64_t key = ++grid->turn;
  if (config().schedule == Schedule::kRandom) key += grid->random() % kRandomDelay;
  if (config().schedule == Schedule::kPriority) key = yielded ? kYieldedKey + ++grid->yields : thread->priority;
  grid->ready.push({key, grid->turn, thread});
}

void wait_in(const char* what, Location where) {
  Thread& thread = self();
  thread.waits_in = what;
  thread.where = where;
  thread.fiber.suspend();
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) make_ready(thread);
  waiting.clear();
  grid->idle = 0;
}

void poll(Location where) {
  {
    Quiet quiet;
    const uint64_t patience = 100000 + 200 * grid->live_threads;
    if (++grid->idle > patience) {
      fail("no progress: every running thread polls memory (an arrival is missing, or blocks are not co-resident)",
           where);
    }
    make_ready(&self(), true);
  }
  wait_in("a polling loop", where);
}

void fail(const std::string& what, Location where) {
  set_error(what + " [" + describe(where) + (grid->running ? ", " + describe(self()) : "") + "]");
  if (grid->running) self().fiber.suspend();  // never resumed
  std::abort();
}

Outcome run_grid(const GridLaunch& launch, void (*body)(void*), void* argument) {
  Quiet quiet;
  Grid state;
  state.launch = launch;
  state.body = body;
  state.argument = argument;
  state.random.seed((config().seed << 20) + ++launches);
  grid = &state;
  Outcome outcome = Outcome::kCompleted;
  const size_t resident = resident_blocks(launch);
  const std::string wrong = mistake(launch), too_large = wrong.empty() ? no_room(launch, resident) : "";
  if (!wrong.empty() || !too_large.empty()) {
    outcome = wrong.empty() ? Outcome::kNoRoom : Outcome::kRefused;
    set_error("refused: " + wrong + too_large);
  } else {
    const bool all_live = launch.cooperative || config().resident_blocks;
    Admission admission(all_live ? resident : std::min<size_t>(resident, kLiveBlocks));
    tsan_release(&state.start);
    run_threads(admission);
    tsan_acquire(&state.end);
    if (state.error.empty()) check_readonly();
    if (!state.error.empty()) outcome = Outcome::kAborted;
  }
  grid = nullptr;
  error_of_last_launch = state.error;
  return outcome;
}

}  // namespace fastrnn::emulation

// What the environment variables set, for tests that go through many settings in one process. resident_blocks: 0 as the
// device. The count of launches starts again, so that the same settings give the same order.
extern "C" void fastrnn_emulation_configure(uint64_t seed, const char* schedule, const char* device,
                                            unsigned resident_blocks) {
  using namespace fastrnn::emulation;
  config() = {seed, find_schedule(schedule), find_device(device), resident_blocks};
  launches = 0;
}
