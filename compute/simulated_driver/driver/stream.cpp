// Streams, events, and the recording of graphs.
//
// Work runs when it is submitted, or with SIMULATED_CUDA_LATE=1 only when somebody waits for it: both are what a GPU
// may do, and the second shows who reads a result or changes a source without waiting.
#include "state.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

namespace {

bool late() {
    static const bool is_late = getenv("SIMULATED_CUDA_LATE") != nullptr;
    return is_late;
}

CUresult invalidate(CUstream stream) {
    stream->capture = CAPTURE_INVALIDATED;
    stream->graph.reset();
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

// Runs one piece of work outside the state's lock and keeps an error that stays.
CUresult run(const std::shared_ptr<Operation>& operation) {
    CUresult error = operation->run();
    if (error == CUDA_SUCCESS) return error;
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    state().sticky = error;
    return error;
}

bool is_stream(CUstream stream) { return stream == &state().default_stream || state().streams.count(stream) != 0; }

template <typename F>
CUresult of_stream(const char* name, CUstream stream, F body) {
    return call(name, CONTEXT, [&] {
        CUstream resolved = resolve(stream);
        return is_stream(resolved) ? body(resolved) : CUDA_ERROR_INVALID_HANDLE;
    });
}

template <typename F>
CUresult of_event(const char* name, CUevent event, F body) {
    return call(name, CONTEXT, [&] { return state().events.count(event) ? body() : CUDA_ERROR_INVALID_HANDLE; });
}

template <typename F>
CUresult drain_those(F wanted) {
    std::vector<CUstream> those{&state().default_stream};
    {
        std::lock_guard<std::recursive_mutex> guard(state().lock);
        std::copy_if(state().streams.begin(), state().streams.end(), std::back_inserter(those), wanted);
    }
    for (CUstream stream : those) {
        if (CUresult error = drain(stream)) return error;
    }
    return CUDA_SUCCESS;
}

CUresult create_stream(CUstream* out, unsigned flags, int priority) {
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    auto* stream = new CUstr;
    stream->flags = flags;
    stream->priority = priority;
    state().streams.insert(stream);
    *out = stream;
    return CUDA_SUCCESS;
}

}  // namespace

CUstream resolve(CUstream stream) {
    // The default stream by its three names: null, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
    return reinterpret_cast<uintptr_t>(stream) <= 2 ? &state().default_stream : stream;
}

CUresult refuse_while_recording(const char* name, bool also_relaxed) {
    CUresult error = CUDA_SUCCESS;
    for (CUstream stream : state().streams) {
        if (stream->capture == CAPTURE_NONE || (stream->mode == CAPTURE_RELAXED && !also_relaxed)) continue;
        if (stream->mode == CAPTURE_RELAXED && stream->thread != this_thread()) continue;
        if (stream->mode == CAPTURE_THREAD_LOCAL && stream->thread != this_thread()) continue;
        error = invalidate(stream);
        refuse(error, "%s while a stream records", name);
    }
    return error;
}

CUresult submit(CUstream stream, Operation operation, bool recordable) {
    auto shared = std::make_shared<Operation>(std::move(operation));
    {
        std::lock_guard<std::recursive_mutex> guard(state().lock);
        stream = resolve(stream);
        if (!is_stream(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (stream->capture == CAPTURE_INVALIDATED) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        if (stream->capture == CAPTURE_ACTIVE) {
            if (!recordable) return refuse(invalidate(stream), "%s cannot be recorded", shared->name.c_str());
            stream->graph->nodes.push_back(shared);
            return CUDA_SUCCESS;
        }
        for (CUstream other : state().streams) {
            bool blocks = stream == &state().default_stream && other->flags == 0;
            if (blocks && other->capture == CAPTURE_ACTIVE) {
                invalidate(other);
                return refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "work on the default stream while another records");
            }
        }
        stream->pending.push_back(shared);
    }
    return late() ? CUDA_SUCCESS : drain(stream);
}

CUresult drain(CUstream stream) {
    if (stream != &state().default_stream && stream->flags == 0) {
        if (CUresult error = drain(&state().default_stream)) return error;
    }
    std::lock_guard<std::recursive_mutex> running(stream->running);
    for (;;) {
        std::shared_ptr<Operation> next;
        {
            std::lock_guard<std::recursive_mutex> guard(state().lock);
            if (state().sticky != CUDA_SUCCESS) return state().sticky;
            if (stream->pending.empty()) return CUDA_SUCCESS;
            next = stream->pending.front();
            stream->pending.pop_front();
        }
        if (CUresult error = run(next)) return error;
    }
}

CUresult drain_all() { return drain_those([](CUstream) { return true; }); }
CUresult drain_blocking() {
    return drain_those([](CUstream stream) { return stream->flags == 0; });
}

EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return call("cuStreamCreate", CONTEXT, [&] { return create_stream(stream, flags, 0); });
}
EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    return call("cuStreamCreateWithPriority", CONTEXT, [&] { return create_stream(stream, flags, priority); });
}
EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    CUresult error = of_stream("cuStreamDestroy", stream, [](CUstream s) {
        return s == &state().default_stream ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
    });
    if (error == CUDA_SUCCESS) error = drain(stream);
    if (error == CUDA_SUCCESS) {
        std::lock_guard<std::recursive_mutex> guard(state().lock);
        state().streams.erase(stream);
        // Another thread may be waiting for its work at this moment, which is none.
        state().ended.emplace_back(stream);
    }
    return error;
}
EXPORT CUresult cuStreamGetFlags(CUstream stream, unsigned* flags) {
    return of_stream("cuStreamGetFlags", stream, [&](CUstream s) {
        *flags = s->flags;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuStreamGetPriority(CUstream stream, int* priority) {
    return of_stream("cuStreamGetPriority", stream, [&](CUstream s) {
        *priority = s->priority;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
    return of_stream("cuStreamGetCtx", stream, [&](CUstream) {
        *context = &state().context;
        return CUDA_SUCCESS;
    });
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    CUresult error = of_stream("cuStreamSynchronize", stream, [](CUstream s) {
        return s->capture == CAPTURE_NONE ? CUDA_SUCCESS : refuse(invalidate(s), "cuStreamSynchronize of a stream that records");
    });
    return error != CUDA_SUCCESS ? error : drain(resolve(stream));
}
EXPORT CUresult cuStreamQuery(CUstream stream) {
    return of_stream("cuStreamQuery", stream, [](CUstream s) {
        if (s->capture != CAPTURE_NONE) return refuse(invalidate(s), "cuStreamQuery of a stream that records");
        return s->pending.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    });
}
EXPORT CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* data) {
    CUresult error = of_stream("cuLaunchHostFunc", stream, [](CUstream) { return CUDA_SUCCESS; });
    if (error != CUDA_SUCCESS) return error;
    return submit(stream, {NODE_HOST, "cuLaunchHostFunc", [=] {
                               function(data);
                               return CUDA_SUCCESS;
                           }});
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, CaptureMode mode) {
    return of_stream("cuStreamBeginCapture", stream, [&](CUstream s) {
        if (s == &state().default_stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (s->capture != CAPTURE_NONE) return CUDA_ERROR_ILLEGAL_STATE;
        s->capture = CAPTURE_ACTIVE;
        s->mode = mode;
        s->thread = this_thread();
        s->id = ++state().ids;
        s->graph = std::make_unique<CUgraph_st>();
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    return of_stream("cuStreamEndCapture", stream, [&](CUstream s) {
        *graph = nullptr;
        if (s->capture == CAPTURE_NONE) return CUDA_ERROR_ILLEGAL_STATE;
        if (s->mode != CAPTURE_RELAXED && s->thread != this_thread()) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
        bool valid = s->capture == CAPTURE_ACTIVE;
        s->capture = CAPTURE_NONE;
        if (!valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        *graph = s->graph.release();
        state().graphs.insert(*graph);
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CaptureStatus* status) {
    return of_stream("cuStreamIsCapturing", stream, [&](CUstream s) {
        *status = s->capture;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CaptureStatus* status, uint64_t* id, CUgraph* graph,
                                          const CUgraphNode** dependencies, const void** edges, size_t* count) {
    return of_stream("cuStreamGetCaptureInfo", stream, [&](CUstream s) {
        *status = s->capture;
        if (id != nullptr) *id = s->id;
        if (graph != nullptr) *graph = s->graph.get();
        if (dependencies != nullptr) *dependencies = nullptr;
        if (edges != nullptr) *edges = nullptr;
        if (count != nullptr) *count = 0;
        return CUDA_SUCCESS;
    });
}

EXPORT CUresult cuEventCreate(CUevent* event, unsigned flags) {
    return call("cuEventCreate", CONTEXT, [&] {
        *event = new CUev;
        (*event)->flags = flags;
        state().events.insert(*event);
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    CUstream waited = nullptr;
    CUresult error = of_event("cuEventDestroy", event, [&] {
        waited = event->captured ? nullptr : event->stream;
        return CUDA_SUCCESS;
    });
    if (error == CUDA_SUCCESS && waited != nullptr && state().streams.count(waited)) drain(waited);
    if (error == CUDA_SUCCESS) {
        std::lock_guard<std::recursive_mutex> guard(state().lock);
        state().events.erase(event);
        delete event;
    }
    return error;
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    CUresult error = of_event("cuEventRecord", event, [&] {
        CUstream s = resolve(stream);
        if (!is_stream(s)) return CUDA_ERROR_INVALID_HANDLE;
        event->recorded = true;
        event->done = false;
        event->captured = s->capture == CAPTURE_ACTIVE;
        event->stream = s;
        return CUDA_SUCCESS;
    });
    if (error != CUDA_SUCCESS) return error;
    return submit(stream, {NODE_RECORD, "cuEventRecord", [event] {
                               event->when = std::chrono::steady_clock::now();
                               event->done = true;
                               return CUDA_SUCCESS;
                           }});
}
EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) { return cuEventRecord(event, stream); }
EXPORT CUresult cuEventSynchronize(CUevent event) {
    CUstream waited = nullptr;
    CUresult error = of_event("cuEventSynchronize", event, [&] {
        if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
        if (CUresult refused = refuse_while_recording("cuEventSynchronize")) return refused;
        waited = event->recorded && !event->done ? event->stream : nullptr;
        return CUDA_SUCCESS;
    });
    return error == CUDA_SUCCESS && waited != nullptr ? drain(waited) : error;
}
EXPORT CUresult cuEventQuery(CUevent event) {
    return of_event("cuEventQuery", event, [&] {
        if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
        if (CUresult refused = refuse_while_recording("cuEventQuery")) return refused;
        return event->recorded && !event->done ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
    });
}
EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent from, CUevent to) {
    return of_event("cuEventElapsedTime", from, [&] {
        constexpr unsigned WITHOUT_TIME = 2;
        if (!state().events.count(to) || (from->flags | to->flags) & WITHOUT_TIME) return CUDA_ERROR_INVALID_HANDLE;
        if (!from->recorded || !to->recorded) return CUDA_ERROR_INVALID_HANDLE;
        if (!from->done || !to->done) return CUDA_ERROR_NOT_READY;
        *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}
EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    CUstream other = nullptr;
    CUresult error = of_event("cuStreamWaitEvent", event, [&] {
        CUstream s = resolve(stream);
        if (!is_stream(s)) return CUDA_ERROR_INVALID_HANDLE;
        if (event->captured && event->stream != s) {
            return refuse(CUDA_ERROR_NOT_SUPPORTED, "a recording that spreads to a second stream is not simulated");
        }
        if (s->capture == CAPTURE_ACTIVE && event->recorded && !event->captured) {
            invalidate(s);
            return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        }
        other = event->recorded && !event->done && event->stream != s ? event->stream : nullptr;
        return CUDA_SUCCESS;
    });
    if (error != CUDA_SUCCESS || other == nullptr) return error;
    return submit(stream, {NODE_HOST, "cuStreamWaitEvent", [other] { return drain(other); }});
}

// For the libraries that come with the driver: whether any stream records.
EXPORT int simulated_cuda_records() {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    return std::any_of(state().streams.begin(), state().streams.end(),
                       [](CUstream stream) { return stream->capture != CAPTURE_NONE; });
}
// For the libraries that come with the driver: work that runs as a kernel does, and owns its data.
EXPORT CUresult simulated_cuda_submit(CUstream stream, void (*run)(void*), void (*drop)(void*), void* data) {
    std::shared_ptr<void> owned(data, drop);
    CUresult error = of_stream("simulated_cuda_submit", stream, [](CUstream) { return CUDA_SUCCESS; });
    if (error != CUDA_SUCCESS) return error;
    return submit(stream, {NODE_KERNEL, "a library's kernel", [=] {
                               run(owned.get());
                               return CUDA_SUCCESS;
                           }});
}
