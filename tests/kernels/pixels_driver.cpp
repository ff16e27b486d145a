// Runs the kernels for large pictures over odd sizes and broken data, its arrays exactly as large as they may touch: a program for the sanitizers.

#include "pixels.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

static uint32_t seed = 1;
static uint32_t next() { return (seed = seed * 1664525 + 1013904223) >> 8; }

template <class T>
static std::unique_ptr<T[]> numbers(int64_t n) {
    std::unique_ptr<T[]> made(new T[size_t(n)]);  // with nothing after
    for (int64_t i = 0; i < n; ++i) made[size_t(i)] = T(next());
    return made;
}

// Windows anywhere in the picture, the last ones at its end.
static void resample(int64_t height, int64_t width, int64_t rows, int64_t columns, int threads) {
    std::vector<int64_t> first[2];
    std::vector<int32_t> weights[2];
    pmclip_taps taps[2];
    const int64_t inputs[2] = {width, height}, outputs[2] = {columns, rows};
    for (int axis = 0; axis < 2; ++axis) {
        const int64_t count = inputs[axis] / 8 * 8;
        for (int64_t i = 0; i < outputs[axis]; ++i) first[axis].push_back((inputs[axis] - count) * i / std::max<int64_t>(1, outputs[axis] - 1));
        for (int64_t i = 0; i < outputs[axis] * count; ++i) weights[axis].push_back(int32_t(next() % 9000) - 3000);
        taps[axis] = {outputs[axis], count, first[axis].data(), weights[axis].data()};
    }
    const auto in = numbers<uint8_t>(height * width), between = numbers<uint8_t>(height * columns), out = numbers<uint8_t>(rows * columns);
    pmclip_resample(in.get(), height, width, &taps[0], &taps[1], threads, between.get(), out.get());
}

int main() {
    for (int round = 0; round < 3000; ++round) {
        const int64_t size = next() % 40, stride = 1 + next() % 3, count = next() % 300;
        const auto in = numbers<uint8_t>(size), out = numbers<uint8_t>(count ? (count - 1) * stride + 1 : 0);
        pmclip_unpack_bits(in.get(), size, out.get(), count, stride);
    }
    const auto table = numbers<uint8_t>(65536);
    for (int64_t n : {0, 1, 31, 2000003}) {
        const auto values = numbers<uint16_t>(n);
        const auto out = numbers<uint8_t>(n);
        pmclip_look_up(values.get(), n, table.get(), 3, out.get());
    }
    for (int threads : {1, 3})
        for (int64_t columns : {1, 3, 4, 17, 64, 65})
            for (int64_t width : {8, 9, 63, 64, 100}) resample(40, width, 16, columns, threads);
    resample(2100, 1030, 16, 17, 4);
    std::puts("done");
}
