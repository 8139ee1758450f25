// What every native kernel needs: images of any dtype and strides, exp and log, threads.
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

inline float as_float(int32_t i) { float f; std::memcpy(&f, &i, 4); return f; }
inline int32_t as_int(float f) { int32_t i; std::memcpy(&i, &f, 4); return i; }

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

// --- Images -------------------------------------------------------------------------------------

enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// A tensor (N, C, H, W); strides in elements. library.py holds the same fields.
struct Images {
    void* data;
    int64_t dtype;
    int64_t stride_n, stride_c, stride_h, stride_w;

    int64_t offset(int64_t n, int64_t c, int64_t h, int64_t w) const {
        return n * stride_n + c * stride_c + h * stride_h + w * stride_w;
    }
};

ROW_FUNCTION void load_strided(Floats x, int64_t stride, FloatsOut out, int n) {
    for (int w = 0; w < n; w++) out[w] = x[w * stride];
}

ROW_FUNCTION void load_bfloat16(const uint16_t* RESTRICT x, int64_t stride, FloatsOut out, int n) {
    for (int w = 0; w < n; w++) out[w] = as_float(int32_t(uint32_t(x[w * stride]) << 16));
}

// The product with 2^112 moves the exponent's bias and normalises subnormal numbers.
ROW_FUNCTION void load_float16(const uint16_t* RESTRICT x, int64_t stride, FloatsOut out, int n) {
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
    for (int w = 0; w < n; w++) out[w * stride] = x[w];
}

// Rounded to nearest, ties to even; NaN stays NaN.
ROW_FUNCTION void store_bfloat16(Floats x, uint16_t* RESTRICT out, int64_t stride, int n) {
    for (int w = 0; w < n; w++) {
        uint32_t bits = uint32_t(as_int(x[w]));
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        out[w * stride] = uint16_t(x[w] == x[w] ? rounded : 0x7fc0u);
    }
}

ROW_FUNCTION void store_float16(Floats x, uint16_t* RESTRICT out, int64_t stride, int n) {
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
        if (out != row) store_strided(row, out, x.stride_w, count);
    } else {
        uint16_t* out = static_cast<uint16_t*>(x.data) + at;
        (x.dtype == BFLOAT16 ? store_bfloat16 : store_float16)(row, out, x.stride_w, count);
    }
}

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
