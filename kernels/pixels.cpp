// From a radiograph's stored values to the few pixels that a tower sees: RLE, a table look-up, and Pillow's resampling, bit for bit.
#include "pixels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int BITS = 32 - 8 - 2;          // of a weight's fraction: PRECISION_BITS in Pillow's Resample.c
constexpr int64_t SHARE = int64_t(1) << 19;  // pixels that pay for starting a thread

inline uint8_t clipped(int32_t sum) { return uint8_t(std::min(std::max(sum >> BITS, 0), 255)); }

void look_up(const uint16_t *values, int64_t n, const uint8_t *table, uint8_t *out) {
    for (int64_t i = 0; i < n; ++i) out[i] = table[values[i]];
}

// Along one axis: see pmclip_taps. Of integers any order gives the same sum.
struct Plain {
    // One row: each output from the pixels of its window.
    static void across(const uint8_t *row, const pmclip_taps &to, uint8_t *out) {
        for (int64_t x = 0; x < to.size; ++x) {
            const uint8_t *pixel = row + to.first[x];
            const int32_t *weight = to.weights + x * to.taps;
            int32_t sum = 1 << (BITS - 1);
            for (int64_t i = 0; i < to.taps; ++i) sum += pixel[i] * weight[i];
            out[x] = clipped(sum);
        }
    }
    // One output row: `taps` rows of `width` pixels, weighed and added up.
    static inline __attribute__((always_inline)) void down(const uint8_t *rows, int64_t width, const int32_t *weight, int64_t taps, uint8_t *out) {
        int32_t sums[64];
        for (int64_t x = 0; x < width; x += 64) {
            const int64_t n = std::min<int64_t>(64, width - x);
            std::fill(sums, sums + n, 1 << (BITS - 1));
            for (int64_t i = 0; i < taps; ++i)
                for (int64_t j = 0; j < n; ++j) sums[j] += rows[i * width + x + j] * weight[i];
            for (int64_t j = 0; j < n; ++j) out[x + j] = clipped(sums[j]);
        }
    }
};

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
struct Avx2 : Plain {
    AVX2 static inline __m256i part(const uint8_t *pixel, const int32_t *weight) {
        const __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)pixel));
        return _mm256_mullo_epi32(pixels, _mm256_loadu_si256((const __m256i *)weight));
    }
    AVX2 static inline __m256i window(const uint8_t *pixel, const int32_t *weight, int64_t taps) {
        __m256i sums = part(pixel, weight);
        for (int64_t i = 8; i < taps; i += 8) sums = _mm256_add_epi32(sums, part(pixel + i, weight + i));
        return sums;
    }
    AVX2 static void across(const uint8_t *row, const pmclip_taps &to, uint8_t *out) {
        int64_t x = 0;
        for (; x + 4 <= to.size; x += 4) {
            __m256i sums[4];
            for (int j = 0; j < 4; ++j) sums[j] = window(row + to.first[x + j], to.weights + (x + j) * to.taps, to.taps);
            const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
            const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            const __m128i levels = _mm_srai_epi32(_mm_add_epi32(four, _mm_set1_epi32(1 << (BITS - 1))), BITS);
            const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(_mm_packs_epi32(levels, levels), levels));  // which clip to 0..255
            std::memcpy(out + x, &bytes, 4);
        }
        if (x < to.size) Plain::across(row, {to.size - x, to.taps, to.first + x, to.weights + x * to.taps}, out + x);
    }
    AVX2 static void down(const uint8_t *rows, int64_t width, const int32_t *weight, int64_t taps, uint8_t *out) {
        Plain::down(rows, width, weight, taps, out);  // compiled for AVX2
    }
};
#endif

// work(from, to) over [0, n), each of `weight` pixels, on at most `threads` threads: each takes the next block, so that one whose core is busy
// with something else holds up no more than that.
template <class Work>
void shared(int64_t n, int64_t weight, int threads, Work work) {
    const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t most = std::min(threads ? int64_t(threads) : cores, n * weight / SHARE);
    const int64_t block = std::max<int64_t>(1, SHARE / 4 / weight);
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t from; (from = next.fetch_add(block)) < n;) work(from, std::min(from + block, n));
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < most; ++i) others.emplace_back(take);
    } catch (const std::exception &) {  // no thread or no memory for one: those there are do the work
    }
    take();
    for (std::thread &other : others) other.join();
}

}  // namespace

extern "C" {

void pmclip_look_up(const uint16_t *values, int64_t n, const uint8_t *table, int threads, uint8_t *out) {
    shared(n, 1, threads, [=](int64_t from, int64_t to) { look_up(values + from, to - from, table, out + from); });
}

int pmclip_unpack_bits(const uint8_t *in, int64_t size, uint8_t *out, int64_t count, int64_t stride) {
    const uint8_t *const end = in + size;
    for (int64_t done = 0; done < count;) {
        if (end - in < 2) return 1;
        const int head = *in++;
        if (head == 128) continue;  // nothing, PS3.5 G.3.1
        const int64_t length = head < 128 ? head + 1 : 257 - head, n = std::min(length, count - done);
        if (head < 128 && end - in < length) return 1;
        uint8_t *to = out + done * stride;
        if (head < 128)
            for (int64_t i = 0; i < n; ++i) to[i * stride] = in[i];
        else
            for (int64_t i = 0; i < n; ++i) to[i * stride] = *in;
        in += head < 128 ? length : 1;
        done += n;
    }
    return 0;
}

void pmclip_resample(const uint8_t *in, int64_t height, int64_t width, const pmclip_taps *across, const pmclip_taps *down, int threads,
                     uint8_t *between, uint8_t *out) {
    const int64_t size = across->size;
    const auto resample = [=](auto isa) {
        shared(height, width, threads, [=](int64_t from, int64_t to) {
            for (int64_t y = from; y < to; ++y) isa.across(in + y * width, *across, between + y * size);
        });
        for (int64_t y = 0; y < down->size; ++y)
            isa.down(between + down->first[y] * size, size, down->weights + y * down->taps, down->taps, out + y * size);
    };
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return resample(Avx2{});
#endif
    resample(Plain{});
}
}
