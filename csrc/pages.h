// SPDX-License-Identifier: BSD-3-Clause
// Large pages for large blocks of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn {

// Asks for large pages, where `bytes` are many. Memory is mapped when it is first written, a page at a time: for what a
// layer keeps for its backward pass, megabytes that are new at every call, small pages take as long as a tenth of the
// training step. A hint: nothing else changes, and whoever maps memory may ignore it.
inline void ask_for_large_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kLeast = 2 * kPage;
  if (bytes < kLeast) return;
  const auto address = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastrnn
