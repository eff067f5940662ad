// SPDX-License-Identifier: BSD-3-Clause
// Scratch memory of the CPU kernels. Blocks are kept by the thread that took them: a fresh block of some megabytes
// costs a page fault every 4 KB, which is more than a short sequence takes to run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "../pages.h"

namespace fastrnn {

class ScratchBlocks {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static ScratchBlocks& of_this_thread() {
    thread_local ScratchBlocks blocks;
    return blocks;
  }

  Block take(size_t at_least) {
    const size_t bytes = (at_least + kAlign - 1) / kAlign * kAlign;
    const auto fits = [&](const Block& b) { return b.bytes >= bytes && b.bytes / 2 <= bytes; };
    const auto found = std::find_if(free_.begin(), free_.end(), fits);
    if (found != free_.end()) {
      const Block block = *found;
      free_.erase(found);
      kept_ -= block.bytes;
      return block;
    }
    void* data = std::aligned_alloc(kAlign, bytes);
    if (!data) throw std::bad_alloc();
    ask_for_large_pages(data, bytes);
    return {data, bytes};
  }

  void give_back(Block block) {
    if (block.bytes > kKeep) return std::free(block.data);  // none of the others has to go for it
    free_.push_back(block);
    kept_ += block.bytes;
    while (kept_ > kKeep) {  // the oldest first
      kept_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.erase(free_.begin());
    }
  }

  ~ScratchBlocks() {
    for (const Block& block : free_) std::free(block.data);
  }

 private:
  static constexpr size_t kAlign = 64;           // a cache line, and the widest vector
  static constexpr size_t kKeep = 160ull << 20;  // per thread: what an LSTM with I = H = 2048 takes
  std::vector<Block> free_;
  size_t kept_ = 0;
};

// Uninitialised, returned to the thread that took it: to be destroyed there.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : block_(ScratchBlocks::of_this_thread().take(std::max<size_t>(1, static_cast<size_t>(count)) * sizeof(T))) {}
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() {
    if (block_.data) ScratchBlocks::of_this_thread().give_back(block_);
  }
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  ScratchBlocks::Block block_;
};

}  // namespace fastrnn
