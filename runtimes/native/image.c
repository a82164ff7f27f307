/* The two passes of a resize, shared out to threads: blocks of lines along rows, lines of the result along columns. */
#include "image.h"

#include "image_threads.h"
#include "image_weights.h"

#include <stdlib.h>
#include <string.h>

#define COLUMN_LINES 8          /* lines of the result that a thread makes at a time */
#define ITEMS_MOST 4096         /* of a pass; those of a larger one are several blocks */
#define SHARED_FROM (1u << 21)  /* products: fewer take less than it costs to wake threads up */

typedef struct {
    Image source;
    uint8_t *target;
    size_t target_stride;
    bool vertical;
    KeptWeights *kept;
    const uint8_t *end; /* of what may be read of the source */
    uint8_t *scratch;   /* of each thread: IMAGE_LINES lines */
    size_t scratch_line;
} Pass;

typedef struct {
    Pass passes[2];
    size_t steps;
} Resize;

static int pass_init(Pass *pass, const Image *source, uint8_t *target, size_t size, bool vertical, ResampleFilter filter, size_t threads,
                     const ImageKernels *kernels) {
    const size_t line = source->width * source->channels;
    *pass = (Pass){.source = *source, .target = target, .vertical = vertical, .end = source->data + (source->height - 1) * source->stride + line};
    pass->target_stride = vertical ? line : size * source->channels;
    /* Only pixels of 3 bytes have kernels along rows. */
    kernels = vertical || source->channels == 3 ? kernels : &image_kernels_scalar;
    pass->kept = weights_take(vertical ? source->height : source->width, size, filter, kernels);
    if (pass->kept != NULL && !vertical && source->channels == 3) {
        pass->scratch_line = weights_of(pass->kept)->reach * 3 + PIXEL_READ;
        pass->scratch = malloc(threads * IMAGE_LINES * pass->scratch_line);
    }
    return pass->kept != NULL && (pass->scratch != NULL || pass->scratch_line == 0) ? 0 : -1;
}

static void pass_free(Pass *pass) {
    if (pass->kept != NULL) {
        weights_give(pass->kept);
    }
    free(pass->scratch);
}

/* How many products a pass takes, about. */
static size_t pass_work(const Pass *pass) {
    const ResampleWeights *w = weights_of(pass->kept);
    return w->size * w->stride * (pass->vertical ? pass->source.width : pass->source.height) * pass->source.channels;
}

static void columns(const Pass *pass, size_t block) {
    const ResampleWeights *w = weights_of(pass->kept);
    const ImageKernels *kernels = weights_kernels(pass->kept);
    const Image *source = &pass->source;
    const size_t first = block * COLUMN_LINES, end = first + COLUMN_LINES < w->size ? first + COLUMN_LINES : w->size;
    for (size_t y = first; y < end; y++) {
        kernels->column(source->data + w->first[y] * source->stride, source->stride, w->count[y], w->words + y * w->stride, w->starts[y],
                        pass->target + y * pass->target_stride, source->width * source->channels);
    }
}

/* Any number of channels, one line. */
static void row(const uint8_t *line, uint8_t *out, size_t channels, const ResampleWeights *w) {
    for (size_t x = 0; x < w->size; x++) {
        const int32_t *weights = w->words + x * w->stride;
        for (size_t channel = 0; channel < channels; channel++) {
            const uint8_t *value = line + w->first[x] * channels + channel;
            int32_t sum = w->starts[x];
            for (size_t i = 0; i < w->count[x]; i++, value += channels) {
                sum += *value * weights[i];
            }
            *out++ = clip_u8(sum);
        }
    }
}

static void rows(const Pass *pass, size_t block, size_t thread) {
    const ResampleWeights *w = weights_of(pass->kept);
    const Image *source = &pass->source;
    const size_t first = block * IMAGE_LINES;
    if (source->channels != 3) {
        for (size_t y = first; y < first + IMAGE_LINES && y < source->height; y++) {
            row(source->data + y * source->stride, pass->target + y * pass->target_stride, source->channels, w);
        }
        return;
    }
    const uint8_t *lines[IMAGE_LINES];
    uint8_t *out[IMAGE_LINES];
    uint8_t *scratch = pass->scratch + thread * IMAGE_LINES * pass->scratch_line;
    for (size_t i = 0; i < IMAGE_LINES; i++) {
        /* Where there are fewer, the last one takes the others' places: the same is written several times. */
        const size_t y = first + i < source->height ? first + i : source->height - 1;
        lines[i] = source->data + y * source->stride;
        out[i] = pass->target + y * pass->target_stride;
        if ((size_t)(pass->end - lines[i]) < pass->scratch_line) {
            uint8_t *copy = scratch + i * pass->scratch_line;
            const size_t line = source->width * 3 < pass->scratch_line ? source->width * 3 : pass->scratch_line;
            memcpy(copy, lines[i], line);
            memset(copy + line, 0, pass->scratch_line - line);
            lines[i] = copy;
        }
    }
    weights_kernels(pass->kept)->rows(lines, out, w);
}

static size_t pass_blocks(const Pass *pass) {
    const size_t lines = pass->vertical ? weights_of(pass->kept)->size : pass->source.height;
    const size_t each = pass->vertical ? COLUMN_LINES : IMAGE_LINES;
    return (lines + each - 1) / each;
}

static size_t items_of(size_t blocks) { return blocks < ITEMS_MOST ? blocks : ITEMS_MOST; }

static size_t items(void *context, size_t step, bool *small) {
    const Pass *pass = &((Resize *)context)->passes[step];
    *small = pass_work(pass) < SHARED_FROM;
    return items_of(pass_blocks(pass));
}

static void work(void *context, size_t step, size_t item, size_t thread) {
    const Pass *pass = &((Resize *)context)->passes[step];
    const size_t blocks = pass_blocks(pass), count = items_of(blocks);
    for (size_t block = item * blocks / count; block < (item + 1) * blocks / count; block++) {
        if (pass->vertical) {
            columns(pass, block);
        } else {
            rows(pass, block, thread);
        }
    }
}

static void copy(const Image *source, uint8_t *target) {
    const size_t line = source->width * source->channels;
    for (size_t y = 0; y < source->height; y++) {
        memcpy(target + y * line, source->data + y * source->stride, line);
    }
}

int resize_u8(const Image *source, uint8_t *target, size_t out_height, size_t out_width, ResampleFilter filter, PassOrder order, size_t threads,
              const ImageKernels *kernels) {
    const bool horizontal = out_width != source->width, vertical = out_height != source->height;
    const size_t channels = source->channels;
    if (!horizontal && !vertical) {
        copy(source, target);
        return 0;
    }
    Resize resize = {.steps = horizontal && vertical ? 2 : 1};
    Pass *passes = resize.passes;
    uint8_t *between = NULL;
    int result = 0;
    threads = threads < 1 ? 1 : threads > POOL_MAX_THREADS ? POOL_MAX_THREADS : threads;
    if (resize.steps == 1) {
        result = pass_init(&passes[0], source, target, vertical ? out_height : out_width, vertical, filter, threads, kernels);
    } else {
        if (order == PASSES_AUTO) {
            const ptrdiff_t shorter = (ptrdiff_t)source->height - (ptrdiff_t)out_height;
            const ptrdiff_t narrower = (ptrdiff_t)source->width - (ptrdiff_t)out_width;
            order = shorter > 0 && shorter > 2 * narrower ? PASSES_VERTICAL_FIRST : PASSES_HORIZONTAL_FIRST;
        }
        const bool columns_first = order == PASSES_VERTICAL_FIRST;
        const size_t height = columns_first ? out_height : source->height, width = columns_first ? source->width : out_width;
        between = malloc(height * width * channels);
        const Image half = {.data = between, .stride = width * channels, .height = height, .width = width, .channels = channels};
        if (between == NULL ||
            pass_init(&passes[0], source, between, columns_first ? out_height : out_width, columns_first, filter, threads, kernels) != 0 ||
            pass_init(&passes[1], &half, target, columns_first ? out_width : out_height, !columns_first, filter, threads, kernels) != 0) {
            result = -1;
        }
    }
    if (result == 0) {
        size_t products = 0;
        for (size_t step = 0; step < resize.steps; step++) {
            products += pass_work(&passes[step]);
        }
        const PoolJob job = {.steps = resize.steps, .items = items, .work = work, .context = &resize};
        image_run(&job, products < SHARED_FROM ? 1 : threads);
    }
    pass_free(&passes[0]);
    pass_free(&passes[1]);
    free(between);
    return result;
}
