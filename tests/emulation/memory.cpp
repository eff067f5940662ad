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
  tsan_note_read(copy.source, copy.bytes);
  tsan_note_write(copy.target, copy.bytes);
  Quiet quiet;
  std::memcpy(copy.target, copy.source, copy.bytes);
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

void cp_async(void* target, const void* source, size_t bytes, Location where) {
  const CpAsync request{target, source, bytes};
  bool early;
  {
    Quiet quiet;
    require_shared(target, "cp.async", where);
    require_alignment(target, bytes, "cp.async", where);
    require_alignment(source, bytes, "cp.async", where);
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

}  // namespace fastrnn::emulation
