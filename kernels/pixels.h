/* From a radiograph's stored values to the few pixels that a tower sees: RLE, a table look-up, and Pillow's resampling, bit for bit. */
#ifndef PMCLIP_PIXELS_H
#define PMCLIP_PIXELS_H

#include <stdint.h>

#define PMCLIP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Along one axis: output pixel i is the sum of `taps` input pixels from first[i] on, times weights[i], whose fraction has 22 bits.
 * `taps` is a multiple of 8. */
typedef struct {
    int64_t size, taps;
    const int64_t *first;   /* (size,) */
    const int32_t *weights; /* (size, taps) */
} pmclip_taps;

/* out[i] = table[values[i]], of 65,536 entries. At most `threads` threads, 0 for as many as there are cores; fewer for little work. */
PMCLIP_API void pmclip_look_up(const uint16_t *values, int64_t n, const uint8_t *table, int threads, uint8_t *out);

/* PackBits, as DICOM's RLE has it: `count` bytes from `size` of them, each `stride` after the last; more than that is padding, and left.
 * 0, or 1 where it ends too soon. */
PMCLIP_API int pmclip_unpack_bits(const uint8_t *in, int64_t size, uint8_t *out, int64_t count, int64_t stride);

/* One channel (height, width) to (down->size, across->size): across first, to `between` (height, across->size), rounded, then down. */
PMCLIP_API void pmclip_resample(const uint8_t *in, int64_t height, int64_t width, const pmclip_taps *across, const pmclip_taps *down,
                                int threads, uint8_t *between, uint8_t *out);

#ifdef __cplusplus
}
#endif
#endif
