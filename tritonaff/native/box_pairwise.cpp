// Box-supervised pairwise loss on a CPU: tables and gradient of mask logits [M, H, W], from
// similarity bits [N, H, W] and boxes.
//
// A task is a few rows of one mask. Within a task the work goes by rows, by segments of a row and
// by the 8 neighbours of a segment's pixels. Forward, the segments of the box alone are visited;
// backward, these and the pixels `dilation` around them; the other gradients are 0.
//
// Sums of a segment and neighbour are float32 in the lanes of a vector, then double; tasks have
// sums of their own, added up in order: the same input gives the same bits on any number of
// threads.

#include "common.h"

namespace {

constexpr int SEGMENT = 1024;
// Pixels of a task.
constexpr int64_t TASK_PIXELS = 1 << 14;
// Pixels of a call below which one thread does all the work: waking others takes longer.
constexpr int64_t SMALL = 1 << 14;

// Rows and columns [top, bottom) x [left, right). box_pairwise.py passes the same order.
struct Box {
    int64_t top, left, bottom, right;

    bool empty() const { return top >= bottom || left >= right; }
    bool has_row(int64_t h) const { return h >= top && h < bottom; }
};

// Everything about a call but the images. box_pairwise.py holds the same fields.
struct Call {
    int64_t num_masks, height, width, dilation;
    const Box* boxes;            // [M]
    const int64_t* image_index;  // [M]
};

// Neighbour k, row by row without the centre; neighbour 7 - k is the opposite one.
struct Step {
    int64_t dy, dx;
};

Step step_of(int k, int64_t dilation) {
    int place = k + (k > 3);
    return {(place / 3 - 1) * dilation, (place % 3 - 1) * dilation};
}

// --- Pairs --------------------------------------------------------------------------------------

// log(1 + exp(-|x|)).
ROW_FUNCTION void logs_of(Floats x, FloatsOut log, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) log[w] = log_of_1_plus(exp_of_negative(-std::fabs(x[w])));
}

// 1 / (1 + exp(|x|)).
ROW_FUNCTION void misses_of(Floats x, FloatsOut miss, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float e = exp_of_negative(-std::fabs(x[w]));
        miss[w] = e / (1.0f + e);
    }
}

// Adds -log P and the number of the pairs of pixels x and their neighbours y to the sums, where
// bit k is set.
ROW_FUNCTION void add_terms(
    Floats x, Floats y, Floats log_x, Floats log_y, Ints bits, int k, int n, double* sums
) {
    float total = 0;
    int32_t count = 0;
#pragma omp simd reduction(+ : total, count)
    for (int w = 0; w < n; w++) {
        int32_t counts = (bits[w] >> k) & 1;
        float log = log_of_1_plus(exp_of_negative(-std::fabs(x[w] + y[w])));
        // Above 0 where the signs differ.
        float larger = x[w] > y[w] ? x[w] : y[w], smaller = x[w] > y[w] ? y[w] : x[w];
        float apart = larger < -smaller ? larger : -smaller;
        float loss = log_x[w] + log_y[w] - log + (apart > 0.0f ? apart : 0.0f);
        total += counts ? loss : 0.0f;
        count += counts;
    }
    sums[0] += total;
    sums[1] += count;
}

// Adds the derivatives of -log P with respect to |x|, weighed by the number of the two pixels in
// whose box the pair counts. With the sign of x as s: 1 - p(s (x + y)) - (1 - p(|x|)).
ROW_FUNCTION void add_slopes(
    Floats x, Floats y, Floats miss, Ints bits, Ints bits_of_y, int k, int n, FloatsOut slope
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        int32_t weight = ((bits[w] >> k) & 1) + ((bits_of_y[w] >> (7 - k)) & 1);
        float sum = x[w] < 0.0f ? -(x[w] + y[w]) : x[w] + y[w];
        float e = exp_of_negative(-std::fabs(sum));
        float r = 1.0f / (1.0f + e);
        float difference = (sum < 0.0f ? r : e * r) - miss[w];
        slope[w] += weight ? float(weight) * difference : 0.0f;
    }
}

ROW_FUNCTION void finish_slopes(Floats x, Floats slope, float coefficient, int n, FloatsOut grad) {
#pragma omp simd
    for (int w = 0; w < n; w++) grad[w] = (x[w] < 0.0f ? -coefficient : coefficient) * slope[w];
}

// --- Rows ---------------------------------------------------------------------------------------

// A part of one row of a mask: logits, a function of them, and the bits of pixels in the box, 0
// elsewhere.
struct Part {
    explicit Part(int64_t size)
        : x(make_buffer<float>(size)), function(make_buffer<float>(size)),
          bits(make_buffer<int32_t>(size)) {}

    Buffer<float> x, function;
    Buffer<int32_t> bits;
};

// The columns [first, end) of a segment's pixels, and [from, to) of these and their neighbours.
struct Segment {
    int64_t first, end, from, to;

    int count() const { return int(end - first); }
};

Segment segment_at(const Call& call, int64_t first, int64_t last) {
    int64_t end = std::min(first + SEGMENT, last);
    int64_t from = std::max<int64_t>(0, first - call.dilation);
    return {first, end, from, std::min(call.width, end + call.dilation)};
}

void load_part(
    const Call& call, const Images& logits, const Images& similarity, int64_t m, int64_t h,
    const Segment& segment, Part& part
) {
    int n = int(segment.to - segment.from);
    const float* x = load_row(logits, m, 0, h, segment.from, n, part.x.get());
    if (x != part.x.get()) std::copy(x, x + n, part.x.get());
    const Box& box = call.boxes[m];
    int64_t left = std::max(segment.from, box.left), right = std::min(segment.to, box.right);
    std::fill(part.bits.get(), part.bits.get() + n, 0);
    if (!box.has_row(h) || left >= right) return;
    int32_t* bits = part.bits.get() + (left - segment.from);
    int count = int(right - left);
    const int32_t* row =
        load_integers(similarity, call.image_index[m], 0, h, left, count, bits);
    if (row != bits) std::copy(row, row + count, bits);
}

// Calls use(k, first, end, step, row of the neighbours: 0, 1, 2) for the neighbours k of the
// segment's pixels [first, end) that are inside.
template <class Use>
void for_each_neighbor(const Call& call, int64_t h, const Segment& segment, const Use& use) {
    for (int k = 0; k < 8; k++) {
        Step step = step_of(k, call.dilation);
        if (h + step.dy < 0 || h + step.dy >= call.height) continue;
        int64_t first = std::max(segment.first, -step.dx);
        int64_t end = std::min(segment.end, call.width - step.dx);
        if (first < end) use(k, first, end, step, step.dy < 0 ? 0 : step.dy > 0 ? 2 : 1);
    }
}

// A few rows of one mask.
struct Band {
    int64_t m, first, end;
};

int64_t rows_per_task(const Call& call) { return std::max<int64_t>(1, TASK_PIXELS / call.width); }

int64_t tasks_per_mask(const Call& call) { return divide_up(call.height, rows_per_task(call)); }

Band band_of(const Call& call, int64_t task) {
    int64_t rows = rows_per_task(call), first = task % tasks_per_mask(call) * rows;
    return {task / tasks_per_mask(call), first, std::min(first + rows, call.height)};
}

int64_t threads_for(const Call& call, int64_t num_threads) {
    return call.num_masks * call.height * call.width < SMALL ? 1 : num_threads;
}

// Loads the three rows of a pixel's neighbours.
struct Rows {
    explicit Rows(const Call& call)
        : parts{Part(size(call)), Part(size(call)), Part(size(call))} {}

    static int64_t size(const Call& call) {
        return std::min(call.width, SEGMENT + 2 * call.dilation);
    }

    void load(
        const Call& call, const Images& logits, const Images& similarity, int64_t m, int64_t h,
        const Segment& segment
    ) {
        for (int i = 0; i < 3; i++) {
            int64_t row = h + (i - 1) * call.dilation;
            if (row < 0 || row >= call.height) continue;
            load_part(call, logits, similarity, m, row, segment, parts[i]);
        }
    }

    Part parts[3];
};

void forward(
    const Call& call, const Images& logits, const Images& similarity, double* sums,
    int64_t num_threads
) {
    int64_t num_tasks = call.num_masks * tasks_per_mask(call);
    std::vector<double> partial(size_t(2 * num_tasks));
    parallel(num_tasks, threads_for(call, num_threads), [&](Tasks& tasks) {
        Rows rows(call);
        for (int64_t task; tasks.next(task);) {
            Band band = band_of(call, task);
            const Box& box = call.boxes[band.m];
            if (box.empty()) continue;
            double* of_task = &partial[size_t(2 * task)];
            int64_t end = std::min(band.end, box.bottom);
            for (int64_t h = std::max(band.first, box.top); h < end; h++) {
                for (int64_t w = box.left; w < box.right; w += SEGMENT) {
                    Segment segment = segment_at(call, w, box.right);
                    rows.load(call, logits, similarity, band.m, h, segment);
                    for (int i = 0; i < 3; i++) {
                        int64_t row = h + (i - 1) * call.dilation;
                        if (row < 0 || row >= call.height) continue;
                        Part& part = rows.parts[i];
                        logs_of(
                            part.x.get(), part.function.get(), int(segment.to - segment.from)
                        );
                    }
                    const Part& own = rows.parts[1];
                    auto add = [&](int k, int64_t first, int64_t end, Step step, int row) {
                        const Part& other = rows.parts[row];
                        int64_t at = first - segment.from, there = at + step.dx;
                        add_terms(
                            own.x.get() + at, other.x.get() + there, own.function.get() + at,
                            other.function.get() + there, own.bits.get() + at, k,
                            int(end - first), of_task
                        );
                    };
                    for_each_neighbor(call, h, segment, add);
                }
            }
        }
    });
    for (int64_t task = 0; task < num_tasks; task++) {
        double* of_mask = sums + 2 * (task / tasks_per_mask(call));
        for (int i = 0; i < 2; i++) of_mask[i] += partial[size_t(2 * task + i)];
    }
}

void backward(
    const Call& call, const float* coefficients, const Images& logits, const Images& similarity,
    const Images& grad, int64_t num_threads
) {
    int64_t num_tasks = call.num_masks * tasks_per_mask(call);
    parallel(num_tasks, threads_for(call, num_threads), [&](Tasks& tasks) {
        Rows rows(call);
        Buffer<float> slope = make_buffer<float>(SEGMENT), buffer = make_buffer<float>(SEGMENT);
        for (int64_t task; tasks.next(task);) {
            Band band = band_of(call, task);
            const Box& box = call.boxes[band.m];
            int64_t left = std::max<int64_t>(0, box.left - call.dilation);
            int64_t right = std::min(call.width, box.right + call.dilation);
            auto zeros = [&](int64_t h, int64_t first, int64_t end) {
                for (int64_t w = first; w < end; w += SEGMENT) {
                    int count = int(std::min<int64_t>(SEGMENT, end - w));
                    float* row = row_to_write(grad, band.m, 0, h, w, buffer.get());
                    std::fill(row, row + count, 0.0f);
                    store_row(grad, band.m, 0, h, w, count, row);
                }
            };
            for (int64_t h = band.first; h < band.end; h++) {
                bool near = h >= box.top - call.dilation && h < box.bottom + call.dilation;
                if (box.empty() || !near) {
                    zeros(h, 0, call.width);
                    continue;
                }
                zeros(h, 0, left);
                zeros(h, right, call.width);
                for (int64_t w = left; w < right; w += SEGMENT) {
                    Segment segment = segment_at(call, w, right);
                    rows.load(call, logits, similarity, band.m, h, segment);
                    Part& own = rows.parts[1];
                    int64_t start = segment.first - segment.from;
                    misses_of(own.x.get() + start, own.function.get() + start, segment.count());
                    std::fill(slope.get(), slope.get() + segment.count(), 0.0f);
                    auto add = [&](int k, int64_t first, int64_t end, Step step, int row) {
                        const Part& other = rows.parts[row];
                        int64_t at = first - segment.from, there = at + step.dx;
                        add_slopes(
                            own.x.get() + at, other.x.get() + there, own.function.get() + at,
                            own.bits.get() + at, other.bits.get() + there, k, int(end - first),
                            slope.get() + (first - segment.first)
                        );
                    };
                    for_each_neighbor(call, h, segment, add);
                    float* row = row_to_write(grad, band.m, 0, h, w, buffer.get());
                    finish_slopes(
                        own.x.get() + start, slope.get(), coefficients[band.m], segment.count(), row
                    );
                    store_row(grad, band.m, 0, h, w, segment.count(), row);
                }
            }
        }
    });
}

}  // namespace

// Adds to sums [M, (log_loss, count)].
EXPORT void box_pairwise_forward(
    const Call* call, const Images* logits, const Images* similarity, double* sums,
    int64_t num_threads
) {
    forward(*call, *logits, *similarity, sums, num_threads);
}

// Writes the gradient of all logits; coefficients [M].
EXPORT void box_pairwise_backward(
    const Call* call, const float* coefficients, const Images* logits, const Images* similarity,
    const Images* grad, int64_t num_threads
) {
    // The memory of a gradient: its elements lie side by side.
    int64_t size = call->num_masks * call->height * call->width;
    ask_for_huge_pages(grad->data, size * (grad->dtype == FLOAT32 ? 4 : 2));
    backward(*call, coefficients, *logits, *similarity, *grad, num_threads);
}
