/* Running the plan of a graph: which items each step has, and what one of them does. */
#include "plan_graph_call.h"
#include "platform.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TOGETHER 512       /* rows that are worth computing together: small images go several at a time; four of 1,024 rows so took 1.08 times as long */
#define TOGETHER_BYTES ((uint64_t)256 << 20) /* of an arena for several: that of a short text has room for what the plan's own length needs */
#define MUCH (1 << 20)     /* bytes of an arena that are not kept from call to call: what comes after an image is text, which needs memory too */
#define LARGE (4 << 20)    /* and for which large pages are asked: a tile of 1,024 patches then has 520 page faults in each call, not 4,400 */
#define SMALL_NUMBERS 8192 /* a step over fewer numbers is not worth sharing */

static void quantize_row(const GraphCall *call, PlanRef out, size_t width, const float *x, size_t row) {
    if (buffer_of(call, out)->kind == BUFFER_BYTES) {
        const ByteRows bytes = bytes_of(call, out);
        call->plan->kernels->quantize_bytes(x, width, &bytes, row);
    } else {
        const QuantRows codes = codes_of(call, out);
        call->plan->kernels->quantize(x, width, &codes, row);
    }
}

/* --- attention --- */

static size_t query_blocks(const GraphCall *call, const PlanStep *step) {
    const size_t rows = buffer_of(call, step->out[0])->rows * (step->arg[5] != OVER_IMAGE ? call->images : 1);
    return (rows + GRAPH_QUERIES - 1) / GRAPH_QUERIES;
}

/* Queries [first, first + queries) of a head over keys [key, key + keys), of all images' rows. */
static void attend(const GraphCall *call, const PlanStep *step, size_t head, size_t first, size_t queries, size_t key, size_t keys, uint8_t *scratch) {
    const size_t size = (size_t)step->arg[1];
    const bool hides = step->arg[5] == OVER_IMAGE && (step->in[3].buffer >= 0 || step->arg[3] != 0);
    const size_t rows = buffer_of(call, step->out[0])->rows;
    const GraphSight sight = hides ? graph_sight(call, step, first / rows, first % rows) : (GraphSight){0};
    const HeadAttention a = {
        .size = size,
        .group = 1,
        .rows = queries,
        .queries = row_at(call, step->in[0], first) + head * size,
        .query_stride = buffer_of(call, step->in[0])->width,
        .keys = row_at(call, step->in[1], key) + head * size,
        .values = row_at(call, step->in[2], key) + head * size,
        .key_stride = buffer_of(call, step->in[1])->width,
        .value_stride = buffer_of(call, step->in[2])->width,
        .format = CACHE_FLOAT32,
        .end = keys,
        .half = step->arg[2] != 0,
        .bytes = step->arg[2] != 0,
        .scale = step->real[0],
        .hide = hides ? graph_hide : NULL,
        .context = &sight,
        .out = row_at(call, step->out[0], first) + head * size,
        .out_stride = buffer_of(call, step->out[0])->width,
        .scratch = scratch,
    };
    call->plan->kernels->attention(&a);
}

static void attention_item(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const size_t heads = (size_t)step->arg[0], blocks = query_blocks(call, step), all = step->arg[5] != OVER_IMAGE ? call->images : 1;
    const size_t rows = buffer_of(call, step->out[0])->rows * all, keys = buffer_of(call, step->in[1])->rows * all;
    const size_t image = item / blocks / heads, head = item / blocks % heads, first = item % blocks * GRAPH_QUERIES;
    attend(call, step, head, image * rows + first, rows - first < GRAPH_QUERIES ? rows - first : GRAPH_QUERIES, image * keys, keys, scratch);
}

/* The queries, keys and values of one segment. */
static void segment_item(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const size_t heads = (size_t)step->arg[0], begin = call->segments[item / heads], end = call->segments[item / heads + 1];
    for (size_t first = begin; first < end; first += GRAPH_QUERIES) {
        attend(call, step, item % heads, first, end - first < GRAPH_QUERIES ? end - first : GRAPH_QUERIES, begin, end - begin, scratch);
    }
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
            const size_t each = matrix_of(call, step->weight[0])->depth > 1 ? buffer_of(call, step->out[0])->rows : 1;
            y = vector(call, step->weight[0]) + row % each * width; /* one row, or all of an image, or more for longer ones */
        }
        (step->kind == GRAPH_ADD ? kernels->add : kernels->multiply)(row_at(call, step->in[0], row), y, width, row_at(call, step->out[0], row));
        break;
    }
    case GRAPH_CONVERT:
    case GRAPH_COSINE:
    case GRAPH_ROTARY:
    case GRAPH_GATHER:
        place_work(call, step, row);
        break;
    case GRAPH_PICK:
        pick_row(call, step, row);
        break;
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

/* What a step that is neither a product nor an attention is divided into: pieces to copy, or rows. */
static size_t units_of(const GraphCall *call, const PlanStep *step) {
    if (step->kind == GRAPH_COPY) {
        return pairs_of(call, step) * call->images;
    }
    return step->kind == GRAPH_SPREAD ? matrix_of(call, step->weight[0])->width / GRAPH_SPREAD_NUMBERS * call->images : rows_of(call, step);
}

static size_t step_items(void *context, size_t index, bool *small) {
    const GraphCall *call = context;
    const PlanStep *step = &call->plan->steps[index];
    if (step->chain == CHAIN_INNER || step->kind == GRAPH_LENGTH) {
        return 0;
    }
    const size_t rows = rows_of(call, step);
    *small = rows * step->width < SMALL_NUMBERS;
    if (step->kind == GRAPH_MATMUL) {
        *small = rows * step->width * matrix_of(call, step->weight[0])->depth < 64 * SMALL_NUMBERS;
        return step->chain == CHAIN_FIRST ? chain_items(call, step) : product_items(call, step);
    }
    if (step->kind == GRAPH_ATTENTION) {
        const size_t keys = buffer_of(call, step->in[1])->rows * (step->arg[5] != OVER_IMAGE ? call->images : 1);
        *small = rows * keys * step->width < 64 * SMALL_NUMBERS;
        if (step->arg[5] == OVER_SEGMENTS) {
            return call->segment_count * (size_t)step->arg[0];
        }
        return (step->arg[5] != OVER_IMAGE ? 1 : call->images) * (size_t)step->arg[0] * query_blocks(call, step);
    }
    const size_t units = units_of(call, step), each = share(call, units);
    return (units + each - 1) / each;
}

static void do_item(const GraphCall *call, size_t index, size_t item, size_t thread) {
    const PlanStep *step = &call->plan->steps[index];
    uint8_t *scratch = call->plan->scratch + thread * call->plan->thread_bytes;
    if (step->kind == GRAPH_MATMUL) {
        product_work(call, step, item, scratch);
    } else if (step->kind == GRAPH_ATTENTION) {
        (step->arg[5] == OVER_SEGMENTS ? segment_item : attention_item)(call, step, item, scratch);
    } else if (step->kind == GRAPH_COPY) {
        copy_work(call, step, item);
    } else {
        const size_t units = units_of(call, step), each = share(call, units);
        for (size_t unit = item * each; unit < (item + 1) * each && unit < units; unit++) {
            if (step->kind == GRAPH_SPREAD) {
                spread_work(call, step, unit);
            } else {
                row_work(call, step, unit, scratch);
            }
        }
    }
}

double graph_counted(const Plan *plan, size_t thread, size_t index, double begin) {
    if (plan->seconds == NULL) {
        return 0.0;
    }
    const double end = platform_seconds();
    plan->seconds[thread * plan->step_count + index] += end - begin;
    return end;
}

static void step_work(void *context, size_t index, size_t item, size_t thread) {
    const GraphCall *call = context;
    const Plan *plan = call->plan;
    if (plan->steps[index].chain == CHAIN_FIRST) {
        chain_work(call, index, item, thread, plan->scratch + thread * plan->thread_bytes);
        return;
    }
    const double begin = plan->seconds != NULL ? platform_seconds() : 0.0;
    do_item(call, index, item, thread);
    graph_counted(plan, thread, index, begin);
}

size_t graph_scratch(const PlanStep *step) {
    size_t bytes = GRAPH_TILE * GRAPH_UNIT * PANEL * sizeof(float);
    if (step->kind == GRAPH_NORM) {
        bytes = step->width * sizeof(float);
    } else if (step->kind == GRAPH_ATTENTION) {
        bytes = attention_bytes(GRAPH_QUERIES, (size_t)step->arg[1]);
    } else if (step->chain == CHAIN_FIRST) {
        const size_t padded = (step->width + PANEL - 1) / PANEL * PANEL;
        bytes = GRAPH_TILE * PANEL * sizeof(float) + GRAPH_CHAIN_ROWS * (padded * sizeof(float) + 2 * sizeof(float) + byte_stride(step->width));
    }
    return (bytes + 63) / 64 * 64;
}

/* How many images of so many rows are computed together. */
static size_t together(const Plan *plan, size_t images, size_t rows) {
    if (plan->joined) {
        return images;
    }
    size_t most = rows < TOGETHER ? TOGETHER / rows : 1;
    const uint64_t room = plan->token_bytes > 0 ? TOGETHER_BYTES / plan->token_bytes : most;
    most = room < most ? (size_t)room : most;
    most = most > 0 ? most : 1;
    return most < images ? most : images;
}

/* Outputs of which steps write only some numbers: memory that nobody wrote is not handed out. */
static void clear_outputs(const Plan *plan, const GraphRun *run) {
    for (uint32_t i = 0; i < plan->buffer_count; i++) {
        const PlanBuffer *b = &plan->buffers[i];
        if (b->kind == BUFFER_OUTPUT && plan->outputs[b->offset].written != WRITTEN_ALL) {
            memset(run->outputs[b->offset], 0, run->images * b->rows * b->width * sizeof(float));
        }
    }
}

/* −1 with the reason in `message`: the pool does not count so far. */
static int items_fit(GraphCall *call, char message[PLAN_MESSAGE_SIZE]) {
    for (uint32_t i = 0; i < call->plan->step_count; i++) {
        bool small;
        const size_t items = step_items(call, i, &small);
        if (items >= POOL_MAX_ITEMS) {
            snprintf(message, PLAN_MESSAGE_SIZE, "%zu pieces of work for %zu images at once, expected fewer than %zu: bring fewer", items, call->images,
                     POOL_MAX_ITEMS);
            return -1;
        }
    }
    return 0;
}

int graph_run(Plan *plan, const GraphRun *run, char message[PLAN_MESSAGE_SIZE]) {
    if (graph_fit(plan, run->length, message) != 0) {
        return -1;
    }
    size_t rows = 1;
    for (uint32_t i = 0; i < plan->buffer_count; i++) {
        rows = plan->buffers[i].kind != BUFFER_INPUT && plan->buffers[i].rows > rows ? plan->buffers[i].rows : rows;
    }
    const size_t most = together(plan, run->images, rows), before = plan->arena_bytes;
    plan->arena = plan_grown(plan->arena, &plan->arena_bytes, plan_bytes(plan->token_bytes, most));
    plan->scratch = plan_grown(plan->scratch, &plan->scratch_bytes, plan_bytes(plan->thread_bytes, pool_threads(plan->pool)));
    if (plan->arena == NULL || plan->scratch == NULL) {
        snprintf(message, PLAN_MESSAGE_SIZE, "out of memory for %zu images at once", most);
        return -1;
    }
    if (plan->arena_bytes > before && plan->arena_bytes >= LARGE) {
        platform_large_pages(plan->arena, plan->arena_bytes);
    }
    clear_outputs(plan, run);
    for (size_t first = 0; first < run->images; first += most) {
        GraphCall call = {.plan = plan, .run = run, .first = first, .images = run->images - first < most ? run->images - first : most};
        if (places_ready(&call, message) != 0) {
            return -1;
        }
        if (items_fit(&call, message) != 0) {
            free(call.segments);
            return -1;
        }
        const PoolJob job = {.steps = plan->step_count, .items = step_items, .work = step_work, .context = &call};
        pool_run(plan->pool, &job);
        free(call.segments);
    }
    if (plan->arena_bytes >= MUCH) {
        platform_forget(plan->arena, plan->arena_bytes);
    }
    return 0;
}
