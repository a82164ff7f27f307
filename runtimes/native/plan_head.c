/* A head of two planes; see plan_head.h. */
#include "plan_head.h"
#include "plan_work.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define TILE_ROWS 96 /* rows that are computed before they are brought where they belong */
#define LINE 64

/* Where the loader can choose between versions of a function, one for wider registers. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_CLONES
#endif

static size_t panels_of(const PanelMatrix *m) { return (m->width + PANEL - 1) / PANEL; }
static size_t blocks_of(const PanelMatrix *m) { return (m->depth + BLOCK - 1) / BLOCK; }

/* A block's codes: groups of 4 inputs, [4][16 outputs][4 inputs] with group g in the low and g + 4 in the high halves of both planes. */
VECTOR_CLONES static void join_block(const uint8_t *restrict upper, const uint8_t *restrict lower, uint8_t *restrict out) {
    for (size_t i = 0; i < 4 * LINE; i++) {
        out[i] = (uint8_t)(upper[i] << 4 | (lower[i] & 15));
        out[4 * LINE + i] = (uint8_t)((upper[i] & 0xf0) | lower[i] >> 4);
    }
}

/* The weight as one of 8 bits, of which only the panels that were joined exist. */
static PanelMatrix joined_matrix(const PanelMatrix *upper) {
    PanelMatrix m = *upper;
    m.format = WEIGHT_INT8;
    m.scale = upper->scale / 16.0f;
    m.panel_bytes = panel_bytes_of(&m, 8);
    return m;
}

static const uint8_t *lower_panel(const Plan *plan, const PlanStep *step, size_t panel) {
    const PanelMatrix *m = &plan->weights[step->weight[2]].matrix;
    return m->data + panel * m->width * sizeof(int32_t);
}

static void join_panel(const Plan *plan, const PlanStep *step, size_t panel, uint8_t *out) {
    const PanelMatrix *m = &plan->weights[step->weight[0]].matrix;
    const unsigned shift = panel_scale_shift(m);
    const uint8_t *upper = m->data + panel * m->panel_bytes, *lower = lower_panel(plan, step, panel);
    for (size_t b = 0; b < blocks_of(m); b++, upper += 4 * LINE, lower += 4 * LINE, out += 8 * LINE) {
        if (panel_has_scales(shift, b)) {
            memcpy(out, upper, LINE);
            upper += LINE;
            out += LINE;
        }
        join_block(upper, lower, out);
    }
}

/* out [rows][16] of both planes. `joined`: memory for a panel of 8 bits. */
static void product(const Plan *plan, const PlanStep *step, const QuantRows *x, size_t panel, size_t first, size_t rows, uint8_t *joined, float *out) {
    const PanelMatrix m = joined_matrix(&plan->weights[step->weight[0]].matrix);
    join_panel(plan, step, panel, joined);
    plan->kernels->int8(&m, joined, x, first, rows, out, PANEL);
}

static size_t joined_bytes(const PanelMatrix *upper) {
    const PanelMatrix m = joined_matrix(upper);
    return (m.panel_bytes + LINE - 1) / LINE * LINE;
}

size_t head_scratch(const Plan *plan, const PlanStep *step) {
    const PanelMatrix *m = &plan->weights[step->weight[0]].matrix;
    const size_t rows = TILE_ROWS * PANEL * sizeof(float), offsets = HEAD_ROWS_MOST * blocks_of(m) * sizeof(int32_t);
    const size_t spreads = (panels_of(m) / HEAD_CHUNKS + 1) * sizeof(float);
    return (joined_bytes(m) + rows + offsets + spreads + LINE - 1) / LINE * LINE;
}

/* The largest of a panel's logits, or NaN where one is. As integers, whose maximum may be taken in any order: the floats' order, and
 * without the signs, since that of NaN may be any. */
VECTOR_CLONES static float largest_of(const float *restrict logits, size_t width) {
    int32_t numbers[PANEL], most = INT32_MIN, size = 0;
    memcpy(numbers, logits, width * sizeof *numbers);
    for (size_t i = width; i < PANEL; i++) {
        numbers[i] = numbers[0];
    }
    for (size_t i = 0; i < PANEL; i++) {
        const int32_t plain = numbers[i] & INT32_MAX, ordered = numbers[i] ^ (numbers[i] >> 31 & INT32_MAX);
        most = ordered > most ? ordered : most;
        size = plain > size ? plain : size;
    }
    if (size > 0x7f800000) {
        return NAN;
    }
    most ^= most >> 31 & INT32_MAX;
    float largest;
    memcpy(&largest, &most, sizeof largest);
    return largest;
}

static size_t width_of(const PanelMatrix *m, size_t panel) { return m->width - panel * PANEL < PANEL ? m->width - panel * PANEL : PANEL; }

void head_whole(const PlanCall *call, const PlanStep *step, size_t panel, uint8_t *scratch) {
    const Plan *plan = call->plan;
    const PanelMatrix *m = &plan->weights[step->weight[0]].matrix, whole = joined_matrix(m);
    const size_t rows = plan_rows_of(call, step), width = width_of(m, panel);
    const QuantRows x = plan_codes(call, step->in[0]);
    float *block = (float *)(void *)(scratch + joined_bytes(m));
    join_panel(plan, step, panel, scratch);
    for (size_t first = 0; first < rows; first += TILE_ROWS) {
        const size_t some = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        plan->kernels->int8(&whole, scratch, &x, first, some, block, PANEL);
        for (size_t row = 0; row < some; row++) {
            memcpy(plan_row(call, step->out[0], step->last, first + row) + panel * PANEL, block + row * PANEL, width * sizeof *block);
        }
    }
}

void head_rough(const PlanCall *call, const PlanStep *step, size_t panel, uint8_t *scratch) {
    const PanelMatrix *m = &call->plan->weights[step->weight[0]].matrix;
    const size_t rows = plan_rows_of(call, step), width = width_of(m, panel);
    QuantRows x = plan_codes(call, step->in[0]);
    float *block = (float *)(void *)scratch;
    int32_t *offsets = (int32_t *)(void *)(block + TILE_ROWS * PANEL);
    for (size_t i = 0; i < rows * x.blocks; i++) { /* −8 times the sum of the block's codes; 7.5 / 16 of it are given back */
        offsets[i] = x.offsets[i] - x.offsets[i] * 15 / 256;
    }
    x.offsets = offsets;
    call->plan->kernels->int4(m, m->data + panel * m->panel_bytes, &x, 0, rows, block, PANEL);
    for (size_t row = 0; row < rows; row++) {
        const float *from = block + row * PANEL;
        memcpy(plan_row(call, step->out[0], step->last, row) + panel * PANEL, from, width * sizeof *from);
        plan_row(call, step->out[1], step->last, row)[panel] = largest_of(from, width);
    }
}

/* How far the panels [begin, end) may be off, squared: Σ over blocks of (7.5 · largest scale of the panel)² · |x|². */
static void spreads_of(const PanelMatrix *table, const QuantRows *x, size_t row, size_t begin, size_t end, float *out) {
    memset(out, 0, (end - begin) * sizeof *out);
    for (size_t b = 0; b < x->blocks; b++) {
        const size_t at = row * x->blocks + b;
        const float *line = (const float *)(const void *)table->data + b * table->width + begin;
        int32_t sum = 0;
        for (size_t i = 0; i < BLOCK; i++) {
            sum += x->codes[at * BLOCK + i] * x->codes[at * BLOCK + i];
        }
        const float weight = x->scales[at] * x->scales[at] * (float)sum;
        for (size_t p = 0; p < end - begin; p++) {
            out[p] += weight * line[p];
        }
    }
}

static void ask(const uint8_t *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i += LINE) {
        __builtin_prefetch(data + i, 0, 2);
    }
}

/* The next panel from `panel` on whose largest logit may reach `least`; NaN may be anything. */
static size_t next_panel(const float *rough, const float *spreads, size_t begin, size_t panel, size_t end, float least) {
    while (panel < end && rough[panel] + HEAD_DEVIATIONS * sqrtf(spreads[panel - begin]) < least) {
        panel++;
    }
    return panel;
}

void head_refine(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Plan *plan = call->plan;
    const PanelMatrix *m = &plan->weights[step->weight[0]].matrix, *table = &plan->weights[step->weight[1]].matrix;
    const size_t row = item / HEAD_CHUNKS, panels = panels_of(m);
    const size_t begin = panels * (item % HEAD_CHUNKS) / HEAD_CHUNKS, end = panels * (item % HEAD_CHUNKS + 1) / HEAD_CHUNKS;
    const QuantRows x = plan_codes(call, step->in[0]);
    const float *rough = plan_row(call, step->in[1], step->last, row);
    float *logits = plan_row(call, step->out[0], step->last, row), *block = (float *)(void *)(scratch + joined_bytes(m)), *spreads = block + PANEL;
    size_t top = 0;
    for (size_t p = 1; p < panels; p++) {
        top = rough[p] > rough[top] ? p : top;
    }
    product(plan, step, &x, top, row, 1, scratch, block);
    float least = block[0];
    for (size_t i = 1; i < width_of(m, top); i++) {
        least = block[i] > least ? block[i] : least;
    }
    if (top >= begin && top < end) { /* even where its own bound would leave it out */
        memcpy(logits + top * PANEL, block, width_of(m, top) * sizeof *block);
    }
    spreads_of(table, &x, row, begin, end, spreads);
    for (size_t p = next_panel(rough, spreads, begin, begin, end, least), next; p < end; p = next) {
        next = next_panel(rough, spreads, begin, p + 1, end, least);
        if (next < end) {
            ask(lower_panel(plan, step, next), blocks_of(m) * 4 * LINE);
            ask(m->data + next * m->panel_bytes, m->panel_bytes);
        }
        product(plan, step, &x, p, row, 1, scratch, block);
        memcpy(logits + p * PANEL, block, width_of(m, p) * sizeof *block);
    }
}

static const PlanStep *refining(const Plan *plan) {
    for (uint32_t i = 0; i < plan->step_count && !plan->graph; i++) {
        if (plan->steps[i].kind == STEP_REFINE) {
            return &plan->steps[i];
        }
    }
    return NULL;
}

size_t plan_kept_bytes(const Plan *plan) {
    const PlanStep *step = refining(plan);
    return step != NULL ? blocks_of(&plan->weights[step->weight[0]].matrix) * (BLOCK + sizeof(float) + sizeof(int32_t)) : 0;
}

bool plan_ranks(const Plan *plan, size_t rows) { return rows <= HEAD_ROWS_MOST && refining(plan) != NULL; }

void head_keep(const PlanCall *call) {
    const QuantRows x = plan_codes(call, refining(call->plan)->in[0]);
    uint8_t *to = call->run->kept;
    for (size_t row = 0; row < call->run->rows; row++) {
        memcpy(to, x.codes + row * x.blocks * BLOCK, x.blocks * BLOCK);
        memcpy(to + x.blocks * BLOCK, x.scales + row * x.blocks, x.blocks * sizeof *x.scales);
        memcpy(to + x.blocks * (BLOCK + sizeof *x.scales), x.offsets + row * x.blocks, x.blocks * sizeof *x.offsets);
        to += plan_kept_bytes(call->plan);
    }
}

typedef struct {
    const Plan *plan;
    const PlanStep *step;
    QuantRows x;
    float *logits;
} Completion;

static size_t complete_items(void *context, size_t step, bool *small) {
    const Completion *c = context;
    *small = false;
    return (panels_of(&c->plan->weights[c->step->weight[0]].matrix) + TILE_ROWS - 1) / TILE_ROWS;
}

static void complete_work(void *context, size_t step, size_t item, size_t thread) {
    const Completion *c = context;
    const PanelMatrix *m = &c->plan->weights[c->step->weight[0]].matrix;
    uint8_t *scratch = c->plan->scratch + thread * c->plan->thread_bytes;
    float *block = (float *)(void *)(scratch + joined_bytes(m));
    for (size_t p = item * TILE_ROWS; p < (item + 1) * TILE_ROWS && p < panels_of(m); p++) {
        product(c->plan, c->step, &c->x, p, 0, 1, scratch, block);
        memcpy(c->logits + p * PANEL, block, width_of(m, p) * sizeof *block);
    }
}

int plan_complete(Plan *plan, const uint8_t *kept, float *logits, char message[PLAN_MESSAGE_SIZE]) {
    const PlanStep *step = refining(plan);
    const size_t blocks = blocks_of(&plan->weights[step->weight[0]].matrix);
    plan->scratch = plan_grown(plan->scratch, &plan->scratch_bytes, plan->thread_bytes * pool_threads(plan->pool) + LINE);
    if (plan->scratch == NULL) {
        snprintf(message, PLAN_MESSAGE_SIZE, "out of memory");
        return -1;
    }
    uint8_t *data = (uint8_t *)(uintptr_t)kept;
    Completion c = {.plan = plan, .step = step, .logits = logits + step->out[0].column};
    c.x = (QuantRows){.codes = (int8_t *)data, .scales = (float *)(void *)(data + blocks * BLOCK), .blocks = blocks};
    c.x.offsets = (int32_t *)(void *)(c.x.scales + blocks);
    const PoolJob job = {.steps = 1, .items = complete_items, .work = complete_work, .context = &c};
    pool_run(plan->pool, &job);
    return 0;
}
