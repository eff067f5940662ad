// SPDX-License-Identifier: BSD-3-Clause
// How the CPU runs a problem, and why: pure functions of sizes and machine facts, so that they can be asked and tested
// anywhere. cuda_plan.h is the same of CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastrnn {

enum class Pass { forward, backward };

// How the threads of the CPU share a layer. Rows of the batch need no synchronisation at all; hidden units need one
// barrier per step, but read each weight in one thread only.
enum class Split { rows, units };

struct CpuProblem {
  int64_t T, B, I, H, P;
  int gates;
  int threads;                // that the framework allows
  bool two_products = false;  // a step has a second one, of what the first one gave
  bool normalises = false;    // the products of a row, all of them together
  int layers = 1;             // 1, or 2 of these sizes that do not wait for each other
  bool widens = false;        // weights are of 16 bits, which products read as float
  Pass pass = Pass::forward;
  bool packed = false;  // the weights are there packed as well

  constexpr int64_t recurrent_weights() const { return gates * H * P + (P != H || two_products ? P * H : 0); }
  // Of a layer, in multiply-adds: to read a weight for the first time takes as long as to multiply with it once.
  constexpr int64_t work() const { return (T * B + 1) * (recurrent_weights() + gates * H * I); }
};

struct CpuPlan {
  Split split;
  int threads;  // of a layer
  const char* reason;
  bool pack_input, pack_recurrent;  // whether W_ih and W_hh are packed before use, or read where they are
  bool side_by_side = false;        // whether both layers run at once
};

// Starting a parallel region costs about what one thread does in 0.3 million multiply-adds; on a busy machine, a slice
// of a core's time. Two threads gain it back with twice as many.
constexpr bool worth_threads(int64_t multiply_adds) { return multiply_adds >= 600'000; }

// Packing a weight costs about what this many rows cost that are multiplied with it.
inline constexpr int64_t kRowsWorthPacking = 16;
// Where the weight is, each of them reads a block of its rows anew, and long ones do not fit the nearest cache.
constexpr int64_t rows_worth_packing(int64_t K) { return K > 512 ? kRowsWorthPacking / 2 : kRowsWorthPacking; }

// Packed weights are float: from rows of this length on, a single row reads 16-bit ones, half as many bytes, in less
// time where they are.
inline constexpr int64_t kRowWorthWidening = 192;
// Rows that no cache holds a single one reads sooner where they are: memory answers many streams faster than one.
inline constexpr int64_t kWeightsInLastCache = 6 << 20;

constexpr bool packs_input(const CpuProblem& p) {
  if (!p.packed) return p.T * p.B >= rows_worth_packing(p.I);
  if (p.T * p.B > 1) return true;
  return !(p.widens && p.I >= kRowWorthWidening) && p.gates * p.H * p.I <= kWeightsInLastCache;
}

// Whether W_hh is packed before use, or read where it is.
constexpr bool packs_recurrent(const CpuProblem& p) {
  // Backward reads W_hh by panels of columns, each from all rows. Where their pages are more than the 3072 of 4 KB that
  // a processor keeps the addresses of, a step takes three times as long as with a packed weight.
  constexpr int64_t kBytesOfKnownPages = 12 << 20, kStepsWorthPages = 4;
  const int64_t bytes = p.recurrent_weights() * (p.widens ? 2 : 4);
  if (p.pass == Pass::backward && bytes > kBytesOfKnownPages && p.T >= kStepsWorthPages) return true;
  if (p.B > 1) {
    return p.packed || p.T * p.B >= (p.pass == Pass::forward ? rows_worth_packing(p.P) : kRowsWorthPacking);
  }

  // A single row reads a weight nearly as fast where it is.
  if (p.widens && p.P >= kRowWorthWidening) return false;
  // Columns are read as fast where they are as long as the second cache holds them.
  constexpr int64_t kWeightsInSecondCache = 1 << 18;
  if (p.pass == Pass::backward) return p.T >= 24 && p.recurrent_weights() > kWeightsInSecondCache;
  return (p.packed || p.T >= 64) && p.recurrent_weights() <= kWeightsInLastCache;
}

inline CpuPlan plan_layer(const CpuProblem& p) {
  // A barrier costs about what one thread does with 4096 weights read from its cache.
  constexpr int64_t kMinimumWeightsPerThread = 4096;
  constexpr int64_t kUnitsOfVector = 16;  // the widest: what cannot be divided
  const auto plan = [&](Split split, int64_t threads, const char* reason) {
    return CpuPlan{split, static_cast<int>(threads), reason, packs_input(p), packs_recurrent(p)};
  };

  if (p.threads <= 1) return plan(Split::rows, 1, "one thread is allowed");
  if (!worth_threads(p.work())) return plan(Split::rows, 1, "too little work for a second thread");
  // In a short sequence each weight is packed and read by one thread alone, for few barriers: one step needs none.
  constexpr int64_t kFewSteps = 20, kUnitsPerThread = 128;  // a panel has up to 64 units
  const bool splits_units = p.P == p.H && !p.two_products && !p.normalises;
  const int64_t vectors = (p.H + kUnitsOfVector - 1) / kUnitsOfVector;
  if (p.pass == Pass::forward && p.T <= kFewSteps && splits_units && p.H >= kUnitsPerThread * p.threads) {
    return plan(Split::units, p.threads, "few steps: threads share the hidden units");
  }
  // From here on the weights are read from cache often enough per step that reading them in every thread is free. Where
  // they are more than a thread's own cache holds, threads read them from the one that they share, and need more rows
  // for it, many threads the most (from its bandwidth; not measured): unless units come out uneven, each keeps its part
  // of them. Of two threads with 4 to 8 rows each, those that share units of so many weights take 0.87 to 1.04 of the
  // time.
  constexpr int64_t kWeightsInOwnCache = 1 << 18, kWeightsBeyondOwnCache = 3 << 17, kFewThreads = 4;
  const int64_t most_vectors = (vectors + p.threads - 1) / p.threads;
  const bool keeps_units = splits_units && 8 * most_vectors * p.threads <= 9 * vectors;
  const bool is_many = p.threads > kFewThreads;
  const bool reads_shared_cache =
      keeps_units && p.recurrent_weights() > (is_many ? kWeightsInOwnCache : kWeightsBeyondOwnCache);
  const int64_t rows_per_thread = !reads_shared_cache ? 4 : is_many ? 16 : 10;
  if (p.B >= rows_per_thread * p.threads) return plan(Split::rows, p.threads, "enough rows for every thread");
  if (!splits_units) {
    const char* reason = p.two_products ? "two products a step split by rows only"
                         : p.normalises ? "layer normalisation splits by rows only"
                                        : "a projection splits by rows only";
    return plan(Split::rows, std::min<int64_t>(p.threads, p.B), reason);
  }
  const int64_t by_units =
      std::min({int64_t{p.threads}, p.B * p.recurrent_weights() / kMinimumWeightsPerThread, vectors});
  const int64_t by_rows = std::min<int64_t>(p.threads, p.B / rows_per_thread);
  if (by_units > by_rows && by_units > 1) {
    return plan(Split::units, by_units, "few rows: threads share the hidden units");
  }
  return plan(Split::rows, std::max<int64_t>(by_rows, 1), "few rows and few units");
}

// Two layers at once: half of the threads wait less for each other than all of them. But each then holds twice as much
// of a weight: beyond what its cache holds, one layer after the other is faster. Of an odd number of threads one would
// be left over.
inline CpuPlan plan_cpu(const CpuProblem& p) {
  constexpr int64_t kCachedWeights = 1 << 17;
  const CpuPlan in_turn = plan_layer(p);
  if (p.layers < 2 || p.threads < 2) return in_turn;
  CpuProblem half = p;
  half.threads = p.threads / 2;
  const bool shares_units =
      in_turn.split == Split::units && p.threads % 2 == 0 && p.recurrent_weights() <= half.threads * kCachedWeights;
  const bool leaves_half_idle = in_turn.threads <= half.threads && worth_threads(2 * p.work());
  if (!shares_units && !leaves_half_idle) return in_turn;
  CpuPlan beside = plan_layer(half);
  beside.side_by_side = true;
  beside.reason = leaves_half_idle ? "threads would be left idle: both directions at once"
                                   : "few rows: both directions at once, each on half of the threads";
  return beside;
}

// The first of the units of a share, whole vectors of them; of share number `shares`, the end of all.
constexpr int64_t unit_share(int64_t units, int64_t vector, int64_t share, int64_t shares) {
  return std::min(units, (units + vector - 1) / vector * share / shares * vector);
}

// How threads share a product over all steps: blocks of its rows and, where these are too few, of its columns.
class ProductShares {
 public:
  struct Share {
    int64_t row_begin, row_end, column_begin, column_end;
  };

  // What a thread does for each of its blocks of rows or columns beside their products is counted in products of a
  // block of rows with one of columns.
  ProductShares(int64_t rows, int64_t row_block, int64_t columns, int64_t column_block, int64_t threads,
                double beside_rows = 0, double beside_columns = 0)
      : rows_(rows), row_block_(row_block), columns_(columns), column_block_(column_block) {
    const auto blocks = [](int64_t n, int64_t size) { return std::max<int64_t>(1, (n + size - 1) / size); };
    const int64_t row_blocks = blocks(rows, row_block), column_blocks = blocks(columns, column_block);
    double least = 0;
    for (int64_t across = 1; across <= std::min(column_blocks, threads); ++across) {
      const int64_t down = std::min(threads / across, row_blocks);
      const auto most_rows = static_cast<double>(blocks(row_blocks, down));
      const auto most_columns = static_cast<double>(blocks(column_blocks, across));
      const double time = most_rows * most_columns + beside_rows * most_rows + beside_columns * most_columns;
      if (across > 1 && time >= least) continue;
      least = time, across_ = across, down_ = down;
    }
  }

  int64_t count() const { return down_ * across_; }
  Share operator[](int64_t i) const {
    const auto row = [&](int64_t share) { return unit_share(rows_, row_block_, share, down_); };
    const auto column = [&](int64_t share) { return unit_share(columns_, column_block_, share, across_); };
    const int64_t r = i / across_, c = i % across_;
    return {row(r), row(r + 1), column(c), column(c + 1)};
  }

 private:
  int64_t rows_, row_block_, columns_, column_block_, down_ = 1, across_ = 1;
};

}  // namespace fastrnn
