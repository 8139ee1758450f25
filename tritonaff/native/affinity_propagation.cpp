// Affinity propagation on a CPU, and its gradients. docs/dilated_affinity.md has the equations.
//
// An iteration multiplies, for every pixel, neighbour and class, a gate (the affinity after the
// sigmoid) with a probability and adds the product up: processors are busy loading. A vector of
// pixels therefore takes the gate of a neighbour once for as many classes as the registers hold.
//
// Rows whose numbers differ by no multiple of all rates' common divisor never meet. Such a set of
// rows is a task of its own: a thread goes through all iterations of a set, in memory that is small
// enough for its cache. If there are fewer sets than threads, all rows of an image are one set, and
// the threads share the rows of each iteration.
//
// A set lies in memory as planes [rows, C, pitch]. Rows have zeros on both sides, and gates are 0
// where the neighbour is outside the image: surplus lanes of a vector add nothing. If the border
// pixels go on outside the image, rows have margins of them on both sides, and the rows above and
// below the image are its first and last row.
#include "common.h"

#include <array>
#include <numeric>
#include <utility>

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

// A loop over pixels that adds up 11 classes is not vectorised into registers by g++ 12 and takes
// several times as long: hence vectors of the compiler's own, which all compilers have.
// PASS_CLASSES are the classes that a vector of pixels sums up at a time: enough to hide the time
// that a multiplication takes, few enough that what the pixels of a row read stays in the cache.
constexpr int LANES = VECTOR_BYTES / 4, PASS_CLASSES = VECTOR_BYTES == 64 ? 11 : 10;
constexpr int CACHE_LINE = 16;  // numbers

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

inline Vector load(const float* x) { return load<Vector>(x); }

// The arguments of an operation.
struct Options {
    int64_t num_images, num_classes, height, width;
    int64_t num_neighbors;
    const int64_t* offsets;  // [neighbors, 2]
    int64_t iterations;
    float self_weight;
    bool from_logits;
    float slope;  // the logarithm of the steepness
    bool normalizes, replicates;
    int64_t num_threads;
};

// --- Neighbours ---------------------------------------------------------------------------------

struct Neighbor {
    int64_t channel, dy, dx;
};

inline int64_t within(int64_t step, int64_t most) {
    return std::max(-most, std::min(most, step));
}

// The neighbours that some pixel of an image has.
std::vector<Neighbor> neighbors_inside(const Options& options) {
    std::vector<Neighbor> inside;
    for (int64_t k = 0; k < options.num_neighbors; k++) {
        int64_t dy = options.offsets[2 * k], dx = options.offsets[2 * k + 1];
        // Beyond the image, a pixel further away is the same border pixel.
        if (options.replicates) {
            dy = within(dy, options.height - 1), dx = within(dx, options.width - 1);
        }
        bool some = std::abs(dy) < options.height && std::abs(dx) < options.width;
        if (some) inside.push_back({k, dy, dx});
    }
    return inside;
}

// Where to find the neighbour of a vector of pixels: its place less the place of the pixels, and
// the place of its gates.
struct Source {
    int64_t step, gates;
};

// Vectors [first, last) of a row, which have the same neighbours.
struct Segment {
    int64_t first, last;
    std::vector<Source> sources;
};

// The segments of every row of a set. Rows with the same neighbours share them.
class Segments {
public:
    // Backwards, pixels are the neighbours of their sources.
    explicit Segments(bool backwards, bool replicates = false)
        : backwards_(backwards), replicates_(replicates) {}

    void prepare(
        const std::vector<Neighbor>& neighbors, int64_t num_rows, int64_t row_step, int64_t width,
        int64_t plane
    ) {
        if (int64_t(kind_of_row_.size()) == num_rows) return;  // as in the last set
        kinds_.clear();
        kind_of_row_.clear();
        std::vector<int64_t> cuts{0, divide_up(width, LANES)};
        for (const Neighbor& neighbor : neighbors) {
            if (replicates_) break;
            for (int64_t dx : {neighbor.dx, -neighbor.dx}) {
                cuts.push_back(std::max<int64_t>(0, -dx) / LANES);
                cuts.push_back(divide_up(std::min(width, width - dx), LANES));
            }
        }
        std::sort(cuts.begin(), cuts.end());
        cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());

        // Neighbours of a row, and how many rows they are away.
        std::vector<std::pair<int64_t, int64_t>> before;
        for (int64_t row = 0; row < num_rows; row++) {
            std::vector<std::pair<int64_t, int64_t>> here;
            for (size_t k = 0; k < neighbors.size(); k++) {
                int64_t dy = (backwards_ ? -neighbors[k].dy : neighbors[k].dy) / row_step;
                int64_t there = row + dy;
                if (replicates_) there = std::max<int64_t>(0, std::min(num_rows - 1, there));
                if (there >= 0 && there < num_rows) here.push_back({int64_t(k), there - row});
            }
            if (row == 0 || here != before) kinds_.emplace_back();
            kind_of_row_.push_back(kinds_.size() - 1);
            if (!kinds_.back().empty()) continue;
            for (size_t i = 0; i + 1 < cuts.size(); i++) {
                Segment segment{cuts[i], cuts[i + 1], {}};
                for (auto [k, dy] : here) {
                    int64_t dx = backwards_ ? -neighbors[k].dx : neighbors[k].dx;
                    int64_t first = std::max<int64_t>(0, -dx) / LANES;
                    int64_t last = divide_up(std::min(width, width - dx), LANES);
                    if (replicates_ || (segment.first >= first && segment.first < last)) {
                        segment.sources.push_back({dy * plane + dx, k * LANES});
                    }
                }
                kinds_.back().push_back(segment);
            }
            before = here;
        }
    }

    const std::vector<Segment>& of_row(int64_t row) const { return kinds_[kind_of_row_[row]]; }

private:
    bool backwards_, replicates_;
    std::vector<std::vector<Segment>> kinds_;
    std::vector<size_t> kind_of_row_;
};

// --- Kernels over vectors of a row --------------------------------------------------------------

// The rows that a kernel reads and writes, from column 0 of the first of its classes.
struct Row {
    const float* p;       // [C, pitch], and the neighbours around it
    const float* gates;   // [vectors, neighbors, LANES]
    const float* factor;  // [pitch]
    float* out;           // [C, pitch]
    float* grad_gates;    // [vectors, neighbors, LANES]
    int64_t pitch, gates_step;
};

// out = factor p + the sum of gates times neighbours.
template <int CLASSES>
ROW_FUNCTION void stencil(const Row& row, const Segment& segment) {
    const Source* sources = segment.sources.data();
    int64_t count = int64_t(segment.sources.size()), pitch = row.pitch;
    for (int64_t v = segment.first; v < segment.last; v++) {
        const float* own = row.p + v * LANES;
        const float* gates = row.gates + v * row.gates_step;
        float* out = row.out + v * LANES;
        Vector sum[CLASSES], factor = load(row.factor + v * LANES);
        UNROLL for (int c = 0; c < CLASSES; c++) sum[c] = factor * load(own + c * pitch);
        for (int64_t i = 0; i < count; i++) {
            Vector gate = load(gates + sources[i].gates);
            const float* there = own + sources[i].step;
            UNROLL for (int c = 0; c < CLASSES; c++) sum[c] += gate * load(there + c * pitch);
        }
        UNROLL for (int c = 0; c < CLASSES; c++) store(out + c * pitch, sum[c]);
    }
}

// Adds <grad of y, neighbour> to the gradient of the gates. Here ``out`` is the gradient of y.
template <int CLASSES>
ROW_FUNCTION void gates_backward(const Row& row, const Segment& segment) {
    const Source* sources = segment.sources.data();
    int64_t count = int64_t(segment.sources.size()), pitch = row.pitch;
    for (int64_t v = segment.first; v < segment.last; v++) {
        const float* own = row.p + v * LANES;
        const float* grad = row.out + v * LANES;
        float* grad_gates = row.grad_gates + v * row.gates_step;
        Vector grad_y[CLASSES];
        UNROLL for (int c = 0; c < CLASSES; c++) grad_y[c] = load(grad + c * pitch);
        for (int64_t i = 0; i < count; i++) {
            const float* there = own + sources[i].step;
            // Two sums, neither of which waits for the other.
            Vector sum[2] = {load(grad_gates + sources[i].gates), {}};
            UNROLL for (int c = 0; c < CLASSES; c++) {
                sum[c % 2] += grad_y[c] * load(there + c * pitch);
            }
            store(grad_gates + sources[i].gates, sum[0] + sum[1]);
        }
    }
}

using Kernel = void (*)(const Row&, const Segment&);

template <int... I>
constexpr std::array<Kernel, PASS_CLASSES> stencils(std::integer_sequence<int, I...>) {
    return {&stencil<I + 1>...};
}

template <int... I>
constexpr std::array<Kernel, PASS_CLASSES> gate_gradients(std::integer_sequence<int, I...>) {
    return {&gates_backward<I + 1>...};
}

constexpr auto CLASS_COUNTS = std::make_integer_sequence<int, PASS_CLASSES>();
constexpr auto STENCIL = stencils(CLASS_COUNTS);
constexpr auto GATES_BACKWARD = gate_gradients(CLASS_COUNTS);

// Runs a kernel for all segments of a row, for its classes in passes of about equal size.
void run(
    const std::array<Kernel, PASS_CLASSES>& kernels, Row row, const std::vector<Segment>& segments,
    int64_t num_classes
) {
    int64_t passes = divide_up(num_classes, PASS_CLASSES);
    for (; passes > 0; passes--) {
        int64_t classes = num_classes / passes;
        for (const Segment& segment : segments) kernels[classes - 1](row, segment);
        row.p += classes * row.pitch;
        row.out += classes * row.pitch;
        num_classes -= classes;
    }
}

// The largest class of a row's pixels times the weight.
ROW_FUNCTION void largest_row(
    const float* p, float weight, float* factor, int64_t num_classes, int64_t pitch, int64_t vectors
) {
    for (int64_t i = 0; i < vectors * LANES; i += LANES) {
        Vector largest = load(p + i);
        for (int64_t c = 1; c < num_classes; c++) {
            Vector x = load(p + c * pitch + i);
            largest = x > largest ? x : largest;
        }
        store(factor + i, largest * weight);
    }
}

// Turns y into p = y / total, in place; writes 1 / total, or 0 for a total of 0, and the factor of
// the next iteration.
ROW_FUNCTION void normalize_row(
    float* y, float weight, float* inverse, float* factor, int64_t num_classes, int64_t pitch,
    int64_t vectors
) {
    for (int64_t i = 0; i < vectors * LANES; i += LANES) {
        Vector sum[2] = {};
        for (int64_t c = 0; c < num_classes; c++) sum[c % 2] += load(y + c * pitch + i);
        Vector total = sum[0] + sum[1], zero = {};
        Vector scale = total == 0.0f ? zero : 1.0f / total;
        Vector largest = load(y + i) * scale;
        for (int64_t c = 0; c < num_classes; c++) {
            Vector p = load(y + c * pitch + i) * scale;
            store(y + c * pitch + i, p);
            largest = p > largest ? p : largest;
        }
        store(inverse + i, scale);
        store(factor + i, largest * weight);
    }
}

// Turns the gradient of p = y / total into the gradient of y, in place.
ROW_FUNCTION void normalize_backward_row(
    float* grad, const float* p, const float* inverse, int64_t num_classes, int64_t pitch,
    int64_t vectors
) {
    for (int64_t i = 0; i < vectors * LANES; i += LANES) {
        Vector sum[2] = {};
        for (int64_t c = 0; c < num_classes; c++) {
            sum[c % 2] += load(grad + c * pitch + i) * load(p + c * pitch + i);
        }
        Vector common = sum[0] + sum[1], scale = load(inverse + i);
        for (int64_t c = 0; c < num_classes; c++) {
            float* g = grad + c * pitch + i;
            store(g, (load(g) - common) * scale);
        }
    }
}

// Adds weight <grad of y, p> to the gradient of the first of the largest classes.
ROW_FUNCTION void largest_backward_row(
    const float* grad_y, const float* p, float weight, float* grad_p, int64_t num_classes,
    int64_t pitch, int64_t vectors
) {
    for (int64_t i = 0; i < vectors * LANES; i += LANES) {
        Vector sum = {}, largest = load(p + i);
        for (int64_t c = 0; c < num_classes; c++) {
            Vector x = load(p + c * pitch + i);
            sum += load(grad_y + c * pitch + i) * x;
            largest = x > largest ? x : largest;
        }
        Vector left = sum * weight, zero = {};  // not yet given to a class
        for (int64_t c = 0; c < num_classes; c++) {
            auto found = load(p + c * pitch + i) == largest;
            float* g = grad_p + c * pitch + i;
            store(g, load(g) + (found ? left : zero));
            left = found ? zero : left;
        }
    }
}

// May work in place.
ROW_FUNCTION void sigmoid_row(const float* x, float slope, float* gate, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) {
        float y = x[w] * slope, e = exp_of_negative(-std::fabs(y)), larger = 1.0f / (1.0f + e);
        gate[w] = y > 0.0f ? larger : e * larger;
    }
}

// Turns the gradient of gates into the gradient of their logits, in place.
ROW_FUNCTION void sigmoid_backward_row(FloatsOut grad, Floats gate, float slope, int n) {
    #pragma omp simd
    for (int w = 0; w < n; w++) grad[w] = grad[w] * gate[w] * (1.0f - gate[w]) * slope;
}

// --- Sets of rows -------------------------------------------------------------------------------

// How a batch is cut into sets, and their size in memory.
struct Layout {
    const Options& options;
    std::vector<Neighbor> neighbors;
    int64_t num_classes, num_neighbors, vectors, pitch;
    int64_t margin;        // columns beside the image that hold its border pixels
    int64_t row_step;      // between rows of a set
    int64_t most_rows;     // of a set
    int64_t set_threads;   // threads that work on different sets
    int64_t row_threads;   // threads that share the rows of a set

    explicit Layout(const Options& options)
        : options(options), neighbors(neighbors_inside(options)) {
        num_classes = options.num_classes;
        num_neighbors = int64_t(neighbors.size());
        vectors = divide_up(options.width, LANES);
        int64_t divisor = 0, furthest = 0;
        for (const Neighbor& neighbor : neighbors) {
            divisor = std::gcd(divisor, neighbor.dy);
            furthest = std::max(furthest, neighbor.dx);
        }
        if (divisor == 0) divisor = options.height;
        if (options.replicates) divisor = 1;  // border rows are neighbours of any rows
        margin = options.replicates ? divide_up(furthest, CACHE_LINE) * CACHE_LINE : 0;
        // An odd number of cache lines: rows and classes begin in different sets of the cache.
        pitch = (divide_up((vectors + 1) * LANES + 2 * margin, CACHE_LINE) | 1) * CACHE_LINE;

        int64_t image = num_classes * options.height * options.width;
        int64_t products = image * num_neighbors * options.iterations * options.num_images;
        int64_t threads = products < 1 << 19 ? 1 : options.num_threads;
        // Threads that work on whole images need the memory of as many images.
        bool small = image < 1 << 18 && options.num_images >= threads;
        bool enough_sets = divisor >= threads || small;
        row_step = enough_sets ? divisor : 1;
        set_threads = enough_sets ? threads : 1;
        row_threads = enough_sets ? 1 : threads;
        most_rows = divide_up(options.height, row_step);
    }

    int64_t num_sets() const { return options.num_images * row_step; }
    int64_t plane() const { return num_classes * pitch; }              // a row of all classes
    int64_t gates() const { return vectors * num_neighbors * LANES; }  // a row of all gates
};

// Planes [rows, C, pitch], with zeros beside the vectors of a row, which nobody overwrites.
class Planes {
public:
    Planes(const Layout& layout, int64_t count)
        : size_(layout.most_rows * layout.plane()),
          before_(CACHE_LINE + layout.margin),
          memory_(make_buffer<float>(before_ + count * size_)) {
        std::fill_n(memory_.get(), before_, 0.0f);
        int64_t written = layout.vectors * LANES;
        for (int64_t at = 0; at < count * size_; at += layout.pitch) {
            float* row = memory_.get() + before_ + at;
            std::fill(row + written, row + layout.pitch, 0.0f);
        }
    }

    float* plane(int64_t i) { return memory_.get() + before_ + i * size_; }

private:
    int64_t size_, before_;
    Buffer<float> memory_;
};

// Every row_step-th row of an image, from the first one on.
class Set {
public:
    Set(const Layout& layout, int64_t set)
        : layout_(layout),
          options_(layout.options),
          image_(set / layout.row_step),
          first_(set % layout.row_step),
          num_rows_(divide_up(options_.height - first_, layout.row_step)) {}

    int64_t num_rows() const { return num_rows_; }

    void prepare(Segments& segments) const {
        segments.prepare(
            layout_.neighbors, num_rows_, layout_.row_step, options_.width, layout_.plane()
        );
    }

    // Calls each(row), on several threads if these share the rows.
    template <class Each>
    void rows(const Each& each) const {
        int64_t threads = layout_.row_threads;
        int64_t rows_of_task = threads == 1 ? num_rows_ : divide_up(num_rows_, 4 * threads);
        parallel(divide_up(num_rows_, rows_of_task), threads, [&](Tasks& tasks) {
            for (int64_t task; tasks.next(task);) {
                int64_t stop = std::min(num_rows_, (task + 1) * rows_of_task);
                for (int64_t row = task * rows_of_task; row < stop; row++) each(row);
            }
        });
    }

    void load_planes(const Images& x, float* planes) const {
        rows([&](int64_t row) {
            for (int64_t c = 0; c < layout_.num_classes; c++) {
                float* out = planes + row * layout_.plane() + c * layout_.pitch;
                int width = int(options_.width);
                const float* in = load_row(x, image_, c, image_row(row), 0, width, out);
                if (in != out) std::memcpy(out, in, width * sizeof(float));
            }
            clear_surplus(planes + row * layout_.plane());
        });
    }

    void store_planes(const float* planes, const Images& x) const {
        rows([&](int64_t row) {
            for (int64_t c = 0; c < layout_.num_classes; c++) {
                const float* in = planes + row * layout_.plane() + c * layout_.pitch;
                store_row(x, image_, c, image_row(row), 0, int(options_.width), in);
            }
        });
    }

    // Zeros the columns that only fill the last vector: unwritten, or 0 times what is no number. Or
    // writes the border pixels into the margins.
    void clear_surplus(float* plane) const {
        int64_t width = options_.width, margin = layout_.margin;
        for (int64_t c = 0; c < layout_.num_classes; c++) {
            float* line = plane + c * layout_.pitch;
            float surplus = options_.replicates ? line[width - 1] : 0.0f;
            std::fill(line + width, line + layout_.vectors * LANES + margin, surplus);
            std::fill(line - margin, line, line[0]);
        }
    }

    // Writes the gates of the pixels; and to ``from``, if given, the gates with which the pixels'
    // neighbours take them over.
    void load_gates(const Images& affinity, float* gates, float* from) const {
        rows([&](int64_t row) {
            // A gate with zeros around it.
            std::vector<float> line((layout_.vectors + 2) * LANES);
            float* gate = line.data() + LANES;
            for (int64_t k = 0; k < layout_.num_neighbors; k++) {
                auto [channel, dy, dx] = layout_.neighbors[k];
                int64_t there = row + dy / layout_.row_step;
                if (!options_.replicates && (there < 0 || there >= num_rows_)) continue;
                auto [first, last] = inside(dx);
                std::fill(line.begin(), line.end(), 0.0f);
                load_gate(affinity, channel, row, first, last, gate);
                float* out = gates + row * layout_.gates() + k * LANES;
                scatter(gate, first, last, out);
                if (from) {
                    float* out_there = from + there * layout_.gates() + k * LANES;
                    scatter(gate - dx, first + dx, last + dx, out_there);
                }
            }
        });
    }

    // Turns the gradient of the gates into the gradient of the affinity.
    void store_gradient(const float* gates, const float* grad_gates, const Images& x) const {
        int width = int(options_.width);
        rows([&](int64_t row) {
            std::vector<float> lines(2 * layout_.vectors * LANES), zeros(width);
            float *gate = lines.data(), *grad = gate + layout_.vectors * LANES;
            for (int64_t k = 0, channel = 0; channel < options_.num_neighbors; channel++) {
                bool some = k < layout_.num_neighbors && layout_.neighbors[k].channel == channel;
                int64_t first = 0, last = 0;
                if (some) {
                    auto [_, dy, dx] = layout_.neighbors[k];
                    int64_t there = row + dy / layout_.row_step;
                    if (there >= 0 && there < num_rows_) {
                        first = inside(dx).first, last = inside(dx).second;
                        gather(grad_gates + row * layout_.gates() + k * LANES, first, last, grad);
                        gather(gates + row * layout_.gates() + k * LANES, first, last, gate);
                        int n = int(last - first);
                        if (options_.from_logits) {
                            sigmoid_backward_row(grad + first, gate + first, options_.slope, n);
                        }
                    }
                    k++;
                }
                int64_t h = image_row(row);
                store_row(x, image_, channel, h, 0, int(first), zeros.data());
                store_row(x, image_, channel, h, first, int(last - first), grad + first);
                store_row(x, image_, channel, h, last, int(width - last), zeros.data());
            }
        });
    }

private:
    int64_t image_row(int64_t row) const { return first_ + row * layout_.row_step; }

    // The columns [first, last) whose neighbour is inside the image.
    std::pair<int64_t, int64_t> inside(int64_t dx) const {
        if (options_.replicates) return {0, options_.width};
        return {std::max<int64_t>(0, -dx), std::min(options_.width, options_.width - dx)};
    }

    void load_gate(
        const Images& affinity, int64_t channel, int64_t row, int64_t first, int64_t last,
        float* gate
    ) const {
        int n = int(last - first);
        const float* in = load_row(
            affinity, image_, channel, image_row(row), first, n, gate + first
        );
        if (options_.from_logits) {
            sigmoid_row(in, options_.slope, gate + first, n);
        } else if (in != gate + first) {
            std::memcpy(gate + first, in, n * sizeof(float));
        }
    }

    // Copies the vectors of a line with columns in [first, last) to the gates of a row.
    void scatter(const float* line, int64_t first, int64_t last, float* out) const {
        for (int64_t v = first / LANES; v < divide_up(last, LANES); v++) {
            store(out + v * layout_.num_neighbors * LANES, load(line + v * LANES));
        }
    }

    void gather(const float* in, int64_t first, int64_t last, float* line) const {
        for (int64_t v = first / LANES; v < divide_up(last, LANES); v++) {
            store(line + v * LANES, load(in + v * layout_.num_neighbors * LANES));
        }
    }

    const Layout& layout_;
    const Options& options_;
    int64_t image_, first_, num_rows_;
};

// --- Iterations ---------------------------------------------------------------------------------

struct Iteration {
    float *p, *factor;
    float* inverse;  // with which p was normalised
};

// One iteration from ``from`` to ``to``.
void iterate(
    const Layout& layout, const Set& set, const Segments& segments, const float* gates,
    const Iteration& from, const Iteration& to
) {
    int64_t plane = layout.plane(), pitch = layout.pitch;
    set.rows([&](int64_t row) {
        Row data = {
            from.p + row * plane, gates + row * layout.gates(), from.factor + row * pitch,
            to.p + row * plane, nullptr, pitch, layout.num_neighbors * LANES,
        };
        run(STENCIL, data, segments.of_row(row), layout.num_classes);
        set.clear_surplus(to.p + row * plane);
        if (layout.options.normalizes) {
            normalize_row(
                to.p + row * plane, layout.options.self_weight, to.inverse + row * pitch,
                to.factor + row * pitch, layout.num_classes, pitch, layout.vectors
            );
            if (layout.options.replicates) set.clear_surplus(to.p + row * plane);
        } else {
            largest_row(
                to.p + row * plane, layout.options.self_weight, to.factor + row * pitch,
                layout.num_classes, pitch, layout.vectors
            );
        }
    });
}

void find_largest(const Layout& layout, const Set& set, const Iteration& at) {
    set.rows([&](int64_t row) {
        largest_row(
            at.p + row * layout.plane(), layout.options.self_weight,
            at.factor + row * layout.pitch, layout.num_classes, layout.pitch, layout.vectors
        );
    });
}

void forward(
    const Layout& layout, Tasks& tasks, const Images& probs, const Images& affinity,
    const Images& out
) {
    int64_t rows = layout.most_rows, pitch = layout.pitch;
    Planes planes(layout, 2);
    Buffer<float> gates = make_buffer<float>(rows * layout.gates());
    Buffer<float> statistics = make_buffer<float>(4 * rows * pitch);
    Iteration at[2];
    for (int i = 0; i < 2; i++) {
        float* numbers = statistics.get() + 2 * i * rows * pitch;
        at[i] = {planes.plane(i), numbers, numbers + rows * pitch};
    }
    Segments segments(false, layout.options.replicates);
    for (int64_t task; tasks.next(task);) {
        Set set(layout, task);
        set.prepare(segments);
        set.load_planes(probs, at[0].p);
        set.load_gates(affinity, gates.get(), nullptr);
        find_largest(layout, set, at[0]);
        int64_t t = 0;
        for (; t < layout.options.iterations; t++) {
            iterate(layout, set, segments, gates.get(), at[t % 2], at[(t + 1) % 2]);
        }
        set.store_planes(at[t % 2].p, out);
    }
}

void backward(
    const Layout& layout, Tasks& tasks, const Images& grad, const Images& probs,
    const Images& affinity, const Images* grad_probs, const Images* grad_affinity
) {
    int64_t rows = layout.most_rows, plane = layout.plane(), pitch = layout.pitch;
    int64_t iterations = layout.options.iterations;
    Planes planes(layout, iterations + 3);
    Buffer<float> gates = make_buffer<float>(3 * rows * layout.gates());
    Buffer<float> statistics = make_buffer<float>(2 * (iterations + 1) * rows * pitch);
    std::vector<Iteration> at(iterations + 1);
    for (int64_t t = 0; t <= iterations; t++) {
        float* numbers = statistics.get() + 2 * t * rows * pitch;
        at[t] = {planes.plane(t), numbers, numbers + rows * pitch};
    }
    float *grad_p = planes.plane(iterations + 1), *other = planes.plane(iterations + 2);
    float* gates_from = gates.get() + rows * layout.gates();
    float* grad_gates = gates_from + rows * layout.gates();

    Segments segments(false), segments_from(true);
    for (int64_t task; tasks.next(task);) {
        Set set(layout, task);
        set.prepare(segments);
        set.prepare(segments_from);
        set.load_planes(probs, at[0].p);
        set.load_planes(grad, grad_p);
        set.load_gates(affinity, gates.get(), gates_from);
        std::fill_n(grad_gates, set.num_rows() * layout.gates(), 0.0f);
        find_largest(layout, set, at[0]);
        for (int64_t t = 0; t < iterations; t++) {
            iterate(layout, set, segments, gates.get(), at[t], at[t + 1]);
        }
        for (int64_t t = iterations - 1; t >= 0; t--) {
            set.rows([&](int64_t row) {
                normalize_backward_row(
                    grad_p + row * plane, at[t + 1].p + row * plane,
                    at[t + 1].inverse + row * pitch, layout.num_classes, pitch, layout.vectors
                );
            });
            set.rows([&](int64_t row) {
                float *grad_y = grad_p + row * plane, *p = at[t].p + row * plane;
                int64_t gates_step = layout.num_neighbors * LANES;
                if (grad_affinity) {
                    Row data = {
                        p, nullptr, nullptr, grad_y, grad_gates + row * layout.gates(), pitch,
                        gates_step,
                    };
                    run(GATES_BACKWARD, data, segments.of_row(row), layout.num_classes);
                }
                if (t == 0 && !grad_probs) return;
                Row data = {
                    grad_y, gates_from + row * layout.gates(), at[t].factor + row * pitch,
                    other + row * plane, nullptr, pitch, gates_step,
                };
                run(STENCIL, data, segments_from.of_row(row), layout.num_classes);
                largest_backward_row(
                    grad_y, p, layout.options.self_weight, other + row * plane,
                    layout.num_classes, pitch, layout.vectors
                );
                set.clear_surplus(other + row * plane);
            });
            std::swap(grad_p, other);
        }
        if (grad_probs) set.store_planes(grad_p, *grad_probs);
        if (grad_affinity) set.store_gradient(gates.get(), grad_gates, *grad_affinity);
    }
}

Options options_of(
    const int64_t* shape, const int64_t* offsets, int64_t iterations, double self_weight,
    int64_t from_logits, double slope, int64_t normalizes, int64_t replicates, int64_t num_threads
) {
    return {shape[0], shape[1], shape[2], shape[3], shape[4], offsets, iterations,
            float(self_weight), from_logits != 0, float(slope), normalizes != 0, replicates != 0,
            num_threads};
}

}  // namespace

// Writes the refined probs. The shape is N, C, H, W and the number of neighbours.
EXPORT void affinity_propagation_forward(
    const Images* probs, const Images* affinity, const int64_t* shape, const int64_t* offsets,
    int64_t iterations, double self_weight, int64_t from_logits, double slope, int64_t normalizes,
    int64_t replicates, int64_t num_threads, const Images* out
) {
    Options options = options_of(
        shape, offsets, iterations, self_weight, from_logits, slope, normalizes, replicates,
        num_threads
    );
    Layout layout(options);
    parallel(layout.num_sets(), layout.set_threads, [&](Tasks& tasks) {
        forward(layout, tasks, *probs, *affinity, *out);
    });
}

// Writes the gradients of probs and affinity, given the gradient of the refined probs. A gradient
// that is null is not needed.
EXPORT void affinity_propagation_backward(
    const Images* grad, const Images* probs, const Images* affinity, const int64_t* shape,
    const int64_t* offsets, int64_t iterations, double self_weight, int64_t from_logits,
    double slope, int64_t normalizes, int64_t replicates, int64_t num_threads,
    const Images* grad_probs, const Images* grad_affinity
) {
    Options options = options_of(
        shape, offsets, iterations, self_weight, from_logits, slope, normalizes, replicates,
        num_threads
    );
    Layout layout(options);
    parallel(layout.num_sets(), layout.set_threads, [&](Tasks& tasks) {
        backward(layout, tasks, *grad, *probs, *affinity, grad_probs, grad_affinity);
    });
}
