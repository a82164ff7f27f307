/* The inner loops in plain C, and which table of them this CPU runs. */
#include "image_kernels.h"

#include "kernels/kernels.h"

#include <string.h>

static void pack(const int32_t weights[TAP_GROUP], int32_t *words) { memcpy(words, weights, TAP_GROUP * sizeof *words); }

#define CHUNK 256

static void column(const uint8_t *source, size_t stride, size_t count, const int32_t *words, int32_t start, uint8_t *out, size_t n) {
    int32_t sums[CHUNK];
    for (size_t begin = 0; begin < n; begin += CHUNK) {
        const size_t some = n - begin < CHUNK ? n - begin : CHUNK;
        for (size_t x = 0; x < some; x++) {
            sums[x] = start;
        }
        for (size_t i = 0; i < count; i++) {
            const uint8_t *row = source + i * stride + begin;
            const int32_t weight = words[i];
            for (size_t x = 0; x < some; x++) {
                sums[x] += row[x] * weight;
            }
        }
        for (size_t x = 0; x < some; x++) {
            out[begin + x] = clip_u8(sums[x]);
        }
    }
}

static void rows(const uint8_t *const lines[IMAGE_LINES], uint8_t *const out[IMAGE_LINES], const ResampleWeights *w) {
    for (size_t line = 0; line < IMAGE_LINES; line++) {
        uint8_t *to = out[line];
        for (size_t x = 0; x < w->size; x++, to += 3) {
            const int32_t *weights = w->words + x * w->stride;
            const uint8_t *pixel = lines[line] + w->first[x] * 3;
            int32_t red = w->starts[x], green = red, blue = red;
            for (size_t i = 0; i < w->count[x]; i++, pixel += 3) {
                red += pixel[0] * weights[i];
                green += pixel[1] * weights[i];
                blue += pixel[2] * weights[i];
            }
            to[0] = clip_u8(red);
            to[1] = clip_u8(green);
            to[2] = clip_u8(blue);
        }
    }
}

const ImageKernels image_kernels_scalar = {.name = "scalar", .words = TAP_GROUP, .pack = pack, .column = column, .rows = rows};

#if defined(__x86_64__)
extern const ImageKernels image_kernels_avx2, image_kernels_avx512;
static const ImageKernels *const KNOWN[] = {&image_kernels_avx512, &image_kernels_avx2, &image_kernels_scalar};
#elif defined(__aarch64__)
extern const ImageKernels image_kernels_neon;
static const ImageKernels *const KNOWN[] = {&image_kernels_neon, &image_kernels_scalar};
#else
static const ImageKernels *const KNOWN[] = {&image_kernels_scalar};
#endif

#define KERNELS (sizeof KNOWN / sizeof *KNOWN)

/* The decoder's kernels of the same name want the same instructions. */
static const ImageKernels *available(size_t index) { return kernels_named(KNOWN[index]->name) != NULL ? KNOWN[index] : NULL; }

const ImageKernels *image_kernels_best(void) {
    for (size_t i = 0; i < KERNELS; i++) {
        if (available(i) != NULL) {
            return KNOWN[i];
        }
    }
    return &image_kernels_scalar;
}

const ImageKernels *image_kernels_named(const char *name) {
    for (size_t i = 0; i < KERNELS; i++) {
        if (strcmp(KNOWN[i]->name, name) == 0) {
            return available(i);
        }
    }
    return NULL;
}
