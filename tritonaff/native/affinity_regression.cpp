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

#include <memory>
#include <new>
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
constexpr int64_t LEAST_WORK = 1 << 16;

// Vectors, and how many rows are multiplied by how many: the sums stay in registers.
#if defined(__AVX512F__)
constexpr int LANES = 8, MOST = 5, MOST_OUT = 10;
#elif defined(__AVX__)
constexpr int LANES = 4, MOST = 3, MOST_OUT = 5;
#else
constexpr int LANES = 2, MOST = 5, MOST_OUT = 10;
#endif
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef float FloatLanes __attribute__((vector_size(4 * LANES)));  // as many as doubles
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef float Wide __attribute__((vector_size(8 * LANES)));  // twice as many
constexpr int WIDE = 2 * LANES;

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

inline double total(Doubles x) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

template <class T>
struct Free {
    void operator()(T* x) const { ::operator delete[](x, std::align_val_t(64)); }
};

// Memory for n numbers, not initialised, at the start of a cache line.
template <class T>
using Buffer = std::unique_ptr<T[], Free<T>>;

template <class T>
Buffer<T> make_buffer(int64_t n) {
    void* memory = ::operator new[](sizeof(T) * size_t(std::max<int64_t>(n, 1)), std::align_val_t(64));
    return Buffer<T>(static_cast<T*>(memory));
}

// --- Points -------------------------------------------------------------------------------------

// A tensor (N, H, W) of uint8, int32 or int64; strides in elements. The launcher has the same
// fields.
struct Labels {
    const void* data;
    int64_t bytes;
    int64_t stride_n, stride_h, stride_w;
    int64_t ignore_index;
};

// The rows or columns of grids of some sizes over an axis.
struct Axis {
    std::vector<int64_t> place;  // of step i of grid g, at begin(g) + i
    std::vector<int32_t> times;  // the number of steps of every grid at a place [places, grids]

    Axis(int64_t length, const int64_t* sizes, int64_t num_grids) {
        for (int64_t g = 0; g < num_grids; g++) {
            for (int64_t i = 0; i < sizes[g]; i++) {
                int64_t at = i * length / sizes[g];
                place.push_back(at);
                for (int64_t k = 0; k < num_grids; k++) {
                    times.push_back(int32_t(steps(at + 1, length, sizes[k]) - steps(at, length, sizes[k])));
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
    // Of the points of grids:
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
        const int32_t* down = &points.down.times[(lines + i) * points.num_grids];
        const int32_t* across = &points.across.times[(lines + j) * points.num_grids];
        h[m] = row[i];
        w[m] = column[j];
        leads[m] = (i == 0 || row[i - 1] != row[i]) && (j == 0 || column[j - 1] != column[j]);
        int64_t total = 0;
        for (int64_t k = 0; k < points.num_grids; k++) {
            int64_t here = int64_t(down[k]) * across[k];
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

template <class T>
ROW_FUNCTION void gather(
    const T* RESTRICT x, int64_t stride_h, int64_t stride_w, const Place& place, T* RESTRICT out
) {
    for (int m = 0; m < place.n; m++) out[m] = x[place.h[m] * stride_h + place.w[m] * stride_w];
}

// Labels as int32, -1 where a point does not count.
template <class T>
ROW_FUNCTION void load_labels(
    const T* RESTRICT x, int64_t stride, int64_t num_classes, int64_t ignore, IntsOut out, int n
) {
    for (int w = 0; w < n; w++) {
        int64_t label = x[w * stride];
        out[w] = (label >= 0) & (label < num_classes) & (label != ignore) ? int32_t(label) : -1;
    }
}

template <class T>
void labels_of(
    const Labels& target, const Points& points, const Place& place, int64_t n, int64_t num_classes,
    int32_t* label
) {
    const T* x = static_cast<const T*>(target.data) + n * target.stride_n;
    if (points.num_grids) {
        T raw[BLOCK];
        gather(x, target.stride_h, target.stride_w, place, raw);
        load_labels(raw, 1, num_classes, target.ignore_index, label, place.n);
        return;
    }
    each_run(points, place, target.stride_h, target.stride_w,
        [&](int at, int64_t h, int64_t w, int count) {
            const T* row = x + h * target.stride_h + w * target.stride_w;
            load_labels(row, target.stride_w, num_classes, target.ignore_index, label + at, count);
        });
}

// --- Square roots of probabilities ----------------------------------------------------------------

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

// A block of points and what is known of them. d [C, PITCH] is D; the other rows are [PITCH].
struct Block {
    int n, whole, num_classes;
    Place place;
    alignas(64) int32_t label[PITCH];
    alignas(64) float top[PITCH], own_s[PITCH], own_q[PITCH], own_d[PITCH], others[PITCH];
    alignas(64) float scale[PITCH], line[PITCH];
    Buffer<float> d;
    std::vector<int32_t> present;  // the labels of the block, and the number of their points
    std::vector<int32_t> number;

    explicit Block(int64_t num_classes)
        : num_classes(int(num_classes)), d(make_buffer<float>(num_classes * PITCH)),
          number(num_classes) {}

    // Loads the points from first on, before end. Without a target all points count, and S takes
    // the place of D.
    void load(
        const Images& logits, const Labels* target, const Points& points, int64_t image,
        int64_t first, int64_t end
    ) {
        place.move(points, first, end);
        n = place.n;
        whole = (n + WHOLE - 1) & -WHOLE;
        std::fill(label, label + whole, -1);
        if (target) {
            (target->bytes == 8   ? labels_of<int64_t>
             : target->bytes == 4 ? labels_of<int32_t>
                                  : labels_of<uint8_t>)(
                *target, points, place, image, num_classes, label
            );
        } else {
            std::fill(label, label + n, num_classes);  // no channel's
        }
        std::fill(top, top + whole, -INFINITY);
        std::fill(own_s, own_s + whole, 0.0f);
        std::fill(others, others + whole, 0.0f);
        for (int c = 0; c < num_classes; c++) load_row_of(logits, points, image, c, row(c));
        for (int c = 0; c < num_classes; c++) {
            roots_of_row(row(c), top, label, c, own_s, others, whole);
        }
        finish_sums(label, own_s, others, scale, own_q, own_d, whole);
        for (int c = 0; c < num_classes; c++) finish_row(row(c), scale, label, c, own_d, whole);
    }

    float* row(int c) { return &d[int64_t(c) * PITCH]; }

    // Fills present and number. Neighbouring points mostly have the same label.
    void count_labels() {
        for (int32_t l : present) number[l] = 0;
        present.clear();
        for (int w = 0, next; w < n; w = next) {
            int32_t l = label[w];
            for (next = w + 1; next < n && label[next] == l; next++) {}
            if (l < 0) continue;
            if (!number[l]) present.push_back(l);
            number[l] += next - w;
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
                gather(data, x.stride_h, x.stride_w, place, line);
            } else {
                uint16_t raw[BLOCK];
                const uint16_t* data = static_cast<const uint16_t*>(x.data) + at;
                gather(data, x.stride_h, x.stride_w, place, raw);
                (x.dtype == BFLOAT16 ? load_bfloat16 : load_float16)(raw, 1, line, n);
            }
            copy_and_top(row, out, top, n);
            return;
        }
        each_run(points, place, x.stride_h, x.stride_w,
            [&](int at, int64_t h, int64_t w, int count) {
                const float* row = load_row(x, image, c, h, w, count, line);
                copy_and_top(row, out + at, top + at, count);
            });
    }
};

// --- Gram matrices --------------------------------------------------------------------------------

// Adds the products of A rows and B rows, [A, B] of them, to out, which has C columns. Products of
// float32 numbers are exact in float64, and nothing is lost where the matrices cancel.
template <int A, int B>
ROW_FUNCTION void add_products(Floats a, Floats b, double* RESTRICT out, int num_classes, int n) {
    Doubles sum[A][B] = {};
    for (int w = 0; w < n; w += LANES) {
        Doubles y[B];
        #pragma GCC unroll 8
        for (int j = 0; j < B; j++) {
            y[j] = __builtin_convertvector(load<FloatLanes>(b + j * PITCH + w), Doubles);
        }
        #pragma GCC unroll 8
        for (int i = 0; i < A; i++) {
            Doubles x = __builtin_convertvector(load<FloatLanes>(a + i * PITCH + w), Doubles);
            #pragma GCC unroll 8
            for (int j = 0; j < B; j++) sum[i][j] += x * y[j];
        }
    }
    for (int i = 0; i < A; i++) {
        for (int j = 0; j < B; j++) {
            out[i * num_classes + j] += total(sum[i][j]);
        }
    }
}

template <int A>
void add_products_of(int b_rows, const float* a, const float* b, double* out, int c, int n) {
    switch (b_rows) {
        case 1: return add_products<A, 1>(a, b, out, c, n);
        case 2: return add_products<A, 2>(a, b, out, c, n);
        case 3: return add_products<A, 3>(a, b, out, c, n);
        case 4: return add_products<A, 4>(a, b, out, c, n);
        case 5: return add_products<A, 5>(a, b, out, c, n);
    }
}

void add_products_of(
    int a_rows, int b_rows, const float* a, const float* b, double* out, int c, int n
) {
    switch (a_rows) {
        case 1: return add_products_of<1>(b_rows, a, b, out, c, n);
        case 2: return add_products_of<2>(b_rows, a, b, out, c, n);
        case 3: return add_products_of<3>(b_rows, a, b, out, c, n);
        case 4: return add_products_of<4>(b_rows, a, b, out, c, n);
        case 5: return add_products_of<5>(b_rows, a, b, out, c, n);
    }
}

// Calls part(from, to) for parts of 0 ... count that differ by 1 at most and have at most `most`.
template <class Part>
void in_parts(int count, int most, const Part& part) {
    int parts = (count + most - 1) / most;
    for (int i = 0; i < parts; i++) part(count * i / parts, count * (i + 1) / parts);
}

// Adds D D^T to dd [C, C]: its upper half, as the matrix is symmetric.
void add_gram(Block& block, double* dd) {
    int c = block.num_classes;
    in_parts(c, MOST, [&](int i, int i_end) {
        in_parts(c, MOST, [&](int j, int j_end) {
            if (j < i) return;
            double* out = dd + int64_t(i) * c + j;
            add_products_of(i_end - i, j_end - j, block.row(i), block.row(j), out, c, block.whole);
        });
    });
}

// Adds the sums of R rows over the points of one label to out [R].
template <int R>
ROW_FUNCTION void add_points_of_label(Floats d, Ints label, int l, double* RESTRICT out, int n) {
    Doubles sum[R] = {};
    for (int w = 0; w < n; w += LANES) {
        auto here = load<IntLanes>(label + w) == l;
        #pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            FloatLanes x = here ? load<FloatLanes>(d + i * PITCH + w) : FloatLanes{};
            sum[i] += __builtin_convertvector(x, Doubles);
        }
    }
    for (int i = 0; i < R; i++) out[i] += total(sum[i]);
}

// Adds the sums of D over the points of each label to yd [labels, channels].
void add_labels(Block& block, double* yd) {
    int c = block.num_classes, n = block.whole;
    for (int32_t l : block.present) {
        in_parts(c, 4, [&](int i, int i_end) {
            double* out = yd + int64_t(l) * c + i;
            switch (i_end - i) {
                case 1: return add_points_of_label<1>(block.row(i), block.label, l, out, n);
                case 2: return add_points_of_label<2>(block.row(i), block.label, l, out, n);
                case 3: return add_points_of_label<3>(block.row(i), block.label, l, out, n);
                case 4: return add_points_of_label<4>(block.row(i), block.label, l, out, n);
            }
        });
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
    const Images& logits, const Labels& target, const Points& points, int64_t num_images, int64_t c,
    int64_t num_threads
) {
    int64_t tasks = points.num_tasks(c), task_size = points.task_size(c), size = Sums::size(c);
    Buffer<double> parts = make_buffer<double>(num_images * tasks * size);
    parallel(num_images * tasks, num_threads, [&](Tasks& queue) {
        Block block(c);
        for (int64_t task; queue.next(task);) {
            double* memory = &parts[task * size];
            std::fill(memory, memory + size, 0.0);
            Sums sums(memory, c);
            int64_t image = task / tasks, first = task % tasks * task_size;
            int64_t end = std::min(first + task_size, points.count);
            for (int64_t at = first; at < end; at += BLOCK) {
                block.load(logits, &target, points, image, at, end);
                block.count_labels();
                if (block.present.empty()) continue;
                add_gram(block, sums.dd);
                add_labels(block, sums.yd);
                for (int32_t l : block.present) sums.number[l] += block.number[l];
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

// --- Gradient -------------------------------------------------------------------------------------

// The gradient of S is 4 S S^T D + 4 S D^T Y, times the gradient of the squared error. Where the
// predictions of a label are nearly equal, but not confident, both parts are large and cancel. So D
// loses a center, the mean of the label's points, and the center's part joins the second one in
// float64. What is left of D is small there, and so is the rounding of its products.
struct Factors {
    Buffer<float> roots;   // 4 S S^T [C, C]
    Buffer<float> center;  // [labels, C]
    Buffer<float> shift;   // 4 S S^T center + 4 S D^T Y [labels, C]

    Factors(int64_t num_images, int64_t c)
        : roots(make_buffer<float>(num_images * c * c)),
          center(make_buffer<float>(num_images * c * c)),
          shift(make_buffer<float>(num_images * c * c)) {}

    // One label's, or one channel's, of one image.
    void fill(const double* gram, double factor, int64_t c, int64_t n, int64_t l) {
        const double *dd = gram, *dm = gram + c * c, *mm = gram + 2 * c * c;
        auto exact = [&](int64_t i, int64_t k) {  // 4 S S^T = (D + M) (D + M)^T
            return mm[i * c + k] + dm[i * c + k] + dm[k * c + i] + dd[i * c + k];
        };
        int64_t row = (n * c + l) * c;
        for (int64_t k = 0; k < c; k++) roots[row + k] = float(factor * exact(l, k));
        double number = std::round((mm[l * c + l] - 2 * dm[l * c + l] + dd[l * c + l]) / 4);
        if (number == 0) return;  // no point asks for this label
        for (int64_t k = 0; k < c; k++) {
            center[row + k] = float((dm[k * c + l] - dd[k * c + l]) / (2 * number));
        }
        for (int64_t i = 0; i < c; i++) {
            double sum = 2 * (dm[l * c + i] + dd[i * c + l]);
            for (int64_t k = 0; k < c; k++) sum += exact(i, k) * center[row + k];
            shift[row + i] = float(factor * sum);
        }
    }
};

// x += value where the label is l.
ROW_FUNCTION void add_where(FloatsOut x, Ints label, int l, float value, int n) {
    n &= -WHOLE;
    #pragma omp simd
    for (int w = 0; w < n; w++) x[w] += label[w] == l ? value : 0.0f;
}

// A rows of a product: out = roots x, with roots [A, C] and x [C, PITCH].
template <int A>
ROW_FUNCTION void multiply(Floats roots, Floats x, FloatsOut out, int c, int n) {
    for (int w = 0; w < n; w += 2 * WIDE) {
        Wide left[A] = {}, right[A] = {};
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

void multiply(int rows, const float* roots, const float* x, float* out, int c, int n) {
    switch (rows) {
        case 1: return multiply<1>(roots, x, out, c, n);
        case 2: return multiply<2>(roots, x, out, c, n);
        case 3: return multiply<3>(roots, x, out, c, n);
        case 4: return multiply<4>(roots, x, out, c, n);
        case 5: return multiply<5>(roots, x, out, c, n);
        case 6: return multiply<6>(roots, x, out, c, n);
        case 7: return multiply<7>(roots, x, out, c, n);
        case 8: return multiply<8>(roots, x, out, c, n);
        case 9: return multiply<9>(roots, x, out, c, n);
        case 10: return multiply<10>(roots, x, out, c, n);
    }
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

ROW_FUNCTION void multiply_rows(FloatsOut x, Floats y, int n) {
    for (int w = 0; w < n; w++) x[w] *= y[w];
}

// Computes the gradient of the points of a block and writes their pixels.
struct Gradient {
    int num_classes;
    Buffer<float> x, products;  // [C, PITCH]: D without its center, and S times its gradient
    alignas(64) float own[PITCH], others[PITCH], line[PITCH];

    explicit Gradient(int64_t c)
        : num_classes(int(c)), x(make_buffer<float>(c * PITCH)),
          products(make_buffer<float>(c * PITCH)) {}

    void compute(Block& block, const float* roots, const float* center, const float* shift) {
        int c = num_classes, n = block.whole;
        std::copy(&block.d[0], block.row(c), &x[0]);
        add(block, center, -1.0f, &x[0]);
        // Two vectors at a time may go beyond the whole ones: rows are longer.
        in_parts(c, MOST_OUT, [&](int i, int i_end) {
            float* out = &products[int64_t(i) * PITCH];
            multiply(i_end - i, roots + int64_t(i) * c, &x[0], out, c, n);
        });
        add(block, shift, 1.0f, &products[0]);
        std::fill(own, own + n, 0.0f);
        std::fill(others, others + n, 0.0f);
        for (int k = 0; k < c; k++) {
            weigh_row(row(k), block.row(k), block.label, k, block.own_s, own, others, n);
        }
    }

    void write(
        Block& block, const Points& points, const Images& grad, int64_t image
    ) {
        const Place& place = block.place;
        for (int c = 0; c < num_classes; c++) {
            if (points.num_grids) {
                finish(block, c, line, 0, block.n);
                multiply_rows(line, place.times, block.n);
                for (int m = 0; m < block.n; m++) {
                    if (place.leads[m]) {
                        store_row(grad, image, c, place.h[m], place.w[m], 1, line + m);
                    }
                }
                continue;
            }
            each_run(points, place, grad.stride_h, grad.stride_w,
                [&](int at, int64_t h, int64_t w, int count) {
                    float* out = row_to_write(grad, image, c, h, w, line);
                    finish(block, c, out, at, count);
                    store_row(grad, image, c, h, w, count, out);
                });
        }
    }

private:
    float* row(int c) { return &products[int64_t(c) * PITCH]; }

    // Adds factor * values [labels, C] to the points of the labels, in out [C, PITCH].
    void add(const Block& block, const float* values, float factor, float* out) {
        for (int32_t l : block.present) {
            const float* value = values + int64_t(l) * num_classes;
            for (int c = 0; c < num_classes; c++) {
                float* row = out + int64_t(c) * PITCH;
                add_where(row, block.label, l, factor * value[c], block.whole);
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

// The arguments that all functions here share: N, C, H, W, the number of threads, and the sizes of
// the grids, none for every pixel.
struct Shape {
    int64_t num_images, num_classes, height, width, num_threads, num_grids;
    const int64_t* sizes;

    explicit Shape(const int64_t* x)
        : num_images(x[0]), num_classes(x[1]), height(x[2]), width(x[3]), num_threads(x[4]),
          num_grids(x[5]), sizes(x + 6) {}
    Points points() const { return Points(height, width, sizes, num_grids); }

    // A second thread costs some microseconds.
    int64_t threads_for(int64_t work) const { return work < LEAST_WORK ? 1 : num_threads; }
};

// Fills gram [N, 3, C, C], and unless null the number of points (N).
void fill_gram(
    const Images& logits, const Labels& target, const Shape& shape, const Points& points,
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

}  // namespace

// Fills squared_error (N), pair_count (N) and, unless null, gram (N, 3, C, C).
EXPORT void forward(
    const Images& logits, const Labels& target, const int64_t* integers, float* squared_error,
    int64_t* pair_count, double* gram
) {
    Shape shape(integers);
    int64_t matrices = 3 * shape.num_classes * shape.num_classes;
    Buffer<double> own = make_buffer<double>(gram ? 0 : shape.num_images * matrices);
    if (!gram) gram = own.get();
    fill_gram(logits, target, shape, shape.points(), gram, pair_count);
    for (int64_t n = 0; n < shape.num_images; n++) {
        squared_error[n] = float(squared_error_of(gram + n * matrices, shape.num_classes));
        pair_count[n] *= pair_count[n];
    }
}

// Fills the gradient; with grids, the pixels of their points. Without gram (N, 3, C, C), the
// matrices are computed again.
EXPORT void backward(
    const Images& logits, const Labels& target, const int64_t* integers,
    const float* grad_squared_error, const double* gram, const Images& grad
) {
    Shape shape(integers);
    Points points = shape.points();
    int64_t c = shape.num_classes, matrix = c * c;
    Buffer<double> own = make_buffer<double>(gram ? 0 : shape.num_images * 3 * matrix);
    if (!gram) {
        fill_gram(logits, target, shape, points, own.get(), nullptr);
        gram = own.get();
    }
    Factors factors(shape.num_images, c);
    int64_t work = shape.num_images * matrix * c;
    parallel(shape.num_images * c, shape.threads_for(work), [&](Tasks& queue) {
        for (int64_t task; queue.next(task);) {
            int64_t n = task / c;
            factors.fill(gram + n * 3 * matrix, grad_squared_error[n], c, n, task % c);
        }
    });

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
                block.count_labels();
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
