// One tile of bank rows against every image; similarity.cpp includes it once per instruction set, which gives ISA, TARGET, LANES and loads.

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

template <class T>
INLINE V load(const T *p, int64_t n) {  // n of them, then zeros
    T part[L] = {};
    if (n > 0) std::memcpy(part, p, size_t(n < L ? n : L) * sizeof(T));
    return load(part);
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

// How many rows a block has, and how many vectors of each it takes at a time. R x U x (Q + 1) sums hide an addition's latency and fit 16
// registers. One stream, which the processor's own prefetcher follows best, where memory is the limit; else rows that share each image's load.
template <int Q, class T>
struct Block {
    static constexpr int R = Q > 1 ? 3 : sizeof(T) < 4 ? 4 : 1, U = R == 1 ? 4 : 1;
};

template <bool whole, int Q, bool first, int R, int U, class T>
INLINE void step(const float *image, int64_t stride, const T *const *row, int64_t d, int64_t D, V (*dot)[R * U]) {
    V b[R * U];
#pragma GCC unroll 4
    for (int j = 0; j < R * U; ++j) {
        const int64_t at = d + j / R * L;
        b[j] = whole ? load(row[j % R] + at) : load(row[j % R] + at, D - at);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int j = 0; j < R * U; ++j) dot[q][j] += load(image + q * stride + d + j / R * L) * b[j];
    if (first)
#pragma GCC unroll 4
        for (int j = 0; j < R * U; ++j) dot[Q][j] += b[j] * b[j];
}

// Dot products of Q images with n rows; `first` takes the rows' squared lengths along as though each row were one image more.
template <int Q, bool first, class T>
TARGET static void dots(const Call &call, int64_t image, const T *bank, int n, const char *ahead, Tile &tile) {
    constexpr int R = Block<Q, T>::R, U = Block<Q, T>::U, A = Q + first;
    const int64_t D = call.D;
    const float *a = call.unit + image * call.stride;
    for (int i = 0; i < n; i += R) {
        const T *row[R];
        for (int r = 0; r < R; ++r) row[r] = bank + std::min(i + r, n - 1) * D;  // past the end the last row again, overwritten or unread
        V dot[A][R * U] = {};
        int64_t d = 0;
        for (; d + L * U <= D; d += L * U) {
            if (first && R > 1)  // several streams are too short for the processor's own prefetcher: as one stream, and far enough ahead
                for (int64_t byte = 0; byte < R * L * int64_t(sizeof(T)); byte += 64)
                    __builtin_prefetch(reinterpret_cast<const char *>(row[0]) + R * d * int64_t(sizeof(T)) + byte + AHEAD);
            step<true, Q, first, R, U>(a, call.stride, row, d, D, dot);
        }
        if (d < D) step<false, Q, first, R, U>(a, call.stride, row, d, D, dot);
#pragma GCC unroll 4
        for (int q = 0; q < A; ++q)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                V total = dot[q][r];
                for (int u = 1; u < U; ++u) total += dot[q][u * R + r];
                (first && q == Q ? tile.square : tile.dot[q])[i + r] = sum(total);
            }
        if (!first)
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

template <class T>
TARGET static void tile(const Call &call, int64_t row, int n, bool last, Worker &worker) {
    const T *bank = static_cast<const T *>(call.bank) + row * call.D;
    const char *ahead = reinterpret_cast<const char *>(last ? bank : bank + TILE * call.D);
    Tile &of = worker.tile;
    int64_t image = call.B % GROUP;  // the squares ride with those, so that all other groups are full
    if (image == 0) dots<0, true>(call, 0, bank, n, ahead, of);
    if (image == 1) dots<1, true>(call, 0, bank, n, ahead, of);
    if (image == 2) dots<2, true>(call, 0, bank, n, ahead, of);
    if (image == 3) dots<3, true>(call, 0, bank, n, ahead, of);
    int doubtful[TILE], doubts = 0;
    for (int i = 0; i < TILE; ++i) of.inverse[i] = 1 / std::sqrt(of.square[i]);
    for (int i = 0; i < n; ++i)
        if (!(of.square[i] >= SMALLEST && of.square[i] <= LARGEST)) doubtful[doubts++] = i;
    for (int i = n; i < TILE; ++i) of.inverse[i] = 0;
    double length[TILE];
    for (int j = 0; j < doubts; ++j) {
        length[j] = length_of(bank + doubtful[j] * call.D, call.D);
        of.inverse[doubtful[j]] = length[j] > 0;
    }
    if (call.scales)
        for (int i = 0; i < n; ++i) of.inverse[i] *= sign(call.scales[row + i].x);
    for (int64_t begin = 0, end = image;; begin = end, end += GROUP) {
        for (int j = 0; j < doubts; ++j)
            if (of.inverse[doubtful[j]] != 0)
                for (int64_t q = begin; q < end; ++q)
                    of.dot[q - begin][doubtful[j]] = cosine_of(call.unit + q * call.stride, bank + doubtful[j] * call.D, call.D, length[j]);
        for (int64_t q = begin; q < end; ++q)
            if (call.known[q]) scores(call, q, n, row, of.inverse, of.dot[q - begin], worker);
        if (end == call.B) break;
        dots<GROUP, false>(call, end, bank, n, ahead, of);
        ahead += (n + 2) / 3 * call.lines_ahead * 64;
    }
}

#undef INLINE
}  // namespace ISA
#undef ISA
#undef TARGET
#undef LANES
#undef LOADS
