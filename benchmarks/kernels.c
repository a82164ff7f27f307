/* What benchmarks/kernels.py times, as a shared library: the kernels' products beside the machine's limits (limits.c). */
#define _POSIX_C_SOURCE 200809L
#include "../runtimes/native/kernels/kernels.h"
#include "limits.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    Limits *limits;
    Pool *pool;
    const Kernels *kernels;
    /* The job. */
    const uint8_t *data;
    size_t rows;
    PanelMatrix matrix;
    QuantRows codes;
    const float *x;
    float *out;
    ByteMatrix bytes_matrix;
    ByteRows byte_rows;
    size_t heads, group;
    bool causal, half;
    void *scratch[POOL_MAX_THREADS];
} Bench;

Bench *bench_open(size_t threads, const char *name) {
    Bench *b = calloc(1, sizeof *b);
    b->kernels = name != NULL && *name != '\0' ? kernels_named(name) : kernels_best();
    b->limits = limits_open(threads);
    if (b->kernels == NULL || b->limits == NULL) {
        return NULL;
    }
    b->pool = b->limits->pool;
    return b;
}

const char *bench_name(const Bench *b) { return b->kernels->name; }

double bench_read(Bench *b, const uint8_t *data, size_t bytes) {
    double least = limits_read(b->limits, data, bytes, 0);
    for (int loop = 1; loop < READ_LOOPS; loop++) {
        const double seconds = limits_read(b->limits, data, bytes, loop);
        least = seconds < least ? seconds : least;
    }
    return least;
}

double bench_peak(Bench *b, int kind) { return limits_peak(b->limits, b->kernels->name, kind); }

static void product_work(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    const size_t panels = b->matrix.width / PANEL, count = pool_threads(b->pool) * PIECES;
    (void)step;
    (void)thread;
    for (size_t p = item * panels / count; p < (item + 1) * panels / count; p++) {
        const uint8_t *panel = b->data + p * b->matrix.panel_bytes;
        float *out = b->out + p * PANEL * b->rows;
        if (b->matrix.format == WEIGHT_INT4) {
            b->kernels->int4(&b->matrix, panel, &b->codes, 0, b->rows, out, PANEL);
        } else if (b->matrix.format == WEIGHT_INT8) {
            b->kernels->int8(&b->matrix, panel, &b->codes, 0, b->rows, out, PANEL);
        } else if (b->matrix.format == WEIGHT_FLOAT16) {
            b->kernels->float16((const uint16_t *)(const void *)panel, PANEL, b->matrix.depth, b->x, b->matrix.depth, b->rows, out, PANEL, false);
        } else {
            b->kernels->float32((const float *)(const void *)panel, PANEL, b->matrix.depth, b->x, b->matrix.depth, b->rows, out, PANEL, false);
        }
    }
}

/* Bytes of a panel of that format and depth. */
size_t bench_panel_bytes(int format, size_t depth, size_t block) {
    const PanelMatrix m = {.format = (WeightFormat)format, .depth = depth, .width = PANEL, .block = block};
    return block > 0 ? panel_bytes_of(&m, format == WEIGHT_INT4 ? 4 : 8) : (depth * PANEL * (format == WEIGHT_FLOAT16 ? 2 : 4) + 63) / 64 * 64;
}

/* Seconds for one product of `rows` rows with a packed matrix (64-byte aligned), activations in 8 bits included. */
double bench_product(Bench *b, int format, size_t depth, size_t width, size_t block, const uint8_t *data, size_t rows, const float *x) {
    const size_t blocks = (depth + BLOCK - 1) / BLOCK;
    b->matrix = (PanelMatrix){.format = (WeightFormat)format, .depth = depth, .width = width, .block = block, .scale = 1.0f,
                              .panel_bytes = bench_panel_bytes(format, depth, block), .data = data};
    b->data = data;
    b->rows = rows;
    b->x = x;
    b->out = malloc(width * rows * sizeof(float));
    b->codes = (QuantRows){.codes = malloc(rows * blocks * BLOCK), .scales = malloc(rows * blocks * 4), .offsets = malloc(rows * blocks * 4), .blocks = blocks};
    memset(b->out, 0, width * rows * sizeof(float));
    const double begin = limits_now(b->limits);
    for (size_t row = 0; block > 0 && row < rows; row++) {
        b->kernels->quantize(x + row * depth, depth, &b->codes, row);
    }
    const double seconds = limits_now(b->limits) - begin + limits_run(b->limits, product_work, b);
    free(b->out);
    free(b->codes.codes);
    free(b->codes.scales);
    free(b->codes.offsets);
    return seconds;
}

static void bytes_work(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    /* Four panels at a time, so that a row is read once for all of them. */
    const size_t panels = b->bytes_matrix.width / PANEL, fours = (panels + 3) / 4, count = pool_threads(b->pool) * PIECES;
    const size_t begin = item * fours / count * 4, last = (item + 1) * fours / count * 4, end = last < panels ? last : panels;
    (void)step;
    (void)thread;
    if (end > begin) {
        b->kernels->bytes(&b->bytes_matrix, begin, end - begin, &b->byte_rows, 0, b->rows, UNARY_IDENTITY, false, b->out + begin * PANEL, b->bytes_matrix.width);
    }
}

/* The same with one scale per row and output; `data` holds codes. */
double bench_bytes(Bench *b, size_t depth, size_t width, const uint8_t *data, size_t rows, const float *x) {
    const size_t stride = byte_stride(depth);
    float *scales = calloc(width, sizeof *scales);
    int32_t *sums = calloc(width, sizeof *sums);
    b->bytes_matrix = (ByteMatrix){.depth = depth, .width = width, .codes = (const int8_t *)data, .scales = scales, .sums = sums};
    b->byte_rows = (ByteRows){.codes = malloc(rows * stride), .scales = malloc(rows * 4), .zeros = malloc(rows * 4), .stride = stride};
    b->rows = rows;
    b->out = malloc(width * rows * sizeof(float));
    memset(b->out, 0, width * rows * sizeof(float));
    const double begin = limits_now(b->limits);
    for (size_t row = 0; row < rows; row++) {
        b->kernels->quantize_bytes(x + row * depth, depth, &b->byte_rows, row);
    }
    const double seconds = limits_now(b->limits) - begin + limits_run(b->limits, bytes_work, b);
    free(b->out);
    free(b->byte_rows.codes);
    free(b->byte_rows.scales);
    free(b->byte_rows.zeros);
    free(scales);
    free(sums);
    return seconds;
}

#define ATTENTION_ROWS 192 /* of an item: tokens times the query heads that share keys */

static size_t attention_pieces(void *context, size_t step, bool *small) {
    const Bench *b = context;
    (void)step;
    *small = false;
    const size_t each = ATTENTION_ROWS / b->group;
    return b->heads / b->group * ((b->rows + each - 1) / each);
}

static void attention_piece(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    const size_t size = 64, kv = b->heads / b->group, each = ATTENTION_ROWS / b->group, head = item % kv, first = item / kv * each;
    const size_t tokens = b->rows - first < each ? b->rows - first : each;
    const float *query = b->x, *key = query + b->rows * b->heads * size, *value = key + b->rows * kv * size;
    b->kernels->attention(&(HeadAttention){.size = size, .group = b->group, .rows = tokens * b->group, .queries = query + (first * b->heads + head * b->group) * size,
                                           .query_stride = b->heads * size, .keys = key + head * size, .values = value + head * size, .key_stride = kv * size,
                                           .value_stride = kv * size, .format = CACHE_FLOAT32, .end = b->causal ? first + tokens : b->rows, .half = b->half, .bytes = b->half && !b->causal,
                                           .causal = b->causal, .position = first, .scale = 0.125f, .out = b->out + (first * b->heads + head * b->group) * size,
                                           .out_stride = b->heads * size, .scratch = b->scratch[thread]});
    (void)step;
}

/* Seconds for attention over `tokens`, `heads` heads of 64 of which `group` share keys; x: queries, keys, values [tokens][heads · 64]. */
double bench_attention(Bench *b, size_t tokens, size_t heads, size_t group, int causal, int half, const float *x) {
    b->rows = tokens;
    b->heads = heads;
    b->group = group;
    b->causal = causal != 0;
    b->half = half != 0;
    b->x = x;
    b->out = malloc(tokens * heads * 64 * sizeof(float));
    memset(b->out, 0, tokens * heads * 64 * sizeof(float));
    for (size_t i = 0; i < pool_threads(b->pool) && b->scratch[i] == NULL; i++) {
        b->scratch[i] = aligned_alloc(64, (attention_bytes(ATTENTION_ROWS, 64) + 63) / 64 * 64);
    }
    const double begin = limits_now(b->limits);
    pool_run(b->pool, &(PoolJob){.steps = 1, .items = attention_pieces, .work = attention_piece, .context = b});
    const double seconds = limits_now(b->limits) - begin;
    free(b->out);
    return seconds;
}
