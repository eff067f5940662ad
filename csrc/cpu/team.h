// SPDX-License-Identifier: BSD-3-Clause
// How the threads of one launch share its work: ranges of rows, and a barrier for those that split the hidden units.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace fastrnn {

inline constexpr ThreadPool kOneThread = {
    [](int64_t count, ThreadPool::Body body, void* context) { body(0, count, context); }, 1};

// The bits of this thread's floating-point mode: how it rounds, and whether it takes denormals for zero.
#if defined(__x86_64__)
inline unsigned float_mode() { return _mm_getcsr(); }
inline void set_float_mode(unsigned bits) { _mm_setcsr(bits); }
#elif defined(__aarch64__)
inline uint64_t float_mode() {
  uint64_t bits;
  asm volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
inline void set_float_mode(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#else
inline unsigned float_mode() { return 0; }
inline void set_float_mode(unsigned) {}
#endif

// Gives the threads of a launch the caller's floating-point mode: torch.set_flush_denormal sets that of one thread
// alone.
class FloatMode {
 public:
  class Scope {
   public:
    explicit Scope(const FloatMode& mode) : before_(float_mode()) { set_float_mode(mode.bits_); }
    ~Scope() { set_float_mode(before_); }

   private:
    const decltype(float_mode()) before_;
  };

 private:
  const decltype(float_mode()) bits_ = float_mode();
};

template <typename F>
void in_parallel(const ThreadPool& pool, int64_t count, const F& f) {
  struct Context {
    const F& f;
    const FloatMode mode;
  } context{f, {}};
  const ThreadPool& threads = count > 1 ? pool : kOneThread;
  threads.run(
      count,
      [](int64_t begin, int64_t end, void* p) {
        const auto& [body, mode] = *static_cast<const Context*>(p);
        const FloatMode::Scope scope(mode);
        body(begin, end);
      },
      &context);
}

// Row ranges of the batch with about the same number of steps to do: boundaries [parts + 1]. Packed rows come longest
// first, so that equal numbers of rows would leave the last thread without work.
inline std::vector<int64_t> split_rows(const Steps& steps, int64_t B, int64_t parts) {
  std::vector<int64_t> length(B, 0);
  for (int64_t s = 0; s < steps.T; ++s) {
    if (steps.count(s) > 0) ++length[steps.count(s) - 1];
  }
  for (int64_t b = B - 1; b > 0; --b) length[b - 1] += length[b];
  const int64_t total = steps.row_begin[steps.T];
  std::vector<int64_t> boundaries(parts + 1, B);
  int64_t done = 0;
  for (int64_t b = 0, part = 0; b < B && part < parts; ++b) {
    if (done * parts >= total * part) boundaries[part++] = b;
    done += length[b];
  }
  boundaries[0] = 0;
  return boundaries;
}

// `shares` pieces of work, each done by the thread that was handed it. A thread may hold several shares (a framework
// may run all of them in one thread), so it counts with the weight of its shares. On a busy machine a thread may lose
// its core for a slice of time, at every step again: whoever has waited too often for others goes on without them.
class Team {
 public:
  // work: multiply-adds of a share between two barriers.
  Team(int64_t shares, int64_t work) : shares_(shares), patience_(kSlice / 8 + Time(work / kLeastPerNanosecond)) {}

  // The range of shares that a thread is to go on with: its own, all, or none.
  struct Range {
    int64_t begin, end;
  };

  // Waits until every share is in the hands of a running thread, or in those of one that goes on with all: the
  // framework runs the shares one after another, or its threads are held up.
  Range join(Range mine) {
    if (gathered_.fetch_add(mine.end - mine.begin) + mine.end - mine.begin == shares_) {
      int expected = kGathering;
      state_.compare_exchange_strong(expected, kRunning);
    }
    for (Spin spin; state_.load(std::memory_order_acquire) == kGathering; spin.wait()) {
      if (!spin.longer_than(kSlice)) continue;
      int expected = kGathering;
      if (state_.compare_exchange_strong(expected, kAlone)) return {0, shares_};
    }
    return state_.load(std::memory_order_acquire) == kRunning ? mine : Range{0, 0};
  }

  // The n-th call of a thread (n = 1, 2, ...) returns when every share has been through its n-th call.
  Range barrier(Range mine, int64_t n) {
    const int64_t weight = mine.end - mine.begin;
    if (weight == shares_) return mine;
    if (passed_.fetch_add(weight, std::memory_order_acq_rel) + weight == n * shares_) {
      released_.store(2 * n + (successor_.load(std::memory_order_relaxed) != kNobody), std::memory_order_release);
    }
    Spin spin;
    while (released_.load(std::memory_order_acquire) < 2 * n) spin.wait();
    if (spin.longer_than(patience_) && long_waits_.fetch_add(1) + 2 >= shares_) {  // so many cost what going alone does
      int64_t nobody = kNobody;
      successor_.compare_exchange_strong(nobody, mine.begin);  // from the next barrier on
    }
    if (released_.load(std::memory_order_relaxed) == 2 * n) return mine;
    return successor_.load(std::memory_order_relaxed) == mine.begin ? Range{0, shares_} : Range{0, 0};
  }

 private:
  using Time = std::chrono::nanoseconds;
  static constexpr Time kSlice = std::chrono::milliseconds(2);  // of a core's time, on a busy machine
  static constexpr int64_t kLeastPerNanosecond = 5;             // multiply-adds, by far

  // Spins while the others are about to arrive, then gives the core away: they may be waiting for it.
  class Spin {
   public:
    void wait() {
      if (++spins_ < kSpins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        if (spins_ == kSpins) since_ = std::chrono::steady_clock::now();
        std::this_thread::yield();
      }
    }
    bool longer_than(Time time) const { return spins_ >= kSpins && std::chrono::steady_clock::now() - since_ > time; }

   private:
    static constexpr int kSpins = 4000;  // some 40 us
    int spins_ = 0;
    std::chrono::steady_clock::time_point since_;
  };

  enum State { kGathering, kRunning, kAlone };
  static constexpr int64_t kNobody = -1;
  const int64_t shares_;
  const Time patience_;  // what threads that have a core each do not wait for each other
  alignas(64) std::atomic<int64_t> gathered_{0};
  std::atomic<int> state_{kGathering};
  std::atomic<int64_t> long_waits_{0};
  std::atomic<int64_t> successor_{kNobody};  // the first share of the thread that is to go on alone
  alignas(64) std::atomic<int64_t> passed_{0};
  std::atomic<int64_t> released_{0};  // 2 n after the n-th calls of all; odd if only the successor goes on
};

// Runs passes that do not wait for each other: side by side, each with its part of the threads, or one after the other,
// as their plan says. A pass has prepare(), run_shares(begin, end) for the shares of its plan, and finish().
template <typename Pass, typename Params>
void run_passes(const Params* params, int count, const ThreadPool& pool) {
  const auto run = [&](std::initializer_list<Pass*> passes) {
    int64_t shares = 0;
    for (Pass* pass : passes) {
      pass->prepare();
      shares += pass->plan().threads;
    }
    in_parallel(pool, shares, [&](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (Pass* pass : passes) {
        const int64_t of_pass = pass->plan().threads;
        const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, of_pass);
        if (from < to) pass->run_shares(from, to);
        first += of_pass;
      }
    });
    for (Pass* pass : passes) pass->finish();
  };
  if (count == 2) {
    Pass first(params[0], 2, pool), second(params[1], 2, pool);
    if (first.plan().side_by_side && second.plan().side_by_side) return run({&first, &second});
  }
  for (int i = 0; i < count; ++i) {
    Pass pass(params[i], 1, pool);
    run({&pass});
  }
}

}  // namespace fastrnn
