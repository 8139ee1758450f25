// Instance affinities on a CPU: tables and gradient of logits [N, K, D, H, W], from ids
// [N, D, H, W].
//
// Ids are images whose channels are the planes.
//
// Channel k at a voxel is the pair of this voxel and the one a step (dz, dy, dx) away. A task is a
// few rows of one image, for all channels: ids stay in the cache. Within a task the work goes by
// channels and rows, and within a row by segments: first the targets of all pairs of the segment,
// then its logits. Voxels whose other voxel is outside are never visited; their gradient is 0.
//
// Sums of a segment are float32 in the lanes of a vector, then double; tasks have tables of their
// own, added up in order: the same input gives the same bits on any number of threads.

#include "common.h"

namespace {

constexpr int SEGMENT = 1024;
// Voxels of a task: their ids, and ids some rows and planes away, fit a second-level cache.
constexpr int64_t TASK_VOXELS = 1 << 14;
// Pairs of a call below which one thread does all the work: waking others takes longer.
constexpr int64_t SMALL = 1 << 15;
// Sums of a pair's -log pt, 1 - pt, (1 - pt)^2, (1 - pt)^gamma (-log pt), and number of pairs.
constexpr int TERMS = 5;

// Logits [N, K, D, H, W] or their gradient; strides in elements. instance_affinity.py holds the
// same fields.
struct Volumes {
    void* data;
    int64_t dtype;
    int64_t stride_n, stride_k, stride_d, stride_h, stride_w;

    // Plane z of all channels.
    Images plane(int64_t z) const {
        int64_t size = dtype == FLOAT32 ? 4 : 2;
        char* start = static_cast<char*>(data) + z * stride_d * size;
        return {start, dtype, stride_n, stride_k, stride_h, stride_w};
    }
};

// Everything about a call but the tensors.
struct Call {
    int64_t num_images, num_channels, depth, height, width;
    const int64_t* steps;  // [K, 3]
    int64_t has_background, background, has_ignored, ignored, invert;
    double gamma;
    int64_t misses, focal;
};

enum Focus { NONE, SQUARE, ANY };

// --- Targets of pairs ---------------------------------------------------------------------------

// The targets of a segment's pairs: 1 for same, -1 for different, 0 where the pair does not count.
// Without a background or an ignored id, the flag is -1, all bits: the comparison has no effect.
template <class Id>
ROW_FUNCTION void find_targets(
    const Id* RESTRICT ids, const Id* RESTRICT others, int n,
    Id background, Id ignored, Id no_background, Id no_ignored, IntsOut target
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        Id same = -Id(ids[w] == others[w]) & (-Id(ids[w] != background) | no_background);
        Id counts = (-Id(ids[w] != ignored) & -Id(others[w] != ignored)) | no_ignored;
        target[w] = int32_t(((same & 2) - 1) & counts);
    }
}

// --- Terms of pairs -----------------------------------------------------------------------------

// The logit u of pt, the probability of the target; 0 where the pair does not count, for the logit
// may be NaN there. ``side`` is 1 if the network says 1 for same, -1 if for different.
inline float logit_of_target(float x, int32_t target, float side) {
    float u = target > 0 ? x * side : -x * side;
    return target != 0 ? u : 0.0f;
}

// (1 - pt)^gamma, given 1 - pt and -log(1 - pt).
template <Focus FOCUS>
inline float power(float miss, float minus_log_miss, float gamma) {
    return FOCUS == SQUARE ? miss * miss : exp_of_negative(-gamma * minus_log_miss);
}

// Adds the terms of a segment to sums [TERMS, (different, same)].
template <bool MISSES, Focus FOCUS>
ROW_FUNCTION void add_terms(Floats x, Ints target, int n, float side, float gamma, double* sums) {
    float log_different = 0, miss_different = 0, square_different = 0, focal_different = 0;
    float log_same = 0, miss_same = 0, square_same = 0, focal_same = 0;
    int32_t num_different = 0, num_same = 0;
#pragma omp simd reduction(+ : log_different, miss_different, square_different, focal_different) \
    reduction(+ : log_same, miss_same, square_same, focal_same, num_different, num_same)
    for (int w = 0; w < n; w++) {
        float u = logit_of_target(x[w], target[w], side);
        float e = exp_of_negative(-std::fabs(u));
        float log = log_of_1_plus(e);
        float loss = (u < 0.0f ? -u : 0.0f) + log;
        bool is_same = target[w] > 0, is_different = target[w] < 0;
        num_same += is_same;
        num_different += is_different;
        log_same += is_same ? loss : 0.0f;
        log_different += is_different ? loss : 0.0f;
        if (MISSES || FOCUS != NONE) {
            float r = 1.0f / (1.0f + e);
            float miss = u < 0.0f ? r : e * r;
            if (MISSES) {
                miss_same += is_same ? miss : 0.0f;
                miss_different += is_different ? miss : 0.0f;
                square_same += is_same ? miss * miss : 0.0f;
                square_different += is_different ? miss * miss : 0.0f;
            }
            if (FOCUS != NONE) {
                float minus_log_miss = (u > 0.0f ? u : 0.0f) + log;
                float focal = power<FOCUS>(miss, minus_log_miss, gamma) * loss;
                focal_same += is_same ? focal : 0.0f;
                focal_different += is_different ? focal : 0.0f;
            }
        }
    }
    double terms[2 * TERMS] = {
        log_different, log_same, miss_different, miss_same, square_different, square_same,
        focal_different, focal_same, double(num_different), double(num_same)
    };
    for (int i = 0; i < 2 * TERMS; i++) sums[i] += terms[i];
}

// The gradient of a segment's logits, given the coefficients [(different, same), 4] of the sums.
// With m = 1 - pt, the derivatives of the terms with respect to u are -m, -pt m, -2 pt m^2 and
// -m^gamma (gamma pt (-log pt) + m).
template <bool MISSES, Focus FOCUS>
ROW_FUNCTION void slopes(
    Floats x, Ints target, int n, float side, float gamma, Floats coefficients, FloatsOut grad
) {
    const float* different = coefficients;
    const float* same = coefficients + 4;
    float log_different = different[0], miss_different = different[1];
    float square_different = 2.0f * different[2], focal_different = different[3];
    float log_same = same[0], miss_same = same[1];
    float square_same = 2.0f * same[2], focal_same = same[3];
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float u = logit_of_target(x[w], target[w], side);
        float e = exp_of_negative(-std::fabs(u));
        float r = 1.0f / (1.0f + e);
        float miss = u < 0.0f ? r : e * r;
        bool is_same = target[w] > 0;
        float slope = (is_same ? log_same : log_different) * miss;
        if (MISSES || FOCUS != NONE) {
            float pt = u < 0.0f ? e * r : r;
            if (MISSES) {
                float of_square = is_same ? square_same : square_different;
                slope += ((is_same ? miss_same : miss_different) + of_square * miss) * pt * miss;
            }
            if (FOCUS != NONE) {
                float log = log_of_1_plus(e);
                float loss = (u < 0.0f ? -u : 0.0f) + log;
                float minus_log_miss = (u > 0.0f ? u : 0.0f) + log;
                float focal = power<FOCUS>(miss, minus_log_miss, gamma);
                float of_focal = is_same ? focal_same : focal_different;
                slope += of_focal * focal * (gamma * pt * loss + miss);
            }
        }
        slope = is_same ? -slope * side : slope * side;
        grad[w] = target[w] != 0 ? slope : 0.0f;
    }
}

using AddTerms = void (*)(Floats, Ints, int, float, float, double*);
using Slopes = void (*)(Floats, Ints, int, float, float, Floats, FloatsOut);

template <bool MISSES>
AddTerms choose_add_terms(Focus focus) {
    if (focus == NONE) return add_terms<MISSES, NONE>;
    return focus == SQUARE ? add_terms<MISSES, SQUARE> : add_terms<MISSES, ANY>;
}

template <bool MISSES>
Slopes choose_slopes(Focus focus) {
    if (focus == NONE) return slopes<MISSES, NONE>;
    return focus == SQUARE ? slopes<MISSES, SQUARE> : slopes<MISSES, ANY>;
}

Focus focus_of(const Call& call) {
    return !call.focal ? NONE : call.gamma == 2.0 ? SQUARE : ANY;
}

// --- Tasks --------------------------------------------------------------------------------------

// A few rows of one plane, or of several planes: rows are numbered through all planes of an image.
struct Band {
    int64_t n, first, end;
};

int64_t rows_per_task(const Call& call) { return std::max<int64_t>(1, TASK_VOXELS / call.width); }

int64_t tasks_per_image(const Call& call) {
    int64_t rows = rows_per_task(call);
    return (call.depth * call.height + rows - 1) / rows;
}

Band band_of(const Call& call, int64_t task) {
    int64_t n = task / tasks_per_image(call), first = task % tasks_per_image(call);
    int64_t rows = rows_per_task(call);
    return {n, first * rows, std::min((first + 1) * rows, call.depth * call.height)};
}

int64_t threads_for(const Call& call, int64_t num_threads) {
    int64_t voxels = call.num_images * call.depth * call.height * call.width;
    return voxels * call.num_channels < SMALL ? 1 : num_threads;
}

// Buffers of a thread.
struct Buffers {
    int32_t target[SEGMENT];
    float x[SEGMENT], grad[SEGMENT];
};

// Where a segment begins.
struct Voxel {
    int64_t n, z, h, w;
};

// Fills the targets of n pairs, computed in the narrowest of int32 and int64 that holds the ids.
template <class Id>
void fill_targets(
    const Call& call, const Images& ids, const Voxel& from, const Voxel& to, int n, int32_t* target
) {
    Id here[SEGMENT], there[SEGMENT];
    find_targets(
        load_integers(ids, from.n, from.z, from.h, from.w, n, here),
        load_integers(ids, to.n, to.z, to.h, to.w, n, there), n,
        Id(call.background), Id(call.ignored), Id(call.has_background ? 0 : -1),
        Id(call.has_ignored ? 0 : -1), target
    );
}

// Goes through the rows of channel k in a band: inside(z, h, first, end) for the columns of a row
// whose other voxel is inside, with the targets in the buffers, SEGMENT columns at most;
// outside(z, h, first, end) for the columns of a row whose other voxel is outside.
template <class Inside, class Outside>
void for_each_segment(
    const Call& call, const Images& ids, const Band& band, int64_t k, Buffers& buffers,
    const Inside& inside, const Outside& outside
) {
    const int64_t* step = call.steps + 3 * k;
    int64_t begin = std::min(call.width, std::max<int64_t>(0, -step[2]));
    int64_t end = std::max(begin, std::min(call.width, call.width - step[2]));
    int64_t z = band.first / call.height, h = band.first % call.height;
    for (int64_t row = band.first; row < band.end; row++) {
        int64_t other_z = z + step[0], other_h = h + step[1];
        bool there = other_z >= 0 && other_z < call.depth && other_h >= 0 && other_h < call.height;
        if (!there || begin == end) {
            outside(z, h, 0, call.width);
        } else {
            outside(z, h, 0, begin);
            for (int64_t w = begin; w < end; w += SEGMENT) {
                int count = int(std::min<int64_t>(SEGMENT, end - w));
                (ids.dtype == INT64 ? fill_targets<int64_t> : fill_targets<int32_t>)(
                    call, ids, {band.n, z, h, w}, {band.n, other_z, other_h, w + step[2]}, count,
                    buffers.target
                );
                inside(z, h, w, count);
            }
            outside(z, h, end, call.width);
        }
        if (++h == call.height) h = 0, z++;
    }
}

void forward(
    const Call& call, const Volumes& logits, const Images& ids, double* tables, int64_t num_threads
) {
    AddTerms add = call.misses ? choose_add_terms<true>(focus_of(call))
                               : choose_add_terms<false>(focus_of(call));
    float side = call.invert ? -1.0f : 1.0f;
    int64_t num_tasks = call.num_images * tasks_per_image(call);
    int64_t table_size = call.num_channels * 2 * TERMS;
    std::vector<double> partial(size_t(num_tasks * table_size));
    parallel(num_tasks, threads_for(call, num_threads), [&](Tasks& tasks) {
        auto memory = std::make_unique<Buffers>();
        Buffers& buffers = *memory;
        for (int64_t task; tasks.next(task);) {
            Band band = band_of(call, task);
            for (int64_t k = 0; k < call.num_channels; k++) {
                double* sums = &partial[size_t(task * table_size + k * 2 * TERMS)];
                auto inside = [&](int64_t z, int64_t h, int64_t w, int count) {
                    const float* x =
                        load_row(logits.plane(z), band.n, k, h, w, count, buffers.x);
                    add(x, buffers.target, count, side, float(call.gamma), sums);
                };
                auto outside = [](int64_t, int64_t, int64_t, int64_t) {};
                for_each_segment(call, ids, band, k, buffers, inside, outside);
            }
        }
    });
    for (int64_t task = 0; task < num_tasks; task++) {
        double* table = tables + task / tasks_per_image(call) * table_size;
        for (int64_t i = 0; i < table_size; i++) table[i] += partial[size_t(task * table_size + i)];
    }
}

void backward(
    const Call& call, const float* coefficients, const Volumes& logits, const Images& ids,
    const Volumes& grad, int64_t num_threads
) {
    Slopes slope = call.misses ? choose_slopes<true>(focus_of(call))
                               : choose_slopes<false>(focus_of(call));
    float side = call.invert ? -1.0f : 1.0f;
    int64_t num_tasks = call.num_images * tasks_per_image(call);
    parallel(num_tasks, threads_for(call, num_threads), [&](Tasks& tasks) {
        auto memory = std::make_unique<Buffers>();
        Buffers& buffers = *memory;
        for (int64_t task; tasks.next(task);) {
            Band band = band_of(call, task);
            for (int64_t k = 0; k < call.num_channels; k++) {
                const float* table = coefficients + (band.n * call.num_channels + k) * 8;
                auto inside = [&](int64_t z, int64_t h, int64_t w, int count) {
                    const float* x =
                        load_row(logits.plane(z), band.n, k, h, w, count, buffers.x);
                    Images out = grad.plane(z);
                    float* row = row_to_write(out, band.n, k, h, w, buffers.grad);
                    slope(x, buffers.target, count, side, float(call.gamma), table, row);
                    store_row(out, band.n, k, h, w, count, row);
                };
                auto outside = [&](int64_t z, int64_t h, int64_t first, int64_t end) {
                    for (int64_t w = first; w < end; w += SEGMENT) {
                        int count = int(std::min<int64_t>(SEGMENT, end - w));
                        Images out = grad.plane(z);
                        float* row = row_to_write(out, band.n, k, h, w, buffers.grad);
                        std::fill(row, row + count, 0.0f);
                        store_row(out, band.n, k, h, w, count, row);
                    }
                };
                for_each_segment(call, ids, band, k, buffers, inside, outside);
            }
        }
    });
}

}  // namespace

// Adds to tables [N, K, TERMS, (different, same)].
EXPORT void instance_affinity_forward(
    const Call* call, const Volumes* logits, const Images* ids, double* tables, int64_t num_threads
) {
    forward(*call, *logits, *ids, tables, num_threads);
}

// Writes the gradient of all logits; coefficients [N, K, (different, same), 4].
EXPORT void instance_affinity_backward(
    const Call* call, const float* coefficients, const Volumes* logits, const Images* ids,
    const Volumes* grad, int64_t num_threads
) {
    // The memory of a gradient: its elements lie side by side.
    int64_t size = call->num_images * call->num_channels * call->depth * call->height * call->width;
    ask_for_huge_pages(grad->data, size * (grad->dtype == FLOAT32 ? 4 : 2));
    backward(*call, coefficients, *logits, *ids, *grad, num_threads);
}
