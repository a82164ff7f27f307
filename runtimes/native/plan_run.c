/* Running a plan: which items each step has, and what one of them does. */
#include "plan_head.h"
#include "plan_work.h"
#include "platform.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 256          /* tokens of a long prompt that are computed together: their activations stay in the cache */
#define TILE_ROWS 96       /* rows of a product that are finished (bias, activation) before the next ones */
#define SMALL_NUMBERS 8192 /* a step over fewer numbers is not worth sharing */
#define SMALL_BYTES 16384  /* a product of fewer weight bytes times rows */
#define MANY_ROWS 16       /* from here on a product's items are as short as they may be: threads that share them end together */
#define ITEM_PRODUCTS ((size_t)1 << 20) /* multiplications of such an item: some 5 microseconds */
#define BLOCK_ROWS 48      /* of which a product's items have at least so many: fewer would wait for the weights */
#define ROW_TILE 12        /* and a multiple of this, which kernels take at a time */
#define ASKED_LINES 64     /* of what comes next, while an item of an attention computes */

size_t plan_past(const PlanCall *call, size_t row) {
    return (size_t)call->run->seqlens[row] + 1 - call->run->tokens + call->first;
}

size_t plan_stride(const PlanCall *call, PlanRef ref) { return call->plan->buffers[ref.buffer].width; }

static size_t token_of(const PlanCall *call, bool last, size_t row) {
    const bool picked = last && !call->run->each;
    const size_t tokens = call->run->tokens, batch = picked ? row : row / call->tokens;
    return batch * tokens + (picked ? tokens - 1 : call->first + row % call->tokens);
}

size_t plan_token(const PlanCall *call, const PlanStep *step, size_t row) { return token_of(call, step->last != 0, row); }

/* Whether a buffer is an input of the call: its rows are [rows][tokens], of which this part of the tokens is used. */
static bool is_given(const PlanBuffer *b) { return b->kind == BUFFER_EMBEDS || b->kind == BUFFER_INPUT; }

float *plan_row(const PlanCall *call, PlanRef ref, bool last, size_t row) {
    const PlanBuffer *b = &call->plan->buffers[ref.buffer];
    if (is_given(b)) {
        const float *rows = b->kind == BUFFER_EMBEDS ? call->run->embeds : (const float *)(const void *)call->run->inputs[b->offset];
        return (float *)(uintptr_t)rows + token_of(call, last, row) * b->width + ref.column;
    }
    if (b->kind == BUFFER_LOGITS) {
        return call->run->logits + row * b->width + ref.column;
    }
    return (float *)(void *)(call->plan->arena + b->offset * call->rows) + row * b->width + ref.column;
}

QuantRows plan_codes(const PlanCall *call, PlanRef ref) {
    const PlanBuffer *b = &call->plan->buffers[ref.buffer];
    const size_t blocks = (b->width + BLOCK - 1) / BLOCK;
    int8_t *codes = (int8_t *)call->plan->arena + b->offset * call->rows;
    float *scales = (float *)(void *)(codes + call->rows * blocks * BLOCK);
    return (QuantRows){.codes = codes, .scales = scales, .offsets = (int32_t *)(void *)(scales + call->rows * blocks), .blocks = blocks};
}

size_t plan_rows_of(const PlanCall *call, const PlanStep *step) { return step->last && !call->run->each ? call->run->rows : call->rows; }

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
    const bool split = call->run->each || is_given(&call->plan->buffers[step->in[0].buffer]);
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

static void norm_row(const PlanCall *call, const PlanStep *step, size_t row) {
    const Kernels *kernels = call->plan->kernels;
    const size_t groups = (size_t)step->arg[1], width = step->width, size = width / groups;
    const float *x = plan_row(call, step->in[0], step->last, row), *bias = vector(call->plan, step->weight[2]);
    if (step->out[1].buffer >= 0) {
        float *sum = plan_row(call, step->out[1], step->last, row);
        if (step->in[1].buffer >= 0) {
            kernels->add(x, plan_row(call, step->in[1], step->last, row), width, sum);
        } else {
            memmove(sum, x, width * sizeof *sum);
        }
        if (bias != NULL) {
            kernels->add(sum, bias, width, sum);
        }
        x = sum;
    }
    if (step->out[0].buffer < 0) {
        return;
    }
    float *out = plan_row(call, step->out[0], step->last, row);
    for (size_t g = 0; g < groups; g++) {
        if (step->arg[0] == 0) {
            kernels->rms_norm(x + g * size, vector(call->plan, step->weight[0]), step->real[0], size, out + g * size);
        } else {
            kernels->layer_norm(x + g * size, vector(call->plan, step->weight[0]), vector(call->plan, step->weight[1]), step->real[0], size, out + g * size);
        }
    }
    if (step->out[2].buffer >= 0) {
        const QuantRows codes = plan_codes(call, step->out[2]);
        kernels->quantize(out, width, &codes, row);
    }
}

static void lookup_row(const PlanCall *call, const PlanStep *step, size_t row) {
    const PanelMatrix *table = &call->plan->weights[step->weight[0]].matrix;
    const size_t batch = row / call->tokens, index = row % call->tokens;
    const int64_t at = step->arg[1] != 0 ? (int64_t)(plan_past(call, batch) + index)
                                         : call->run->positions[batch * call->run->tokens + call->first + index];
    memcpy(plan_row(call, step->out[0], false, row), (const float *)(const void *)table->data + (size_t)(at + step->arg[0]) * table->width,
           table->width * sizeof(float));
}

static void row_work(const PlanCall *call, const PlanStep *step, size_t row) {
    const Kernels *kernels = call->plan->kernels;
    const size_t width = step->width;
    switch ((StepKind)step->kind) {
    case STEP_QUANTIZE: {
        const QuantRows codes = plan_codes(call, step->out[0]);
        kernels->quantize(plan_row(call, step->in[0], step->last, row), width, &codes, row);
        break;
    }
    case STEP_NORM:
        norm_row(call, step, row);
        break;
    case STEP_ANGLES:
        angles_work(call, step, row);
        break;
    case STEP_ROTARY:
        rotary_work(call, step, row);
        break;
    case STEP_COMBINE:
        attention_combine(call, step, row);
        break;
    case STEP_LAST: {
        const size_t token = call->run->each ? row : row * call->tokens + call->tokens - 1;
        memcpy(plan_row(call, step->out[0], true, row), plan_row(call, step->in[0], false, token), width * sizeof(float));
        break;
    }
    case STEP_UNARY: {
        float *out = plan_row(call, step->out[0], step->last, row);
        kernels->scale(plan_row(call, step->in[0], step->last, row), step->real[0], width, out);
        kernels->unary((Unary)step->arg[0], out, width, out);
        kernels->scale(out, step->real[1], width, out);
        break;
    }
    case STEP_ADD:
    case STEP_MULTIPLY: {
        const float *y = step->in[1].buffer >= 0 ? plan_row(call, step->in[1], step->last, row) : vector(call->plan, step->weight[0]);
        (step->kind == STEP_ADD ? kernels->add : kernels->multiply)(plan_row(call, step->in[0], step->last, row), y, width,
                                                                    plan_row(call, step->out[0], step->last, row));
        break;
    }
    case STEP_LOOKUP:
        lookup_row(call, step, row);
        break;
    case STEP_SELECT: {
        const bool inside = ((const int64_t *)(const void *)call->run->inputs[call->plan->block_input])[plan_token(call, step, row)] != 0;
        memcpy(plan_row(call, step->out[0], false, row), plan_row(call, step->in[inside ? 0 : 1], false, row), width * sizeof(float));
        break;
    }
    case STEP_SEEN: {
        const size_t count = call->run->input_sizes[step->arg[0]];
        const int64_t *numbers = (const int64_t *)(const void *)call->run->inputs[step->arg[0]] + plan_token(call, step, row) * count;
        bool seen = false;
        for (size_t i = 0; i < count; i++) {
            seen = seen || numbers[i] != 0;
        }
        kernels->scale(plan_row(call, step->in[0], step->last, row), seen ? 1.0f : 0.0f, width, plan_row(call, step->out[0], step->last, row));
        break;
    }
    case STEP_GREATER: {
        const float *x = plan_row(call, step->in[0], step->last, row), least = step->real[0];
        float *out = plan_row(call, step->out[0], step->last, row);
        for (size_t i = 0; i < width; i++) {
            out[i] = x[i] > least ? 1.0f : 0.0f;
        }
        break;
    }
    default:
        break;
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

static void product_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Sharing s = sharing_of(call, step);
    const size_t rows = plan_rows_of(call, step), panels = panels_of(call->plan, step), panel = item % s.parts * s.each;
    const size_t begin = item / s.parts * s.block_rows, end = begin + s.block_rows < rows ? begin + s.block_rows : rows;
    for (size_t p = panel; p < panel + s.each && p < panels; p++) {
        (step->kind == STEP_GATED ? gated_panel : matmul_panel)(call, step, p, begin, end, scratch);
    }
}

static size_t rows_per_item(const PlanCall *call, const PlanStep *step) { return 1 + plan_rows_of(call, step) / (pool_threads(call->plan->pool) * 8); }

size_t plan_items(void *context, size_t index, bool *small) {
    const PlanCall *call = context;
    const PlanStep *step = &call->plan->steps[index];
    const size_t rows = plan_rows_of(call, step);
    if (step->last && call->first + call->tokens < call->run->tokens) {
        return 0; /* of the whole call's last tokens only */
    }
    if (step->kind == STEP_MATMUL || step->kind == STEP_GATED) {
        const PlanWeight *weight = &call->plan->weights[step->weight[0]];
        const Sharing s = sharing_of(call, step);
        *small = weight->bytes * rows < SMALL_BYTES;
        return s.blocks * s.parts;
    }
    if (step->kind == STEP_ATTENTION) {
        *small = call->rows * call->longest * step->width < SMALL_NUMBERS;
        return attention_items(call, step);
    }
    if (step->kind == STEP_CROSS) {
        return cross_items(call, step);
    }
    if (step->kind == STEP_REFINE) {
        *small = false;
        return call->run->ranked ? rows * HEAD_CHUNKS : 0;
    }
    *small = rows * step->width < SMALL_NUMBERS;
    const size_t each = rows_per_item(call, step);
    return (rows + each - 1) / each;
}

static void do_item(void *context, size_t index, size_t item, size_t thread) {
    const PlanCall *call = context;
    const PlanStep *step = &call->plan->steps[index];
    uint8_t *scratch = call->plan->scratch + thread * call->plan->thread_bytes;
    if (step->kind == STEP_MATMUL || step->kind == STEP_GATED) {
        product_work(call, step, item, scratch);
    } else if (step->kind == STEP_ATTENTION) {
        pool_ask(call->plan->pool, thread, ASKED_LINES);
        attention_work(call, step, item, scratch);
    } else if (step->kind == STEP_CROSS) {
        cross_work(call, step, item, scratch);
    } else if (step->kind == STEP_REFINE) {
        head_refine(call, step, item, scratch);
    } else {
        const size_t each = rows_per_item(call, step), rows = plan_rows_of(call, step);
        for (size_t row = item * each; row < (item + 1) * each && row < rows; row++) {
            row_work(call, step, row);
        }
    }
}

static void step_work(void *context, size_t index, size_t item, size_t thread) {
    const Plan *plan = ((const PlanCall *)context)->plan;
    if (plan->seconds == NULL) {
        do_item(context, index, item, thread);
        return;
    }
    const double begin = platform_seconds();
    do_item(context, index, item, thread);
    plan->seconds[thread * plan->step_count + index] += platform_seconds() - begin;
}

static int fail(char message[PLAN_MESSAGE_SIZE], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, PLAN_MESSAGE_SIZE, format, arguments);
    va_end(arguments);
    return -1;
}

void plan_freed(void *memory) {
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}

uint8_t *plan_grown(uint8_t *memory, size_t *have, size_t bytes) {
    if (bytes <= *have) {
        return memory;
    }
    plan_freed(memory);
#ifdef _WIN32
    memory = _aligned_malloc(bytes, 64);
#else
    memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
#endif
    *have = memory != NULL ? bytes : 0;
    return memory;
}

static int reserve(Plan *plan, const PlanCall *call, char message[PLAN_MESSAGE_SIZE]) {
    const size_t threads = pool_threads(plan->pool);
    size_t parts = 0;
    for (uint32_t i = 0; i < plan->step_count && plan_single(call) && call->parts > 1; i++) {
        const PlanStep *s = &plan->steps[i];
        const bool attends = s->kind == STEP_ATTENTION || s->kind == STEP_COMBINE;
        const size_t needed = attends ? call->rows * (size_t)s->arg[2] * call->parts * ((size_t)s->arg[4] + 2) : 0;
        parts = needed > parts ? needed : parts;
    }
    plan->arena = plan_grown(plan->arena, &plan->arena_bytes, plan->token_bytes * call->rows + 64);
    plan->scratch = plan_grown(plan->scratch, &plan->scratch_bytes, plan->thread_bytes * threads + 64);
    plan->parts = (float *)(void *)plan_grown((uint8_t *)plan->parts, &plan->parts_room, parts * sizeof(float) + 64);
    return plan->arena == NULL || plan->scratch == NULL || plan->parts == NULL ? fail(message, "out of memory for %zu tokens at once", call->rows) : 0;
}

/* Whether tokens that see each other must be computed together. */
static bool has_blocks(const Plan *plan, const PlanRun *run) {
    const int64_t *blocks = plan->block_input >= 0 ? (const int64_t *)(const void *)run->inputs[plan->block_input] : NULL;
    for (size_t i = 0; blocks != NULL && i < run->rows * run->tokens; i++) {
        if (blocks[i] != 0) {
            return true;
        }
    }
    return false;
}

int plan_run(Plan *plan, const PlanRun *run, char message[PLAN_MESSAGE_SIZE]) {
    if (plan->graph) {
        return fail(message, "this plan is no decoder's");
    }
    if (plan_ready(plan, run, message) != 0) {
        return -1;
    }
    if (run->ranked && (!plan_ranks(plan, run->rows) || run->tokens != 1 || run->each)) {
        return fail(message, "this plan cannot tell the largest logits of %zu rows alone", run->rows);
    }
    const size_t chunk = run->each || run->rows > 1 || has_blocks(plan, run) || run->tokens < CHUNK ? run->tokens : CHUNK;
    for (size_t first = 0; first < run->tokens; first += chunk) {
        PlanCall call = {.plan = plan, .run = run, .first = first, .tokens = run->tokens - first < chunk ? run->tokens - first : chunk};
        call.rows = run->rows * call.tokens;
        for (size_t row = 0; row < run->rows; row++) {
            const size_t length = plan_past(&call, row) + call.tokens;
            call.longest = length > call.longest ? length : call.longest;
        }
        attention_split(&call);
        if (reserve(plan, &call, message) != 0) {
            return -1;
        }
        const PoolJob job = {.steps = plan->step_count, .items = plan_items, .work = step_work, .ahead = plan_ahead, .context = &call};
        pool_run(plan->pool, &job);
        if (run->ranked) {
            head_keep(&call);
        }
    }
    return 0;
}
