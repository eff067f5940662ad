// SPDX-License-Identifier: BSD-3-Clause
// A fiber: a flow of control with a stack of its own, and what the sanitizers must be told when it runs.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FASTRNN_EMULATION_ASAN
#endif
#if !defined(__x86_64__) && !defined(FASTRNN_EMULATION_UCONTEXT)
#define FASTRNN_EMULATION_UCONTEXT  // a system call per switch, but every processor
#endif
#ifdef FASTRNN_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace fastrnn::emulation {

// ThreadSanitizer's view of ordering; nothing without it. A clock is any object that outlives its use here.
// The runtime is compiled without -fsanitize=thread: its own memory accesses are the emulator's, not the kernel's.
void tsan_release(const void* clock);
void tsan_acquire(const void* clock);

// Accesses that the runtime makes for a thread.
void tsan_note_read(const void* address, size_t bytes);
void tsan_note_write(void* address, size_t bytes);

// While it lives, accesses by intercepted library functions on behalf of the emulator are not the running thread's.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// An identity to which ThreadSanitizer attributes accesses.
class TsanIdentity {
 public:
  static void* create();
  static void destroy(void* identity);
  static void* current();
  // Switching creates no order between the two identities.
  static void enter(void* identity);
};

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Called by the scheduler: runs the fiber until it suspends or finishes. The first time it gets a stack and calls
  // entry.
  void resume(void (*entry)());
  // Called on the fiber itself: back to the scheduler.
  void suspend() { leave(false); }
  [[noreturn]] void finish();

  bool started() const { return stack_ != nullptr; }
  bool finished() const { return finished_; }

 private:
  static void begin();
  void leave(bool for_good);
  void give_stack_back();

  char* stack_ = nullptr;
  bool finished_ = false;
  void (*entry_)() = nullptr;
  void* tsan_ = nullptr;
  void* fake_stack_ = nullptr;
#ifdef FASTRNN_EMULATION_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace fastrnn::emulation
