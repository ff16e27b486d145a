// One tile of bank rows against every image; similarity.cpp includes it once per instruction set, which gives ISA, TARGET, LANES, LOADS
// and, where it has them, integer PRODUCTS.

namespace ISA {

#define INLINE TARGET static inline __attribute__((always_inline))
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
constexpr int L = LANES;

template <class To, class From>
INLINE To as(const From *p) {  // from any address
    To to;
    std::memcpy(&to, p, sizeof to);
    return to;
}

INLINE V load(const float *p) { return as<V>(p); }
LOADS

// What rows are packed as, how many numbers a vector of them has, and how they are multiplied.
template <class P> struct Packed { typedef V Vector; typedef V Sums; };
INLINE V multiply(V a, V b, V sums) { return sums + a * b; }
#ifdef PRODUCTS
typedef int16_t W __attribute__((vector_size(4 * LANES)));
template <> struct Packed<int16_t> { typedef W Vector; typedef I Sums; };
PRODUCTS
#endif

template <class P, class T>
INLINE typename Packed<P>::Vector numbers(const T *p) {
    if constexpr (sizeof(P) == 2) return load16(p);
    else return load(p);
}

// The last numbers of a row, from `full` on, and zeros. Copied before the loop, for a call inside it would put all its sums into memory.
template <int n, class T>
INLINE void copy_edge(const T *row, int64_t full, int64_t D, T *edge) {
    std::memset(edge, 0, n * sizeof(T));
    std::memcpy(edge, row + full, size_t(D - full) * sizeof(T));
}

INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V all(float x) { return V{} + x; }

INLINE float sum(V v) {
    float x[L];
    std::memcpy(x, &v, sizeof v);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) x[i] += x[i + n];
    return x[0];
}

INLINE float sum(I v) { return sum(__builtin_convertvector(v, V)); }  // all of them would not fit an int32

// exp of x <= 0 within 2 ulp; what is under the smallest normal number comes out as that, which no sum with a 1 in it sees.
INLINE V exponential(V x) {
    x = larger(x, all(-87.33f));
    const V shifted = x * 1.44269504f + 12582912.f;  // 1.5 x 2^23: rounds, and leaves the integer in the low bits
    const V n = shifted - 12582912.f;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return (V)((I)p + ((I)shifted << 23));
}

// Q images and their rows' squared lengths, straight from the bank: what bounds it is the reading. f32 comes one row at a time, for the
// processor's own prefetcher follows one stream best; narrower rows come several at a time, to share the images' loads, and are fetched as
// one stream by hand. At most 12 sums: enough to hide an addition's latency, few enough for 16 registers.
template <int Q, class T>
TARGET static void stream(const Call &call, const T *bank, int n, Tile &tile) {
    constexpr int R = Q > 1 ? 3 : sizeof(T) < 4 ? 4 : 1, U = R == 1 ? 4 : 1;  // rows, and vectors of each, at a time
    const int64_t D = call.D, full = D / (L * U) * (L * U);
    const float *unit = static_cast<const float *>(call.unit);
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
#pragma GCC unroll 4
            for (int j = 0; j < R * U; ++j) b[j] = load((d < full ? row[j % R] + d : edge[j % R]) + j / R * L);
#pragma GCC unroll 4
            for (int j = 0; j < R * U; ++j) square[j] += b[j] * b[j];
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
                for (int j = 0; j < R * U; ++j) dot[q][j] += load(unit + (d + j / R * L) * Q + q * L) * b[j];
        }
#pragma GCC unroll 4
        for (int j = R; j < R * U; ++j) {
            square[j % R] += square[j];
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) dot[q][j % R] += dot[q][j];
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            tile.square[i + r] = sum(square[r]);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) tile.dot[q][i + r] = sum(dot[q][r]);
        }
    }
}

// Rows and their squared lengths from the bank into `packed`, as P and ROWS by ROWS so that `product` reads one stream.
template <class P, class T>
TARGET static void pack(const Call &call, const T *bank, int n, Tile &tile, P *packed) {
    constexpr int U = sizeof(P), W = 4 * L / sizeof(P);
    const int64_t D = call.D, full = D / (W * U) * (W * U);
    for (int i = 0; i < n; ++i) {
        P *to = packed + i / ROWS * ROWS * call.stride + i % ROWS * W;
        T edge[W * U];
        if (full < D) copy_edge<W * U>(bank + i * D, full, D, edge);
        typename Packed<P>::Sums square[4] = {};
        for (int64_t d = 0; d < D; d += W * U) {
            const T *at = d < full ? bank + i * D + d : edge;
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) {
                const auto b = numbers<P>(at + u * W);
                std::memcpy(to + (d + u * W) * ROWS, &b, sizeof b);
                square[u] = multiply(b, b, square[u]);
            }
        }
        tile.square[i] = sum((square[0] + square[1]) + (square[2] + square[3]));
    }
}

// Q images and packed rows, while the next tile comes from memory.
template <int Q, class P>
TARGET static void product(const Call &call, int64_t image, const P *packed, int n, const char *&ahead, Tile &tile) {
    constexpr int W = 4 * L / sizeof(P);
    const P *unit = static_cast<const P *>(call.unit) + image * call.stride;
    for (int i = 0; i < n; i += ROWS, packed += ROWS * call.stride) {
        typename Packed<P>::Sums dot[Q][ROWS] = {};
        for (int64_t d = 0; d < call.stride; d += W) {
            typename Packed<P>::Vector b[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) b[r] = as<typename Packed<P>::Vector>(packed + d * ROWS + r * W);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) {
                const auto a = as<typename Packed<P>::Vector>(unit + d * Q + q * W);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) dot[q][r] = multiply(a, b[r], dot[q][r]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) tile.dot[q][i + r] = sum(dot[q][r]) * call.step[image + q];
        for (int64_t line = 0; line < call.lines_ahead; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
}

// One image's dot products become scores, and go into its sum and its best.
TARGET static void scores(const Call &call, int64_t image, int n, int64_t row, const float *inverse, float *dot, Worker &worker) {
    Running &to = worker.running[image];
    V top = all(-INFINITY);
    for (int i = 0; i < n; i += L) {
        const V by = load(inverse + i), cosine = load(dot + i) * by;
        const V within = cosine > 1.f ? all(1.f) : cosine < -1.f ? all(-1.f) : cosine;
        const V score = by == 0.f ? all(-INFINITY) : within * call.logit_scale;
        std::memcpy(dot + i, &score, sizeof score);
        top = larger(top, score);
    }
    float largest = top[0];
    for (int i = 1; i < L; ++i) largest = std::max(largest, top[i]);
    if (largest == -INFINITY) return;
    if (largest > to.largest) {
        to.sum *= std::exp(double(to.largest) - largest);
        to.largest = largest;
    }
    V terms = {};
    for (int i = 0; i < n; i += L) terms += exponential(load(dot + i) - to.largest);
    to.sum += sum(terms);
    if (largest > to.worst) keep(to, worker.best.data() + image * call.k, call.k, dot, n, row);
}

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
        if (call.B >= GROUP) {
            if (end - begin == 4) product<4>(call, begin, packed, n, ahead, of);
            else if (end - begin == 3) product<3>(call, begin, packed, n, ahead, of);
            else if (end - begin == 2) product<2>(call, begin, packed, n, ahead, of);
            else product<1>(call, begin, packed, n, ahead, of);
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
