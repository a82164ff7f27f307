/* The plan of a graph that is no decoder: a vision encoder, a projector, a resampler. Every image goes through the same steps and knows
 * nothing of the others; what has a size has the same for each, so that shapes are known when the plan is made, and whatever only moves
 * numbers (patches of a picture, pixel shuffle, a class token) is a list of places to copy.
 *
 * A buffer holds `rows` rows of `width` numbers for each image of a call. Steps run over the rows of all images that are computed together.
 * Nothing that is computed depends on the number of threads; on the images beside it, no more than the order in which a product of floats
 * adds up. */
#ifndef VLM_PLAN_GRAPH_H
#define VLM_PLAN_GRAPH_H

#include "plan.h"

typedef enum {
    GRAPH_COPY = 1,  /* pairs of weight0 (place in out0, place in in0, or without one in weight1), arg0 numbers each */
    GRAPH_QUANTIZE,  /* in0 → out0 in 8 bits: codes per block (BUFFER_CODES) or per row (BUFFER_BYTES) */
    GRAPH_MATMUL,    /* unary arg0 of in0 · weight0 (+ bias weight1) → out0; arg1: added to what out0 holds, with WEIGHT_BYTES */
    GRAPH_NORM,      /* in0 (+ in1) (+ bias weight2) → out1; its norm, weight0 and bias weight1, → out0, in 8 bits → out2. arg0: 0 RMS, 1 layer; arg1: norms side by side */
    GRAPH_ATTENTION, /* queries in0 over keys in1 and values in2 → out0. arg0 heads, arg1 numbers of a head; arg2: halves will do; real0 scale */
    GRAPH_UNARY,     /* unary arg0 of in0 · real0, times real1 → out0 */
    GRAPH_ADD,       /* in0 + in1, or + weight0, of one row or of all rows of an image → out0 */
    GRAPH_MULTIPLY,
    GRAPH_KINDS
} GraphKind;

/* One call: inputs and outputs [images][numbers of its buffer], in the order of the file's. */
typedef struct {
    size_t images;
    const float *const *inputs;
    float *const *outputs;
} GraphRun;

/* One call at a time. −1 with the reason in `message`: memory ran out. */
int graph_run(Plan *plan, const GraphRun *run, char message[PLAN_MESSAGE_SIZE]);

/* What is wrong with the plan of a graph that was read, or NULL. Also sizes its threads' memory. */
const char *graph_check(Plan *plan);

/* A WEIGHT_BYTES weight in a file: scales, bias and sums of [panels · 16] each, then the codes. */
size_t graph_byte_matrix_bytes(const PanelMatrix *matrix);
ByteMatrix graph_byte_matrix(const PanelMatrix *matrix);

#define GRAPH_TILE 48      /* rows of a product that are finished before the next ones */
#define GRAPH_UNIT 4       /* panels of a product that are finished together */
#define GRAPH_QUERIES 512  /* of an item of attention: each item brings the keys and values into the order of products anew */

#define GRAPH_CHAIN_ROWS 24 /* of an item of a chain, at most */

/* A product, its result in 8 bits and the product of those, with nothing else that reads what lies between: run as one step, some rows at a
 * time, so that the wide rows of a transformer's two layers are neither written to memory nor read from it. */
typedef enum { CHAIN_NONE = 0, CHAIN_FIRST, CHAIN_INNER } GraphChain;

/* Bytes of a thread's memory that a step needs. */
size_t graph_scratch(const PlanStep *step);

#endif
