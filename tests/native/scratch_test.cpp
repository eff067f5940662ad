// SPDX-License-Identifier: BSD-3-Clause
// What one call gives back the next one finds, however small; a block far too large stays for who needs it; and one
// beyond what is kept drives none of the others out.
#include "cpu/scratch.h"

#include <cstdio>

using fastrnn::ScratchBlocks;

int main() {
  int failures = 0;
  ScratchBlocks blocks;
  for (const size_t bytes : {size_t{1}, size_t{31}, size_t{64}, size_t{65}, size_t{1000}, size_t{1} << 20}) {
    const ScratchBlocks::Block first = blocks.take(bytes);
    blocks.give_back(first);
    const ScratchBlocks::Block second = blocks.take(bytes);
    if (second.data != first.data) {
      std::printf("%zu bytes were not found again\n", bytes);
      ++failures;
    }
    blocks.give_back(second);
  }
  const ScratchBlocks::Block large = blocks.take(4 << 20);
  blocks.give_back(large);
  const ScratchBlocks::Block other = blocks.take(3 << 18);
  if (other.data == large.data) {
    std::printf("a block of 4 MB was taken for less than one\n");
    ++failures;
  }
  blocks.give_back(other);
  blocks.give_back(blocks.take(size_t{161} << 20));
  if (blocks.take(4 << 20).data != large.data) {
    std::printf("a block beyond what is kept drove out the others\n");
    ++failures;
  }
  return failures > 0;
}
