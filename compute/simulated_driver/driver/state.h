// What the simulated CUDA driver knows, and the way into every one of its functions.
//
// The types and numbers are those of the driver's interface (cuda.h), as far as they are used here. Handles point to
// objects of this file. One lock guards all of it, except while work runs: that holds its stream's own.
#pragma once

#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum CUresult : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
    CUDA_ERROR_MISALIGNED_ADDRESS = 716,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
};

using CUdevice = int;
using CUdeviceptr = uint64_t;

// A kernel compiled for this machine.
struct HostKernel {
    const char* name;
    void (*body)(void** arguments);
    unsigned threads_max;
    size_t count;
    const size_t *sizes, *alignments;
};

// All of them, from the kernels' own translation unit.
const HostKernel* host_kernel(const std::string& name);
CUresult run_kernel(const HostKernel& kernel, void** arguments, const unsigned (&grid)[3], const unsigned (&block)[3],
                    size_t dynamic_bytes);

struct CUctx {
    int retained = 0;
};
using CUcontext = CUctx*;

struct CUmod;
struct CUfunc {
    const HostKernel* kernel;
    CUmod* module;
    size_t dynamic_max = 48 << 10;
};
using CUfunction = CUfunc*;

struct CUmod {
    std::string ptx;
    std::map<std::string, std::unique_ptr<CUfunc>> functions;
};
using CUmodule = CUmod*;

// One piece of work of a stream or a graph; node types by the driver's numbers.
struct Operation {
    int type;
    std::string name;
    std::function<CUresult()> run;
};
enum NodeType { NODE_KERNEL = 0, NODE_COPY = 1, NODE_FILL = 2, NODE_HOST = 3, NODE_RECORD = 7 };

struct CUgraph_st {
    std::vector<std::shared_ptr<Operation>> nodes;
};
using CUgraph = CUgraph_st*;
using CUgraphExec = CUgraph_st*;
using CUgraphNode = Operation*;

enum CaptureMode : int { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };
enum CaptureStatus : int { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_INVALIDATED = 2 };

struct CUstr {
    unsigned flags = 0;
    int priority = 0;
    std::deque<std::shared_ptr<Operation>> pending;
    std::recursive_mutex running;
    CaptureStatus capture = CAPTURE_NONE;
    CaptureMode mode = CAPTURE_GLOBAL;
    uint64_t thread = 0, id = 0;
    std::unique_ptr<CUgraph_st> graph;
};
using CUstream = CUstr*;

struct CUev {
    unsigned flags = 0;
    bool recorded = false, done = false, captured = false;
    CUstr* stream = nullptr;
    std::chrono::steady_clock::time_point when;
};
using CUevent = CUev*;

enum MemoryKind { DEVICE, IMPORTED, PINNED };

struct Allocation {
    MemoryKind kind;
    char* base;
    size_t size;
    // What is mapped: whole pages, of which the last is not to be touched.
    char* mapping = nullptr;
    size_t mapped = 0;
    int file = -1;
    uint64_t id = 0;
    // Of imported memory: how often it is open, and whose it is.
    int opened = 0, process = 0;
};

struct State {
    std::recursive_mutex lock;
    bool initialized = false;
    CUresult sticky = CUDA_SUCCESS;
    CUctx context;
    CUstr default_stream;
    std::map<char*, Allocation> allocations;
    std::set<CUmodule> modules;
    std::set<CUstream> streams;
    std::vector<std::unique_ptr<CUstr>> ended;
    std::set<CUevent> events;
    std::set<CUgraph> graphs;
    size_t used = 0;
    uint64_t ids = 0;
};

State& state();
// SIMULATED_CUDA_MEMORY, or 16 GiB.
size_t memory_total();
// SIMULATED_CUDA_PAGEABLE: whether the device reads the host's pageable memory itself, when a copy runs.
bool reads_pageable();
uint64_t this_thread();
CUcontext current_context();
void set_current_context(CUcontext context);

// Says what is wrong on stderr and gives back `error`.
CUresult refuse(CUresult error, const char* format, ...) __attribute__((format(printf, 2, 3)));

// What a function needs before it may run.
enum Needs { NOTHING, DRIVER, CONTEXT };

// The error to return before `name` runs: injected, of the past, or of the missing context.
CUresult check(const char* name, const char* detail, Needs needs);

template <typename F>
CUresult call(const char* name, Needs needs, F body, const char* detail = "") {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    CUresult error = check(name, detail, needs);
    return error != CUDA_SUCCESS ? error : body();
}

// memory.cpp: the allocation that holds all of `size` bytes at `at`, or null.
Allocation* find_allocation(const void* at, size_t size);

// stream.cpp
CUstream resolve(CUstream stream);
// Adds work to a stream or to the graph that it records; unless work is late, runs it. `kernel` of a pageable copy
// and the like: work that a graph cannot hold.
CUresult submit(CUstream stream, Operation operation, bool recordable = true);
// Runs what is pending.
CUresult drain(CUstream stream);
CUresult drain_all();
// Those that wait for the default stream, and that one.
CUresult drain_blocking();
// For calls that are unsafe while a stream records: the error, after which the recording is invalid.
// `also_relaxed`: those that no mode allows, such as waiting for the whole context; other threads' recordings are spared.
CUresult refuse_while_recording(const char* name, bool also_relaxed = false);
