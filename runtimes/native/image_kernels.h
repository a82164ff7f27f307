/* Resampling's inner loops, one table per instruction set. All give the same integers: what differs is how a 24-bit weight is taken apart.
 *
 * A result is (start + Σ value · weight) >> 22, clipped to 8 bits, where the sum is of 32-bit integers. Taps come in groups of 4 (the last
 * one filled up with weights of 0); the weights of a group are stored as `words` 32-bit words:
 *   scalar   the 4 weights
 *   avx2     weight = high · 2^15 + low, both 16 bits, in pairs: [low 0 1][low 2 3][high 0 1][high 2 3]: VPMADDWD adds two products
 *   avx512   weight = third · 2^16 + second · 2^8 + first, signed bytes: VPDPBUSD adds four products; neon the same with SDOT, which
 *            wants signed values as well: 128 is taken off them and its share (`bias`) put into `start`. */
#ifndef VLM_IMAGE_KERNELS_H
#define VLM_IMAGE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define PRECISION_BITS (32 - 8 - 2) /* 8 bits of value, 2 of head room for weights that overshoot 1 */
#define TAP_GROUP 4
#define IMAGE_LINES 8          /* lines that a pass along rows takes together: their weights are the same */
#define PIXEL_READ 16          /* bytes that are read at a group's first pixel; 12 of them count */
#define WEIGHT_MOST 8000000    /* in magnitude, that three signed bytes hold; larger ones (never seen) are left to the scalar code */

/* For each output: the first input that counts, how many groups of taps, what the sum begins with, and the weights' words. */
typedef struct {
    size_t size;    /* outputs */
    size_t stride;  /* words of one output */
    size_t reach;   /* pixels that are read from a line's beginning on, at most: those beyond its end have weights of 0 */
    size_t *first, *count;
    int32_t *starts, *words;
} ResampleWeights;

typedef struct {
    const char *name;
    size_t words;
    int32_t bias;
    void (*pack)(const int32_t weights[TAP_GROUP], int32_t *words);
    /* One line of a pass along columns: out[x] from source[i · stride + x], i < count, x < n. */
    void (*column)(const uint8_t *source, size_t stride, size_t count, const int32_t *words, int32_t start, uint8_t *out, size_t n);
    /* A pass along rows of pixels of 3 bytes, IMAGE_LINES lines at a time. Each line has w->reach pixels and PIXEL_READ bytes to read. */
    void (*rows)(const uint8_t *const lines[IMAGE_LINES], uint8_t *const out[IMAGE_LINES], const ResampleWeights *w);
} ImageKernels;

extern const ImageKernels image_kernels_scalar;

/* The best that this CPU has, and one by name (NULL: unknown, or the CPU lacks it). */
const ImageKernels *image_kernels_best(void);
const ImageKernels *image_kernels_named(const char *name);

static inline uint8_t clip_u8(int32_t sum) {
    const int32_t value = sum >> PRECISION_BITS; /* arithmetic shift: rounds towards −∞, as Pillow's table look-up does */
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Three signed bytes of each weight, in the order of their worth. */
static inline void pack_bytes(const int32_t weights[TAP_GROUP], int32_t *words) {
    uint32_t digits[3] = {0, 0, 0};
    for (size_t i = 0; i < TAP_GROUP; i++) {
        int32_t rest = weights[i];
        for (size_t d = 0; d < 3; d++) {
            const int32_t digit = ((rest & 255) ^ 128) - 128;
            digits[d] |= (uint32_t)(digit & 255) << (8 * i);
            rest = (rest - digit) / 256;
        }
    }
    for (size_t d = 0; d < 3; d++) {
        words[d] = (int32_t)digits[d];
    }
}

#endif
