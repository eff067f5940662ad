// SPDX-License-Identifier: BSD-3-Clause
// Shared memory, the order of memory accesses, and asynchronous copies.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "grid.h"

namespace fastrnn::emulation {
namespace {

constexpr size_t kStaticSharedLimit = 48 * 1024;
constexpr size_t kDynamicAlignment = 128;

// Behind every array of shared memory, where AddressSanitizer does not watch its end.
constexpr char kGuard = 0x5C;
#ifdef FASTRNN_EMULATION_ASAN
constexpr size_t kGuardBytes = 0;
#else
constexpr size_t kGuardBytes = 256;
#endif

// Fresh shared memory is never zero: mostly bytes of NaNs, the rest random.
SharedArray make_shared(size_t bytes, size_t alignment) {
  SharedArray array;
  array.bytes = bytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes + kGuardBytes)) throw std::bad_alloc();
  array.memory = {static_cast<char*>(memory), std::free};
  std::memset(array.memory.get() + bytes, kGuard, kGuardBytes);
  for (size_t i = 0; i < bytes; ++i) {
    array.memory.get()[i] = grid->random() % 4 ? '\xFF' : static_cast<char>(grid->random());
  }
  return array;
}

bool guard_intact(const SharedArray& array) {
  const char* guard = array.memory.get() + array.bytes;
  return std::all_of(guard, guard + kGuardBytes, [](char byte) { return byte == kGuard; });
}

const SharedArray* find_array(const Block& block, const void* pointer) {
  for (const auto& [key, array] : block.statics) {
    if (array.contains(pointer)) return &array;
  }
  for (const auto& [offset, array] : block.dynamics) {
    if (array.contains(pointer)) return &array;
  }
  return nullptr;
}

Block* find_home(const void* pointer) {
  for (Block* block : self().home->cluster->blocks) {
    if (block->live && find_array(*block, pointer)) return block;
  }
  return nullptr;
}

// The array of `block` under the key that `pointer` has in `mine`; made if that block has not come to declare it.
template <typename Key>
char* counterpart(const std::map<Key, SharedArray>& mine, std::map<Key, SharedArray>& other, const void* pointer) {
  for (const auto& [key, array] : mine) {
    if (!array.contains(pointer)) continue;
    auto it = other.find(key);
    if (it == other.end()) it = other.emplace(key, make_shared(array.bytes, kDynamicAlignment)).first;
    return it->second.memory.get() + (static_cast<const char*>(pointer) - array.memory.get());
  }
  return nullptr;
}

void land(const CpAsync& copy) {
  tsan_note_read(copy.source, copy.valid);
  tsan_note_write(copy.target, copy.bytes);
  Quiet quiet;
  std::memcpy(copy.target, copy.source, copy.valid);
  std::memset(static_cast<char*>(copy.target) + copy.valid, 0, copy.bytes - copy.valid);
}

// Created from the scheduler's identity, which knows nothing that the threads did. Kept when the copy is done, so that
// its accesses can still race, up to a limit.
void* new_identity() {
  constexpr size_t kKept = 1024;
  if (grid->identities.size() == kKept) {
    TsanIdentity::destroy(grid->identities.front());
    grid->identities.pop_front();
  }
  void* const caller = TsanIdentity::current();
  TsanIdentity::enter(grid->scheduler);
  grid->identities.push_back(TsanIdentity::create());
  TsanIdentity::enter(caller);
  return grid->identities.back();
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

void* static_shared(const void* key, size_t bytes, size_t alignment, Location where) {
  Quiet quiet;
  Block& block = *self().home;
  auto it = block.statics.find(key);
  if (it == block.statics.end()) {
    block.static_bytes += bytes;
    if (block.static_bytes > kStaticSharedLimit) fail("more than 48 KB of static shared memory", where);
    if (block.static_bytes + grid->launch.shared_bytes > config().device->shared_per_block) {
      fail("static and dynamic shared memory together exceed the device's", where);
    }
    it = block.statics.emplace(key, make_shared(bytes, std::max<size_t>(alignment, 16))).first;
  }
  return it->second.memory.get();
}

void* dynamic_shared(size_t offset, size_t bytes, Location where) {
  Quiet quiet;
  Block& block = *self().home;
  if (offset + bytes > grid->launch.shared_bytes) {
    fail("takes " + std::to_string(offset + bytes) + " bytes of dynamic shared memory, the launch gave " +
             std::to_string(grid->launch.shared_bytes),
         where);
  }
  auto it = block.dynamics.find(offset);
  if (it == block.dynamics.end()) it = block.dynamics.emplace(offset, make_shared(bytes, kDynamicAlignment)).first;
  if (it->second.bytes != bytes) fail("threads take different arrays of dynamic shared memory", where);
  return it->second.memory.get();
}

void* map_shared_rank(const void* pointer, unsigned rank, Location where) {
  Quiet quiet;
  Block& block = *self().home;
  if (rank >= block.cluster->blocks.size()) fail("no block of rank " + std::to_string(rank) + " in the cluster", where);
  Block& other = *block.cluster->blocks[rank];
  if (!other.live) fail("distributed shared memory of a block that has exited", where);
  char* mapped = counterpart(block.statics, other.statics, pointer);
  if (!mapped) mapped = counterpart(block.dynamics, other.dynamics, pointer);
  if (!mapped) fail("map_shared_rank of an address outside this block's shared memory", where);
  return mapped;
}

void require_shared(const void* pointer, const char* what, Location where) {
  Quiet quiet;
  if (!find_array(*self().home, pointer)) fail(std::string(what) + ": expected an address in shared memory", where);
}

void require_alignment(const void* pointer, size_t bytes, const char* what, Location where) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail(std::string(what) + ": address not aligned to " + std::to_string(bytes) + " bytes", where);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Order

void fence(Location) {
  Thread& thread = self();
  tsan_release(&thread.fence_clock);
  thread.fenced = true;
  for (unsigned i = 0; i < std::min(thread.reads, 4u); ++i) tsan_acquire(thread.recently_read[i]);
}

void note_atomic_write(const void* address) {
  grid->idle = 0;
  if (self().fenced) tsan_release(address);
}

void note_atomic_read(const void* address) {
  Thread& thread = self();
  thread.recently_read[thread.reads++ % 4] = address;
}

void note_release(const void* address, Scope scope) {
  Quiet quiet;
  note_atomic_write(address);
  grid->releases[address] = {self().home->cluster.get(), scope};
}

void check_acquire(const void* address, Scope scope, Location where) {
  Quiet quiet;
  const auto it = grid->releases.find(address);
  if (it == grid->releases.end() || it->second.cluster == self().home->cluster.get()) return;
  if (scope == Scope::kCluster || it->second.scope == Scope::kCluster) {
    fail("release and acquire in two clusters need gpu scope on both sides", where);
  }
}

void note_readonly(const void* address, size_t bytes) {
  Quiet quiet;
  const char* begin = static_cast<const char*>(address);
  grid->readonly.emplace(address, std::vector<char>(begin, begin + bytes));
}

void check_readonly() {
  Quiet quiet;
  for (const auto& [address, seen] : grid->readonly) {
    if (std::memcmp(address, seen.data(), seen.size()) == 0) continue;
    set_error("memory read through the read-only path was written by the same launch");
    return;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

void cp_async(void* target, const void* source, size_t bytes, size_t valid, Location where) {
  const CpAsync request{target, source, bytes, valid};
  bool early;
  {
    Quiet quiet;
    require_shared(target, "cp.async", where);
    require_alignment(target, bytes, "cp.async", where);
    if (valid) require_alignment(source, bytes, "cp.async", where);
    if (valid > bytes) fail("cp.async: more valid bytes than bytes", where);
    self().where = where;
    early = config().schedule != Schedule::kRoundRobin && grid->random() % 4 == 0;
    if (!early) self().open_copies.push_back(request);
  }
  if (early) land(request);
}

void cp_async_commit() {
  Quiet quiet;
  Thread& thread = self();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void cp_async_wait(unsigned pending) {
  Thread& thread = self();
  while (thread.copy_groups.size() > pending) {
    std::vector<CpAsync> group;
    {
      Quiet quiet;
      group = std::move(thread.copy_groups.front());
      thread.copy_groups.erase(thread.copy_groups.begin());
    }
    for (const CpAsync& copy : group) land(copy);
  }
}

void fence_proxy_async() { tsan_release(&grid->proxy); }

void bulk_copy(void* target, const void* source, const void* value, size_t bytes, void* barrier, Location where) {
  Quiet quiet;
  auto request = std::make_unique<BulkCopy>();
  request->target = target;
  request->source = source;
  request->barrier = barrier;
  request->late = config().schedule == Schedule::kRoundRobin || grid->random() % 2;
  request->staging.resize(bytes);
  request->home = find_home(target);
  if (!request->home) fail("asynchronous copy: expected a target in the shared memory of this cluster", where);
  if (find_home(barrier) != request->home)
    fail("asynchronous copy: expected the mbarrier in the target's block", where);
  if (grid->mbarriers.find(barrier) == grid->mbarriers.end())
    fail("no mbarrier was initialised at this address", where);
  if (source) {
    require_alignment(target, 16, "bulk copy", where);
    require_alignment(source, 16, "bulk copy", where);
    request->source_home = find_home(source);
    if (bytes % 16 || bytes == 0) fail("bulk copy: expected a multiple of 16 bytes", where);
  } else {
    require_alignment(target, bytes, "st.async", where);
    std::memcpy(request->staging.data(), value, bytes);
  }
  void* const caller = TsanIdentity::current();
  tsan_release(&request->call);
  request->reader = new_identity();
  TsanIdentity::enter(request->reader);
  tsan_acquire(&grid->start);
  tsan_acquire(&grid->proxy);
  request->writer = new_identity();
  TsanIdentity::enter(request->writer);
  tsan_acquire(&request->call);
  TsanIdentity::enter(caller);
  grid->copies.push_back(std::move(request));
}

bool deliver_one_copy(bool even_late) {
  std::vector<size_t> candidates;
  for (size_t i = 0; i < grid->copies.size(); ++i) {
    if (even_late || !grid->copies[i]->late) candidates.push_back(i);
  }
  if (candidates.empty()) return false;
  const size_t chosen = candidates[grid->random() % candidates.size()];
  const std::unique_ptr<BulkCopy> copy = std::move(grid->copies[chosen]);
  grid->copies.erase(grid->copies.begin() + static_cast<std::ptrdiff_t>(chosen));
  void* const scheduler = TsanIdentity::current();
  if (copy->source) {
    TsanIdentity::enter(copy->reader);
    tsan_note_read(copy->source, copy->staging.size());
    Quiet quiet;
    std::memcpy(copy->staging.data(), copy->source, copy->staging.size());
    mbarrier_release(copy->barrier);
  }
  TsanIdentity::enter(copy->writer);
  {
    tsan_note_write(copy->target, copy->staging.size());
    Quiet quiet;
    std::memcpy(copy->target, copy->staging.data(), copy->staging.size());
    mbarrier_release(copy->barrier);
    mbarrier_count_bytes(copy->barrier, copy->staging.size());
  }
  TsanIdentity::enter(scheduler);
  return true;
}

void check_arrays_of(const Block& block) {
  const size_t given = grid->launch.shared_bytes;
  const size_t taken =
      block.dynamics.empty() ? 0 : block.dynamics.rbegin()->first + block.dynamics.rbegin()->second.bytes;
  if (taken < given) {
    set_error("takes " + std::to_string(taken) + " bytes of dynamic shared memory, the launch gave " +
              std::to_string(given) + ": more than it needs");
  }
  for (const auto& [key, array] : block.statics) {
    if (!guard_intact(array)) set_error("writes past the end of a static array of shared memory");
  }
  for (const auto& [offset, array] : block.dynamics) {
    if (!guard_intact(array)) {
      set_error("writes past the end of the array at byte " + std::to_string(offset) + " of dynamic shared memory");
    }
  }
}

void check_copies_of(const Block& block) {
  for (const auto& copy : grid->copies) {
    if (copy->home == &block) set_error("a block exits while a copy into its shared memory is in flight");
    if (copy->source_home == &block) set_error("a block exits while a copy out of its shared memory is in flight");
  }
}

}  // namespace fastrnn::emulation
