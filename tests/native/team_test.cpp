// SPDX-License-Identifier: BSD-3-Clause
// What a team does when one of its threads is held up. The barrier alone, of threads that the test makes. And the
// floating-point mode of such threads.
#include "cpu/team.h"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

using fastrnn::Team;

namespace {

constexpr int64_t kSteps = 200;

// Runs the threads [0, threads) over all steps; before each one wait(thread, step, shares) may hold it up. Returns how
// often each share was done, [steps][threads].
std::vector<std::vector<int>> run(int64_t threads, const std::function<void(int64_t, int64_t, int64_t)>& wait) {
  std::vector<std::vector<int>> done(kSteps, std::vector<int>(threads, 0));
  Team team(threads, 0);
  std::vector<std::thread> running;
  for (int64_t i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      Team::Member member(team, {i, i + 1});
      member.join();
      for (int64_t step = 0; step < kSteps && member.goes_on(); ++step) {
        const Team::Range mine = member.shares();
        wait(i, step, mine.end - mine.begin);
        for (int64_t share = mine.begin; share < mine.end; ++share) ++done[step][share];
        member.barrier(step + 1);
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return done;
}

int check(const char* name, const std::vector<std::vector<int>>& done) {
  for (size_t step = 0; step < done.size(); ++step) {
    for (size_t share = 0; share < done[step].size(); ++share) {
      if (done[step][share] == 1) continue;
      std::printf("%s: share %zu of step %zu was done %d times\n", name, share, step, done[step][share]);
      return 1;
    }
  }
  return 0;
}

bool rounds_up() {
  const volatile float one = 1, little = 1e-10f;
  return one + little > one;
}

// A launch computes in the mode of the caller, which its threads do not have, and leaves them theirs.
int check_float_mode() {
  static bool in_launch[2], after_launch[2];
  const fastrnn::ThreadPool pool = {[](int64_t count, fastrnn::ThreadPool::Body body, void* context) {
                                      for (int64_t i = 0; i < count; ++i) {
                                        std::thread([=] {
                                          std::fesetround(FE_TONEAREST);
                                          body(i, i + 1, context);
                                          after_launch[i] = rounds_up();
                                        }).join();
                                      }
                                    },
                                    2};
  std::fesetround(FE_UPWARD);
  fastrnn::in_parallel(pool, 2, [](int64_t begin, int64_t) { in_launch[begin] = rounds_up(); });
  const bool mine = rounds_up();
  std::fesetround(FE_TONEAREST);
  if (mine && in_launch[0] && in_launch[1] && !after_launch[0] && !after_launch[1]) return 0;
  std::printf("rounds up: the caller %d, its launch %d %d, the threads after it %d %d\n", mine, in_launch[0],
              in_launch[1], after_launch[0], after_launch[1]);
  return 1;
}

}  // namespace

int main() {
  using namespace std::chrono_literals;
  int failures = check_float_mode();
  for (const int64_t threads : {1, 2, 3, 5}) {
    failures += check("all in time", run(threads, [](int64_t, int64_t, int64_t) {}));
    // Without a successor it would be every step; how soon there is one depends on when the others get a core.
    std::atomic<int64_t> held_up{0};
    const auto expect_successor = [&](const char* name) {
      if (threads == 1 || held_up <= kSteps / 2) return;
      std::printf("%s, %d threads: one was waited for %d times\n", name, static_cast<int>(threads),
                  static_cast<int>(held_up));
      ++failures;
    };
    failures += check("one is held up at every step", run(threads, [&](int64_t thread, int64_t, int64_t shares) {
                        if (thread != threads - 1) return;
                        held_up += shares < threads;  // alone, it keeps nobody waiting
                        std::this_thread::sleep_for(2ms);
                      }));
    expect_successor("one is held up at every step");
    // As where there are more threads than cores: no wait is long, but together they are most of the time.
    held_up = 0;
    failures += check("each is held up a little", run(threads, [&](int64_t thread, int64_t step, int64_t shares) {
                        if (step % threads != thread || shares == threads) return;
                        ++held_up;
                        std::this_thread::sleep_for(50us);
                      }));
    expect_successor("each is held up a little");
    failures += check("in turns", run(threads, [&](int64_t thread, int64_t step, int64_t) {
                        if (step % threads == thread) std::this_thread::sleep_for(1ms);
                      }));
  }
  return failures > 0;
}
