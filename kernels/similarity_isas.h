// The instruction sets that a tile is compiled for: their loads and integer products. Part of similarity.cpp, which chooses when it runs.

#define ISA plain
#define TARGET
#define LANES 4
#define LOADS \
    INLINE V load(const F32 *p) { return as<V>(p); } \
    template <class T> INLINE V load(const T *p) { return V{number(p[0]), number(p[1]), number(p[2]), number(p[3])}; }
#include "similarity_tile.h"

#if defined(__x86_64__)

#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define LOADS \
    INLINE V load(const F32 *p) { return as<V>(p); } \
    INLINE V load(const F16 *p) { return (V)_mm256_cvtph_ps(as<__m128i>(p)); } \
    INLINE V load(const I8 *p) { return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(as<int64_t>(p)))); }
#define PRODUCTS \
    INLINE W load16(const I8 *p) { return (W)_mm256_cvtepi8_epi16(as<__m128i>(p)); } \
    INLINE I multiply(W a, W b, I sums) { return sums + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#include "similarity_tile.h"

#define LOADS_512 \
    INLINE V load(const F32 *p) { return as<V>(p); } \
    INLINE V load(const F16 *p) { return (V)_mm512_cvtph_ps(as<__m256i>(p)); } \
    INLINE V load(const I8 *p) { return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(as<__m128i>(p))); }

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx2,fma,f16c")))
#define LANES 16
#define LOADS LOADS_512
#define PRODUCTS \
    INLINE W load16(const I8 *p) { return (W)_mm512_cvtepi8_epi16(as<__m256i>(p)); } \
    INLINE I multiply(W a, W b, I sums) { return sums + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#include "similarity_tile.h"

#define ISA vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,avx2,fma,f16c")))
#define LANES 16
#define LOADS LOADS_512
#define BYTES \
    INLINE unsigned mask(I lanes) { return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes); } \
    INLINE I multiply(S unsigned_a, S b, I sums) { return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)unsigned_a, (__m512i)b); }
#include "similarity_tile.h"

#elif defined(__aarch64__)

#define ISA neon
#define TARGET
#define LANES 4
#define LOADS \
    INLINE V load(const F32 *p) { return as<V>(p); } \
    INLINE V load(const F16 *p) { return (V)vcvt_f32_f16(vreinterpret_f16_u16(as<uint16x4_t>(p))); } \
    INLINE V load(const I8 *p) { \
        return (V)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(uint64_t(as<uint32_t>(p))))))); \
    }
#include "similarity_tile.h"

#endif
