// Affinity regression on a CPU. docs/affinity_regression.md derives the formulas.
//
// S (C x points) holds the square roots of the probabilities, Y the one-hot labels, and D = S - Y.
// The squared error and its gradient need the matrices D D^T and D Y^T, both C x C, and the number
// of points of every label; all three are sums over points.
//
// Points come in blocks of 256 that stay in the cache, their channels one row after the other.
// Blocks come in tasks: a task has sums of its own, which are added up in the order of the tasks.
// So the result does not depend on the number of threads.
#include "common.h"

#include <numeric>

namespace {

// Points of a block, and the distance of its rows: 16 more, for rows at a power of two would share
// few sets of the cache.
constexpr int BLOCK = 256, PITCH = BLOCK + 16;
// Rows are filled up to whole vectors with points that do not count. The remainder of a loop would
// run one point at a time.
constexpr int WHOLE = 16;
// A task has at least this number of points, and enough to make its sums small beside its logits.
constexpr int64_t LEAST_TASK = 2048, TASK_PER_CLASS = 16;
// Elements that are worth a second thread.
constexpr int64_t LEAST_WORK = 1 << 16;

// Vectors, and how many rows are multiplied by how many: the sums stay in registers.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int ROWS = 4, COLUMNS = 3, OUT_ROWS = 5;  // 16 registers, not 32
#else
constexpr int ROWS = 4, COLUMNS = 6, OUT_ROWS = 10;
#endif
constexpr int LANES = VECTOR_BYTES / 8, WIDE = VECTOR_BYTES / 4;
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef float Wide __attribute__((vector_size(VECTOR_BYTES)));

inline double total(Doubles x) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// --- Points -------------------------------------------------------------------------------------

// The rows or columns of grids of some sizes over an axis.
struct Axis {
    std::vector<int64_t> place;  // of step i of grid g, at begin(g) + i
    std::vector<int64_t> times;  // the number of steps of every grid at a place [places, grids]

    Axis(int64_t length, const int64_t* sizes, int64_t num_grids) {
        for (int64_t g = 0; g < num_grids; g++) {
            for (int64_t i = 0; i < sizes[g]; i++) {
                int64_t at = i * length / sizes[g];
                place.push_back(at);
                for (int64_t k = 0; k < num_grids; k++) {
                    times.push_back(steps(at + 1, length, sizes[k]) - steps(at, length, sizes[k]));
                }
            }
        }
    }

    // The number of steps before a place.
    static int64_t steps(int64_t at, int64_t length, int64_t size) {
        return (at * size + length - 1) / length;
    }
};

// The points of an image: every pixel, or the points of grids, one grid after another.
struct Points {
    int64_t height, width, count;
    const int64_t* sizes;
    int64_t num_grids;
    Axis down, across;

    Points(int64_t height, int64_t width, const int64_t* sizes, int64_t num_grids)
        : height(height), width(width), count(num_grids ? 0 : height * width), sizes(sizes),
          num_grids(num_grids), down(height, sizes, num_grids), across(width, sizes, num_grids) {
        for (int64_t g = 0; g < num_grids; g++) count += sizes[g] * sizes[g];
    }

    int64_t task_size(int64_t num_classes) const {
        int64_t points = std::max(LEAST_TASK, TASK_PER_CLASS * num_classes);
        return (points + BLOCK - 1) / BLOCK * BLOCK;
    }

    int64_t num_tasks(int64_t num_classes) const {
        return (count + task_size(num_classes) - 1) / task_size(num_classes);
    }
};

// The pixels of a block of points.
struct Place {
    int64_t first;
    int n;
    // For the points of grids:
    int64_t h[BLOCK], w[BLOCK];
    float times[BLOCK];  // the number of points on the same pixel
    bool leads[BLOCK];   // true for the first of these points

    void move(const Points& points, int64_t to, int64_t end) {
        first = to;
        n = int(std::min<int64_t>(BLOCK, end - to));
        if (!points.num_grids) return;
        int64_t g = 0, lines = 0, k = first;
        while (k >= points.sizes[g] * points.sizes[g]) {
            k -= points.sizes[g] * points.sizes[g];
            lines += points.sizes[g++];
        }
        int64_t i = k / points.sizes[g], j = k % points.sizes[g];
        for (int m = 0; m < n; m++) {
            set(points, m, g, i, j, lines);
            if (++j == points.sizes[g]) j = 0, i++;
            if (i == points.sizes[g]) i = 0, lines += points.sizes[g++];
        }
    }

private:
    void set(const Points& points, int m, int64_t g, int64_t i, int64_t j, int64_t lines) {
        const int64_t *row = &points.down.place[lines], *column = &points.across.place[lines];
        const int64_t* down = &points.down.times[(lines + i) * points.num_grids];
        const int64_t* across = &points.across.times[(lines + j) * points.num_grids];
        h[m] = row[i];
        w[m] = column[j];
        leads[m] = (i == 0 || row[i - 1] != row[i]) && (j == 0 || column[j - 1] != column[j]);
        int64_t total = 0;
        for (int64_t k = 0; k < points.num_grids; k++) {
            int64_t here = down[k] * across[k];
            if (k < g && here) leads[m] = false;
            total += here;
        }
        times[m] = float(total);
    }
};

// Calls run(at, h, w, count) for every part of a block of pixels that lies evenly in a tensor with
// these strides: the image's rows, or the image as one row.
template <class Run>
void each_run(
    const Points& points, const Place& place, int64_t stride_h, int64_t stride_w, const Run& run
) {
    bool even = points.height == 1 || stride_h == points.width * stride_w;
    int64_t width = even ? points.height * points.width : points.width;
    int64_t h = place.first / width, w = place.first % width;
    for (int at = 0; at < place.n; h++, w = 0) {
        int count = int(std::min<int64_t>(place.n - at, width - w));
        run(at, h, w, count);
        at += count;
    }
}

// Where the points of grids lie in a channel of a tensor with these strides.
ROW_FUNCTION void find_offsets(
    const Place& place, int64_t stride_h, int64_t stride_w, int64_t* RESTRICT offsets
) {
    #pragma omp simd
    for (int m = 0; m < place.n; m++) offsets[m] = place.h[m] * stride_h + place.w[m] * stride_w;
}

template <class T>
ROW_FUNCTION void gather(
    const T* RESTRICT x, const int64_t* RESTRICT offsets, T* RESTRICT out, int n
) {
    #pragma omp simd
    for (int m = 0; m < n; m++) out[m] = x[offsets[m]];
}

template <class T>
ROW_FUNCTION void scatter(
    const T* RESTRICT x, const int64_t* RESTRICT offsets, T* RESTRICT out, int n
) {
    for (int m = 0; m < n; m++) out[offsets[m]] = x[m];
}

// The labels of a block of points, -1 where a point does not count.
void load_classes_of(
    const Target& target, const Points& points, const Place& place, int64_t n, int32_t* label
) {
    int64_t given[BLOCK];
    const Images& x = target.labels;
    if (points.num_grids) {
        int64_t offsets[BLOCK];
        find_offsets(place, x.stride_h, x.stride_w, offsets);
        with_integers(x, x.offset(n, 0, 0, 0), [&](auto* data) {
            for (int m = 0; m < place.n; m++) given[m] = int64_t(data[offsets[m]]);
        });
        class_row(given, target.num_classes, target.ignore_index, label, place.n);
        return;
    }
    each_run(points, place, x.stride_h, x.stride_w,
        [&](int at, int64_t h, int64_t w, int count) {
            load_classes(target, n, h, w, count, given, label + at);
        });
}

// --- Square roots of probabilities --------------------------------------------------------------

ROW_FUNCTION void copy_and_top(Floats x, FloatsOut out, FloatsOut top, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        out[w] = x[w];
        top[w] = x[w] > top[w] ? x[w] : top[w];
    }
}

// Half the exponent gives the square root of exp(x - top): not 0 where the probability underflows.
// The sum of the other channels has all digits of 1 - p where p, in the label's channel, is near 1.
ROW_FUNCTION void roots_of_row(
    FloatsOut x, Floats top, Ints label, int c, FloatsOut own_s, FloatsOut others, int n
) {
    n &= -WHOLE;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        float s = exp_of_negative((x[w] - top[w]) * 0.5f);
        x[w] = s;
        own_s[w] = label[w] == c ? s : own_s[w];
        others[w] += label[w] == c ? 0.0f : s * s;
    }
}

// The scale of the square roots, 0 where a point does not count; q = 1 - p of the label; and the
// label's entry of D: sqrt(p) - 1 would lose its digits to rounding where p is near 1.
ROW_FUNCTION void finish_sums(
    Ints label, FloatsOut own_s, Floats others, FloatsOut scale, FloatsOut own_q, FloatsOut own_d,
    int n
) {
    n &= -WHOLE;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        float r = 1.0f / std::sqrt(others[w] + own_s[w] * own_s[w]);
        r = label[w] >= 0 ? r : 0.0f;
        float s = own_s[w] * r, q = label[w] >= 0 ? others[w] * r * r : 0.0f;
        scale[w] = r;
        own_s[w] = s;
        own_q[w] = q;
        own_d[w] = -q / (1.0f + s);
    }
}

// A row of S, with the label's entry of D in the place of its own. Points that do not count may
// hold anything, and get 0.
ROW_FUNCTION void finish_row(FloatsOut x, Floats scale, Ints label, int c, Floats own_d, int n) {
    n &= -WHOLE;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        float s = label[w] >= 0 ? x[w] * scale[w] : 0.0f;
        x[w] = label[w] == c ? own_d[w] : s;
    }
}

// Neighbouring points of a block with the same label, which counts. Images have long runs.
struct Run {
    int from, to, label;
};

// A block of points and what is known of them. d [C, PITCH] is D; the other rows are [PITCH].
struct Block {
    int n, whole, num_classes;
    Place place;
    alignas(64) int32_t label[PITCH];
    alignas(64) float top[PITCH], own_s[PITCH], own_q[PITCH], own_d[PITCH], others[PITCH];
    alignas(64) float scale[PITCH], line[PITCH];
    int64_t offsets[BLOCK];
    Buffer<float> d;
    std::vector<Run> runs;

    explicit Block(int64_t num_classes)
        : num_classes(int(num_classes)), d(make_buffer<float>(num_classes * PITCH)) {
        runs.reserve(BLOCK);
    }

    // Loads the points from first on, before end. Without a target all points count, and S takes
    // the place of D.
    void load(
        const Images& logits, const Target* target, const Points& points, int64_t image,
        int64_t first, int64_t end
    ) {
        place.move(points, first, end);
        n = place.n;
        whole = (n + WHOLE - 1) & -WHOLE;
        std::fill(label, label + whole, -1);
        if (target) {
            load_classes_of(*target, points, place, image, label);
        } else {
            std::fill(label, label + n, num_classes);  // no channel's
        }
        std::fill(top, top + n, -INFINITY);
        std::fill(top + n, top + whole, 0.0f);
        std::fill(own_s, own_s + whole, 0.0f);
        std::fill(others, others + whole, 0.0f);
        if (points.num_grids) find_offsets(place, logits.stride_h, logits.stride_w, offsets);
        for (int c = 0; c < num_classes; c++) load_row_of(logits, points, image, c, row(c));
        for (int c = 0; c < num_classes; c++) {
            roots_of_row(row(c), top, label, c, own_s, others, whole);
        }
        finish_sums(label, own_s, others, scale, own_q, own_d, whole);
        for (int c = 0; c < num_classes; c++) finish_row(row(c), scale, label, c, own_d, whole);
    }

    float* row(int64_t c) { return &d[c * PITCH]; }

    void find_runs() {
        runs.clear();
        for (int from = 0, to; from < n; from = to) {
            for (to = from + 1; to < n && label[to] == label[from]; to++) {}
            if (label[from] >= 0) runs.push_back({from, to, label[from]});
        }
    }

private:
    void load_row_of(const Images& x, const Points& points, int64_t image, int c, float* out) {
        for (int w = n; w < whole; w++) out[w] = 0.0f;
        if (points.num_grids) {
            int64_t at = x.offset(image, c, 0, 0);
            const float* row = line;
            if (x.dtype == FLOAT32) {
                const float* data = static_cast<const float*>(x.data) + at;
                gather(data, offsets, line, n);
            } else {
                uint16_t raw[BLOCK];
                const uint16_t* data = static_cast<const uint16_t*>(x.data) + at;
                gather(data, offsets, raw, n);
                (x.dtype == BFLOAT16 ? load_bfloat16 : load_float16)(raw, 1, line, n);
            }
            copy_and_top(row, out, top, n);
            return;
        }
        each_run(points, place, x.stride_h, x.stride_w,
            [&](int at, int64_t h, int64_t w, int count) {
                const float* row = load_row(x, image, c, h, w, count, line);
                if (row != line) prefetch(row + BLOCK, count);
                copy_and_top(row, out + at, top + at, count);
            });
    }
};

// --- Gram matrices ------------------------------------------------------------------------------

ROW_FUNCTION void widen(Floats x, double* RESTRICT out, int n) {
    n &= -WHOLE;
    #pragma omp simd
    for (int w = 0; w < n; w++) out[w] = x[w];
}

// Adds the products of A rows and B rows, [A, B] of them, to out, which has C columns. Products of
// float32 numbers are exact in float64, and nothing is lost where the matrices cancel.
template <int A, int B>
ROW_FUNCTION void add_products(
    const double* RESTRICT a, const double* RESTRICT b, double* RESTRICT out, int c, int n
) {
    Doubles sum[A][B] = {};
    for (int w = 0; w < n; w += LANES) {
        Doubles y[B];
        #pragma GCC unroll 8
        for (int j = 0; j < B; j++) y[j] = load<Doubles>(b + j * PITCH + w);
        #pragma GCC unroll 8
        for (int i = 0; i < A; i++) {
            Doubles x = load<Doubles>(a + i * PITCH + w);
            #pragma GCC unroll 8
            for (int j = 0; j < B; j++) sum[i][j] += x * y[j];
        }
    }
    for (int i = 0; i < A; i++) {
        for (int j = 0; j < B; j++) out[i * c + j] += total(sum[i][j]);
    }
}

template <int A = ROWS, int B = COLUMNS>
void add_products_of(
    int a_rows, int b_rows, const double* a, const double* b, double* out, int c, int n
) {
    if constexpr (A > 1) {
        if (a_rows < A) return add_products_of<A - 1, B>(a_rows, b_rows, a, b, out, c, n);
    }
    if constexpr (B > 1) {
        if (b_rows < B) return add_products_of<A, B - 1>(a_rows, b_rows, a, b, out, c, n);
    }
    add_products<A, B>(a, b, out, c, n);
}

// Calls part(from, to) for parts of from ... to that differ by 1 at most and have at most `most`.
template <class Part>
void in_parts(int from, int to, int most, const Part& part) {
    int count = to - from, parts = (count + most - 1) / most;
    for (int i = 0; i < parts; i++) part(from + count * i / parts, from + count * (i + 1) / parts);
}

// Adds D D^T to dd [C, C]: its upper half and a little more, as the matrix is symmetric.
void add_gram(const double* d, double* dd, int c, int n) {
    in_parts(0, c, ROWS, [&](int i, int i_end) {
        in_parts(i, c, COLUMNS, [&](int j, int j_end) {
            const double *a = d + int64_t(i) * PITCH, *b = d + int64_t(j) * PITCH;
            double* out = dd + int64_t(i) * c + j;
            add_products_of(i_end - i, j_end - j, a, b, out, c, n);
        });
    });
}

// Adds the sums of four rows to out [4].
ROW_FUNCTION void add_four_rows(const double* RESTRICT x, double* RESTRICT out, int n) {
    double a = 0, b = 0, c = 0, d = 0;
    #pragma omp simd reduction(+ : a, b, c, d)
    for (int w = 0; w < n; w++) {
        a += x[w];
        b += x[w + PITCH];
        c += x[w + 2 * PITCH];
        d += x[w + 3 * PITCH];
    }
    out[0] += a, out[1] += b, out[2] += c, out[3] += d;
}

ROW_FUNCTION void add_row(const double* RESTRICT x, double* RESTRICT out, int n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int w = 0; w < n; w++) sum += x[w];
    *out += sum;
}

// Adds the sums of D over the points of each label to yd [labels, channels], and their numbers.
void add_labels(const Block& block, const double* d, double* yd, double* number) {
    int64_t c = block.num_classes;
    for (const Run& run : block.runs) {
        int n = run.to - run.from;
        int64_t i = 0;
        for (; i + 4 <= c; i += 4) {
            add_four_rows(d + i * PITCH + run.from, yd + run.label * c + i, n);
        }
        for (; i < c; i++) add_row(d + i * PITCH + run.from, yd + run.label * c + i, n);
        number[run.label] += n;
    }
}

// The sums over some points: D D^T [channels, channels], Y D^T [labels, channels] and the numbers
// of points by label.
struct Sums {
    double *dd, *yd, *number;

    static int64_t size(int64_t c) { return (2 * c + 1) * c; }
    Sums(double* x, int64_t c) : dd(x), yd(x + c * c), number(x + 2 * c * c) {}
};

// The sums of every image; the memory holds [N, Sums::size].
Buffer<double> sums_of(
    const Images& logits, const Target& target, const Points& points, int64_t num_images, int64_t c,
    int64_t num_threads
) {
    int64_t tasks = points.num_tasks(c), task_size = points.task_size(c), size = Sums::size(c);
    Buffer<double> parts = make_buffer<double>(num_images * tasks * size);
    parallel(num_images * tasks, num_threads, [&](Tasks& queue) {
        Block block(c);
        Buffer<double> d = make_buffer<double>(c * PITCH);
        for (int64_t task; queue.next(task);) {
            double* memory = &parts[task * size];
            std::fill(memory, memory + size, 0.0);
            Sums sums(memory, c);
            int64_t image = task / tasks, first = task % tasks * task_size;
            int64_t end = std::min(first + task_size, points.count);
            for (int64_t at = first; at < end; at += BLOCK) {
                block.load(logits, &target, points, image, at, end);
                block.find_runs();
                if (block.runs.empty()) continue;
                for (int k = 0; k < c; k++) widen(block.row(k), &d[k * PITCH], block.whole);
                add_gram(&d[0], sums.dd, int(c), block.whole);
                add_labels(block, &d[0], sums.yd, sums.number);
            }
        }
    });
    // The first task's sums become the image's; then they move to the image's place.
    for (int64_t n = 0; n < num_images; n++) {
        double* first = &parts[n * tasks * size];
        for (int64_t task = 1; task < tasks; task++) {
            const double* part = first + task * size;
            for (int64_t i = 0; i < size; i++) first[i] += part[i];
        }
        std::copy(first, first + size, &parts[n * size]);
    }
    return parts;
}

// The Gram matrices D D^T, D M^T and M M^T of an image [3, C, C], where M = S + Y = D + 2 Y.
void gram_of(const Sums& sums, int64_t c, double* gram) {
    double *dd = gram, *dm = gram + c * c, *mm = gram + 2 * c * c;
    for (int64_t i = 0; i < c; i++) {
        for (int64_t j = 0; j < c; j++) {
            double products = sums.dd[std::min(i, j) * c + std::max(i, j)];
            double right = 2 * sums.yd[j * c + i], left = 2 * sums.yd[i * c + j];
            dd[i * c + j] = products;
            dm[i * c + j] = products + right;
            mm[i * c + j] = products + right + left + (i == j ? 4 * sums.number[i] : 0.0);
        }
    }
}

// (<D D^T, M M^T> + <D M^T, M D^T>) / 2
double squared_error_of(const double* gram, int64_t c) {
    const double *dd = gram, *dm = gram + c * c, *mm = gram + 2 * c * c;
    double sum = 0;
    for (int64_t i = 0; i < c; i++) {
        for (int64_t j = 0; j < c; j++) {
            sum += dd[i * c + j] * mm[i * c + j] + dm[i * c + j] * dm[j * c + i];
        }
    }
    return sum < 0 ? 0.0 : sum / 2;
}

// --- Gradient -----------------------------------------------------------------------------------

ROW_FUNCTION double dot(const double* RESTRICT x, Floats y, int64_t n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += x[k] * y[k];
    return sum;
}

// The gradient of S is 4 S S^T D + 4 S D^T Y, times the gradient of the squared error. Where the
// predictions of a label are nearly equal, but not confident, both parts are large and cancel. So D
// loses a center, the mean of the label's points, and the center's part joins the second one in
// float64. The remainder of D is small there, and so is the rounding of its products.
struct Factors {
    Buffer<double> exact;  // 4 S S^T [C, C]
    Buffer<float> roots;   // the same in float32
    Buffer<float> center;  // [labels, C]
    Buffer<float> shift;   // 4 S S^T center + 4 S D^T Y [labels, C]

    Factors(int64_t num_images, int64_t c)
        : exact(make_buffer<double>(num_images * c * c)),
          roots(make_buffer<float>(num_images * c * c)),
          center(make_buffer<float>(num_images * c * c)),
          shift(make_buffer<float>(num_images * c * c)) {}

    // The products of an image: 4 S S^T = (D + M) (D + M)^T.
    void fill_products(const double* gram, double factor, int64_t c, int64_t n) {
        const double *dd = gram, *dm = gram + c * c, *mm = gram + 2 * c * c;
        for (int64_t i = 0; i < c; i++) {
            for (int64_t k = 0; k < c; k++) {
                double sum = mm[i * c + k] + dm[i * c + k] + dm[k * c + i] + dd[i * c + k];
                exact[(n * c + i) * c + k] = sum;
                roots[(n * c + i) * c + k] = float(factor * sum);
            }
        }
    }

    // Center and shift of one label of an image.
    void fill_label(const double* gram, double factor, int64_t c, int64_t n, int64_t l) {
        const double *dd = gram, *dm = gram + c * c, *mm = gram + 2 * c * c;
        double number = std::round((mm[l * c + l] - 2 * dm[l * c + l] + dd[l * c + l]) / 4);
        if (number == 0) return;  // no point asks for this label
        int64_t row = (n * c + l) * c;
        for (int64_t k = 0; k < c; k++) {
            center[row + k] = float((dm[k * c + l] - dd[k * c + l]) / (2 * number));
        }
        for (int64_t i = 0; i < c; i++) {
            double sum = dot(&exact[(n * c + i) * c], &center[row], c);
            shift[row + i] = float(factor * (sum + 2 * (dm[l * c + i] + dd[i * c + l])));
        }
    }
};

// A rows of a product: out += roots x, with roots [A, C] and x [C, PITCH].
template <int A>
ROW_FUNCTION void multiply(Floats roots, Floats x, FloatsOut out, int c, int n) {
    for (int w = 0; w < n; w += 2 * WIDE) {
        Wide left[A], right[A];
        #pragma GCC unroll 16
        for (int i = 0; i < A; i++) {
            left[i] = load<Wide>(out + i * PITCH + w);
            right[i] = load<Wide>(out + i * PITCH + w + WIDE);
        }
        for (int k = 0; k < c; k++) {
            Wide a = load<Wide>(x + k * PITCH + w), b = load<Wide>(x + k * PITCH + w + WIDE);
            #pragma GCC unroll 16
            for (int i = 0; i < A; i++) {
                left[i] += roots[i * c + k] * a;
                right[i] += roots[i * c + k] * b;
            }
        }
        #pragma GCC unroll 16
        for (int i = 0; i < A; i++) {
            store(out + i * PITCH + w, left[i]);
            store(out + i * PITCH + w + WIDE, right[i]);
        }
    }
}

template <int A = OUT_ROWS>
void multiply(int rows, const float* roots, const float* x, float* out, int c, int n) {
    if constexpr (A > 1) {
        if (rows < A) return multiply<A - 1>(rows, roots, x, out, c, n);
    }
    multiply<A>(roots, x, out, c, n);
}

// S times its gradient, in the place of the gradient; the label's product, and the others' sum.
ROW_FUNCTION void weigh_row(
    FloatsOut grad, Floats d, Ints label, int c, Floats own_s, FloatsOut own, FloatsOut others,
    int n
) {
    n &= -WHOLE;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        float product = grad[w] * (label[w] == c ? own_s[w] : d[w]);
        grad[w] = product;
        own[w] = label[w] == c ? product : own[w];
        others[w] += label[w] == c ? 0.0f : product;
    }
}

// The gradient of the logits, (S G - p <S, G>) / 2. Where p is near 1 this would subtract nearly
// equal numbers in the label's channel; there S G - p S G = q S G.
ROW_FUNCTION void finish_gradient(
    Floats products, Floats d, Ints label, int c, Floats own_s, Floats own_q, Floats own,
    Floats others, FloatsOut out, int n
) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        bool is_own = label[w] == c;
        float s = is_own ? own_s[w] : d[w], p = s * s;
        float first = is_own ? own_q[w] * own[w] : products[w] - p * own[w];
        float grad = 0.5f * (first - p * others[w]);
        out[w] = label[w] >= 0 ? grad : 0.0f;
    }
}

// Computes the gradient of the points of a block and writes their pixels.
struct Gradient {
    int num_classes;
    Buffer<float> x, products;  // [C, PITCH]: D without its center, and S times its gradient
    alignas(64) float own[PITCH], others[PITCH], line[PITCH];

    explicit Gradient(int64_t c)
        : num_classes(int(c)), x(make_buffer<float>(c * PITCH)),
          products(make_buffer<float>(c * PITCH)) {
        std::fill(&x[0], &x[c * PITCH], 0.0f);
        std::fill(&products[0], &products[c * PITCH], 0.0f);
    }

    void compute(Block& block, const float* roots, const float* center, const float* shift) {
        int c = num_classes, n = block.whole;
        for (int64_t k = 0; k < c; k++) {
            start_rows(block, center + k, shift + k, block.row(k), &x[k * PITCH], row(k));
        }
        // Two vectors at a time may go beyond the whole ones: rows are longer.
        in_parts(0, c, OUT_ROWS, [&](int i, int i_end) {
            multiply(i_end - i, roots + int64_t(i) * c, &x[0], row(i), c, n);
        });
        std::fill(own, own + n, 0.0f);
        std::fill(others, others + n, 0.0f);
        for (int k = 0; k < c; k++) {
            weigh_row(row(k), block.row(k), block.label, k, block.own_s, own, others, n);
        }
    }

    void write(Block& block, const Points& points, const Images& grad, int64_t image) {
        if (points.num_grids) return write_points(block, grad, image);
        for (int c = 0; c < num_classes; c++) {
            each_run(points, block.place, grad.stride_h, grad.stride_w,
                [&](int at, int64_t h, int64_t w, int count) {
                    float* out = row_to_write(grad, image, c, h, w, line);
                    finish(block, c, out, at, count);
                    store_row(grad, image, c, h, w, count, out);
                });
        }
    }

private:
    // Points on the same pixel have the same gradient: the first one writes.
    void write_points(Block& block, const Images& grad, int64_t image) {
        const Place& place = block.place;
        int64_t offsets[BLOCK];
        find_offsets(place, grad.stride_h, grad.stride_w, offsets);
        int leading = 0;
        for (int m = 0; m < place.n; m++) {
            if (place.leads[m]) offsets[leading++] = offsets[m];
        }
        for (int c = 0; c < num_classes; c++) {
            finish(block, c, line, 0, place.n);
            int k = 0;
            for (int m = 0; m < place.n; m++) {
                line[k] = line[m] * place.times[m];
                k += place.leads[m];
            }
            int64_t at = grad.offset(image, c, 0, 0);
            if (grad.dtype == FLOAT32) {
                scatter(line, offsets, static_cast<float*>(grad.data) + at, leading);
            } else {
                uint16_t half[BLOCK];
                (grad.dtype == BFLOAT16 ? store_bfloat16 : store_float16)(line, half, 1, leading);
                scatter(half, offsets, static_cast<uint16_t*>(grad.data) + at, leading);
            }
        }
    }

    float* row(int64_t c) { return &products[c * PITCH]; }

    // A channel's row of D without the centers, and of the shifts. Points that do not count keep
    // what the rows held: their gradient is 0 whatever the products are.
    void start_rows(
        const Block& block, const float* center, const float* shift, Floats d, FloatsOut without,
        FloatsOut shifts
    ) {
        for (const Run& run : block.runs) {
            int64_t l = run.label * int64_t(num_classes);
            float subtracted = center[l], filled = shift[l];
            #pragma omp simd
            for (int w = run.from; w < run.to; w++) {
                without[w] = d[w] - subtracted;
                shifts[w] = filled;
            }
        }
    }

    void finish(Block& block, int c, float* out, int at, int n) {
        finish_gradient(
            row(c) + at, block.row(c) + at, block.label + at, c, block.own_s + at,
            block.own_q + at, own + at, others + at, out, n
        );
    }
};

// The arguments that all functions here share: N, C, H, W, the ignored label, the number of
// threads, and the sizes of the grids, none for every pixel.
struct Shape {
    int64_t num_images, num_classes, height, width, ignore_index, num_threads, num_grids;
    const int64_t* sizes;

    explicit Shape(const int64_t* x)
        : num_images(x[0]), num_classes(x[1]), height(x[2]), width(x[3]), ignore_index(x[4]),
          num_threads(x[5]), num_grids(x[6]), sizes(x + 7) {}
    Points points() const { return Points(height, width, sizes, num_grids); }
    Target target(const Images& labels) const { return {labels, num_classes, ignore_index}; }

    int64_t threads_for(int64_t work) const { return work < LEAST_WORK ? 1 : num_threads; }
};

// Fills gram [N, 3, C, C], and unless null the number of points (N).
void fill_gram(
    const Images& logits, const Target& target, const Shape& shape, const Points& points,
    double* gram, int64_t* number
) {
    int64_t c = shape.num_classes, work = shape.num_images * points.count * c;
    Buffer<double> all =
        sums_of(logits, target, points, shape.num_images, c, shape.threads_for(work));
    for (int64_t n = 0; n < shape.num_images; n++) {
        Sums sums(&all[n * Sums::size(c)], c);
        gram_of(sums, c, gram + n * 3 * c * c);
        if (number) number[n] = int64_t(std::accumulate(sums.number, sums.number + c, 0.0));
    }
}

// The memory of a gradient; its elements lie side by side.
int64_t bytes_of(const Images& grad, const Shape& shape) {
    int64_t size = shape.num_images * shape.num_classes * shape.height * shape.width;
    return size * (grad.dtype == FLOAT32 ? 4 : 2);
}

}  // namespace

// Fills squared_error (N), pair_count (N) and, unless null, gram (N, 3, C, C).
EXPORT void forward(
    const Images& logits, const Images& labels, const int64_t* integers, float* squared_error,
    int64_t* pair_count, double* gram
) {
    Shape shape(integers);
    int64_t matrices = 3 * shape.num_classes * shape.num_classes;
    Buffer<double> own = make_buffer<double>(gram ? 0 : shape.num_images * matrices);
    if (!gram) gram = own.get();
    fill_gram(logits, shape.target(labels), shape, shape.points(), gram, pair_count);
    for (int64_t n = 0; n < shape.num_images; n++) {
        squared_error[n] = float(squared_error_of(gram + n * matrices, shape.num_classes));
        pair_count[n] *= pair_count[n];
    }
}

// Fills the gradient; with grids, the pixels of their points. Without gram (N, 3, C, C), the
// matrices are computed again.
EXPORT void backward(
    const Images& logits, const Images& labels, const int64_t* integers,
    const float* grad_squared_error, const double* gram, const Images& grad
) {
    Shape shape(integers);
    Target target = shape.target(labels);
    Points points = shape.points();
    int64_t c = shape.num_classes, matrix = c * c;
    Buffer<double> own = make_buffer<double>(gram ? 0 : shape.num_images * 3 * matrix);
    if (!gram) {
        fill_gram(logits, target, shape, points, own.get(), nullptr);
        gram = own.get();
    }
    Factors factors(shape.num_images, c);
    for (int64_t n = 0; n < shape.num_images; n++) {
        factors.fill_products(gram + n * 3 * matrix, grad_squared_error[n], c, n);
    }
    int64_t work = shape.num_images * matrix * c;
    parallel(shape.num_images * c, shape.threads_for(work), [&](Tasks& queue) {
        for (int64_t task; queue.next(task);) {
            int64_t n = task / c;
            factors.fill_label(gram + n * 3 * matrix, grad_squared_error[n], c, n, task % c);
        }
    });

    if (!shape.num_grids) ask_for_huge_pages(grad.data, bytes_of(grad, shape));
    int64_t tasks = (points.count + LEAST_TASK - 1) / LEAST_TASK;
    work = shape.num_images * points.count * c;
    parallel(shape.num_images * tasks, shape.threads_for(work), [&](Tasks& queue) {
        Block block(c);
        Gradient gradient(c);
        for (int64_t task; queue.next(task);) {
            int64_t n = task / tasks, first = task % tasks * LEAST_TASK;
            int64_t end = std::min(first + LEAST_TASK, points.count);
            for (int64_t at = first; at < end; at += BLOCK) {
                block.load(logits, &target, points, n, at, end);
                block.find_runs();
                gradient.compute(
                    block, &factors.roots[n * matrix], &factors.center[n * matrix],
                    &factors.shift[n * matrix]
                );
                gradient.write(block, points, grad, n);
            }
        }
    });
}

// Fills s (N, C, points), the square roots of the probabilities.
EXPORT void square_roots(const Images& logits, const int64_t* integers, float* s) {
    Shape shape(integers);
    Points points = shape.points();
    int64_t c = shape.num_classes, tasks = (points.count + LEAST_TASK - 1) / LEAST_TASK;
    int64_t work = shape.num_images * points.count * c;
    parallel(shape.num_images * tasks, shape.threads_for(work), [&](Tasks& queue) {
        Block block(c);
        for (int64_t task; queue.next(task);) {
            int64_t n = task / tasks, first = task % tasks * LEAST_TASK;
            int64_t end = std::min(first + LEAST_TASK, points.count);
            for (int64_t at = first; at < end; at += BLOCK) {
                block.load(logits, nullptr, points, n, at, end);
                for (int k = 0; k < c; k++) {
                    float* out = s + (n * c + k) * points.count + at;
                    std::copy(block.row(k), block.row(k) + block.n, out);
                }
            }
        }
    });
}
