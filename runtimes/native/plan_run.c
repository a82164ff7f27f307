/* Running a plan: which items each step has, and what one of them does. */
#include "plan_head.h"
#include "plan_work.h"
#include "platform.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 256          /* tokens of a long prompt that are computed together: their activations stay in the cache */
#define SMALL_NUMBERS 8192 /* a step over fewer numbers is not worth sharing */
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

bool plan_is_given(const PlanBuffer *b) { return b->kind == BUFFER_EMBEDS || b->kind == BUFFER_INPUT; }

float *plan_row(const PlanCall *call, PlanRef ref, bool last, size_t row) {
    const PlanBuffer *b = &call->plan->buffers[ref.buffer];
    if (plan_is_given(b)) {
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

static size_t rows_per_item(const PlanCall *call, const PlanStep *step) { return 1 + plan_rows_of(call, step) / (pool_threads(call->plan->pool) * 8); }

size_t plan_items(void *context, size_t index, bool *small) {
    const PlanCall *call = context;
    const PlanStep *step = &call->plan->steps[index];
    const size_t rows = plan_rows_of(call, step);
    if (step->last && call->first + call->tokens < call->run->tokens) {
        return 0; /* of the whole call's last tokens only */
    }
    if (step->kind == STEP_MATMUL || step->kind == STEP_GATED) {
        return plan_product_items(call, step, small);
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
        plan_product(call, step, item, scratch);
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
    if (bytes > SIZE_MAX / 2) {
        *have = 0;
        return NULL;
    }
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
    plan->arena = plan_grown(plan->arena, &plan->arena_bytes, plan_bytes(plan->token_bytes, call->rows));
    plan->scratch = plan_grown(plan->scratch, &plan->scratch_bytes, plan_bytes(plan->thread_bytes, threads));
    plan->parts = (float *)(void *)plan_grown((uint8_t *)plan->parts, &plan->parts_room, plan_bytes(parts, sizeof(float)));
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
