/* Shared by plan_graph*.c: one call's state, and what a step finds its rows with. */
#ifndef VLM_PLAN_GRAPH_INTERNAL_H
#define VLM_PLAN_GRAPH_INTERNAL_H

#include "plan_graph.h"

#define GRAPH_BYTE_QUERIES 48 /* of an item of attention in 8 bits */

typedef struct {
    Plan *plan;
    const GraphRun *run;
    size_t first, images; /* [first, first + images) are computed now */
} GraphCall;

/* Row `row` of all images' rows. */
float *graph_row(const GraphCall *call, PlanRef ref, size_t row);

/* Floats of an image's packed keys and values; bytes of a thread's memory. */
size_t graph_packed_floats(size_t heads, size_t size, size_t keys);
size_t graph_byte_attention_scratch(size_t size, size_t keys);

/* Item: image · heads + head. */
void graph_pack(const GraphCall *call, const PlanStep *step, size_t item);
void graph_byte_attention(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch);

#endif
