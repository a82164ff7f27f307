/* The products of a decoder's steps: how threads share them, and what follows them. */
#include "plan_head.h"
#include "plan_work.h"

#include <string.h>

#define TILE_ROWS 96       /* rows of a product that are finished (bias, activation) before the next ones */
#define SMALL_BYTES 16384  /* a product of fewer weight bytes times rows */
#define MANY_ROWS 16       /* from here on a product's items are as short as they may be: threads that share them end together */
#define ITEM_PRODUCTS ((size_t)1 << 20) /* multiplications of such an item: some 5 microseconds */
#define BLOCK_ROWS 48      /* of which a product's items have at least so many: fewer would wait for the weights */
#define ROW_TILE 12        /* and a multiple of this, which kernels take at a time */

static const float *vector(const Plan *plan, int32_t weight) {
    return weight >= 0 ? (const float *)(const void *)plan->weights[weight].matrix.data : NULL;
}

static void panel_product(const PlanCall *call, const PlanStep *step, const PlanWeight *weight, size_t panel, size_t first, size_t rows, float *out,
                          size_t stride) {
    const Kernels *kernels = call->plan->kernels;
    const PanelMatrix *m = &weight->matrix;
    const uint8_t *data = m->data + panel * m->panel_bytes;
    if (m->block > 0) {
        const QuantRows x = plan_codes(call, step->in[0]);
        (m->format == WEIGHT_INT4 ? kernels->int4 : kernels->int8)(m, data, &x, first, rows, out, stride);
        return;
    }
    /* Rows of what is given follow each other only within a row of the batch: one at a time there. So they are where each token is to
     * come out as if it were alone: the kernels add up several rows of floats in another order than one. */
    const bool split = call->run->each || plan_is_given(&call->plan->buffers[step->in[0].buffer]);
    for (size_t row = 0; row < rows; row += split ? 1 : rows) {
        const float *x = plan_row(call, step->in[0], step->last, first + row);
        const size_t some = split ? 1 : rows;
        if (m->format == WEIGHT_FLOAT16) {
            kernels->float16((const uint16_t *)(const void *)data, PANEL, m->depth, x, plan_stride(call, step->in[0]), some, out + row * stride, stride, false);
        } else {
            kernels->float32((const float *)(const void *)data, PANEL, m->depth, x, plan_stride(call, step->in[0]), some, out + row * stride, stride, false);
        }
    }
}

/* [rows][16] → the row buffers, with what follows the product. */
static void finish(const PlanCall *call, const PlanStep *step, size_t panel, size_t first, size_t rows, float *block, size_t width) {
    const Kernels *kernels = call->plan->kernels;
    if (step->kind == STEP_MATMUL && step->arg[0] != UNARY_IDENTITY) {
        kernels->unary((Unary)step->arg[0], block, rows * PANEL, block);
    }
    if (step->in[1].buffer < 0 && width == PANEL) {
        float *out = plan_row(call, step->out[0], step->last, first) + panel * PANEL;
        for (size_t row = 0; row < rows; row++) {
            memcpy(out + row * plan_stride(call, step->out[0]), block + row * PANEL, PANEL * sizeof *out); /* a count that the compiler knows */
        }
        return;
    }
    for (size_t row = 0; row < rows; row++) {
        float *out = plan_row(call, step->out[0], step->last, first + row) + panel * PANEL;
        if (step->in[1].buffer >= 0) {
            kernels->add(block + row * PANEL, plan_row(call, step->in[1], step->last, first + row) + panel * PANEL, width, out);
        } else {
            memcpy(out, block + row * PANEL, width * sizeof *out);
        }
    }
}

static void add_bias(const Kernels *kernels, const float *bias, float *block, size_t rows, size_t width) {
    for (size_t row = 0; bias != NULL && row < rows; row++) {
        kernels->add(block + row * PANEL, bias, width, block + row * PANEL);
    }
}

/* The rows [begin, end) of a product. */
static void matmul_panel(const PlanCall *call, const PlanStep *step, size_t panel, size_t begin, size_t end, uint8_t *scratch) {
    const PlanWeight *weight = &call->plan->weights[step->weight[0]];
    const size_t rest = weight->matrix.width - panel * PANEL, width = rest < PANEL ? rest : PANEL;
    const float *bias = vector(call->plan, step->weight[1]);
    if (head_is_split(step)) {
        (call->run->ranked ? head_rough : head_whole)(call, step, panel, scratch);
        return;
    }
    if (width == PANEL && bias == NULL && step->arg[0] == UNARY_IDENTITY && step->in[1].buffer < 0) {
        float *out = plan_row(call, step->out[0], step->last, begin) + panel * PANEL;
        panel_product(call, step, weight, panel, begin, end - begin, out, plan_stride(call, step->out[0]));
        return;
    }
    float *block = (float *)(void *)scratch;
    for (size_t first = begin; first < end; first += TILE_ROWS) {
        const size_t some = end - first < TILE_ROWS ? end - first : TILE_ROWS;
        panel_product(call, step, weight, panel, first, some, block, PANEL);
        add_bias(call->plan->kernels, bias != NULL ? bias + panel * PANEL : NULL, block, some, width);
        finish(call, step, panel, first, some, block, width);
    }
}

/* Panels 2 i and 2 i + 1: the gate and what it lets through. */
static void gated_panel(const PlanCall *call, const PlanStep *step, size_t pair, size_t begin, size_t end, uint8_t *scratch) {
    const Kernels *kernels = call->plan->kernels;
    const PlanWeight *weight = &call->plan->weights[step->weight[0]];
    const size_t rest = step->width - pair * PANEL, width = rest < PANEL ? rest : PANEL;
    const float *bias = vector(call->plan, step->weight[1]);
    float *gate = (float *)(void *)scratch, *up = gate + TILE_ROWS * PANEL;
    for (size_t first = begin; first < end; first += TILE_ROWS) {
        const size_t some = end - first < TILE_ROWS ? end - first : TILE_ROWS;
        panel_product(call, step, weight, 2 * pair, first, some, gate, PANEL);
        panel_product(call, step, weight, 2 * pair + 1, first, some, up, PANEL);
        add_bias(kernels, bias != NULL ? bias + 2 * pair * PANEL : NULL, gate, some, PANEL);
        add_bias(kernels, bias != NULL ? bias + (2 * pair + 1) * PANEL : NULL, up, some, PANEL);
        kernels->gated((Unary)step->arg[0], gate, up, some * PANEL, gate);
        finish(call, step, pair, first, some, gate, width);
    }
}

static size_t panels_of(const Plan *plan, const PlanStep *step) {
    const size_t panels = (plan->weights[step->weight[0]].matrix.width + PANEL - 1) / PANEL;
    return step->kind == STEP_GATED ? panels / 2 : panels;
}

size_t plan_panels_per_item(const Plan *plan, const PlanStep *step) { return 1 + panels_of(plan, step) / (pool_threads(plan->pool) * 8); }

/* How a product is shared. Of many rows each thread begins with its own, the same ones in every step: what it reads it wrote itself. */
typedef struct {
    size_t blocks, block_rows; /* of rows */
    size_t parts, each;        /* of a block: items, and panels (pairs of a gated product) of each */
} Sharing;

static Sharing sharing_of(const PlanCall *call, const PlanStep *step) {
    const PanelMatrix *m = &call->plan->weights[step->weight[0]].matrix;
    const size_t rows = plan_rows_of(call, step), panels = panels_of(call->plan, step), threads = pool_threads(call->plan->pool);
    Sharing s = {.blocks = 1, .block_rows = rows, .each = plan_panels_per_item(call->plan, step)};
    if (rows >= MANY_ROWS && m->block > 0 && !head_is_split(step)) { /* sums of floats would depend on where a block of rows begins */
        const size_t most = rows / BLOCK_ROWS > 0 ? rows / BLOCK_ROWS : 1, wanted = most < threads ? most : threads;
        s.block_rows = ((rows + wanted - 1) / wanted + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
        s.blocks = (rows + s.block_rows - 1) / s.block_rows;
        const size_t few = 1 + ITEM_PRODUCTS / (s.block_rows * m->depth * PANEL);
        s.each = few < s.each ? few : s.each;
    }
    s.parts = (panels + s.each - 1) / s.each;
    return s;
}

size_t plan_product_items(const PlanCall *call, const PlanStep *step, bool *small) {
    const Sharing s = sharing_of(call, step);
    *small = call->plan->weights[step->weight[0]].bytes * plan_rows_of(call, step) < SMALL_BYTES;
    return s.blocks * s.parts;
}

void plan_product(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Sharing s = sharing_of(call, step);
    const size_t rows = plan_rows_of(call, step), panels = panels_of(call->plan, step), panel = item % s.parts * s.each;
    const size_t begin = item / s.parts * s.block_rows, end = begin + s.block_rows < rows ? begin + s.block_rows : rows;
    for (size_t p = panel; p < panel + s.each && p < panels; p++) {
        (step->kind == STEP_GATED ? gated_panel : matmul_panel)(call, step, p, begin, end, scratch);
    }
}
