// The fused contrastive-similarity kernel on CPUs: threads take blocks of the bank, and pass each tile of it through all images in cache.

#include "processors.h"
#include "similarity.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int TILE = 48;            // rows; a multiple of the rows taken at a time (3, 4) and of the lanes of every vector (4, 8, 16)
constexpr int GROUP = 4;            // images that are multiplied at a time
constexpr float SMALLEST = 0x1p-90f, LARGEST = 0x1p100f;  // squared lengths between which f32 has neither lost nor overflowed anything
constexpr double WORK = 6 << 20, READING = 4;  // multiply-adds that pay for a thread, about 150 us; reading a number costs as many as this
constexpr float NEGLIGIBLE = 16;    // N terms of exp(-16 - log N) are 1e-7 of a sum with a 1 in it
constexpr int64_t AHEAD = 4096;     // bytes between what is read and what is fetched
constexpr int64_t CACHE = 96 << 10; // bytes of packed rows: with the next tile's they fit the second level
constexpr int64_t WIDEST = 4096;    // numbers whose products, in 16 and 8 bits, eight int32 can sum
constexpr int64_t BLOCK = 1 << 20;  // bytes of the bank that a thread takes at a time

// Packed, for arrays may stand at any address.
struct __attribute__((packed)) F32 { float x; };
struct __attribute__((packed)) F16 { uint16_t bits; };
struct I8 { int8_t x; };

float number(F32 value) { return value.x; }
float number(I8 value) { return value.x; }

float number(F16 value) {
    const uint32_t size = (value.bits & 0x7fffu) << 13;  // as an f32, 2^112 times too small
    const uint32_t bits = size | (size >= 0x7c00u << 13 ? 0x7f800000u : 0) | uint32_t(value.bits & 0x8000u) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result * 0x1p112f;
}

struct Candidate {
    float score;
    int64_t row;
};

bool before(const Candidate &a, const Candidate &b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

// What a thread knows of one image so far.
struct Running {
    float largest = -INFINITY;
    float worst = -INFINITY;  // what a score must exceed to be kept
    double sum = 0;           // of exp(score - largest)
    int64_t count = 0;        // kept, as a heap with the worst on top
};

// No vector of them straddles two lines of the cache.
struct alignas(64) Line { float x[16]; };

struct Tile {
    alignas(64) float dot[GROUP][TILE];
    float square[TILE];
    float inverse[TILE];  // 1 / length, with the sign of the scale; 0 where there is no direction
    int32_t total[TILE];  // of the numbers of a row of bytes
    int32_t high[GROUP][TILE];  // its products with the images' high bytes
    int32_t low[GROUP][TILE];   // and with their low ones
    Line parts[GROUP * TILE];   // vectors whose sums are products or squares
};

struct Worker {
    Tile tile{};
    std::vector<Running> running;
    std::vector<Candidate> best;  // (B, k)
    std::vector<Line> packed;     // (tile, stride)
};

struct Call {
    const F32 *image;
    const double *length;  // (B,) of the images, 0 where it has no direction
    const void *unit;      // images of length 1, interleaved by `interleave`
    const float *step;     // (B,) what 1 in `unit` stands for
    const void *bank;
    const F32 *scales;
    const float *doubt;    // (B,) what the high bytes may be wrong by
    int64_t B, N, D, stride, k, tile, lines_ahead;
    float logit_scale;
    float negligible;      // exp of a score that much under the largest changes no sum
};

void keep(Running &to, Candidate *best, int64_t k, const float *score, int n, int64_t row) {
    for (int i = 0; i < n; ++i) {
        if (!(score[i] > to.worst)) continue;  // rows come in order, so of equal ones the first stays
        if (to.count == k)
            std::pop_heap(best, best + k, before);
        else
            ++to.count;
        best[to.count - 1] = {score[i], row + i};
        std::push_heap(best, best + to.count, before);
        if (to.count == k) to.worst = best[0].score;
    }
}

// In double precision, for rows whose squares f32 cannot hold: no f32, squared and summed, comes near the ends of a double.
template <class T>
double length_of(const T *row, int64_t D) {
    double squares[8] = {};  // so that additions need not wait for each other
    for (int64_t d = 0; d < D; d += 8)
        for (int64_t i = d; i < std::min(d + 8, D); ++i) squares[i - d] += double(number(row[i])) * number(row[i]);
    double square = 0;
    for (const double part : squares) square += part;
    return std::isfinite(square) ? std::sqrt(square) : 0;
}

template <class T>
float cosine_of(const F32 *image, const T *row, int64_t D, double lengths) {
    double dot = 0;
    for (int64_t d = 0; d < D; ++d) dot += double(image[d].x) * number(row[d]);
    return float(dot / lengths);
}

float sign(float scale) { return !std::isfinite(scale) || scale == 0 ? 0.f : scale < 0 ? -1.f : 1.f; }

}  // namespace

#include "similarity_isas.h"

namespace {

using TileOf = void (*)(const Call &, int64_t row, int n, bool last, Worker &);

struct Path {
    const char *name;
    int lanes;
    TileOf tile[4];  // by dtype, and int8 rows with images in 16 bits where there are integer products
    int size;        // bytes of a number of int8 rows, packed for that
    bool (*here)();
};

#define TILES(isa) isa::tile<F32>, isa::tile<F16>, isa::tile<I8>

#if defined(__x86_64__)
bool avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }
#endif

const Path PATHS[] = {  // the best first
#if defined(__x86_64__)
    {"AVX-512 VNNI", 16, {TILES(vnni), vnni::tile<I8, int8_t>}, 1, [] { return avx512() && __builtin_cpu_supports("avx512vnni"); }},
    {"AVX-512", 16, {TILES(avx512), avx512::tile<I8, int16_t>}, 2, avx512},
    {"AVX2", 8, {TILES(avx2), avx2::tile<I8, int16_t>}, 2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#elif defined(__aarch64__)
    {"NEON", 4, {TILES(neon), nullptr}, 4, [] { return true; }},
#endif
    {"plain", 4, {TILES(plain), nullptr}, 4, [] { return true; }},
};

std::atomic<const Path *> chosen{nullptr};

const Path &best_path() {
    if (!chosen) pmclip_similarity_use(nullptr);
    return *chosen;
}

// Images of length 1 in P: of each group, a vector of the first, of the second, ..., then their next vectors; zeros from D on. In 16 bits the
// largest number becomes 32767 and the others are rounded. In 8 bits, 32768 more than that: all high bytes, then all low ones.
template <class P>
void interleave(const F32 *image, const double *length, int64_t B, int64_t D, int64_t stride, int lanes, P *unit, float *step, float *doubt) {
    for (int64_t q = 0; q < B; ++q, image += D) {
        if (!(length[q] > 0)) continue;
        const int64_t group = q / GROUP * GROUP, count = std::min<int64_t>(GROUP, B - group);
        double one = length[q], off = 0;
        if constexpr (sizeof(P) < 4) {
            float largest = 0;
            for (int64_t d = 0; d < D; ++d) largest = std::max(largest, std::fabs(image[d].x));
            one = double(largest) / 32767;
        }
        step[q] = float(one / length[q]);
        const double by = 1 / one;
        for (int64_t d = 0; d < D; d += lanes) {
            P *to = unit + group * stride + d * count + (q - group) * lanes;
            for (int64_t i = 0; i < std::min<int64_t>(lanes, D - d); ++i) {
                const double x = image[d + i].x * by;
                if constexpr (sizeof(P) == 4) to[i] = P(x);
                else if constexpr (sizeof(P) == 2) to[i] = P(std::lrint(x));
                else {
                    const int bits = int(std::lrint(x)) + 32768, low = bits & 255;
                    to[i] = P(bits >> 8);
                    to[i + B * stride] = P(low);
                    off += (low - 127.5) * (low - 127.5);
                }
            }
        }
        doubt[q] = float(std::sqrt(off) * one / length[q]) + 1e-5f;  // of a cosine, and what f32 may lose
    }
}

// Blocks come to each thread in rising order, which `keep` counts on.
void work(const Call &call, TileOf tile, int64_t block, std::atomic<int64_t> &next, Worker &worker) {
    for (int64_t begin; (begin = next.fetch_add(block)) < call.N;)
        for (int64_t row = begin, end = std::min(begin + block, call.N); row < end; row += call.tile)
            tile(call, row, int(std::min(call.tile, end - row)), row + call.tile >= end, worker);
}

// What is left of `score` and `index` where there are fewer than k stays as it is.
void merge(std::vector<Worker> &workers, int64_t image, int64_t k, float *score, int64_t *index, float *log_sum_exp) {
    float largest = -INFINITY;
    for (const Worker &worker : workers) largest = std::max(largest, worker.running[image].largest);
    double sum = 0;
    std::vector<Candidate> best;
    for (const Worker &worker : workers) {
        const Running &of = worker.running[image];
        if (of.sum > 0) sum += of.sum * std::exp(double(of.largest) - largest);
        best.insert(best.end(), worker.best.data() + image * k, worker.best.data() + image * k + of.count);
    }
    *log_sum_exp = sum > 0 ? float(largest + std::log(sum)) : -INFINITY;
    std::sort(best.begin(), best.end(), before);
    for (size_t i = 0; i < std::min(best.size(), size_t(k)); ++i) score[i] = best[i].score, index[i] = best[i].row;
}

int similarity(const F32 *image, int64_t B, const void *bank, int dtype, const F32 *scales, int64_t N, int64_t D, float logit_scale,
               int64_t k, int threads, float *score, int64_t *index, float *log_sum_exp) {
    std::fill_n(score, B * k, -INFINITY);
    std::fill_n(index, B * k, -1);
    std::fill_n(log_sum_exp, B, -INFINITY);
    if (!B || !N || !D) return PMCLIP_OK;

    const double most = double(N) * double(D) * double(B + READING) / WORK;
    if (threads == 0) threads = most < 2 ? 1 : pmclip::processors();
    threads = std::max(1, int(std::min<double>(threads, most)));
    const Path &path = best_path();
    const bool integers = dtype == PMCLIP_INT8 && path.tile[3] && B >= GROUP && D <= WIDEST;
    const int64_t size = integers ? path.size : 4;  // of a number, packed
    const int64_t kept = std::min(k, N), whole = B == 1 ? 128 : 64, stride = (D + whole - 1) / whole * whole, bytes = D * (dtype == PMCLIP_F32 ? 4 : dtype == PMCLIP_F16 ? 2 : 1);

    std::vector<Line> unit(B * stride * std::max<int64_t>(size, 2) / 64);
    std::vector<double> length(B);
    std::vector<float> step(B), doubt(B);
    for (int64_t q = 0; q < B; ++q) length[q] = length_of(image + q * D, D);
    const auto images = [&](auto *packed) {
        interleave(image, length.data(), B, D, stride, path.lanes * 4 / int(sizeof *packed), packed, step.data(), doubt.data());
    };
    if (size == 1) images(reinterpret_cast<uint8_t *>(unit.data()));
    else if (size == 2) images(reinterpret_cast<int16_t *>(unit.data()));
    else images(unit.data()->x);
    for (float &wrong : doubt) wrong *= std::fabs(logit_scale);

    const int64_t rows = std::max<int64_t>(12, std::min<int64_t>(TILE, CACHE / (stride * size) / 12 * 12));
    const int64_t products = B < GROUP ? 0 : (B + GROUP - 1) / GROUP * rows / 4, lines = products ? (rows * bytes / 64 + products) / products : 0;
    const Call call{image, length.data(), unit.data(), step.data(), bank, scales, doubt.data(), B, N, D, stride, kept, rows, lines, logit_scale,
                    float(std::log(double(N))) + NEGLIGIBLE};
    const int64_t share = std::min(N / threads / 4, BLOCK / bytes);  // small enough that no thread ends long after the others
    const int64_t block = std::max<int64_t>(1, share / rows) * rows;

    std::vector<Worker> workers(threads);
    for (Worker &worker : workers) {
        worker.running.resize(B);
        worker.best.resize(B * kept);
        if (B >= GROUP) worker.packed.resize(rows * stride * size / 64);
        if (!kept)
            for (Running &running : worker.running) running.worst = INFINITY;
    }
    const TileOf tile = path.tile[integers ? 3 : dtype];
    std::atomic<int64_t> next{0};
    std::vector<std::thread> started;  // beside this one, which need not wait for them
    if (threads > 1) try {
            started.reserve(threads);
            for (int i = 1; i < threads; ++i) started.emplace_back([&, i] { work(call, tile, block, next, workers[i]); });
        } catch (const std::exception &) {  // no more to be had: those there do the work
        }
    work(call, tile, block, next, workers[0]);
    for (std::thread &thread : started) thread.join();
    for (int64_t q = 0; q < B; ++q) merge(workers, q, kept, score + q * k, index + q * k, log_sum_exp + q);
    return PMCLIP_OK;
}

}  // namespace

int pmclip_similarity(const float *image, int64_t B, const void *bank, int dtype, const float *scales, int64_t N, int64_t D,
                      float logit_scale, int64_t k, int threads, float *score, int64_t *index, float *log_sum_exp) try {
    if (B < 0 || N < 0 || D < 0 || k < 0 || threads < 0 || dtype < PMCLIP_F32 || dtype > PMCLIP_INT8 || !std::isfinite(logit_scale))
        return PMCLIP_BAD_ARGUMENT;
    return similarity(reinterpret_cast<const F32 *>(image), B, bank, dtype, reinterpret_cast<const F32 *>(scales), N, D, logit_scale, k,
                      threads, score, index, log_sum_exp);
} catch (const std::exception &) {  // bad_alloc, length_error
    return PMCLIP_OUT_OF_MEMORY;
}

const char *pmclip_similarity_isa(void) { return best_path().name; }

int pmclip_similarity_use(const char *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();  // not every compiler's runtime has done it by itself
#endif
    for (const Path &path : PATHS) {
        if ((isa && std::strcmp(isa, path.name) != 0) || !path.here()) continue;
        chosen = &path;
        return PMCLIP_OK;
    }
    return PMCLIP_BAD_ARGUMENT;
}
