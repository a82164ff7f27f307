/* The products of a graph's plan, by blocks of rows and parts of the panels, and chains of two of them. */
#include "plan_graph_call.h"
#include "platform.h"

#include <string.h>

#define BLOCK_ROWS 128     /* rows of a product's item: their activations stay in the cache while the weights pass by */

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

/* Whether two buffers share no memory. Rows of one are written while those of the other are still read. */
static bool apart(const PlanBuffer *a, const PlanBuffer *b) {
    if (b->kind != BUFFER_FLOATS) {
        return true; /* memory of the caller */
    }
    const uint64_t a_end = a->offset + a->rows * (byte_stride(a->width) + 8), b_end = b->offset + (uint64_t)b->rows * b->width * sizeof(float);
    return a_end <= b->offset || b_end <= a->offset;
}

static bool multiplies_bytes(const Plan *p, const PlanStep *s) {
    return s->kind == GRAPH_MATMUL && (int)p->weights[s->weight[0]].matrix.format == WEIGHT_BYTES;
}

void graph_chains(Plan *p) {
    for (uint32_t i = 0; i < p->step_count; i++) {
        p->steps[i].chain = CHAIN_NONE; /* for another length some were found */
    }
    for (uint32_t i = 0; i + 2 < p->step_count; i++) {
        PlanStep *up = &p->steps[i], *codes = up + 1, *down = up + 2;
        if (!multiplies_bytes(p, up) || codes->kind != GRAPH_QUANTIZE || !multiplies_bytes(p, down)) {
            continue;
        }
        const PlanBuffer *wide = &p->buffers[up->out[0].buffer], *between = &p->buffers[down->in[0].buffer];
        if (up->arg[1] == 0 && up->out[0].buffer == codes->in[0].buffer && up->out[0].column == 0 && codes->in[0].column == 0 && codes->width == up->width &&
            wide->kind == BUFFER_FLOATS && wide->width == up->width && codes->out[0].buffer == down->in[0].buffer && between->kind == BUFFER_BYTES &&
            wide->uses == 2 && between->uses == 2 && apart(&p->buffers[up->in[0].buffer], &p->buffers[down->out[0].buffer])) {
            up->chain = CHAIN_FIRST;
            codes->chain = down->chain = CHAIN_INNER;
            i += 2;
        }
    }
}

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

/* Weights of one scale per output: the kernel does what follows the product too. Rows [first, first + rows) of the result come from the rows of
 * `x` from `from` on. */
static void bytes_units(const GraphCall *call, const PlanStep *step, const ByteRows *x, size_t from, size_t unit, size_t units, size_t first, size_t rows,
                        float *block) {
    const PanelMatrix *m = matrix_of(call, step->weight[0]);
    const ByteMatrix weight = graph_byte_matrix(m);
    const size_t stride = buffer_of(call, step->out[0])->width, whole = m->width / PANEL, begin = unit * GRAPH_UNIT, stop = begin + units * GRAPH_UNIT;
    const size_t end = stop < whole ? stop : whole;
    const Unary unary = (Unary)step->arg[0];
    const bool add = step->arg[1] != 0;
    if (end > begin) {
        call->plan->kernels->bytes(&weight, begin, end - begin, x, from, rows, unary, add, row_at(call, step->out[0], first) + begin * PANEL, stride);
    }
    const size_t rest = m->width % PANEL;
    for (size_t row = 0; rest > 0 && stop > whole && row < rows; row += GRAPH_TILE) { /* a panel that is wider than what is left of a row */
        const size_t some = rows - row < GRAPH_TILE ? rows - row : GRAPH_TILE;
        call->plan->kernels->bytes(&weight, whole, 1, x, from + row, some, unary, false, block, PANEL);
        for (size_t r = 0; r < some; r++) {
            float *out = row_at(call, step->out[0], first + row + r) + whole * PANEL;
            for (size_t i = 0; i < rest; i++) {
                out[i] = add ? out[i] + block[r * PANEL + i] : block[r * PANEL + i];
            }
        }
    }
}

size_t product_items(const GraphCall *call, const PlanStep *step) {
    return (rows_of(call, step) + BLOCK_ROWS - 1) / BLOCK_ROWS * parts_of(call, step);
}

void product_work(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const size_t parts = parts_of(call, step), units = units_of(call, step), each = (units + parts - 1) / parts, rows = rows_of(call, step);
    const size_t block = item / parts * BLOCK_ROWS, end = block + BLOCK_ROWS < rows ? block + BLOCK_ROWS : rows;
    const size_t unit = item % parts * each, last = unit + each < units ? unit + each : units;
    if ((int)matrix_of(call, step->weight[0])->format == WEIGHT_BYTES) {
        if (unit < last) {
            const ByteRows x = bytes_of(call, step->in[0]);
            bytes_units(call, step, &x, block, unit, last - unit, block, end - block, (float *)(void *)scratch);
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

/* --- chains --- */

/* Rows of a chain's item: what lies between its products stays in the second cache, and weights that were fetched serve enough rows. */
static size_t chain_rows(const GraphCall *call, const PlanStep *step) {
    return rows_of(call, step) / (pool_threads(call->plan->pool) * 4) >= GRAPH_CHAIN_ROWS ? GRAPH_CHAIN_ROWS : GRAPH_CHAIN_ROWS / 3;
}

size_t chain_items(const GraphCall *call, const PlanStep *step) { return (rows_of(call, step) + chain_rows(call, step) - 1) / chain_rows(call, step); }

/* Some rows through a product, into 8 bits, and through the next product. */
void chain_work(const GraphCall *call, size_t index, size_t item, size_t thread, uint8_t *scratch) {
    const Plan *plan = call->plan;
    const PlanStep *up = &plan->steps[index], *down = up + 2;
    const size_t each = chain_rows(call, up), all = rows_of(call, up), first = item * each, rows = all - first < each ? all - first : each;
    const size_t width = up->width, padded = (width + PANEL - 1) / PANEL * PANEL, stride = byte_stride(width);
    const ByteMatrix weight = graph_byte_matrix(matrix_of(call, up->weight[0]));
    const ByteRows x = bytes_of(call, up->in[0]);
    float *between = (float *)(void *)(scratch + GRAPH_TILE * PANEL * sizeof(float)), *scales = between + GRAPH_CHAIN_ROWS * padded;
    const ByteRows codes = {.scales = scales, .zeros = (int32_t *)(void *)(scales + GRAPH_CHAIN_ROWS), .codes = (uint8_t *)(scales + 2 * GRAPH_CHAIN_ROWS), .stride = stride};
    double begin = plan->seconds != NULL ? platform_seconds() : 0.0;
    plan->kernels->bytes(&weight, 0, padded / PANEL, &x, first, rows, (Unary)up->arg[0], false, between, padded);
    begin = graph_counted(plan, thread, index, begin);
    for (size_t row = 0; row < rows; row++) {
        plan->kernels->quantize_bytes(between + row * padded, width, &codes, row);
    }
    begin = graph_counted(plan, thread, index + 1, begin);
    bytes_units(call, down, &codes, 0, 0, units_of(call, down), first, rows, (float *)(void *)scratch);
    graph_counted(plan, thread, index + 2, begin);
}
