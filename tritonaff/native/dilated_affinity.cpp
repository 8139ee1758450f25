// Dilated affinity on a CPU: tables of sums and counts, and the gradient of the logits.
//
// A signal is a pixel and one of its 8 neighbours at a rate; its logit is in a channel of its own.
// Tasks are bands of rows of an image, cut into patches: strips of a few rows. A row function takes
// the strip of one row and one neighbour, as far as the neighbour is inside the image. The results
// of a patch stay in the cache.
//
// Compilers run the remainder of a loop one by one. Row functions therefore work on whole vectors,
// and labels have columns of "ignored" on both sides of the image, so that surplus lanes count
// nothing. Masks are integers, all bits or none: compilers make branches of nested conditions.
#include "common.h"

namespace {

constexpr int LANES = VECTOR_BYTES / 4;
constexpr int STRIP = 512;         // columns of a patch
constexpr int ROWS = 8;            // of a patch
constexpr int BAND_PIXELS = 2048;  // least size of a task
constexpr int NEIGHBORS = 8;
constexpr int CATEGORIES = 9;
constexpr int IGNORED = -1;
constexpr int SIGN = INT32_MIN;

inline int64_t whole_vectors(int64_t n) { return round_up(n, LANES); }

// --- Labels -------------------------------------------------------------------------------------

// Writes the labels of a row as int32; nonzero if some label does not fit.
ROW_FUNCTION int64_t label_row(
    const int64_t* RESTRICT label, int64_t ignore_index, IntsOut id, int64_t n
) {
    int64_t beyond = 0;
    #pragma omp simd reduction(| : beyond)
    for (int64_t w = 0; w < n; w++) {
        int64_t k = label[w];
        int64_t ignored = (k < 0) | (k == ignore_index) ? -1 : 0;
        id[w] = int32_t(k | ignored);
        beyond |= k & ~ignored & ~int64_t(INT32_MAX);
    }
    return beyond;
}

// The labels of a batch as int32, which equal each other where the labels do; IGNORED where a pixel
// does not count, and in the columns beside the image.
class Labels {
public:
    Labels(
        const Images& target, int64_t num_images, int64_t height, int64_t width,
        int64_t ignore_index, int64_t num_threads
    )
        : height_(height),
          width_(width),
          pitch_(whole_vectors(width) + LANES),
          ids_(num_images * height * pitch_ + LANES, IGNORED) {
        int64_t rows_of_task = 1 + (1 << 15) / width;
        int64_t rows = num_images * height, num_tasks = (rows + rows_of_task - 1) / rows_of_task;
        std::atomic<bool> beyond{false};
        parallel(num_tasks, num_threads, [&](Tasks& tasks) {
            std::vector<int64_t> buffer(width);
            for (int64_t task; tasks.next(task);) {
                int64_t stop = std::min(rows, (task + 1) * rows_of_task);
                for (int64_t i = task * rows_of_task; i < stop; i++) {
                    int64_t n = i / height, h = i % height;
                    auto given = load_integers(target, n, 0, h, 0, int(width), buffer.data());
                    if (label_row(given, ignore_index, row(n, h), width)) beyond = true;
                }
            }
        });
        if (beyond) {
            for (int64_t n = 0; n < num_images; n++) rank(target, n, ignore_index);
        }
    }

    // The label of column 0.
    const int32_t* row(int64_t n, int64_t h) const {
        return ids_.data() + LANES + (n * height_ + h) * pitch_;
    }

private:
    int32_t* row(int64_t n, int64_t h) { return ids_.data() + LANES + (n * height_ + h) * pitch_; }

    // Labels beyond int32 are replaced by their ranks among the labels of the image.
    void rank(const Images& x, int64_t n, int64_t ignore_index) {
        auto label_of = [&](int64_t h, int64_t w) {
            return with_integers(
                x, x.offset(n, 0, h, w), [](auto* label) { return int64_t(*label); }
            );
        };
        std::vector<int64_t> labels;
        for (int64_t h = 0; h < height_; h++) {
            for (int64_t w = 0; w < width_; w++) {
                int64_t label = label_of(h, w);
                if (labels.empty() || label != labels.back()) labels.push_back(label);
            }
        }
        std::sort(labels.begin(), labels.end());
        labels.erase(std::unique(labels.begin(), labels.end()), labels.end());
        for (int64_t h = 0; h < height_; h++) {
            for (int64_t w = 0; w < width_; w++) {
                int64_t label = label_of(h, w);
                auto place = std::lower_bound(labels.begin(), labels.end(), label);
                if (label < 0 || label == ignore_index) continue;
                row(n, h)[w] = int32_t(place - labels.begin());
            }
        }
    }

    int64_t height_, width_, pitch_;
    std::vector<int32_t> ids_;
};

// --- The focal loss of a signal -----------------------------------------------------------------

// Writes e = exp(-|x|). A loop of its own: the shorter the loop bodies, the more of them a
// processor works on at once, and the functions here are long chains.
ROW_FUNCTION void exp_row(Floats logit, FloatsOut e, int n) {
    n &= -LANES;
    #pragma omp simd
    for (int w = 0; w < n; w++) e[w] = exp_of_negative(-std::fabs(logit[w]));
}

// With u = x for a same and -x for a different signal, pt = sigmoid(u) and q = 1 - pt. A signal
// that is not valid has any numbers.
struct Signal {
    int32_t valid;  // mask
    int32_t same;   // mask
    int32_t below;  // negative if u is below 0
    float u, e;
    float log;   // log(1 + e)
    float loss;  // -log(pt)

    Signal(float x, float e, int32_t own, int32_t there) : e(e) {
        valid = ~((own | there) >> 31);
        same = own == there ? -1 : 0;
        below = as_int(x) ^ (~same & SIGN);
        u = as_float(below);
        log = log_of_1_plus(e);
        loss = log - (u < 0.0f ? u : 0.0f);
    }
};

// Writes q^gamma = exp(-gamma (-log(q))), for any gamma but 2; a loop of its own, as above.
ROW_FUNCTION void power_row(
    Floats logit, Floats e, Ints own, Ints there, float gamma, FloatsOut power, int n
) {
    n &= -LANES;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        Signal s(logit[w], e[w], own[w], there[w]);
        power[w] = -gamma * (s.log + (s.u > 0.0f ? s.u : 0.0f));
    }
    #pragma omp simd
    for (int w = 0; w < n; w++) power[w] = exp_of_negative(power[w]);
}

// --- Tables -------------------------------------------------------------------------------------

// A pixel's signals at a rate: one byte each for the numbers of different and of same signals,
// and of different and of same signals that are predicted right.
constexpr int ONE_DIFFERENT = 1, ONE_SAME = 1 << 8, PREDICTED_RIGHT = 16;

template <bool GAMMA_IS_2>
ROW_FUNCTION void focal_row(
    Floats logit, Floats e, Ints own, Ints there, Floats power, FloatsOut different_sum,
    FloatsOut same_sum, IntsOut counts, int n
) {
    n &= -LANES;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        Signal s(logit[w], e[w], own[w], there[w]);
        float q = (s.below < 0 ? 1.0f : s.e) / (1.0f + s.e);
        float focal = masked((GAMMA_IS_2 ? q * q : power[w]) * s.loss, s.valid);
        same_sum[w] += masked(focal, s.same);
        different_sum[w] += masked(focal, ~s.same);
        int32_t one = (s.same & (ONE_SAME - ONE_DIFFERENT)) + ONE_DIFFERENT;
        int32_t right = (logit[w] > 0.0f ? -1 : 0) ^ ~s.same;
        counts[w] += (one + ((one << PREDICTED_RIGHT) & right)) & s.valid;
    }
}

// The neighbour categories of pixels, CATEGORIES if a pixel has no valid neighbour. Returns a bit
// for every category that is there.
ROW_FUNCTION int32_t category_row(Ints counts, IntsOut category, int n) {
    n &= -LANES;
    int32_t found = 0;
    #pragma omp simd reduction(| : found)
    for (int w = 0; w < n; w++) {
        int32_t k = NEIGHBORS - (counts[w] & 0xff);
        category[w] = (counts[w] & 0xffff) != 0 ? k : CATEGORIES;
        found |= 1 << category[w];
    }
    return found;
}

// The entries of all tables for one rate and category.
struct Entry {
    double loss_sum[2];
    int64_t pixel_count, signal_count[2], correct_count[2];

    void operator+=(const Entry& other) {
        pixel_count += other.pixel_count;
        for (int t = 0; t < 2; t++) {
            loss_sum[t] += other.loss_sum[t];
            signal_count[t] += other.signal_count[t];
            correct_count[t] += other.correct_count[t];
        }
    }
};

// Adds up the pixels of a category. The sums of counts have 16 bits each: n is at most STRIP.
ROW_FUNCTION void table_row(
    Ints category, int32_t k, Ints counts, Floats different_sum, Floats same_sum,
    Entry* RESTRICT entry, int n
) {
    static_assert(STRIP * NEIGHBORS < 1 << 16, "16 bits for the sum of a byte over a strip");
    n &= -LANES;
    float different_total = 0.0f, same_total = 0.0f;
    int32_t pixels = 0, different = 0, same = 0;
    #pragma omp simd reduction(+ : different_total, same_total, pixels, different, same)
    for (int w = 0; w < n; w++) {
        int32_t chosen = category[w] == k ? -1 : 0;
        different_total += masked(different_sum[w], chosen);
        same_total += masked(same_sum[w], chosen);
        pixels -= chosen;
        different += counts[w] & chosen & 0x00ff00ff;
        same += (counts[w] >> 8) & chosen & 0x00ff00ff;
    }
    entry->loss_sum[0] += double(different_total);
    entry->loss_sum[1] += double(same_total);
    entry->pixel_count += pixels;
    entry->signal_count[0] += different & 0xffff;
    entry->signal_count[1] += same & 0xffff;
    entry->correct_count[0] += different >> PREDICTED_RIGHT;
    entry->correct_count[1] += same >> PREDICTED_RIGHT;
}

// --- Gradient -----------------------------------------------------------------------------------

// Counts the neighbours that have another label.
ROW_FUNCTION void different_row(Ints own, Ints there, IntsOut different, int n) {
    n &= -LANES;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        int32_t counts = ~((own[w] | there[w]) >> 31);
        different[w] += (own[w] != there[w] ? 1 : 0) & counts;
    }
}

// The coefficients of pixels' signals, given the table [9, 2] of a rate. The sign turns derivatives
// with respect to -u into derivatives with respect to the logit.
ROW_FUNCTION void coefficient_row(
    Ints different, Floats table, FloatsOut different_grad, FloatsOut same_grad, int n
) {
    n &= -LANES;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        int32_t k = NEIGHBORS - different[w];
        different_grad[w] = table[2 * k];
        same_grad[w] = -table[2 * k + 1];
    }
}

template <bool GAMMA_IS_2>
ROW_FUNCTION void gradient_row(
    Floats logit, Floats e, Ints own, Ints there, float gamma, Floats power, Floats different_grad,
    Floats same_grad, FloatsOut grad, int n
) {
    n &= -LANES;
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        Signal s(logit[w], e[w], own[w], there[w]);
        float larger = 1.0f / (1.0f + s.e), smaller = s.e * larger;
        float pt = s.below < 0 ? smaller : larger, q = s.below < 0 ? larger : smaller;
        float slope = GAMMA_IS_2 ? q * q * (2.0f * pt * s.loss + q)
                                 : power[w] * (gamma * pt * s.loss + q);
        int32_t different = as_int(different_grad[w]), same = as_int(same_grad[w]);
        float coefficient = as_float((same & s.same) | (different & ~s.same));
        grad[w] = masked(slope * coefficient, s.valid);
    }
}

// --- Strips -------------------------------------------------------------------------------------

// Rows from h on and columns from w on, at one rate.
struct Patch {
    int64_t n, rate, h, w;
    int rows, columns;
};

// The pixels [first, last) of a patch's row, in whole vectors, that have a neighbour inside the
// image; the labels of the row's pixels, and of their neighbours.
struct Neighbors {
    int first, last;
    const int32_t *own, *there;
};

// The batch that both passes go through.
struct Batch {
    Images logits;
    int64_t num_images, num_rates, height, width;
    const int64_t* offsets;  // [R, 8, 2]
    float gamma;
    const Labels* labels;
    int64_t end;  // elements from the first logit in memory to the last one, and 1

    Batch(
        const Images& logits, const int64_t* shape, const int64_t* offsets, double gamma,
        const Labels& labels
    )
        : logits(logits),
          num_images(shape[0]),
          num_rates(shape[1]),
          height(shape[2]),
          width(shape[3]),
          offsets(offsets),
          gamma(float(gamma)),
          labels(&labels) {
        end = 1 + logits.offset(num_images - 1, NEIGHBORS * num_rates - 1, height - 1, width - 1);
    }

    int64_t band_rows() const { return std::max<int64_t>(ROWS, 1 + (BAND_PIXELS - 1) / width); }
    int64_t num_bands() const { return (height + band_rows() - 1) / band_rows(); }
    int64_t num_tasks() const { return num_images * num_bands(); }

    // Calls each(patch) for all rates and patches of a task.
    template <class Each>
    void patches(int64_t task, const Each& each) const {
        int64_t start = task % num_bands() * band_rows();
        int64_t stop = std::min(height, start + band_rows());
        for (int64_t rate = 0; rate < num_rates; rate++) {
            for (int64_t h = start; h < stop; h += ROWS) {
                for (int64_t w = 0; w < width; w += STRIP) {
                    int rows = int(std::min<int64_t>(ROWS, stop - h));
                    int columns = int(std::min<int64_t>(STRIP, width - w));
                    each(Patch{task / num_bands(), rate, h, w, rows, columns});
                }
            }
        }
    }

    // The neighbours s of a row of a patch.
    Neighbors neighbors(const Patch& patch, int row, int s) const {
        const int64_t* offset = offsets + 2 * (NEIGHBORS * patch.rate + s);
        int64_t dx = offset[1], there = patch.h + row + offset[0];
        int64_t first = std::max(patch.w, -dx);
        int64_t last = std::min(patch.w + patch.columns, width - dx);
        if (there < 0 || there >= height || first >= last) return {0, 0, nullptr, nullptr};
        first = first / LANES * LANES;
        return {
            int(first - patch.w), int(whole_vectors(last) - patch.w),
            labels->row(patch.n, patch.h + row) + patch.w,
            labels->row(patch.n, there) + dx + patch.w,
        };
    }

    // The logits of the pixels that have a neighbour, from the first one on. Reading them in whole
    // vectors does not leave the tensor's memory.
    const float* load(
        const Patch& patch, int row, int s, int first, int last, float* buffer
    ) const {
        int64_t channel = NEIGHBORS * patch.rate + s, h = patch.h + row, w = patch.w + first;
        int count = std::min(last, patch.columns) - first;
        const float* logit = load_row(logits, patch.n, channel, h, w, count, buffer);
        if (logit != buffer && logits.offset(patch.n, channel, h, w) + last - first > end) {
            std::memcpy(buffer, logit, count * sizeof(float));
            logit = buffer;
        }
        return logit;
    }

    // Asks for the row of the logits two rows below, and of the gradient: a run of rows is short.
    void ask_for_rows_below(const Patch& patch, int row, int s, const Images& grad) const {
        int64_t h = patch.h + row + 2;
        if (h >= height || logits.dtype != FLOAT32 || logits.stride_w != 1) return;
        int64_t channel = NEIGHBORS * patch.rate + s;
        prefetch(load_row(logits, patch.n, channel, h, patch.w, 0, nullptr), patch.columns);
        prefetch_to_write(row_to_write(grad, patch.n, channel, h, patch.w, nullptr), patch.columns);
    }
};

// One number for each pixel of a patch's row.
template <class Number>
struct alignas(64) Line {
    Number data[STRIP] = {};

    Number* at(int column) { return data + column; }
    void clear(int from, int to) { std::fill(data + from, data + to, Number(0)); }
};

template <bool GAMMA_IS_2>
void add_tables(const Batch& batch, Tasks& tasks, Entry* tables) {
    Line<float> logit, e, power, different_sum, same_sum;
    Line<int32_t> counts, category;
    for (int64_t task; tasks.next(task);) {
        Entry* table = tables + task * batch.num_rates * CATEGORIES;
        batch.patches(task, [&](const Patch& patch) {
            int columns = int(whole_vectors(patch.columns));
            for (int row = 0; row < patch.rows; row++) {
                different_sum.clear(0, columns);
                same_sum.clear(0, columns);
                counts.clear(0, columns);
                for (int s = 0; s < NEIGHBORS; s++) {
                    auto [first, last, own, there] = batch.neighbors(patch, row, s);
                    if (first == last) continue;
                    const float* x = batch.load(patch, row, s, first, last, logit.data);
                    exp_row(x, e.data, last - first);
                    if (!GAMMA_IS_2) {
                        power_row(
                            x, e.data, own + first, there + first, batch.gamma, power.data,
                            last - first
                        );
                    }
                    focal_row<GAMMA_IS_2>(
                        x, e.data, own + first, there + first, power.data, different_sum.at(first),
                        same_sum.at(first), counts.at(first), last - first
                    );
                }
                int32_t found = category_row(counts.data, category.data, columns);
                for (int k = 0; k < CATEGORIES; k++) {
                    if (!(found >> k & 1)) continue;
                    table_row(
                        category.data, k, counts.data, different_sum.data, same_sum.data,
                        table + patch.rate * CATEGORIES + k, columns
                    );
                }
            }
        });
    }
}

template <bool GAMMA_IS_2>
void write_gradient(
    const Batch& batch, Tasks& tasks, const float* grad_loss_sum, const Images& grad
) {
    Line<float> logit, e, power, result, different_grad[ROWS], same_grad[ROWS];
    Line<int32_t> different;
    for (int64_t task; tasks.next(task);) {
        batch.patches(task, [&](const Patch& patch) {
            int columns = int(whole_vectors(patch.columns));
            for (int row = 0; row < patch.rows; row++) {
                different.clear(0, columns);
                for (int s = 0; s < NEIGHBORS; s++) {
                    auto [first, last, own, there] = batch.neighbors(patch, row, s);
                    if (first == last) continue;
                    different_row(own + first, there + first, different.at(first), last - first);
                }
                coefficient_row(
                    different.data, grad_loss_sum + 2 * CATEGORIES * patch.rate,
                    different_grad[row].data, same_grad[row].data, columns
                );
            }
            // All rows of a channel one after the other: memory likes long runs.
            for (int s = 0; s < NEIGHBORS; s++) {
                for (int row = 0; row < patch.rows; row++) {
                    batch.ask_for_rows_below(patch, row, s, grad);
                    auto [first, last, own, there] = batch.neighbors(patch, row, s);
                    result.clear(0, first);
                    result.clear(last, std::max(last, columns));
                    if (first < last) {
                        const float* x = batch.load(patch, row, s, first, last, logit.data);
                        exp_row(x, e.data, last - first);
                        if (!GAMMA_IS_2) {
                            power_row(
                                x, e.data, own + first, there + first, batch.gamma, power.data,
                                last - first
                            );
                        }
                        gradient_row<GAMMA_IS_2>(
                            x, e.data, own + first, there + first, batch.gamma, power.data,
                            different_grad[row].at(first), same_grad[row].at(first),
                            result.at(first), last - first
                        );
                    }
                    store_row(
                        grad, patch.n, NEIGHBORS * patch.rate + s, patch.h + row, patch.w,
                        patch.columns, result.data
                    );
                }
            }
        });
    }
}

// Small batches are not worth a second thread.
int64_t threads_for(const Batch& batch, int64_t num_threads) {
    int64_t signals = batch.num_images * batch.num_rates * batch.height * batch.width * NEIGHBORS;
    return signals < 1 << 14 ? 1 : num_threads;
}

}  // namespace

// Adds to the tables, which have room for 0s: loss sums [R, 9, 2], signal counts [R, 9, 2], correct
// counts [R, 9, 2] and pixel counts [R, 9]. The shape is N, R, H, W.
EXPORT void dilated_affinity_tables(
    const Images* logits, const Images* target, const int64_t* shape, const int64_t* offsets,
    double gamma, int64_t ignore_index, int64_t num_threads, float* loss_sum,
    int64_t* signal_count, int64_t* correct_count, int64_t* pixel_count
) {
    Labels labels(*target, shape[0], shape[2], shape[3], ignore_index, num_threads);
    Batch batch(*logits, shape, offsets, gamma, labels);
    int64_t size = batch.num_rates * CATEGORIES;
    std::vector<Entry> tables(batch.num_tasks() * size);
    auto add = gamma == 2.0 ? add_tables<true> : add_tables<false>;
    parallel(batch.num_tasks(), threads_for(batch, num_threads), [&](Tasks& tasks) {
        add(batch, tasks, tables.data());
    });
    for (int64_t i = 0; i < size; i++) {
        Entry total = {};
        for (int64_t task = 0; task < batch.num_tasks(); task++) total += tables[task * size + i];
        pixel_count[i] = total.pixel_count;
        for (int t = 0; t < 2; t++) {
            loss_sum[2 * i + t] = float(total.loss_sum[t]);
            signal_count[2 * i + t] = total.signal_count[t];
            correct_count[2 * i + t] = total.correct_count[t];
        }
    }
}

// Writes the gradient of the logits, given the gradient [R, 9, 2] of the loss sums.
EXPORT void dilated_affinity_gradient(
    const float* grad_loss_sum, const Images* logits, const Images* target, const int64_t* shape,
    const int64_t* offsets, double gamma, int64_t ignore_index, int64_t num_threads,
    const Images* grad
) {
    Labels labels(*target, shape[0], shape[2], shape[3], ignore_index, num_threads);
    Batch batch(*logits, shape, offsets, gamma, labels);
    auto write = gamma == 2.0 ? write_gradient<true> : write_gradient<false>;
    parallel(batch.num_tasks(), threads_for(batch, num_threads), [&](Tasks& tasks) {
        write(batch, tasks, grad_loss_sum, *grad);
    });
}
