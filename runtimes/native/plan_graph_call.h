/* One call of a graph's plan, and where its rows lie: shared by plan_graph*.c. */
#ifndef VLM_PLAN_GRAPH_CALL_H
#define VLM_PLAN_GRAPH_CALL_H

#include "plan_graph.h"

typedef struct {
    Plan *plan;
    const GraphRun *run;
    size_t first, images; /* [first, first + images) are computed now */
    size_t *segments;     /* where those that see each other begin, and the end; NULL: no attention asks */
    size_t segment_count;
} GraphCall;

static inline const PlanBuffer *buffer_of(const GraphCall *call, PlanRef ref) { return &call->plan->buffers[ref.buffer]; }

/* Row `row` of all images' rows. */
static inline float *row_at(const GraphCall *call, PlanRef ref, size_t row) {
    const PlanBuffer *b = buffer_of(call, ref);
    float *base;
    if (b->kind == BUFFER_INPUT) {
        base = (float *)(uintptr_t)call->run->inputs[b->offset] + call->first * b->rows * b->width; /* never written */
    } else if (b->kind == BUFFER_OUTPUT) {
        base = call->run->outputs[b->offset] + call->first * b->rows * b->width;
    } else {
        base = (float *)(void *)(call->plan->arena + b->offset * call->images);
    }
    return base + row * b->width + ref.column;
}

/* The integers of all images. */
static inline const int64_t *integers_of(const GraphCall *call, PlanRef ref) {
    const PlanBuffer *b = buffer_of(call, ref);
    return (const int64_t *)call->run->inputs[b->offset] + call->first * b->rows * b->width;
}

static inline size_t integers_count(const GraphCall *call, PlanRef ref) {
    return call->images * buffer_of(call, ref)->rows * buffer_of(call, ref)->width;
}

static inline QuantRows codes_of(const GraphCall *call, PlanRef ref) {
    const PlanBuffer *b = buffer_of(call, ref);
    const size_t blocks = (b->width + BLOCK - 1) / BLOCK, rows = call->images * b->rows;
    int8_t *codes = (int8_t *)call->plan->arena + b->offset * call->images;
    float *scales = (float *)(void *)(codes + rows * blocks * BLOCK);
    return (QuantRows){.codes = codes, .scales = scales, .offsets = (int32_t *)(void *)(scales + rows * blocks), .blocks = blocks};
}

static inline ByteRows bytes_of(const GraphCall *call, PlanRef ref) {
    const PlanBuffer *b = buffer_of(call, ref);
    const size_t stride = byte_stride(b->width), rows = call->images * b->rows;
    uint8_t *codes = call->plan->arena + b->offset * call->images;
    float *scales = (float *)(void *)(codes + rows * stride);
    return (ByteRows){.codes = codes, .scales = scales, .zeros = (int32_t *)(void *)(scales + rows), .stride = stride};
}

static inline const PanelMatrix *matrix_of(const GraphCall *call, int32_t weight) { return &call->plan->weights[weight].matrix; }

static inline const float *vector(const GraphCall *call, int32_t weight) {
    return weight >= 0 ? (const float *)(const void *)matrix_of(call, weight)->data : NULL;
}

/* The buffer that says how many rows a step has. */
static inline PlanRef result_of(const PlanStep *step) {
    return step->out[0].buffer >= 0 ? step->out[0] : step->out[1].buffer >= 0 ? step->out[1] : step->out[2];
}

static inline size_t rows_of(const GraphCall *call, const PlanStep *step) { return call->images * buffer_of(call, result_of(step))->rows; }

/* Items of a product, and one of them. */
size_t product_items(const GraphCall *call, const PlanStep *step);
void product_work(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch);

/* The same of a chain, whose first step has the number `index`; what each of its steps took is counted. */
size_t chain_items(const GraphCall *call, const PlanStep *step);
void chain_work(const GraphCall *call, size_t index, size_t item, size_t thread, uint8_t *scratch);

/* One row of a step that reads integers or turns by angles. */
void place_work(const GraphCall *call, const PlanStep *step, size_t row);

/* The row of an image that a GRAPH_PICK chooses. */
void pick_row(const GraphCall *call, const PlanStep *step, size_t image);

/* What a call's integers say: finds the segments (the caller frees them). −1 with the reason in `message`. */
int places_ready(GraphCall *call, char message[PLAN_MESSAGE_SIZE]);

/* Sizes for a length. −1 with the reason in `message`: the plan has none for it. */
int graph_fit(Plan *plan, size_t length, char message[PLAN_MESSAGE_SIZE]);
void spread_work(const GraphCall *call, const PlanStep *step, size_t unit);

/* What the queries from `query` on may see of an image's keys; `first`: the first key that the mask shows. For HeadAttention's `hide`. */
typedef struct {
    const int64_t *mask;
    size_t query, keys, prefix, first;
    bool causal;
} GraphSight;

GraphSight graph_sight(const GraphCall *call, const PlanStep *step, size_t image, size_t query);
void graph_hide(const void *context, size_t row, size_t key, size_t count, float *scores);

/* Counts the seconds since `begin` for a step, where they are measured, and returns what time it is. */
double graph_counted(const Plan *plan, size_t thread, size_t index, double begin);

#endif
