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
// may run all of them in one thread), so it counts with the weight of its shares. On a busy machine, or where there are
// more threads than cores, threads may lose their core at every step again: whoever has waited too often for others
// goes on without them.
class Team {
  using Clock = std::chrono::steady_clock;
  using Time = std::chrono::nanoseconds;
  static constexpr Time kSlice = std::chrono::milliseconds(2);  // of a core's time, on a busy machine
  static constexpr int64_t kLeastPerNanosecond = 5;             // multiply-adds, by far

  // Spins while the others are about to arrive, then gives the core away: they may be waiting for it.
  class Spin {
   public:
    void wait() {
      if (!gave_away() && ++spins_ % kSpinsPerLook != 0) {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
        return;
      }
      if (gave_away()) std::this_thread::yield();
      const Clock::time_point now = Clock::now();
      if (spins_ == kSpinsPerLook) since_ = now;
      waited_ = now - since_;
    }
    bool gave_away() const { return waited_ > kSpin; }
    Time waited() const { return waited_; }

   private:
    static constexpr Time kSpin = std::chrono::microseconds(40);
    static constexpr int kSpinsPerLook = 32;  // at the clock: some 0.3 us and more
    int spins_ = 0;
    Clock::time_point since_;
    Time waited_{};
  };

 public:
  struct Range {
    int64_t begin, end;
  };

  // work: multiply-adds of a share between two barriers.
  Team(int64_t shares, int64_t work)
      : shares_(shares), patience_(kSlice / 8 + Time(work / kLeastPerNanosecond)), arrivals_(shares) {}

  // A thread of the team.
  class Member {
   public:
    Member(Team& team, Range shares) : team_(team), mine_(shares) {}

    // What it is to go on with: the shares that it was handed, all, or none.
    Range shares() const { return mine_; }
    bool goes_on() const { return mine_.begin < mine_.end; }

    // Waits until every share is in the hands of a running thread, or in those of one that goes on with all: the
    // framework runs the shares one after another, or its threads are held up.
    void join() {
      const int64_t gathered = team_.gathered_.fetch_add(weight()) + weight();
      if (gathered == team_.shares_) {
        int expected = kGathering;
        team_.state_.compare_exchange_strong(expected, kRunning);
      }
      for (Spin spin; team_.state_.load(std::memory_order_acquire) == kGathering; spin.wait()) {
        if (spin.waited() <= kSlice) continue;
        int expected = kGathering;
        if (team_.state_.compare_exchange_strong(expected, kAlone)) {
          mine_ = {0, team_.shares_};
          return;
        }
      }
      if (team_.state_.load(std::memory_order_acquire) != kRunning) mine_ = {0, 0};
    }

    // The n-th call (n = 1, 2, ...) returns when every share has been through its n-th call.
    void barrier(int64_t n) {
      if (weight() == team_.shares_) return;
      if (watches_) least_work_ = std::min(least_work_, Clock::now() - left_);
      for (int64_t i = mine_.begin; i < mine_.end; ++i) {
        team_.arrivals_[i].call.store(2 * n + wants_all_, std::memory_order_release);
      }
      Spin spin;
      int64_t successor = kNobody;
      for (int64_t i = team_.shares_ - 1; i >= 0; --i) {
        int64_t call;
        while ((call = team_.arrivals_[i].call.load(std::memory_order_acquire)) < 2 * n) spin.wait();
        if (call == 2 * n + 1) successor = i;
      }
      if (watches_ || spin.gave_away()) watch(spin);
      if (successor == kNobody) return;
      mine_ = mine_.begin <= successor && successor < mine_.end ? Range{0, team_.shares_} : Range{0, 0};
    }

   private:
    int64_t weight() const { return mine_.end - mine_.begin; }

    // From a wait that was not short on, measures steps for a while: whether waiting takes longer than it would to do
    // the work of the others as well.
    void watch(const Spin& spin) {
      const Clock::time_point now = Clock::now();
      bool alone = spin.waited() > team_.patience_ &&
                   team_.long_waits_.fetch_add(1) + 2 >= team_.shares_;  // so many cost what going alone does
      if (!watches_) {
        watches_ = true;
        steps_ = waits_ = 0;
        waited_ = Time::zero();
        least_work_ = Time::max();
      } else {
        ++steps_;
        if (spin.gave_away()) ++waits_, waited_ += spin.waited();
        alone |= waits_ >= kWaits && waited_ > least_work_ * (steps_ * (team_.shares_ - weight()) / weight());
        watches_ = steps_ < kWatched;
      }
      left_ = now;
      wants_all_ |= alone;
    }

    static constexpr int kWaits = 3, kWatched = 64;
    Team& team_;
    Range mine_;
    bool wants_all_ = false;  // from the next barrier on
    bool watches_ = false;
    int64_t steps_ = 0, waits_ = 0;             // since it watches: all, and those that it gave its core away in
    Time waited_{}, least_work_ = Time::max();  // in these; between two barriers, where no input gates are made as well
    Clock::time_point left_;                    // a barrier
  };

 private:
  enum State { kGathering, kRunning, kAlone };
  static constexpr int64_t kNobody = -1;
  const int64_t shares_;
  const Time patience_;  // what threads that have a core each do not wait for each other
  alignas(64) std::atomic<int64_t> gathered_{0};
  std::atomic<int> state_{kGathering};
  std::atomic<int64_t> long_waits_{0};
  // Of each share, 2 n from its n-th call on; odd if its thread wants to go on with all, which the first such does.
  // They lie in lines of their own: one that all write goes from core to core twice before everybody knows.
  struct alignas(64) Arrival {
    std::atomic<int64_t> call{0};
  };
  std::vector<Arrival> arrivals_;
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
