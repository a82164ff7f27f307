/* Speculative decoding (Leviathan et al., arXiv 2211.17192) for a greedy choice: tokens that somebody expects to follow run together
 * with a row's newest one, and those that the row chooses itself are kept. One pass over the weights then gives several tokens.
 *
 * Entries of drafts that are not kept lie in the cache beyond the row's length, where nothing reads them and the next step writes. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

bool decoder_verifies(const Decoder *d) { return d->decoder->plan != NULL && !d->recurrent && d->output_count == 0; }

/* How many tokens of a row can run now, its newest one included: what the cache has left, and the tables of positions. */
static size_t room_of(const Decoder *d, size_t index) {
    const DecoderRow *row = &d->rows[index];
    const size_t entries = d->capacity - row->length, positions = plan_room(d->decoder->plan, row->next_position, (int64_t)row->length);
    return positions < entries ? positions : entries;
}

/* A draft that would run past the last position is cut there; the answer may still end before. */
static size_t drafted(const Decoder *d, const Draft *drafts, size_t index) {
    const size_t room = room_of(d, index), most = room > 0 ? room - 1 : 0;
    return drafts[index].count < most ? drafts[index].count : most;
}

/* Rows [first, first + count) in one run, and memory for `tokens` tokens of each. */
typedef struct {
    size_t first, count, tokens;
    float *logits, *embeds;
    int64_t *ids, *positions;
    int32_t *seqlens;
    uint8_t **inputs;
} Pass;

static void *place(uint8_t *base, size_t *at, size_t bytes) {
    uint8_t *memory = base != NULL ? base + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return memory;
}

/* Puts everything into memory from `base` on (NULL: nowhere yet); returns how many bytes that takes. */
static size_t lay_out(const Decoder *d, Pass *p, uint8_t *base) {
    const size_t all = p->count * p->tokens, axes = d->position_axes > 0 ? d->position_axes : 1;
    size_t at = 0;
    p->logits = place(base, &at, all * d->vocab * sizeof *p->logits);
    p->embeds = place(base, &at, all * d->hidden * sizeof *p->embeds);
    p->ids = place(base, &at, all * sizeof *p->ids);
    p->positions = place(base, &at, axes * all * sizeof *p->positions);
    p->seqlens = place(base, &at, p->count * sizeof *p->seqlens);
    p->inputs = place(base, &at, (d->input_count + 1) * sizeof *p->inputs);
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        uint8_t *own = place(base, &at, input->kind == INPUT_TOKEN ? all * input->row_bytes : 0);
        if (base != NULL) {
            p->inputs[i] = input->kind == INPUT_TOKEN ? own : input->data + (input->shared ? 0 : p->first) * input->row_bytes;
        }
    }
    return at;
}

static DecoderStatus reserve(Decoder *d, Pass *p, char message[ORT_MESSAGE_SIZE]) {
    const size_t bytes = lay_out(d, p, NULL) + 64;
    if (bytes > d->draft_bytes) {
        free(d->draft);
        d->draft = malloc(bytes);
        d->draft_bytes = d->draft != NULL ? bytes : 0;
        if (d->draft == NULL) {
            return decoder_fail(DECODER_DEVICE, message, "out of memory for %zu tokens at once", p->count * p->tokens);
        }
    }
    lay_out(d, p, d->draft + (64 - (uintptr_t)d->draft % 64) % 64);
    return DECODER_OK;
}

/* A row without so many drafts as its neighbours runs its newest token again and again: nothing of that is kept. */
static void fill(const Decoder *d, const Draft *drafts, const Pass *p) {
    const size_t all = p->count * p->tokens;
    for (size_t i = 0; i < p->count; i++) {
        const DecoderRow *row = &d->rows[p->first + i];
        const Draft *draft = &drafts[p->first + i];
        const size_t count = drafted(d, drafts, p->first + i);
        p->seqlens[i] = (int32_t)(row->length + p->tokens - 1);
        for (size_t t = 0; t < p->tokens; t++) {
            p->ids[i * p->tokens + t] = t > 0 && t <= count ? draft->tokens[t - 1] : row->pending;
            for (size_t axis = 0; axis < d->position_axes; axis++) {
                p->positions[axis * all + i * p->tokens + t] = row->next_position + (int64_t)t;
            }
        }
    }
    for (size_t k = 0; k < d->input_count; k++) { /* what every generated token has */
        const FurtherInput *input = &d->inputs[k];
        for (size_t i = 0; input->kind == INPUT_TOKEN && i < all; i++) {
            memcpy(p->inputs[k] + i * input->row_bytes, input->data + (p->first + i / p->tokens) * input->row_bytes, input->row_bytes);
        }
    }
}

static DecoderStatus run(Decoder *d, const Pass *p, char message[ORT_MESSAGE_SIZE]) {
    OrtIoBinding *binding = NULL;
    if (decoder_bind_embed(d, p->ids, p->embeds, p->count, p->tokens, &binding, message) != 0) {
        return decoder_run_failed(d->embed, message);
    }
    const double embed_seconds = decoder_embed(d, p->ids, p->count * p->tokens, p->embeds, binding, message);
    if (binding != NULL) {
        ort.ReleaseIoBinding(binding);
    }
    if (embed_seconds < 0) {
        return decoder_run_failed(d->embed, message);
    }
    decoder_longest(d, d->span_sizes);
    const DecoderRun pass = {.first = p->first, .count = p->count, .tokens = p->tokens, .embeds = p->embeds, .positions = p->positions,
                             .seqlens = p->seqlens, .sizes = d->span_sizes, .inputs = p->inputs, .each = p->logits};
    const double seconds = decoder_execute(d, &pass, NULL, message);
    if (seconds < 0) {
        return decoder_run_failed(d->decoder, message);
    }
    run_times_add(&d->embed_times, embed_seconds);
    run_times_add(&d->decoder_times, seconds);
    return DECODER_OK;
}

/* The tokens of one row: its sampler sees and chooses them in the order in which single steps would let it. */
static DecoderStatus take(Decoder *d, size_t index, const Draft *drafts, const float *logits, RowOutput *out, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *row = &d->rows[index];
    const Draft *draft = &drafts[index];
    const size_t count = drafted(d, drafts, index);
    DecoderStatus status = DECODER_OK;
    for (size_t t = 0; status == DECODER_OK; t++) {
        sampler_accept(&row->sampler, row->pending);
        row->length++;
        row->next_position++;
        status = decoder_emit(d, index, logits + t * d->vocab, out, message);
        if (status != DECODER_OK || row->finished || t == count || row->pending != draft->tokens[t]) {
            memcpy(d->logits + index * d->vocab, logits + t * d->vocab, d->vocab * sizeof *logits);
            break;
        }
    }
    row->logits_valid = row->used = true;
    row->rough = false;
    return status;
}

static bool waits(const DecoderRow *row) { return row->armed && !row->finished && row->pending >= 0; }

static DecoderStatus check(const Decoder *d, const Draft *drafts, size_t *most, char message[ORT_MESSAGE_SIZE]) {
    if (!decoder_verifies(d)) {
        return decoder_fail(DECODER_USAGE, message,
                            "graph '%s' gives the logits of the last token only, so drafts cannot be checked with it: that takes a build with native kernels",
                            d->decoder->name);
    }
    *most = 1;
    for (size_t i = 0; i < d->batch; i++) {
        const DecoderRow *row = &d->rows[i];
        const Draft *draft = &drafts[i];
        if (draft->count > 0 && !waits(row)) {
            return decoder_fail(DECODER_USAGE, message, "row %zu has no newest token that a draft could follow", i);
        }
        for (size_t t = 0; t < draft->count; t++) {
            if (draft->tokens[t] < 0 || (uint64_t)draft->tokens[t] >= d->vocab) {
                return decoder_fail(DECODER_USAGE, message, "token %lld is outside the vocabulary of %zu", (long long)draft->tokens[t], d->vocab);
            }
        }
        if (waits(row) && row->length == d->capacity) {
            return decoder_no_room(d, i, message);
        }
        if (draft->count >= d->capacity - row->length && draft->count > 0) {
            return decoder_fail(DECODER_CONTEXT, message, "a draft of %zu tokens does not fit row %zu, which has %zu of %zu entries", draft->count, i,
                                row->length, d->capacity);
        }
        *most = draft->count + 1 > *most ? draft->count + 1 : *most;
    }
    return DECODER_OK;
}

/* The rows from `first` on that wait, side by side, and have room for what the longest draft among them takes. */
static Pass next_pass(const Decoder *d, const Draft *drafts, size_t first) {
    Pass p = {.first = first, .tokens = 1};
    for (size_t i = first; i < d->batch && waits(&d->rows[i]); i++, p.count++) {
        const size_t own = drafted(d, drafts, i) + 1, tokens = own > p.tokens ? own : p.tokens;
        bool fits = true;
        for (size_t k = first; k <= i; k++) {
            fits = fits && (tokens == 1 || tokens <= room_of(d, k));
        }
        if (!fits) {
            break; /* the next pass begins here; a row by itself always fits */
        }
        p.tokens = tokens;
    }
    return p;
}

DecoderStatus decoder_verify(Decoder *d, const Draft *drafts, const atomic_bool *cancelled, RowOutput *outputs, char message[ORT_MESSAGE_SIZE]) {
    size_t most = 0;
    DecoderStatus status = check(d, drafts, &most, message);
    if (status == DECODER_OK && decoder_allocate_outputs(d, most, outputs) != 0) {
        status = decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    for (size_t i = 0; status == DECODER_OK && i < d->batch && !atomic_load(cancelled);) {
        DecoderRow *row = &d->rows[i];
        if (!waits(row)) {
            if (row->armed && !row->finished) { /* its first token, from the prompt's logits */
                if (!sampler_takes_largest(&row->sampler)) { /* one that was started since */
                    status = decoder_complete(d, i, message);
                }
                status = status == DECODER_OK ? decoder_emit(d, i, d->logits + i * d->vocab, &outputs[i], message) : status;
            }
            i++;
            continue;
        }
        Pass p = next_pass(d, drafts, i);
        status = reserve(d, &p, message);
        if (status == DECODER_OK) {
            fill(d, drafts, &p);
            status = run(d, &p, message);
        }
        for (size_t k = 0; status == DECODER_OK && k < p.count; k++) {
            status = take(d, i + k, drafts, p.logits + k * p.tokens * d->vocab, &outputs[i + k], message);
        }
        i += p.count;
    }
    for (size_t i = 0; i < d->batch; i++) {
        outputs[i].finished = d->rows[i].finished;
    }
    return status;
}
