/* Resizing and normalising with the kernels of one instruction set against the scalar ones, on images with nothing behind their last
 * pixel; with several callers at once, which share threads and weights. */
#include "../../../../runtimes/native/image.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALLERS 4

static int failures = 0;

typedef struct {
    uint64_t state;
    const ImageKernels *kernels;
    size_t rounds;
    int failures;
} Caller;

static uint64_t bits64(uint64_t *state) { /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

static size_t below(uint64_t *state, size_t n) { return (size_t)(bits64(state) >> 33) % n; }

static void *memory(size_t bytes) {
    void *found = malloc(bytes);
    if (found == NULL) {
        abort();
    }
    return found;
}

/* Often the same few sizes, so that weights are found again. */
static size_t side(uint64_t *state) {
    static const size_t USUAL[] = {1, 2, 3, 5, 16, 31, 64, 100};
    return below(state, 2) == 0 ? USUAL[below(state, 8)] : 1 + below(state, 140);
}

static void resizing(Caller *caller) {
    uint64_t *state = &caller->state;
    const size_t channels = below(state, 4) == 0 ? 1 : 3, height = side(state), width = side(state), gap = below(state, 3) * 5;
    const size_t out_height = side(state), out_width = side(state), size = out_height * out_width * channels;
    const size_t stride = width * channels + gap;
    uint8_t *pixels = memory((height - 1) * stride + width * channels), *found = memory(size), *expected = memory(size);
    const size_t extreme = below(state, 2);
    for (size_t i = 0; i < (height - 1) * stride + width * channels; i++) {
        const uint8_t value = (uint8_t)bits64(state);
        pixels[i] = extreme ? (value < 128 ? 0 : 255) : value;
    }
    const Image image = {.data = pixels, .stride = stride, .height = height, .width = width, .channels = channels};
    const ResampleFilter filter = (ResampleFilter)below(state, 5);
    const PassOrder order = (PassOrder)below(state, 3);
    const size_t threads = 1 + below(state, 4);
    if (resize_u8(&image, found, out_height, out_width, filter, order, threads, caller->kernels) != 0 ||
        resize_u8(&image, expected, out_height, out_width, filter, order, 1, &image_kernels_scalar) != 0 || memcmp(found, expected, size) != 0) {
        printf("resize %zu x %zu x %zu to %zu x %zu, filter %d, order %d\n", height, width, channels, out_height, out_width, (int)filter, (int)order);
        caller->failures++;
    }
    free(pixels);
    free(found);
    free(expected);
}

static void normalizing(Caller *caller) {
    uint64_t *state = &caller->state;
    const FrameLayout layout = {.patch = 1 + below(state, 6), .merge = 1 + below(state, 2), .depth = 1 + below(state, 3)};
    const size_t channels = 1 + below(state, 4), block = layout.patch * layout.merge, count = 1 + below(state, 4);
    const size_t height = block * (1 + below(state, 20)), width = block * (1 + below(state, 20)), pixels = height * width * channels;
    const size_t steps = (count + layout.depth - 1) / layout.depth;
    uint8_t *values = memory(pixels * count);
    float *planes = memory(pixels * count * sizeof *planes), *patches = memory(pixels * steps * layout.depth * sizeof *patches);
    const float mean[4] = {0.5f, 0.25f, 0.125f, 0}, std[4] = {0.5f, 0.3f, 0.7f, 1};
    Image frames[4];
    for (size_t i = 0; i < count; i++) {
        frames[i] = (Image){.data = values + i * pixels, .stride = width * channels, .height = height, .width = width, .channels = channels};
    }
    for (size_t i = 0; i < pixels * count; i++) {
        values[i] = (uint8_t)bits64(state);
    }
    normalize_u8(frames, count, 1.0 / 255, mean, std, (FrameLayout){0, 1, 1}, planes, 1 + below(state, 3));
    normalize_u8(frames, count, 1.0 / 255, mean, std, layout, patches, 1 + below(state, 3));
    const size_t rows = height / layout.patch, columns = width / layout.patch, square = layout.patch * layout.patch;
    for (size_t i = 0; i < pixels * steps * layout.depth; i++) {
        const size_t inside = i % square, deep = i / square % layout.depth, channel = i / square / layout.depth % channels;
        const size_t index = i / square / layout.depth / channels, patch = index % (rows * columns), step = index / (rows * columns);
        const size_t within = patch % (layout.merge * layout.merge), at = patch / (layout.merge * layout.merge);
        const size_t row = at / (columns / layout.merge) * layout.merge + within / layout.merge;
        const size_t column = at % (columns / layout.merge) * layout.merge + within % layout.merge;
        size_t frame = step * layout.depth + deep;
        frame = frame < count ? frame : count - 1;
        const size_t y = row * layout.patch + inside / layout.patch, x = column * layout.patch + inside % layout.patch;
        const uint8_t value = frames[frame].data[(y * width + x) * channels + channel];
        const float expected = ((float)((double)value * (1.0 / 255)) - mean[channel]) / std[channel];
        if (patches[i] != expected || planes[((frame * channels + channel) * height + y) * width + x] != expected) {
            printf("normalize %zu frames of %zu x %zu x %zu: number %zu\n", count, height, width, channels, i);
            caller->failures++;
            break;
        }
    }
    free(values);
    free(planes);
    free(patches);
}

static void *call(void *argument) {
    Caller *caller = argument;
    for (size_t i = 0; i < caller->rounds && caller->failures < 5; i++) {
        resizing(caller);
        if (i % 4 == 0) {
            normalizing(caller);
        }
    }
    return NULL;
}

int main(int count, char **arguments) {
    const ImageKernels *kernels = image_kernels_named(count > 1 ? arguments[1] : "scalar");
    if (kernels == NULL) {
        return 2;
    }
    Caller callers[CALLERS];
    pthread_t threads[CALLERS];
    for (size_t i = 0; i < CALLERS; i++) {
        callers[i] = (Caller){.state = 88172645463325252u + i, .kernels = kernels, .rounds = count > 2 ? strtoul(arguments[2], NULL, 10) : 300};
        if (pthread_create(&threads[i], NULL, call, &callers[i]) != 0) {
            return 3;
        }
    }
    for (size_t i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        failures += callers[i].failures;
    }
    return failures > 0;
}
