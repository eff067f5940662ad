// SPDX-License-Identifier: BSD-3-Clause
// The shares of threads: together they are the whole, once; and none has far more than its part.
#include <cstdio>
#include <vector>

#include "plan.h"

using fastrnn::ProductShares;

namespace {

int failures = 0;
void expect(bool holds, const char* what, int64_t a, int64_t b, int64_t threads) {
  if (holds) return;
  std::printf("%s: %ld, %ld, %ld threads\n", what, static_cast<long>(a), static_cast<long>(b),
              static_cast<long>(threads));
  ++failures;
}

void units_are_shared_by_vectors() {
  for (const int64_t units : {1, 16, 17, 64, 129, 512}) {
    for (const int64_t shares : {1, 2, 3, 16}) {
      expect(fastrnn::unit_share(units, 16, 0, shares) == 0, "units begin", units, 16, shares);
      expect(fastrnn::unit_share(units, 16, shares, shares) == units, "units end", units, 16, shares);
      for (int64_t i = 0; i < shares; ++i) {
        const int64_t begin = fastrnn::unit_share(units, 16, i, shares),
                      end = fastrnn::unit_share(units, 16, i + 1, shares);
        const int64_t most = ((units + 15) / 16 + shares - 1) / shares * 16;
        expect(begin % 16 == 0 || begin == units, "units on a vector", units, 16, shares);
        expect(begin <= end && end - begin <= most, "units of a share", units, 16, shares);
      }
    }
  }
}

// most_of_ideal: what the busiest thread may have, of an even share of all blocks.
void product_is_shared(int64_t rows, int64_t columns, int64_t threads, double most_of_ideal) {
  constexpr int64_t kRows = 16, kColumns = 64;
  const ProductShares shares(rows, kRows, columns, kColumns, threads);
  expect(shares.count() >= 1 && shares.count() <= threads, "number of shares", rows, columns, threads);
  std::vector<int> times(rows * columns, 0);
  int64_t busiest = 0;
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  for (int64_t i = 0; i < shares.count(); ++i) {
    const ProductShares::Share s = shares[i];
    for (int64_t r = s.row_begin; r < s.row_end; ++r) {
      for (int64_t c = s.column_begin; c < s.column_end; ++c) ++times[r * columns + c];
    }
    busiest =
        std::max(busiest, blocks(s.row_end - s.row_begin, kRows) * blocks(s.column_end - s.column_begin, kColumns));
  }
  for (const int n : times) expect(n == 1, "times", rows, columns, threads);
  const double ideal =
      static_cast<double>(blocks(rows, kRows) * blocks(columns, kColumns)) / static_cast<double>(threads);
  expect(static_cast<double>(busiest) <= most_of_ideal * std::max(1.0, ideal), "busiest", rows, columns, threads);
}

}  // namespace

int main() {
  units_are_shared_by_vectors();
  for (const int64_t threads : {1, 2, 4, 8, 16, 64}) {
    product_is_shared(1024, 256, threads, 1.0);  // gradients of the weights of an LSTM, a GRU and an RNN
    product_is_shared(768, 256, threads, 1.0);
    product_is_shared(256, 256, threads, 1.0);
    product_is_shared(1600, 400, threads, 1.3);
    product_is_shared(100, 64, threads, 1.15);
    product_is_shared(16, 1024, threads, 1.0);
    product_is_shared(1, 1, threads, 1.0);
    product_is_shared(0, 64, threads, 1.0);
    product_is_shared(64, 0, threads, 1.0);
  }
  product_is_shared(1000, 300, 7, 1.3);
  return failures > 0;
}
