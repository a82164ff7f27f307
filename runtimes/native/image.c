#include "image.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* a fused multiply-add would round differently from numpy and Pillow */
#endif

#define PRECISION_BITS (32 - 8 - 2) /* 8 bits of value, 2 of head room for weights that overshoot 1 */
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

/* For each output position: which inputs count (first, count) and their fixed-point weights (row of `taps` integers). */
typedef struct {
    size_t taps;
    size_t *first;
    size_t *count;
    int32_t *weights;
} Coefficients;

static void coefficients_free(Coefficients *c) {
    free(c->first);
    free(c->count);
    free(c->weights);
}

static int coefficients_init(Coefficients *c, size_t in_size, size_t out_size, ResampleFilter filter) {
    const FilterFunction weight = FILTERS[filter].weight;
    const double scale = (double)in_size / (double)out_size;
    const double filter_scale = scale < 1.0 ? 1.0 : scale; /* antialiasing only when shrinking */
    const double support = FILTERS[filter].support * filter_scale;
    c->taps = (size_t)ceil(support) * 2 + 1;
    c->first = malloc(out_size * sizeof *c->first);
    c->count = malloc(out_size * sizeof *c->count);
    c->weights = calloc(out_size * c->taps, sizeof *c->weights);
    double *exact = malloc(c->taps * sizeof *exact);
    if (c->first == NULL || c->count == NULL || c->weights == NULL || exact == NULL) {
        coefficients_free(c);
        free(exact);
        return -1;
    }
    const double inverse = 1.0 / filter_scale;
    for (size_t out = 0; out < out_size; out++) {
        const double center = ((double)out + 0.5) * scale;
        double low = center - support + 0.5, high = center + support + 0.5;
        size_t first = low > 0.0 ? (size_t)low : 0;
        size_t end = (size_t)high;
        end = end < in_size ? end : in_size;
        const size_t count = end - first;
        double total = 0.0;
        for (size_t i = 0; i < count; i++) {
            exact[i] = weight(((double)i + (double)first - center + 0.5) * inverse);
            total += exact[i];
        }
        int32_t *row = c->weights + out * c->taps;
        for (size_t i = 0; i < count; i++) {
            const double share = total != 0.0 ? exact[i] / total : exact[i];
            row[i] = (int32_t)((share < 0 ? -0.5 : 0.5) + share * (1 << PRECISION_BITS));
        }
        c->first[out] = first;
        c->count[out] = count;
    }
    free(exact);
    return 0;
}

static inline uint8_t clip_u8(int32_t sum) {
    const int32_t value = sum >> PRECISION_BITS; /* arithmetic shift: rounds towards −∞, as Pillow's table look-up does */
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

#define ROUNDING (1 << (PRECISION_BITS - 1))

static void resize_rows(const uint8_t *source, size_t height, size_t width, size_t channels, uint8_t *target, size_t out_width,
                        const Coefficients *c) {
    for (size_t y = 0; y < height; y++) {
        const uint8_t *line = source + y * width * channels;
        uint8_t *out = target + y * out_width * channels;
        for (size_t x = 0; x < out_width; x++, out += channels) {
            const int32_t *weights = c->weights + x * c->taps;
            const uint8_t *pixel = line + c->first[x] * channels;
            const size_t count = c->count[x];
            if (channels == 3) {
                int32_t red = ROUNDING, green = ROUNDING, blue = ROUNDING;
                for (size_t i = 0; i < count; i++, pixel += 3) {
                    red += pixel[0] * weights[i];
                    green += pixel[1] * weights[i];
                    blue += pixel[2] * weights[i];
                }
                out[0] = clip_u8(red);
                out[1] = clip_u8(green);
                out[2] = clip_u8(blue);
                continue;
            }
            for (size_t channel = 0; channel < channels; channel++) {
                int32_t sum = ROUNDING;
                for (size_t i = 0; i < count; i++) {
                    sum += pixel[i * channels + channel] * weights[i];
                }
                out[channel] = clip_u8(sum);
            }
        }
    }
}

/* Along columns, a line at a time: the inner loop runs over neighbouring bytes, which the compiler vectorises. */
static void resize_columns(const uint8_t *source, size_t line, uint8_t *target, size_t out_height, int32_t *sums, const Coefficients *c) {
    for (size_t y = 0; y < out_height; y++) {
        const int32_t *weights = c->weights + y * c->taps;
        for (size_t x = 0; x < line; x++) {
            sums[x] = ROUNDING;
        }
        for (size_t i = 0; i < c->count[y]; i++) {
            const uint8_t *row = source + (c->first[y] + i) * line;
            const int32_t weight = weights[i];
            for (size_t x = 0; x < line; x++) {
                sums[x] += row[x] * weight;
            }
        }
        uint8_t *out = target + y * line;
        for (size_t x = 0; x < line; x++) {
            out[x] = clip_u8(sums[x]);
        }
    }
}

static int horizontal_pass(const uint8_t *source, size_t height, size_t width, size_t channels, uint8_t *target, size_t out_width,
                           ResampleFilter filter) {
    Coefficients c = {0};
    if (coefficients_init(&c, width, out_width, filter) != 0) {
        return -1;
    }
    resize_rows(source, height, width, channels, target, out_width, &c);
    coefficients_free(&c);
    return 0;
}

static int vertical_pass(const uint8_t *source, size_t height, size_t line, uint8_t *target, size_t out_height, ResampleFilter filter) {
    Coefficients c = {0};
    int32_t *sums = malloc(line * sizeof *sums);
    if (sums == NULL || coefficients_init(&c, height, out_height, filter) != 0) {
        free(sums);
        return -1;
    }
    resize_columns(source, line, target, out_height, sums, &c);
    coefficients_free(&c);
    free(sums);
    return 0;
}

int resize_u8(const uint8_t *source, size_t height, size_t width, size_t channels, uint8_t *target, size_t out_height, size_t out_width,
              ResampleFilter filter, PassOrder order) {
    const bool horizontal = out_width != width, vertical = out_height != height;
    if (!horizontal && !vertical) {
        memcpy(target, source, height * width * channels);
        return 0;
    }
    if (!vertical) {
        return horizontal_pass(source, height, width, channels, target, out_width, filter);
    }
    if (!horizontal) {
        return vertical_pass(source, height, width * channels, target, out_height, filter);
    }
    if (order == PASSES_AUTO) {
        const ptrdiff_t shorter = (ptrdiff_t)height - (ptrdiff_t)out_height, narrower = (ptrdiff_t)width - (ptrdiff_t)out_width;
        order = shorter > 0 && shorter > 2 * narrower ? PASSES_VERTICAL_FIRST : PASSES_HORIZONTAL_FIRST;
    }
    const bool columns_first = order == PASSES_VERTICAL_FIRST;
    uint8_t *between = malloc(columns_first ? out_height * width * channels : height * out_width * channels);
    int result = -1;
    if (between != NULL && columns_first) {
        result = vertical_pass(source, height, width * channels, between, out_height, filter);
        result = result == 0 ? horizontal_pass(between, out_height, width, channels, target, out_width, filter) : result;
    } else if (between != NULL) {
        result = horizontal_pass(source, height, width, channels, between, out_width, filter);
        result = result == 0 ? vertical_pass(between, height, out_width * channels, target, out_height, filter) : result;
    }
    free(between);
    return result;
}

void normalize_hwc_u8(const uint8_t *source, size_t height, size_t width, size_t channels, double scale, const float *mean,
                      const float *std, float *target) {
    const size_t pixels = height * width;
    for (size_t channel = 0; channel < channels; channel++) {
        /* A byte has 256 values: each is computed once, in exactly numpy's order of operations. */
        float table[256];
        for (int value = 0; value < 256; value++) {
            const float rescaled = (float)((double)value * scale);
            const float centred = rescaled - mean[channel];
            table[value] = centred / std[channel];
        }
        const uint8_t *pixel = source + channel;
        float *plane = target + channel * pixels;
        for (size_t i = 0; i < pixels; i++) {
            plane[i] = table[pixel[i * channels]];
        }
    }
}
