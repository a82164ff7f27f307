/* What is done to one row at a time: prefill, arm, push, truncate, copy. */
#include "decoder.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

DecoderStatus decoder_fail(DecoderStatus status, char message[ORT_MESSAGE_SIZE], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, ORT_MESSAGE_SIZE, format, arguments);
    va_end(arguments);
    return status;
}

DecoderStatus decoder_run_failed(const SessionCore *core, char message[ORT_MESSAGE_SIZE]) {
    char reason[ORT_MESSAGE_SIZE];
    memcpy(reason, message, sizeof reason);
    return decoder_fail(DECODER_DEVICE, message, "graph '%s': %.900s", core->name, reason);
}

static void forget(DecoderRow *row) {
    row->pending = -1;
    row->pushed = false;
    row->logits_valid = false;
    row->armed = false;
    row->finished = false;
}

/* One prefill run of `tokens` tokens at the row's end. */
static DecoderStatus prefill_chunk(Decoder *d, size_t row, const float *embeds, const int64_t *positions, size_t tokens,
                                   char message[ORT_MESSAGE_SIZE]) {
    const int32_t total = (int32_t)(d->rows[row].length + tokens), seqlen = total - 1;
    OrtIoBinding *binding = NULL;
    if (decoder_bind(d, row, 1, tokens, embeds, positions, &seqlen, &total, &binding, message) != 0) {
        return decoder_run_failed(d->decoder, message);
    }
    const double seconds = session_run_bound(d->decoder, binding, message);
    ort.ReleaseIoBinding(binding);
    if (seconds < 0) {
        return decoder_run_failed(d->decoder, message);
    }
    run_times_add(&d->decoder_times, seconds);
    d->rows[row].length += tokens;
    return DECODER_OK;
}

DecoderStatus decoder_prefill(Decoder *d, size_t row, const float *embeds, const int64_t *positions, size_t tokens,
                              char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    const size_t start = r->length, axes = d->position_axes > 0 ? d->position_axes : 1;
    if (tokens == 0) {
        return decoder_fail(DECODER_USAGE, message, "there is nothing to prefill");
    }
    if (tokens > d->capacity - r->length) {
        return decoder_fail(DECODER_CONTEXT, message,
                    "the prompt needs %zu more entries, the KV cache has %zu left (%zu of %zu used): use a shorter prompt or load with a larger "
                    "context_length",
                    tokens, d->capacity - r->length, r->length, d->capacity);
    }
    for (size_t i = 0; d->position_axes == 0 && i < tokens; i++) {
        if (positions[i] != (int64_t)(start + i)) {
            return decoder_fail(DECODER_USAGE, message, "this decoder counts positions itself: position %lld at entry %zu cannot be asked for",
                        (long long)positions[i], start + i);
        }
    }
    const size_t chunk = d->prefill_chunk > 0 && d->prefill_chunk < tokens ? d->prefill_chunk : tokens;
    int64_t *gathered = NULL;
    if (axes > 1 && chunk < tokens && (gathered = malloc(axes * chunk * sizeof *gathered)) == NULL) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    forget(r);
    DecoderStatus status = DECODER_OK;
    for (size_t done = 0; status == DECODER_OK && done < tokens; done += chunk) {
        const size_t now = tokens - done < chunk ? tokens - done : chunk;
        const int64_t *at = positions + done;
        if (gathered != NULL) {
            for (size_t axis = 0; axis < axes; axis++) {
                memcpy(gathered + axis * now, positions + axis * tokens + done, now * sizeof *gathered);
            }
            at = gathered;
        }
        status = prefill_chunk(d, row, embeds + done * d->hidden, at, now, message);
    }
    free(gathered);
    if (status != DECODER_OK) {
        r->length = start;
        return status;
    }
    r->logits_valid = true;
    r->next_position = 0;
    for (size_t axis = 0; axis < axes; axis++) {
        const int64_t last = positions[axis * tokens + tokens - 1];
        r->next_position = last >= r->next_position ? last + 1 : r->next_position;
    }
    return DECODER_OK;
}

DecoderStatus decoder_start(Decoder *d, size_t row, Sampler *sampler, int64_t *eos, size_t eos_count, int64_t next_position,
                            char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    if (!r->logits_valid && r->pending < 0) {
        return decoder_fail(DECODER_USAGE, message, "row %zu has no logits: prefill it before start", row);
    }
    if (d->position_axes == 0 && next_position != (int64_t)r->length) {
        return decoder_fail(DECODER_USAGE, message, "this decoder counts positions itself: next_position %lld does not follow %zu entries",
                    (long long)next_position, r->length);
    }
    if (r->has_sampler) {
        sampler_free(&r->sampler);
    }
    free(r->eos);
    r->sampler = *sampler;
    r->has_sampler = true;
    r->eos = eos;
    r->eos_count = eos_count;
    r->next_position = next_position;
    r->armed = true;
    r->finished = false;
    return DECODER_OK;
}

DecoderStatus decoder_push(Decoder *d, size_t row, int64_t token, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    if (token < 0 || (uint64_t)token >= d->vocab) {
        return decoder_fail(DECODER_USAGE, message, "token %lld is outside the vocabulary of %zu", (long long)token, d->vocab);
    }
    if (!r->logits_valid && r->pending < 0) {
        return decoder_fail(DECODER_USAGE, message, "row %zu is empty: prefill it before push", row);
    }
    r->pending = token;
    r->pushed = true;
    r->finished = false;
    return DECODER_OK;
}

DecoderStatus decoder_truncate(Decoder *d, size_t row, size_t length, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    if (length > r->length) {
        return decoder_fail(DECODER_USAGE, message, "row %zu has %zu entries: it cannot be truncated to %zu", row, r->length, length);
    }
    forget(r);
    r->length = length;
    return DECODER_OK;
}

DecoderStatus decoder_copy_prefix(Decoder *d, size_t row, const Decoder *source, size_t source_row, size_t length,
                                  char message[ORT_MESSAGE_SIZE]) {
    if (source->decoder != d->decoder) {
        return decoder_fail(DECODER_USAGE, message, "the source state belongs to another decoder");
    }
    if (length > source->rows[source_row].length) {
        return decoder_fail(DECODER_USAGE, message, "the source row has %zu entries, %zu were asked for", source->rows[source_row].length, length);
    }
    if (length > d->capacity) {
        return decoder_fail(DECODER_CONTEXT, message, "%zu entries do not fit a KV cache of %zu", length, d->capacity);
    }
    if (source == d && source_row == row) {
        return decoder_truncate(d, row, length, message);
    }
    for (size_t i = 0; i < d->cache_count; i++) {
        const CacheTensor *to = &d->caches[i], *from = &source->caches[i];
        const size_t entry = to->width * to->element;
        uint8_t *target = to->data + row * to->row_bytes;
        const uint8_t *origin = from->data + source_row * from->row_bytes;
        for (size_t head = 0; head < to->heads; head++) {
            memcpy(target + head * d->capacity * entry, origin + head * source->capacity * entry, length * entry);
        }
    }
    forget(&d->rows[row]);
    d->rows[row].length = length;
    return DECODER_OK;
}
