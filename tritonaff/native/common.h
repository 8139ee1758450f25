// Shared by all native kernels: images of any dtype and strides, exp and log, memory, threads.
//
// Kernels compute in float32, row by row. A row function takes __restrict__ pointers, is not
// inlined, and holds one loop: then compilers vectorise the loop. Built without -ffast-math, so
// that NaN stays NaN.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ROW_FUNCTION static __attribute__((noinline))
#define RESTRICT __restrict__

// torch has loaded an OpenMP runtime, which provides this entry; its threads serve torch and these
// kernels. Any compiler can call the entry. Without it, one thread does all the work.
extern "C" __attribute__((weak)) void GOMP_parallel(
    void (*)(void*), void*, unsigned num_threads, unsigned flags
);

namespace {

using Floats = const float* RESTRICT;
using FloatsOut = float* RESTRICT;
using Ints = const int32_t* RESTRICT;
using IntsOut = int32_t* RESTRICT;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

inline float as_float(int32_t i) { float f; std::memcpy(&f, &i, 4); return f; }
inline int32_t as_int(float f) { int32_t i; std::memcpy(&i, &f, 4); return i; }

// Conditions are masks, -1 or 0, as wide as the numbers beside them: compilers vectorise masks
// better than bool.
inline int32_t mask(bool condition) { return condition ? -1 : 0; }

// x, or 0 where the mask is 0.
inline float masked(float x, int32_t mask) { return as_float(as_int(x) & mask); }

inline int64_t divide_up(int64_t x, int64_t step) { return (x + step - 1) / step; }
inline int64_t round_up(int64_t x, int64_t step) { return divide_up(x, step) * step; }

// --- Functions ----------------------------------------------------------------------------------

// exp(x) for x <= 0, within 2 roundings; 0 below -87. The power of two is multiplied in: adding
// to the exponent's bits would turn NaN into a number.
inline float exp_of_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = clamped * 1.44269504f + 12583039.0f;  // 1.5 * 2^23 + 127
    float k = shifted - 12583039.0f;
    float r = clamped - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    // Not Horner's scheme: in shorter chains a processor finds more to do at a time.
    float r2 = r * r;
    float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r2 + (8.3334519073e-3f * r + 4.1665795894e-2f);
    p = p * r2 + (1.6666665459e-1f * r + 5.0000001201e-1f);
    p = p * r2 + (r + 1.0f);
    float e = p * as_float(int32_t(uint32_t(as_int(shifted)) << 23));
    return x < -87.0f ? 0.0f : e;
}

// log(x) for normal x > 0, within 2 roundings.
inline float log_of_positive(float x) {
    uint32_t i = uint32_t(as_int(x));
    int32_t e = int32_t(i - 0x3f3504f3u) >> 23;
    float m = as_float(int32_t(i - (uint32_t(e) << 23))) - 1.0f;
    float exponent = float(e), z = m * m, z2 = z * z;
    float high = (7.0376836292e-2f * m - 1.1514610310e-1f) * m + 1.1676998740e-1f;
    float low = -1.2420140846e-1f * m + 1.4249322787e-1f;
    low = low * z + (-1.6668057665e-1f * m + 2.0000714765e-1f);
    float y = (high * z2 + low) * z + (-2.4999993993e-1f * m + 3.3333331174e-1f);
    y = y * m * z + exponent * -2.12194440e-4f - 0.5f * z;
    return m + y + exponent * 0.693359375f;
}

// log(1 + e) for e in [0, 1]: e times a polynomial, with a relative error of at most 1.6e-7.
inline float log_of_1_plus(float e) {
    float e2 = e * e, e4 = e2 * e2;
    float a = 3.3321324e-1f * e - 4.9999648e-1f;
    float b = 1.9153655e-1f * e - 2.4857163e-1f;
    float c = 7.9204522e-2f * e - 1.3753802e-1f;
    float d = 5.3648213e-3f * e - 3.0065781e-2f;
    return ((d * e2 + c) * e4 + (b * e2 + a)) * e2 + e;
}

// --- Images -------------------------------------------------------------------------------------

// Numbers of the dtypes in library.py.
enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, UINT8, INT8, INT16, INT32, INT64 };

// A tensor (N, C, H, W), of which labels have one channel; strides in elements. library.py holds
// the same fields.
struct Images {
    void* data;
    int64_t dtype;
    int64_t stride_n, stride_c, stride_h, stride_w;

    int64_t offset(int64_t n, int64_t c, int64_t h, int64_t w) const {
        return n * stride_n + c * stride_c + h * stride_h + w * stride_w;
    }
};

ROW_FUNCTION void load_strided(Floats x, int64_t stride, FloatsOut out, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) out[w] = x[w * stride];
}

ROW_FUNCTION void load_bfloat16(const uint16_t* RESTRICT x, int64_t stride, FloatsOut out, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) out[w] = as_float(int32_t(uint32_t(x[w * stride]) << 16));
}

// The product with 2^112 moves the exponent's bias and normalises subnormal numbers.
ROW_FUNCTION void load_float16(const uint16_t* RESTRICT x, int64_t stride, FloatsOut out, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        uint32_t half = x[w * stride], size = half & 0x7fffu;
        uint32_t sign = (half & 0x8000u) << 16;
        uint32_t number = uint32_t(as_int(as_float(int32_t(size << 13)) * 0x1p112f));
        uint32_t infinite = (size << 13) | 0x7f800000u;  // infinity or NaN
        out[w] = as_float(int32_t((size >= 0x7c00u ? infinite : number) | sign));
    }
}

// Row h of channel c from column w on, n values in float32: in place where the image holds them so,
// else in the buffer.
inline const float* load_row(
    const Images& x, int64_t n, int64_t c, int64_t h, int64_t w, int count, float* buffer
) {
    int64_t at = x.offset(n, c, h, w);
    if (x.dtype == FLOAT32) {
        const float* row = static_cast<const float*>(x.data) + at;
        if (x.stride_w == 1) return row;
        load_strided(row, x.stride_w, buffer, count);
    } else {
        const uint16_t* row = static_cast<const uint16_t*>(x.data) + at;
        (x.dtype == BFLOAT16 ? load_bfloat16 : load_float16)(row, x.stride_w, buffer, count);
    }
    return buffer;
}

ROW_FUNCTION void store_strided(Floats x, float* RESTRICT out, int64_t stride, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) out[w * stride] = x[w];
}

// Rounded to nearest, ties to even; NaN stays NaN.
ROW_FUNCTION void store_bfloat16(Floats x, uint16_t* RESTRICT out, int64_t stride, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        uint32_t bits = uint32_t(as_int(x[w]));
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        out[w * stride] = uint16_t(x[w] == x[w] ? rounded : 0x7fc0u);
    }
}

ROW_FUNCTION void store_float16(Floats x, uint16_t* RESTRICT out, int64_t stride, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        uint32_t bits = uint32_t(as_int(x[w])), sign = (bits >> 16) & 0x8000u;
        uint32_t size = bits & 0x7fffffffu;
        // Below 2^-14 float16 has steps of 2^-24: adding 0.5 rounds to them in the last bits.
        uint32_t small = uint32_t(as_int(as_float(int32_t(size)) + 0.5f)) - 0x3f000000u;
        uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
        uint32_t half = size < 0x38800000u ? small : normal;
        half = size >= 0x477ff000u ? 0x7c00u : half;
        out[w * stride] = uint16_t(sign | (size > 0x7f800000u ? 0x7e00u : half));
    }
}

// The row of an output to compute in: the image's own memory if it holds float32 side by side, else
// the buffer, which store_row then writes.
inline float* row_to_write(
    const Images& x, int64_t n, int64_t c, int64_t h, int64_t w, float* buffer
) {
    if (x.dtype != FLOAT32 || x.stride_w != 1) return buffer;
    return static_cast<float*>(x.data) + x.offset(n, c, h, w);
}

inline void store_row(
    const Images& x, int64_t n, int64_t c, int64_t h, int64_t w, int count, const float* row
) {
    int64_t at = x.offset(n, c, h, w);
    if (x.dtype == FLOAT32) {
        float* out = static_cast<float*>(x.data) + at;
        if (out == row) return;
        if (x.stride_w == 1) {
            std::memcpy(out, row, count * sizeof(float));
        } else {
            store_strided(row, out, x.stride_w, count);
        }
    } else {
        uint16_t* out = static_cast<uint16_t*>(x.data) + at;
        (x.dtype == BFLOAT16 ? store_bfloat16 : store_float16)(row, out, x.stride_w, count);
    }
}

// --- Labels -------------------------------------------------------------------------------------

// Calls use(pointer) with the integers of an image from an offset on.
template <class Use>
auto with_integers(const Images& x, int64_t at, const Use& use) {
    switch (x.dtype) {
        case UINT8: return use(static_cast<const uint8_t*>(x.data) + at);
        case INT8: return use(static_cast<const int8_t*>(x.data) + at);
        case INT16: return use(static_cast<const int16_t*>(x.data) + at);
        case INT32: return use(static_cast<const int32_t*>(x.data) + at);
        default: return use(static_cast<const int64_t*>(x.data) + at);
    }
}

template <class To, class From>
ROW_FUNCTION void load_integers(const From* RESTRICT x, int64_t stride, To* RESTRICT out, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) out[w] = To(x[w * stride]);
}

// Row h of channel c from column w on, n integers: in place where the image holds them so, else in
// the buffer.
template <class To>
const To* load_integers(
    const Images& x, int64_t n, int64_t c, int64_t h, int64_t w, int count, To* buffer
) {
    return with_integers(x, x.offset(n, c, h, w), [&](auto* row) {
        if (sizeof *row == sizeof(To) && x.stride_w == 1) return reinterpret_cast<const To*>(row);
        load_integers(row, x.stride_w, buffer, count);
        return static_cast<const To*>(buffer);
    });
}

// Labels (N, 1, H, W) of classes.
struct Target {
    Images labels;
    int64_t num_classes, ignore_index;
};

// Labels as they count, -1 where a pixel does not.
ROW_FUNCTION void class_row(
    const int64_t* RESTRICT label, int64_t num_classes, int64_t ignore_index, IntsOut out, int n
) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        int64_t k = label[w];
        bool counts = (k >= 0) & (k < num_classes) & (k != ignore_index);
        out[w] = counts ? int32_t(k) : -1;
    }
}

// The classes of row h from column w on; the buffer holds count numbers.
inline void load_classes(
    const Target& x, int64_t n, int64_t h, int64_t w, int count, int64_t* buffer, int32_t* out
) {
    const int64_t* row = load_integers(x.labels, n, 0, h, w, count, buffer);
    class_row(row, x.num_classes, x.ignore_index, out, count);
}

// --- Memory -------------------------------------------------------------------------------------

template <class T>
struct Free {
    void operator()(T* x) const { ::operator delete[](x, std::align_val_t(64)); }
};

// Large new memory is fetched page by page, which takes longer than writing it: huge pages are 512
// times fewer.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr int64_t LEAST_HUGE = 1 << 22;
    uintptr_t page = 1 << 21, first = reinterpret_cast<uintptr_t>(memory);
    uintptr_t from = (first + page - 1) & -page, to = (first + bytes) & -page;
    if (bytes > LEAST_HUGE && from < to) {
        madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
    }
#else
    (void)memory, (void)bytes;
#endif
}

// Memory for n numbers, not initialised, at the start of a cache line.
template <class T>
using Buffer = std::unique_ptr<T[], Free<T>>;

template <class T>
Buffer<T> make_buffer(int64_t n) {
    size_t bytes = sizeof(T) * size_t(std::max<int64_t>(n, 1));
    Buffer<T> memory(static_cast<T*>(::operator new[](bytes, std::align_val_t(64))));
    ask_for_huge_pages(memory.get(), int64_t(bytes));
    return memory;
}

// A vector of the compiler's own, anywhere in memory.
template <class Vector, class T>
inline Vector load(const T* x) {
    Vector vector;
    std::memcpy(&vector, x, sizeof vector);
    return vector;
}

template <class Vector>
inline void store(float* x, Vector vector) {
    std::memcpy(x, &vector, sizeof vector);
}

// Asks for a row that will be read soon, or written. Rows of an image lie so far apart that a
// processor does not guess the next one.
inline void prefetch(const float* row, int n) {
    for (int w = 0; w < n; w += 16) __builtin_prefetch(row + w);
}

inline void prefetch_to_write(const float* row, int n) {
    for (int w = 0; w < n; w += 16) __builtin_prefetch(row + w, 1);
}

// --- Threads ------------------------------------------------------------------------------------

// Hands out the tasks 0, 1, ... to the threads.
class Tasks {
public:
    explicit Tasks(int64_t count) : count_(count) {}

    bool next(int64_t& task) {
        task = next_.fetch_add(1, std::memory_order_relaxed);
        return task < count_;
    }

private:
    std::atomic<int64_t> next_{0};
    int64_t count_;
};

// Runs body(tasks) on every thread. The body makes its buffers, then takes tasks until none is
// left. Results must not depend on which thread takes which task.
template <class Body>
void parallel(int64_t num_tasks, int64_t num_threads, const Body& body) {
    struct Job {
        const Body& body;
        Tasks tasks;
        static void run(void* job) { static_cast<Job*>(job)->body(static_cast<Job*>(job)->tasks); }
    } job{body, Tasks(num_tasks)};
    int64_t threads = std::min(num_threads, num_tasks);
    if (threads > 1 && GOMP_parallel) {
        GOMP_parallel(&Job::run, &job, unsigned(threads), 0);
    } else if (num_tasks > 0) {
        Job::run(&job);
    }
}

}  // namespace
