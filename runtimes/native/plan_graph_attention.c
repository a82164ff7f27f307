/* Attention in 8 bits: keys and values of each head become weights of block products, once; queries and the weights that the softmax
 * gives are quantised per 32 numbers on the way. A block of queries has its scores for all keys in a thread's memory, never more. */
#include "plan_graph_internal.h"

#include <math.h>
#include <string.h>

/* A head's part of the packed buffer: what its scales were brought into float16 with, panels of keys, panels of values. */
typedef struct {
    PanelMatrix keys, values; /* [size] inputs for each key; [keys] inputs for each number of a value */
    size_t bytes;
} Packed;

#define HEAD_LINE 64 /* bytes before the panels: both factors */

static Packed packed_layout(size_t size, size_t keys) {
    Packed p = {.keys = {.format = WEIGHT_INT8, .depth = size, .width = keys, .block = BLOCK, .scale = 1.0f},
                .values = {.format = WEIGHT_INT8, .depth = keys, .width = size, .block = BLOCK, .scale = 1.0f}};
    p.keys.panel_bytes = panel_bytes_of(&p.keys, 8);
    p.values.panel_bytes = panel_bytes_of(&p.values, 8);
    p.bytes = HEAD_LINE + (keys + PANEL - 1) / PANEL * p.keys.panel_bytes + (size + PANEL - 1) / PANEL * p.values.panel_bytes;
    return p;
}

size_t graph_packed_floats(size_t heads, size_t size, size_t keys) { return heads * packed_layout(size, keys).bytes / sizeof(float); }

/* The layout with its memory, of one head of one image. */
static Packed packed_at(const GraphCall *call, PlanRef ref, size_t size, size_t keys, size_t image, size_t head) {
    Packed p = packed_layout(size, keys);
    uint8_t *at = (uint8_t *)graph_row(call, ref, image) + head * p.bytes;
    const float *factors = (const float *)(const void *)at;
    p.keys.scale = factors[0];
    p.values.scale = factors[1];
    p.keys.data = at + HEAD_LINE;
    p.values.data = p.keys.data + (keys + PANEL - 1) / PANEL * p.keys.panel_bytes;
    return p;
}

/* The power of two that brings scales of numbers up to `largest` into float16, as panels.py does; 1 for what is not a number. */
static float factor_of(float largest) {
    int exponent = 0;
    if (!(largest > 0.0f) || !(largest < INFINITY)) {
        return 1.0f;
    }
    frexpf(largest / 127.0f, &exponent);
    return ldexpf(1.0f, exponent - 8);
}

static float largest_of(const float *x, size_t stride, size_t rows, size_t size) {
    uint32_t most = 0; /* compared as integers, NaN is larger than any number */
    for (size_t row = 0; row < rows; row++) {
        const float *line = x + row * stride;
        for (size_t i = 0; i < size; i++) {
            uint32_t bits;
            memcpy(&bits, line + i, sizeof bits);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
        }
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    return largest;
}

/* Keys [keys][stride] → panels of 16 keys. */
static void pack_keys(const Kernels *kernels, const PanelMatrix *m, const float *keys, size_t stride) {
    int8_t codes[HEAD_SIZE_MOST];
    float scales[HEAD_SIZE_MOST / BLOCK];
    int32_t offsets[HEAD_SIZE_MOST / BLOCK];
    const size_t blocks = (m->depth + BLOCK - 1) / BLOCK, padded = (m->width + PANEL - 1) / PANEL * PANEL;
    const QuantRows row = {.codes = codes, .scales = scales, .offsets = offsets, .blocks = blocks};
    const float inverse = 1.0f / m->scale;
    uint16_t halves[HEAD_SIZE_MOST / BLOCK];
    for (size_t key = 0; key < padded; key++) {
        uint8_t *panel = (uint8_t *)(uintptr_t)m->data + key / PANEL * m->panel_bytes;
        if (key < m->width) {
            kernels->quantize(keys + key * stride, m->depth, &row, 0);
            kernels->scale(scales, inverse, blocks, scales);
            kernels->to_half(scales, blocks, halves);
        } else {
            memset(codes, 0, blocks * BLOCK);
            memset(halves, 0, sizeof halves);
        }
        for (size_t b = 0; b < blocks; b++) {
            ((uint16_t *)(uintptr_t)panel_scales(m, 8, panel, b))[key % PANEL] = halves[b];
            uint8_t *to = (uint8_t *)(uintptr_t)panel_codes(m, 8, panel, b) + key % PANEL * 4;
            for (size_t g = 0; g < BLOCK / 4; g++) {
                uint32_t four;
                memcpy(&four, codes + b * BLOCK + g * 4, sizeof four);
                four ^= 0x80808080u; /* codes + 128 */
                memcpy(to + g * 64, &four, sizeof four);
            }
        }
    }
}

/* Sixteen numbers of up to 32 values, `rows` and `size` of which are there, → one block of a panel. */
static void pack_value_block(const Kernels *kernels, const PanelMatrix *m, const uint8_t *panel, size_t b, const float *values, size_t stride, size_t rows, size_t size) {
    float lines[BLOCK][PANEL] = {{0}}, scales[PANEL], inverse[PANEL];
    uint32_t most[PANEL] = {0};
    for (size_t r = 0; r < rows; r++) {
        if (size == PANEL) {
            memcpy(lines[r], values + r * stride, PANEL * sizeof(float)); /* a constant: no call */
        } else {
            memcpy(lines[r], values + r * stride, size * sizeof(float));
        }
        for (size_t i = 0; i < PANEL; i++) {
            uint32_t bits;
            memcpy(&bits, &lines[r][i], sizeof bits);
            bits &= 0x7fffffffu;
            most[i] = bits > most[i] ? bits : most[i];
        }
    }
    for (size_t i = 0; i < PANEL; i++) {
        float largest;
        memcpy(&largest, &most[i], sizeof largest);
        const bool tiny = largest < 1e-30f;
        inverse[i] = tiny ? 0.0f : 127.0f / largest;
        scales[i] = tiny ? 0.0f : largest / 127.0f / m->scale;
    }
    kernels->to_half(scales, PANEL, (uint16_t *)(uintptr_t)panel_scales(m, 8, panel, b));
    uint8_t *to = (uint8_t *)(uintptr_t)panel_codes(m, 8, panel, b);
    for (size_t g = 0; g < BLOCK / 4; g++) {
        uint32_t fours[PANEL];
        for (size_t i = 0; i < PANEL; i++) {
            fours[i] = 0;
        }
        for (size_t j = 0; j < 4; j++) {
            for (size_t i = 0; i < PANEL; i++) {
                /* 1.5 · 2²³ brings a number's nearest integer into the low bits; NaN gives any code, its scale is NaN. */
                const float shifted = lines[g * 4 + j][i] * inverse[i] + 12582912.0f;
                uint32_t bits;
                memcpy(&bits, &shifted, sizeof bits);
                fours[i] |= ((bits + 128u) & 0xffu) << (8 * j);
            }
        }
        memcpy(to + g * 64, fours, sizeof fours);
    }
}

static void pack_values(const Kernels *kernels, const PanelMatrix *m, const float *values, size_t stride) {
    const size_t blocks = (m->depth + BLOCK - 1) / BLOCK;
    for (size_t column = 0; column < m->width; column += PANEL) {
        const uint8_t *panel = m->data + column / PANEL * m->panel_bytes;
        const size_t size = m->width - column < PANEL ? m->width - column : PANEL;
        for (size_t b = 0; b < blocks; b++) {
            const size_t rows = m->depth - b * BLOCK < BLOCK ? m->depth - b * BLOCK : BLOCK;
            pack_value_block(kernels, m, panel, b, values + b * BLOCK * stride + column, stride, rows, size);
        }
    }
}

void graph_pack(const GraphCall *call, const PlanStep *step, size_t item) {
    const size_t heads = (size_t)step->arg[0], size = (size_t)step->arg[1], image = item / heads, head = item % heads;
    const size_t rows = call->plan->buffers[step->in[0].buffer].rows;
    const size_t key_stride = call->plan->buffers[step->in[0].buffer].width, value_stride = call->plan->buffers[step->in[1].buffer].width;
    const float *keys = graph_row(call, step->in[0], image * rows) + head * size, *values = graph_row(call, step->in[1], image * rows) + head * size;
    float *factors = graph_row(call, step->out[0], image) + head * packed_layout(size, rows).bytes / sizeof(float);
    factors[0] = factor_of(largest_of(keys, key_stride, rows, size));
    factors[1] = factor_of(largest_of(values, value_stride, rows, size));
    const Packed p = packed_at(call, step->out[0], size, rows, image, head);
    pack_keys(call->plan->kernels, &p.keys, keys, key_stride);
    pack_values(call->plan->kernels, &p.values, values, value_stride);
}

/* A thread's memory for an item. */
typedef struct {
    float *line, *scores, *sums; /* a query; [queries][lanes]; [queries][size, to whole panels] */
    QuantRows queries, weights;
    size_t lanes, width, bytes;
} Memory;

static uint8_t *part(uint8_t *base, size_t *at, size_t bytes) {
    uint8_t *here = base != NULL ? base + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static QuantRows rows_part(uint8_t *base, size_t *at, size_t blocks) {
    QuantRows rows = {.blocks = blocks};
    rows.codes = (int8_t *)part(base, at, GRAPH_BYTE_QUERIES * blocks * BLOCK);
    rows.scales = (float *)(void *)part(base, at, GRAPH_BYTE_QUERIES * blocks * sizeof(float));
    rows.offsets = (int32_t *)(void *)part(base, at, GRAPH_BYTE_QUERIES * blocks * sizeof(int32_t));
    return rows;
}

static Memory memory_at(uint8_t *base, size_t size, size_t keys) {
    Memory m = {.lanes = (keys + BLOCK - 1) / BLOCK * BLOCK, .width = (size + PANEL - 1) / PANEL * PANEL};
    m.line = (float *)(void *)part(base, &m.bytes, size * sizeof(float));
    m.scores = (float *)(void *)part(base, &m.bytes, GRAPH_BYTE_QUERIES * m.lanes * sizeof(float));
    m.sums = (float *)(void *)part(base, &m.bytes, GRAPH_BYTE_QUERIES * m.width * sizeof(float));
    m.queries = rows_part(base, &m.bytes, (size + BLOCK - 1) / BLOCK);
    m.weights = rows_part(base, &m.bytes, m.lanes / BLOCK);
    return m;
}

size_t graph_byte_attention_scratch(size_t size, size_t keys) { return memory_at(NULL, size, keys).bytes; }

#define AHEAD 6 /* rows */

/* A head's numbers of a row some rows on: rows lie too far apart for the hardware to see them coming. */
static void fetch(const float *x, size_t size, bool write) {
    for (size_t i = 0; i < size; i += 16) {
        if (write) {
            __builtin_prefetch(x + i, 1);
        } else {
            __builtin_prefetch(x + i, 0);
        }
    }
}

void graph_byte_attention(const GraphCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Kernels *kernels = call->plan->kernels;
    const size_t heads = (size_t)step->arg[0], size = (size_t)step->arg[1], keys = (size_t)step->arg[2];
    const size_t rows = call->plan->buffers[step->out[0].buffer].rows, blocks = (rows + GRAPH_BYTE_QUERIES - 1) / GRAPH_BYTE_QUERIES;
    const size_t image = item / blocks / heads, head = item / blocks % heads, first = item % blocks * GRAPH_BYTE_QUERIES;
    const size_t some = rows - first < GRAPH_BYTE_QUERIES ? rows - first : GRAPH_BYTE_QUERIES;
    const Packed p = packed_at(call, step->in[1], size, keys, image, head);
    const Memory m = memory_at(scratch, size, keys);
    float sums[GRAPH_BYTE_QUERIES];
    for (size_t i = 0; i < some; i++) {
        const float *query = graph_row(call, step->in[0], image * rows + first + i) + head * size;
        fetch(query + AHEAD * call->plan->buffers[step->in[0].buffer].width, size, false);
        kernels->scale(query, step->real[0], size, m.line);
        kernels->quantize(m.line, size, &m.queries, i);
    }
    for (size_t key = 0; key < keys; key += PANEL) {
        kernels->int8(&p.keys, p.keys.data + key / PANEL * p.keys.panel_bytes, &m.queries, 0, some, m.scores + key, m.lanes);
    }
    for (size_t i = 0; i < some; i++) {
        float *line = m.scores + i * m.lanes;
        const float most = kernels->maximum(line, keys);
        if (kernels->soften != NULL) {
            sums[i] = kernels->soften(line, keys, most, &m.weights, i);
        } else {
            sums[i] = kernels->exponentials(line, keys, most);
            kernels->quantize(line, keys, &m.weights, i);
        }
    }
    for (size_t column = 0; column < size; column += PANEL) {
        kernels->int8(&p.values, p.values.data + column / PANEL * p.values.panel_bytes, &m.weights, 0, some, m.sums + column, m.width);
    }
    for (size_t i = 0; i < some; i++) {
        float *out = graph_row(call, step->out[0], image * rows + first + i) + head * size;
        fetch(out + AHEAD * call->plan->buffers[step->out[0].buffer].width, size, true);
        kernels->scale(m.sums + i * m.width, 1.0f / sums[i], size, out);
    }
}
