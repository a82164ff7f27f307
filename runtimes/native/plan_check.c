/* Whether the steps of a plan fit its buffers, weights and signature: what is checked here is not checked again when it runs. */
#include "plan_head.h"

#include <string.h>

static bool ref_fits(const Plan *p, PlanRef ref, size_t width, bool codes) {
    if (ref.buffer < 0 || (uint32_t)ref.buffer >= p->buffer_count || ref.column < 0) {
        return false;
    }
    const PlanBuffer *b = &p->buffers[ref.buffer];
    return (b->kind == BUFFER_CODES) == codes && (size_t)ref.column + width <= b->width && (!codes || ref.column == 0);
}

static bool weight_fits(const Plan *p, int32_t index, int format, size_t depth, size_t width) {
    if (index < 0 || (uint32_t)index >= p->weight_count) {
        return false;
    }
    const PanelMatrix *m = &p->weights[index].matrix;
    return (format < 0 ? (int)m->format < WEIGHT_FORMATS : (int)m->format == format) && (depth == 0 || m->depth == depth) && (width == 0 || m->width == width);
}

static bool optional_vector(const Plan *p, int32_t index, size_t width) { return index < 0 || weight_fits(p, index, WEIGHT_VECTOR, 1, width); }

static size_t buffer_width(const Plan *p, PlanRef ref) {
    return ref.buffer >= 0 && (uint32_t)ref.buffer < p->buffer_count ? p->buffers[ref.buffer].width : 0;
}

static bool product_fits(const Plan *p, const PlanStep *s) {
    if (!weight_fits(p, s->weight[0], -1, 0, 0) || s->arg[0] < 0 || s->arg[0] >= UNARY_KINDS) {
        return false;
    }
    const PanelMatrix *m = &p->weights[s->weight[0]].matrix;
    const bool quantised = m->block > 0;
    /* Pairs of panels of a gated product hold 16 outputs each, some of which may be filling. */
    const size_t pairs = m->width / (2 * PANEL);
    if (s->kind == STEP_GATED ? m->width != pairs * 2 * PANEL || (s->width + PANEL - 1) / PANEL != pairs : s->width != m->width) {
        return false;
    }
    return optional_vector(p, s->weight[1], m->width) && ref_fits(p, s->in[0], m->depth, quantised) &&
           (!quantised || (m->depth + BLOCK - 1) / BLOCK == (buffer_width(p, s->in[0]) + BLOCK - 1) / BLOCK) && ref_fits(p, s->out[0], s->width, false) &&
           (s->in[1].buffer < 0 || ref_fits(p, s->in[1], s->width, false));
}

/* A weight of 8 bits in two planes: the upper one a matrix of 4 bits, the lower one as large without its scales. */
static bool planes_fit(const Plan *p, const PlanStep *s) {
    if (!weight_fits(p, s->weight[0], WEIGHT_INT4, 0, 0)) {
        return false;
    }
    const PanelMatrix *m = &p->weights[s->weight[0]].matrix;
    const size_t panels = (m->width + PANEL - 1) / PANEL, blocks = (m->depth + BLOCK - 1) / BLOCK;
    const PlanRef rough = s->kind == STEP_REFINE ? s->in[1] : s->out[1];
    return s->last && s->width == m->width && weight_fits(p, s->weight[2], WEIGHT_INTEGERS, panels, blocks * 64) && ref_fits(p, s->in[0], m->depth, true) &&
           blocks == (buffer_width(p, s->in[0]) + BLOCK - 1) / BLOCK && ref_fits(p, rough, panels, false) && ref_fits(p, s->out[0], s->width, false) &&
           (s->kind == STEP_REFINE ? weight_fits(p, s->weight[1], WEIGHT_VECTOR, blocks, panels) &&
                                         p->buffers[s->out[0].buffer].kind == BUFFER_LOGITS /* where plan_complete writes; perhaps not all of them */
                                   : s->weight[1] < 0 && s->arg[0] == UNARY_IDENTITY && s->in[1].buffer < 0);
}

static bool norm_fits(const Plan *p, const PlanStep *s) {
    const size_t groups = s->arg[1] > 0 ? (size_t)s->arg[1] : 0, width = s->width;
    return groups > 0 && groups <= width && width % groups == 0 && (s->arg[0] == 0 || s->arg[0] == 1) && ref_fits(p, s->in[0], width, false) &&
           (s->in[1].buffer < 0 || ref_fits(p, s->in[1], width, false)) && (s->out[0].buffer < 0 || ref_fits(p, s->out[0], width, false)) &&
           (s->out[1].buffer < 0 || ref_fits(p, s->out[1], width, false)) &&
           (s->out[2].buffer < 0 || (s->out[0].buffer >= 0 && buffer_width(p, s->out[2]) == width && ref_fits(p, s->out[2], width, true))) &&
           (s->weight[0] < 0 ? s->out[0].buffer < 0 : weight_fits(p, s->weight[0], WEIGHT_VECTOR, 1, width / groups)) &&
           (s->in[1].buffer < 0 && s->weight[2] < 0 ? true : s->out[1].buffer >= 0) && optional_vector(p, s->weight[1], width / groups) && optional_vector(p, s->weight[2], width);
}

/* Whether an input is one of those that are numbered: none of those that every decoder has. */
static bool is_further(const PlanValue *v) {
    return strcmp(v->name, "inputs_embeds") != 0 && strcmp(v->name, "position_ids") != 0 && strcmp(v->name, "seqlens_k") != 0 &&
           strcmp(v->name, "total_sequence_length") != 0 && strncmp(v->name, "past_key_values.", 16) != 0;
}

static const PlanValue *cache_value(const Plan *p, int32_t index) {
    for (uint32_t i = 0; i < p->input_count && index >= 0; i++) {
        const PlanValue *v = &p->inputs[i];
        if (strncmp(v->name, "past_key_values.", 16) == 0 && index-- == 0) {
            return v;
        }
    }
    return NULL;
}

/* Whether cache number `index` is [batch, heads, capacity, size] of floats, or of codes whose scales, of each block of a head, are cache
 * number `scales`: [batch, heads · blocks, capacity, 1]. */
static bool cache_fits(const Plan *p, int32_t index, int32_t scales, int32_t heads, int32_t size) {
    const PlanValue *v = cache_value(p, index);
    if (v == NULL || heads <= 0 || size <= 0 || size > HEAD_SIZE_MOST || v->rank != 4 || v->shape[1] != heads || v->shape[3] != size) {
        return false;
    }
    if (v->type != 3) {
        return v->type == 1 || v->type == 10;
    }
    const PlanValue *s = cache_value(p, scales);
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    return s != NULL && s->rank == 4 && s->type == 10 && s->shape[1] == heads * blocks && s->shape[3] == 1;
}

/* Keys and values of a step: both there, and of one format. */
static bool caches_fit(const Plan *p, const PlanStep *s) {
    const int32_t *a = s->arg; /* key cache, value cache, heads, kv heads, head size; at 8 the keys' scales, the values' */
    return cache_fits(p, a[0], a[8], a[3], a[4]) && cache_fits(p, a[1], a[9], a[3], a[4]) &&
           cache_value(p, a[0])->type == cache_value(p, a[1])->type && a[2] > 0 && a[2] % a[3] == 0;
}

static bool rotary_fits(const Plan *p, const PlanStep *s) {
    const int32_t *a = s->arg; /* key cache, value cache, heads, kv heads, head size, rotary size, interleaved, source of angles */
    if (!caches_fit(p, s) || a[5] < 0 || a[5] % 2 != 0 || a[5] > a[4]) {
        return false;
    }
    const size_t q = (size_t)a[2] * (size_t)a[4], kv = (size_t)a[3] * (size_t)a[4], half = (size_t)a[5] / 2;
    const bool angles = a[7] == 0 || (a[7] == 3 ? ref_fits(p, s->in[3], 2 * half, false)
                                                : (a[7] == 1 || a[7] == 2) && weight_fits(p, s->weight[0], WEIGHT_VECTOR, 0, half) &&
                                                      weight_fits(p, s->weight[1], WEIGHT_VECTOR, p->weights[s->weight[0]].matrix.depth, half));
    return (a[7] == 0) == (a[5] == 0) && angles && ref_fits(p, s->in[0], q, false) && ref_fits(p, s->in[1], kv, false) && ref_fits(p, s->in[2], kv, false) &&
           ref_fits(p, s->out[0], q, false) && s->width == q;
}

/* Further input number `index`, of that type, with numbers for each token: [batch, sequence, …]; `width` 0: any count of int64. */
static bool token_input_fits(const Plan *p, int64_t index, uint32_t type, size_t width) {
    for (uint32_t i = 0; i < p->input_count && index >= 0; i++) {
        const PlanValue *v = &p->inputs[i];
        if (is_further(v) && index-- == 0) {
            const bool by_token = v->rank >= 3 && v->shape[0] < 0 && v->shape[1] < 0 && v->symbols[1] != NULL && strcmp(v->symbols[1], "sequence") == 0;
            return v->type == type && by_token && (width == 0 || (v->rank == 3 && v->shape[2] == (int64_t)width));
        }
    }
    return false;
}

static bool attention_fits(const Plan *p, const PlanStep *s) {
    const int32_t *a = s->arg; /* key cache, value cache, heads, kv heads, head size, window, blocks */
    if (!caches_fit(p, s) || a[5] < 0) {
        return false;
    }
    const size_t width = (size_t)a[2] * (size_t)a[4];
    return s->width == width && ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false) &&
           (s->weight[0] < 0 || weight_fits(p, s->weight[0], WEIGHT_VECTOR, (size_t)a[2], 0));
}

/* Further input number `index`, of that type and rank; `heads` not 0: [batch, heads, …, size]. */
static bool input_fits(const Plan *p, int32_t index, uint32_t type, uint32_t rank, int64_t heads, int64_t size) {
    for (uint32_t i = 0; i < p->input_count && index >= 0; i++) {
        const PlanValue *v = &p->inputs[i];
        if (is_further(v) && index-- == 0) {
            return v->type == type && v->rank == rank && v->shape[0] < 0 && (heads == 0 || (v->shape[1] == heads && v->shape[rank - 1] == size));
        }
    }
    return false;
}

/* The input that numbers the blocks of tokens, one number for each: [batch, sequence] of int64. */
static bool blocks_fit(const Plan *p) {
    int64_t index = p->block_input;
    for (uint32_t i = 0; i < p->input_count && index >= 0; i++) {
        const PlanValue *v = &p->inputs[i];
        if (is_further(v) && index-- == 0) {
            return v->type == 7 && v->rank == 2 && v->shape[0] < 0 && v->shape[1] < 0 && v->symbols[1] != NULL && strcmp(v->symbols[1], "sequence") == 0;
        }
    }
    return false;
}

static bool cross_fits(const Plan *p, const PlanStep *s) {
    const int32_t *a = s->arg; /* keys, values, heads, kv heads, head size, mask, what each token sees, whether those that see nothing see all */
    if (a[2] <= 0 || a[3] <= 0 || a[4] <= 0 || a[4] > HEAD_SIZE_MOST || a[2] % a[3] != 0 || !input_fits(p, a[0], 1, 4, a[3], a[4]) ||
        !input_fits(p, a[1], 1, 4, a[3], a[4]) || (a[5] >= 0 && !input_fits(p, a[5], 7, 2, 0, 0)) ||
        (a[6] >= 0 && !token_input_fits(p, a[6], 7, 0))) {
        return false;
    }
    const size_t width = (size_t)a[2] * (size_t)a[4];
    return s->width == width && ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false);
}

static bool step_fits(const Plan *p, const PlanStep *s) {
    const size_t width = s->width;
    switch ((StepKind)s->kind) {
    case STEP_QUANTIZE:
        return ref_fits(p, s->in[0], width, false) && buffer_width(p, s->out[0]) == width && ref_fits(p, s->out[0], width, true);
    case STEP_REFINE:
        return planes_fit(p, s);
    case STEP_MATMUL:
    case STEP_GATED:
        return product_fits(p, s) && (s->kind == STEP_GATED || s->weight[2] < 0 || planes_fit(p, s));
    case STEP_NORM:
        return norm_fits(p, s);
    case STEP_ANGLES:
        return width > 0 && s->arg[0] > 0 && width == 2 * (size_t)s->arg[0] && ref_fits(p, s->out[0], width, false) &&
               weight_fits(p, s->weight[0], WEIGHT_VECTOR, 1, width / 2) && weight_fits(p, s->weight[1], WEIGHT_INTEGERS, 1, width / 2);
    case STEP_ROTARY:
        return rotary_fits(p, s) && !s->last;
    case STEP_ATTENTION:
    case STEP_COMBINE:
        return attention_fits(p, s) && !s->last;
    case STEP_CROSS:
        return cross_fits(p, s);
    case STEP_SELECT:
        return blocks_fit(p) && !s->last && ref_fits(p, s->in[0], width, false) && ref_fits(p, s->in[1], width, false) &&
               ref_fits(p, s->out[0], width, false);
    case STEP_SEEN:
        return token_input_fits(p, s->arg[0], 7, 0) && ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false);
    case STEP_GREATER:
        return ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false);
    case STEP_LAST:
        return s->last && ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false);
    case STEP_UNARY:
        return s->arg[0] >= 0 && s->arg[0] < UNARY_KINDS && ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false);
    case STEP_ADD:
    case STEP_MULTIPLY:
        return ref_fits(p, s->in[0], width, false) && ref_fits(p, s->out[0], width, false) &&
               (s->in[1].buffer >= 0 ? ref_fits(p, s->in[1], width, false) : weight_fits(p, s->weight[0], WEIGHT_VECTOR, 1, width));
    case STEP_LOOKUP:
        return weight_fits(p, s->weight[0], WEIGHT_VECTOR, 0, width) && ref_fits(p, s->out[0], width, false);
    default:
        return false;
    }
}

static const PlanValue *value_named(const PlanValue *values, uint32_t count, const char *name) {
    for (uint32_t i = 0; i < count; i++) {
        if (strcmp(values[i].name, name) == 0) {
            return &values[i];
        }
    }
    return NULL;
}

/* The signature is what the steps count on. */
static bool signature_fits(const Plan *p) {
    const PlanValue *embeds = value_named(p->inputs, p->input_count, "inputs_embeds"), *lengths = value_named(p->inputs, p->input_count, "seqlens_k");
    const PlanValue *positions = value_named(p->inputs, p->input_count, "position_ids"), *logits = value_named(p->outputs, p->output_count, "logits");
    const int64_t axes = positions == NULL ? 0 : positions->rank == 2 ? 1 : positions->rank == 3 ? positions->shape[0] : -1;
    return embeds != NULL && embeds->rank == 3 && embeds->type == 1 && embeds->shape[2] == (int64_t)p->hidden && p->hidden > 0 && lengths != NULL &&
           lengths->rank == 1 && lengths->type == 6 && logits != NULL && logits->rank == 3 && logits->type == 1 && logits->shape[2] == (int64_t)p->vocab &&
           p->vocab > 0 && axes == (int64_t)p->position_axes && (positions == NULL || positions->type == 7);
}

/* Whether what is read besides rows is there: positions, and the axes that angles turn with. */
static bool positions_fit(const Plan *p, const PlanStep *s) {
    if (s->kind == STEP_ANGLES) {
        const int32_t *axes = (const int32_t *)(const void *)p->weights[s->weight[1]].matrix.data;
        for (size_t i = 0; i < s->width / 2; i++) {
            if (axes[i] < 0 || (uint32_t)axes[i] >= p->position_axes) {
                return false;
            }
        }
    }
    const bool reads = (s->kind == STEP_LOOKUP && s->arg[1] == 0) || (s->kind == STEP_ROTARY && s->arg[7] == 1);
    return !reads || p->position_axes > 0;
}

/* Every place is a buffer's or none; nothing is written to what is given, and logits are of a row's last token. */
static bool refs_fit(const Plan *p, const PlanStep *s) {
    for (size_t k = 0; k < STEP_INPUTS + STEP_OUTPUTS; k++) {
        const PlanRef ref = k < STEP_INPUTS ? s->in[k] : s->out[k - STEP_INPUTS];
        if (ref.buffer < 0) {
            continue;
        }
        if ((uint32_t)ref.buffer >= p->buffer_count) {
            return false;
        }
        const uint32_t kind = p->buffers[ref.buffer].kind;
        if (((kind == BUFFER_EMBEDS || kind == BUFFER_INPUT) && k >= STEP_INPUTS) || (kind == BUFFER_LOGITS && !s->last)) {
            return false;
        }
    }
    return true;
}

const char *plan_check(Plan *p) {
    if (!signature_fits(p)) {
        return "its signature is not a decoder's";
    }
    for (uint32_t i = 0; i < p->buffer_count; i++) {
        const PlanBuffer *b = &p->buffers[i];
        const uint64_t blocks = ((uint64_t)b->width + BLOCK - 1) / BLOCK;
        const uint64_t bytes = b->kind == BUFFER_FLOATS ? (uint64_t)b->width * 4 : b->kind == BUFFER_CODES ? blocks * (BLOCK + 8) : 0;
        const bool fixed = b->kind == BUFFER_EMBEDS ? b->width == p->hidden : b->kind == BUFFER_LOGITS ? b->width == p->vocab : true;
        if (b->kind == BUFFER_INPUT && b->width > 0 && token_input_fits(p, (int64_t)b->offset, 1, b->width)) {
            continue;
        }
        if (b->kind >= BUFFER_INPUT || !fixed || b->width == 0 || b->offset % 64 != 0 || b->offset > p->token_bytes || bytes > p->token_bytes - b->offset) {
            return "a buffer lies outside the arena";
        }
    }
    for (uint32_t i = 0; i < p->input_count; i++) {
        p->cache_count += strncmp(p->inputs[i].name, "past_key_values.", 16) == 0;
    }
    if (p->block_input >= 0 && !blocks_fit(p)) {
        return "the numbers of blocks are no input";
    }
    for (uint32_t i = 0; i < p->step_count; i++) {
        PlanStep *s = &p->steps[i];
        if (!refs_fit(p, s) || !step_fits(p, s) || !positions_fit(p, s)) {
            return "a step does not fit its buffers or weights";
        }
        if (s->kind == STEP_ROTARY || s->kind == STEP_ATTENTION || s->kind == STEP_COMBINE) {
            const uint32_t type = cache_value(p, s->arg[0])->type;
            s->cache = type == 3 ? CACHE_INT8 : type == 10 ? CACHE_FLOAT16 : CACHE_FLOAT32;
        }
        const size_t scratch = s->kind == STEP_ATTENTION || s->kind == STEP_CROSS ? attention_scratch(s)
                               : s->kind == STEP_REFINE || head_is_split(s)              ? 64 * 1024 + head_scratch(p, s)
                                                                                         : 64 * 1024;
        p->thread_bytes = scratch > p->thread_bytes ? scratch : p->thread_bytes;
    }
    return NULL;
}
