/* The plan of a graph that is no decoder: an encoder of pictures or texts, a projector, a resampler. Every image, or text, goes through the
 * same steps and knows nothing of the others; sizes are known when the plan is made, or grow with a length that the call brings
 * (GRAPH_LENGTH); whatever only moves numbers (patches of a picture, pixel shuffle, a class token) is a list of places to copy.
 *
 * Where the first dimension counts the rows of one picture (patches) an "image" here is as many of them as become one row of whatever has
 * the fewest: the first dimension of an array is a multiple of that, which its shape says (−4: four rows for each). Attention and gathering
 * then go over the rows of all of them.
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
    GRAPH_ATTENTION, /* queries in0 over keys in1 and values in2 → out0. arg0 heads, arg1 numbers of a head; arg2: halves, or 8 bits, will do; real0 scale.
                      * arg5: a GraphOver; in3 for OVER_SEGMENTS: an integer for each row, which rise from row to row;
                      * for OVER_IMAGE: keys from arg4 on are hidden where its integers are 0; arg3: and those after the query */
    GRAPH_UNARY,     /* unary arg0 of in0 · real0, times real1 → out0 */
    GRAPH_ADD,       /* in0 + in1, or + weight0, of one row or of all rows of an image → out0 */
    GRAPH_MULTIPLY,
    GRAPH_CONVERT, /* integers in0 → floats out0 */
    GRAPH_COSINE,  /* cosine of in0, arg0: sine → out0 */
    GRAPH_ROTARY,  /* heads of in0 (arg0 of them, arg1 numbers each) times cosines in1, plus their halves turned, (−second, first), times sines in2 → out0 */
    GRAPH_GATHER,  /* row in1 of in0, of all images, or of table weight0 → out0: a row for each integer */
    GRAPH_LENGTH,  /* the first step of a plan whose calls bring a length: weight0 [buffers] of (rows, rows per unit of length); arg0: the length that the
                    * file's sizes are for, arg1: the longest */
    GRAPH_SPREAD,  /* as GRAPH_COPY, by runs: weight0 [runs] of GraphSpread's numbers, each as (itself, what it grows by per unit of length) */
    GRAPH_PICK,    /* one row of each image of in0, chosen by the integers in1: arg0 GraphPick (of arg1) → out0 */
    GRAPH_KINDS
} GraphKind;

/* What an attention goes over: the rows of each image; those of all; of all, those with the same integer. */
typedef enum { OVER_IMAGE = 0, OVER_ALL, OVER_SEGMENTS } GraphOver;

/* Which row: that of the largest number, the first; the first of number arg1, or 0; the last of as many as are not 0. */
typedef enum { PICK_LARGEST = 0, PICK_EQUAL, PICK_LAST, PICK_KINDS } GraphPick;

/* `count` times `numbers` numbers, from place `from` on to place `to` on, each so many further than the one before. */
typedef struct {
    int64_t to, from, count, to_step, from_step, numbers;
} GraphSpread;

#define GRAPH_SPREAD_NUMBERS 12 /* of a run in a file */
#define GRAPH_LONGEST (1 << 20) /* no length is larger */

/* One call: inputs and outputs [images][numbers of its buffer], in the order of the file's; integers are int64. `length`: what the sizes that
 * are open are, where some are. */
typedef struct {
    size_t images, length;
    const void *const *inputs; /* floats, or int64 */
    float *const *outputs;
} GraphRun;

/* One call at a time. −1 with the reason in `message`: memory ran out, or integers lead beyond what they number. */
int graph_run(Plan *plan, const GraphRun *run, char message[PLAN_MESSAGE_SIZE]);

/* What is wrong with the plan of a graph that was read, or NULL. Also sizes its threads' memory. Called again for every new length. */
const char *graph_check(Plan *plan);

/* A run of a GRAPH_SPREAD for a length. */
GraphSpread graph_spread(const int32_t *run, size_t length);

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

/* Finds them, in a plan whose steps were checked and whose uses were counted. */
void graph_chains(Plan *plan);

/* Bytes of a thread's memory that a step needs. */
size_t graph_scratch(const PlanStep *step);

#endif
