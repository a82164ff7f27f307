/* Running the plan of a graph: which items each step has, and what one of them does. */
#include "plan_graph.h"
#include "platform.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TOGETHER 512       /* rows that are worth computing together: small images go through several at a time */
#define BLOCK_ROWS 128     /* rows of a product's item: their activations stay in the cache while the weights pass by */
#define MUCH (1 << 20)     /* bytes of an arena that are not kept from call to call: what comes after an image is text, which needs memory too */
#define SMALL_NUMBERS 8192 /* a step over fewer numbers is not worth sharing */

typedef struct {
    Plan *plan;
    const GraphRun *run;
    size_t first, images; /* [first, first + images) are computed now */
} GraphCall;

static const PlanBuffer *buffer_of(const GraphCall *call, PlanRef ref) { return &call->plan->buffers[ref.buffer]; }

/* Row `row` of all images' rows. */
static float *row_at(const GraphCall *call, PlanRef ref, size_t row) {
    const PlanBuffer *b = buffer_of(call, ref);
    float *base;
    if (b->kind == BUFFER_INPUT) {
        base = (float *)(uintptr_t)call->run->inputs[b->offset] + call->first * b->rows * b->width;
    } else if (b->kind == BUFFER_OUTPUT) {
        base = call->run->outputs[b->offset] + call->first * b->rows * b->width;
    } else {
        base = (float *)(void *)(call->plan->arena + b->offset * call->images);
    }
    return base + row * b->width + ref.column;
}

static QuantRows codes_of(const GraphCall *call, PlanRef ref) {
    const PlanBuffer *b = buffer_of(call, ref);
    const size_t blocks = (b->width + BLOCK - 1) / BLOCK, rows = call->images * b->rows;
    int8_t *codes = (int8_t *)call->plan->arena + b->offset * call->images;
    float *scales = (float *)(void *)(codes + rows * blocks * BLOCK);
    return (QuantRows){.codes = codes, .scales = scales, .offsets = (int32_t *)(void *)(scales + rows * blocks), .blocks = blocks};
}

static ByteRows bytes_of(const GraphCall *call, PlanRef ref) {
    const PlanBuffer *b = buffer_of(call, ref);
    const size_t stride = byte_stride(b->width), rows = call->images * b->rows;
    uint8_t *codes = call->plan->arena + b->offset * call->images;
    float *scales = (float *)(void *)(codes + rows * stride);
    return (ByteRows){.codes = codes, .scales = scales, .zeros = (int32_t *)(void *)(scales + rows), .stride = stride};
}

static const PanelMatrix *matrix_of(const GraphCall *call, int32_t weight) { return &call->plan->weights[weight].matrix; }

static const float *vector(const GraphCall *call, int32_t weight) {
    return weight >= 0 ? (const float *)(const void *)matrix_of(call, weight)->data : NULL;
}

size_t graph_byte_matrix_bytes(const PanelMatrix *matrix) {
    const size_t panels = (matrix->width + PANEL - 1) / PANEL;
    return panels * (3 * PANEL * sizeof(float) + byte_panel(matrix->depth));
}

ByteMatrix graph_byte_matrix(const PanelMatrix *matrix) {
    const size_t padded = (matrix->width + PANEL - 1) / PANEL * PANEL;
    const float *scales = (const float *)(const void *)matrix->data;
    return (ByteMatrix){.depth = matrix->depth,
                        .width = matrix->width,
                        .scales = scales,
                        .bias = scales + padded,
                        .sums = (const int32_t *)(const void *)(scales + 2 * padded),
                        .codes = (const int8_t *)(const void *)(scales + 3 * padded)};
}

/* The buffer that says how many rows a step has. */
static PlanRef result_of(const PlanStep *step) {
    return step->out[0].buffer >= 0 ? step->out[0] : step->out[1].buffer >= 0 ? step->out[1] : step->out[2];
}

static size_t rows_of(const GraphCall *call, const PlanStep *step) { return call->images * buffer_of(call, result_of(step))->rows; }

static void quantize_row(const GraphCall *call, PlanRef out, size_t width, const float *x, size_t row) {
    if (buffer_of(call, out)->kind == BUFFER_BYTES) {
        const ByteRows bytes = bytes_of(call, out);
        call->plan->kernels->quantize_bytes(x, width, &bytes, row);
    } else {
        const QuantRows codes = codes_of(call, out);
        call->plan->kernels->quantize(x, width, &codes, row);
    }
}

/* --- products --- */

static size_t units_of(const GraphCall *call, const PlanStep *step) {
    const size_t panels = (matrix_of(call, step->weight[0])->width + PANEL - 1) / PANEL;
    return (panels + GRAPH_UNIT - 1) / GRAPH_UNIT;
}

/* A product's items: blocks of rows, and so many parts of the panels that there are enough for all threads. */
static size_t parts_of(const GraphCall *call, const PlanStep *step) {
    const size_t blocks = (rows_of(call, step) + BLOCK_ROWS - 1) / BLOCK_ROWS, units = units_of(call, step);
    const size_t parts = (pool_threads(call->plan->pool) * 4 + blocks - 1) / blocks;
    return parts < units ? parts : units;
}

/* Rows [first, first + rows) of in0 times panels [panel, panel + panels): `out` [rows][stride]. */
static void panel_products(const GraphCall *call, const PlanStep *step, size_t panel, size_t panels, size_t first, size_t rows, float *out, size_t stride) {
    const Kernels *kernels = call->plan->kernels;
    const PanelMatrix *m = matrix_of(call, step->weight[0]);
    for (size_t p = panel; p < panel + panels; p++, out += PANEL) {
        const uint8_t *data = m->data + p * m->panel_bytes;
        if (m->block > 0) {
            const QuantRows x = codes_of(call, step->in[0]);
            (m->format == WEIGHT_INT4 ? kernels->int4 : kernels->int8)(m, data, &x, first, rows, out, stride);
            continue;
        }
        const float *x = row_at(call, step->in[0], first);
        const size_t x_stride = buffer_of(call, step->in[0])->width;
        if (m->format == WEIGHT_FLOAT16) {
            kernels->float16((const uint16_t *)(const void *)data, PANEL, m->depth, x, x_stride, rows, out, stride, false);
        } else {
            kernels->float32((const float *)(const void *)data, PANEL, m->depth, x, x_stride, rows, out, stride, false);
        }
    }
}

static void write_rows(const GraphCall *call, const PlanStep *step, size_t column, size_t width, size_t first, size_t rows, const float *block, size_t stride) {
    for (size_t row = 0; row < rows; row++) {
        memcpy(row_at(call, step->out[0], first + row) + column, block + row * stride, width * sizeof(float));
    }
}

static void add_bias(const Kernels *kernels, const float *bias, float *block, size_t rows, size_t width, size_t stride) {
    for (size_t row = 0; bias != NULL && row < rows; row++) {
        kernels->add(block + row * stride, bias, width, block + row * stride);
    }
}

static void matmul_unit(const GraphCall *call, const PlanStep *step, size_t unit, size_t first, size_t rows, float *block) {
    const Kernels *kernels = call->plan->kernels;
    const size_t width = matrix_of(call, step->weight[0])->width, column = unit * GRAPH_UNIT * PANEL, rest = width - column;
    const size_t some = rest < GRAPH_UNIT * PANEL ? rest : GRAPH_UNIT * PANEL, panels = (some + PANEL - 1) / PANEL, stride = GRAPH_UNIT * PANEL;
    const float *bias = vector(call, step->weight[1]);
    panel_products(call, step, unit * GRAPH_UNIT, panels, first, rows, block, stride);
    add_bias(kernels, bias != NULL ? bias + column : NULL, block, rows, some, stride);
    for (size_t row = 0; step->arg[0] != UNARY_IDENTITY && row < rows; row++) {
        kernels->unary((Unary)step->arg[0], block + row * stride, some, block + row * stride);
    }
    write_rows(call, step, column, some, first, rows, block, stride);
}

/* Weights of one scale per output: the kernel does what follows the product too. */
static void bytes_units(const GraphCall *call, const PlanStep *step, size_t unit, size_t units, size_t first, size_t rows, float *block) {
    const PanelMatrix *m = matrix_of(call, step->weight[0]);
    const ByteMatrix weight = graph_byte_matrix(m);
    const ByteRows x = bytes_of(call, step->in[0]);
    const size_t stride = buffer_of(call, step->out[0])->width, whole = m->width / PANEL, begin = unit * GRAPH_UNIT, stop = begin + units * GRAPH_UNIT;
    const size_t end = stop < whole ? stop : whole;
    const Unary unary = (Unary)step->arg[0];
    const bool add = step->arg[1] != 0;
    if (end > begin) {
        call->plan->kernels->bytes(&weight, begin, end - begin, &x, first, rows, unary, add, row_at(call, step->out[0], first) + begin * PANEL, stride);
    }
    const size_t rest = m->width % PANEL;
    for (size_t row = 0; rest > 0 && stop > whole && row < rows; row += GRAPH_TILE) { /* a panel that is wider than what is left of a row */
        const size_t some = rows - row < GRAPH_TILE ? rows - row : GRAPH_TILE;
        call->plan->kernels->bytes(&weight, whole, 1, &x, first + row, some, unary, false, block, PANEL);
        for (size_t r = 0; r < some; r++) {
            float *out = row_at(call, step->out[0], first + row + r) + whole * PANEL;
            for (size_t i = 0; i < rest; i++) {
                out[i] = add ? out[i] + block[r * PANEL + i] : block[r * PANEL + i];
            }
        }
    }
}

static void product_work(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const size_t parts = parts_of(call, step), units = units_of(call, step), each = (units + parts - 1) / parts, rows = rows_of(call, step);
    const size_t block = item / parts * BLOCK_ROWS, end = block + BLOCK_ROWS < rows ? block + BLOCK_ROWS : rows;
    const size_t unit = item % parts * each, last = unit + each < units ? unit + each : units;
    if ((int)matrix_of(call, step->weight[0])->format == WEIGHT_BYTES) {
        if (unit < last) {
            bytes_units(call, step, unit, last - unit, block, end - block, (float *)(void *)scratch);
        }
        return;
    }
    for (size_t u = unit; u < last; u++) {
        for (size_t row = block; row < end; row += GRAPH_TILE) {
            const size_t some = end - row < GRAPH_TILE ? end - row : GRAPH_TILE;
            matmul_unit(call, step, u, row, some, (float *)(void *)scratch);
        }
    }
}

/* --- attention --- */

static size_t query_blocks(const GraphCall *call, const PlanStep *step) { return (buffer_of(call, step->out[0])->rows + GRAPH_QUERIES - 1) / GRAPH_QUERIES; }

static void attention_item(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const size_t heads = (size_t)step->arg[0], size = (size_t)step->arg[1], blocks = query_blocks(call, step);
    const size_t rows = buffer_of(call, step->out[0])->rows, keys = buffer_of(call, step->in[1])->rows;
    const size_t image = item / blocks / heads, head = item / blocks % heads, first = item % blocks * GRAPH_QUERIES;
    const HeadAttention a = {
        .size = size,
        .group = 1,
        .rows = rows - first < GRAPH_QUERIES ? rows - first : GRAPH_QUERIES,
        .queries = row_at(call, step->in[0], image * rows + first) + head * size,
        .query_stride = buffer_of(call, step->in[0])->width,
        .keys = row_at(call, step->in[1], image * keys) + head * size,
        .values = row_at(call, step->in[2], image * keys) + head * size,
        .key_stride = buffer_of(call, step->in[1])->width,
        .value_stride = buffer_of(call, step->in[2])->width,
        .format = CACHE_FLOAT32,
        .end = keys,
        .half = step->arg[2] != 0,
        .scale = step->real[0],
        .out = row_at(call, step->out[0], image * rows + first) + head * size,
        .out_stride = buffer_of(call, step->out[0])->width,
        .scratch = scratch,
    };
    call->plan->kernels->attention(&a);
}

/* --- rows --- */

static void norm_row(const GraphCall *call, const PlanStep *step, size_t row, float *scratch) {
    const Kernels *kernels = call->plan->kernels;
    const size_t groups = (size_t)step->arg[1], width = step->width, size = width / groups;
    const float *x = row_at(call, step->in[0], row), *bias = vector(call, step->weight[2]);
    if (step->out[1].buffer >= 0) {
        float *sum = row_at(call, step->out[1], row);
        if (step->in[1].buffer >= 0) {
            kernels->add(x, row_at(call, step->in[1], row), width, sum);
        } else {
            memmove(sum, x, width * sizeof *sum);
        }
        if (bias != NULL) {
            kernels->add(sum, bias, width, sum);
        }
        x = sum;
    }
    float *out = step->out[0].buffer >= 0 ? row_at(call, step->out[0], row) : scratch;
    for (size_t g = 0; g < groups; g++) {
        if (step->arg[0] == 0) {
            kernels->rms_norm(x + g * size, vector(call, step->weight[0]), step->real[0], size, out + g * size);
        } else {
            kernels->layer_norm(x + g * size, vector(call, step->weight[0]), vector(call, step->weight[1]), step->real[0], size, out + g * size);
        }
    }
    if (step->out[2].buffer >= 0) {
        quantize_row(call, step->out[2], width, out, row);
    }
}

static void row_work(const GraphCall *call, const PlanStep *step, size_t row, uint8_t *scratch) {
    const Kernels *kernels = call->plan->kernels;
    const size_t width = step->width;
    switch ((GraphKind)step->kind) {
    case GRAPH_QUANTIZE:
        quantize_row(call, step->out[0], width, row_at(call, step->in[0], row), row);
        break;
    case GRAPH_NORM:
        norm_row(call, step, row, (float *)(void *)scratch);
        break;
    case GRAPH_UNARY: {
        float *out = row_at(call, step->out[0], row);
        kernels->scale(row_at(call, step->in[0], row), step->real[0], width, out);
        kernels->unary((Unary)step->arg[0], out, width, out);
        kernels->scale(out, step->real[1], width, out);
        break;
    }
    case GRAPH_ADD:
    case GRAPH_MULTIPLY: {
        const float *y;
        if (step->in[1].buffer >= 0) {
            y = row_at(call, step->in[1], row);
        } else {
            const PanelMatrix *table = matrix_of(call, step->weight[0]);
            y = vector(call, step->weight[0]) + row % table->depth * width; /* one row, or all of an image */
        }
        (step->kind == GRAPH_ADD ? kernels->add : kernels->multiply)(row_at(call, step->in[0], row), y, width, row_at(call, step->out[0], row));
        break;
    }
    default:
        break;
    }
}

/* --- items --- */

static size_t pairs_of(const GraphCall *call, const PlanStep *step) { return matrix_of(call, step->weight[0])->width / 2; }

/* How many units of `count` an item has, for steps whose units are all alike. */
static size_t share(const GraphCall *call, size_t count) { return 1 + count / (pool_threads(call->plan->pool) * 8); }

static void copy_work(const GraphCall *call, const PlanStep *step, size_t item) {
    const size_t pairs = pairs_of(call, step), all = pairs * call->images, each = share(call, all), length = (size_t)step->arg[0];
    const int32_t *places = (const int32_t *)(const void *)matrix_of(call, step->weight[0])->data;
    const PlanBuffer *to = buffer_of(call, step->out[0]);
    for (size_t i = item * each; i < (item + 1) * each && i < all; i++) {
        const size_t image = i / pairs;
        const int32_t *place = places + i % pairs * 2;
        const float *from = step->in[0].buffer >= 0 ? row_at(call, step->in[0], image * buffer_of(call, step->in[0])->rows) : vector(call, step->weight[1]);
        memcpy(row_at(call, step->out[0], image * to->rows) + place[0], from + place[1], length * sizeof(float));
    }
}

static size_t step_items(void *context, size_t index, bool *small) {
    const GraphCall *call = context;
    const PlanStep *step = &call->plan->steps[index];
    const size_t rows = rows_of(call, step);
    *small = rows * step->width < SMALL_NUMBERS;
    if (step->kind == GRAPH_MATMUL) {
        *small = rows * step->width * matrix_of(call, step->weight[0])->depth < 64 * SMALL_NUMBERS;
        return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * parts_of(call, step);
    }
    if (step->kind == GRAPH_ATTENTION) {
        *small = rows * buffer_of(call, step->in[1])->rows * step->width < 64 * SMALL_NUMBERS;
        return call->images * (size_t)step->arg[0] * query_blocks(call, step);
    }
    const size_t units = step->kind == GRAPH_COPY ? pairs_of(call, step) * call->images : rows, each = share(call, units);
    return (units + each - 1) / each;
}

static void do_item(const GraphCall *call, size_t index, size_t item, size_t thread) {
    const PlanStep *step = &call->plan->steps[index];
    uint8_t *scratch = call->plan->scratch + thread * call->plan->thread_bytes;
    if (step->kind == GRAPH_MATMUL) {
        product_work(call, step, item, scratch);
    } else if (step->kind == GRAPH_ATTENTION) {
        attention_item(call, step, item, scratch);
    } else if (step->kind == GRAPH_COPY) {
        copy_work(call, step, item);
    } else {
        const size_t rows = rows_of(call, step), each = share(call, rows);
        for (size_t row = item * each; row < (item + 1) * each && row < rows; row++) {
            row_work(call, step, row, scratch);
        }
    }
}

static void step_work(void *context, size_t index, size_t item, size_t thread) {
    const GraphCall *call = context;
    const Plan *plan = call->plan;
    const double begin = plan->seconds != NULL ? platform_seconds() : 0.0;
    do_item(call, index, item, thread);
    if (plan->seconds != NULL) {
        plan->seconds[thread * plan->step_count + index] += platform_seconds() - begin;
    }
}

size_t graph_scratch(const PlanStep *step) {
    size_t bytes = GRAPH_TILE * GRAPH_UNIT * PANEL * sizeof(float);
    if (step->kind == GRAPH_NORM) {
        bytes = step->width * sizeof(float);
    } else if (step->kind == GRAPH_ATTENTION) {
        bytes = attention_bytes(GRAPH_QUERIES, (size_t)step->arg[1]);
    }
    return (bytes + 63) / 64 * 64;
}

int graph_run(Plan *plan, const GraphRun *run, char message[PLAN_MESSAGE_SIZE]) {
    size_t rows = 1;
    for (uint32_t i = 0; i < plan->buffer_count; i++) {
        rows = plan->buffers[i].kind != BUFFER_INPUT && plan->buffers[i].rows > rows ? plan->buffers[i].rows : rows;
    }
    const size_t together = rows < TOGETHER ? TOGETHER / rows : 1, most = together < run->images ? together : run->images;
    plan->arena = plan_grown(plan->arena, &plan->arena_bytes, plan->token_bytes * most + 64);
    plan->scratch = plan_grown(plan->scratch, &plan->scratch_bytes, plan->thread_bytes * pool_threads(plan->pool) + 64);
    if (plan->arena == NULL || plan->scratch == NULL) {
        snprintf(message, PLAN_MESSAGE_SIZE, "out of memory for %zu images at once", most);
        return -1;
    }
    for (size_t first = 0; first < run->images; first += most) {
        GraphCall call = {.plan = plan, .run = run, .first = first, .images = run->images - first < most ? run->images - first : most};
        const PoolJob job = {.steps = plan->step_count, .items = step_items, .work = step_work, .context = &call};
        pool_run(plan->pool, &job);
    }
    if (plan->arena_bytes >= MUCH) {
        platform_forget(plan->arena, plan->arena_bytes);
    }
    return 0;
}
