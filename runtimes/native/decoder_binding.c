/* Binding memory to the decoder's inputs and outputs. */
#include "decoder.h"
#include "plan_rows.h"

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

/* [batch, …], with `tokens` put in as dimension `sequence` unless that is 0. */
static size_t full_shape(const RowShape *shape, const size_t *sizes, size_t batch, size_t sequence, size_t tokens, int64_t *out) {
    size_t rank = 0;
    out[rank++] = (int64_t)batch;
    for (size_t axis = 0; axis < shape->rank; axis++) {
        if (sequence > 0 && rank == sequence) {
            out[rank++] = (int64_t)tokens;
        }
        const int64_t fixed = shape->fixed[axis];
        out[rank++] = fixed >= 0 ? fixed : sizes[shape->dim[axis]] != SIZE_UNKNOWN ? (int64_t)sizes[shape->dim[axis]] : 0;
    }
    if (sequence > 0 && rank == sequence) {
        out[rank++] = (int64_t)tokens;
    }
    return rank;
}

static void bind_further(Binder *b, const Decoder *d, const DecoderRun *run) {
    int64_t shape[MAX_RANK + 1];
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        const size_t sequence = input->kind == INPUT_TOKEN ? 1 : 0;
        const size_t rank = full_shape(&input->shape, run->sizes, input->shared ? 1 : run->count, sequence, run->tokens, shape);
        bind_memory(b, input->info->name, NULL, run->inputs[i], input->shape.element, shape, rank, input->info->type);
        if (input->kind == INPUT_STATE) {
            bind_memory(b, NULL, input->present, input->next + run->first * input->row_bytes, input->shape.element, shape, rank,
                        input->info->type);
        }
    }
    for (size_t i = 0; i < d->output_count; i++) {
        const FurtherOutput *output = &d->outputs[i];
        const size_t rank = full_shape(&output->shape, run->sizes, run->count, output->sequence_axis, run->tokens, shape);
        bind_memory(b, NULL, output->info->name, run->outputs[i], output->shape.element, shape, rank, output->info->type);
    }
}

int decoder_bind_embed(Decoder *d, const int64_t *tokens, float *embeds, size_t rows, size_t each, OrtIoBinding **out, char message[ORT_MESSAGE_SIZE]) {
    if (d->embed->plan != NULL) {
        *out = NULL;
        return 0;
    }
    Binder b = {NULL, NULL};
    const int64_t shape[] = {(int64_t)rows, (int64_t)each, (int64_t)d->hidden};
    b.status = ort.CreateIoBinding(d->embed->session, &b.binding);
    bind_memory(&b, d->embed->input_names[0], NULL, tokens, sizeof *tokens, shape, 2, ELEMENT_INT64);
    bind_memory(&b, NULL, d->embed->output_names[0], embeds, sizeof *embeds, shape, 3, ELEMENT_FLOAT32);
    *out = b.binding;
    if (ort_check(b.status, message) != 0) {
        if (b.binding != NULL) {
            ort.ReleaseIoBinding(b.binding);
        }
        *out = NULL;
        return -1;
    }
    return 0;
}

double decoder_embed(Decoder *d, const int64_t *tokens, size_t count, float *embeds, const OrtIoBinding *binding, char message[ORT_MESSAGE_SIZE]) {
    SessionCore *core = d->embed;
    if (core->plan == NULL) {
        return session_run_bound(core, binding, message);
    }
    platform_mutex_lock(&core->run_lock);
    const double begin = platform_seconds();
    const int result = rows_run(core->plan, tokens, count, embeds, message);
    const double seconds = platform_seconds() - begin;
    platform_mutex_unlock(&core->run_lock);
    return result == 0 ? seconds : -1.0;
}

double decoder_execute(Decoder *d, const DecoderRun *run, const OrtIoBinding *binding, char message[ORT_MESSAGE_SIZE]) {
    SessionCore *core = d->decoder;
    if (core->plan == NULL) {
        return session_run_bound(core, binding, message);
    }
    for (size_t i = 0; i < d->cache_count; i++) {
        d->plan_caches[i] = d->caches[i].data + run->first * d->caches[i].row_bytes;
        d->plan_cache_bytes[i] = d->caches[i].row_bytes;
    }
    for (size_t i = 0; i < d->input_count; i++) { /* numbers per token, or entries of [batch, heads, entries, size] */
        const RowShape *shape = &d->inputs[i].shape;
        const size_t axis = shape->rank > 1 ? 1 : 0;
        d->plan_entries[i] = d->inputs[i].kind == INPUT_TOKEN ? row_shape_bytes(shape, run->sizes) / shape->element
                             : shape->rank == 0               ? 0
                             : shape->fixed[axis] >= 0        ? (size_t)shape->fixed[axis]
                                                              : run->sizes[shape->dim[axis]];
    }
    const PlanRun call = {.rows = run->count,
                          .tokens = run->tokens,
                          .capacity = d->capacity,
                          .embeds = run->embeds,
                          .positions = run->positions,
                          .seqlens = run->seqlens,
                          .logits = run->each != NULL ? run->each : d->logits + run->first * d->vocab,
                          .each = run->each != NULL,
                          .ranked = run->ranked,
                          .kept = d->kept + d->batch * d->kept_bytes,
                          .caches = d->plan_caches,
                          .cache_row_bytes = d->plan_cache_bytes,
                          .inputs = (const uint8_t *const *)run->inputs,
                          .input_sizes = d->plan_entries};
    platform_mutex_lock(&core->run_lock);
    const double begin = platform_seconds();
    const int result = plan_run(core->plan, &call, message);
    const double seconds = platform_seconds() - begin;
    platform_mutex_unlock(&core->run_lock);
    return result == 0 ? seconds : -1.0;
}

int decoder_bind(Decoder *d, const DecoderRun *run, OrtIoBinding **out, char message[ORT_MESSAGE_SIZE]) {
    if (d->decoder->plan != NULL) {
        *out = NULL;
        return 0;
    }
    Binder b = {NULL, NULL};
    const int64_t n = (int64_t)run->count, s = (int64_t)run->tokens, one = 1;
    const int64_t embeds_shape[] = {n, s, (int64_t)d->hidden}, logits_shape[] = {n, 1, (int64_t)d->vocab};
    const int64_t axes_shape[] = {(int64_t)d->position_axes, n, s};
    const bool axes = session_input(d->decoder, "position_ids") != NULL && session_input(d->decoder, "position_ids")->rank == 3;
    b.status = ort.CreateIoBinding(d->decoder->session, &b.binding);
    bind_memory(&b, "inputs_embeds", NULL, run->embeds, sizeof *run->embeds, embeds_shape, 3, ELEMENT_FLOAT32);
    if (d->position_axes > 0) {
        bind_memory(&b, "position_ids", NULL, run->positions, sizeof *run->positions, axes ? axes_shape : axes_shape + 1, axes ? 3 : 2,
                    ELEMENT_INT64);
    }
    if (d->counts_lengths) {
        bind_memory(&b, "seqlens_k", NULL, run->seqlens, sizeof *run->seqlens, &n, 1, ELEMENT_INT32);
        bind_memory(&b, "total_sequence_length", NULL, run->total, sizeof *run->total, &one, d->total_rank, ELEMENT_INT32);
    }
    bind_memory(&b, NULL, "logits", d->logits + run->first * d->vocab, sizeof *d->logits, logits_shape, 3, ELEMENT_FLOAT32);
    for (size_t i = 0; i < d->cache_count; i++) {
        const CacheTensor *cache = &d->caches[i];
        const int64_t shape[] = {n, (int64_t)cache->heads, (int64_t)d->capacity, (int64_t)cache->width};
        bind_memory(&b, cache->past->name, cache->present, cache->data + run->first * cache->row_bytes, cache->element, shape, 4,
                    cache->past->type);
    }
    bind_further(&b, d, run);
    if (ort_check(b.status, message) != 0) {
        if (b.binding != NULL) {
            ort.ReleaseIoBinding(b.binding);
        }
        return -1;
    }
    *out = b.binding;
    return 0;
}
