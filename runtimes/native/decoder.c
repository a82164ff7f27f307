/* The token loop over all rows together: sample → emit → embed → decode. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

/* Binds embed_tokens and the decoder for one token of rows [first, first + count); they stay bound until the span changes. */
static DecoderStatus bind_span(Decoder *d, size_t first, size_t count, char message[ORT_MESSAGE_SIZE]) {
    if (d->span_first == first && d->span_count == count) {
        return DECODER_OK;
    }
    decoder_unbind(d);
    if (decoder_bind_embed(d, d->tokens, d->embeds, count, 1, &d->span_embed, message) != 0) {
        return decoder_run_failed(d->embed, message);
    }
    const DecoderRun run = {.first = first, .count = count, .tokens = 1, .embeds = d->embeds, .positions = d->positions,
                            .seqlens = d->seqlens, .total = &d->total, .sizes = d->span_sizes, .inputs = d->span_inputs, .outputs = d->span_outputs};
    decoder_longest(d, d->span_sizes);
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        d->span_inputs[i] = input->data + (input->shared ? 0 : first) * input->row_bytes;
    }
    for (size_t i = 0; i < d->output_count; i++) {
        d->span_outputs[i] = d->outputs[i].data;
    }
    if (decoder_bind(d, &run, &d->span_decoder, message) != 0) {
        decoder_unbind(d);
        return decoder_run_failed(d->decoder, message);
    }
    *d->span_run = run;
    d->span_first = first;
    d->span_count = count;
    return DECODER_OK;
}

/* A row that sits a step out is run as if it were empty: the step writes its entry 0 and its logits, which are put aside here. */
static void keep_idle(Decoder *d, size_t row, uint8_t *saved, bool restore) {
    for (size_t i = 0; i < d->cache_count; i++) {
        const CacheTensor *cache = &d->caches[i];
        const size_t entry = cache->width * cache->element;
        uint8_t *data = cache->data + row * cache->row_bytes;
        for (size_t head = 0; head < cache->heads; head++, data += d->capacity * entry, saved += entry) {
            memcpy(restore ? data : saved, restore ? saved : data, entry);
        }
    }
    float *logits = d->logits + row * d->vocab;
    memcpy(restore ? (void *)logits : saved, restore ? saved : (void *)logits, d->vocab * sizeof *logits);
}

static void keep_all_idle(Decoder *d, size_t first, size_t count, bool restore) {
    uint8_t *saved = d->saved;
    for (size_t row = first; row < first + count; row++) {
        if (!d->running[row]) {
            keep_idle(d, row, saved, restore);
            saved += d->saved_row_bytes;
        }
    }
}

/* Whether nobody looks at more than the largest logit of each running row. */
static bool only_largest(const Decoder *d, size_t first, size_t count) {
    bool only = d->kept_bytes > 0 && plan_ranks(d->decoder->plan, count);
    for (size_t i = first; i < first + count; i++) {
        only = only && (!d->running[i] || (d->rows[i].has_sampler && sampler_takes_largest(&d->rows[i].sampler)));
    }
    return only;
}

DecoderStatus decoder_complete(Decoder *d, size_t row, char message[ORT_MESSAGE_SIZE]) {
    if (!d->rows[row].rough) {
        return DECODER_OK;
    }
    platform_mutex_lock(&d->decoder->run_lock);
    const int result = plan_complete(d->decoder->plan, d->kept + row * d->kept_bytes, d->logits + row * d->vocab, message);
    platform_mutex_unlock(&d->decoder->run_lock);
    d->rows[row].rough = result != 0;
    return result == 0 ? DECODER_OK : decoder_run_failed(d->decoder, message);
}

DecoderStatus decoder_run_marked(Decoder *d, bool choosing, char message[ORT_MESSAGE_SIZE]) {
    size_t first = 0, last = d->batch - 1;
    while (!d->running[first]) {
        first++;
    }
    while (!d->running[last]) {
        last--;
    }
    const size_t count = last - first + 1;
    DecoderStatus status = bind_span(d, first, count, message);
    for (size_t i = first; status == DECODER_OK && i <= last; i++) {
        status = d->running[i] ? decoder_reserve_outputs(d, i, message) : DECODER_OK;
    }
    if (status != DECODER_OK) {
        return status;
    }
    d->total = 1;
    for (size_t i = 0; i < count; i++) {
        const DecoderRow *row = &d->rows[first + i];
        const bool runs = d->running[first + i];
        d->tokens[i] = runs ? row->pending : 0;
        d->seqlens[i] = runs ? (int32_t)row->length : 0;
        for (size_t axis = 0; axis < d->position_axes; axis++) {
            d->positions[axis * count + i] = runs ? row->next_position : 0;
        }
        if (runs && (int32_t)row->length + 1 > d->total) {
            d->total = (int32_t)row->length + 1;
        }
    }
    keep_all_idle(d, first, count, false);
    const double embed_seconds = decoder_embed(d, d->tokens, count, d->embeds, d->span_embed, message);
    if (embed_seconds < 0) {
        return decoder_run_failed(d->embed, message);
    }
    d->span_run->ranked = choosing && only_largest(d, first, count);
    const double seconds = decoder_execute(d, d->span_run, d->span_decoder, message);
    keep_all_idle(d, first, count, true);
    for (size_t i = first; i <= last; i++) {
        d->rows[i].logits_valid &= !d->running[i]; /* overwritten; valid again below */
        d->rows[i].rough &= !d->running[i];
    }
    if (seconds < 0) {
        return decoder_run_failed(d->decoder, message);
    }
    run_times_add(&d->embed_times, embed_seconds);
    run_times_add(&d->decoder_times, seconds);
    for (size_t i = first; i <= last; i++) {
        DecoderRow *row = &d->rows[i];
        if (d->running[i]) {
            if (row->has_sampler) {
                sampler_accept(&row->sampler, row->pending);
            }
            row->length++;
            row->next_position++;
            row->pending = -1;
            row->pushed = false;
            row->logits_valid = row->used = true;
            row->rough = d->span_run->ranked;
            if (row->rough) {
                memcpy(d->kept + i * d->kept_bytes, d->kept + (d->batch + i - first) * d->kept_bytes, d->kept_bytes);
            }
            decoder_keep_outputs(d, i, i - first, d->span_outputs, 1, d->span_sizes);
            decoder_keep_states(d, i);
        }
    }
    return DECODER_OK;
}

DecoderStatus decoder_no_room(const Decoder *d, size_t row, char message[ORT_MESSAGE_SIZE]) {
    return decoder_fail(DECODER_CONTEXT, message, "row %zu fills the KV cache's %zu entries: ask for fewer new tokens or load with a larger context_length",
                row, d->capacity);
}

DecoderStatus decoder_logits(Decoder *d, size_t row, const float **logits, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    if (r->pushed) {
        if (r->length == d->capacity) {
            return decoder_no_room(d, row, message);
        }
        for (size_t i = 0; i < d->batch; i++) {
            d->running[i] = i == row;
        }
        const DecoderStatus status = decoder_run_marked(d, false, message);
        if (status != DECODER_OK) {
            return status;
        }
    }
    if (!r->logits_valid) {
        return decoder_fail(DECODER_USAGE, message, "row %zu has no logits: prefill it first", row);
    }
    *logits = d->logits + row * d->vocab;
    return decoder_complete(d, row, message);
}

static bool is_active(const DecoderRow *row) { return row->armed && !row->finished; }

DecoderStatus decoder_emit(Decoder *d, size_t index, const float *logits, RowOutput *out, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *row = &d->rows[index];
    TokenLogprob chosen;
    TokenLogprob *top = out->top != NULL ? out->top + out->count * out->top_count : NULL;
    const SampleStatus sampled = sampler_choose(&row->sampler, logits, &chosen, top);
    if (sampled != SAMPLE_OK) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' computed logits that contain %s (row %zu, entry %zu): there is no next token",
                    d->decoder->name, sample_status_text(sampled), index, row->length);
    }
    row->pending = chosen.token;
    row->pushed = false;
    out->tokens[out->count] = chosen.token;
    if (out->logprobs != NULL) {
        out->logprobs[out->count] = chosen.logprob;
    }
    out->count++;
    for (size_t i = 0; i < row->eos_count; i++) {
        row->finished |= row->eos[i] == chosen.token;
    }
    return DECODER_OK;
}

int decoder_allocate_outputs(const Decoder *d, size_t steps, RowOutput *outputs) {
    for (size_t i = 0; i < d->batch; i++) {
        const DecoderRow *row = &d->rows[i];
        RowOutput *out = &outputs[i];
        *out = (RowOutput){0};
        if (!is_active(row)) {
            continue;
        }
        /* A row's first token may need no entry, each further one takes one. */
        const size_t room = d->capacity - row->length + 1, most = steps < room ? steps : room;
        const int64_t logprobs = row->sampler.params.logprobs;
        out->tokens = malloc(most * sizeof *out->tokens);
        bool ok = out->tokens != NULL;
        if (logprobs >= 0) {
            out->logprobs = malloc(most * sizeof *out->logprobs);
            ok = ok && out->logprobs != NULL;
        }
        if (logprobs > 0) {
            out->top_count = (uint64_t)logprobs < d->vocab ? (size_t)logprobs : d->vocab;
            out->top = malloc(most * out->top_count * sizeof *out->top);
            ok = ok && out->top != NULL;
        }
        if (!ok) {
            return -1;
        }
    }
    return 0;
}

void row_outputs_free(RowOutput *outputs, size_t batch) {
    for (size_t i = 0; i < batch; i++) {
        free(outputs[i].tokens);
        free(outputs[i].logprobs);
        free(outputs[i].top);
    }
}

/* Marks the rows whose newest token must run before they can go on. *full is a marked row without room, or `batch`. */
static size_t mark_pending(Decoder *d, size_t *active, size_t *full) {
    size_t marked = 0;
    *active = 0;
    *full = d->batch;
    for (size_t i = 0; i < d->batch; i++) {
        const DecoderRow *row = &d->rows[i];
        d->running[i] = is_active(row) && row->pending >= 0;
        *active += is_active(row);
        marked += d->running[i];
        if (d->running[i] && row->length == d->capacity && *full == d->batch) {
            *full = i;
        }
    }
    return marked;
}

DecoderStatus decoder_decode(Decoder *d, size_t steps, const atomic_bool *cancelled, RowOutput *outputs, char message[ORT_MESSAGE_SIZE]) {
    DecoderStatus status = DECODER_OK;
    if (decoder_allocate_outputs(d, steps, outputs) != 0) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    for (size_t step = 0; step < steps && !atomic_load(cancelled); step++) {
        size_t active, full;
        const size_t marked = mark_pending(d, &active, &full);
        if (active == 0) {
            break;
        }
        if (full < d->batch) {
            /* What was produced so far is returned; the next call, which can do nothing, says why. */
            status = step == 0 ? decoder_no_room(d, full, message) : DECODER_OK;
            break;
        }
        if (marked > 0 && (status = decoder_run_marked(d, true, message)) != DECODER_OK) {
            break;
        }
        for (size_t i = 0; status == DECODER_OK && i < d->batch; i++) {
            if (is_active(&d->rows[i]) && !sampler_takes_largest(&d->rows[i].sampler)) { /* one that was started since */
                status = decoder_complete(d, i, message);
            }
            if (status == DECODER_OK && is_active(&d->rows[i])) {
                status = decoder_emit(d, i, d->logits + i * d->vocab, &outputs[i], message);
            }
        }
        if (status != DECODER_OK) {
            break;
        }
    }
    for (size_t i = 0; i < d->batch; i++) {
        outputs[i].finished = d->rows[i].finished;
    }
    return status;
}
