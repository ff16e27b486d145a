// Runs the similarity kernel over odd shapes at odd addresses, its arrays exactly as large as it may touch: a program for the sanitizers.

#include "similarity.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

// `bytes` of them, `offset` from an aligned address, with nothing after.
struct Bytes {
    char *base, *data;
    Bytes(size_t bytes, size_t offset) : base(static_cast<char *>(std::malloc(bytes + offset + !bytes))), data(base + offset) {
        std::memset(base, 0, bytes + offset);
    }
    ~Bytes() { std::free(base); }
};

static void run(int dtype, int64_t B, int64_t N, int64_t D, int64_t k, int threads, size_t offset) {
    const size_t size = dtype == PMCLIP_F32 ? 4 : dtype == PMCLIP_F16 ? 2 : 1;
    Bytes image(size_t(B * D) * 4, offset), bank(size_t(N * D) * size, offset), scales(size_t(N) * 4, offset);
    uint32_t seed = 1;
    for (int64_t i = 0; i < B * D; ++i) {
        const float x = float((seed = seed * 1664525 + 1013904223) >> 24) - 99;
        std::memcpy(image.data + 4 * i, &x, 4);
    }
    for (int64_t i = 0; i < N * D * int64_t(size); ++i) bank.data[i] = char((seed = seed * 1664525 + 1013904223) >> 24);  // NaN among them
    for (int64_t i = 0; i < N; ++i) {
        const float x = i % 3 ? 1.f : -1.f;
        std::memcpy(scales.data + 4 * i, &x, 4);
    }
    std::vector<float> score(B * k), log_sum_exp(B);
    std::vector<int64_t> index(B * k);
    const int status =
        pmclip_similarity(reinterpret_cast<float *>(image.data), B, bank.data, dtype, N % 2 ? reinterpret_cast<float *>(scales.data) : nullptr,
                          N, D, 100, k, threads, score.data(), index.data(), log_sum_exp.data());
    if (status != PMCLIP_OK) std::printf("status %d\n", status), std::exit(1);
    for (int64_t i = 0; i < B * k; ++i)
        if (index[i] < -1 || index[i] >= N || !(score[i] <= 100)) std::printf("index %ld\n", long(index[i])), std::exit(1);
}

int main() {
    for (const char *isa : {"plain", "AVX2", "AVX-512", "AVX-512 VNNI", "NEON"}) {
        if (pmclip_similarity_use(isa) != PMCLIP_OK) continue;
        for (int dtype = 0; dtype < 3; ++dtype) {
            for (int64_t B : {0, 1, 2, 3, 4, 5, 9})
                for (int64_t N : {0, 1, 2, 47, 48, 49, 131})
                    for (int64_t D : {0, 1, 3, 7, 8, 31, 64, 65}) run(dtype, B, N, D, (N + D) % 13, 0, size_t(N + D) % 4);
            for (int64_t B : {1, 5}) run(dtype, B, 13001 - 1200 * B, 513, 20, 5, 1);  // work enough for 4 or 5 threads
            std::vector<std::thread> callers;
            for (int i = 0; i < 3; ++i) callers.emplace_back(run, dtype, 2 + i, 9000, 300, 7, 2, 0);
            for (std::thread &caller : callers) caller.join();
        }
    }
}
