/* Products of packed weights, quantised and floating, against float64, and the quantisation of their activations. */
#include "checking.h"

#include <time.h>

/* A random packed matrix and the float64 weights [depth][width] that it stands for. */
typedef struct {
    PanelMatrix matrix;
    double *weights;
    uint8_t *data;
} Sample;

static Sample sample_matrix(WeightFormat format, size_t depth, size_t width, size_t block) {
    const size_t panels = (width + PANEL - 1) / PANEL, blocks = (depth + BLOCK - 1) / BLOCK;
    Sample s = {.matrix = {.format = format, .depth = depth, .width = width, .block = block, .scale = 0.25f}};
    /* The documented layout, written down once more: lines of two blocks' scales, each before the codes of those blocks. */
    const size_t bits = format == WEIGHT_INT4 ? 4 : 8, pair = block / 16, pairs = block > 0 ? (blocks + pair - 1) / pair : 0;
    const size_t bytes[] = {pairs * 64 + blocks * 256, pairs * 64 + blocks * 512, depth * PANEL * 2, depth * PANEL * 4};
    s.matrix.panel_bytes = (bytes[format] + 63) / 64 * 64;
    s.data = memory(s.matrix.panel_bytes * panels, 0);
    s.weights = calloc(depth * width + 1, sizeof *s.weights);
    s.matrix.data = s.data;
    for (size_t p = 0; p < panels; p++) {
        uint8_t *panel = s.data + p * s.matrix.panel_bytes;
        for (size_t i = 0; i < pairs; i++) {
            uint16_t *line = (uint16_t *)(void *)(panel + i * (64 + pair * bits * 64));
            for (size_t k = 0; k < 2 * PANEL; k++) {
                line[k] = float_to_half((float)uniform() * (below(16) == 0 ? 1e-6f : 1.0f)); /* some denormal */
            }
        }
        for (size_t k = 0; k < (block > 0 ? blocks * BLOCK : depth); k++) {
            for (size_t o = 0; o < PANEL; o++) {
                const bool inside = k < depth && p * PANEL + o < width;
                const size_t b = k / BLOCK, place = block > 0 ? (b / pair + 1) * 64 + b * bits * 64 : 0;
                const uint16_t *line = (uint16_t *)(void *)(panel + (block > 0 ? b / pair * (64 + pair * bits * 64) : 0));
                const uint16_t *stored = line + (block > 0 ? k / block % 2 * PANEL : 0);
                double value;
                if (format == WEIGHT_INT4) {
                    uint8_t *byte = panel + place + k % 16 / 4 * 64 + o * 4 + k % 4;
                    const int code = inside ? (int)below(16) : 8;
                    *byte |= (uint8_t)(k % BLOCK < 16 ? code : code << 4);
                    value = (code - 8) * (double)half_to_float(stored[o]) * s.matrix.scale;
                } else if (format == WEIGHT_INT8) {
                    const int code = inside ? (int)below(256) : 128;
                    panel[place + k % BLOCK / 4 * 64 + o * 4 + k % 4] = (uint8_t)code;
                    value = (code - 128) * (double)half_to_float(stored[o]) * s.matrix.scale;
                } else if (format == WEIGHT_FLOAT16) {
                    ((uint16_t *)(void *)panel)[k * PANEL + o] = float_to_half(inside ? (float)uniform() : 0.0f);
                    value = half_to_float(((uint16_t *)(void *)panel)[k * PANEL + o]);
                } else {
                    ((float *)(void *)panel)[k * PANEL + o] = inside ? (float)uniform() : 0.0f;
                    value = ((float *)(void *)panel)[k * PANEL + o];
                }
                if (inside) {
                    s.weights[k * width + p * PANEL + o] = value;
                }
            }
        }
    }
    return s;
}

static void sample_free(Sample *s) {
    release(s->data, 0);
    free(s->weights);
}

static QuantRows quant_rows(size_t rows, size_t depth) {
    const size_t blocks = (depth + BLOCK - 1) / BLOCK;
    return (QuantRows){.codes = memory(rows * blocks * BLOCK, 0),
                       .scales = memory(rows * blocks * sizeof(float), 4),
                       .offsets = memory(rows * blocks * sizeof(int32_t), 4),
                       .blocks = blocks};
}

static void quant_free(QuantRows *q) {
    release(q->codes, 0);
    release(q->scales, 4);
    release(q->offsets, 4);
}

void test_quantize(const Kernels *k) {
    const float sizes[] = {1.0f, 1e-41f, 1e-30f, 1e30f, 3e38f, 0.0f};
    for (size_t round = 0; round < 200; round++) {
        const size_t n = below(round % 8 == 0 ? 1500 : 100), off = below(4);
        const float size = sizes[round % 6];
        float *x = floats(n, size, off);
        QuantRows q = quant_rows(2, n);
        k->quantize(x, n, &q, 1);
        for (size_t b = 0; b < q.blocks; b++) {
            double most = 0;
            int sum = 0;
            for (size_t i = b * BLOCK; i < n && i < (b + 1) * BLOCK; i++) {
                most = fmax(most, fabs((double)x[i]));
            }
            const double scale = q.scales[q.blocks + b];
            check("quantize: scale", scale, most < 1e-35 ? 0.0 : most / 127, most * 1e-6 / 127);
            for (size_t i = 0; i < BLOCK; i++) {
                const int code = q.codes[(q.blocks + b) * BLOCK + i];
                sum += code;
                if (b * BLOCK + i >= n) {
                    check("quantize: beyond the row", code, 0, 0);
                } else if (scale > 0) {
                    check("quantize: value", code, x[b * BLOCK + i] / scale, 0.501);
                }
            }
            check("quantize: offset", q.offsets[q.blocks + b], -8.0 * sum, 0);
        }
        release(x, off * sizeof *x);
        quant_free(&q);
    }
    float x[40] = {1.0f};
    QuantRows q = quant_rows(1, 40);
    x[33] = NAN;
    k->quantize(x, 40, &q, 0);
    check("quantize: NaN", q.scales[1], NAN, 0);
    check("quantize: beside NaN", q.scales[0], 1.0 / 127, 1e-8);
    x[33] = INFINITY;
    k->quantize(x, 40, &q, 0);
    check("quantize: infinity", q.scales[1], INFINITY, 0);
    quant_free(&q);
}

void test_integer_products(const Kernels *k) {
    const size_t depths[] = {32, 576, 1, 33, 95, 128, 1000}, blocks[] = {32, 64, 128};
    for (size_t round = 0; round < 84; round++) {
        const WeightFormat format = round % 2 == 0 ? WEIGHT_INT4 : WEIGHT_INT8;
        const bool far = round == 5 || round == 50; /* rows whose codes are a multiple of 4 KB apart are taken fewer at a time */
        const size_t depth = far ? 4096 : depths[round % 7], width = 1 + below(40), rows = far ? 17 : below(30), first = below(3), stride = PANEL + below(3);
        Sample s = sample_matrix(format, depth, width, blocks[below(3)]);
        QuantRows q = quant_rows(first + rows, depth);
        float *x = floats((first + rows) * depth, (float[]){1e20f, 1.0f, 1e-30f, 1e-41f, 3e33f}[round % 5], 1);
        float *out = memory((rows * stride + PANEL) * sizeof *out, 4), alone[PANEL];
        for (size_t row = 0; row < first + rows; row++) {
            k->quantize(x + row * depth, depth, &q, row);
        }
        if (rows > 1) { /* the largest sums there are */
            memset(q.codes + first * q.blocks * BLOCK, 127, q.blocks * BLOCK);
            memset(q.codes + (first + 1) * q.blocks * BLOCK, -127, q.blocks * BLOCK);
            for (size_t b = 0; b < q.blocks; b++) {
                q.offsets[first * q.blocks + b] = -8 * 127 * BLOCK;
                q.offsets[(first + 1) * q.blocks + b] = 8 * 127 * BLOCK;
            }
        }
        for (size_t p = 0; p * PANEL < width; p++) {
            (format == WEIGHT_INT4 ? k->int4 : k->int8)(&s.matrix, s.data + p * s.matrix.panel_bytes, &q, first, rows, out, stride);
            for (size_t row = 0; row < rows; row++) {
                for (size_t o = 0; o < PANEL; o++) {
                    double want = 0, size = 0;
                    for (size_t i = 0; i < depth && p * PANEL + o < width; i++) {
                        const size_t at = (first + row) * q.blocks + i / BLOCK;
                        const double term = s.weights[i * width + p * PANEL + o] * q.codes[at * BLOCK + i % BLOCK] * (double)q.scales[at];
                        want += term;
                        size += fabs(term);
                    }
                    check(format == WEIGHT_INT4 ? "int4" : "int8", out[row * stride + o], want, 1e-6 * size + 1e-39 * (double)q.blocks); /* a factor may be denormal */
                }
                /* A row comes out the same to the bit by itself: drafts count on it. */
                (format == WEIGHT_INT4 ? k->int4 : k->int8)(&s.matrix, s.data + p * s.matrix.panel_bytes, &q, first + row, 1, alone, PANEL);
                check("a row alone", memcmp(alone, out + row * stride, sizeof alone), 0, 0);
            }
        }
        release(x, sizeof *x);
        release(out, 4);
        quant_free(&q);
        sample_free(&s);
    }
}

void test_float_products(const Kernels *k) {
    for (size_t round = 0; round < 80; round++) {
        const bool half = round % 2 == 0, add = round % 3 == 0;
        const size_t depth = below(150), rows = below(30), stride = PANEL + below(20), x_stride = depth + below(3);
        Sample s = sample_matrix(half ? WEIGHT_FLOAT16 : WEIGHT_FLOAT32, depth, PANEL, 0);
        float *x = floats(rows * x_stride, (float[]){1e-42f, 1.0f, 1e30f, 1e-20f}[round / 2 % 4], 1), *out = floats(rows * stride + PANEL, 1.0f, 1);
        float *before = malloc((rows * stride + PANEL) * sizeof *out);
        memcpy(before, out, (rows * stride + PANEL) * sizeof *out);
        if (half) {
            k->float16((const uint16_t *)(void *)s.data, PANEL, depth, x, x_stride, rows, out, stride, add);
        } else {
            k->float32((const float *)(void *)s.data, PANEL, depth, x, x_stride, rows, out, stride, add);
        }
        for (size_t row = 0; row < rows; row++) {
            for (size_t o = 0; o < stride; o++) {
                double want = o >= PANEL || add ? before[row * stride + o] : 0, size = fabs(want);
                for (size_t i = 0; i < depth && o < PANEL; i++) {
                    want += s.weights[i * PANEL + o] * x[row * x_stride + i];
                    size += fabs(s.weights[i * PANEL + o] * x[row * x_stride + i]);
                }
                check(half ? "float16" : "float32", out[row * stride + o], want, 1e-5 * size + 1e-45 * (double)depth);
            }
        }
        free(before);
        release(x, sizeof *x);
        release(out, sizeof *out);
        sample_free(&s);
    }
}
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void time_products(const Kernels *k) {
    const size_t depth = 1536, width = 16384;
    for (WeightFormat format = WEIGHT_INT4; format <= WEIGHT_INT8; format++) {
        Sample s = sample_matrix(format, depth, width, 32);
        const size_t counts[] = {1, 4, 96};
        for (size_t c = 0; c < 3; c++) {
            const size_t rows = counts[c], panels = rows == 1 ? width / PANEL : 64;
            QuantRows q = quant_rows(rows, depth);
            float *x = floats(rows * depth, 1.0f, 0), *out = memory(rows * PANEL * sizeof *out, 0);
            for (size_t row = 0; row < rows; row++) {
                k->quantize(x + row * depth, depth, &q, row);
            }
            double best = 1e9;
            for (size_t round = 0; round < 7; round++) {
                const double begin = now();
                for (size_t p = 0; p < panels; p++) {
                    (format == WEIGHT_INT4 ? k->int4 : k->int8)(&s.matrix, s.data + p * s.matrix.panel_bytes, &q, 0, rows, out, PANEL);
                }
                const double seconds = now() - begin;
                best = seconds < best ? seconds : best;
            }
            printf("%s int%d, %zu rows: %.1f GB/s of weights, %.0f GOP/s\n", k->name, format == WEIGHT_INT4 ? 4 : 8, rows,
                   (double)(panels * s.matrix.panel_bytes) / best * 1e-9, 2.0 * (double)(rows * depth * panels * PANEL) / best * 1e-9);
            release(x, 0);
            release(out, 0);
            quant_free(&q);
        }
        sample_free(&s);
    }
}
