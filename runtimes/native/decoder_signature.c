/* Reading the signatures of the decoder and its embedding. */
#include "decoder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAST "past_key_values."
#define STATE "state."

static DecoderStatus read_embed(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const SessionCore *embed = d->embed;
    if (embed->input_count != 1 || embed->output_count != 1 || embed->inputs[0].type != ELEMENT_INT64 || embed->inputs[0].rank != 2 ||
        embed->outputs[0].type != ELEMENT_FLOAT32 || embed->outputs[0].rank != 3) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' is not an embedding of int64 [batch, sequence] into float32 [batch, sequence, hidden]", embed->name);
    }
    return DECODER_OK;
}

static DecoderStatus read_cache(Decoder *d, const ValueInfo *past, CacheTensor *cache, char message[ORT_MESSAGE_SIZE]) {
    char present[256];
    const char *graph = d->decoder->name;
    snprintf(present, sizeof present, "present.%s", past->name + strlen(PAST));
    const ValueInfo *output = session_output(d->decoder, present);
    if (output == NULL || output->type != past->type) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s': '%s' has no output '%s' of its type", graph, past->name, present);
    }
    if (past->rank != 4 || past->shape[1] < 1 || past->shape[3] < 1 || element_size(past->type) == 0) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s': '%s' is not [batch, kv_heads, capacity, head_dim] with fixed heads", graph, past->name);
    }
    if (past->shape[2] >= 0 && (size_t)past->shape[2] != d->capacity) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' has a cache of %lld entries, asked for were %zu", graph, (long long)past->shape[2], d->capacity);
    }
    if (past->shape[0] >= 0 && (size_t)past->shape[0] != d->batch) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' has a batch of %lld rows, asked for were %zu", graph, (long long)past->shape[0], d->batch);
    }
    cache->past = past;
    cache->present = output->name;
    cache->heads = (size_t)past->shape[1];
    cache->width = (size_t)past->shape[3];
    cache->element = element_size(past->type);
    const size_t entry = cache->heads * cache->width * cache->element;
    if (entry > SIZE_MAX / 4 / d->capacity / d->batch) {
        return decoder_fail(DECODER_DEVICE, message, "a cache of %zu rows × %zu entries does not fit the address space", d->batch, d->capacity);
    }
    cache->row_bytes = entry * d->capacity;
    return DECODER_OK;
}

static bool known_input(const char *name) {
    return strcmp(name, "inputs_embeds") == 0 || strcmp(name, "position_ids") == 0 || strcmp(name, "seqlens_k") == 0 ||
           strcmp(name, "total_sequence_length") == 0;
}

/* The number of the dimension of that name; `dim_count` when it is new. */
static size_t find_dim(Decoder *d, const char *name) {
    size_t i = 0;
    while (i < d->dim_count && strcmp(d->dims[i].name, name) != 0) {
        i++;
    }
    return i;
}

/* Reads the dimensions from `first` on, leaving out `sequence` (0: there is none). `add`: unknown names become new dimensions. */
static DecoderStatus read_shape(Decoder *d, const ValueInfo *info, size_t first, size_t sequence, bool add, RowShape *shape,
                                char message[ORT_MESSAGE_SIZE]) {
    shape->element = element_size(info->type);
    for (size_t axis = first; axis < info->rank; axis++) {
        if (sequence > 0 && axis == sequence) {
            continue;
        }
        const size_t at = shape->rank++;
        shape->fixed[at] = info->shape[axis];
        if (info->shape[axis] >= 0) {
            continue;
        }
        const char *name = info->symbols[axis];
        shape->dim[at] = find_dim(d, name);
        if (shape->dim[at] == d->dim_count) {
            if (!add || *name == '\0') {
                return decoder_fail(DECODER_DEVICE, message, "graph '%s': dimension %zu ('%s') of '%s' is neither fixed nor named after one of an input",
                                    d->decoder->name, axis, name, info->name);
            }
            d->dims[d->dim_count++] = (InputDim){.name = name};
        }
    }
    return DECODER_OK;
}

/* The axis of the dimension "sequence", or 0. */
static size_t sequence_axis(const ValueInfo *info) {
    size_t axis = info->rank;
    while (axis > 0 && (info->shape[axis - 1] >= 0 || strcmp(info->symbols[axis - 1], "sequence") != 0)) {
        axis--;
    }
    return axis > 0 ? axis - 1 : 0;
}

static DecoderStatus read_input(Decoder *d, const ValueInfo *info, char message[ORT_MESSAGE_SIZE]) {
    FurtherInput *input = &d->inputs[d->input_count++];
    const char *graph = d->decoder->name;
    const bool batched = info->rank > 0 && info->shape[0] < 0;
    const size_t sequence = sequence_axis(info);
    bool fits = element_size(info->type) > 0;
    input->info = info;
    if (sequence > 0) {
        input->kind = INPUT_TOKEN;
        fits = fits && batched && sequence == 1;
    } else if (strncmp(info->name, STATE, strlen(STATE)) == 0) {
        char present[256];
        snprintf(present, sizeof present, "present_%s", info->name);
        const ValueInfo *output = session_output(d->decoder, present);
        if (output == NULL || output->type != info->type) {
            return decoder_fail(DECODER_DEVICE, message, "graph '%s': '%s' has no output '%s' of its type", graph, info->name, present);
        }
        input->kind = INPUT_STATE;
        input->present = output->name;
        fits = fits && batched;
        for (size_t axis = 1; axis < info->rank; axis++) {
            fits = fits && info->shape[axis] >= 0;
        }
        d->recurrent = d->needs_binding = true;
    } else {
        input->kind = INPUT_STATIC;
        input->shared = info->rank > 0 && info->shape[0] == 1;
        fits = fits && (batched || input->shared);
        d->needs_binding = true;
    }
    if (!fits) {
        return decoder_fail(DECODER_DEVICE, message,
                            "graph '%s' has an input '%s' that this decode loop does not know: expected is [batch, sequence, …] (a value per token), "
                            "[batch, …] or [1, …] (static), or, named state.N, [batch, …] of fixed sizes (recurrent)",
                            graph, info->name);
    }
    if (strcmp(info->name, "block_ids") == 0) {
        d->prefill_chunk = 0; /* a block that is cut would not see itself whole */
    }
    return read_shape(d, info, sequence > 0 ? 2 : 1, 0, true, &input->shape, message);
}

/* Which dimensions may be filled up: those that no static input has, or a mask too, but none of an array that all rows share. */
static void read_dims(Decoder *d) {
    for (size_t i = 0; i < d->dim_count; i++) {
        bool of_static = false, masked = false, shared = false;
        for (size_t k = 0; k < d->input_count; k++) {
            const FurtherInput *input = &d->inputs[k];
            for (size_t axis = 0; axis < input->shape.rank; axis++) {
                if (input->shape.fixed[axis] < 0 && input->shape.dim[axis] == i) {
                    of_static |= input->kind == INPUT_STATIC;
                    masked |= strstr(input->info->name, "mask") != NULL;
                    shared |= input->shared;
                }
            }
        }
        d->dims[i].of_static = of_static;
        d->dims[i].fillable = !shared && (masked || !of_static);
    }
}

static DecoderStatus read_outputs(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const SessionCore *core = d->decoder;
    for (size_t i = 0; i < core->output_count; i++) {
        const ValueInfo *info = &core->outputs[i];
        bool known = strcmp(info->name, "logits") == 0;
        for (size_t k = 0; k < d->cache_count; k++) {
            known = known || strcmp(info->name, d->caches[k].present) == 0;
        }
        for (size_t k = 0; k < d->input_count; k++) {
            known = known || (d->inputs[k].present != NULL && strcmp(info->name, d->inputs[k].present) == 0);
        }
        if (known) {
            continue;
        }
        if (info->rank == 0 || info->shape[0] >= 0 || element_size(info->type) == 0) {
            return decoder_fail(DECODER_DEVICE, message, "graph '%s' has an output '%s' that is not [batch, …]", core->name, info->name);
        }
        FurtherOutput *output = &d->outputs[d->output_count++];
        output->info = info;
        output->sequence_axis = sequence_axis(info);
        const DecoderStatus status = read_shape(d, info, 1, output->sequence_axis, false, &output->shape, message);
        if (status != DECODER_OK) {
            return status;
        }
    }
    return DECODER_OK;
}

static DecoderStatus read_inputs(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const SessionCore *core = d->decoder;
    size_t dims = 0;
    for (size_t i = 0; i < core->input_count; i++) {
        dims += core->inputs[i].rank;
    }
    d->caches = calloc(core->input_count, sizeof *d->caches);
    d->inputs = calloc(core->input_count, sizeof *d->inputs);
    d->dims = calloc(dims + 1, sizeof *d->dims);
    d->outputs = calloc(core->output_count, sizeof *d->outputs);
    if (d->caches == NULL || d->inputs == NULL || d->dims == NULL || d->outputs == NULL) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    for (size_t i = 0; i < core->input_count; i++) {
        const ValueInfo *info = &core->inputs[i];
        DecoderStatus status = DECODER_OK;
        if (strncmp(info->name, PAST, strlen(PAST)) == 0) {
            status = read_cache(d, info, &d->caches[d->cache_count++], message);
        } else if (!known_input(info->name)) {
            status = read_input(d, info, message);
        }
        if (status != DECODER_OK) {
            return status;
        }
    }
    read_dims(d);
    return read_outputs(d, message);
}

static DecoderStatus read_signature(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const SessionCore *core = d->decoder;
    const ValueInfo *embeds = session_input(core, "inputs_embeds"), *positions = session_input(core, "position_ids");
    const ValueInfo *seqlens = session_input(core, "seqlens_k"), *total = session_input(core, "total_sequence_length");
    const ValueInfo *logits = session_output(core, "logits");
    if (session_input(core, "attention_mask") != NULL) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' has an input 'attention_mask', which this decode loop does not know: was it lowered?",
                            core->name);
    }
    if (embeds == NULL || embeds->type != ELEMENT_FLOAT32 || embeds->rank != 3 || embeds->shape[2] < 1) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' has no input inputs_embeds float32 [batch, sequence, hidden]", core->name);
    }
    if (logits == NULL || logits->type != ELEMENT_FLOAT32 || logits->rank != 3 || logits->shape[1] != 1 || logits->shape[2] < 1 ||
        logits->shape[2] > INT32_MAX) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' has no output logits float32 [batch, 1, vocab] of the last token only", core->name);
    }
    if ((seqlens == NULL) != (total == NULL) || (seqlens != NULL && (seqlens->type != ELEMENT_INT32 || seqlens->rank != 1)) ||
        (total != NULL && (total->type != ELEMENT_INT32 || total->rank > 1))) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s': seqlens_k int32 [batch] and total_sequence_length int32 are not as expected", core->name);
    }
    if (positions != NULL && (positions->type != ELEMENT_INT64 || (positions->rank != 2 && (positions->rank != 3 || positions->shape[0] < 1)))) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s': position_ids is not int64 [batch, sequence] or [axes, batch, sequence]", core->name);
    }
    d->hidden = (size_t)embeds->shape[2];
    d->vocab = (size_t)logits->shape[2];
    d->position_axes = positions == NULL ? 0 : positions->rank == 2 ? 1 : (size_t)positions->shape[0];
    d->counts_lengths = seqlens != NULL;
    d->total_rank = total != NULL ? total->rank : 0;
    const int64_t width = d->embed->outputs[0].shape[2];
    if (width >= 0 && (size_t)width != d->hidden) {
        return decoder_fail(DECODER_DEVICE, message, "graph '%s' gives embeddings of width %lld, graph '%s' takes %zu", d->embed->name, (long long)width, core->name,
                      d->hidden);
    }
    const DecoderStatus status = read_inputs(d, message);
    if (status == DECODER_OK && d->cache_count > 0 && !d->counts_lengths) {
        return decoder_fail(DECODER_DEVICE, message,
                            "graph '%s' has no inputs seqlens_k int32 [batch] and total_sequence_length int32: was it lowered to a shared cache?", core->name);
    }
    return status;
}

DecoderStatus decoder_read_signature(Decoder *d, char message[ORT_MESSAGE_SIZE]) {
    const DecoderStatus status = read_embed(d, message);
    return status == DECODER_OK ? read_signature(d, message) : status;
}
