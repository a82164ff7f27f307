/* Whether the steps of a graph's plan fit its buffers, weights and signature: what is checked here is not checked again when it runs. */
#include "plan_graph.h"

#define MOST_NUMBERS ((uint64_t)1 << 31) /* of a buffer, per image: places are int32 */
#define MOST_TOGETHER (1 << 20)          /* rows of an array that are one image */

static const PlanBuffer *buffer_at(const Plan *p, PlanRef ref) {
    return ref.buffer >= 0 && (uint32_t)ref.buffer < p->buffer_count ? &p->buffers[ref.buffer] : NULL;
}

/* Element types of ONNX that inputs have. */
enum { TYPE_FLOAT = 1, TYPE_INT64 = 7 };

static bool holds_floats(const Plan *p, const PlanBuffer *b) {
    return b->kind == BUFFER_FLOATS || b->kind == BUFFER_OUTPUT || (b->kind == BUFFER_INPUT && p->inputs[b->offset].type == TYPE_FLOAT);
}

/* `rows` rows (0: any number) of floats, from the column on. */
static bool floats_fit(const Plan *p, PlanRef ref, size_t rows, size_t width) {
    const PlanBuffer *b = buffer_at(p, ref);
    return b != NULL && holds_floats(p, b) && (rows == 0 || b->rows == rows) && ref.column >= 0 && (size_t)ref.column + width <= b->width;
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
        if (from == NULL || !holds_floats(p, from) || s->in[0].column != 0) {
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

/* `count` pieces of `numbers` numbers, `step` apart, from `at` on, inside of `room`. */
static bool pieces_fit(int64_t at, int64_t count, int64_t step, int64_t numbers, int64_t room) {
    const int64_t last = at + (count - 1) * step;
    return at >= 0 && last >= 0 && at <= room - numbers && last <= room - numbers;
}

static bool small_number(int64_t number) { return number >= -(int64_t)MOST_NUMBERS && number <= (int64_t)MOST_NUMBERS; }

static bool spread_fits(const Plan *p, const PlanStep *s) {
    const PanelMatrix *m = weight_at(p, s->weight[0]);
    const PlanBuffer *to = buffer_at(p, s->out[0]), *from = buffer_at(p, s->in[0]);
    if (m == NULL || (int)m->format != WEIGHT_INTEGERS || m->depth != 1 || m->width % GRAPH_SPREAD_NUMBERS != 0 || to == NULL || s->out[0].column != 0 ||
        s->width != to->width || !written_fits(p, s->out[0], 0, to->width)) {
        return false;
    }
    const PanelMatrix *table = s->in[0].buffer < 0 && table_fits(p, s->weight[1], 0, 0) ? weight_at(p, s->weight[1]) : NULL;
    if (s->in[0].buffer >= 0 ? from == NULL || !holds_floats(p, from) || s->in[0].column != 0 : table == NULL) {
        return false;
    }
    const int64_t room = (int64_t)to->rows * to->width, given = table != NULL ? (int64_t)(table->depth * table->width) : (int64_t)from->rows * from->width;
    const int32_t *runs = (const int32_t *)(const void *)m->data;
    for (size_t i = 0; i < m->width; i += GRAPH_SPREAD_NUMBERS) {
        const GraphSpread r = graph_spread(runs + i, p->length);
        if (!small_number(r.to) || !small_number(r.from) || !small_number(r.count) || !small_number(r.to_step) || !small_number(r.from_step) ||
            r.numbers <= 0 || r.numbers > (int64_t)MOST_NUMBERS || r.count < 0 || r.count * r.numbers > room ||
            (r.count > 0 && (!pieces_fit(r.to, r.count, r.to_step, r.numbers, room) || !pieces_fit(r.from, r.count, r.from_step, r.numbers, given)))) {
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

/* An input of int64, all of it. */
static const PlanBuffer *integers_at(const Plan *p, PlanRef ref) {
    const PlanBuffer *b = buffer_at(p, ref);
    return b != NULL && b->kind == BUFFER_INPUT && p->inputs[b->offset].type == TYPE_INT64 && ref.column == 0 ? b : NULL;
}

/* An integer for each row. */
static bool segments_fit(const Plan *p, const PlanStep *s) {
    const PlanBuffer *ids = integers_at(p, s->in[3]);
    return ids != NULL && ids->width == 1 && ids->rows == rows_at(p, s->out[0]) && ids->rows == rows_at(p, s->in[1]);
}

/* An integer for each row of an image. */
static bool row_integers_fit(const Plan *p, PlanRef ref, size_t rows) {
    const PlanBuffer *b = integers_at(p, ref);
    return b != NULL && b->width == 1 && b->rows == rows;
}

static bool mask_fits(const Plan *p, const PlanStep *s) {
    const size_t keys = rows_at(p, s->in[1]);
    const bool given = s->in[3].buffer >= 0;
    if (s->arg[4] < 0 || (size_t)s->arg[4] > keys || (given ? !row_integers_fit(p, s->in[3], keys - (size_t)s->arg[4]) : s->arg[4] != 0)) {
        return false;
    }
    return s->arg[3] == 0 || keys == rows_at(p, s->out[0]);
}

static bool attention_fits(const Plan *p, const PlanStep *s) {
    const int32_t *a = s->arg;
    if (a[0] <= 0 || a[0] > (1 << 16) || a[1] <= 0 || a[1] > HEAD_SIZE_MOST || a[5] < 0 || a[5] > OVER_SEGMENTS) {
        return false;
    }
    const size_t width = (size_t)a[0] * (size_t)a[1];
    if (a[5] == OVER_IMAGE ? !mask_fits(p, s) : a[3] != 0 || a[4] != 0 || (a[5] == OVER_SEGMENTS ? !segments_fit(p, s) : s->in[3].buffer >= 0)) {
        return false;
    }
    return s->width == width && floats_fit(p, s->in[0], rows_at(p, s->out[0]), width) && floats_fit(p, s->in[1], 0, width) &&
           floats_fit(p, s->in[2], rows_at(p, s->in[1]), width) && written_fits(p, s->out[0], 0, width);
}

static bool rotary_fits(const Plan *p, const PlanStep *s) {
    const size_t rows = rows_at(p, s->out[0]);
    if (s->arg[0] <= 0 || s->arg[0] > (1 << 16) || s->arg[1] <= 0 || s->arg[1] > (1 << 16) || s->arg[1] % 2 != 0) {
        return false;
    }
    const size_t size = (size_t)s->arg[1];
    return s->width == (size_t)s->arg[0] * size && floats_fit(p, s->in[0], rows, s->width) && floats_fit(p, s->in[1], rows, size) &&
           floats_fit(p, s->in[2], rows, size) && written_fits(p, s->out[0], rows, s->width);
}

/* A table of floats, or of halves. */
static bool rows_fit(const Plan *p, int32_t index, size_t width) {
    const PanelMatrix *m = weight_at(p, index);
    return m != NULL && ((int)m->format == WEIGHT_VECTOR || (int)m->format == WEIGHT_HALF_ROWS) && m->width == width;
}

static bool gather_fits(const Plan *p, const PlanStep *s) {
    const PlanBuffer *places = integers_at(p, s->in[1]);
    return places != NULL && written_fits(p, s->out[0], (size_t)places->rows * places->width, s->width) &&
           (s->in[0].buffer >= 0 ? floats_fit(p, s->in[0], 0, s->width) : rows_fit(p, s->weight[0], s->width));
}

/* One row, or as many as an image has; where lengths differ, those of shorter ones are the first of them. */
static bool sum_table_fits(const Plan *p, int32_t index, size_t rows, size_t width) {
    return table_fits(p, index, 0, width) && (weight_at(p, index)->depth == 1 || weight_at(p, index)->depth == rows || (p->longest > 0 && weight_at(p, index)->depth >= rows));
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
               (s->in[1].buffer >= 0 ? floats_fit(p, s->in[1], rows, width) : sum_table_fits(p, s->weight[0], rows, width));
    case GRAPH_CONVERT: {
        const PlanBuffer *x = integers_at(p, s->in[0]);
        return x != NULL && x->width == width && written_fits(p, s->out[0], x->rows, width);
    }
    case GRAPH_COSINE:
        return floats_fit(p, s->in[0], rows, width) && written_fits(p, s->out[0], rows, width);
    case GRAPH_ROTARY:
        return rotary_fits(p, s);
    case GRAPH_GATHER:
        return gather_fits(p, s);
    case GRAPH_LENGTH:
        return s == p->steps; /* length_fits has looked at it */
    case GRAPH_SPREAD:
        return p->longest > 0 && spread_fits(p, s);
    case GRAPH_PICK:
        return s->arg[0] >= 0 && s->arg[0] < PICK_KINDS && floats_fit(p, s->in[0], rows, width) && row_integers_fit(p, s->in[1], rows) &&
               written_fits(p, s->out[0], 1, width);
    default:
        return false;
    }
}

/* Whether a step reads rows of other images than that of the row it makes. */
static bool joins(const PlanStep *s) {
    return (s->kind == GRAPH_ATTENTION && s->arg[5] != OVER_IMAGE) || (s->kind == GRAPH_GATHER && s->in[0].buffer >= 0);
}

/* [images · so many rows, …] that are as many numbers as the buffer holds for each image. */
static bool value_fits(const Plan *p, const PlanValue *v, const PlanBuffer *b) {
    uint64_t numbers = (uint64_t)-v->shape[0];
    for (uint32_t d = 1; d < v->rank; d++) {
        const int64_t size = v->shape[d] < 0 ? (int64_t)p->length : v->shape[d];
        if (size <= 0 || (uint64_t)size > MOST_NUMBERS || (numbers *= (uint64_t)size) > MOST_NUMBERS) {
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
        const bool given = b->kind != BUFFER_OUTPUT;
        const PlanValue *v = b->offset >= (given ? p->input_count : p->output_count) ? NULL : given ? &p->inputs[b->offset] : &p->outputs[b->offset];
        return v != NULL && value_fits(p, v, b);
    }
    const uint64_t blocks = (width + BLOCK - 1) / BLOCK;
    const uint64_t row = b->kind == BUFFER_FLOATS ? width * 4 : b->kind == BUFFER_CODES ? blocks * (BLOCK + 8) : byte_stride((size_t)width) + 8;
    return (b->kind == BUFFER_FLOATS || b->kind == BUFFER_CODES || b->kind == BUFFER_BYTES) && b->offset % 64 == 0 && b->offset <= p->token_bytes &&
           b->rows * row <= p->token_bytes - b->offset;
}

/* What a step writes of an output it names. */
static void output_written(const Plan *p, const PlanStep *s, PlanRef ref) {
    const PlanBuffer *b = buffer_at(p, ref);
    if (b == NULL || b->kind != BUFFER_OUTPUT) {
        return;
    }
    const bool pieces = s->kind == GRAPH_COPY || s->kind == GRAPH_SPREAD || (s->kind == GRAPH_MATMUL && s->arg[1] != 0); /* or adds to what is there */
    const PlanWritten written = pieces || ref.column != 0 || s->width != b->width ? WRITTEN_SOME : WRITTEN_ALL;
    PlanValue *value = &p->outputs[b->offset];
    value->written = written > value->written ? written : value->written;
}

static void count_uses(Plan *p, const PlanStep *s) {
    for (size_t k = 0; k < STEP_INPUTS + STEP_OUTPUTS; k++) {
        const int32_t buffer = k < STEP_INPUTS ? s->in[k].buffer : s->out[k - STEP_INPUTS].buffer;
        if (buffer >= 0 && (uint32_t)buffer < p->buffer_count) {
            p->buffers[buffer].uses++;
        }
    }
    if (s->kind != GRAPH_LENGTH) {
        output_written(p, s, s->out[0]);
    }
    if (s->kind == GRAPH_NORM) {
        output_written(p, s, s->out[1]);
    }
}

/* Arrays come in by their first dimension, the images, and by nothing else that is open, but where calls bring a length; integers only come in. */
static bool signature_fits(const Plan *p) {
    for (uint32_t i = 0; i < p->input_count + p->output_count; i++) {
        const PlanValue *v = i < p->input_count ? &p->inputs[i] : &p->outputs[i - p->input_count];
        if ((v->type != TYPE_FLOAT && (v->type != TYPE_INT64 || i >= p->input_count)) || v->rank == 0 || v->shape[0] >= 0 || v->shape[0] < -MOST_TOGETHER) {
            return false;
        }
        for (uint32_t d = 1; d < v->rank; d++) {
            if (v->shape[d] < 0 && p->longest == 0) {
                return false;
            }
        }
    }
    return p->input_count > 0;
}

/* Whether every buffer has as many rows as the plan says of its length; a plan without a GRAPH_LENGTH has none. */
static bool length_fits(Plan *p) {
    if (p->step_count == 0 || p->steps[0].kind != GRAPH_LENGTH) {
        return true;
    }
    const PlanStep *s = &p->steps[0];
    const PanelMatrix *m = weight_at(p, s->weight[0]);
    if (m == NULL || (int)m->format != WEIGHT_INTEGERS || m->depth != 1 || m->width != 2 * (size_t)p->buffer_count || s->arg[0] <= 0 || s->arg[1] < s->arg[0] ||
        s->arg[1] > GRAPH_LONGEST) {
        return false;
    }
    if (p->longest == 0) { /* opened: sizes are those of the file */
        p->longest = (size_t)s->arg[1];
        p->length = (size_t)s->arg[0];
        p->place_bytes = p->token_bytes;
    }
    const int32_t *table = (const int32_t *)(const void *)m->data;
    for (uint32_t i = 0; i < p->buffer_count; i++) {
        if (table[2 * i] < 0 || table[2 * i + 1] < 0 || (uint64_t)table[2 * i] + (uint64_t)table[2 * i + 1] * p->length != p->buffers[i].rows) {
            return false;
        }
    }
    return true;
}

const char *graph_check(Plan *p) {
    if (!length_fits(p)) {
        return "its sizes are not those of its length";
    }
    if (!signature_fits(p)) {
        return "its signature is not that of a graph for images";
    }
    for (uint32_t i = 0; i < p->buffer_count; i++) {
        if (!buffer_fits(p, &p->buffers[i])) {
            return "a buffer lies outside the arena, or is not what the signature says";
        }
        p->buffers[i].uses = 0;
    }
    for (uint32_t i = 0; i < p->output_count; i++) {
        p->outputs[i].written = WRITTEN_NONE;
    }
    int32_t segments = -1; /* all attentions that go by integers go by the same */
    for (uint32_t i = 0; i < p->step_count; i++) {
        const PlanStep *s = &p->steps[i];
        if (s->width == 0 || !step_fits(p, s)) {
            return "a step does not fit its buffers or weights";
        }
        if (s->kind == GRAPH_ATTENTION && s->arg[5] == OVER_SEGMENTS) {
            if (segments >= 0 && segments != s->in[3].buffer) {
                return "its attentions go by different integers";
            }
            segments = s->in[3].buffer;
        }
        count_uses(p, s);
        p->joined = p->joined || joins(s);
    }
    graph_chains(p);
    for (uint32_t i = 0; i < p->step_count; i++) {
        const size_t scratch = graph_scratch(&p->steps[i]);
        p->thread_bytes = scratch > p->thread_bytes ? scratch : p->thread_bytes;
    }
    for (uint32_t i = 0; i < p->output_count; i++) {
        if (p->outputs[i].written == WRITTEN_NONE) {
            return "an output is never written";
        }
    }
    return p->output_count > 0 ? NULL : "it has no output";
}
