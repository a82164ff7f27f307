/* KV cache and token loop over a lowered decoder. No Python in here: all of it may run with the interpreter lock released.
 *
 * The graphs' signatures: embed_tokens maps token ids int64 [batch, 1] to embeddings float32 [batch, 1, hidden]. The decoder takes
 * `inputs_embeds` float32 [batch, sequence, hidden], optionally `position_ids` int64 [batch, sequence] or [3, batch, sequence],
 * `seqlens_k` int32 [batch] (valid length after the step, minus one), `total_sequence_length` int32 (largest valid length after the
 * step) and, for each cache tensor, `past_key_values.*` [batch, kv_heads, capacity, head_dim]; it gives `logits` float32
 * [batch, 1, vocab] of the last token and `present.*`, which is bound to the same memory as its past. */
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

typedef struct {
    size_t length;         /* valid cache entries */
    bool logits_valid;     /* `logits` holds what follows the last valid entry */
    bool armed;            /* `start` was called: takes part in decode */
    bool finished;         /* its EOS came */
    bool pushed;           /* the pending token came from outside, so `logits` is of before it */
    int64_t pending;       /* newest token, not yet in the cache; −1: none */
    int64_t next_position; /* position of the pending (or next) token */
    bool has_sampler;
    Sampler sampler;
    int64_t *eos;
    size_t eos_count;
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
    size_t total_rank;    /* total_sequence_length is a scalar (0) or [1] */
    DecoderRow *rows;
    float *logits; /* [batch, vocab] */
    CacheTensor *caches;
    size_t cache_count;
    void *kv;
    size_t kv_bytes;
    /* One step's inputs, bound once for a span of rows. */
    float *embeds;
    int64_t *tokens, *positions;
    int32_t *seqlens, total;
    size_t span_first, span_count; /* count 0: nothing is bound */
    OrtIoBinding *span_embed, *span_decoder;
    bool *running; /* [batch] rows of the current step */
    uint8_t *saved; /* what a step would overwrite in rows that sit it out */
    size_t saved_row_bytes;
    RunTimes embed_times, decoder_times;
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

/* Appends to a row. `positions` [position axes, tokens]. Refused before anything runs when it does not fit. */
DecoderStatus decoder_prefill(Decoder *decoder, size_t row, const float *embeds, const int64_t *positions, size_t tokens,
                              char message[ORT_MESSAGE_SIZE]);

/* Runs a pushed token where there is one, then points *logits at the row's next-token logits. */
DecoderStatus decoder_logits(Decoder *decoder, size_t row, const float **logits, char message[ORT_MESSAGE_SIZE]);

/* Takes ownership of *sampler and eos (malloc) on success. */
DecoderStatus decoder_start(Decoder *decoder, size_t row, Sampler *sampler, int64_t *eos, size_t eos_count, int64_t next_position,
                            char message[ORT_MESSAGE_SIZE]);

/* Up to `steps` tokens for each armed, unfinished row; `outputs` [batch] is filled (free with row_outputs_free). */
DecoderStatus decoder_decode(Decoder *decoder, size_t steps, const atomic_bool *cancelled, RowOutput *outputs,
                             char message[ORT_MESSAGE_SIZE]);
void row_outputs_free(RowOutput *outputs, size_t batch);

DecoderStatus decoder_push(Decoder *decoder, size_t row, int64_t token, char message[ORT_MESSAGE_SIZE]);
DecoderStatus decoder_truncate(Decoder *decoder, size_t row, size_t length, char message[ORT_MESSAGE_SIZE]);

/* Makes row `row` a copy of the first `length` entries of another row (of this cache or another one of the same decoder). */
DecoderStatus decoder_copy_prefix(Decoder *decoder, size_t row, const Decoder *source, size_t source_row, size_t length,
                                  char message[ORT_MESSAGE_SIZE]);

/* Shared by decoder*.c: */

/* Formats a message and returns `status`. */
DecoderStatus decoder_fail(DecoderStatus status, char message[ORT_MESSAGE_SIZE], const char *format, ...);
/* Puts the graph's name before ONNX Runtime's message; returns DECODER_DEVICE. */
DecoderStatus decoder_run_failed(const SessionCore *core, char message[ORT_MESSAGE_SIZE]);

/* Frees what is bound for decoding. */
void decoder_unbind(Decoder *decoder);
/* Binds rows [first, first + count) for `tokens` new tokens each. The memory behind the pointers must outlive the binding. */
int decoder_bind(Decoder *decoder, size_t first, size_t count, size_t tokens, const float *embeds, const int64_t *positions,
                 const int32_t *seqlens, const int32_t *total, OrtIoBinding **out, char message[ORT_MESSAGE_SIZE]);
void run_times_add(RunTimes *times, double seconds);

#endif
