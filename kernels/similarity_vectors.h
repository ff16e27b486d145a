// Vectors of one instruction set: loads, products, sums and exp. Part of similarity_tile.h, within its namespace.

#define INLINE TARGET static inline __attribute__((always_inline))
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
constexpr int L = LANES;
constexpr int ROWS = L == 16 ? 4 : 3;  // packed rows that are multiplied with GROUP images at a time: 16 sums of 32 registers, or 12 of 16

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
typedef int8_t S __attribute__((vector_size(4 * LANES)));
#ifdef BYTES
template <> struct Packed<int8_t> { typedef S Vector; typedef I Sums; };
BYTES
#endif

template <class P, class T>
INLINE typename Packed<P>::Vector numbers(const T *p) {
    if constexpr (sizeof(P) == 1) return as<typename Packed<P>::Vector>(p);
    else if constexpr (sizeof(P) == 2) return load16(p);
    else return load(p);
}

// The last numbers of a row, from `full` on, and zeros. Copied before the loop, for a call inside it would put all its sums into memory.
template <int n, class T>
INLINE void copy_edge(const T *row, int64_t full, int64_t D, T *edge) {
    std::memset(edge, 0, n * sizeof(T));
    std::memcpy(edge, row + full, size_t(D - full) * sizeof(T));
}

template <class X> INLINE void put(X v, void *p) { std::memcpy(p, &v, sizeof v); }
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V all(float x) { return V{} + x; }

// In lanes l with the bit h clear a[l] + a[l ^ h], in the others b[l] + b[l ^ h]: two blends, and a shuffle within the second.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
template <int h, class X, int... l>
INLINE X halves(X a, X b, std::integer_sequence<int, l...>) {
    if constexpr (h == 8 || h == 2) return SHUFFLE(a, b, (l & h ? L + (l ^ h) : l)...) + SHUFFLE(a, b, (l & h ? L + l : l ^ h)...);
    const X here = SHUFFLE(a, b, (l & h ? L + l : l)...), there = SHUFFLE(a, b, (l & h ? l : L + l)...);
    return here + SHUFFLE(there, there, (l ^ h)...);
}
#undef SHUFFLE

template <int count, int h, class X>
INLINE void fold(X *x) {
#pragma GCC unroll 8
    for (int i = 0; i < (h < count ? h : count); ++i) x[i] = halves<h>(x[i], x[i + h < count ? i + h : i], std::make_integer_sequence<int, L>());
    if constexpr (h > 1) fold<count, h / 2>(x);
}

// The sums of `count` vectors, at most L, in their order. Each is added up in the same order of lanes, so that equal rows get equal sums.
template <int count = L, class X>
INLINE X sums(const X *parts) {
    X x[count];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) x[i] = parts[i];
    fold<count, L / 2>(x);
    return x[0];
}

INLINE V floats(V v) { return v; }
INLINE V floats(I v) { return __builtin_convertvector(v, V); }

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
