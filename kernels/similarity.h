/* The fused contrastive-similarity kernel: normalise, scaled dot products, log-sum-exp and top-k in one pass over a bank of embeddings. */
#ifndef PMCLIP_SIMILARITY_H
#define PMCLIP_SIMILARITY_H

#include <stdint.h>

#define PMCLIP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum pmclip_dtype { PMCLIP_F32 = 0, PMCLIP_F16 = 1, PMCLIP_INT8 = 2 };

enum pmclip_status { PMCLIP_OK = 0, PMCLIP_OUT_OF_MEMORY = 1, PMCLIP_BAD_ARGUMENT = 2 };

/* score = logit_scale x cosine of every image with every row; of each image the k largest (of equal ones the lowest row first), and the
 * log of the sum of exp over all of them. A row or an image that is zero or not finite has no direction: it scores -inf, adds nothing to
 * the sum, and is never given. Arrays are dense and row-major and may stand at any address; nothing is kept after the call. Callers on
 * several threads do not disturb each other.
 *
 * Everything is computed in f32: a score is right within (1e-6 + 4e-9 D) of the scale, the second part where products have one sign. Only
 * where four images or more meet int8 rows (of 4096 numbers at most, on x86) is each image rounded to 16 bits, and a score right within about
 * 1e-5, at worst 1.6e-5 sqrt(D).
 *
 *   image        (B, D) f32, of any length
 *   bank         (N, D) of `dtype`, of any length; each row is read once, whatever B is
 *   scales       (N,) f32, or NULL for ones: the row stands for bank[i] x scales[i]
 *   threads      at most so many, 0 for as many as the process may use; a small call takes fewer
 *   score        (B, k) f32, out; -inf where there are fewer than k
 *   index        (B, k) rows of the bank, out; -1 where there are fewer than k
 *   log_sum_exp  (B,) natural log, out; -inf where there is no score; terms of at most 1e-7 of the sum together may be left out
 */
PMCLIP_API int pmclip_similarity(const float *image, int64_t B, const void *bank, int dtype, const float *scales, int64_t N, int64_t D,
                                 float logit_scale, int64_t k, int threads, float *score, int64_t *index, float *log_sum_exp);

/* The instruction set in use: "AVX-512 VNNI", "AVX-512", "AVX2", "NEON" or "plain". */
PMCLIP_API const char *pmclip_similarity_isa(void);

/* Takes another one from now on, NULL the best again; PMCLIP_BAD_ARGUMENT where this processor lacks it. For tests. */
PMCLIP_API int pmclip_similarity_use(const char *isa);

#ifdef __cplusplus
}
#endif
#endif
