// A fiber: a stack of its own that can be left in the middle of a function and entered again.
//
// One block of a kernel is up to 1024 of them on one thread of the system. ucontext would do, but its swapcontext
// makes a system call for the signal mask at every switch; the switch here saves what the calling convention asks for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .weak host_switch_stack
    .hidden host_switch_stack
    .type host_switch_stack, @function
host_switch_stack:
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
    popq %rcx
    jmpq *%rcx
    .size host_switch_stack, .-host_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .p2align 4
    .weak host_switch_stack
    .hidden host_switch_stack
    .type host_switch_stack, %function
host_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size host_switch_stack, .-host_switch_stack
)");
#else
#error "the switch of stacks is written for x86-64 and aarch64"
#endif

// Saves the registers on this stack, notes it in `*from`, and goes on where the stack `to` was left.
extern "C" void host_switch_stack(void** from, void* to);

namespace host {

constexpr size_t PAGE = 4096;

[[noreturn]] inline void out_of_memory(const char* what) {
    perror(what);
    abort();
}

class Fiber {
  public:
    // A fiber that runs `entry`, which never returns, when it is entered first. `number` tells it from the others: tops
    // of stacks that lie a power of two apart share a few lines of the caches, which made a switch four times slower.
    Fiber(void (*entry)(), size_t number) : entry(entry), top(SIZE - number % 128 * 320) {
        memory = static_cast<char*>(mmap(nullptr, SIZE, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0));
        if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE) != 0) out_of_memory("a stack of a kernel's thread");
        reset();
    }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber() { munmap(memory, SIZE); }

    // Forgets what the fiber was doing.
    void reset() {
        auto* top = reinterpret_cast<uintptr_t*>(memory + this->top);
#if defined(__x86_64__)
        // Six registers, the address to go on at, and one word so that the stack is aligned as after a call.
        top[-2] = reinterpret_cast<uintptr_t>(entry);
        stack = top - 8;
#else
        // Twenty registers, of which x30, the address that `ret` takes, is number eleven.
        stack = top - 20;
        top[-20 + 11] = reinterpret_cast<uintptr_t>(entry);
#endif
    }

    void enter(void** from) { host_switch_stack(from, stack); }
    void leave(void* to) { host_switch_stack(&stack, to); }

  private:
    // Big enough for arrays that a GPU would spill; only the touched pages are real.
    static constexpr size_t SIZE = 256 << 10;
    char* memory;
    void* stack;
    void (*entry)();
    size_t top;
};

}  // namespace host
