/* Reading the decoder's signature, the memory of the cache, and binding both. */
#include "decoder.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAST "past_key_values."
#define ALIGNMENT 64
#define MAX_TIMES 65536

static int refuse(char message[ORT_MESSAGE_SIZE], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, ORT_MESSAGE_SIZE, format, arguments);
    va_end(arguments);
    return -1;
}

void run_times_add(RunTimes *times, double seconds) {
    if (times->count == times->room) {
        const size_t room = times->room == 0 ? 64 : times->room * 2;
        double *grown = room <= MAX_TIMES ? realloc(times->seconds, room * sizeof *grown) : NULL;
        if (grown == NULL) {
            return; /* nobody collects them: a statistic is not worth more memory */
        }
        times->seconds = grown;
        times->room = room;
    }
    times->seconds[times->count++] = seconds;
}

static int read_embed(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const SessionCore *embed = d->embed;
    if (embed->input_count != 1 || embed->output_count != 1 || embed->inputs[0].type != ELEMENT_INT64 || embed->inputs[0].rank != 2 ||
        embed->outputs[0].type != ELEMENT_FLOAT32 || embed->outputs[0].rank != 3) {
        return refuse(message, "graph '%s' is not an embedding of int64 [batch, sequence] into float32 [batch, sequence, hidden]", embed->name);
    }
    return 0;
}

static int read_cache(Decoder *d, const ValueInfo *past, CacheTensor *cache, char message[ORT_MESSAGE_SIZE]) {
    char present[256];
    const char *graph = d->decoder->name;
    snprintf(present, sizeof present, "present.%s", past->name + strlen(PAST));
    const ValueInfo *output = session_output(d->decoder, present);
    if (output == NULL || output->type != past->type) {
        return refuse(message, "graph '%s': '%s' has no output '%s' of its type", graph, past->name, present);
    }
    if (past->rank != 4 || past->shape[1] < 1 || past->shape[3] < 1 || element_size(past->type) == 0) {
        return refuse(message, "graph '%s': '%s' is not [batch, kv_heads, capacity, head_dim] with fixed heads", graph, past->name);
    }
    if (past->shape[2] >= 0 && (size_t)past->shape[2] != d->capacity) {
        return refuse(message, "graph '%s' has a cache of %lld entries, asked for were %zu", graph, (long long)past->shape[2], d->capacity);
    }
    if (past->shape[0] >= 0 && (size_t)past->shape[0] != d->batch) {
        return refuse(message, "graph '%s' has a batch of %lld rows, asked for were %zu", graph, (long long)past->shape[0], d->batch);
    }
    cache->past = past;
    cache->present = output->name;
    cache->heads = (size_t)past->shape[1];
    cache->width = (size_t)past->shape[3];
    cache->element = element_size(past->type);
    const size_t entry = cache->heads * cache->width * cache->element;
    if (entry > SIZE_MAX / 4 / d->capacity / d->batch) {
        return refuse(message, "a cache of %zu rows × %zu entries does not fit the address space", d->batch, d->capacity);
    }
    cache->row_bytes = entry * d->capacity;
    return 0;
}

static bool known_input(const char *name) {
    return strcmp(name, "inputs_embeds") == 0 || strcmp(name, "position_ids") == 0 || strcmp(name, "seqlens_k") == 0 ||
           strcmp(name, "total_sequence_length") == 0 || strncmp(name, PAST, strlen(PAST)) == 0;
}

static int read_signature(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const SessionCore *core = d->decoder;
    const ValueInfo *embeds = session_input(core, "inputs_embeds"), *positions = session_input(core, "position_ids");
    const ValueInfo *seqlens = session_input(core, "seqlens_k"), *total = session_input(core, "total_sequence_length");
    const ValueInfo *logits = session_output(core, "logits");
    for (size_t i = 0; i < core->input_count; i++) {
        if (!known_input(core->inputs[i].name)) {
            return refuse(message, "graph '%s' has an input '%s' that this decode loop does not know", core->name, core->inputs[i].name);
        }
    }
    if (embeds == NULL || embeds->type != ELEMENT_FLOAT32 || embeds->rank != 3 || embeds->shape[2] < 1) {
        return refuse(message, "graph '%s' has no input inputs_embeds float32 [batch, sequence, hidden]", core->name);
    }
    if (logits == NULL || logits->type != ELEMENT_FLOAT32 || logits->rank != 3 || logits->shape[1] != 1 || logits->shape[2] < 1 ||
        logits->shape[2] > INT32_MAX) {
        return refuse(message, "graph '%s' has no output logits float32 [batch, 1, vocab] of the last token only", core->name);
    }
    if (seqlens == NULL || seqlens->type != ELEMENT_INT32 || seqlens->rank != 1 || total == NULL || total->type != ELEMENT_INT32 ||
        total->rank > 1) {
        return refuse(message, "graph '%s' has no inputs seqlens_k int32 [batch] and total_sequence_length int32: was it lowered to a shared cache?",
                      core->name);
    }
    if (positions != NULL && (positions->type != ELEMENT_INT64 || (positions->rank != 2 && (positions->rank != 3 || positions->shape[0] < 1)))) {
        return refuse(message, "graph '%s': position_ids is not int64 [batch, sequence] or [axes, batch, sequence]", core->name);
    }
    d->hidden = (size_t)embeds->shape[2];
    d->vocab = (size_t)logits->shape[2];
    d->position_axes = positions == NULL ? 0 : positions->rank == 2 ? 1 : (size_t)positions->shape[0];
    d->total_rank = total->rank;
    const int64_t width = d->embed->outputs[0].shape[2];
    if (width >= 0 && (size_t)width != d->hidden) {
        return refuse(message, "graph '%s' gives embeddings of width %lld, graph '%s' takes %zu", d->embed->name, (long long)width, core->name,
                      d->hidden);
    }
    d->caches = calloc(core->input_count, sizeof *d->caches);
    if (d->caches == NULL) {
        return refuse(message, "out of memory");
    }
    for (size_t i = 0; i < core->input_count; i++) {
        if (strncmp(core->inputs[i].name, PAST, strlen(PAST)) == 0) {
            if (read_cache(d, &core->inputs[i], &d->caches[d->cache_count], message) != 0) {
                return -1;
            }
            d->cache_count++;
        }
    }
    if (d->cache_count == 0 || core->output_count != d->cache_count + 1) {
        return refuse(message, "graph '%s' has %zu cache inputs and %zu outputs, expected logits and one output for each", core->name,
                      d->cache_count, core->output_count);
    }
    return 0;
}

static int allocate(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    size_t total = 0;
    d->saved_row_bytes = d->vocab * sizeof *d->logits;
    for (size_t i = 0; i < d->cache_count; i++) {
        const size_t bytes = (d->caches[i].row_bytes * d->batch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (bytes > SIZE_MAX / 2 - total) {
            return refuse(message, "a cache of %zu rows × %zu entries does not fit the address space", d->batch, d->capacity);
        }
        total += bytes;
        d->saved_row_bytes += d->caches[i].heads * d->caches[i].width * d->caches[i].element;
    }
    const size_t axes = d->position_axes > 0 ? d->position_axes : 1;
    d->kv = platform_zeroed_alloc(total);
    d->rows = calloc(d->batch, sizeof *d->rows);
    d->logits = calloc(d->batch * d->vocab, sizeof *d->logits);
    d->embeds = calloc(d->batch * d->hidden, sizeof *d->embeds);
    d->tokens = calloc(d->batch, sizeof *d->tokens);
    d->positions = calloc(d->batch * axes, sizeof *d->positions);
    d->seqlens = calloc(d->batch, sizeof *d->seqlens);
    d->running = calloc(d->batch, sizeof *d->running);
    d->saved = d->batch > 1 ? malloc((d->batch - 1) * d->saved_row_bytes) : NULL;
    if (d->kv == NULL || d->rows == NULL || d->logits == NULL || d->embeds == NULL || d->tokens == NULL || d->positions == NULL ||
        d->seqlens == NULL || d->running == NULL || (d->batch > 1 && d->saved == NULL)) {
        return refuse(message, "no memory for a KV cache of %zu rows × %zu entries (%zu bytes): use a smaller context length or batch", d->batch,
                      d->capacity, total);
    }
    d->kv_bytes = total;
    uint8_t *next = d->kv;
    for (size_t i = 0; i < d->cache_count; i++) {
        d->caches[i].data = next;
        next += (d->caches[i].row_bytes * d->batch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    for (size_t row = 0; row < d->batch; row++) {
        d->rows[row].pending = -1;
    }
    return 0;
}

Decoder *decoder_new(SessionCore *decoder, SessionCore *embed, size_t batch, size_t capacity, size_t prefill_chunk,
                     char message[ORT_MESSAGE_SIZE]) {
    Decoder *d = calloc(1, sizeof *d);
    if (d == NULL) {
        refuse(message, "out of memory");
        return NULL;
    }
    d->decoder = session_core_retain(decoder);
    d->embed = session_core_retain(embed);
    d->batch = batch;
    d->capacity = capacity;
    d->prefill_chunk = prefill_chunk;
    if (read_embed(d, message) != 0 || read_signature(d, message) != 0 || allocate(d, message) != 0) {
        decoder_free(d);
        return NULL;
    }
    return d;
}

void decoder_free(Decoder *d) {
    if (d == NULL) {
        return;
    }
    decoder_unbind(d);
    for (size_t row = 0; d->rows != NULL && row < d->batch; row++) {
        if (d->rows[row].has_sampler) {
            sampler_free(&d->rows[row].sampler);
        }
        free(d->rows[row].eos);
    }
    platform_zeroed_free(d->kv, d->kv_bytes);
    free(d->rows);
    free(d->logits);
    free(d->caches);
    free(d->embeds);
    free(d->tokens);
    free(d->positions);
    free(d->seqlens);
    free(d->running);
    free(d->saved);
    free(d->embed_times.seconds);
    free(d->decoder_times.seconds);
    session_core_release(d->decoder);
    session_core_release(d->embed);
    free(d);
}

void decoder_unbind(Decoder *d) {
    if (d->span_embed != NULL) {
        ort.ReleaseIoBinding(d->span_embed);
        d->span_embed = NULL;
    }
    if (d->span_decoder != NULL) {
        ort.ReleaseIoBinding(d->span_decoder);
        d->span_decoder = NULL;
    }
    d->span_count = 0;
}

typedef struct {
    OrtIoBinding *binding;
    OrtStatus *status; /* the first failure; later calls do nothing */
} Binder;

/* Binds memory as the input and/or output of these names (NULL: not). The binding keeps the value, so it is released here. */
static void bind_memory(Binder *b, const char *input, const char *output, const void *data, size_t element, const int64_t *shape, size_t rank,
                        ElementType type) {
    OrtValue *value = NULL;
    size_t bytes = element;
    if (b->status != NULL) {
        return;
    }
    for (size_t i = 0; i < rank; i++) {
        bytes *= (size_t)shape[i];
    }
    b->status = ort_wrap((void *)(uintptr_t)data, bytes, shape, rank, (int)type, &value);
    if (b->status == NULL && input != NULL) {
        b->status = ort.BindInput(b->binding, input, value);
    }
    if (b->status == NULL && output != NULL) {
        b->status = ort.BindOutput(b->binding, output, value);
    }
    if (value != NULL) {
        ort.ReleaseValue(value);
    }
}

int decoder_bind(Decoder *d, size_t first, size_t count, size_t tokens, const float *embeds, const int64_t *positions, const int32_t *seqlens,
                 const int32_t *total, OrtIoBinding **out, char message[ORT_MESSAGE_SIZE]) {
    Binder b = {NULL, NULL};
    const int64_t n = (int64_t)count, s = (int64_t)tokens, one = 1;
    const int64_t embeds_shape[] = {n, s, (int64_t)d->hidden}, logits_shape[] = {n, 1, (int64_t)d->vocab};
    const int64_t axes_shape[] = {(int64_t)d->position_axes, n, s};
    const bool axes = session_input(d->decoder, "position_ids") != NULL && session_input(d->decoder, "position_ids")->rank == 3;
    b.status = ort.CreateIoBinding(d->decoder->session, &b.binding);
    bind_memory(&b, "inputs_embeds", NULL, embeds, sizeof *embeds, embeds_shape, 3, ELEMENT_FLOAT32);
    if (d->position_axes > 0) {
        bind_memory(&b, "position_ids", NULL, positions, sizeof *positions, axes ? axes_shape : axes_shape + 1, axes ? 3 : 2, ELEMENT_INT64);
    }
    bind_memory(&b, "seqlens_k", NULL, seqlens, sizeof *seqlens, &n, 1, ELEMENT_INT32);
    bind_memory(&b, "total_sequence_length", NULL, total, sizeof *total, &one, d->total_rank, ELEMENT_INT32);
    bind_memory(&b, NULL, "logits", d->logits + first * d->vocab, sizeof *d->logits, logits_shape, 3, ELEMENT_FLOAT32);
    for (size_t i = 0; i < d->cache_count; i++) {
        const CacheTensor *cache = &d->caches[i];
        const int64_t shape[] = {n, (int64_t)cache->heads, (int64_t)d->capacity, (int64_t)cache->width};
        bind_memory(&b, cache->past->name, cache->present, cache->data + first * cache->row_bytes, cache->element, shape, 4, cache->past->type);
    }
    if (ort_check(b.status, message) != 0) {
        if (b.binding != NULL) {
            ort.ReleaseIoBinding(b.binding);
        }
        return -1;
    }
    *out = b.binding;
    return 0;
}
