// SPDX-License-Identifier: BSD-3-Clause
// Which path runs for a problem, and why: pure functions of sizes and machine facts, so that they can be asked and
// tested anywhere.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastrnn {

// How the threads of the CPU share a layer. Rows of the batch need no synchronisation at all; hidden units need one
// barrier per step, but read each weight in one thread only.
enum class Split { rows, units };

struct CpuProblem {
  int64_t T, B, I, H, P;
  int gates;
  int threads;  // that the framework allows
};

struct CpuPlan {
  Split split;
  int threads;
  const char* reason;
};

inline CpuPlan plan_cpu(const CpuProblem& p) {
  // Starting a parallel region costs about what one thread does in 0.3 million multiply-adds.
  constexpr int64_t kMinimumWork = 300'000;
  // A barrier costs about what one thread does with 4096 weights read from its cache.
  constexpr int64_t kMinimumWeightsPerThread = 4096;
  // From here on the weights are read from cache often enough per step that reading them in every thread is free.
  constexpr int64_t kRowsPerThread = 4;

  const int64_t weights = p.gates * p.H * p.P + (p.P != p.H ? p.P * p.H : 0);
  const int64_t work = p.T * p.B * (weights + p.gates * p.H * p.I);
  if (p.threads <= 1) return {Split::rows, 1, "one thread is allowed"};
  if (work < kMinimumWork) return {Split::rows, 1, "too little work for a second thread"};
  if (p.B >= kRowsPerThread * p.threads) return {Split::rows, p.threads, "enough rows for every thread"};
  if (p.P != p.H) {
    return {Split::rows, static_cast<int>(std::min<int64_t>(p.threads, p.B)), "a projection splits by rows only"};
  }
  const int64_t by_units = std::min<int64_t>(p.threads, p.B * weights / kMinimumWeightsPerThread);
  const int64_t by_rows = std::min<int64_t>(p.threads, p.B / kRowsPerThread);
  if (by_units > by_rows && by_units > 1) {
    return {Split::units, static_cast<int>(by_units), "few rows: threads share the hidden units"};
  }
  return {Split::rows, static_cast<int>(std::max<int64_t>(by_rows, 1)), "few rows and few units"};
}

}  // namespace fastrnn
