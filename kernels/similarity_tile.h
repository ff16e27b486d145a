// One tile of bank rows against every image; similarity.cpp includes it once per instruction set, which gives ISA, TARGET, LANES, LOADS
// and, if it has them, integer PRODUCTS of 16 bits or BYTES, products of 8 bits.

namespace ISA {

#include "similarity_vectors.h"

// Q images and their rows' squared lengths, straight from the bank: what bounds it is the reading. f32 comes one row at a time, for the
// processor's own prefetcher follows one stream best; narrower rows come several at a time, to share the images' loads, and are fetched as
// one stream by hand. At most 12 sums, or 16 of 32 registers: enough to hide an addition's latency.
template <int Q, class T>
TARGET static void stream(const Call &call, const T *bank, int n, Tile &tile) {
    constexpr int R = Q > 1 ? 3 : sizeof(T) < 4 ? 4 : 1, U = R > 1 ? 1 : L == 16 ? 8 : 4;  // rows, and vectors of each, at a time
    const int64_t D = call.D, full = D / (L * U) * (L * U);
    const float *unit = static_cast<const float *>(call.unit);
    V *dots = reinterpret_cast<V *>(tile.parts), *squares = dots + Q * TILE;
    for (int i = 0; i < n; i += R) {
        const T *row[R];
        T edge[R][L * U];
        for (int r = 0; r < R; ++r) {
            row[r] = bank + std::min(i + r, n - 1) * D;  // past the end the last again, and never looked at
            if (full < D) copy_edge<L * U>(row[r], full, D, edge[r]);
        }
        V dot[Q][R * U] = {}, square[R * U] = {};
        for (int64_t d = 0; d < D; d += L * U) {
            if (R > 1)
                for (int64_t byte = 0; byte < R * L * int64_t(sizeof(T)); byte += 64)
                    __builtin_prefetch(reinterpret_cast<const char *>(row[0]) + R * d * int64_t(sizeof(T)) + byte + AHEAD);
            V b[R * U];
#pragma GCC unroll 8
            for (int j = 0; j < R * U; ++j) b[j] = load((d < full ? row[j % R] + d : edge[j % R]) + j / R * L);
#pragma GCC unroll 8
            for (int j = 0; j < R * U; ++j) square[j] += b[j] * b[j];
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
                for (int j = 0; j < R * U; ++j) dot[q][j] += load(unit + (d + j / R * L) * Q + q * L) * b[j];
        }
#pragma GCC unroll 8
        for (int j = R; j < R * U; ++j) {
            square[j % R] += square[j];
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) dot[q][j % R] += dot[q][j];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            squares[i + r] = square[r];
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) dots[q * TILE + i + r] = dot[q][r];
        }
    }
    for (int i = 0; i < n; i += L) {
        put(sums(squares + i), tile.square + i);
        for (int q = 0; q < Q; ++q) put(sums(dots + q * TILE + i), tile.dot[q] + i);
    }
}

// Rows and their squared lengths from the bank into `packed`, as P and ROWS by ROWS so that `product` reads one stream.
template <class P, class T>
TARGET static void pack(const Call &call, const T *bank, int n, Tile &tile, P *packed) {
    constexpr int U = sizeof(P) == 1 ? 1 : sizeof(P), W = 4 * L / sizeof(P);
    typedef typename Packed<P>::Sums Sums;
    const int64_t D = call.D, full = D / (W * U) * (W * U);
    typedef std::conditional_t<sizeof(P) == 1, I, V> Parts;
    Parts *squares = reinterpret_cast<Parts *>(tile.parts), *totals = squares + TILE;
    for (int i = 0; i < n; ++i) {
        P *to = packed + i / ROWS * ROWS * call.stride + i % ROWS * W;
        T edge[W * U];
        if (full < D) copy_edge<W * U>(bank + i * D, full, D, edge);
        Sums square[4] = {}, total = {};
        for (int64_t d = 0; d < D; d += W * U) {
            const T *at = d < full ? bank + i * D + d : edge;
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) {
                const auto b = numbers<P>(at + u * W);
                put(b, to + (d + u * W) * ROWS);
                if constexpr (sizeof(P) == 1) {
                    square[0] = multiply(b ^ int8_t(-128), b, square[0]);  // unsigned: 128 more than b
                    total = multiply(S{} + int8_t(1), b, total);
                } else square[u] = multiply(b, b, square[u]);
            }
        }
        const Sums all_squares = (square[0] + square[1]) + (square[2] + square[3]);
        if constexpr (sizeof(P) == 1) squares[i] = all_squares, totals[i] = total;
        else squares[i] = floats(all_squares);  // of 16 bits: their sum would not fit an int32
    }
    for (int i = 0; i < n; i += L) {
        if constexpr (sizeof(P) == 1) {
            const I total = sums(totals + i);
            put(total, tile.total + i);
            put(__builtin_convertvector(sums(squares + i) - 128 * total, V), tile.square + i);
        } else put(sums(squares + i), tile.square + i);
    }
}

// Q of `apart` interleaved images and packed rows, while `lines` of the next tile come from memory after each step. Products of bytes are exact.
template <int Q, class P, class Dot>
TARGET static void product(const Call &call, const P *unit, int64_t apart, const P *packed, int n, int64_t lines, const char *&ahead, Dot (*to)[TILE]) {
    constexpr int W = 4 * L / sizeof(P);
    for (int i = 0; i < n; i += ROWS, packed += ROWS * call.stride) {
        typename Packed<P>::Sums dot[Q * ROWS] = {};
        for (int64_t d = 0; d < call.stride; d += W) {
            typename Packed<P>::Vector b[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) b[r] = as<typename Packed<P>::Vector>(packed + d * ROWS + r * W);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) {
                const auto a = as<typename Packed<P>::Vector>(unit + d * apart + q * W);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) dot[q * ROWS + r] = multiply(a, b[r], dot[q * ROWS + r]);
            }
        }
        std::conditional_t<std::is_same_v<Dot, int32_t>, I, V> parts[Q * ROWS];
#pragma GCC unroll 16
        for (int j = 0; j < Q * ROWS; ++j)
            if constexpr (std::is_same_v<Dot, int32_t>) parts[j] = dot[j];
            else parts[j] = floats(dot[j]);
        alignas(64) Dot sum[(Q * ROWS + L - 1) / L * L];
        put(sums<std::min(L, Q * ROWS)>(parts), sum);
        if constexpr (Q * ROWS > L) put(sums<std::min(L, Q * ROWS - L)>(parts + L), sum + L);
        if constexpr (Q * ROWS > 2 * L) put(sums<std::min(L, Q * ROWS - 2 * L)>(parts + 2 * L), sum + 2 * L);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) std::memcpy(to[q] + i, sum + q * ROWS, sizeof(Dot) * ROWS);
        for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
}

template <class P, class Dot>
INLINE void products(const Call &call, int64_t images, const P *unit, const P *packed, int n, int64_t lines, const char *&ahead, Dot (*to)[TILE]) {
    if (images == 4) product<4>(call, unit, 4, packed, n, lines, ahead, to);
    else if (images == 3) product<3>(call, unit, 3, packed, n, lines, ahead, to);
    else if (images == 2) product<2>(call, unit, 2, packed, n, lines, ahead, to);
    else product<1>(call, unit, 1, packed, n, lines, ahead, to);
}

// One image's dot products become scores, and go into its sum and its best.
TARGET static void scores(const Call &call, int64_t image, int n, int64_t row, const float *inverse, float *dot, Worker &worker) {
    Running &to = worker.running[image];
    V top = all(-INFINITY);
    for (int i = 0; i < n; i += L) {
        const V by = load(inverse + i), cosine = load(dot + i) * by;
        const V within = cosine > 1.f ? all(1.f) : cosine < -1.f ? all(-1.f) : cosine;
        const V score = by == 0.f ? all(-INFINITY) : within * call.logit_scale;
        put(score, dot + i);
        top = larger(top, score);
    }
    float largest = top[0];
    for (int i = 1; i < L; ++i) largest = std::max(largest, top[i]);
    if (largest == -INFINITY) return;
    if (largest > to.largest) {
        to.sum *= std::exp(double(to.largest) - largest);
        to.largest = largest;
    }
    if (largest >= to.largest - call.negligible) {
        V terms = {};
        for (int i = 0; i < n; i += L) terms += exponential(load(dot + i) - to.largest);
        to.sum += sum(terms);
    }
    if (largest > to.worst) keep(to, worker.best.data() + image * call.k, call.k, dot, n, row);
}

#ifdef BYTES
// Images of 16 bits, high and low bytes apart, and rows of 8. The high bytes tell what a row cannot exceed. The low bytes are multiplied only
// with rows that may change an image's best or its sum: all rows and images of the group at once if these are many.
TARGET static void bytes(const Call &call, int64_t begin, int64_t images, const int8_t *packed, int n, int64_t row, const char *&ahead, Worker &worker) {
    Tile &tile = worker.tile;
    const int8_t *unit = static_cast<const int8_t *>(call.unit) + begin * call.stride, *low = unit + call.B * call.stride;
    const auto exact = [&](int64_t q, int i) TARGET {
        const I high = as<I>(tile.high[q] + i) - 128 * as<I>(tile.total + i);
        put((floats(high) * 256.f + floats(as<I>(tile.low[q] + i))) * call.step[begin + q], tile.dot[q] + i);
    };
    products(call, images, unit, packed, n, call.lines_ahead, ahead, tile.high);
    unsigned matter[GROUP][TILE / L], count = 0;
    for (int64_t q = 0; q < images; ++q) {
        const Running &to = worker.running[begin + q];
        const float limit = std::min(to.worst, to.largest - call.negligible) - call.doubt[begin + q], by = call.step[begin + q] * call.logit_scale;
        for (int i = 0; i < n; i += L) {
            const I total = as<I>(tile.total + i), high = as<I>(tile.high[q] + i) - 128 * total;
            const V inverse = load(tile.inverse + i), about = (floats(high) * 256.f + floats(total) * 127.5f) * by * inverse;
            matter[q][i / L] = call.length[begin + q] > 0 ? mask(inverse != 0.f & about >= limit) : 0;
            count += unsigned(__builtin_popcount(matter[q][i / L]));
        }
    }
    if (4 * count > images * n) {
        products(call, images, low, packed, n, 0, ahead, tile.low);
        for (int64_t q = 0; q < images; ++q) {
            for (int i = 0; i < n; i += L) exact(q, i);
            if (call.length[begin + q] > 0) scores(call, begin + q, n, row, tile.inverse, tile.dot[q], worker);
        }
        return;
    }
    for (int64_t q = 0; q < images; ++q)
        for (int i = 0; i < n; i += L) {
            if (!matter[q][i / L]) continue;
            alignas(64) float inverse[L] = {};
            for (unsigned left = matter[q][i / L]; left; left &= left - 1) {
                const int r = i + __builtin_ctz(left);
                const int8_t *a = low + q * 4 * L, *b = packed + r / ROWS * ROWS * call.stride + r % ROWS * 4 * L;
                I dot = {};
                for (int64_t d = 0; d < call.stride; d += 4 * L) dot = multiply(as<S>(a + d * images), as<S>(b + d * ROWS), dot);
                tile.low[q][r] = sums<1>(&dot)[0];
                inverse[r - i] = tile.inverse[r];
            }
            exact(q, i);
            scores(call, begin + q, L, row + i, inverse, tile.dot[q] + i, worker);
        }
}
#endif

template <class T, class P = float>
TARGET static void tile(const Call &call, int64_t row, int n, bool last, Worker &worker) {
    const T *bank = static_cast<const T *>(call.bank) + row * call.D;
    const char *ahead = reinterpret_cast<const char *>(last ? bank : bank + n * call.D);
    Tile &of = worker.tile;
    P *packed = worker.packed.empty() ? nullptr : reinterpret_cast<P *>(worker.packed[0].x);
    if (call.B >= GROUP) pack(call, bank, n, of, packed);
    else if (call.B == 1) stream<1>(call, bank, n, of);
    else if (call.B == 2) stream<2>(call, bank, n, of);
    else stream<3>(call, bank, n, of);

    for (int i = 0; i < TILE; ++i) of.inverse[i] = 1 / std::sqrt(of.square[i]);
    for (int i = n; i < TILE; ++i) of.inverse[i] = 0;
    int doubtful[TILE], doubts = 0;
    double length[TILE];
    for (int i = 0; i < n; ++i) {
        if (of.square[i] >= SMALLEST && of.square[i] <= LARGEST) continue;
        length[doubts] = length_of(bank + i * call.D, call.D);
        of.inverse[i] = length[doubts] > 0;
        doubtful[doubts++] = i;
    }
    if (call.scales)
        for (int i = 0; i < n; ++i) of.inverse[i] *= sign(call.scales[row + i].x);

    for (int64_t begin = 0, end; begin < call.B; begin = end) {
        end = std::min(begin + GROUP, call.B);
#ifdef BYTES
        if constexpr (sizeof(P) == 1) {
            bytes(call, begin, end - begin, packed, n, row, ahead, worker);
            continue;
        }
#endif
        if (call.B >= GROUP) {
            products(call, end - begin, static_cast<const P *>(call.unit) + begin * call.stride, packed, n, call.lines_ahead, ahead, of.dot);
            for (int64_t q = begin; q < end; ++q)
                for (int i = 0; i < n; i += L) put(load(of.dot[q - begin] + i) * call.step[q], of.dot[q - begin] + i);
        }
        for (int64_t q = begin; q < end; ++q) {
            if (!call.length[q]) continue;
            float *dot = of.dot[q - begin];
            for (int j = 0; j < doubts; ++j)
                if (const int i = doubtful[j]; of.inverse[i] != 0)
                    dot[i] = cosine_of(call.image + q * call.D, bank + i * call.D, call.D, call.length[q] * length[j]);
            scores(call, q, n, row, of.inverse, dot, worker);
        }
    }
}

#undef INLINE
}  // namespace ISA
#undef ISA
#undef TARGET
#undef LANES
#undef LOADS
#undef PRODUCTS
#undef BYTES
