/* A decoder as a flat list of fused steps over packed weights, read from one file that stays mapped: the alternative to a session of
 * ONNX Runtime for decoders whose every operation has a kernel here. vlm_edge/targets/native/ writes the file; what it may hold is
 * checked when it is opened, so that a damaged one is refused and never read out of bounds.
 *
 * Activations are rows of float32, one row per token of the call (rows · tokens of them; after STEP_LAST one per row), in buffers that
 * share one arena. Nothing that is computed depends on the number of threads. */
#ifndef VLM_PLAN_H
#define VLM_PLAN_H

#include "kernels/kernels.h"
#include "pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PLAN_VERSION 3 /* one more with every change of what a file may hold or of what its numbers mean; plan_file.py has it too */
#define PLAN_MESSAGE_SIZE 1024
#define PLAN_MAX_RANK 8

typedef enum {
    STEP_QUANTIZE = 1, /* in0 → out0 in 8 bits */
    STEP_MATMUL,       /* in0 · weight0 (+ bias weight1), unary arg0 → out0 */
    STEP_GATED,        /* in0 · weight0, whose panels alternate between gate and up (bias weight1 likewise): unary arg0 of the gate times up → out0 */
    STEP_NORM,         /* in0 (+ in1) (+ bias weight2) → out1; its norm, weight0 and bias weight1, → out0 and, in 8 bits, out2. arg0: 0 RMS, 1 layer; arg1: norms side by side in a row */
    STEP_ANGLES,       /* cosines and sines, arg0 of each, of position · frequency: weight0 frequencies, weight1 axes, real0 factor → out0 */
    STEP_ROTARY,       /* queries in0, keys in1 → rotated; keys and values in2 into the cache; queries → out0. See plan_attention.c */
    STEP_ATTENTION,    /* queries in0 over the cache → out0; weight0 [heads][distances]: what is added by the distance to a key, the farthest first */
    STEP_COMBINE,      /* the parts of an attention of single tokens, brought together; follows its STEP_ATTENTION */
    STEP_CROSS,        /* queries in0 over static keys and values → out0. See plan_attention.c */
    STEP_LAST,         /* the last token's row of in0 → out0 */
    STEP_UNARY,        /* unary arg0 of in0 · real0 → out0, times real1 */
    STEP_ADD,          /* in0 + in1 (or + weight0, a vector) → out0 */
    STEP_MULTIPLY,     /* in0 · in1 (or · weight0) → out0 */
    STEP_LOOKUP,       /* row arg0 + position of table weight0 → out0; arg1: 1 for the entry's index instead of the position */
    STEP_SELECT,       /* in0 where the token's block is not 0, else in1 → out0 */
    STEP_SEEN,         /* in0 where one of the token's numbers of further input arg0 is not 0, else 0 → out0 */
    STEP_GREATER,      /* 1 where in0 > real0, else 0 → out0 */
    STEP_REFINE,       /* of the rough logits in0 · weight0 (the largest of each panel in in1) those that may be the largest, anew with weight2 → out0;
                        * weight1: [blocks][panels] of (7.5 · the largest scale)². See plan_head.h */
    STEP_KINDS
} StepKind;

#define STEP_INPUTS 4
#define STEP_OUTPUTS 3
#define STEP_WEIGHTS 3
#define STEP_ARGUMENTS 12

/* A part of a buffer's rows: from number `column` on. Buffer −1: none. */
typedef struct {
    int32_t buffer, column;
} PlanRef;

typedef struct {
    uint32_t kind;
    uint32_t last;  /* runs on one row per row of the batch, after STEP_LAST */
    uint32_t width; /* numbers of a row that it makes or reads */
    PlanRef in[STEP_INPUTS];
    PlanRef out[STEP_OUTPUTS];
    int32_t weight[STEP_WEIGHTS]; /* −1: none */
    int32_t arg[STEP_ARGUMENTS];
    float real[4];
    uint32_t chain;    /* of a graph: GraphChain, found when the plan is opened */
    CacheFormat cache; /* of the caches it reads or writes; what they are says it, not the file */
} PlanStep;

typedef enum { BUFFER_FLOATS = 0, BUFFER_CODES, BUFFER_EMBEDS, BUFFER_LOGITS, BUFFER_INPUT, BUFFER_OUTPUT, BUFFER_BYTES, BUFFER_KINDS } BufferKind;

/* `offset`: bytes from the arena's beginning, per token of the call. BUFFER_INPUT: `offset` is the number of a further input.
 * BUFFER_INPUT, of a decoder: one with `width` floats per token. Of a graph: of floats or int64, as the signature says.
 * `rows`: in the plan of a graph (plan_graph.h) the rows of an image; `offset` is then per image. `place`: the offset in the file, where
 * calls of other lengths have others. */
typedef struct {
    uint32_t kind, width, rows;
    uint32_t uses; /* of a graph: how often steps name it, found when the plan is opened */
    uint64_t offset, place;
} PlanBuffer;

/* WEIGHT_BYTES: a ByteMatrix, its scales, bias, sums and codes one after another (plan_graph.h). The last two: tables of plan_rows.h. */
typedef enum { WEIGHT_VECTOR = WEIGHT_FORMATS, WEIGHT_INTEGERS, WEIGHT_BYTES, WEIGHT_HALF_ROWS, WEIGHT_BYTE_ROWS } PlainFormat;

typedef struct {
    PanelMatrix matrix; /* `format` beyond WEIGHT_FORMATS: plain floats [depth][width], or int32 */
    uint64_t bytes;
} PlanWeight;

/* What steps write of an output: nothing, some numbers, all. */
typedef enum { WRITTEN_NONE = 0, WRITTEN_SOME, WRITTEN_ALL } PlanWritten;

typedef struct {
    char *name;
    uint32_t type, rank;
    int64_t shape[PLAN_MAX_RANK];
    char *symbols[PLAN_MAX_RANK];
    PlanWritten written; /* of a graph's output, found when the plan is opened */
} PlanValue;

typedef struct {
    const Kernels *kernels;
    Pool *pool;
    bool graph; /* steps and buffers are those of plan_graph.h, and it runs by graph_run */
    bool joined; /* of a graph: all rows of a call are computed together, for some read others */
    bool rows;  /* it is a table that tokens take rows of (plan_rows.h), and runs by rows_run */
    void *file;
    size_t file_bytes;
    int descriptor; /* of a table that is read row by row; −1: none */
    PlanValue *inputs, *outputs;
    uint32_t input_count, output_count, cache_count;
    PlanBuffer *buffers;
    uint32_t buffer_count;
    PlanWeight *weights;
    uint32_t weight_count;
    PlanStep *steps;
    uint32_t step_count;
    uint64_t token_bytes;  /* of the arena, per token */
    uint64_t place_bytes;  /* and in the file, where calls of other lengths have others */
    size_t length, longest; /* of a graph whose calls bring a length: that its sizes are for now (0: none), and the most; 0: all sizes are fixed */
    size_t hidden, vocab;
    uint32_t position_axes;
    int32_t block_input;   /* the further input that numbers blocks of tokens, or −1 */
    /* What a call needs besides, grown when it is called. */
    uint8_t *arena, *scratch;
    size_t arena_bytes, scratch_bytes, thread_bytes;
    float *parts;
    size_t parts_room;
    double *seconds; /* NULL, or where each thread adds up the time of each step: [threads][steps] */
} Plan;

/* One call: `tokens` new tokens for each of `rows` rows. */
typedef struct {
    size_t rows, tokens, capacity;
    const float *embeds;      /* [rows · tokens][hidden] */
    const int64_t *positions; /* [position_axes][rows · tokens] */
    const int32_t *seqlens;   /* [rows]: valid entries after this call, minus one */
    float *logits;            /* [rows][vocab]; with `each` [rows · tokens][vocab] */
    uint8_t *const *caches;   /* each [rows][heads][capacity][head size]; those of codes have their scales in others, [rows][heads · blocks][capacity] */
    const size_t *cache_row_bytes;
    const uint8_t *const *inputs; /* further inputs, in the order of the file's */
    const size_t *input_sizes;    /* per further input: entries of static keys and of their mask, or numbers per token */
    /* Logits of every token, and all of it bit for bit as if the tokens were run one after another: attention takes them one by one,
     * and quantised products are the same for any number of rows. */
    bool each;
    /* Of the logits only the largest is wanted (where plan_ranks, one token of each row): the others may be rough. `kept`: where what
     * plan_complete needs goes, [rows][plan_kept_bytes]. */
    bool ranked;
    uint8_t *kept;
} PlanRun;

/* Whether a file is a plan of this version; nothing else of it is looked at. −1 with the reason in `message`. */
int plan_known(const char *path, char message[PLAN_MESSAGE_SIZE]);
/* Opens a plan and makes its threads. `kernels`: a name, or NULL for the best. NULL with the reason in `message`. */
Plan *plan_open(const char *path, size_t threads, bool spin, const char *kernels, char message[PLAN_MESSAGE_SIZE]);
void plan_close(Plan *plan);

/* One call at a time. −1 with the reason in `message`: memory ran out, or a position that a table does not have. */
int plan_run(Plan *plan, const PlanRun *run, char message[PLAN_MESSAGE_SIZE]);

/* Whether a call of so many rows may be `ranked`. */
bool plan_ranks(const Plan *plan, size_t rows);
size_t plan_kept_bytes(const Plan *plan);
/* All logits [vocab] of a row of a ranked call. One call at a time. −1 with the reason in `message`. */
int plan_complete(Plan *plan, const uint8_t *kept, float *logits, char message[PLAN_MESSAGE_SIZE]);

/* Shared by plan*.c: one call's state. */
typedef struct {
    Plan *plan;
    const PlanRun *run;
    size_t first, tokens;    /* the tokens [first, first + tokens) of each row that are computed now */
    size_t rows;             /* rows · tokens */
    size_t longest;          /* most valid entries of any row, after these tokens */
    size_t parts;            /* an attention of single tokens: the most parts of any */
} PlanCall;

/* A file, mapped for reading. NULL on failure. `descriptor`: of the open file, −1 where the system has none; the caller closes it. */
void *mapped_open(const char *path, size_t *bytes, int *descriptor);
void mapped_close(void *file, size_t bytes);
/* Says that all of a mapped file will be wanted soon. */
void mapped_want(void *file, size_t bytes);
void descriptor_close(int descriptor);
/* Bytes of an open file; false when it has no so many there, or cannot be read. */
bool descriptor_read(int descriptor, void *to, size_t bytes, size_t offset);

/* What is wrong with a plan that was read, or NULL. Also counts its caches and sizes its threads' memory. */
const char *plan_check(Plan *plan);

/* At least `bytes` of memory, aligned to 64; what was in it is lost. NULL, with nothing kept, when there is none. */
uint8_t *plan_grown(uint8_t *memory, size_t *have, size_t bytes);
void plan_freed(void *memory); /* what plan_grown gave */
/* `count` times `each` bytes and a line; more than plan_grown ever has where that is no number. */
static inline size_t plan_bytes(uint64_t each, size_t count) {
    return each > (SIZE_MAX / 2 - 64) / (count > 0 ? count : 1) ? SIZE_MAX : (size_t)each * count + 64;
}

float *plan_row(const PlanCall *call, PlanRef ref, bool last, size_t row);
size_t plan_stride(const PlanCall *call, PlanRef ref);
/* 0, or −1 with the reason in `message`: the call's positions are not in a table, or its static inputs do not fit each other. */
int plan_ready(const Plan *plan, const PlanRun *run, char message[PLAN_MESSAGE_SIZE]);
/* How many tokens the plan's tables of positions have left for a row whose next token has that position and that entry. */
size_t plan_room(const Plan *plan, int64_t position, int64_t index);
/* Which of all the call's tokens [rows · tokens] a row of a step's buffers is for. */
size_t plan_token(const PlanCall *call, const PlanStep *step, size_t row);
/* Valid entries of a row before the tokens that are computed now. */
size_t plan_past(const PlanCall *call, size_t row);
/* Whether attention takes each token by itself. */
static inline bool plan_single(const PlanCall *call) { return call->run->tokens == 1 || call->run->each; }

size_t attention_items(const PlanCall *call, const PlanStep *step);
void attention_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch);
void attention_combine(const PlanCall *call, const PlanStep *step, size_t row);
void attention_split(PlanCall *call);
void rotary_work(const PlanCall *call, const PlanStep *step, size_t row);
void angles_work(const PlanCall *call, const PlanStep *step, size_t row);
void cross_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch);
size_t cross_items(const PlanCall *call, const PlanStep *step);
size_t attention_scratch(const PlanStep *step);

#endif
