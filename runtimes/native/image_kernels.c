/* The inner loops in plain C, and which table of them this CPU runs. */
#include "image_kernels.h"

#include <stdbool.h>
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

/* The compiler's own test looks at what the operating system saves, too. */
static const ImageKernels *candidates(size_t index) {
    if (index == 0) {
        const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
        return has ? &image_kernels_avx512 : NULL;
    }
    return index == 1 && __builtin_cpu_supports("avx2") ? &image_kernels_avx2 : NULL;
}

#elif defined(__aarch64__)
extern const ImageKernels image_kernels_neon;

#if defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
static const ImageKernels *candidates(size_t index) { return index == 0 && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) ? &image_kernels_neon : NULL; }
#elif defined(__APPLE__) /* every one of their 64-bit computers has the dot product */
static const ImageKernels *candidates(size_t index) { return index == 0 ? &image_kernels_neon : NULL; }
#else
static const ImageKernels *candidates(size_t index) { return NULL; }
#endif

#else
static const ImageKernels *candidates(size_t index) { return NULL; }
#endif

const ImageKernels *image_kernels_best(void) {
    const ImageKernels *best = candidates(0);
    best = best == NULL ? candidates(1) : best;
    return best == NULL ? &image_kernels_scalar : best;
}

const ImageKernels *image_kernels_named(const char *name) {
    for (size_t i = 0; i < 2; i++) {
        const ImageKernels *found = candidates(i);
        if (found != NULL && strcmp(found->name, name) == 0) {
            return found;
        }
    }
    return strcmp(name, image_kernels_scalar.name) == 0 ? &image_kernels_scalar : NULL;
}
