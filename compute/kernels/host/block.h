// Runs a kernel on the CPU: one block after another, a block's threads as fibers that take turns at barriers.
//
// What a GPU leaves undefined is made loud here: a barrier that some threads never reach ends the process with the
// state of the warp, shared memory is NaN (0xFF bytes) at the start of every block, a lane that does not exist gives
// NaN, and a bad address is reported with the thread that touched it. What it cannot show is a race within a barrier
// interval: threads run in one order. SIMULATED_CUDA_ORDER=reverse runs blocks, warps and lanes in the opposite one,
// so that a test run both ways sees what depends on it.
#pragma once

#include "fiber.h"
#include "language.h"

#include <csetjmp>
#include <csignal>
#include <link.h>
#include <memory>
#include <utility>
#include <vector>

namespace host {

constexpr unsigned LANES = 32;
constexpr unsigned THREADS_MAX = 1024;
// The most dynamic shared memory of a block on the GPUs that this is for, and the whole pages that hold it.
constexpr size_t DYNAMIC_MAX = 227 << 10;
constexpr size_t DYNAMIC_PAGES = 228 << 10;

// What ends a launch, by the driver's numbers.
enum Outcome { FINISHED = 0, ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719 };

// What one lane brings to an operation of its warp; lives on the lane's stack until all have come.
struct Collective {
    const char* name;
    uint32_t mask;
    // Gives every member its result; `lanes[i]` is null where lane i is no member.
    void (*exchange)(Collective* const* lanes, uint32_t members);
};

struct Warp {
    uint32_t exists, ready, at_warp, at_block, done;
    Fiber* fibers[LANES];
    Collective* posted[LANES];
};

struct Launch {
    const char* name;
    void (*body)(void** arguments);
    void** arguments;
    dim3 grid, block;
    size_t dynamic_bytes;
};

// The state of one thread of the system that runs blocks.
struct Block {
    uint3 thread_index{0, 0, 0}, block_index{0, 0, 0};
    dim3 block_size, grid_size;
    Launch launch{};
    unsigned warp = 0, lane = 0, threads = 0;
    Warp warps[THREADS_MAX / LANES];
    bool running = false, reverse = false;
    char* dynamic = nullptr;
    void* scheduler = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;
    sigjmp_buf escape;
    Outcome outcome = FINISHED;
};

inline Block outside;
// Never zero, so that it lies apart from the shared variables: those are the zero-initialised part of this module's
// thread-local memory.
inline __constinit thread_local Block* block = &outside;

[[noreturn]] inline void fail(const char* what) {
    const Block& b = *block;
    fprintf(stderr, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u): %s\n", b.launch.name, b.block_index.x,
            b.block_index.y, b.block_index.z, b.thread_index.x, b.thread_index.y, b.thread_index.z, what);
    abort();
}

[[noreturn]] inline void fail_divergent(const Warp& w) {
    char what[512];
    int n = snprintf(what, sizeof(what), "divergent barrier in warp %u: lanes %08x of %08x wait at", block->warp,
                     w.at_warp | w.at_block, w.exists);
    for (unsigned i = 0; i < LANES && n < 300; i++) {
        if (w.at_warp >> i & 1) {
            n += snprintf(what + n, sizeof(what) - n, " %s(%08x) from lane %u", w.posted[i]->name, w.posted[i]->mask, i);
            break;
        }
    }
    if (w.at_block != 0) n += snprintf(what + n, sizeof(what) - n, " __syncthreads (%08x)", w.at_block);
    if (w.done != 0) snprintf(what + n, sizeof(what) - n, "; %08x have returned", w.done);
    fail(what);
}

// The next lane of the warp to run.
inline unsigned next_lane(uint32_t ready) {
    return block->reverse ? LANES - 1 - __builtin_clz(ready) : __builtin_ctz(ready);
}

inline void become(unsigned lane) {
    Block& b = *block;
    unsigned i = b.warp * LANES + lane;
    b.lane = lane;
    if (b.threads == b.block_size.x) {
        b.thread_index.x = i;
        return;
    }
    b.thread_index = {i % b.block_size.x, i / b.block_size.x % b.block_size.y, i / b.block_size.x / b.block_size.y};
}

// What every fiber does: run one thread of the kernel to its end, and as many more of the warp as have not begun.
inline void run_threads() {
    for (;;) {
        Block& b = *block;
        b.launch.body(b.launch.arguments);
        Warp& w = b.warps[b.warp];
        w.done |= 1u << b.lane;
        Fiber* self = w.fibers[b.lane];
        unsigned next = w.ready != 0 ? next_lane(w.ready) : LANES;
        if (next < LANES && w.fibers[next] == nullptr) {
            w.ready &= ~(1u << next);
            w.fibers[next] = self;
            become(next);
        } else {
            b.idle.push_back(self);
            self->leave(b.scheduler);
        }
    }
}

inline Fiber* idle_fiber() {
    Block& b = *block;
    if (b.idle.empty()) {
        b.fibers.push_back(std::make_unique<Fiber>(run_threads, b.fibers.size()));
        return b.fibers.back().get();
    }
    Fiber* fiber = b.idle.back();
    b.idle.pop_back();
    return fiber;
}

// Leaves the running thread until its barrier is complete.
inline void wait() {
    Block& b = *block;
    b.warps[b.warp].fibers[b.lane]->leave(b.scheduler);
}

// Runs lanes of the current warp until every one waits for the block or has returned.
inline void run_warp() {
    Block& b = *block;
    Warp& w = b.warps[b.warp];
    while (w.ready != 0) {
        unsigned lane = next_lane(w.ready);
        w.ready &= ~(1u << lane);
        if (w.fibers[lane] == nullptr) w.fibers[lane] = idle_fiber();
        become(lane);
        w.fibers[lane]->enter(&b.scheduler);
    }
    if (w.at_warp != 0) fail_divergent(w);
}

inline void run_block() {
    Block& b = *block;
    unsigned warps = (b.threads + LANES - 1) / LANES;
    for (unsigned i = 0; i < warps; i++) {
        unsigned lanes = min(LANES, b.threads - i * LANES);
        uint32_t exists = lanes == LANES ? ~0u : (1u << lanes) - 1;
        b.warps[i] = Warp{exists, exists, 0, 0, 0, {}, {}};
    }
    for (bool again = true; again;) {
        bool waiting = false, returned = false;
        for (unsigned i = 0; i < warps; i++) {
            b.warp = b.reverse ? warps - 1 - i : i;
            run_warp();
            waiting |= b.warps[b.warp].at_block != 0;
            returned |= b.warps[b.warp].done != 0;
        }
        for (unsigned i = 0; i < warps && waiting; i++) {
            Warp& w = b.warps[i];
            b.warp = i;
            if (returned && w.at_block != 0) fail_divergent(w);
            w.ready = w.at_block;
            w.at_block = 0;
        }
        again = waiting;
    }
}

// The part of this module's thread-local memory that is zero at first: the shared variables of all kernels.
struct SharedVariables {
    char *begin = nullptr, *end = nullptr;
};

inline int find_shared_variables(dl_phdr_info* module, size_t, void* found) {
    auto here = reinterpret_cast<ElfW(Addr)>(&find_shared_variables);
    bool ours = false;
    const ElfW(Phdr)* variables = nullptr;
    for (int i = 0; i < module->dlpi_phnum; i++) {
        const ElfW(Phdr)& segment = module->dlpi_phdr[i];
        ElfW(Addr) at = module->dlpi_addr + segment.p_vaddr;
        ours |= segment.p_type == PT_LOAD && here >= at && here < at + segment.p_memsz;
        if (segment.p_type == PT_TLS) variables = &segment;
    }
    if (!ours || variables == nullptr) return 0;
    auto* data = static_cast<char*>(module->dlpi_tls_data);
    *static_cast<SharedVariables*>(found) = {data + variables->p_filesz, data + variables->p_memsz};
    return 1;
}

// Keeps the shared variables NaN between blocks. All of them are many times what one kernel has, so from the second
// block of a launch on, only the range that the first has changed is filled.
class SharedFill {
  public:
    SharedFill() {
        dl_iterate_phdr(find_shared_variables, &all);
        changed = all;
    }
    void before_block() { memset(changed.begin, 0xFF, changed.end - changed.begin); }
    void after_first_block() {
        changed = all;
        while (changed.begin < changed.end && *changed.begin == '\xFF') changed.begin++;
        while (changed.begin < changed.end && changed.end[-1] == '\xFF') changed.end--;
    }

  private:
    SharedVariables all, changed;
};

// Dynamic shared memory that ends where nothing can be touched.
inline char* dynamic_memory() {
    auto* memory = static_cast<char*>(mmap(nullptr, DYNAMIC_PAGES + PAGE, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + DYNAMIC_PAGES, PAGE, PROT_NONE) != 0) out_of_memory("shared memory");
    return memory + DYNAMIC_PAGES;
}

struct ThreadState {
    Block block;
    SharedFill shared;
    char* dynamic_end = dynamic_memory();
    ~ThreadState() {
        munmap(dynamic_end - DYNAMIC_PAGES, DYNAMIC_PAGES + PAGE);
        host::block = &outside;
    }
};

// One per thread of the system, made at its first launch. A pthread key and not a thread_local, which would lie among
// the shared variables.
inline ThreadState& thread_state() {
    static pthread_key_t key = [] {
        pthread_key_t k;
        if (pthread_key_create(&k, [](void* s) { delete static_cast<ThreadState*>(s); }) != 0) abort();
        return k;
    }();
    auto* state = static_cast<ThreadState*>(pthread_getspecific(key));
    if (state == nullptr) {
        block->running = false;
        state = new ThreadState;
        pthread_setspecific(key, state);
    }
    return *state;
}

inline struct sigaction former_actions[NSIG];

// A fault of a kernel ends its launch; any other goes to whoever was there before.
inline void on_fault(int signal, siginfo_t* info, void* context) {
    Block& b = *block;
    if (!b.running) {
        const struct sigaction& former = former_actions[signal];
        if (former.sa_flags & SA_SIGINFO) return former.sa_sigaction(signal, info, context);
        if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) return former.sa_handler(signal);
        sigaction(signal, &former, nullptr);
        return;
    }
    char text[400];
    const char* what = signal == SIGILL   ? "a check of the compiler failed (misaligned access, index outside an array, shift)"
                       : signal == SIGFPE ? "integer division by zero"
                                          : "illegal address";
    int n = snprintf(text, sizeof(text), "kernel %s, block (%u,%u,%u), thread (%u,%u,%u): %s %p\n", b.launch.name,
                     b.block_index.x, b.block_index.y, b.block_index.z, b.thread_index.x, b.thread_index.y,
                     b.thread_index.z, what, info->si_addr);
    if (write(2, text, n) != n) abort();
    b.outcome = signal == SIGILL ? MISALIGNED_ADDRESS : signal == SIGFPE ? LAUNCH_FAILED : ILLEGAL_ADDRESS;
    siglongjmp(b.escape, 1);
}

inline void catch_faults() {
    static bool done = [] {
        for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) {
            struct sigaction action {};
            action.sa_sigaction = on_fault;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK;
            sigaction(signal, &action, &former_actions[signal]);
        }
        return true;
    }();
    (void)done;
}

// A stack for the handler, in case the kernel overran its own.
inline void own_signal_stack() {
    stack_t stack;
    sigaltstack(nullptr, &stack);
    if (!(stack.ss_flags & SS_DISABLE)) return;
    stack.ss_size = 64 << 10;
    stack.ss_sp = malloc(stack.ss_size);
    stack.ss_flags = 0;
    sigaltstack(&stack, nullptr);
}

inline Outcome run_grid(ThreadState& state) {
    Block& b = state.block;
    const Launch& launch = b.launch;
    size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    // Of a launch that faulted, the stack knows nothing; the fibers are made anew.
    if (sigsetjmp(b.escape, 1) != 0) {
        b.running = false;
        b.idle.clear();
        for (auto& fiber : b.fibers) {
            fiber->reset();
            b.idle.push_back(fiber.get());
        }
        state.shared.after_first_block();
        return b.outcome;
    }
    b.running = true;
    for (size_t i = 0; i < blocks; i++) {
        size_t at = b.reverse ? blocks - 1 - i : i;
        b.block_index = {static_cast<unsigned>(at % launch.grid.x), static_cast<unsigned>(at / launch.grid.x % launch.grid.y),
                         static_cast<unsigned>(at / launch.grid.x / launch.grid.y)};
        state.shared.before_block();
        memset(b.dynamic, 0xFF, state.dynamic_end - b.dynamic);
        run_block();
        if (i == 0) state.shared.after_first_block();
    }
    b.running = false;
    state.shared.before_block();
    return FINISHED;
}

// Runs a kernel to its end.
inline Outcome run(const Launch& launch) {
    catch_faults();
    own_signal_stack();
    ThreadState& state = thread_state();
    Block& b = state.block;
    block = &b;
    b.launch = launch;
    b.block_size = launch.block;
    b.grid_size = launch.grid;
    b.thread_index = {0, 0, 0};
    b.threads = launch.block.x * launch.block.y * launch.block.z;
    if (b.threads == 0 || b.threads > THREADS_MAX || launch.dynamic_bytes > DYNAMIC_MAX) fail("bad launch");
    const char* order = getenv("SIMULATED_CUDA_ORDER");
    b.reverse = order != nullptr && strcmp(order, "reverse") == 0;
    b.dynamic = state.dynamic_end - (launch.dynamic_bytes + 15) / 16 * 16;
    return run_grid(state);
}

// A kernel with its parameter types: `Kernel<scale_f32>::launch(grid, block, dynamic_bytes, y, x, n)`.
template <auto F>
struct Kernel;

template <typename... A, void (*F)(A...)>
struct Kernel<F> {
    static constexpr size_t COUNT = sizeof...(A);
    static constexpr size_t SIZES[] = {sizeof(A)..., 0};
    static constexpr size_t ALIGNMENTS[] = {alignof(A)..., 0};

    static void body(void** arguments) { call(arguments, std::index_sequence_for<A...>()); }

    static void launch(dim3 grid, dim3 block, size_t dynamic_bytes, A... a) {
        void* arguments[] = {const_cast<void*>(static_cast<const void*>(&a))..., nullptr};
        if (run({"", body, arguments, grid, block, dynamic_bytes}) != FINISHED) abort();
    }

  private:
    template <size_t... I>
    static void call(void** arguments, std::index_sequence<I...>) {
        F(*static_cast<A*>(arguments[I])...);
    }
};

}  // namespace host

#define threadIdx (::host::block->thread_index)
#define blockIdx (::host::block->block_index)
#define blockDim (::host::block->block_size)
#define gridDim (::host::block->grid_size)
#define warpSize 32
