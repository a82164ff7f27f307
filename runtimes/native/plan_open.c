/* Reading a plan's file: nothing in it is believed before it is checked. */
#include "plan_graph.h"
#include "plan_rows.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC "VLMEPLAN"
#define PAGE 4096
#define MOST 1000000 /* values, buffers, weights, steps; and rows of text */

typedef struct {
    const uint8_t *at, *end;
    const char *wrong; /* the first thing that is */
} Reader;

static void read_bytes(Reader *r, void *out, size_t count) {
    if ((size_t)(r->end - r->at) < count) {
        r->wrong = r->wrong != NULL ? r->wrong : "it ends too early";
        memset(out, 0, count);
        return;
    }
    memcpy(out, r->at, count);
    r->at += count;
}

static uint32_t read_u32(Reader *r) {
    uint32_t value;
    read_bytes(r, &value, sizeof value);
    return value;
}

static uint64_t read_u64(Reader *r) {
    uint64_t value;
    read_bytes(r, &value, sizeof value);
    return value;
}

static float read_float(Reader *r) {
    float value;
    read_bytes(r, &value, sizeof value);
    return value;
}

static char *read_text(Reader *r) {
    const uint32_t size = read_u32(r);
    if (r->wrong != NULL || size > MOST || (size_t)(r->end - r->at) < size) {
        r->wrong = r->wrong != NULL ? r->wrong : "a name is too long";
        return NULL;
    }
    char *text = malloc((size_t)size + 1);
    if (text == NULL) {
        r->wrong = "out of memory";
        return NULL;
    }
    read_bytes(r, text, size);
    text[size] = '\0';
    return text;
}

/* A count, and zeroed memory for so many. */
static void *read_count(Reader *r, uint32_t *count, size_t size) {
    *count = read_u32(r);
    if (r->wrong != NULL || *count > MOST) {
        r->wrong = r->wrong != NULL ? r->wrong : "a count is too large";
        *count = 0;
        return NULL;
    }
    void *memory = calloc((size_t)*count + 1, size);
    if (memory == NULL) {
        r->wrong = "out of memory";
        *count = 0;
    }
    return memory;
}

static PlanValue *read_values(Reader *r, uint32_t *count) {
    PlanValue *values = read_count(r, count, sizeof *values);
    for (uint32_t i = 0; i < *count && r->wrong == NULL; i++) {
        values[i].name = read_text(r);
        values[i].type = read_u32(r);
        values[i].rank = read_u32(r);
        if (values[i].rank > PLAN_MAX_RANK) {
            r->wrong = "a value has too many dimensions";
            values[i].rank = 0;
        }
        for (uint32_t d = 0; d < values[i].rank; d++) {
            values[i].shape[d] = (int64_t)read_u64(r);
            values[i].symbols[d] = read_text(r);
        }
    }
    return values;
}

static void read_weights(Reader *r, Plan *p, size_t data) {
    p->weights = read_count(r, &p->weight_count, sizeof *p->weights);
    for (uint32_t i = 0; i < p->weight_count && r->wrong == NULL; i++) {
        PlanWeight *w = &p->weights[i];
        PanelMatrix *m = &w->matrix;
        const uint32_t format = read_u32(r);
        m->format = (WeightFormat)(format <= WEIGHT_BYTE_ROWS ? format : 0);
        m->depth = read_u32(r);
        m->width = read_u32(r);
        m->block = read_u32(r);
        m->scale = read_float(r);
        const uint64_t offset = read_u64(r);
        w->bytes = read_u64(r);
        m->panel_bytes = (size_t)read_u64(r);
        if (r->wrong != NULL || format > WEIGHT_BYTE_ROWS) {
            r->wrong = r->wrong != NULL ? r->wrong : "a weight has an unknown format";
            return;
        }
        const size_t panels = (m->width + PANEL - 1) / PANEL;
        size_t needed = m->depth * m->width * 4;
        bool fits = m->depth > 0 && m->width > 0 && m->depth <= (1u << 24) && m->width <= (1u << 24);
        if ((int)m->format < WEIGHT_FORMATS) {
            const bool quantised = m->format == WEIGHT_INT4 || m->format == WEIGHT_INT8;
            fits = fits && (quantised ? m->block == 32 || m->block == 64 || m->block == 128 : m->block == 0);
            const size_t floats = m->depth * PANEL * (m->format == WEIGHT_FLOAT16 ? 2 : 4);
            const size_t expected = !fits ? 0 : quantised ? panel_bytes_of(m, m->format == WEIGHT_INT4 ? 4 : 8) : (floats + 63) / 64 * 64;
            fits = fits && m->panel_bytes == expected;
            needed = m->panel_bytes * panels;
        } else if (format == WEIGHT_BYTES) {
            fits = fits && m->depth <= (1u << 16);
            needed = fits ? graph_byte_matrix_bytes(m) : 0;
        } else if (format == WEIGHT_HALF_ROWS || format == WEIGHT_BYTE_ROWS) {
            needed = m->depth * rows_stride(m);
        }
        if (!fits || w->bytes != needed || offset % 64 != 0 || offset > p->file_bytes - data || needed > p->file_bytes - data - offset) {
            r->wrong = "a weight is not where or what it should be";
            return;
        }
        m->data = (const uint8_t *)p->file + data + offset;
    }
}

static void read_steps(Reader *r, Plan *p) {
    p->steps = read_count(r, &p->step_count, sizeof *p->steps);
    for (uint32_t i = 0; i < p->step_count && r->wrong == NULL; i++) {
        PlanStep *s = &p->steps[i];
        s->kind = read_u32(r);
        s->last = read_u32(r);
        s->width = read_u32(r);
        read_bytes(r, s->in, sizeof s->in);
        read_bytes(r, s->out, sizeof s->out);
        read_bytes(r, s->weight, sizeof s->weight);
        read_bytes(r, s->arg, sizeof s->arg);
        read_bytes(r, s->real, sizeof s->real);
    }
}

static int fail(char message[PLAN_MESSAGE_SIZE], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, PLAN_MESSAGE_SIZE, format, arguments);
    va_end(arguments);
    return -1;
}

/* What stands before everything else; `meta`: the bytes of the description that follows. */
static int read_head(Reader *r, const char *path, uint32_t *meta, char message[PLAN_MESSAGE_SIZE]) {
    char magic[8];
    read_bytes(r, magic, sizeof magic);
    const uint32_t version = read_u32(r);
    *meta = read_u32(r);
    if (r->wrong != NULL || memcmp(magic, MAGIC, sizeof magic) != 0) {
        return fail(message, "%s is not a plan", path);
    }
    if (version != PLAN_VERSION) {
        return fail(message, "the plan %s has version %u of its format, this runtime runs version %d: %s", path, version, PLAN_VERSION,
                    version < PLAN_VERSION ? "run `vlm-edge build` again" : "update vlm-edge, or run `vlm-edge build` again with this one");
    }
    return 0;
}

int plan_known(const char *path, char message[PLAN_MESSAGE_SIZE]) {
    size_t bytes = 0;
    int descriptor = -1;
    void *file = mapped_open(path, &bytes, &descriptor);
    if (file == NULL) {
        return fail(message, "the plan %s cannot be opened", path);
    }
    Reader r = {.at = file, .end = (const uint8_t *)file + bytes};
    uint32_t meta;
    const int failed = read_head(&r, path, &meta, message);
    mapped_close(file, bytes);
    descriptor_close(descriptor);
    return failed;
}

static int read_file(Plan *p, const char *path, char message[PLAN_MESSAGE_SIZE]) {
    p->file = mapped_open(path, &p->file_bytes, &p->descriptor);
    if (p->file == NULL) {
        return fail(message, "the plan %s cannot be opened", path);
    }
    Reader r = {.at = p->file, .end = (const uint8_t *)p->file + p->file_bytes};
    uint32_t meta;
    if (read_head(&r, path, &meta, message) != 0) {
        return -1;
    }
    const size_t data = ((size_t)(r.at - (const uint8_t *)p->file) + meta + PAGE - 1) / PAGE * PAGE;
    if (data > p->file_bytes) {
        return fail(message, "the plan %s is damaged: it ends too early", path);
    }
    r.end = r.at + meta;
    const uint32_t kind = read_u32(&r);
    p->graph = kind == 1;
    p->rows = kind == 2;
    p->inputs = read_values(&r, &p->input_count);
    p->outputs = read_values(&r, &p->output_count);
    p->hidden = read_u32(&r);
    p->vocab = read_u32(&r);
    p->position_axes = read_u32(&r);
    p->block_input = (int32_t)read_u32(&r);
    p->token_bytes = read_u64(&r);
    p->buffers = read_count(&r, &p->buffer_count, sizeof *p->buffers);
    for (uint32_t i = 0; i < p->buffer_count; i++) {
        p->buffers[i].kind = read_u32(&r);
        p->buffers[i].width = read_u32(&r);
        p->buffers[i].rows = read_u32(&r);
        p->buffers[i].offset = p->buffers[i].place = read_u64(&r);
    }
    read_weights(&r, p, data);
    read_steps(&r, p);
    if (r.wrong == NULL && (kind > 2 || p->position_axes > 8 || p->token_bytes > (1u << 28) || p->block_input < -1)) {
        r.wrong = "its sizes make no sense";
    }
    const char *wrong = r.wrong != NULL ? r.wrong : p->rows ? rows_check(p) : p->graph ? graph_check(p) : plan_check(p);
    if (!p->rows) { /* all of its weights are read for every token or image; of a table, the rows of the tokens that come */
        descriptor_close(p->descriptor);
        p->descriptor = -1;
        mapped_want(p->file, p->file_bytes);
    }
    return wrong != NULL ? fail(message, "the plan %s is damaged: %s", path, wrong) : 0;
}

Plan *plan_open(const char *path, size_t threads, bool spin, const char *kernels, char message[PLAN_MESSAGE_SIZE]) {
    Plan *p = calloc(1, sizeof *p);
    if (p == NULL) {
        fail(message, "out of memory");
        return NULL;
    }
    p->descriptor = -1;
    p->kernels = kernels != NULL ? kernels_named(kernels) : kernels_best();
    if (p->kernels == NULL) {
        fail(message, "this CPU has no kernels '%s'", kernels);
        plan_close(p);
        return NULL;
    }
    if (read_file(p, path, message) != 0) {
        plan_close(p);
        return NULL;
    }
    p->pool = pool_new(p->rows ? 1 : threads, spin);
    if (p->pool == NULL) {
        fail(message, "%zu threads cannot be started", threads);
        plan_close(p);
        return NULL;
    }
    return p;
}

static void free_values(PlanValue *values, uint32_t count) {
    for (uint32_t i = 0; values != NULL && i < count; i++) {
        free(values[i].name);
        for (uint32_t d = 0; d < PLAN_MAX_RANK; d++) {
            free(values[i].symbols[d]);
        }
    }
    free(values);
}

void plan_close(Plan *p) {
    if (p == NULL) {
        return;
    }
    pool_free(p->pool);
    mapped_close(p->file, p->file_bytes);
    descriptor_close(p->descriptor);
    free_values(p->inputs, p->input_count);
    free_values(p->outputs, p->output_count);
    free(p->buffers);
    free(p->weights);
    free(p->steps);
    plan_freed(p->arena);
    plan_freed(p->scratch);
    plan_freed(p->parts);
    free(p->seconds);
    free(p);
}
