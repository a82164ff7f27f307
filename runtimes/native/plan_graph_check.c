/* Whether the steps of a graph's plan fit its buffers, weights and signature: what is checked here is not checked again when it runs. */
#include "plan_graph.h"

#define MOST_NUMBERS ((uint64_t)1 << 31) /* of a buffer, per image: places are int32 */

static const PlanBuffer *buffer_at(const Plan *p, PlanRef ref) {
    return ref.buffer >= 0 && (uint32_t)ref.buffer < p->buffer_count ? &p->buffers[ref.buffer] : NULL;
}

static bool holds_floats(const PlanBuffer *b) { return b->kind == BUFFER_FLOATS || b->kind == BUFFER_INPUT || b->kind == BUFFER_OUTPUT; }

/* `rows` rows (0: any number) of floats, from the column on. */
static bool floats_fit(const Plan *p, PlanRef ref, size_t rows, size_t width) {
    const PlanBuffer *b = buffer_at(p, ref);
    return b != NULL && holds_floats(b) && (rows == 0 || b->rows == rows) && ref.column >= 0 && (size_t)ref.column + width <= b->width;
}

static bool written_fits(const Plan *p, PlanRef ref, size_t rows, size_t width) {
    return floats_fit(p, ref, rows, width) && buffer_at(p, ref)->kind != BUFFER_INPUT;
}

/* Whole rows in 8 bits. */
static bool codes_fit(const Plan *p, PlanRef ref, size_t rows, size_t width) {
    const PlanBuffer *b = buffer_at(p, ref);
    return b != NULL && (b->kind == BUFFER_CODES || b->kind == BUFFER_BYTES) && b->rows == rows && ref.column == 0 && b->width == width;
}

static const PanelMatrix *weight_at(const Plan *p, int32_t index) {
    return index >= 0 && (uint32_t)index < p->weight_count ? &p->weights[index].matrix : NULL;
}

/* A table of floats; 0: any number. */
static bool table_fits(const Plan *p, int32_t index, size_t depth, size_t width) {
    const PanelMatrix *m = weight_at(p, index);
    return m != NULL && (int)m->format == WEIGHT_VECTOR && (depth == 0 || m->depth == depth) && (width == 0 || m->width == width);
}

static bool optional_vector(const Plan *p, int32_t index, size_t width) { return index < 0 || table_fits(p, index, 1, width); }

static size_t rows_at(const Plan *p, PlanRef ref) {
    const PlanBuffer *b = buffer_at(p, ref);
    return b != NULL ? b->rows : 0;
}

static bool copy_fits(const Plan *p, const PlanStep *s) {
    const PanelMatrix *m = weight_at(p, s->weight[0]);
    const PlanBuffer *to = buffer_at(p, s->out[0]), *from = buffer_at(p, s->in[0]);
    const int64_t length = s->arg[0];
    if (m == NULL || (int)m->format != WEIGHT_INTEGERS || m->depth != 1 || m->width % 2 != 0 || length <= 0 || to == NULL || s->out[0].column != 0 ||
        s->width != to->width || !written_fits(p, s->out[0], 0, to->width)) {
        return false;
    }
    int64_t given = 0;
    if (s->in[0].buffer >= 0) {
        if (from == NULL || !holds_floats(from) || s->in[0].column != 0) {
            return false;
        }
        given = (int64_t)from->rows * from->width;
    } else {
        const PanelMatrix *table = table_fits(p, s->weight[1], 0, 0) ? weight_at(p, s->weight[1]) : NULL;
        given = table != NULL ? (int64_t)(table->depth * table->width) : 0;
    }
    const int32_t *places = (const int32_t *)(const void *)m->data;
    for (size_t i = 0; i < m->width; i += 2) {
        if (places[i] < 0 || places[i] + length > (int64_t)to->rows * to->width || places[i + 1] < 0 || places[i + 1] + length > given) {
            return false;
        }
    }
    return true;
}

static bool product_fits(const Plan *p, const PlanStep *s) {
    const PanelMatrix *m = weight_at(p, s->weight[0]);
    const PlanBuffer *x = buffer_at(p, s->in[0]);
    const size_t rows = rows_at(p, s->out[0]);
    if (m == NULL || x == NULL || x->rows != rows || s->arg[0] < 0 || s->arg[0] >= UNARY_KINDS || !written_fits(p, s->out[0], rows, s->width)) {
        return false;
    }
    const bool bytes = (int)m->format == WEIGHT_BYTES;
    if ((!bytes && (int)m->format >= WEIGHT_FORMATS) || s->width != m->width) {
        return false;
    }
    if ((s->arg[1] != 0 && !bytes) || (bytes ? s->weight[1] >= 0 : !optional_vector(p, s->weight[1], m->width))) {
        return false;
    }
    if (bytes || m->block > 0) {
        return codes_fit(p, s->in[0], rows, m->depth) && x->kind == (bytes ? BUFFER_BYTES : BUFFER_CODES);
    }
    return floats_fit(p, s->in[0], rows, m->depth);
}

static bool norm_fits(const Plan *p, const PlanStep *s) {
    const size_t groups = s->arg[1] > 0 ? (size_t)s->arg[1] : 0, width = s->width, rows = rows_at(p, s->in[0]);
    const bool sums = s->in[1].buffer >= 0 || s->weight[2] >= 0;
    return groups > 0 && groups <= width && width % groups == 0 && (s->arg[0] == 0 || s->arg[0] == 1) && floats_fit(p, s->in[0], rows, width) &&
           (s->in[1].buffer < 0 || floats_fit(p, s->in[1], rows, width)) && (s->out[0].buffer < 0 || written_fits(p, s->out[0], rows, width)) &&
           (s->out[1].buffer < 0 ? !sums : written_fits(p, s->out[1], rows, width)) && (s->out[2].buffer < 0 || codes_fit(p, s->out[2], rows, width)) &&
           (s->out[0].buffer >= 0 || s->out[2].buffer >= 0) && table_fits(p, s->weight[0], 1, width / groups) && optional_vector(p, s->weight[1], width / groups) &&
           optional_vector(p, s->weight[2], width);
}

static bool attention_fits(const Plan *p, const PlanStep *s) {
    const int32_t *a = s->arg;
    if (a[0] <= 0 || a[0] > (1 << 16) || a[1] <= 0 || a[1] > HEAD_SIZE_MOST) {
        return false;
    }
    const size_t width = (size_t)a[0] * (size_t)a[1];
    return s->width == width && floats_fit(p, s->in[0], rows_at(p, s->out[0]), width) && floats_fit(p, s->in[1], 0, width) &&
           floats_fit(p, s->in[2], rows_at(p, s->in[1]), width) && written_fits(p, s->out[0], 0, width);
}

static bool step_fits(const Plan *p, const PlanStep *s) {
    const size_t width = s->width, rows = rows_at(p, s->in[0]);
    switch ((GraphKind)s->kind) {
    case GRAPH_COPY:
        return copy_fits(p, s);
    case GRAPH_QUANTIZE:
        return floats_fit(p, s->in[0], rows, width) && codes_fit(p, s->out[0], rows, width);
    case GRAPH_MATMUL:
        return product_fits(p, s);
    case GRAPH_NORM:
        return norm_fits(p, s);
    case GRAPH_ATTENTION:
        return attention_fits(p, s);
    case GRAPH_UNARY:
        return s->arg[0] >= 0 && s->arg[0] < UNARY_KINDS && floats_fit(p, s->in[0], rows, width) && written_fits(p, s->out[0], rows, width);
    case GRAPH_ADD:
    case GRAPH_MULTIPLY:
        return floats_fit(p, s->in[0], rows, width) && written_fits(p, s->out[0], rows, width) &&
               (s->in[1].buffer >= 0 ? floats_fit(p, s->in[1], rows, width) : table_fits(p, s->weight[0], 1, width) || table_fits(p, s->weight[0], rows, width));
    default:
        return false;
    }
}

/* [images, …] of float32 that are as many numbers as the buffer holds. */
static bool value_fits(const PlanValue *v, const PlanBuffer *b) {
    uint64_t numbers = 1;
    for (uint32_t d = 1; d < v->rank; d++) {
        if (v->shape[d] <= 0 || (uint64_t)v->shape[d] > MOST_NUMBERS || (numbers *= (uint64_t)v->shape[d]) > MOST_NUMBERS) {
            return false;
        }
    }
    return numbers == (uint64_t)b->rows * b->width;
}

static bool buffer_fits(const Plan *p, const PlanBuffer *b) {
    const uint64_t width = b->width, numbers = b->rows * width;
    if (width == 0 || b->rows == 0 || numbers > MOST_NUMBERS) {
        return false;
    }
    if (b->kind == BUFFER_INPUT || b->kind == BUFFER_OUTPUT) {
        const uint32_t count = b->kind == BUFFER_INPUT ? p->input_count : p->output_count;
        return b->offset < count && value_fits(b->kind == BUFFER_INPUT ? &p->inputs[b->offset] : &p->outputs[b->offset], b);
    }
    const uint64_t blocks = (width + BLOCK - 1) / BLOCK;
    const uint64_t row = b->kind == BUFFER_FLOATS ? width * 4 : b->kind == BUFFER_CODES ? blocks * (BLOCK + 8) : byte_stride((size_t)width) + 8;
    return (b->kind == BUFFER_FLOATS || b->kind == BUFFER_CODES || b->kind == BUFFER_BYTES) && b->offset % 64 == 0 && b->offset <= p->token_bytes &&
           b->rows * row <= p->token_bytes - b->offset;
}

/* Every output is written somewhere: memory that nobody wrote is not handed out. */
static bool outputs_fit(const Plan *p) {
    for (uint32_t i = 0; i < p->output_count; i++) {
        bool written = false;
        for (uint32_t k = 0; k < p->step_count; k++) {
            const PlanBuffer *b = p->steps[k].kind == GRAPH_NORM && p->steps[k].out[0].buffer < 0 ? NULL : buffer_at(p, p->steps[k].out[0]);
            const PlanBuffer *sum = buffer_at(p, p->steps[k].out[1]);
            written = written || (b != NULL && b->kind == BUFFER_OUTPUT && b->offset == i) || (sum != NULL && sum->kind == BUFFER_OUTPUT && sum->offset == i);
        }
        if (!written) {
            return false;
        }
    }
    return p->output_count > 0;
}

/* Arrays come in by their first dimension, the images, and by nothing else that is open. */
static bool signature_fits(const Plan *p) {
    for (uint32_t i = 0; i < p->input_count + p->output_count; i++) {
        const PlanValue *v = i < p->input_count ? &p->inputs[i] : &p->outputs[i - p->input_count];
        if (v->type != 1 || v->rank == 0 || v->shape[0] >= 0) {
            return false;
        }
    }
    return p->input_count > 0;
}

/* How many steps read or write a buffer. */
static size_t uses(const Plan *p, int32_t buffer) {
    size_t count = 0;
    for (uint32_t i = 0; i < p->step_count; i++) {
        for (size_t k = 0; k < STEP_INPUTS; k++) {
            count += p->steps[i].in[k].buffer == buffer;
        }
        for (size_t k = 0; k < STEP_OUTPUTS; k++) {
            count += p->steps[i].out[k].buffer == buffer;
        }
    }
    return count;
}

/* Whether two buffers share no memory. Rows of one are written while those of the other are still read. */
static bool apart(const Plan *p, PlanRef x, PlanRef y) {
    const PlanBuffer *a = buffer_at(p, x), *b = buffer_at(p, y);
    if (b->kind != BUFFER_FLOATS) {
        return true; /* memory of the caller */
    }
    const uint64_t a_end = a->offset + a->rows * (byte_stride(a->width) + 8), b_end = b->offset + (uint64_t)b->rows * b->width * sizeof(float);
    return a_end <= b->offset || b_end <= a->offset;
}

static bool multiplies_bytes(const Plan *p, const PlanStep *s) { return s->kind == GRAPH_MATMUL && (int)weight_at(p, s->weight[0])->format == WEIGHT_BYTES; }

static void find_chains(Plan *p) {
    for (uint32_t i = 0; i + 2 < p->step_count; i++) {
        PlanStep *up = &p->steps[i], *codes = up + 1, *down = up + 2;
        if (multiplies_bytes(p, up) && codes->kind == GRAPH_QUANTIZE && multiplies_bytes(p, down) && up->arg[1] == 0 && up->out[0].buffer == codes->in[0].buffer &&
            up->out[0].column == 0 && codes->in[0].column == 0 && codes->width == up->width && buffer_at(p, up->out[0])->kind == BUFFER_FLOATS &&
            buffer_at(p, up->out[0])->width == up->width && codes->out[0].buffer == down->in[0].buffer && buffer_at(p, down->in[0])->kind == BUFFER_BYTES &&
            uses(p, up->out[0].buffer) == 2 && uses(p, down->in[0].buffer) == 2 && apart(p, up->in[0], down->out[0])) {
            up->chain = CHAIN_FIRST;
            codes->chain = down->chain = CHAIN_INNER;
            i += 2;
        }
    }
}

const char *graph_check(Plan *p) {
    if (!signature_fits(p)) {
        return "its signature is not that of a graph for images";
    }
    for (uint32_t i = 0; i < p->buffer_count; i++) {
        if (!buffer_fits(p, &p->buffers[i])) {
            return "a buffer lies outside the arena, or is not what the signature says";
        }
    }
    for (uint32_t i = 0; i < p->step_count; i++) {
        const PlanStep *s = &p->steps[i];
        if (s->width == 0 || !step_fits(p, s)) {
            return "a step does not fit its buffers or weights";
        }
    }
    find_chains(p);
    for (uint32_t i = 0; i < p->step_count; i++) {
        const size_t scratch = graph_scratch(&p->steps[i]);
        p->thread_bytes = scratch > p->thread_bytes ? scratch : p->thread_bytes;
    }
    return outputs_fit(p) ? NULL : "an output is never written";
}
