// A fiber: a stack of its own, and where it stands. The emulators of GPU kernels run one per thread of the GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

// Registers of one stack for those of another.
#ifdef __x86_64__
extern "C" void ak_switch(void** kept, void* next);
asm(R"(
.text
.type ak_switch, @function
ak_switch:
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
)");
#else
#error "the host's fibers are written for x86-64"
#endif

struct StackOfFiber {
  static constexpr size_t kBytes = 64 << 10;
  std::vector<char> bytes;
  void* at = nullptr;

  // The next switch to it calls `begin`, which must not return.
  void start(void (*begin)()) {
    bytes.resize(kBytes);
    void** top = reinterpret_cast<void**>((uintptr_t(bytes.data() + kBytes) & ~uintptr_t(15)) - 16);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(begin);
    at = top - 8;
  }
  void enter(void** kept) { ak_switch(kept, at); }
  void leave(void* to) { ak_switch(&at, to); }
};
