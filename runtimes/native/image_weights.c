/* Pillow's resampling filters, and their weights for one size to another: the last few are kept, for a camera's frames are all alike. */
#include "image_weights.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* a fused multiply-add would round differently from Pillow */
#endif

#define PI 3.14159265358979323846

typedef double (*FilterFunction)(double x);

static double box_filter(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

static double bilinear_filter(double x) {
    x = x < 0.0 ? -x : x;
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double hamming_filter(double x) {
    x = x < 0.0 ? -x : x;
    if (x == 0.0) {
        return 1.0;
    }
    if (x >= 1.0) {
        return 0.0;
    }
    x = x * PI;
    return sin(x) / x * (0.54f + 0.46f * cos(x)); /* Pillow writes these two as floats */
}

/* Keys' cubic convolution kernel with a = −0.5 (IEEE ASSP 29(6), 1981). */
static double bicubic_filter(double x) {
    const double a = -0.5;
    x = x < 0.0 ? -x : x;
    if (x < 1.0) {
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    }
    if (x < 2.0) {
        return (((x - 5) * x + 8) * x - 4) * a;
    }
    return 0.0;
}

static double sinc(double x) {
    if (x == 0.0) {
        return 1.0;
    }
    x = x * PI;
    return sin(x) / x;
}

static double lanczos_filter(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

static const struct {
    FilterFunction weight;
    double support;
} FILTERS[] = {
    [RESAMPLE_BOX] = {box_filter, 0.5},         [RESAMPLE_BILINEAR] = {bilinear_filter, 1.0}, [RESAMPLE_HAMMING] = {hamming_filter, 1.0},
    [RESAMPLE_BICUBIC] = {bicubic_filter, 2.0}, [RESAMPLE_LANCZOS] = {lanczos_filter, 3.0},
};
struct KeptWeights {
    ResampleWeights weights;
    size_t in_size;
    ResampleFilter filter;
    const ImageKernels *kernels;
    size_t users;  /* under the lock; the place where it is kept is one of them */
    size_t stamp;
    size_t bytes;
};

static void weights_free(KeptWeights *kept) {
    free(kept->weights.first);
    free(kept->weights.count);
    free(kept->weights.starts);
    free(kept->weights.words);
    free(kept);
}

/* The weights of one output in double precision, as Pillow makes them; returns how many, and the first input in `*first`. */
static size_t exact_weights(size_t out, size_t in_size, double scale, ResampleFilter filter, double *exact, size_t *first) {
    const double filter_scale = scale < 1.0 ? 1.0 : scale; /* antialiasing only when shrinking */
    const double support = FILTERS[filter].support * filter_scale, inverse = 1.0 / filter_scale;
    const double center = ((double)out + 0.5) * scale;
    const double low = center - support + 0.5, high = center + support + 0.5;
    *first = low > 0.0 ? (size_t)low : 0;
    size_t end = (size_t)high;
    end = end < in_size ? end : in_size;
    const size_t count = end - *first;
    double total = 0.0;
    for (size_t i = 0; i < count; i++) {
        exact[i] = FILTERS[filter].weight(((double)i + (double)*first - center + 0.5) * inverse);
        total += exact[i];
    }
    for (size_t i = 0; i < count && total != 0.0; i++) {
        exact[i] /= total;
    }
    return count;
}

static KeptWeights *weights_new(size_t in_size, size_t out_size, ResampleFilter filter, const ImageKernels *kernels) {
    const double scale = (double)in_size / (double)out_size;
    const size_t most = (size_t)ceil(FILTERS[filter].support * (scale < 1.0 ? 1.0 : scale)) * 2 + 1;
    const size_t groups = (most + TAP_GROUP - 1) / TAP_GROUP;
    KeptWeights *kept = calloc(1, sizeof *kept);
    double *exact = malloc(most * sizeof *exact);
    if (kept == NULL || exact == NULL) {
        free(exact);
        free(kept);
        return NULL;
    }
    ResampleWeights *w = &kept->weights;
    *w = (ResampleWeights){.size = out_size, .stride = groups * kernels->words};
    w->first = malloc(out_size * sizeof *w->first);
    w->count = malloc(out_size * sizeof *w->count);
    w->starts = malloc(out_size * sizeof *w->starts);
    w->words = calloc(out_size * w->stride, sizeof *w->words);
    if (w->first == NULL || w->count == NULL || w->starts == NULL || w->words == NULL) {
        free(exact);
        weights_free(kept);
        return NULL;
    }
    bool fits = true;
    for (size_t out = 0; out < out_size; out++) {
        const size_t count = exact_weights(out, in_size, scale, filter, exact, &w->first[out]);
        int32_t four[TAP_GROUP] = {0}, sum = 0;
        for (size_t i = 0; i < count; i++) {
            const int32_t weight = (int32_t)((exact[i] < 0 ? -0.5 : 0.5) + exact[i] * (1 << PRECISION_BITS));
            fits = fits && weight <= WEIGHT_MOST && weight >= -WEIGHT_MOST;
            sum += weight;
            four[i % TAP_GROUP] = weight;
            if (i % TAP_GROUP == TAP_GROUP - 1 || i + 1 == count) {
                kernels->pack(four, w->words + out * w->stride + i / TAP_GROUP * kernels->words);
                memset(four, 0, sizeof four);
            }
        }
        w->count[out] = count;
        w->starts[out] = (1 << (PRECISION_BITS - 1)) + kernels->bias * sum;
        const size_t read = w->first[out] + (count + TAP_GROUP - 1) / TAP_GROUP * TAP_GROUP;
        w->reach = read > w->reach ? read : w->reach;
    }
    free(exact);
    if (!fits && kernels != &image_kernels_scalar) {
        weights_free(kept);
        return weights_new(in_size, out_size, filter, &image_kernels_scalar);
    }
    kept->in_size = in_size;
    kept->filter = filter;
    kept->kernels = kernels;
    kept->users = 1;
    kept->bytes = out_size * (w->stride * sizeof *w->words + 2 * sizeof *w->first + sizeof *w->starts);
    return kept;
}

#define KEPT 16
#define KEPT_BYTES ((size_t)1 << 20) /* of one; a larger one is made again each time */

static struct {
    atomic_flag busy;
    size_t stamp;
    KeptWeights *places[KEPT];
} kept_weights = {.busy = ATOMIC_FLAG_INIT};

static void lock(void) {
    while (atomic_flag_test_and_set_explicit(&kept_weights.busy, memory_order_acquire)) { /* for a few instructions at most */
    }
}

static void unlock(void) { atomic_flag_clear_explicit(&kept_weights.busy, memory_order_release); }

static KeptWeights *find(size_t in_size, size_t out_size, ResampleFilter filter, const ImageKernels *kernels) {
    for (size_t i = 0; i < KEPT; i++) {
        KeptWeights *one = kept_weights.places[i];
        if (one != NULL && one->in_size == in_size && one->weights.size == out_size && one->filter == filter && one->kernels == kernels) {
            one->stamp = ++kept_weights.stamp;
            one->users++;
            return one;
        }
    }
    return NULL;
}

KeptWeights *weights_take(size_t in_size, size_t out_size, ResampleFilter filter, const ImageKernels *kernels) {
    lock();
    KeptWeights *found = find(in_size, out_size, filter, kernels);
    unlock();
    if (found != NULL) {
        return found;
    }
    found = weights_new(in_size, out_size, filter, kernels);
    if (found == NULL || found->bytes > KEPT_BYTES) {
        return found;
    }
    lock();
    size_t oldest = 0;
    for (size_t i = 1; i < KEPT && kept_weights.places[oldest] != NULL; i++) {
        if (kept_weights.places[i] == NULL || kept_weights.places[i]->stamp < kept_weights.places[oldest]->stamp) {
            oldest = i;
        }
    }
    KeptWeights *gone = kept_weights.places[oldest];
    const bool last = gone != NULL && --gone->users == 0;
    kept_weights.places[oldest] = found;
    found->stamp = ++kept_weights.stamp;
    found->users++;
    unlock();
    if (last) {
        weights_free(gone);
    }
    return found;
}

void weights_give(KeptWeights *kept) {
    lock();
    const bool last = --kept->users == 0;
    unlock();
    if (last) {
        weights_free(kept);
    }
}

const ResampleWeights *weights_of(const KeptWeights *kept) { return &kept->weights; }

const ImageKernels *weights_kernels(const KeptWeights *kept) { return kept->kernels; }
