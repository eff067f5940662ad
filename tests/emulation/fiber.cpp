// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#ifdef FASTRNN_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef FASTRNN_EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* clock);
void __tsan_release(void* clock);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#ifndef FASTRNN_EMULATION_UCONTEXT
// Saves the callee-saved registers of the running flow on its stack and its stack pointer at *save, then goes on where
// the flow of stack pointer `load` left off. (The x87 and SSE control words are the same for all.)
extern "C" void fastrnn_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl fastrnn_emulation_switch
.hidden fastrnn_emulation_switch
.type fastrnn_emulation_switch,@function
fastrnn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastrnn_emulation_switch,.-fastrnn_emulation_switch
)");
#endif

namespace fastrnn::emulation {
namespace {

constexpr size_t kGuardBytes = 4096;
#ifdef FASTRNN_EMULATION_ASAN
constexpr size_t kStackBytes = 256 * 1024;  // red zones make frames larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// The scheduler's side of the switch, and the stacks that no fiber holds.
struct Scheduler {
#ifdef FASTRNN_EMULATION_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* tsan = nullptr;
  std::vector<char*> free_stacks;
} scheduler;

Fiber* running = nullptr;

char* take_stack() {
  if (scheduler.free_stacks.empty()) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for a thread's stack");
    mprotect(memory, kGuardBytes, PROT_NONE);
    scheduler.free_stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  char* stack = scheduler.free_stacks.back();
  scheduler.free_stacks.pop_back();
#ifdef FASTRNN_EMULATION_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  return stack;
}

}  // namespace

#ifdef FASTRNN_EMULATION_TSAN
void tsan_release(const void* clock) { __tsan_release(const_cast<void*>(clock)); }
void tsan_acquire(const void* clock) { __tsan_acquire(const_cast<void*>(clock)); }
void tsan_note_read(const void* address, size_t bytes) { __tsan_read_range(const_cast<void*>(address), bytes); }
void tsan_note_write(void* address, size_t bytes) { __tsan_write_range(address, bytes); }
Quiet::Quiet() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Quiet::~Quiet() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
void* TsanIdentity::create() { return __tsan_create_fiber(0); }
void TsanIdentity::destroy(void* identity) { __tsan_destroy_fiber(identity); }
void* TsanIdentity::current() { return __tsan_get_current_fiber(); }
void TsanIdentity::enter(void* identity) { __tsan_switch_to_fiber(identity, 1); }
#else
void tsan_release(const void*) {}
void tsan_acquire(const void*) {}
void tsan_note_read(const void*, size_t) {}
void tsan_note_write(void*, size_t) {}
Quiet::Quiet() {}
Quiet::~Quiet() {}
void* TsanIdentity::create() { return nullptr; }
void TsanIdentity::destroy(void*) {}
void* TsanIdentity::current() { return nullptr; }
void TsanIdentity::enter(void*) {}
#endif

void Fiber::begin() {
#ifdef FASTRNN_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_bytes);
#endif
  running->entry_();
  std::abort();  // an entry ends with finish()
}

void Fiber::resume(void (*entry)()) {
  if (!started()) {
    stack_ = take_stack();
    entry_ = entry;
    tsan_ = TsanIdentity::create();
#ifdef FASTRNN_EMULATION_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::begin, 0);
#else
    // What fastrnn_emulation_switch pops: six registers and the return address, so that begin() finds its stack aligned
    // as after a call.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 2;
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Fiber::begin);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
  }
  running = this;
#ifdef FASTRNN_EMULATION_ASAN
  void* scheduler_fake_stack;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_, kStackBytes);
#endif
  scheduler.tsan = TsanIdentity::current();
  TsanIdentity::enter(tsan_);
#ifdef FASTRNN_EMULATION_UCONTEXT
  swapcontext(&scheduler.context, &context_);
#else
  fastrnn_emulation_switch(&scheduler.stack_pointer, stack_pointer_);
#endif
#ifdef FASTRNN_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
  if (finished_) give_stack_back();
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#ifdef FASTRNN_EMULATION_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler.stack_bottom, scheduler.stack_bytes);
#endif
  TsanIdentity::enter(scheduler.tsan);
#ifdef FASTRNN_EMULATION_UCONTEXT
  swapcontext(&context_, &scheduler.context);
#else
  fastrnn_emulation_switch(&stack_pointer_, scheduler.stack_pointer);
#endif
#ifdef FASTRNN_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler.stack_bottom, &scheduler.stack_bytes);
#endif
}

void Fiber::finish() {
  finished_ = true;
  leave(true);
  std::abort();
}

void Fiber::give_stack_back() {
#ifdef FASTRNN_EMULATION_TSAN
  // The next thread to use the stack would race with this one: ThreadSanitizer forgets what is unmapped.
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
#else
  scheduler.free_stacks.push_back(stack_);
#endif
  stack_ = nullptr;
}

Fiber::~Fiber() {
  if (stack_) give_stack_back();
  // The identity of a fiber that was abandoned half-way cannot be destroyed: ThreadSanitizer would object to what it
  // left open. It is lost, as the launch is.
  if (tsan_ && finished_) TsanIdentity::destroy(tsan_);
}

}  // namespace fastrnn::emulation
