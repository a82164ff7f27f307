/* One call of a graph's plan, and where its rows lie: shared by plan_graph*.c. */
#ifndef VLM_PLAN_GRAPH_CALL_H
#define VLM_PLAN_GRAPH_CALL_H

#include "plan_graph.h"

typedef struct {
    Plan *plan;
    const GraphRun *run;
    size_t first, images; /* [first, first + images) are computed now */
} GraphCall;

static inline const PlanBuffer *buffer_of(const GraphCall *call, PlanRef ref) { return &call->plan->buffers[ref.buffer]; }

/* Row `row` of all images' rows. */
static inline float *row_at(const GraphCall *call, PlanRef ref, size_t row) {
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

/* Counts the seconds since `begin` for a step, where they are measured, and returns what time it is. */
double graph_counted(const Plan *plan, size_t thread, size_t index, double begin);

#endif
