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

void decoder_forget(Decoder *d, size_t row) {
    DecoderRow *r = &d->rows[row];
    r->pending = -1;
    r->pushed = false;
    r->logits_valid = false;
    r->rough = false;
    r->armed = false;
    r->finished = false;
    decoder_set_token_values(d, row, NULL);
}

/* What a prefill reads and writes besides the caches. Rows run in their own sizes, whatever their neighbours'. */
typedef struct {
    uint8_t *memory;           /* all of what follows that is not the row's own */
    uint8_t **inputs, **outputs;
    uint8_t *states;           /* as they were before */
    int64_t *positions;        /* of one chunk, where there are several axes */
} Prefill;

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Whether the row's share lies in the common memory as the graph wants it. */
static bool in_place(const Decoder *d, const FurtherInput *input, size_t row) {
    for (size_t axis = 0; axis < input->shape.rank; axis++) {
        const size_t dim = input->shape.dim[axis];
        if (input->shape.fixed[axis] < 0 && d->rows[row].sizes[dim] != d->dims[dim].longest) {
            return false;
        }
    }
    return true;
}

/* Bytes of input `i` for `chunk` tokens that lie in the prefill's own memory. */
static size_t own_bytes(const Decoder *d, size_t i, size_t row, const InputValues *values, size_t chunk) {
    const FurtherInput *input = &d->inputs[i];
    const size_t bytes = row_shape_bytes(&input->shape, d->rows[row].sizes);
    switch (input->kind) {
    case INPUT_TOKEN:
        return values->data[i] == NULL ? aligned(bytes * chunk + 1) : 0;
    case INPUT_STATIC:
        return in_place(d, input, row) ? 0 : aligned(bytes + 1);
    default:
        return 0;
    }
}

static DecoderStatus prefill_begin(Decoder *d, size_t row, size_t chunk, const InputValues *values, Prefill *p, char message[ORT_MESSAGE_SIZE]) {
    const size_t *sizes = d->rows[row].sizes;
    const size_t pointers = aligned((d->input_count + d->output_count) * sizeof(uint8_t *) + 1);
    size_t positions = aligned(d->position_axes * chunk * sizeof(int64_t)), states = 0, total = pointers + positions;
    for (size_t i = 0; i < d->input_count; i++) {
        total += own_bytes(d, i, row, values, chunk);
        states += d->inputs[i].kind == INPUT_STATE ? d->inputs[i].row_bytes : 0;
    }
    for (size_t i = 0; i < d->output_count; i++) {
        total += aligned(row_shape_bytes(&d->outputs[i].shape, sizes) * chunk + 1);
    }
    p->memory = calloc(1, total + states);
    if (p->memory == NULL) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    p->inputs = (uint8_t **)(void *)p->memory;
    p->outputs = p->inputs + d->input_count;
    p->positions = (int64_t *)(void *)(p->memory + pointers);
    uint8_t *next = p->memory + pointers + positions;
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        const size_t own = own_bytes(d, i, row, values, chunk);
        p->inputs[i] = own > 0 ? next : input->kind == INPUT_TOKEN ? (uint8_t *)(uintptr_t)values->data[i]
                                      : input->data + (input->shared ? 0 : row) * input->row_bytes;
        if (own > 0 && input->kind == INPUT_STATIC) {
            decoder_longest(d, d->span_sizes);
            row_shape_copy(&input->shape, next, sizes, input->data + row * input->row_bytes, d->span_sizes);
        }
        next += own;
    }
    for (size_t i = 0; i < d->output_count; i++) {
        p->outputs[i] = next;
        next += aligned(row_shape_bytes(&d->outputs[i].shape, sizes) * chunk + 1);
    }
    p->states = next;
    return DECODER_OK;
}

/* Copies a row's states out, or back in. */
static void keep_states_aside(Decoder *d, size_t row, uint8_t *saved, bool restore) {
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        if (input->kind == INPUT_STATE) {
            uint8_t *data = input->data + row * input->row_bytes;
            memcpy(restore ? data : saved, restore ? saved : data, input->row_bytes);
            saved += input->row_bytes;
        }
    }
}

/* One prefill run of `tokens` tokens at the row's end. */
static DecoderStatus prefill_chunk(Decoder *d, size_t row, const float *embeds, const int64_t *positions, size_t tokens, const Prefill *p,
                                   char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    const int32_t total = (int32_t)(r->length + tokens), seqlen = total - 1;
    const DecoderRun run = {.first = row, .count = 1, .tokens = tokens, .embeds = embeds, .positions = positions, .seqlens = &seqlen,
                            .total = &total, .sizes = r->sizes, .inputs = p->inputs, .outputs = p->outputs};
    OrtIoBinding *binding = NULL;
    if (decoder_bind(d, &run, &binding, message) != 0) {
        return decoder_run_failed(d->decoder, message);
    }
    const double seconds = decoder_execute(d, &run, binding, message);
    if (binding != NULL) {
        ort.ReleaseIoBinding(binding);
    }
    if (seconds < 0) {
        return decoder_run_failed(d->decoder, message);
    }
    run_times_add(&d->decoder_times, seconds);
    r->length += tokens;
    decoder_keep_states(d, row);
    decoder_keep_outputs(d, row, 0, p->outputs, tokens, r->sizes);
    return DECODER_OK;
}

static DecoderStatus check_prefill(const Decoder *d, size_t row, const int64_t *positions, size_t tokens, char message[ORT_MESSAGE_SIZE]) {
    const DecoderRow *r = &d->rows[row];
    if (tokens == 0) {
        return decoder_fail(DECODER_USAGE, message, "there is nothing to prefill");
    }
    if (!r->bound) {
        return decoder_not_bound(d, row, message);
    }
    if (tokens > d->capacity - r->length) {
        return decoder_fail(DECODER_CONTEXT, message,
                    "the prompt needs %zu more entries, the KV cache has %zu left (%zu of %zu used): use a shorter prompt or load with a larger "
                    "context_length",
                    tokens, d->capacity - r->length, r->length, d->capacity);
    }
    for (size_t i = 0; d->position_axes == 0 && d->counts_lengths && i < tokens; i++) {
        if (positions[i] != (int64_t)(r->length + i)) {
            return decoder_fail(DECODER_USAGE, message, "this decoder counts positions itself: position %lld at entry %zu cannot be asked for",
                        (long long)positions[i], r->length + i);
        }
    }
    return DECODER_OK;
}

DecoderStatus decoder_prefill(Decoder *d, size_t row, const float *embeds, const int64_t *positions, size_t tokens,
                              const InputValues *values, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    const size_t start = r->length, axes = d->position_axes > 0 ? d->position_axes : 1;
    const size_t chunk = d->prefill_chunk > 0 && d->prefill_chunk < tokens ? d->prefill_chunk : tokens;
    Prefill p = {0};
    DecoderStatus status = check_prefill(d, row, positions, tokens, message);
    if (status == DECODER_OK && decoder_sizes_differ(d, values->sizes, r->sizes)) {
        status = decoder_fit(d, row, values->sizes, message);
    }
    if (status == DECODER_OK) {
        status = decoder_reserve_outputs(d, row, message);
    }
    if (status == DECODER_OK) {
        status = prefill_begin(d, row, chunk, values, &p, message);
    }
    if (status != DECODER_OK) {
        return status;
    }
    decoder_forget(d, row);
    keep_states_aside(d, row, p.states, false);
    for (size_t done = 0; status == DECODER_OK && done < tokens; done += chunk) {
        const size_t now = tokens - done < chunk ? tokens - done : chunk;
        const int64_t *at = positions + done;
        if (axes > 1 && chunk < tokens) {
            for (size_t axis = 0; axis < axes; axis++) {
                memcpy(p.positions + axis * now, positions + axis * tokens + done, now * sizeof *positions);
            }
            at = p.positions;
        }
        status = prefill_chunk(d, row, embeds + done * d->hidden, at, now, &p, message);
        for (size_t i = 0; i < d->input_count; i++) {
            if (values->data[i] != NULL && d->inputs[i].kind == INPUT_TOKEN) {
                p.inputs[i] += now * row_shape_bytes(&d->inputs[i].shape, r->sizes);
            }
        }
    }
    if (status != DECODER_OK) {
        keep_states_aside(d, row, p.states, true);
        r->length = start;
    }
    free(p.memory);
    if (status != DECODER_OK) {
        return status;
    }
    r->logits_valid = r->used = true;
    r->next_position = 0;
    for (size_t axis = 0; axis < axes; axis++) {
        const int64_t last = positions[axis * tokens + tokens - 1];
        r->next_position = last >= r->next_position ? last + 1 : r->next_position;
    }
    return DECODER_OK;
}

DecoderStatus decoder_start(Decoder *d, size_t row, Sampler *sampler, int64_t *eos, size_t eos_count, int64_t next_position,
                            const InputValues *values, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    if (!r->logits_valid && r->pending < 0) {
        return decoder_fail(DECODER_USAGE, message, "row %zu has no logits: prefill it before start", row);
    }
    if (d->position_axes == 0 && d->counts_lengths && next_position != (int64_t)r->length) {
        return decoder_fail(DECODER_USAGE, message, "this decoder counts positions itself: next_position %lld does not follow %zu entries",
                    (long long)next_position, r->length);
    }
    if (decoder_sizes_differ(d, values->sizes, r->sizes)) {
        const DecoderStatus status = decoder_fit(d, row, values->sizes, message);
        if (status != DECODER_OK) {
            return status;
        }
    }
    decoder_set_token_values(d, row, values);
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
    if (d->recurrent && length > 0 && length < r->length) {
        return decoder_fail(DECODER_USAGE, message, "a decoder with recurrent state cannot be truncated to %zu of %zu entries, only to 0", length,
                            r->length);
    }
    decoder_forget(d, row);
    r->length = length;
    if (length == 0) {
        decoder_empty_row(d, row);
    }
    return DECODER_OK;
}

DecoderStatus decoder_copy_prefix(Decoder *d, size_t row, const Decoder *source, size_t source_row, size_t length,
                                  char message[ORT_MESSAGE_SIZE]) {
    const DecoderRow *origin = &source->rows[source_row];
    DecoderRow *r = &d->rows[row];
    if (source->decoder != d->decoder) {
        return decoder_fail(DECODER_USAGE, message, "the source state belongs to another decoder");
    }
    if (length > origin->length) {
        return decoder_fail(DECODER_USAGE, message, "the source row has %zu entries, %zu were asked for", origin->length, length);
    }
    if (d->recurrent && length > 0 && length < origin->length) {
        return decoder_fail(DECODER_USAGE, message, "a decoder with recurrent state can only be copied whole (%zu entries), not %zu of them",
                            origin->length, length);
    }
    if (length > d->capacity) {
        return decoder_fail(DECODER_CONTEXT, message, "%zu entries do not fit a KV cache of %zu", length, d->capacity);
    }
    if (length == 0 || (source == d && source_row == row)) {
        decoder_forget(d, row);
        r->length = length;
        if (length == 0) {
            decoder_empty_row(d, row);
        }
        return DECODER_OK;
    }
    if (!r->bound) {
        return decoder_not_bound(d, row, message);
    }
    if (decoder_bound_unlike(d, r->sizes, origin->sizes)) {
        return decoder_fail(DECODER_USAGE, message, "the rows are bound to inputs of unlike shapes: entries cannot be copied");
    }
    const DecoderStatus status = decoder_fit(d, row, origin->sizes, message);
    if (status != DECODER_OK) {
        return status;
    }
    decoder_copy_entries(d, row, source, source_row, length);
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *to = &d->inputs[i], *from = &source->inputs[i];
        if (to->kind == INPUT_STATE) {
            memcpy(to->data + row * to->row_bytes, from->data + source_row * from->row_bytes, to->row_bytes);
        }
    }
    decoder_forget(d, row);
    r->length = length;
    r->used = true;
    return DECODER_OK;
}

void decoder_copy_entries(Decoder *d, size_t row, const Decoder *source, size_t source_row, size_t length) {
    for (size_t i = 0; i < d->cache_count; i++) {
        const CacheTensor *to = &d->caches[i], *from = &source->caches[i];
        const size_t entry = to->width * to->element;
        uint8_t *target = to->data + row * to->row_bytes;
        const uint8_t *origin = from->data + source_row * from->row_bytes;
        for (size_t head = 0; head < to->heads; head++) {
            memcpy(target + head * d->capacity * entry, origin + head * source->capacity * entry, length * entry);
        }
    }
}
