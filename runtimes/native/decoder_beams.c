/* What whoever chooses tokens outside needs (beam search, guidance): one step of all rows, and rows that trade places. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t pending;
    bool pushed, finished;
} Pending;

static DecoderStatus check_step(const Decoder *d, const int64_t *tokens, char message[ORT_MESSAGE_SIZE]) {
    for (size_t row = 0; row < d->batch; row++) {
        if (tokens[row] < 0 || (uint64_t)tokens[row] >= d->vocab) {
            return decoder_fail(DECODER_USAGE, message, "token %lld is outside the vocabulary of %zu", (long long)tokens[row], d->vocab);
        }
        if (!d->rows[row].armed) {
            return decoder_fail(DECODER_USAGE, message, "row %zu was not started: step runs every row", row);
        }
    }
    for (size_t row = 0; row < d->batch; row++) {
        if (d->rows[row].length == d->capacity) {
            return decoder_no_room(d, row, message);
        }
    }
    return DECODER_OK;
}

DecoderStatus decoder_step(Decoder *d, const int64_t *tokens, char message[ORT_MESSAGE_SIZE]) {
    DecoderStatus status = check_step(d, tokens, message);
    if (status != DECODER_OK) {
        return status;
    }
    Pending *before = malloc(d->batch * sizeof *before);
    if (before == NULL) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    for (size_t i = 0; i < d->batch; i++) {
        DecoderRow *row = &d->rows[i];
        before[i] = (Pending){row->pending, row->pushed, row->finished};
        row->pending = tokens[i];
        row->finished = false;
        d->running[i] = true;
    }
    status = decoder_run_marked(d, false, message);
    for (size_t i = 0; status != DECODER_OK && i < d->batch; i++) {
        DecoderRow *row = &d->rows[i];
        row->pending = before[i].pending;
        row->pushed = before[i].pushed;
        row->finished = before[i].finished;
    }
    free(before);
    return status;
}

/* Copies memory, or swaps it. */
static void move(void *to, void *from, size_t bytes, bool swap) {
    uint8_t *a = to, *b = from, kept[4096];
    while (swap && bytes > 0) {
        const size_t now = bytes < sizeof kept ? bytes : sizeof kept;
        memcpy(kept, a, now);
        memcpy(a, b, now);
        memcpy(b, kept, now);
        a += now;
        b += now;
        bytes -= now;
    }
    memcpy(a, b, bytes);
}

/* The cache entries of a row, as far as either row has any when they are swapped. */
static void move_entries(Decoder *d, size_t to, size_t from, bool swap) {
    const size_t there = d->rows[to].length, here = d->rows[from].length, length = swap && there > here ? there : here;
    if (!swap) {
        decoder_copy_entries(d, to, d, from, length);
        return;
    }
    for (size_t i = 0; i < d->cache_count; i++) {
        const CacheTensor *cache = &d->caches[i];
        const size_t entry = cache->width * cache->element;
        for (size_t head = 0; head < cache->heads; head++) {
            const size_t at = head * d->capacity * entry;
            move(cache->data + to * cache->row_bytes + at, cache->data + from * cache->row_bytes + at, length * entry, true);
        }
    }
}

/* Room for the outputs of every row in every other. */
static DecoderStatus level_outputs(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    size_t most = 0;
    for (size_t i = 0; i < d->batch; i++) {
        most = d->rows[i].outputs_room > most ? d->rows[i].outputs_room : most;
    }
    for (size_t i = 0; i < d->batch; i++) {
        DecoderRow *row = &d->rows[i];
        if (row->outputs_room < most) {
            uint8_t *grown = realloc(row->outputs, most);
            if (grown == NULL) {
                return decoder_fail(DECODER_DEVICE, message, "out of memory");
            }
            memset(grown + row->outputs_room, 0, most - row->outputs_room);
            row->outputs = grown;
            row->outputs_room = most;
        }
    }
    return DECODER_OK;
}

/* Row `to` becomes what row `from` is; with `swap` the other way round as well. What it is bound to and its sampler stay. */
static void move_row(Decoder *d, size_t to, size_t from, bool swap) {
    DecoderRow *a = &d->rows[to], *b = &d->rows[from];
    move_entries(d, to, from, swap);
    move(d->logits + to * d->vocab, d->logits + from * d->vocab, d->vocab * sizeof *d->logits, swap);
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        if (input->kind != INPUT_STATIC) {
            move(input->data + to * input->row_bytes, input->data + from * input->row_bytes, input->row_bytes, swap);
        }
    }
    move(a->sizes, b->sizes, d->dim_count * sizeof *a->sizes, swap);
    if (a->outputs_room > 0) {
        move(a->outputs, b->outputs, a->outputs_room, swap);
    }
    const DecoderRow there = *a, here = *b;
    DecoderRow *const targets[] = {a, b};
    const DecoderRow *const origins[] = {&here, &there};
    for (size_t i = 0; i < (swap ? 2 : 1); i++) {
        targets[i]->length = origins[i]->length;
        targets[i]->logits_valid = origins[i]->logits_valid;
        targets[i]->finished = origins[i]->finished;
        targets[i]->pushed = origins[i]->pushed;
        targets[i]->pending = origins[i]->pending;
        targets[i]->next_position = origins[i]->next_position;
        targets[i]->used = origins[i]->used;
    }
}

DecoderStatus decoder_reorder(Decoder *d, const size_t *sources, char message[ORT_MESSAGE_SIZE]) {
    for (size_t row = 0; row < d->batch; row++) {
        const DecoderRow *to = &d->rows[row], *from = &d->rows[sources[row]];
        if (to->bound != from->bound || decoder_bound_unlike(d, to->sizes, from->sizes)) {
            return decoder_fail(DECODER_USAGE, message, "rows %zu and %zu are bound to inputs of unlike shapes: they cannot trade places", row,
                                sources[row]);
        }
    }
    /* `from`: where each row's new content is now; `readers`: how many rows still wait for a row's content. */
    size_t *from = malloc(2 * d->batch * sizeof *from), *readers = from + d->batch;
    if (from == NULL) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    DecoderStatus status = level_outputs(d, message);
    for (size_t row = 0; row < d->batch && status == DECODER_OK; row++) {
        status = decoder_complete(d, row, message);
    }
    if (status != DECODER_OK) {
        free(from);
        return status;
    }
    memset(readers, 0, d->batch * sizeof *readers);
    for (size_t row = 0; row < d->batch; row++) {
        from[row] = sources[row];
        readers[sources[row]] += sources[row] != row;
    }
    /* First the rows whose own content nobody waits for; a row that is done frees the one that it read. */
    for (size_t start = 0; start < d->batch; start++) {
        for (size_t row = start; from[row] != row && readers[row] == 0;) {
            const size_t source = from[row];
            move_row(d, row, source, false);
            from[row] = row;
            readers[source]--;
            row = source;
        }
    }
    /* What is left are cycles: each swap puts one row in place. */
    for (size_t row = 0; row < d->batch; row++) {
        for (size_t at = row; from[at] != at;) {
            const size_t source = from[at];
            from[at] = at;
            if (source == row) {
                break; /* the last of the cycle got its content with the swap before */
            }
            move_row(d, at, source, true);
            at = source;
        }
    }
    free(from);
    return DECODER_OK;
}
