// The affinity field and cross-entropy: counts, tables and the gradient of the logits.
//
// docs/affinity_field.md derives the sums: a dense part over all neighbours, whose stencils are
// sums over three rows and three columns, and the edges, which are taken out of it again.
//
// The image is cut into tiles of some rows and columns. For one class after another, a march walks
// down the rows of a tile: the class's probabilities in a new row, the sums over its neighbours,
// the edges. The gradients of all classes of a tile, times p, stay in a buffer that fits into the
// cache, until the last step turns them into gradients of the logits.
#include "common.h"

namespace {

// Rows of the buffers begin and end at multiples of so many pixels, whole vectors on every CPU.
constexpr int LANES = 16;
// Edges are computed for so many pixels side by side.
constexpr int GROUP = 8;
// Largest tile. The gradients of its classes are at most so many numbers, and fit into a cache of
// 512 KB beside the rows of a march; with very many classes, tiles are small, and exceed it.
constexpr int64_t TILE_ROWS = 32, TILE_COLUMNS = 256, TILE_NUMBERS = 3 << 14;
constexpr int64_t LEAST_TILE_ROWS = 8, LEAST_TILE_COLUMNS = 64;
// Statistics keep little, and long rows are read faster.
constexpr int64_t STATISTICS_COLUMNS = 512;
// Up to this distance the rows between a pixel and its neighbours are kept; for a larger one, rows
// are computed three times.
constexpr int64_t MOST_ROWS_KEPT = 16;
// Tables are partial per task and added up in the tasks' order.
constexpr int64_t MOST_TASKS = 256;
// A second thread takes longer to wake than these many elements take.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 14;

// --- Rows ---------------------------------------------------------------------------------------

// A single channel is the second of two classes, whose first has the logit 0: the sigmoid.
struct Shape {
    int64_t n, c, h, w;

    bool one_channel() const { return c == 1; }
    int64_t labels() const { return std::max<int64_t>(c, 2); }
    int32_t class_of(int64_t channel) const { return int32_t(one_channel() ? 1 : channel); }
};

// A buffer of rows of n numbers each.
template <class T>
class Rows {
public:
    Rows(int64_t rows, int64_t n, T fill = T()) : n_(n), data_(size_t(rows * n), fill) {}
    T* row(int64_t i) { return data_.data() + i * n_; }
    const T* row(int64_t i) const { return data_.data() + i * n_; }
    bool empty() const { return data_.empty(); }
    void clear() { std::fill(data_.begin(), data_.end(), T()); }

private:
    int64_t n_;
    std::vector<T> data_;
};

// Row h of channel c from column w on, count numbers: in place where the image holds them so, else
// in the buffer, which may hold any numbers beyond the image's width. next is the distance to the
// row that will be needed next, or 0.
const float* padded_row(
    const Images& x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t width, int count,
    float* buffer, int64_t next = 0
) {
    if (x.dtype == FLOAT32 && x.stride_w == 1 && w >= 0 && w + count <= width) {
        const float* row = static_cast<const float*>(x.data) + x.offset(n, c, h, w);
        if (next) prefetch(row + next, count);
        return row;
    }
    int first = int(std::max<int64_t>(0, -w)), end = int(std::min<int64_t>(count, width - w));
    const float* row = load_row(x, n, c, h, w + first, end - first, buffer + first);
    if (row != buffer + first) std::copy_n(row, end - first, buffer + first);
    return buffer;
}

// Rows of an image (N, 1, H, W), in place if that is possible everywhere.
class PixelRows {
public:
    PixelRows(const Shape& shape, const Images& image, int num_rows, int width)
        : image_(image),
          image_width_(shape.w),
          copies_(in_place(shape, image) ? 0 : num_rows, width),
          rows_(num_rows) {}

    // Row i: the numbers of row h of image n, from column w on. Numbers beyond the image are any.
    const float* load(int i, int64_t n, int64_t h, int64_t w, int count) {
        float* copy = copies_.empty() ? nullptr : copies_.row(i);
        return rows_[i] = padded_row(image_, n, 0, h, w, image_width_, count, copy);
    }

    const float* row(int i) const { return rows_[i]; }

private:
    // Tiles begin and end at whole groups, or at the image's ends.
    static bool in_place(const Shape& shape, const Images& image) {
        return image.dtype == FLOAT32 && image.stride_w == 1 && shape.w % GROUP == 0;
    }

    const Images& image_;
    int64_t image_width_;
    Rows<float> copies_;
    std::vector<const float*> rows_;
};

// --- Tiles --------------------------------------------------------------------------------------

struct Tile {
    int64_t n, h, w;  // image, first row and first column
    int rows, columns;
};

// The tiles of all images, as many of them in a task as its turn in num_tasks gives it.
class Tiling {
public:
    Tiling(const Shape& shape, int64_t most_rows, int64_t most_columns)
        : shape_(shape),
          rows_(in_equal_parts(shape.h, most_rows)),
          columns_(round_up(in_equal_parts(shape.w, most_columns), LANES)),
          bands_(divide_up(shape.h, rows_)),
          strips_(divide_up(shape.w, columns_)) {}

    int rows() const { return int(rows_); }
    int columns() const { return int(columns_); }
    int64_t num_tiles() const { return shape_.n * bands_ * strips_; }
    int64_t num_tasks() const { return std::min(num_tiles(), MOST_TASKS); }
    int64_t first_tile(int64_t task) const { return num_tiles() * task / num_tasks(); }

    Tile tile(int64_t i) const {
        int64_t h = i / strips_ % bands_ * rows_, w = i % strips_ * columns_;
        return Tile{i / (strips_ * bands_), h, w, int(std::min(rows_, shape_.h - h)),
                    int(std::min(columns_, shape_.w - w))};
    }

private:
    // The size of parts of nearly equal size, at most the given one; at least 1.
    static int64_t in_equal_parts(int64_t size, int64_t most) {
        return size < 1 ? 1 : divide_up(size, divide_up(size, most));
    }

    Shape shape_;
    int64_t rows_, columns_, bands_, strips_;
};

// --- Marches ------------------------------------------------------------------------------------

struct Size {
    int64_t k;  // column of the size in the tables
    int64_t d;
    int columns;  // the distance in columns, at most the image's width
};

// The way of one or more sizes through the rows of a tile: rows 0, 1, ... of the march are rows of
// the image. Small sizes share the rows from the first one within reach to the last one. A large
// size passes three rows for every row of the tile: above, here, below.
struct March {
    std::vector<Size> sizes;
    bool large;
    int64_t reach = 0;  // in rows
    int columns = 0;    // reach in columns

    void add(const Size& size) {
        sizes.push_back(size);
        reach = std::max(reach, size.d);
        columns = std::max(columns, size.columns);
    }

    int num_sizes() const { return int(sizes.size()); }
    int margin() const { return int(round_up(columns, LANES)); }
    int num_rows(int rows) const { return large ? 3 * rows : rows + 2 * int(reach); }
    int rows_kept() const { return large ? 3 : 2 * int(reach) + 1; }
    int rows_before(int t) const { return large ? 3 * t + 3 : t + 2 * int(reach) + 1; }
    int here(int t) const { return large ? 3 * t + 1 : t + int(reach); }
    bool in_tile(int i, int rows) const {
        return large ? i % 3 == 1 : i >= int(reach) && i < int(reach) + rows;
    }
    int above(int t, const Size& size) const { return large ? 3 * t : here(t) - int(size.d); }
    int below(int t, const Size& size) const { return large ? 3 * t + 2 : here(t) + int(size.d); }

    int64_t image_row(const Tile& tile, int i) const {
        return large ? tile.h + i / 3 + (i % 3 - 1) * reach : tile.h - reach + i;
    }
};

// The marches for the sizes that have pairs in the image. The last one is for the small sizes, and
// may be without a size.
std::vector<March> marches(const Shape& shape, int64_t num_sizes, const int64_t* distances) {
    std::vector<March> all;
    March small{{}, false};
    for (int64_t k = 0; k < num_sizes; k++) {
        int64_t d = distances[k];
        if (d >= std::max(shape.h, shape.w)) continue;
        Size size{k, d, int(std::min(d, shape.w))};
        if (d <= MOST_ROWS_KEPT) {
            small.add(size);
        } else {
            all.push_back(March{{}, true});
            all.back().add(size);
        }
    }
    all.push_back(small);
    return all;
}

// Columns of a tile, at most so many, but not few beside the reach of the largest size.
int64_t tile_columns(const Shape& shape, const std::vector<March>& all, int64_t most) {
    for (const March& march : all) most = std::max<int64_t>(most, 4 * int64_t(march.columns));
    return std::min(most, round_up(shape.w, LANES));
}

Tiling tiling_of_statistics(const Shape& shape, const std::vector<March>& all) {
    return Tiling(shape, TILE_ROWS, tile_columns(shape, all, STATISTICS_COLUMNS));
}

Tiling tiling_of_gradients(const Shape& shape, const std::vector<March>& all) {
    int64_t columns = TILE_NUMBERS / (LEAST_TILE_ROWS * shape.c) / LANES * LANES;
    columns = std::min(std::max(columns, LEAST_TILE_COLUMNS), TILE_COLUMNS);
    columns = tile_columns(shape, all, columns);
    int64_t rows = TILE_NUMBERS / (columns * shape.c);
    return Tiling(shape, std::min(std::max(rows, LEAST_TILE_ROWS), TILE_ROWS), columns);
}

// The labels of a march's rows, with margins on both sides; -1 outside the image.
class LabelRows {
public:
    LabelRows(const Shape& shape, const Tiling& tiling, const March& march)
        : shape_(shape),
          march_(march),
          margin_(march.margin()),
          width_(round_up(tiling.columns(), LANES) + 2 * margin_),
          given_(size_t(width_)),
          label_(march.num_rows(tiling.rows()), width_) {}

    void load(const Target& target, const Tile& tile) {
        first_ = int(margin_ - std::min<int64_t>(tile.w, march_.columns));
        int64_t beyond = std::min<int64_t>(shape_.w - tile.w - tile.columns, march_.columns);
        end_ = int(margin_ + tile.columns + beyond);
        for (int i = 0; i < march_.num_rows(tile.rows); i++) {
            int32_t* label = label_.row(i);
            std::fill(label, label + width_, -1);
            int64_t h = march_.image_row(tile, i);
            if (h < 0 || h >= shape_.h) continue;
            load_classes(
                target, tile.n, h, tile.w + first_ - margin_, end_ - first_, given_.data(),
                label + first_
            );
        }
    }

    // Labels of row i of the march; number 0 is the tile's first column.
    const int32_t* row(int i) const { return label_.row(i) + margin_; }
    const int32_t* whole_row(int i) const { return label_.row(i); }
    int margin() const { return int(margin_); }
    int width() const { return int(width_); }
    // The columns that lie in the image and within reach of the tile, counted from the margin's
    // first one; begin and end in whole groups.
    int first() const { return first_; }
    int end() const { return end_; }
    int begin_of_groups() const { return first_ / GROUP * GROUP; }
    int end_of_groups() const { return int(round_up(end_, GROUP)); }

private:
    const Shape& shape_;
    const March& march_;
    int64_t margin_, width_;
    std::vector<int64_t> given_;
    Rows<int32_t> label_;
    int first_ = 0, end_ = 0;
};

// --- Counts -------------------------------------------------------------------------------------

// Number of pixels that count among a pixel that counts and its 8 neighbours, else 0.
ROW_FUNCTION void box_row(Ints above, Ints here, Ints below, int d, IntsOut box, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        auto counted = [](int32_t label) { return int32_t(label >= 0); };
        int32_t sum = counted(above[w - d]) + counted(above[w]) + counted(above[w + d]) +
                      counted(here[w - d]) + counted(here[w]) + counted(here[w + d]) +
                      counted(below[w - d]) + counted(below[w]) + counted(below[w + d]);
        box[w] = sum & mask(here[w] >= 0);
    }
}

// Number of neighbours with another label.
ROW_FUNCTION void different_row(Ints above, Ints here, Ints below, int d, IntsOut number, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        int32_t label = here[w];
        auto differs = [label](int32_t there) { return int32_t((there >= 0) & (there != label)); };
        int32_t sum = differs(above[w - d]) + differs(above[w]) + differs(above[w + d]) +
                      differs(here[w - d]) + differs(here[w + d]) + differs(below[w - d]) +
                      differs(below[w]) + differs(below[w + d]);
        number[w] = sum & mask(label >= 0);
    }
}

ROW_FUNCTION int64_t sum_row(Ints x, int n) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int w = 0; w < n; w++) sum += x[w];
    return sum;
}

ROW_FUNCTION int64_t pixels_in_row(Ints label, int n) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int w = 0; w < n; w++) sum += int32_t(label[w] >= 0);
    return sum;
}

// True if one of GROUP numbers is not 0.
inline bool any_in_group(const int32_t* x) {
    int32_t any = 0;
    for (int i = 0; i < GROUP; i++) any |= x[i];
    return any != 0;
}

// Pairs of each size: 2 entries in the channel of a pixel's label for each different neighbour.
struct Counts {
    int64_t* pairs;  // (K,)
    int64_t* table;  // (labels, K + 1): edge entries, and in the last column pixels
};

void count_tile(
    const March& march, const LabelRows& labels, const Tile& tile, int64_t num_sizes,
    Rows<int32_t>& buffers, Counts counts
) {
    int32_t *box = buffers.row(0), *different = buffers.row(1);
    const int n = int(round_up(tile.columns, GROUP));
    for (const Size& size : march.sizes) {
        for (int t = 0; t < tile.rows; t++) {
            const int32_t* here = labels.row(march.here(t));
            const int32_t* above = labels.row(march.above(t, size));
            const int32_t* below = labels.row(march.below(t, size));
            box_row(above, here, below, size.columns, box, n);
            different_row(above, here, below, size.columns, different, n);
            counts.pairs[size.k] += sum_row(box, n) - pixels_in_row(here, n);
            for (int w = 0; w < n; w++) {
                if (w % GROUP == 0 && !any_in_group(different + w)) {
                    w += GROUP - 1;
                } else if (different[w]) {
                    counts.table[here[w] * (num_sizes + 1) + size.k] += 2 * different[w];
                }
            }
        }
    }
}

void count_pixels(const int32_t* label, int n, int64_t num_sizes, int64_t* table) {
    for (int w = 0, next = 0; w < n; w = next) {
        while (next < n && label[next] == label[w]) next++;  // most neighbours have one label
        if (label[w] >= 0) table[label[w] * (num_sizes + 1) + num_sizes] += next - w;
    }
}

// --- Softmax statistics -------------------------------------------------------------------------

// Takes another class into top, the largest logit, and rest, the sum of exp(logit - top) over the
// other classes. A tie counts as another class, also between two logits of -infinity.
ROW_FUNCTION void statistics_row(Floats x, FloatsOut top, FloatsOut rest, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float step = x[w] == top[w] ? 0.0f : x[w] - top[w];
        float e = exp_of_negative(-std::fabs(step));
        rest[w] = step > 0.0f ? (rest[w] + 1.0f) * e : rest[w] + e;
        top[w] = top[w] < x[w] ? x[w] : top[w];
    }
}

// No probability exists where the largest logit is infinite: rest becomes NaN.
ROW_FUNCTION void finish_statistics_row(Floats top, FloatsOut rest, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) rest[w] += top[w] - top[w];
}

// The softmax statistics of row t of a tile.
void softmax_statistics(
    const Images& logits, const Shape& shape, const Tile& tile, int t, Rows<float>& buffers,
    const Images& top_image, float* rest_row
) {
    const int n = tile.columns, whole = int(round_up(n, GROUP));
    float *top = buffers.row(0), *rest = buffers.row(1);
    auto load = [&](int64_t c) {
        return padded_row(
            logits, tile.n, c, tile.h + t, tile.w, shape.w, whole, buffers.row(2), logits.stride_c
        );
    };
    int64_t c = 0;
    if (shape.one_channel()) {
        std::fill_n(top, whole, 0.0f);
    } else {
        std::copy_n(load(c++), whole, top);
    }
    std::fill_n(rest, whole, 0.0f);
    for (; c < shape.c; c++) statistics_row(load(c), top, rest, whole);
    finish_statistics_row(top, rest, whole);
    store_row(top_image, tile.n, 0, tile.h + t, tile.w, n, top);
    std::copy_n(rest, n, rest_row);
}

// --- Rows of the march --------------------------------------------------------------------------

struct Clamp {
    float eps;    // of p
    float limit;  // of log(p / q)
    float log_eps, log_1_eps;

    explicit Clamp(double given)
        : eps(float(given)),
          limit(float(std::log((1 - given) / given))),
          log_eps(float(std::log(given))),
          log_1_eps(float(std::log1p(-given))) {}
};

// log(1 + rest), with all the digits of a small rest; and 1 / (1 + rest).
ROW_FUNCTION void softmax_row(Floats rest, FloatsOut inverse, FloatsOut log_total, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float total = 1.0f + rest[w];
        inverse[w] = 1.0f / total;
        log_total[w] = log_of_positive(total) + (rest[w] - (total - 1.0f)) * inverse[w];
    }
}

inline float clamp(float x, float least, float most) {  // NaN stays NaN
    x = x < least ? least : x;
    return x > most ? most : x;
}

// The class's probabilities in one row: log p, p, and q = 1 - p with all its digits.
ROW_FUNCTION void probability_row(
    Floats x, Floats top, Floats rest, Floats inverse, Floats log_total, FloatsOut log_p,
    FloatsOut p, FloatsOut q, int n
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float step = x[w] - top[w];
        float e = exp_of_negative(step);
        log_p[w] = step - log_total[w];
        p[w] = e * inverse[w];
        q[w] = ((1.0f - e) + rest[w]) * inverse[w];
    }
}

// One row of a class: u = -q at pixels of this class, p elsewhere, shifted by eps so that a clamped
// u is 0; l = log(p / q); log q. All clamped; u and l are 0 at pixels that do not count. For the
// gradient p and 1 / q, 0 where the clamp passes no gradient.
template <bool GRADIENT>
ROW_FUNCTION void field_row(
    Floats log_p, Floats p, Floats q, Ints label, int32_t c, const Clamp& given, FloatsOut u,
    FloatsOut l, FloatsOut log_q, FloatsOut p_free, FloatsOut inverse_q_free, int n
) {
    const float eps = given.eps, limit = given.limit;
    const float log_eps = given.log_eps, log_1_eps = given.log_1_eps;
#pragma omp simd
    for (int w = 0; w < n; w++) {
        int32_t counted = mask(label[w] >= 0), own = mask(label[w] == c);
        float own_log_q = log_of_positive(q[w]);
        float odds = log_p[w] - own_log_q;
        float shifted = clamp((label[w] == c ? q[w] : p[w]) - eps, 0.0f, 1.0f - 2.0f * eps);
        u[w] = as_float((as_int(shifted) ^ (own & INT32_MIN)) & counted);
        l[w] = masked(clamp(odds, -limit, limit), counted);
        log_q[w] = clamp(own_log_q, log_eps, log_1_eps);
        if (GRADIENT) {
            int32_t free = counted & mask(std::fabs(odds) < limit);
            p_free[w] = masked(p[w], free);
            inverse_q_free[w] = masked(1.0f / q[w], free);
        }
    }
}

// Sums over three rows.
ROW_FUNCTION void add_rows(Floats above, Floats here, Floats below, FloatsOut sum, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) sum[w] = above[w] + here[w] + below[w];
}

// A size's rows in the dense part: numbers of valid pixels, sums over three rows of u and l; its
// coefficient; and the sum of the products, which dense_row adds to.
struct DenseSize {
    const int32_t* box;
    const float *u, *l;
    int d;
    float coefficient, sum;
};

// x_i - x_j, summed over the neighbours j.
inline float step_to_neighbours(Floats x, Floats row_sums, Ints box, int d, int w) {
    return float(box[w]) * x[w] - (row_sums[w - d] + row_sums[w] + row_sums[w + d]);
}

// The dense part of K sizes: sums of l_i (u_i - u_j), and p times its gradient, which is added to
// what is there unless this is the first group of sizes.
template <int K, bool GRADIENT>
ROW_FUNCTION void dense_row(
    Floats u, Floats l, Floats p_free, Floats inverse_q_free, DenseSize* sizes, bool first,
    FloatsOut grad, int n
) {
    const DenseSize s0 = sizes[0], s1 = sizes[K > 1 ? 1 : 0], s2 = sizes[K > 2 ? 2 : 0];
    float sum0 = 0, sum1 = 0, sum2 = 0;
    const int32_t bits_before = first ? 0 : -1;
#pragma omp simd reduction(+ : sum0, sum1, sum2)
    for (int w = 0; w < n; w++) {
        float step0 = step_to_neighbours(u, s0.u, s0.box, s0.d, w);
        float step1 = K > 1 ? step_to_neighbours(u, s1.u, s1.box, s1.d, w) : 0.0f;
        float step2 = K > 2 ? step_to_neighbours(u, s2.u, s2.box, s2.d, w) : 0.0f;
        sum0 += l[w] * step0;
        sum1 += l[w] * step1;
        sum2 += l[w] * step2;
        if (GRADIENT) {
            float u_step = s0.coefficient * step0;
            if (K > 1) u_step += s1.coefficient * step1;
            if (K > 2) u_step += s2.coefficient * step2;
            float l_step = s0.coefficient * step_to_neighbours(l, s0.l, s0.box, s0.d, w);
            if (K > 1) l_step += s1.coefficient * step_to_neighbours(l, s1.l, s1.box, s1.d, w);
            if (K > 2) l_step += s2.coefficient * step_to_neighbours(l, s2.l, s2.box, s2.d, w);
            float before = as_float(as_int(grad[w]) & bits_before);
            grad[w] = before + (u_step * inverse_q_free[w] + l_step * p_free[w]);
        }
    }
    const float sums[] = {sum0, sum1, sum2};
    for (int s = 0; s < K; s++) sizes[s].sum = sums[s];
}

constexpr int MOST_SIZES = 3;
using DenseRow = decltype(&dense_row<1, true>);
// By the number of sizes less 1, without and with the gradient.
constexpr DenseRow DENSE_ROW[MOST_SIZES][2] = {
    {dense_row<1, false>, dense_row<1, true>},
    {dense_row<2, false>, dense_row<2, true>},
    {dense_row<3, false>, dense_row<3, true>},
};

// --- Edges --------------------------------------------------------------------------------------

// GROUP pixels of a row, the first of which is w, that have edges at one distance. The bits of the
// set are the labels, modulo 32, of these pixels and their neighbours.
struct Group {
    int w;
    uint32_t labels;
};

uint32_t bit_of(int32_t label) { return uint32_t(1) << (uint32_t(label) % 32); }

uint32_t labels_of_group(const int32_t* label) {
    uint32_t labels = 0;
    for (int i = 0; i < GROUP; i++) labels |= label[i] < 0 ? 0 : bit_of(label[i]);
    return labels;
}

// The groups with edges of every size and row of a tile.
class Edges {
public:
    Edges(const Tiling& tiling, const March& march, const LabelRows& labels)
        : march_(march),
          labels_(labels),
          different_(tiling.columns()) {}

    void find(const Tile& tile) {
        rows_ = tile.rows;
        groups_.clear();
        ends_.assign(1, 0);
        for (const Size& size : march_.sizes) {
            for (int t = 0; t < tile.rows; t++) find_in_row(size, t, tile.columns);
        }
    }

    // The groups of row t of the march's size number s.
    const Group* begin(int s, int t) const { return groups_.data() + ends_[s * rows_ + t]; }
    const Group* end(int s, int t) const { return groups_.data() + ends_[s * rows_ + t + 1]; }

private:
    void find_in_row(const Size& size, int t, int columns) {
        const int d = size.columns;
        const int32_t* rows[3] = {
            labels_.row(march_.above(t, size)), labels_.row(march_.here(t)),
            labels_.row(march_.below(t, size))
        };
        const int n = int(round_up(columns, GROUP));
        different_row(rows[0], rows[1], rows[2], d, different_.data(), n);
        for (int w = 0; w < n; w += GROUP) {
            if (!any_in_group(different_.data() + w)) continue;
            uint32_t labels = 0;
            for (const int32_t* row : rows) {
                labels |= labels_of_group(row + w - d) | labels_of_group(row + w) |
                          labels_of_group(row + w + d);
            }
            groups_.push_back(Group{w, labels});
        }
        ends_.push_back(groups_.size());
    }

    const March& march_;
    const LabelRows& labels_;
    std::vector<int32_t> different_;
    std::vector<Group> groups_;
    std::vector<size_t> ends_;
    int rows_ = 0;
};

struct PixelRow {
    const float *u, *l, *log_q;
    const int32_t* label;
};

// One pixel i and its edges in a class: sums over the neighbours j.
struct Centre {
    int32_t counted, own;  // masks
    float u, l, log_q;
    float shift_j;  // p_j - u_j
    float p;
    float hinge = 0;        // max(0, margin - KL(p_j || p_i))
    float u_step = 0;       // u_i - u_j
    float p_step = 0;       // p_i - p_j where the hinge is not 0
    float l_step = 0;       // l_j - l_i
    float l_step_back = 0;  // l_j - l_i where the hinge of KL(p_i || p_j) is not 0
};

inline void add_neighbour(Centre& i, const PixelRow& row, int w, int32_t c, float margin) {
    const int32_t y = row.label[w];
    const int32_t edge = i.counted & mask(y >= 0) & (mask(y == c) ^ i.own);
    const float u = row.u[w], p = u + i.shift_j;
    const float l_step = row.l[w] - i.l, q_step = row.log_q[w] - i.log_q;
    const float room = margin - (p * l_step + q_step);         // margin - KL(p_j || p_i)
    const float room_back = margin + (i.p * l_step + q_step);  // margin - KL(p_i || p_j)
    i.hinge += masked(room < 0.0f ? 0.0f : room, edge);        // NaN stays NaN
    i.u_step += masked(i.u - u, edge);
    i.p_step += masked(i.p - p, edge & mask(room > 0.0f));
    i.l_step += masked(l_step, edge);
    i.l_step_back += masked(l_step, edge & mask(room_back > 0.0f));
}

struct EdgeSums {
    double hinge = 0, product = 0;
};

// The edges in class c of those groups that may have one: the sums of hinges and of
// l_i (u_i - u_j), which the dense part holds too much; and p times their gradient.
template <bool GRADIENT>
ROW_FUNCTION EdgeSums edge_row(
    const Group* begin, const Group* end, const PixelRow& above, const PixelRow& here,
    const PixelRow& below, int d, int32_t c, float eps, float margin, float edge_grad,
    float non_edge_grad, Floats p_free, Floats inverse_q_free, FloatsOut grad
) {
    const uint32_t bit = bit_of(c);
    float hinge[GROUP] = {}, product[GROUP] = {};
    for (const Group* group = begin; group != end; group++) {
        if (!(group->labels & bit)) continue;
        const int first = group->w;
#pragma omp simd
        for (int lane = 0; lane < GROUP; lane++) {
            const int w = first + lane;
            Centre i;
            i.counted = mask(here.label[w] >= 0);
            i.own = mask(here.label[w] == c);
            i.u = here.u[w];
            i.l = here.l[w];
            i.log_q = here.log_q[w];
            i.p = i.u + (i.own ? 1.0f - eps : eps);
            i.shift_j = i.own ? eps : 1.0f - eps;
            add_neighbour(i, above, w - d, c, margin);
            add_neighbour(i, above, w, c, margin);
            add_neighbour(i, above, w + d, c, margin);
            add_neighbour(i, here, w - d, c, margin);
            add_neighbour(i, here, w + d, c, margin);
            add_neighbour(i, below, w - d, c, margin);
            add_neighbour(i, below, w, c, margin);
            add_neighbour(i, below, w + d, c, margin);
            hinge[lane] += i.hinge;
            product[lane] += i.l * i.u_step;
            if (GRADIENT) {
                float u_grad = edge_grad * i.p_step + non_edge_grad * i.u_step;
                float l_grad = edge_grad * i.l_step_back + non_edge_grad * i.l_step;
                grad[w] += l_grad * p_free[w] - u_grad * inverse_q_free[w];
            }
        }
    }
    EdgeSums sums;
    for (int lane = 0; lane < GROUP; lane++) {
        sums.hinge += hinge[lane];
        sums.product += product[lane];
    }
    return sums;
}

// --- From the gradient of the softmax to the gradient of the logits ------------------------------

ROW_FUNCTION void add_to_row(Floats x, FloatsOut sum, int n) {
#pragma omp simd
    for (int w = 0; w < n; w++) sum[w] += x[w];
}

// Softmax backward for one class, in place: p g becomes p g - p total. Adds up the results of all
// classes but the largest one, and keeps the number of the largest one.
ROW_FUNCTION void softmax_backward_row(
    Floats x, Floats top, Floats inverse, Ints label, Floats total, int32_t c, FloatsOut grad,
    FloatsOut others, IntsOut largest, int n
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float p = exp_of_negative(x[w] - top[w]) * inverse[w];
        float result = masked(grad[w] - p * total[w], mask(label[w] >= 0));
        int32_t below = mask(x[w] < top[w]);
        grad[w] = result;
        others[w] += masked(result, below);
        largest[w] = (largest[w] & below) | (c & ~below);
    }
}

// The results of softmax_backward_row sum to 0 over the classes of a pixel, once the factor of
// cross-entropy is taken from the pixel's own class. p g - p total subtracts nearly equal numbers
// where p is near 1: there the largest class takes minus the sum of the others. Where rest is 1 or
// more, all p are at most 1 / 2, and no class is named.
ROW_FUNCTION void balance_row(
    Floats rest, Ints label, Floats factor, FloatsOut others, IntsOut largest, int n
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        int32_t another = mask(label[w] != largest[w]);
        others[w] = masked(factor[w], another) - others[w];
        largest[w] |= ~mask(rest[w] < 1.0f);
    }
}

// The gradient of a single channel's logits from p times the gradient of p, and from the factor of
// cross-entropy.
ROW_FUNCTION void sigmoid_backward_row(
    Floats x, Floats rest, Floats inverse, Ints label, Floats factor, Floats grad, FloatsOut out,
    int n
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float less = rest[w] * inverse[w];  // the lesser one of p and q
        float p = x[w] > 0.0f ? inverse[w] : less, q = x[w] > 0.0f ? less : inverse[w];
        float result = grad[w] * q + factor[w] * (label[w] == 1 ? -q : p);
        out[w] = masked(result, mask(label[w] >= 0));
    }
}

ROW_FUNCTION void finish_row(
    Floats grad, Ints label, Floats factor, Floats balance, Ints largest, int32_t c, FloatsOut out,
    int n
) {
#pragma omp simd
    for (int w = 0; w < n; w++) {
        float result = grad[w] - masked(factor[w], mask(label[w] == c));
        out[w] = largest[w] == c ? balance[w] : result;
    }
}

// --- Tables and gradient -------------------------------------------------------------------------

struct Problem {
    Shape shape;
    Images logits, top, rest;  // top and rest: (N, 1, H, W)
    Target target;
    int64_t num_sizes;
    float margin;
    Clamp clamp;
    const float* grad_sums;      // (2, C, K), or null
    const float* grad_log_loss;  // (labels,), or null
    const Images* grad;          // with grad_sums

    bool gradient() const { return grad_sums != nullptr; }
    int64_t table_size() const { return 2 * shape.c * num_sizes + shape.labels(); }
    int64_t edge_entry(int64_t c, int64_t k) const { return c * num_sizes + k; }
    int64_t non_edge_entry(int64_t c, int64_t k) const { return (shape.c + c) * num_sizes + k; }
    int64_t log_loss_entry(int64_t label) const { return 2 * shape.c * num_sizes + label; }
    float coefficient(int64_t entry) const { return grad_sums ? grad_sums[entry] : 0.0f; }
};

// A march through tiles: the labels and softmax statistics of its rows, which all classes share,
// and the rows of the class that is being computed.
class Marcher {
public:
    Marcher(const Problem& problem, const Tiling& tiling, const March& march)
        : problem_(problem),
          march_(march),
          labels_(problem.shape, tiling, march),
          edges_(tiling, march, labels_),
          width_(labels_.width()),
          columns_(tiling.columns()),
          tile_rows_(tiling.rows()),
          top_(problem.shape, problem.top, march.num_rows(tile_rows_), width_),
          rest_(problem.shape, problem.rest, march.num_rows(tile_rows_), width_),
          inverse_(march.num_rows(tile_rows_), width_),
          log_total_(march.num_rows(tile_rows_), width_),
          boxes_(march.num_sizes() * tile_rows_, columns_),
          kept_(march.num_rows(tile_rows_)),
          u_(march.rows_kept(), width_),
          l_(march.rows_kept(), width_),
          log_q_(march.rows_kept(), width_),
          p_free_(march.rows_kept(), width_),
          inverse_q_free_(march.rows_kept(), width_),
          u_sums_(march.num_sizes(), width_),
          l_sums_(march.num_sizes(), width_),
          x_(1, width_),
          log_p_(1, width_),
          p_(1, width_),
          q_(1, width_) {
        for (size_t i = 0; i < kept_.size(); i++) kept_[i] = int(i) % march.rows_kept();
    }

    void load(const Tile& tile) {
        tile_ = tile;
        labels_.load(problem_.target, tile);
        const int begin = labels_.begin_of_groups(), n = labels_.end_of_groups() - begin;
        for (int i = 0; i < march_.num_rows(tile.rows); i++) {
            if (!in_image(i)) continue;
            const int64_t h = march_.image_row(tile, i), w = tile.w + begin - labels_.margin();
            const float* rest = rest_.load(i, tile.n, h, w, n);
            top_.load(i, tile.n, h, w, n);
            softmax_row(rest, inverse_.row(i) + begin, log_total_.row(i) + begin, n);
        }
        for (int s = 0; s < march_.num_sizes(); s++) {
            const Size& size = march_.sizes[s];
            for (int t = 0; t < tile.rows; t++) {
                const int32_t* here = labels_.row(march_.here(t));
                const int32_t* above = labels_.row(march_.above(t, size));
                const int32_t* below = labels_.row(march_.below(t, size));
                box_row(above, here, below, size.columns, box(s, t), columns_);
            }
        }
        edges_.find(tile);
        // Sums beyond the image are 0. Every tile has margins of its own.
        for (Rows<float>* sums : {&u_sums_, &l_sums_}) sums->clear();
    }

    // Adds the sums of channel c to the tables, and p times the gradient of p to the rows of grad,
    // [tile_rows, columns]; the first march overwrites them.
    void march(int64_t c, bool first, double* tables, float* grad, int64_t stride) {
        if (march_.sizes.empty()) {
            for (int t = 0; problem_.gradient() && first && t < tile_.rows; t++) {
                std::fill_n(grad + t * stride, columns_, 0.0f);
            }
            return;
        }
        int computed = 0;
        for (int t = 0; t < tile_.rows; t++, grad += stride) {
            for (; computed < march_.rows_before(t); computed++) compute_row(c, computed);
            for (int s = 0; s < march_.num_sizes(); s += MOST_SIZES) {
                add_dense(c, t, s, first && s == 0, tables, grad);
            }
            for (int s = 0; s < march_.num_sizes(); s++) add_edges(c, t, s, tables, grad);
        }
    }

    // Row t of the tile, beginning with its first column.
    const int32_t* label(int t) const { return labels_.row(march_.here(t)); }
    const float* top(int t) const {
        return top_.row(march_.here(t)) + labels_.margin() - labels_.begin_of_groups();
    }
    const float* rest(int t) const {
        return rest_.row(march_.here(t)) + labels_.margin() - labels_.begin_of_groups();
    }
    const float* inverse(int t) const { return inverse_.row(march_.here(t)) + labels_.margin(); }
    const float* log_total(int t) const {
        return log_total_.row(march_.here(t)) + labels_.margin();
    }

private:
    bool in_image(int i) const {
        int64_t h = march_.image_row(tile_, i);
        return h >= 0 && h < problem_.shape.h;
    }

    int32_t* box(int s, int t) { return boxes_.row(int64_t(s) * tile_rows_ + t); }

    void compute_row(int64_t c, int i) {
        const int kept = kept_[i];
        float *u = u_.row(kept), *l = l_.row(kept);
        if (!in_image(i)) {
            std::fill(u, u + width_, 0.0f);
            std::fill(l, l + width_, 0.0f);
            return;
        }
        const Images& logits = problem_.logits;
        const int begin = labels_.begin_of_groups(), n = labels_.end_of_groups() - begin;
        const int64_t h = march_.image_row(tile_, i), w = tile_.w + begin - labels_.margin();
        const float* x = padded_row(
            logits, tile_.n, c, h, w, problem_.shape.w, n, x_.row(0), logits.stride_h
        );
        float *log_p = log_p_.row(0), *p = p_.row(0), *q = q_.row(0);
        probability_row(
            x, top_.row(i), rest_.row(i), inverse_.row(i) + begin, log_total_.row(i) + begin, log_p,
            p, q, n
        );
        const bool gradient = problem_.gradient() && march_.in_tile(i, tile_.rows);
        (gradient ? field_row<true> : field_row<false>)(
            log_p, p, q, labels_.whole_row(i) + begin, problem_.shape.class_of(c), problem_.clamp,
            u + begin, l + begin, log_q_.row(kept) + begin, p_free_.row(kept) + begin,
            inverse_q_free_.row(kept) + begin, n
        );
    }

    // The dense part of MOST_SIZES sizes from the given one on, or of those that are left.
    void add_dense(int64_t c, int t, int first_size, bool sets, double* tables, float* grad) {
        const int num_sizes = std::min(MOST_SIZES, march_.num_sizes() - first_size);
        const int margin = labels_.margin();
        const int begin = labels_.begin_of_groups(), n = labels_.end_of_groups() - begin;
        const int here = kept_[march_.here(t)];
        DenseSize sizes[MOST_SIZES];
        for (int s = 0; s < num_sizes; s++) {
            const Size& size = march_.sizes[first_size + s];
            const int above = kept_[march_.above(t, size)], below = kept_[march_.below(t, size)];
            float *u_sum = u_sums_.row(first_size + s), *l_sum = l_sums_.row(first_size + s);
            add_rows(
                u_.row(above) + begin, u_.row(here) + begin, u_.row(below) + begin, u_sum + begin, n
            );
            if (problem_.gradient()) {
                add_rows(
                    l_.row(above) + begin, l_.row(here) + begin, l_.row(below) + begin,
                    l_sum + begin, n
                );
            }
            float coefficient = problem_.coefficient(problem_.non_edge_entry(c, size.k));
            sizes[s] = {box(first_size + s, t), u_sum + margin, l_sum + margin, size.columns,
                        coefficient, 0.0f};
        }
        DENSE_ROW[num_sizes - 1][problem_.gradient()](
            u_.row(here) + margin, l_.row(here) + margin, p_free_.row(here) + margin,
            inverse_q_free_.row(here) + margin, sizes, sets, grad,
            int(round_up(tile_.columns, GROUP))
        );
        for (int s = 0; s < num_sizes; s++) {
            tables[problem_.non_edge_entry(c, march_.sizes[first_size + s].k)] += sizes[s].sum;
        }
    }

    void add_edges(int64_t c, int t, int s, double* tables, float* grad) {
        const Group *begin = edges_.begin(s, t), *end = edges_.end(s, t);
        if (begin == end) return;
        const Size& size = march_.sizes[s];
        const int64_t edge = problem_.edge_entry(c, size.k);
        const int64_t non_edge = problem_.non_edge_entry(c, size.k);
        const int margin = labels_.margin(), kept = kept_[march_.here(t)];
        EdgeSums sums = (problem_.gradient() ? edge_row<true> : edge_row<false>)(
            begin, end, pixel_row(march_.above(t, size)), pixel_row(march_.here(t)),
            pixel_row(march_.below(t, size)), size.columns, problem_.shape.class_of(c),
            problem_.clamp.eps, problem_.margin, problem_.coefficient(edge),
            problem_.coefficient(non_edge), p_free_.row(kept) + margin,
            inverse_q_free_.row(kept) + margin, grad
        );
        tables[edge] += sums.hinge;
        tables[non_edge] -= sums.product;
    }

    PixelRow pixel_row(int i) const {
        const int kept = kept_[i], margin = labels_.margin();
        return {u_.row(kept) + margin, l_.row(kept) + margin, log_q_.row(kept) + margin,
                labels_.row(i)};
    }

    const Problem& problem_;
    const March& march_;
    LabelRows labels_;
    Edges edges_;
    Tile tile_{};
    int width_, columns_, tile_rows_;
    // Rows of the march.
    PixelRows top_, rest_;
    Rows<float> inverse_, log_total_;
    // For every size the rows of a tile.
    Rows<int32_t> boxes_;
    // Row i of the march at kept_[i].
    std::vector<int> kept_;
    Rows<float> u_, l_, log_q_, p_free_, inverse_q_free_;
    // A row for every size.
    Rows<float> u_sums_, l_sums_;
    // One row of the class.
    Rows<float> x_, log_p_, p_, q_;
};

// Adds -log p of label 0 and of label 1 in a row of a single channel.
ROW_FUNCTION void binary_log_loss_row(
    Floats x, Floats top, Floats log_total, Ints label, double* sums, int n
) {
    float no = 0.0f, yes = 0.0f;
#pragma omp simd reduction(+ : no, yes)
    for (int w = 0; w < n; w++) {
        no += masked(log_total[w] + top[w], mask(label[w] == 0));
        yes += masked(log_total[w] + (top[w] - x[w]), mask(label[w] == 1));
    }
    sums[0] += no;
    sums[1] += yes;
}

// -log p of the pixels' own classes. Rows of a single channel pass through the buffer.
void add_log_loss(
    const Problem& problem, const Marcher& marcher, const Tile& tile, Rows<float>& buffer,
    double* tables
) {
    const Images& logits = problem.logits;
    for (int t = 0; t < tile.rows; t++) {
        const int32_t* label = marcher.label(t);
        const float *top = marcher.top(t), *log_total = marcher.log_total(t);
        const int64_t h = tile.h + t;
        if (problem.shape.one_channel()) {
            const float* x = load_row(logits, tile.n, 0, h, tile.w, tile.columns, buffer.row(0));
            double* sums = tables + problem.log_loss_entry(0);
            binary_log_loss_row(x, top, log_total, label, sums, tile.columns);
            continue;
        }
        for (int w = 0; w < tile.columns; w++) {
            if (label[w] < 0) continue;
            float x = *load_row(logits, tile.n, label[w], h, tile.w + w, 1, buffer.row(0));
            tables[problem.log_loss_entry(label[w])] += log_total[w] - (x - top[w]);
        }
    }
}

// Turns a tile's gradients, times p, into gradients of the logits, with cross-entropy.
class Finisher {
public:
    Finisher(const Problem& problem, const Tiling& tiling)
        : problem_(problem),
          columns_(tiling.columns()),
          factor_(columns_),
          total_(columns_),
          others_(columns_),
          x_(columns_),
          out_(columns_),
          largest_(columns_) {}

    // Row t of the tile. grad: [C, columns], overwritten.
    void finish(const Marcher& marcher, const Tile& tile, int t, float* grad) {
        const int32_t* label = marcher.label(t);
        const int64_t num_classes = problem_.shape.c, h = tile.h + t;
        const int n = int(round_up(tile.columns, GROUP));
        auto row = [&](int64_t c) { return grad + c * columns_; };
        for (int w = 0; w < n; w++) {
            bool counts = problem_.grad_log_loss && label[w] >= 0;
            factor_[w] = counts ? problem_.grad_log_loss[label[w]] : 0.0f;
            total_[w] = -factor_[w];
            others_[w] = 0.0f;
            largest_[w] = 0;
        }
        if (problem_.shape.one_channel()) {
            float* out = place(tile, 0, h, n);
            sigmoid_backward_row(
                load(tile, 0, h, n), marcher.rest(t), marcher.inverse(t), label, factor_.data(),
                grad, out, n
            );
            store_row(*problem_.grad, tile.n, 0, h, tile.w, tile.columns, out);
            return;
        }
        for (int64_t c = 0; c < num_classes; c++) add_to_row(row(c), total_.data(), n);
        for (int64_t c = 0; c < num_classes; c++) {
            softmax_backward_row(
                load(tile, c, h, n), marcher.top(t), marcher.inverse(t), label, total_.data(),
                int32_t(c), row(c), others_.data(), largest_.data(), n
            );
        }
        balance_row(marcher.rest(t), label, factor_.data(), others_.data(), largest_.data(), n);
        for (int64_t c = 0; c < num_classes; c++) {
            float* out = place(tile, c, h, n);
            finish_row(
                row(c), label, factor_.data(), others_.data(), largest_.data(), int32_t(c), out, n
            );
            store_row(*problem_.grad, tile.n, c, h, tile.w, tile.columns, out);
        }
    }

private:
    const float* load(const Tile& tile, int64_t c, int64_t h, int n) {
        return padded_row(
            problem_.logits, tile.n, c, h, tile.w, problem_.shape.w, n, x_.data(),
            problem_.logits.stride_c
        );
    }

    // Row h of the result, in place if the image can hold n numbers there.
    float* place(const Tile& tile, int64_t c, int64_t h, int n) {
        if (n != tile.columns) return out_.data();
        return row_to_write(*problem_.grad, tile.n, c, h, tile.w, out_.data());
    }

    const Problem& problem_;
    int columns_;
    std::vector<float> factor_, total_, others_, x_, out_;
    std::vector<int32_t> largest_;
};

void compute_tables(
    const Problem& problem, const std::vector<March>& all, const Tiling& tiling,
    std::vector<double>& tables, int64_t num_threads
) {
    const int64_t size = problem.table_size();
    // Rows of a tile's gradients, all classes side by side; without a gradient never used.
    const int64_t row = problem.gradient() ? problem.shape.c * tiling.columns() : 0;
    parallel(tiling.num_tasks(), num_threads, [&](Tasks& tasks) {
        std::vector<Marcher> marchers;
        marchers.reserve(all.size());
        for (const March& march : all) marchers.emplace_back(problem, tiling, march);
        Finisher finisher(problem, tiling);
        Rows<float> buffer(1, tiling.columns());
        std::vector<float> grad(size_t(row * tiling.rows()));
        for (int64_t task; tasks.next(task);) {
            double* sums = tables.data() + task * size;
            for (int64_t i = tiling.first_tile(task); i < tiling.first_tile(task + 1); i++) {
                const Tile tile = tiling.tile(i);
                for (Marcher& marcher : marchers) {
                    marcher.load(tile);
                    bool first = &marcher == &marchers.front();
                    for (int64_t c = 0; c < problem.shape.c; c++) {
                        float* rows = grad.data() + (row ? c * tiling.columns() : 0);
                        marcher.march(c, first, sums, rows, row);
                    }
                }
                add_log_loss(problem, marchers.back(), tile, buffer, sums);
                for (int t = 0; problem.gradient() && t < tile.rows; t++) {
                    finisher.finish(marchers.back(), tile, t, grad.data() + t * row);
                }
            }
        }
    });
}

int64_t threads_for(const Shape& shape, int64_t num_threads) {
    int64_t elements = shape.n * shape.c * shape.h * shape.w;
    return std::min(num_threads, 1 + elements / ELEMENTS_PER_THREAD);
}

}  // namespace

// Numbers of pairs (K,); counts (labels, K + 1) as ops/affinity_field.py defines them; labels
// (N, 1, H, W) of int16 or, where bytes_per_label is 4, int32; softmax statistics (N, 1, H, W).
EXPORT void affinity_field_statistics(
    const Images* logits, const Images* target, const int64_t* shape_, int64_t ignore_index,
    int64_t num_sizes, const int64_t* distances, int64_t* pairs, int64_t* counts, void* label,
    int64_t bytes_per_label, const Images* top, float* rest, int64_t num_threads
) {
    const Shape shape{shape_[0], shape_[1], shape_[2], shape_[3]};
    const Target given{*target, shape.labels(), ignore_index};
    const std::vector<March> all = marches(shape, num_sizes, distances);
    const Tiling tiles = tiling_of_statistics(shape, all);
    const int64_t table_size = shape.labels() * (num_sizes + 1);
    const int64_t size = num_sizes + table_size;
    std::vector<int64_t> tables(size_t(tiles.num_tasks() * size));
    parallel(tiles.num_tasks(), threads_for(shape, num_threads), [&](Tasks& tasks) {
        std::vector<LabelRows> labels;
        labels.reserve(all.size());
        for (const March& march : all) labels.emplace_back(shape, tiles, march);
        Rows<int32_t> buffers(2, tiles.columns());
        Rows<float> pixels(3, tiles.columns());
        for (int64_t task; tasks.next(task);) {
            int64_t* table = tables.data() + task * size;
            for (int64_t i = tiles.first_tile(task); i < tiles.first_tile(task + 1); i++) {
                const Tile tile = tiles.tile(i);
                for (size_t m = 0; m < all.size(); m++) {
                    labels[m].load(given, tile);
                    count_tile(
                        all[m], labels[m], tile, num_sizes, buffers, {table, table + num_sizes}
                    );
                }
                for (int t = 0; t < tile.rows; t++) {
                    const int32_t* row = labels.back().row(all.back().here(t));
                    count_pixels(row, tile.columns, num_sizes, table + num_sizes);
                    int64_t at = (tile.n * shape.h + tile.h + t) * shape.w + tile.w;
                    if (bytes_per_label == 2) {
                        std::copy_n(row, tile.columns, static_cast<int16_t*>(label) + at);
                    } else {
                        std::copy_n(row, tile.columns, static_cast<int32_t*>(label) + at);
                    }
                    softmax_statistics(*logits, shape, tile, t, pixels, *top, rest + at);
                }
            }
        }
    });
    std::fill_n(pairs, num_sizes, 0);
    std::fill_n(counts, table_size, 0);
    for (int64_t task = 0; task < tiles.num_tasks(); task++) {
        const int64_t* table = tables.data() + task * size;
        for (int64_t i = 0; i < num_sizes; i++) pairs[i] += table[i];
        for (int64_t i = 0; i < table_size; i++) counts[i] += table[num_sizes + i];
    }
}

// Sums (2, C, K) and log loss (labels,); and the gradient of the logits, if the gradients of the sums
// are given. grad_log_loss may be null.
EXPORT void affinity_field_compute(
    const Images* logits, const Images* label, const Images* top, const Images* rest,
    const int64_t* shape_, int64_t num_sizes, const int64_t* distances, double margin, double eps,
    const float* grad_sums, const float* grad_log_loss, const Images* grad, float* sums,
    float* log_loss, int64_t num_threads
) {
    const Shape shape{shape_[0], shape_[1], shape_[2], shape_[3]};
    const Problem problem{
        shape, *logits, *top, *rest, Target{*label, shape.labels(), -1}, num_sizes, float(margin),
        Clamp(eps), grad_sums, grad_log_loss, grad
    };
    const std::vector<March> all = marches(shape, num_sizes, distances);
    const Tiling tiles = tiling_of_gradients(shape, all);
    const int64_t size = problem.table_size();
    std::vector<double> tables(size_t(tiles.num_tasks() * size));
    compute_tables(problem, all, tiles, tables, threads_for(shape, num_threads));
    std::vector<double> total(size);
    for (int64_t task = 0; task < tiles.num_tasks(); task++) {
        for (int64_t i = 0; i < size; i++) total[i] += tables[task * size + i];
    }
    const int64_t num_sums = 2 * shape.c * num_sizes;
    for (int64_t i = 0; i < num_sums; i++) sums[i] = float(total[i]);
    for (int64_t y = 0; y < shape.labels(); y++) log_loss[y] = float(total[num_sums + y]);
}
