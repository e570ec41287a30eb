// The one device, its context, and the names of errors.
#include "state.h"

#include <cstdlib>
#include <cstring>
#include <unistd.h>

namespace {

// CU_DEVICE_ATTRIBUTE_*, with the values of an H200.
const std::map<int, int> ATTRIBUTES = {
    {1, 1024},        // threads of a block
    {2, 1024},        // block x
    {3, 1024},        // block y
    {4, 64},          // block z
    {5, 2147483647},  // grid x
    {6, 65535},       // grid y
    {7, 65535},       // grid z
    {8, 48 << 10},    // shared memory of a block
    {9, 64 << 10},    // constant memory
    {10, 32},         // warp
    {12, 65536},      // registers of a block
    {13, 1980000},    // clock, kHz
    {16, 132},        // multiprocessors
    {19, 1},          // maps host memory
    {31, 1},          // concurrent kernels
    {36, 3201000},    // memory clock, kHz
    {37, 6144},       // memory bus, bits
    {38, 60 << 20},   // second-level cache
    {39, 2048},       // threads of a multiprocessor
    {40, 3},          // copy engines
    {41, 1},          // one address space with the host
    {75, 9},          // compute capability, major
    {76, 0},          // and minor
    {78, 1},          // stream priorities
    {81, 228 << 10},  // shared memory of a multiprocessor
    {82, 65536},      // registers of a multiprocessor
    {97, 227 << 10},  // shared memory of a block on request
    {106, 32},        // blocks of a multiprocessor
    {111, 1 << 10},   // shared memory that the driver keeps of each block
};

struct ErrorText {
    int code;
    const char *name, *text;
};
constexpr ErrorText ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {208, "CUDA_ERROR_ALREADY_MAPPED", "resource already mapped"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

CUresult text_of(int code, const char** out, const char* ErrorText::*member) {
    for (const ErrorText& error : ERRORS) {
        if (error.code == code) {
            *out = error.*member;
            return CUDA_SUCCESS;
        }
    }
    *out = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

template <typename F>
CUresult of_device(const char* name, CUdevice device, F body) {
    return call(name, DRIVER, [&] { return device == 0 ? body() : CUDA_ERROR_INVALID_DEVICE; });
}

}  // namespace

size_t memory_total() {
    const char* text = getenv("SIMULATED_CUDA_MEMORY");
    return text == nullptr ? size_t{16} << 30 : strtoull(text, nullptr, 10);
}

bool reads_pageable() { return getenv("SIMULATED_CUDA_PAGEABLE") != nullptr; }

EXPORT CUresult cuInit(unsigned flags) {
    return call("cuInit", NOTHING, [&] {
        if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
        state().initialized = true;
        return CUDA_SUCCESS;
    });
}

EXPORT CUresult cuDriverGetVersion(int* version) {
    *version = 13000;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(int error, const char** out) { return text_of(error, out, &ErrorText::name); }
EXPORT CUresult cuGetErrorString(int error, const char** out) { return text_of(error, out, &ErrorText::text); }

EXPORT CUresult cuDeviceGetCount(int* count) {
    return call("cuDeviceGetCount", DRIVER, [&] {
        *count = 1;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return of_device("cuDeviceGet", ordinal, [&] {
        *device = 0;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
    return of_device("cuDeviceGetName", device, [&] {
        snprintf(name, size, "simulated GPU");
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDeviceGetUuid_v2(unsigned char* uuid, CUdevice device) {
    return of_device("cuDeviceGetUuid", device, [&] {
        memcpy(uuid, "simulated GPU 0", 16);
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDeviceGetUuid(unsigned char* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
EXPORT CUresult cuDeviceGetPCIBusId(char* text, int size, CUdevice device) {
    return of_device("cuDeviceGetPCIBusId", device, [&] {
        snprintf(text, size, "0000:00:00.0");
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
    return of_device("cuDeviceGetAttribute", device, [&] {
        constexpr int PAGEABLE_MEMORY_ACCESS = 88;
        if (attribute == PAGEABLE_MEMORY_ACCESS) {
            *value = reads_pageable();
            return CUDA_SUCCESS;
        }
        auto found = ATTRIBUTES.find(attribute);
        *value = found == ATTRIBUTES.end() ? 0 : found->second;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return of_device("cuDeviceTotalMem", device, [&] {
        *bytes = memory_total();
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
    return call("cuMemGetInfo", CONTEXT, [&] {
        *total = memory_total();
        *available = *total - state().used;
        return CUDA_SUCCESS;
    });
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return of_device("cuDevicePrimaryCtxRetain", device, [&] {
        state().context.retained++;
        *context = &state().context;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return of_device("cuDevicePrimaryCtxRelease", device, [&] {
        if (state().context.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
        state().context.retained--;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return of_device("cuDevicePrimaryCtxGetState", device, [&] {
        *flags = 0;
        *active = state().context.retained > 0;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned) {
    return of_device("cuDevicePrimaryCtxSetFlags", device, [] { return CUDA_SUCCESS; });
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    return call("cuCtxSetCurrent", DRIVER, [&] {
        if (context != nullptr && context != &state().context) return CUDA_ERROR_INVALID_CONTEXT;
        set_current_context(context);
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
    return call("cuCtxGetCurrent", DRIVER, [&] {
        *context = current_context();
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    return call("cuCtxGetDevice", CONTEXT, [&] {
        *device = 0;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
    return call("cuCtxGetApiVersion", CONTEXT, [&] {
        *version = 13000;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call("cuCtxGetStreamPriorityRange", CONTEXT, [&] {
        *least = 0;
        *greatest = -5;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuCtxSetFlags(unsigned) {
    return call("cuCtxSetFlags", CONTEXT, [] { return CUDA_SUCCESS; });
}
EXPORT CUresult cuCtxSetLimit(int, size_t) {
    return call("cuCtxSetLimit", CONTEXT, [] { return CUDA_SUCCESS; });
}
EXPORT CUresult cuCtxSynchronize() {
    CUresult error = call("cuCtxSynchronize", CONTEXT, [] { return refuse_while_recording("cuCtxSynchronize", true); });
    return error != CUDA_SUCCESS ? error : drain_all();
}
