/* 8-bit pixels → normalised floats in the layout that a vision encoder reads. */
#include "image.h"

#include "image_threads.h"

#include <string.h>

#define PLANE_LINES 16         /* lines that a thread takes at a time; with patches, one row of blocks */
#define ITEMS_MOST 4096        /* those of more lines are several blocks */
#define SHARED_FROM (1u << 19) /* numbers: fewer take less than it costs to wake threads up */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* a fused multiply-add would round differently from numpy */
#endif

typedef struct {
    const Image *frames;
    size_t count;
    FrameLayout layout;
    float *target;
    float tables[MAX_CHANNELS][256];
} Normalize;

/* Lines of a frame that are one block of work. */
static size_t block_lines(const Normalize *n) { return n->layout.patch == 0 ? PLANE_LINES : n->layout.patch * n->layout.merge; }

static size_t blocks_of_frame(const Normalize *n) { return (n->frames[0].height + block_lines(n) - 1) / block_lines(n); }

static size_t items_of(size_t blocks) { return blocks < ITEMS_MOST ? blocks : ITEMS_MOST; }

static void line_to_plane(const uint8_t *line, size_t width, size_t channels, const float *table, float *out) {
    for (size_t x = 0; x < width; x++) {
        out[x] = table[line[x * channels]];
    }
}

static void line_to_planes(const uint8_t *line, size_t width, const float (*tables)[256], float *restrict red, float *restrict green,
                           float *restrict blue) {
    for (size_t x = 0; x < width; x++) {
        red[x] = tables[0][line[x * 3]];
        green[x] = tables[1][line[x * 3 + 1]];
        blue[x] = tables[2][line[x * 3 + 2]];
    }
}

static void to_planes(const Normalize *n, size_t frame, size_t first) {
    const Image *image = &n->frames[frame];
    const size_t plane = image->height * image->width, end = first + PLANE_LINES < image->height ? first + PLANE_LINES : image->height;
    for (size_t y = first; y < end; y++) {
        const uint8_t *line = image->data + y * image->stride;
        float *out = n->target + frame * image->channels * plane + y * image->width;
        if (image->channels == 3) {
            line_to_planes(line, image->width, n->tables, out, out + plane, out + 2 * plane);
            continue;
        }
        for (size_t channel = 0; channel < image->channels; channel++) {
            line_to_plane(line + channel, image->width, image->channels, n->tables[channel], out + channel * plane);
        }
    }
}

/* One row of blocks of one frame, a patch at a time: its numbers lie together. Where the last frame fills up its step, they are copied. */
static void to_patches(const Normalize *n, size_t frame, size_t first) {
    const Image *image = &n->frames[frame];
    const size_t patch = n->layout.patch, merge = n->layout.merge, depth = n->layout.depth, channels = image->channels;
    const size_t rows = image->height / patch, columns = image->width / patch;
    const size_t square = patch * patch, plane = depth * square;
    const size_t copies = frame + 1 < n->count ? 1 : depth - frame % depth;
    float *step = n->target + frame / depth * rows * columns * channels * plane + frame % depth * square;
    for (size_t row = first / patch; row < first / patch + merge; row++) {
        for (size_t column = 0; column < columns; column++) {
            const size_t block = row / merge * (columns / merge) + column / merge;
            float *to = step + ((block * merge + row % merge) * merge + column % merge) * channels * plane;
            const uint8_t *pixels = image->data + row * patch * image->stride + column * patch * channels;
            for (size_t y = 0; y < patch; y++, pixels += image->stride) {
                float *out = to + y * patch;
                if (channels == 3) {
                    line_to_planes(pixels, patch, n->tables, out, out + plane, out + 2 * plane);
                    continue;
                }
                for (size_t channel = 0; channel < channels; channel++) {
                    line_to_plane(pixels + channel, patch, channels, n->tables[channel], out + channel * plane);
                }
            }
            for (size_t channel = 0; channel < channels; channel++) {
                for (size_t copy = 1; copy < copies; copy++) {
                    memcpy(to + channel * plane + copy * square, to + channel * plane, square * sizeof *to);
                }
            }
        }
    }
}

static size_t items(void *context, size_t step, bool *small) {
    const Normalize *n = context;
    *small = false;
    return items_of(n->count * blocks_of_frame(n));
}

static void work(void *context, size_t step, size_t item, size_t thread) {
    const Normalize *n = context;
    const size_t each = blocks_of_frame(n), blocks = n->count * each, count = items_of(blocks);
    for (size_t block = item * blocks / count; block < (item + 1) * blocks / count; block++) {
        const size_t frame = block / each, first = block % each * block_lines(n);
        if (n->layout.patch == 0) {
            to_planes(n, frame, first);
        } else {
            to_patches(n, frame, first);
        }
    }
}

void normalize_u8(const Image *frames, size_t count, double scale, const float *mean, const float *std, FrameLayout layout, float *target,
                  size_t threads) {
    if (count == 0) {
        return;
    }
    Normalize n = {.frames = frames, .count = count, .layout = layout, .target = target};
    for (size_t channel = 0; channel < frames[0].channels; channel++) {
        /* A byte has 256 values: each is computed once, in exactly numpy's order of operations. */
        for (int value = 0; value < 256; value++) {
            const float rescaled = (float)((double)value * scale);
            const float centred = rescaled - mean[channel];
            n.tables[channel][value] = centred / std[channel];
        }
    }
    const PoolJob job = {.steps = 1, .items = items, .work = work, .context = &n};
    const size_t numbers = count * frames[0].height * frames[0].width * frames[0].channels;
    image_run(&job, numbers < SHARED_FROM ? 1 : threads);
}
