// Modules, functions and launches, and graphs of what was recorded.
//
// The code of a kernel is the one compiled for this machine. From the PTX only the list of kernels is taken, so that a
// kernel that it lacks is not found here either; an image without any kernel stands for all of them.
#include "state.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

namespace {

constexpr size_t SHARED_DEFAULT = 48 << 10, SHARED_MAX = 227 << 10, SHARED_MULTIPROCESSOR = 228 << 10;

// The number after `key`, times ten and with its first decimal; 0 if there is none.
int tenths_after(const std::string& text, const char* key) {
    size_t at = text.find(key);
    return at == std::string::npos ? 0 : static_cast<int>(10 * atof(text.c_str() + at + strlen(key)) + 0.5);
}

// What driver 580 (CUDA 13.0) takes on a device of compute capability 9.0.
CUresult check_ptx(const std::string& ptx) {
    if (tenths_after(ptx, ".version ") > 90) return CUresult(222);
    if (tenths_after(ptx, ".target sm_") > 900) return CUresult(209);
    return CUDA_SUCCESS;
}

// The parameters that the PTX gives the kernel; -1 if it has no such kernel.
int ptx_parameters(const std::string& ptx, const std::string& name) {
    size_t at = ptx.find(".entry " + name + "(");
    if (at == std::string::npos) return -1;
    size_t end = ptx.find(')', at);
    int count = 0;
    while ((at = ptx.find(".param", at)) < end) count++, at++;
    return count;
}

CUresult load_module(CUmodule* out, const void* image) {
    if (image == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = refuse_while_recording("cuModuleLoadData")) return error;
    std::string ptx = static_cast<const char*>(image);
    if (CUresult error = check_ptx(ptx)) return error;
    *out = new CUmod{std::move(ptx), {}};
    state().modules.insert(*out);
    return CUDA_SUCCESS;
}

CUresult get_function(CUfunction* out, CUmodule module, const std::string& name) {
    if (!state().modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
    std::unique_ptr<CUfunc>& function = module->functions[name];
    if (function == nullptr) {
        const HostKernel* kernel = host_kernel(name);
        if (module->ptx.find(".entry ") != std::string::npos) {
            int parameters = ptx_parameters(module->ptx, name);
            if (parameters < 0) return refuse(CUDA_ERROR_NOT_FOUND, "no kernel `%s` in the PTX", name.c_str());
            if (kernel != nullptr && parameters != static_cast<int>(kernel->count)) {
                return refuse(CUDA_ERROR_INVALID_IMAGE, "kernel `%s` has %d parameters in the PTX and %zu in the source",
                              name.c_str(), parameters, kernel->count);
            }
        }
        if (kernel == nullptr) return refuse(CUDA_ERROR_NOT_FOUND, "no kernel `%s`", name.c_str());
        function.reset(new CUfunc{kernel, module});
    }
    *out = function.get();
    return CUDA_SUCCESS;
}

bool is_function(CUfunction function) {
    for (CUmodule module : state().modules) {
        for (auto& [name, known] : module->functions) {
            if (known.get() == function) return true;
        }
    }
    return false;
}

template <typename F>
CUresult of_function(const char* name, CUfunction function, F body) {
    return call(name, CONTEXT, [&] { return is_function(function) ? body() : CUDA_ERROR_INVALID_HANDLE; });
}

// The limits of the device and of the function.
CUresult check_launch(const CUfunc& f, const unsigned (&grid)[3], const unsigned (&block)[3], size_t dynamic_bytes) {
    const char* name = f.kernel->name;
    size_t threads = size_t{block[0]} * block[1] * block[2];
    if (size_t{grid[0]} * grid[1] * grid[2] == 0 || threads == 0) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: an empty grid (%u,%u,%u) or block (%u,%u,%u)", name, grid[0], grid[1],
                      grid[2], block[0], block[1], block[2]);
    }
    if (grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: grid (%u,%u,%u)", name, grid[0], grid[1], grid[2]);
    }
    if (threads > f.kernel->threads_max || block[2] > 64) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: block (%u,%u,%u), at most %u threads", name, block[0], block[1],
                      block[2], f.kernel->threads_max);
    }
    if (dynamic_bytes > f.dynamic_max) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %zu bytes of dynamic shared memory, at most %zu", name, dynamic_bytes,
                      f.dynamic_max);
    }
    return CUDA_SUCCESS;
}

// Memory that a GPU cannot reach: mapped here, and no allocation.
bool is_host_only(uint64_t value) {
    if (value < 1 << 16 || value >> 47 != 0) return false;
    auto after = state().allocations.upper_bound(reinterpret_cast<char*>(value));
    if (after != state().allocations.begin()) {
        const Allocation& a = std::prev(after)->second;
        // One past the end is a pointer that nobody follows.
        if (reinterpret_cast<char*>(value) <= a.base + a.size) return false;
    }
    unsigned char resident;
    return mincore(reinterpret_cast<void*>(value & ~uint64_t{4095}), 1, &resident) == 0;
}

// The arguments of a launch, copied as the driver does.
struct Arguments {
    std::vector<uint64_t> memory;
    std::vector<void*> pointers;
};

std::shared_ptr<Arguments> copy_arguments(const HostKernel& kernel, void** given) {
    auto copied = std::make_shared<Arguments>();
    size_t words = 0;
    for (size_t i = 0; i < kernel.count; i++) words += (kernel.sizes[i] + 15) / 16 * 2;
    copied->memory.resize(words + 2);
    auto* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(copied->memory.data()) + 15) / 16 * 16);
    for (size_t i = 0; i < kernel.count; i++) {
        memcpy(at, given[i], kernel.sizes[i]);
        copied->pointers.push_back(at);
        at += (kernel.sizes[i] + 15) / 16 * 16;
    }
    return copied;
}

CUresult check_arguments(const HostKernel& kernel, void** given) {
    if (given == nullptr && kernel.count > 0) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: no arguments", kernel.name);
    for (size_t i = 0; i < kernel.count; i++) {
        uint64_t value;
        if (kernel.sizes[i] != sizeof(value)) continue;
        memcpy(&value, given[i], sizeof(value));
        if (is_host_only(value)) {
            state().sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
            return refuse(state().sticky, "%s: argument %zu points to memory of the host", kernel.name, i);
        }
    }
    return CUDA_SUCCESS;
}

bool is_graph(CUgraph graph) { return state().graphs.count(graph) != 0; }

CUresult instantiate(const char* name, CUgraphExec* out, CUgraph graph) {
    return call(name, CONTEXT, [&] {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        *out = new CUgraph_st{graph->nodes};
        state().graphs.insert(*out);
        return CUDA_SUCCESS;
    });
}

CUresult destroy_graph(const char* name, CUgraph graph) {
    return call(name, CONTEXT, [&] {
        if (state().graphs.erase(graph) == 0) return CUDA_ERROR_INVALID_VALUE;
        delete graph;
        return CUDA_SUCCESS;
    });
}

}  // namespace

EXPORT CUresult cuModuleLoadData(CUmodule* out, const void* image) {
    return call("cuModuleLoadData", CONTEXT, [&] { return load_module(out, image); });
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(out, image);
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
    return call("cuModuleUnload", CONTEXT, [&] {
        if (state().modules.erase(module) == 0) return CUDA_ERROR_INVALID_HANDLE;
        delete module;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
    return call("cuModuleGetFunction", CONTEXT, [&] { return get_function(out, module, name); }, name);
}

// Loads now what the driver would load at the first launch.
EXPORT CUresult cuFuncLoad(CUfunction function) {
    return of_function("cuFuncLoad", function, [] { return CUDA_SUCCESS; });
}
EXPORT CUresult cuFuncIsLoaded(int* loaded, CUfunction function) {
    return of_function("cuFuncIsLoaded", function, [&] {
        *loaded = 1;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuFuncGetName(const char** name, CUfunction function) {
    return of_function("cuFuncGetName", function, [&] {
        *name = function->kernel->name;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuFuncGetModule(CUmodule* module, CUfunction function) {
    return of_function("cuFuncGetModule", function, [&] {
        *module = function->module;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
    return of_function("cuFuncGetParamInfo", function, [&] {
        const HostKernel& kernel = *function->kernel;
        if (index >= kernel.count) return CUDA_ERROR_INVALID_VALUE;
        size_t at = 0;
        for (size_t i = 0; i <= index; i++) {
            at = (at + kernel.alignments[i] - 1) / kernel.alignments[i] * kernel.alignments[i];
            if (i < index) at += kernel.sizes[i];
        }
        *offset = at;
        if (size != nullptr) *size = kernel.sizes[index];
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
    return of_function("cuFuncGetAttribute", function, [&] {
        switch (attribute) {
            case 0: *value = static_cast<int>(function->kernel->threads_max); return CUDA_SUCCESS;
            case 5: *value = 80; return CUDA_SUCCESS;
            case 6: *value = 90; return CUDA_SUCCESS;
            case 8: *value = static_cast<int>(function->dynamic_max); return CUDA_SUCCESS;
            // Shared, constant and local memory and registers: what a compiler for a GPU would know.
            default: *value = 0; return attribute < 16 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
        }
    });
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    return of_function("cuFuncSetAttribute", function, [&] {
        constexpr int MAX_DYNAMIC_SHARED = 8, PREFERRED_CARVEOUT = 9;
        if (attribute == PREFERRED_CARVEOUT) return CUDA_SUCCESS;
        if (attribute != MAX_DYNAMIC_SHARED || value < 0 || static_cast<size_t>(value) > SHARED_MAX) {
            return refuse(CUDA_ERROR_INVALID_VALUE, "%s: function attribute %d = %d", function->kernel->name, attribute, value);
        }
        function->dynamic_max = std::max<size_t>(value, SHARED_DEFAULT);
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, int) {
    return of_function("cuFuncSetCacheConfig", function, [] { return CUDA_SUCCESS; });
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t dynamic) {
    return of_function("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, [&] {
        if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
        bool fits = static_cast<unsigned>(threads) <= function->kernel->threads_max && dynamic <= function->dynamic_max;
        size_t by_memory = SHARED_MULTIPROCESSOR / (dynamic + 1024), by_threads = 2048 / ((threads + 31) / 32 * 32);
        *blocks = fits ? static_cast<int>(std::min<size_t>(std::min(by_memory, by_threads), 32)) : 0;
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads,
                                                                     size_t dynamic, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic);
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned dynamic_bytes, CUstream stream,
                               void** arguments, void** extra) {
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    std::shared_ptr<Arguments> copied;
    const HostKernel* kernel = nullptr;
    {
        // Looked up first: an error may be asked for by the kernel's name.
        std::lock_guard<std::recursive_mutex> guard(state().lock);
        if (is_function(function)) kernel = function->kernel;
    }
    CUresult error = call("cuLaunchKernel", CONTEXT, [&] {
        if (kernel == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
        if (CUresult refused = check_launch(*function, grid, block, dynamic_bytes)) return refused;
        if (CUresult refused = check_arguments(*kernel, arguments)) return refused;
        copied = copy_arguments(*kernel, arguments);
        return CUDA_SUCCESS;
    }, kernel == nullptr ? "" : kernel->name);
    if (error != CUDA_SUCCESS) return error;
    return submit(stream, {NODE_KERNEL, kernel->name, [=] {
                               const unsigned g[3] = {grid_x, grid_y, grid_z}, b[3] = {block_x, block_y, block_z};
                               return run_kernel(*kernel, copied->pointers.data(), g, b, dynamic_bytes);
                           }});
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long) {
    return instantiate("cuGraphInstantiateWithFlags", out, graph);
}
EXPORT CUresult cuGraphInstantiateWithParams(CUgraphExec* out, CUgraph graph, void*) {
    return instantiate("cuGraphInstantiateWithParams", out, graph);
}
EXPORT CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
    std::vector<std::shared_ptr<Operation>> nodes;
    CUresult error = call("cuGraphLaunch", CONTEXT, [&] {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        nodes = graph->nodes;
        return CUDA_SUCCESS;
    });
    if (error != CUDA_SUCCESS) return error;
    return submit(stream, {NODE_KERNEL, "cuGraphLaunch", [nodes] {
                               for (const auto& node : nodes) {
                                   if (CUresult failed = node->run()) return failed;
                               }
                               return CUDA_SUCCESS;
                           }});
}
EXPORT CUresult cuGraphUpload(CUgraphExec graph, CUstream) {
    return call("cuGraphUpload", CONTEXT, [&] { return is_graph(graph) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) { return destroy_graph("cuGraphDestroy", graph); }
EXPORT CUresult cuGraphExecDestroy(CUgraphExec graph) { return destroy_graph("cuGraphExecDestroy", graph); }
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* out, size_t* count) {
    return call("cuGraphGetNodes", CONTEXT, [&] {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        for (size_t i = 0; out != nullptr && i < std::min(*count, graph->nodes.size()); i++) out[i] = graph->nodes[i].get();
        *count = graph->nodes.size();
        return CUDA_SUCCESS;
    });
}
EXPORT CUresult cuGraphNodeGetType(CUgraphNode node, int* type) {
    return call("cuGraphNodeGetType", CONTEXT, [&] {
        *type = node->type;
        return CUDA_SUCCESS;
    });
}
