// The few functions of cuBLASLt by which D = alpha·op(A)·op(B) + beta·C is asked for, on the simulated driver.
//
// Matrices are column-major with a leading dimension; A and B have one type (bf16, f16 or f32), C and D are of that
// type or f32, sums are f32. Batches, epilogues and other orders are answered as not supported.
#include "half.h"

#include <cstddef>
#include <cstdio>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// The driver's side (stream.cpp, memory.cpp).
extern "C" int simulated_cuda_records();
extern "C" int simulated_cuda_submit(void* stream, void (*run)(void*), void (*drop)(void*), void* data);
extern "C" int simulated_cuda_holds(const void* at, size_t size);

namespace {

enum Status : int { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };
enum Type : int { F32 = 0, F16 = 2, BF16 = 14 };
enum { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_TF32 = 77 };

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Description {
    int compute, scale, transpose_a, transpose_b;
};
struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

size_t element(int type) { return type == F32 ? 4 : 2; }
size_t bytes(const Layout& l) { return ((l.columns - 1) * l.leading + l.rows) * element(l.type); }

float load(const void* at, int type, size_t i) {
    if (type == F32) return static_cast<const float*>(at)[i];
    auto bits = static_cast<const unsigned short*>(at)[i];
    return type == BF16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

void store(void* at, int type, size_t i, float v) {
    if (type == F32) {
        static_cast<float*>(at)[i] = v;
        return;
    }
    static_cast<unsigned short*>(at)[i] =
        type == BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v));
}

// One product with everything that it needs later.
struct Product {
    Description description;
    Layout a, b, c, d;
    const void *a_at, *b_at, *c_at;
    void* d_at;
    float alpha, beta;

    bool fits() const {
        uint64_t m = description.transpose_a ? a.columns : a.rows, k = description.transpose_a ? a.rows : a.columns;
        uint64_t n = description.transpose_b ? b.rows : b.columns, l = description.transpose_b ? b.columns : b.rows;
        bool leading = true;
        for (const Layout* x : {&a, &b, &c, &d}) leading &= x->leading >= static_cast<int64_t>(x->rows) && x->rows > 0;
        return leading && k == l && d.rows == m && d.columns == n && c.rows == m && c.columns == n;
    }
    bool supported() const {
        bool sums = description.compute == COMPUTE_32F || description.compute == COMPUTE_32F_PEDANTIC ||
                    (description.compute == COMPUTE_32F_FAST_TF32 && a.type == F32);
        bool types = a.type == b.type && c.type == d.type && (d.type == a.type || d.type == F32);
        for (int type : {a.type, d.type}) types &= type == F32 || type == F16 || type == BF16;
        return sums && types && description.scale == F32;
    }
    void run() const;
};

// The lines of op(X) along the summed dimension, one after another.
std::vector<float> lines(const void* at, const Layout& l, bool along_columns) {
    uint64_t count = along_columns ? l.columns : l.rows, length = along_columns ? l.rows : l.columns;
    std::vector<float> out(count * length);
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t j = 0; j < length; j++) {
            out[i * length + j] = load(at, l.type, along_columns ? i * l.leading + j : j * l.leading + i);
        }
    }
    return out;
}

float dot(const float* x, const float* y, uint64_t n) {
    float lanes[16] = {};
    uint64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int lane = 0; lane < 16; lane++) lanes[lane] += x[i + lane] * y[i + lane];
    }
    for (; i < n; i++) lanes[0] += x[i] * y[i];
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

void Product::run() const {
    std::vector<float> rows = lines(a_at, a, description.transpose_a), columns = lines(b_at, b, !description.transpose_b);
    uint64_t k = description.transpose_a ? a.rows : a.columns;
    for (uint64_t j = 0; j < d.columns; j++) {
        for (uint64_t i = 0; i < d.rows; i++) {
            float sum = alpha * dot(&rows[i * k], &columns[j * k], k);
            // With beta 0, C is not read: it may be NaN.
            if (beta != 0) sum += beta * load(c_at, c.type, j * c.leading + i);
            store(d_at, d.type, j * d.leading + i, sum);
        }
    }
}

template <typename T>
Status create(T** out, T value) {
    *out = new T(value);
    return SUCCESS;
}
template <typename T>
Status destroy(T* object) {
    delete object;
    return SUCCESS;
}
template <typename T>
Status set(T& field, const void* value, size_t size) {
    if (size != sizeof(field)) return INVALID_VALUE;
    memcpy(&field, value, size);
    return SUCCESS;
}
// An attribute that may only have the value it has.
Status only(int wanted, const void* value, size_t size) {
    return size == sizeof(wanted) && memcmp(&wanted, value, size) == 0 ? SUCCESS : NOT_SUPPORTED;
}

}  // namespace

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT Status cublasLtCreate(int** handle) { return create(handle, 0); }
EXPORT Status cublasLtDestroy(int* handle) { return destroy(handle); }

EXPORT Status cublasLtMatmulDescCreate(Description** out, int compute, int scale) {
    return create(out, Description{compute, scale, 0, 0});
}
EXPORT Status cublasLtMatmulDescDestroy(Description* description) { return destroy(description); }
EXPORT Status cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t size) {
    switch (attribute) {
        case 0: return set(description->compute, value, size);
        case 1: return set(description->scale, value, size);
        case 2: return only(0, value, size);  // pointers to alpha and beta are the host's
        case 3: return set(description->transpose_a, value, size);
        case 4: return set(description->transpose_b, value, size);
        case 5: return only(0, value, size);
        case 7: return only(1, value, size);  // no epilogue
        default: return NOT_SUPPORTED;
    }
}

EXPORT Status cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    return create(out, Layout{type, rows, columns, leading});
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }
EXPORT Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t size) {
    switch (attribute) {
        case 0: return set(layout->type, value, size);
        case 1: return only(0, value, size);  // column-major
        case 2: return set(layout->rows, value, size);
        case 3: return set(layout->columns, value, size);
        case 4: return set(layout->leading, value, size);
        case 5: return only(1, value, size);  // one matrix
        default: return NOT_SUPPORTED;
    }
}

EXPORT Status cublasLtMatmulPreferenceCreate(size_t** out) { return create(out, size_t{0}); }
EXPORT Status cublasLtMatmulPreferenceDestroy(size_t* preference) { return destroy(preference); }
EXPORT Status cublasLtMatmulPreferenceSetAttribute(size_t* preference, int attribute, const void* value, size_t size) {
    constexpr int WORKSPACE = 1;
    return attribute == WORKSPACE ? set(*preference, value, size) : SUCCESS;
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(int*, const Description* description, const Layout* a, const Layout* b,
                                             const Layout* c, const Layout* d, const size_t* preference, int wanted,
                                             Heuristic* results, int* count) {
    Product product{*description, *a, *b, *c, *d, nullptr, nullptr, nullptr, nullptr, 0, 0};
    *count = 0;
    if (simulated_cuda_records()) {
        fprintf(stderr, "simulated cuBLASLt: an algorithm is asked for while a stream records, which fails from CUDA 13.3 on\n");
        return INTERNAL_ERROR;
    }
    if (!product.fits() || wanted < 1) return INVALID_VALUE;
    if (!product.supported()) return NOT_SUPPORTED;
    // All of the workspace is asked for, so that a caller that gives less is found out.
    results[0] = Heuristic{Algorithm{{1, *preference}}, *preference, SUCCESS, 1.0f, {}};
    *count = 1;
    return SUCCESS;
}

EXPORT Status cublasLtMatmul(int*, const Description* description, const float* alpha, const void* a_at, const Layout* a,
                             const void* b_at, const Layout* b, const float* beta, const void* c_at, const Layout* c,
                             void* d_at, const Layout* d, const Algorithm* algorithm, void* workspace,
                             size_t workspace_bytes, void* stream) {
    Product product{*description, *a, *b, *c, *d, a_at, b_at, c_at, d_at, *alpha, *beta};
    if (!product.fits()) return INVALID_VALUE;
    if (!product.supported()) return NOT_SUPPORTED;
    bool held = simulated_cuda_holds(a_at, bytes(*a)) && simulated_cuda_holds(b_at, bytes(*b)) &&
                simulated_cuda_holds(d_at, bytes(*d)) && (*beta == 0 || simulated_cuda_holds(c_at, bytes(*c)));
    bool room = algorithm == nullptr || workspace_bytes >= algorithm->data[1];
    if (!held || !room || (workspace_bytes > 0 && !simulated_cuda_holds(workspace, workspace_bytes))) {
        fprintf(stderr, "simulated cuBLASLt: an operand or the workspace is not inside an allocation\n");
        return INVALID_VALUE;
    }
    int error = simulated_cuda_submit(
        stream, [](void* p) { static_cast<Product*>(p)->run(); }, [](void* p) { delete static_cast<Product*>(p); },
        new Product(product));
    return error == 0 ? SUCCESS : EXECUTION_FAILED;
}
