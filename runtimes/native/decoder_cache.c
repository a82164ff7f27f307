/* The memory of a decoder: the caches, and what every row has besides. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64
#define MAX_TIMES 65536

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

/* What the further inputs and outputs need, with dynamic dimensions still empty. */
static bool allocate_further(Decoder *d) {
    const size_t sizes = d->dim_count > 0 ? d->dim_count : 1;
    d->span_inputs = calloc(d->input_count + 1, sizeof *d->span_inputs);
    d->span_outputs = calloc(d->output_count + 1, sizeof *d->span_outputs);
    d->span_sizes = calloc(sizes, sizeof *d->span_sizes);
    bool ok = d->span_inputs != NULL && d->span_outputs != NULL && d->span_sizes != NULL;
    for (size_t row = 0; ok && row < d->batch; row++) {
        DecoderRow *r = &d->rows[row];
        r->sizes = malloc(sizes * sizeof *r->sizes);
        ok = r->sizes != NULL;
        for (size_t i = 0; ok && i < sizes; i++) {
            r->sizes[i] = SIZE_UNKNOWN;
        }
        r->bound = !d->needs_binding;
    }
    for (size_t i = 0; ok && i < d->input_count; i++) {
        FurtherInput *input = &d->inputs[i];
        input->row_bytes = row_shape_bytes(&input->shape, d->rows[0].sizes);
        const size_t bytes = input->row_bytes > 0 ? input->row_bytes : 1;
        input->data = calloc(input->shared ? 1 : d->batch, bytes);
        ok = input->data != NULL;
        if (ok && input->kind == INPUT_STATE) {
            input->initial = calloc(d->batch, bytes);
            input->next = calloc(d->batch, bytes);
            ok = input->initial != NULL && input->next != NULL;
        }
    }
    for (size_t i = 0; ok && i < d->output_count; i++) {
        const size_t bytes = row_shape_bytes(&d->outputs[i].shape, d->rows[0].sizes);
        d->outputs[i].data = calloc(d->batch, bytes > 0 ? bytes : 1);
        ok = d->outputs[i].data != NULL;
    }
    return ok;
}

static DecoderStatus allocate(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    size_t total = 0;
    d->saved_row_bytes = d->vocab * sizeof *d->logits;
    for (size_t i = 0; i < d->cache_count; i++) {
        const size_t bytes = (d->caches[i].row_bytes * d->batch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (bytes > SIZE_MAX / 2 - total) {
            return decoder_fail(DECODER_DEVICE, message, "a cache of %zu rows × %zu entries does not fit the address space", d->batch, d->capacity);
        }
        total += bytes;
        d->saved_row_bytes += d->caches[i].heads * d->caches[i].width * d->caches[i].element;
    }
    const size_t axes = d->position_axes > 0 ? d->position_axes : 1;
    d->kv = total > 0 ? platform_zeroed_alloc(total) : NULL;
    d->rows = calloc(d->batch, sizeof *d->rows);
    d->logits = calloc(d->batch * d->vocab, sizeof *d->logits);
    d->embeds = calloc(d->batch * d->hidden, sizeof *d->embeds);
    d->tokens = calloc(d->batch, sizeof *d->tokens);
    d->positions = calloc(d->batch * axes, sizeof *d->positions);
    d->seqlens = calloc(d->batch, sizeof *d->seqlens);
    d->running = calloc(d->batch, sizeof *d->running);
    d->span_run = calloc(1, sizeof *d->span_run);
    d->kept_bytes = d->decoder->plan != NULL ? plan_kept_bytes(d->decoder->plan) : 0;
    d->kept = malloc(2 * d->batch * d->kept_bytes + 1);
    d->plan_caches = calloc(d->cache_count + 1, sizeof *d->plan_caches);
    d->plan_cache_bytes = calloc(d->cache_count + 1, sizeof *d->plan_cache_bytes);
    d->plan_entries = calloc(d->input_count + 1, sizeof *d->plan_entries);
    d->saved = d->batch > 1 ? malloc((d->batch - 1) * d->saved_row_bytes) : NULL;
    if ((d->kv == NULL && total > 0) || d->rows == NULL || d->logits == NULL || d->embeds == NULL || d->tokens == NULL || d->positions == NULL ||
        d->seqlens == NULL || d->running == NULL || d->kept == NULL || d->span_run == NULL || d->plan_caches == NULL || d->plan_cache_bytes == NULL || d->plan_entries == NULL ||
        (d->batch > 1 && d->saved == NULL) || !allocate_further(d)) {
        return decoder_fail(DECODER_DEVICE, message, "no memory for a KV cache of %zu rows × %zu entries (%zu bytes): use a smaller context length or batch",
                            d->batch, d->capacity, total);
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
    return DECODER_OK;
}

Decoder *decoder_new(SessionCore *decoder, SessionCore *embed, size_t batch, size_t capacity, size_t prefill_chunk,
                     char message[ORT_MESSAGE_SIZE]) {
    Decoder *d = calloc(1, sizeof *d);
    if (d == NULL) {
        decoder_fail(DECODER_DEVICE, message, "out of memory");
        return NULL;
    }
    d->decoder = session_core_retain(decoder);
    d->embed = session_core_retain(embed);
    d->batch = batch;
    d->capacity = capacity;
    d->prefill_chunk = prefill_chunk;
    if (decoder_read_signature(d, message) != DECODER_OK || allocate(d, message) != DECODER_OK) {
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
        free(d->rows[row].sizes);
        free(d->rows[row].outputs);
    }
    for (size_t i = 0; i < d->input_count; i++) {
        free(d->inputs[i].data);
        free(d->inputs[i].initial);
        free(d->inputs[i].next);
    }
    for (size_t i = 0; i < d->output_count; i++) {
        free(d->outputs[i].data);
    }
    free(d->inputs);
    free(d->outputs);
    free(d->dims);
    free(d->span_inputs);
    free(d->span_outputs);
    free(d->span_sizes);
    platform_zeroed_free(d->kv, d->kv_bytes);
    free(d->rows);
    free(d->logits);
    free(d->kept);
    free(d->caches);
    free(d->embeds);
    free(d->tokens);
    free(d->positions);
    free(d->seqlens);
    free(d->running);
    free(d->span_run);
    free(d->plan_caches);
    free(d->plan_cache_bytes);
    free(d->plan_entries);
    free(d->saved);
    free(d->draft);
    free(d->embed_times.seconds);
    free(d->decoder_times.seconds);
    session_core_release(d->decoder);
    session_core_release(d->embed);
    free(d);
}

