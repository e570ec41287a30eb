// Device memory: each allocation a memory file of its own that another process can map, filled with NaN (0xFF) at
// first, between pages that nobody may touch. Copies check that both ends lie in one allocation.
//
//   | no access | file: 0xFF … | base, aligned to 256 | size | up to 255 bytes 0xFF | no access |
//
// The bytes of the file around the allocation are looked at when it is freed.
#include "state.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256;
constexpr char MAGIC[8] = {'S', 'I', 'M', 'C', 'U', 'D', 'A', '1'};

// The 64 bytes that travel to another process.
struct IpcHandle {
    char magic[8];
    int32_t process, file;
    uint64_t id, size;
    char rest[32];
};
static_assert(sizeof(IpcHandle) == 64, "the driver's size");

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Maps `size` bytes that end at a page without access; private memory when `file` is -1.
bool map(Allocation& a, size_t size, int file) {
    size_t whole = round_up(round_up(size, ALIGNMENT), PAGE);
    a.mapped = whole + 2 * PAGE;
    a.mapping = static_cast<char*>(mmap(nullptr, a.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (a.mapping == MAP_FAILED) return false;
    int flags = MAP_FIXED | (file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    if (mmap(a.mapping + PAGE, whole, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED) {
        munmap(a.mapping, a.mapped);
        return false;
    }
    a.size = size;
    a.file = file;
    a.base = a.mapping + PAGE + whole - round_up(size, ALIGNMENT);
    return true;
}

void unmap(const Allocation& a) {
    if (a.mapping != nullptr) munmap(a.mapping, a.mapped);
    if (a.file >= 0) close(a.file);
}

bool untouched(const char* from, const char* to) {
    while (from < to && *from == '\xFF') from++;
    return from == to;
}

std::string file_name(int process, uint64_t id) {
    return "simulated_cuda_" + std::to_string(process) + "_" + std::to_string(id);
}

CUresult allocate(CUdeviceptr* out, size_t size) {
    State& s = state();
    if (size == 0) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = refuse_while_recording("cuMemAlloc")) return error;
    if (size > memory_total() - s.used) return CUDA_ERROR_OUT_OF_MEMORY;
    Allocation a{DEVICE, nullptr, 0};
    a.id = ++s.ids;
    int file = memfd_create(file_name(getpid(), a.id).c_str(), MFD_CLOEXEC);
    size_t whole = round_up(round_up(size, ALIGNMENT), PAGE);
    if (file < 0 || ftruncate(file, whole) != 0 || !map(a, size, file)) {
        if (file >= 0) close(file);
        return refuse(CUDA_ERROR_OUT_OF_MEMORY, "%zu bytes: %s", size, strerror(errno));
    }
    memset(a.mapping + PAGE, 0xFF, whole);
    s.used += size;
    s.allocations[a.base] = a;
    *out = reinterpret_cast<CUdeviceptr>(a.base);
    return CUDA_SUCCESS;
}

CUresult release(char* at) {
    State& s = state();
    auto found = s.allocations.find(at);
    if (found == s.allocations.end() || found->second.kind != DEVICE) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = refuse_while_recording("cuMemFree")) return error;
    const Allocation& a = found->second;
    if (!untouched(a.mapping + PAGE, a.base) || !untouched(a.base + a.size, a.mapping + a.mapped - PAGE)) {
        s.sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
        return refuse(s.sticky, "memory just outside an allocation of %zu bytes was written", a.size);
    }
    s.used -= a.size;
    unmap(a);
    s.allocations.erase(found);
    return CUDA_SUCCESS;
}

void* pointer(CUdeviceptr at) { return reinterpret_cast<void*>(at); }

// A copy, once both ends are known. `reads_now`: pageable memory is read before the call returns.
CUresult copy(const char* name, void* to, const void* from, size_t size, CUstream stream, bool to_host, bool from_host,
              bool reads_now = !reads_pageable()) {
    bool pageable_to = false, pageable_from = false;
    CUresult error = call(name, CONTEXT, [&] {
        if (size == 0) return CUDA_SUCCESS;
        const Allocation *target = find_allocation(to, size), *source = find_allocation(from, size);
        if ((target == nullptr && !to_host) || (source == nullptr && !from_host)) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "%s of %zu bytes: %p is not inside an allocation", name, size,
                          target == nullptr && !to_host ? to : from);
        }
        pageable_to = target == nullptr;
        pageable_from = source == nullptr;
        return CUDA_SUCCESS;
    });
    if (error != CUDA_SUCCESS || size == 0) return error;
    Operation operation{NODE_COPY, name, nullptr};
    if (pageable_from && reads_now) {
        auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + size);
        operation.run = [=] {
            memcpy(to, staged->data(), size);
            return CUDA_SUCCESS;
        };
    } else {
        operation.run = [=] {
            memmove(to, from, size);
            return CUDA_SUCCESS;
        };
    }
    error = submit(stream, std::move(operation), !pageable_to && !pageable_from);
    return error == CUDA_SUCCESS && pageable_to ? drain(resolve(stream)) : error;
}

// A copy of the default stream, after all work of the streams that wait for it. It is done when the call returns, unless
// it brings pageable memory to the device: that has been read then, and no more.
CUresult copy_now(const char* name, void* to, const void* from, size_t size, bool to_host, bool from_host) {
    bool pageable_from = false;
    CUresult error = call("", CONTEXT, [&] {
        pageable_from = from_host && find_allocation(from, size) == nullptr;
        return refuse_while_recording(name);
    });
    if (error == CUDA_SUCCESS) error = drain_blocking();
    if (error == CUDA_SUCCESS) error = copy(name, to, from, size, nullptr, to_host, from_host, true);
    return error == CUDA_SUCCESS && !pageable_from ? drain(resolve(nullptr)) : error;
}

template <typename T>
CUresult fill(const char* name, CUdeviceptr at, T value, size_t count, CUstream stream) {
    CUresult error = call(name, CONTEXT, [&] {
        if (count == 0) return CUDA_SUCCESS;
        if (at % sizeof(T) != 0 || find_allocation(pointer(at), count * sizeof(T)) == nullptr) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "%s of %zu elements at %p", name, count, pointer(at));
        }
        return CUDA_SUCCESS;
    });
    if (error != CUDA_SUCCESS || count == 0) return error;
    return submit(stream, {NODE_FILL, name, [=] {
                               auto* out = static_cast<T*>(pointer(at));
                               for (size_t i = 0; i < count; i++) out[i] = value;
                               return CUDA_SUCCESS;
                           }});
}

CUresult open_handle(CUdeviceptr* out, const IpcHandle& handle) {
    State& s = state();
    if (memcmp(handle.magic, MAGIC, sizeof(MAGIC)) != 0) return CUDA_ERROR_INVALID_VALUE;
    // The driver's answer to a process that opens its own memory.
    if (handle.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    for (auto& [base, a] : s.allocations) {
        if (a.kind == IMPORTED && a.process == handle.process && a.id == handle.id) {
            a.opened++;
            *out = reinterpret_cast<CUdeviceptr>(base);
            return CUDA_SUCCESS;
        }
    }
    std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.file);
    char name[128] = {};
    std::string expected = "/memfd:" + file_name(handle.process, handle.id) + " (deleted)";
    if (readlink(path.c_str(), name, sizeof(name) - 1) < 0 || expected != name) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "the handle's memory is gone (%s)", path.c_str());
    }
    Allocation a{IMPORTED, nullptr, 0};
    int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0 || !map(a, handle.size, file)) {
        if (file >= 0) close(file);
        return refuse(CUDA_ERROR_OUT_OF_MEMORY, "%s: %s", path.c_str(), strerror(errno));
    }
    a.id = handle.id;
    a.process = handle.process;
    a.opened = 1;
    s.allocations[a.base] = a;
    *out = reinterpret_cast<CUdeviceptr>(a.base);
    return CUDA_SUCCESS;
}

// CU_POINTER_ATTRIBUTE_*.
CUresult pointer_attribute(void* out, int attribute, void* at) {
    const Allocation* a = find_allocation(at, 1);
    if (a == nullptr) return CUDA_ERROR_INVALID_VALUE;
    auto give = [out](auto value) {
        memcpy(out, &value, sizeof(value));
        return CUDA_SUCCESS;
    };
    switch (attribute) {
        case 1: return give(&state().context);
        case 2: return give(a->kind == PINNED ? 1u : 2u);
        case 3: return give(at);
        case 4: return a->kind == PINNED ? give(at) : CUDA_ERROR_INVALID_VALUE;
        case 7: return give(a->id);
        case 8: return give(0u);
        case 9: return give(0);
        case 10: return give(a->kind == DEVICE);
        case 11: return give(a->base);
        case 12: return give(a->size);
        case 13: return give(true);
        default: return refuse(CUDA_ERROR_NOT_SUPPORTED, "pointer attribute %d", attribute);
    }
}

CUresult allocate_pinned(void** out, size_t size) {
    return call("cuMemHostAlloc", CONTEXT, [&] {
        Allocation a{PINNED, nullptr, 0};
        if (size == 0) return CUDA_ERROR_INVALID_VALUE;
        if (CUresult error = refuse_while_recording("cuMemHostAlloc")) return error;
        if (!map(a, size, -1)) return CUDA_ERROR_OUT_OF_MEMORY;
        memset(a.base, 0xFF, size);
        state().allocations[a.base] = a;
        *out = a.base;
        return CUDA_SUCCESS;
    });
}

}  // namespace

Allocation* find_allocation(const void* at, size_t size) {
    auto& all = state().allocations;
    auto* byte = static_cast<char*>(const_cast<void*>(at));
    auto after = all.upper_bound(byte);
    if (after == all.begin()) return nullptr;
    Allocation& a = std::prev(after)->second;
    size_t offset = byte - a.base;
    return offset <= a.size && size <= a.size - offset ? &a : nullptr;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t size) {
    return call("cuMemAlloc", CONTEXT, [&] { return allocate(out, size); });
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr at) {
    // Waits for all work, as the driver does.
    CUresult error = call("cuMemFree", CONTEXT, [] { return CUDA_SUCCESS; });
    if (error == CUDA_SUCCESS && at != 0) error = drain_all();
    if (error != CUDA_SUCCESS || at == 0) return error;
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    return release(static_cast<char*>(pointer(at)));
}
EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr at) {
    return call("cuMemGetAddressRange", CONTEXT, [&] {
        const Allocation* a = find_allocation(pointer(at), 1);
        if (a == nullptr) return CUDA_ERROR_NOT_FOUND;
        if (base != nullptr) *base = reinterpret_cast<CUdeviceptr>(a->base);
        if (size != nullptr) *size = a->size;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuPointerGetAttribute(void* out, int attribute, CUdeviceptr at) {
    return call("cuPointerGetAttribute", CONTEXT, [&] { return pointer_attribute(out, attribute, pointer(at)); });
}
EXPORT CUresult cuPointerGetAttributes(unsigned count, const int* attributes, void** out, CUdeviceptr at) {
    return call("cuPointerGetAttributes", CONTEXT, [&] {
        for (unsigned i = 0; i < count; i++) {
            // Of an unknown pointer, the driver says so by zeros and no error.
            if (pointer_attribute(out[i], attributes[i], pointer(at)) != CUDA_SUCCESS) memset(out[i], 0, 4);
        }
        return CUDA_SUCCESS;
    });
}

EXPORT CUresult cuMemHostAlloc(void** out, size_t size, unsigned) { return allocate_pinned(out, size); }
EXPORT CUresult cuMemAllocHost_v2(void** out, size_t size) { return allocate_pinned(out, size); }
EXPORT CUresult cuMemFreeHost(void* at) {
    CUresult error = call("cuMemFreeHost", CONTEXT, [] { return CUDA_SUCCESS; });
    if (error == CUDA_SUCCESS) error = drain_all();
    if (error != CUDA_SUCCESS) return error;
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    auto found = state().allocations.find(static_cast<char*>(at));
    if (found == state().allocations.end() || found->second.kind != PINNED) return CUDA_ERROR_INVALID_VALUE;
    unmap(found->second);
    state().allocations.erase(found);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostRegister_v2(void* at, size_t size, unsigned) {
    return call("cuMemHostRegister", CONTEXT, [&] {
        auto* base = static_cast<char*>(at);
        if (size == 0 || find_allocation(at, 1) != nullptr) return CUDA_ERROR_INVALID_VALUE;
        state().allocations[base] = Allocation{PINNED, base, size};
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuMemHostUnregister(void* at) {
    CUresult error = call("cuMemHostUnregister", CONTEXT, [] { return CUDA_SUCCESS; });
    return error != CUDA_SUCCESS ? error : cuMemFreeHost(at);
}
EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* at, unsigned) {
    return call("cuMemHostGetDevicePointer", CONTEXT, [&] {
        const Allocation* a = find_allocation(at, 1);
        if (a == nullptr || a->kind != PINNED) return CUDA_ERROR_INVALID_VALUE;
        *out = reinterpret_cast<CUdeviceptr>(at);
        return CUDA_SUCCESS;
    });
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
    return copy("cuMemcpyHtoDAsync", pointer(to), from, size, stream, false, true);
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy("cuMemcpyDtoHAsync", to, pointer(from), size, stream, true, false);
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy("cuMemcpyDtoDAsync", pointer(to), pointer(from), size, stream, false, false);
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy("cuMemcpyAsync", pointer(to), pointer(from), size, stream, true, true);
}
EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t size) {
    return copy_now("cuMemcpyHtoD", pointer(to), from, size, false, true);
}
EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
    return copy_now("cuMemcpyDtoH", to, pointer(from), size, true, false);
}
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    return copy_now("cuMemcpyDtoD", pointer(to), pointer(from), size, false, false);
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t count, CUstream stream) {
    return fill("cuMemsetD8Async", at, value, count, stream);
}
EXPORT CUresult cuMemsetD16Async(CUdeviceptr at, unsigned short value, size_t count, CUstream stream) {
    return fill("cuMemsetD16Async", at, value, count, stream);
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
    return fill("cuMemsetD32Async", at, value, count, stream);
}
EXPORT CUresult cuMemsetD8_v2(CUdeviceptr at, unsigned char value, size_t count) {
    return fill("cuMemsetD8", at, value, count, nullptr);
}
EXPORT CUresult cuMemsetD32_v2(CUdeviceptr at, unsigned value, size_t count) {
    return fill("cuMemsetD32", at, value, count, nullptr);
}

EXPORT CUresult cuIpcGetMemHandle(IpcHandle* out, CUdeviceptr at) {
    return call("cuIpcGetMemHandle", CONTEXT, [&] {
        const Allocation* a = find_allocation(pointer(at), 1);
        if (a == nullptr || a->kind != DEVICE) return CUDA_ERROR_INVALID_VALUE;
        *out = IpcHandle{{}, getpid(), a->file, a->id, a->size, {}};
        memcpy(out->magic, MAGIC, sizeof(MAGIC));
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* out, IpcHandle handle, unsigned flags) {
    return call("cuIpcOpenMemHandle", CONTEXT, [&] {
        if (flags != 1) return CUDA_ERROR_INVALID_VALUE;
        return open_handle(out, handle);
    });
}
EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr at) {
    CUresult error = call("cuIpcCloseMemHandle", CONTEXT, [] { return CUDA_SUCCESS; });
    if (error == CUDA_SUCCESS) error = drain_all();
    if (error != CUDA_SUCCESS) return error;
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    auto found = state().allocations.find(static_cast<char*>(pointer(at)));
    if (found == state().allocations.end() || found->second.kind != IMPORTED) return CUDA_ERROR_INVALID_VALUE;
    if (--found->second.opened > 0) return CUDA_SUCCESS;
    unmap(found->second);
    state().allocations.erase(found);
    return CUDA_SUCCESS;
}

// For the libraries that come with the driver: whether all of the range is device memory.
EXPORT int simulated_cuda_holds(const void* at, size_t size) {
    std::lock_guard<std::recursive_mutex> guard(state().lock);
    return find_allocation(at, size) != nullptr;
}
