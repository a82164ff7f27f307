/* KV cache and token loop over a lowered decoder. No Python in here: all of it may run with the interpreter lock released.
 *
 * The graphs' signatures: embed_tokens maps token ids int64 [batch, 1] to embeddings float32 [batch, 1, hidden]. The decoder takes
 * `inputs_embeds` float32 [batch, sequence, hidden], optionally `position_ids` int64 [batch, sequence] or [3, batch, sequence],
 * `seqlens_k` int32 [batch] (valid length after the step, minus one), `total_sequence_length` int32 (largest valid length after the
 * step) and, for each cache tensor, `past_key_values.*` [batch, kv_heads, capacity, head_dim]; it gives `logits` float32
 * [batch, 1, vocab] of the last token and `present.*`, which is bound to the same memory as its past.
 *
 * Its further inputs are told apart by their dimensions: `state.*` [batch, …] is recurrent (`present_state.*` follows it), one with
 * a dimension "sequence" has a value per token, any other is static for a row ([1, …]: for all rows). Dimensions of one name agree
 * within a row; where rows differ, the shorter ones are filled with zeros. Outputs besides those named are kept for each row. */
#ifndef VLM_DECODER_H
#define VLM_DECODER_H

#include "sampling.h"
#include "session.h"

#define DECODER_MAX_BATCH 1024

typedef enum {
    DECODER_OK = 0,
    DECODER_DEVICE,  /* ONNX Runtime refused, memory ran out, or the graph is not as expected */
    DECODER_CONTEXT, /* the cache is full */
    DECODER_USAGE    /* the call does not fit the row's state */
} DecoderStatus;

#define SIZE_UNKNOWN SIZE_MAX

/* A named dynamic dimension of the further inputs ("source"). */
typedef struct {
    const char *name;
    bool fillable;  /* a mask hides filled places, or only per-token inputs have it; never where all rows share an array */
    bool of_static; /* fixed when a row is bound; otherwise by the first values per token */
    size_t longest; /* over all rows */
} InputDim;

/* The shape of one row's share of a tensor, without batch and sequence. Dynamic dimensions are looked up in a list of sizes. */
typedef struct {
    size_t rank, element;
    int64_t fixed[MAX_RANK]; /* −1: dynamic */
    size_t dim[MAX_RANK];    /* which one */
} RowShape;

typedef enum { INPUT_STATIC, INPUT_STATE, INPUT_TOKEN } InputKind;

/* A further input, kept for all rows as [batch, …] with dynamic dimensions at their longest; for per-token inputs it is what
 * generated tokens have. */
typedef struct {
    const ValueInfo *info;
    InputKind kind;
    bool shared; /* static [1, …]: one array for all rows */
    RowShape shape;
    size_t row_bytes;
    uint8_t *data;
    /* A recurrent state's output, what the rows were bound to, and what a run gives. */
    const char *present;
    uint8_t *initial, *next;
} FurtherInput;

/* A further output, of one step of all rows. Each row keeps its newest token's share in `DecoderRow.outputs`. */
typedef struct {
    const ValueInfo *info;
    size_t sequence_axis; /* 0: it has none */
    RowShape shape;
    uint8_t *data;
} FurtherOutput;

typedef struct {
    size_t length;         /* valid cache entries */
    bool logits_valid;     /* `logits` holds what follows the last valid entry */
    bool rough;            /* of those only the largest is right; see decoder_complete */
    bool armed;            /* `start` was called: takes part in decode */
    bool finished;         /* its EOS came */
    bool pushed;           /* the pending token came from outside, so `logits` is of before it */
    int64_t pending;       /* newest token, not yet in the cache; −1: none */
    int64_t next_position; /* position of the pending (or next) token */
    bool has_sampler;
    Sampler sampler;
    int64_t *eos;
    size_t eos_count;
    bool bound; /* its further inputs are there */
    bool used;  /* something ran since it was bound */
    size_t *sizes;    /* of the dynamic dimensions; SIZE_UNKNOWN: not fixed yet */
    uint8_t *outputs; /* further outputs of the newest token, one after another, exactly as large as `sizes` says */
    size_t outputs_room;
} DecoderRow;

/* One cache tensor of the graph, for all rows: [batch, heads, capacity, width] of `element`-sized numbers. */
typedef struct {
    const ValueInfo *past;
    const char *present;
    size_t heads, width, element;
    size_t row_bytes;
    uint8_t *data;
} CacheTensor;

/* Seconds of each run, until somebody takes them. */
typedef struct {
    double *seconds;
    size_t count, room;
} RunTimes;

typedef struct {
    SessionCore *decoder, *embed;
    size_t batch, capacity, hidden, vocab, prefill_chunk;
    size_t position_axes; /* 0: the graph takes no position_ids, 1: [batch, sequence], 3: M-RoPE */
    bool counts_lengths;  /* seqlens_k and total_sequence_length are inputs */
    size_t total_rank;    /* total_sequence_length is a scalar (0) or [1] */
    DecoderRow *rows;
    float *logits; /* [batch, vocab] */
    CacheTensor *caches;
    size_t cache_count;
    void *kv;
    size_t kv_bytes;
    InputDim *dims;
    size_t dim_count;
    FurtherInput *inputs;
    size_t input_count;
    FurtherOutput *outputs;
    size_t output_count;
    bool needs_binding; /* it has static inputs or recurrent states */
    bool recurrent;
    /* One step's inputs, bound once for a span of rows. */
    float *embeds;
    int64_t *tokens, *positions;
    int32_t *seqlens, total;
    size_t span_first, span_count; /* count 0: nothing is bound */
    struct DecoderRun *span_run;
    uint8_t **plan_caches; /* where a plan finds each cache of the rows it runs, and their sizes */
    size_t *plan_cache_bytes, *plan_entries;
    uint8_t **span_inputs, **span_outputs; /* memory of the further ones */
    size_t *span_sizes;
    OrtIoBinding *span_embed, *span_decoder;
    bool *running; /* [batch] rows of the current step */
    uint8_t *saved; /* what a step would overwrite in rows that sit it out */
    size_t saved_row_bytes;
    RunTimes embed_times, decoder_times;
    uint8_t *kept; /* [batch] what all logits of a rough row are made of, then the same of the rows of one run */
    size_t kept_bytes; /* of a row; 0: this decoder has no rough logits */
    uint8_t *draft; /* what a run of drafts needs */
    size_t draft_bytes;
} Decoder;

/* What one row produced in one decode call. `top` has `top_count` entries for every token. */
typedef struct {
    size_t count, top_count;
    int64_t *tokens;
    double *logprobs;
    TokenLogprob *top;
    bool finished;
} RowOutput;

/* A cache for `batch` rows of `capacity` entries. Keeps a reference to both sessions. NULL on failure. */
Decoder *decoder_new(SessionCore *decoder, SessionCore *embed, size_t batch, size_t capacity, size_t prefill_chunk,
                     char message[ORT_MESSAGE_SIZE]);
void decoder_free(Decoder *decoder);

/* Values of the further inputs in the order of `Decoder.inputs` (NULL: not given), and the sizes of the row's dimensions with them. */
typedef struct {
    const uint8_t *const *data;
    const size_t *sizes;
} InputValues;

/* Sets an empty row's static inputs and initial states, every one given as `values->sizes` says. */
DecoderStatus decoder_set_inputs(Decoder *decoder, size_t row, const InputValues *values, char message[ORT_MESSAGE_SIZE]);

/* Appends to a row. `positions` [position axes, tokens], `values` [tokens, …]. Refused before anything runs when it does not fit. */
DecoderStatus decoder_prefill(Decoder *decoder, size_t row, const float *embeds, const int64_t *positions, size_t tokens,
                              const InputValues *values, char message[ORT_MESSAGE_SIZE]);

/* Runs a pushed token where there is one, then points *logits at the row's next-token logits. */
DecoderStatus decoder_logits(Decoder *decoder, size_t row, const float **logits, char message[ORT_MESSAGE_SIZE]);

/* Takes ownership of *sampler and eos (malloc) on success. `values`: what every token to come has. */
DecoderStatus decoder_start(Decoder *decoder, size_t row, Sampler *sampler, int64_t *eos, size_t eos_count, int64_t next_position,
                            const InputValues *values, char message[ORT_MESSAGE_SIZE]);

/* Up to `steps` tokens for each armed, unfinished row; `outputs` [batch] is filled (free with row_outputs_free). */
DecoderStatus decoder_decode(Decoder *decoder, size_t steps, const atomic_bool *cancelled, RowOutput *outputs,
                             char message[ORT_MESSAGE_SIZE]);
void row_outputs_free(RowOutput *outputs, size_t batch);

/* Whether `decoder_verify` can be had: the decoder is a plan, which gives logits of several tokens, and has no recurrent state. */
bool decoder_verifies(const Decoder *decoder);

/* Tokens that may follow a row's newest one. */
typedef struct {
    int64_t *tokens;
    size_t count;
} Draft;

/* One step of every active row in which its newest token and the drafts [batch] after it run together. Each row's tokens are those that
 * as many steps of `decoder_decode` would give: one, and one more for every draft that is what the row chooses there itself. */
DecoderStatus decoder_verify(Decoder *decoder, const Draft *drafts, const atomic_bool *cancelled, RowOutput *outputs, char message[ORT_MESSAGE_SIZE]);

DecoderStatus decoder_push(Decoder *decoder, size_t row, int64_t token, char message[ORT_MESSAGE_SIZE]);
DecoderStatus decoder_truncate(Decoder *decoder, size_t row, size_t length, char message[ORT_MESSAGE_SIZE]);

/* Makes row `row` a copy of the first `length` entries of another row (of this cache or another one of the same decoder). */
DecoderStatus decoder_copy_prefix(Decoder *decoder, size_t row, const Decoder *source, size_t source_row, size_t length,
                                  char message[ORT_MESSAGE_SIZE]);

/* Runs `tokens` [batch] as one batch; the logits of all rows are then those that follow. */
DecoderStatus decoder_step(Decoder *decoder, const int64_t *tokens, char message[ORT_MESSAGE_SIZE]);

/* Row i becomes what row sources[i] was. Samplers stay where they are. */
DecoderStatus decoder_reorder(Decoder *decoder, const size_t *sources, char message[ORT_MESSAGE_SIZE]);

/* Shared by decoder*.c: */

/* Formats a message and returns `status`. */
DecoderStatus decoder_fail(DecoderStatus status, char message[ORT_MESSAGE_SIZE], const char *format, ...);
/* Puts the graph's name before ONNX Runtime's message; returns DECODER_DEVICE. */
DecoderStatus decoder_run_failed(const SessionCore *core, char message[ORT_MESSAGE_SIZE]);
DecoderStatus decoder_no_room(const Decoder *decoder, size_t row, char message[ORT_MESSAGE_SIZE]);

/* Reads both graphs' signatures: sizes, caches, further inputs and outputs. DECODER_DEVICE with the reason when they do not fit. */
DecoderStatus decoder_read_signature(Decoder *decoder, char message[ORT_MESSAGE_SIZE]);

/* Runs the pending tokens of the rows marked in `running`, all of which have room. `choosing`: their samplers are what the logits are for,
 * so that rough ones may do. */
DecoderStatus decoder_run_marked(Decoder *decoder, bool choosing, char message[ORT_MESSAGE_SIZE]);
/* Makes a row's rough logits whole. */
DecoderStatus decoder_complete(Decoder *decoder, size_t row, char message[ORT_MESSAGE_SIZE]);

/* Samples the next token of an active row from `logits` [vocab]. */
DecoderStatus decoder_emit(Decoder *decoder, size_t row, const float *logits, RowOutput *out, char message[ORT_MESSAGE_SIZE]);
/* Memory for up to `steps` tokens of every active row. −1: there is none. */
int decoder_allocate_outputs(const Decoder *decoder, size_t steps, RowOutput *outputs);

/* Forgets a row's pending token, logits and values of tokens to come, and takes it out of decode. */
void decoder_forget(Decoder *decoder, size_t row);
/* A row of length 0 goes back to what it was bound to. */
void decoder_empty_row(Decoder *decoder, size_t row);
/* Copies the first `length` entries of the caches. */
void decoder_copy_entries(Decoder *decoder, size_t row, const Decoder *source, size_t source_row, size_t length);
DecoderStatus decoder_not_bound(const Decoder *decoder, size_t row, char message[ORT_MESSAGE_SIZE]);
/* Whether two rows differ in a dimension, or in one that is fixed by binding. */
bool decoder_sizes_differ(const Decoder *decoder, const size_t *sizes, const size_t *other);
bool decoder_bound_unlike(const Decoder *decoder, const size_t *sizes, const size_t *other);

/* Bytes of one row's share; SIZE_MAX when that overflows. Unknown sizes count as 0. */
size_t row_shape_bytes(const RowShape *shape, const size_t *sizes);
/* Copies what two layouts of a row's share have in common: along each axis, the first entries up to the smaller size. */
void row_shape_copy(const RowShape *shape, uint8_t *to, const size_t *to_sizes, const uint8_t *from, const size_t *from_sizes);
/* Sets a row's sizes and makes room for them in what is kept for all rows. Rows that were emptied after use lose what they are
 * bound to where it cannot stand beside these sizes. */
DecoderStatus decoder_fit(Decoder *decoder, size_t row, const size_t *sizes, char message[ORT_MESSAGE_SIZE]);
/* Sizes of the dynamic dimensions of what is kept for all rows. */
void decoder_longest(const Decoder *decoder, size_t *sizes);
/* What generated tokens of a row have from now on: zeros where nothing is given. */
void decoder_set_token_values(Decoder *decoder, size_t row, const InputValues *values);

/* A row's recurrent states become what the run gave. */
void decoder_keep_states(Decoder *decoder, size_t row);
/* Makes room for a row's further outputs. */
DecoderStatus decoder_reserve_outputs(Decoder *decoder, size_t row, char message[ORT_MESSAGE_SIZE]);
/* Keeps the last token's share of row `at` of a run over `tokens` tokens whose outputs have dimensions of `sizes`. */
void decoder_keep_outputs(Decoder *decoder, size_t row, size_t at, uint8_t *const *outputs, size_t tokens, const size_t *sizes);

/* One run of rows [first, first + count) with `tokens` new tokens each. The memory behind the pointers must outlive the binding. */
typedef struct DecoderRun {
    size_t first, count, tokens;
    const float *embeds;
    const int64_t *positions;
    const int32_t *seqlens, *total;
    const size_t *sizes; /* of the further inputs' and outputs' dynamic dimensions */
    uint8_t *const *inputs;
    uint8_t *const *outputs;
    float *each; /* NULL, or (of a plan) where logits of every token go, [rows · tokens][vocab], with rows as if run token by token */
    bool ranked; /* only the largest logits matter */
} DecoderRun;

/* Binds embed_tokens for `each` tokens of `rows` rows; a plan is not bound to anything: *out is NULL. */
int decoder_bind_embed(Decoder *decoder, const int64_t *tokens, float *embeds, size_t rows, size_t each, OrtIoBinding **out,
                       char message[ORT_MESSAGE_SIZE]);

/* Runs embed_tokens for `count` tokens. Seconds; −1 with the reason in `message`. */
double decoder_embed(Decoder *decoder, const int64_t *tokens, size_t count, float *embeds, const OrtIoBinding *binding, char message[ORT_MESSAGE_SIZE]);

/* A plan is not bound to anything: *out is NULL. */
int decoder_bind(Decoder *decoder, const DecoderRun *run, OrtIoBinding **out, char message[ORT_MESSAGE_SIZE]);
/* Runs the decoder. Seconds; −1 with the reason in `message`. */
double decoder_execute(Decoder *decoder, const DecoderRun *run, const OrtIoBinding *binding, char message[ORT_MESSAGE_SIZE]);
/* Frees what is bound for decoding. */
void decoder_unbind(Decoder *decoder);
void run_times_add(RunTimes *times, double seconds);

#endif
