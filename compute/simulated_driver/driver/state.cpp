// The state, the error of the past, and errors on request.
//
// SIMULATED_CUDA_FAIL="cuLaunchKernel(rms_norm_f32):3=700,cuMemAlloc:10=2": the third launch of that kernel and the
// tenth allocation fail. A name counts with and without its _v2.
#include "state.h"

#include <cstdlib>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Failure {
    std::string name, detail;
    long left;
    CUresult error;
};

std::string without_version(std::string name) {
    size_t at = name.rfind("_v");
    return at != std::string::npos && at + 3 == name.size() ? name.substr(0, at) : name;
}

[[noreturn]] void bad_request(const std::string& request) {
    fprintf(stderr, "SIMULATED_CUDA_FAIL: `%s` is not FUNCTION[(KERNEL)]:CALL=ERROR\n", request.c_str());
    abort();
}

Failure parse_failure(const std::string& request) {
    size_t colon = request.rfind(':'), equals = request.rfind('=');
    if (colon == std::string::npos || equals == std::string::npos || equals < colon) bad_request(request);
    Failure failure{request.substr(0, colon), "", atol(request.c_str() + colon + 1),
                    static_cast<CUresult>(atoi(request.c_str() + equals + 1))};
    size_t open = failure.name.find('(');
    if (open != std::string::npos) {
        failure.detail = failure.name.substr(open + 1, failure.name.size() - open - 2);
        failure.name.resize(open);
    }
    failure.name = without_version(failure.name);
    if (failure.left < 1 || failure.error == CUDA_SUCCESS) bad_request(request);
    return failure;
}

std::vector<Failure> parse_failures() {
    std::vector<Failure> failures;
    const char* text = getenv("SIMULATED_CUDA_FAIL");
    std::string rest = text == nullptr ? "" : text;
    while (!rest.empty()) {
        size_t comma = rest.find(',');
        failures.push_back(parse_failure(rest.substr(0, comma)));
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    }
    return failures;
}

CUresult injected(const char* name, const char* detail) {
    static std::vector<Failure> failures = parse_failures();
    if (failures.empty()) return CUDA_SUCCESS;
    std::string plain = without_version(name);
    CUresult error = CUDA_SUCCESS;
    for (Failure& failure : failures) {
        if (failure.name != plain || (!failure.detail.empty() && failure.detail != detail)) continue;
        if (--failure.left == 0) error = failure.error;
    }
    return error;
}

// After these the context is of no more use.
bool is_sticky(CUresult error) { return error >= 700 && error < 720 && error != CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES; }

// Not zero at first, so that it does not lie among the shared variables of kernels (see host/block.h).
CUctx no_context;
__constinit thread_local CUcontext current = &no_context;

}  // namespace

State& state() {
    // Never taken down: threads may still call while the process ends.
    static State* all = [] {
        rlimit files;
        getrlimit(RLIMIT_NOFILE, &files);
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
        return new State;
    }();
    return *all;
}

uint64_t this_thread() { return syscall(SYS_gettid); }

CUcontext current_context() { return current == &no_context ? nullptr : current; }
void set_current_context(CUcontext context) { current = context == nullptr ? &no_context : context; }

CUresult refuse(CUresult error, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    fprintf(stderr, "simulated CUDA: %s\n", text);
    return error;
}

CUresult check(const char* name, const char* detail, Needs needs) {
    State& s = state();
    if (needs != NOTHING && !s.initialized) return CUDA_ERROR_NOT_INITIALIZED;
    CUresult error = injected(name, detail);
    if (is_sticky(error)) s.sticky = error;
    if (error != CUDA_SUCCESS) return error;
    if (needs != CONTEXT) return CUDA_SUCCESS;
    if (current_context() == nullptr || s.context.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    return s.sticky;
}
