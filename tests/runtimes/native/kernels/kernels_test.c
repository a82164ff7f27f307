/* Every kernel of one instruction set against float64, on random shapes: odd tails, unaligned rows, nothing at all, denormals, large values.
 *
 *   kernels_test NAME     0: all agree; 1: a difference, printed; 2: this CPU has no such kernels
 *   kernels_test --time NAME   weight bytes a second and operations a second of the matrix products, for a look
 * A program of its own, so that it runs under qemu-user and the sanitizers without Python. */
#include "checking.h"

#include <float.h>
#include <time.h>

uint64_t state = 0x9e3779b97f4a7c15u;
int failures;

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
                line[k] = float_to_half((float)uniform());
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

static void test_quantize(const Kernels *k) {
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

static void test_integer_products(const Kernels *k) {
    const size_t depths[] = {32, 576, 1, 33, 95, 128, 1000}, blocks[] = {32, 64, 128};
    for (size_t round = 0; round < 84; round++) {
        const WeightFormat format = round % 2 == 0 ? WEIGHT_INT4 : WEIGHT_INT8;
        const size_t depth = depths[round % 7], width = 1 + below(40), rows = below(30), first = below(3), stride = PANEL + below(3);
        Sample s = sample_matrix(format, depth, width, blocks[below(3)]);
        QuantRows q = quant_rows(first + rows, depth);
        float *x = floats((first + rows) * depth, round % 5 == 0 ? 1e20f : 1.0f, 1), *out = memory((rows * stride + PANEL) * sizeof *out, 4);
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
                    check(format == WEIGHT_INT4 ? "int4" : "int8", out[row * stride + o], want, 1e-6 * size + 1e-30);
                }
            }
        }
        release(x, sizeof *x);
        release(out, 4);
        quant_free(&q);
        sample_free(&s);
    }
}

static void test_float_products(const Kernels *k) {
    for (size_t round = 0; round < 80; round++) {
        const bool half = round % 2 == 0, add = round % 3 == 0;
        const size_t depth = below(150), rows = below(30), stride = PANEL + below(20), x_stride = depth + below(3);
        Sample s = sample_matrix(half ? WEIGHT_FLOAT16 : WEIGHT_FLOAT32, depth, PANEL, 0);
        float *x = floats(rows * x_stride, round % 7 == 0 ? 1e-42f : 1.0f, 1), *out = floats(rows * stride + PANEL, 1.0f, 1);
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

static double unary(Unary kind, double x) {
    switch (kind) {
    case UNARY_SILU:
        return x / (1 + exp(-x));
    case UNARY_GELU:
        return 0.5 * x * (1 + erf(x / sqrt(2)));
    case UNARY_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x)));
    case UNARY_QUICK_GELU:
        return x / (1 + exp(-1.702 * x));
    case UNARY_RELU:
        return x < 0 ? 0 : x;
    case UNARY_TANH:
        return tanh(x);
    case UNARY_SIGMOID:
        return 1 / (1 + exp(-x));
    default:
        return x;
    }
}

static void test_elementwise(const Kernels *k) {
    for (size_t round = 0; round < 200; round++) {
        const size_t n = below(70), off = below(8);
        const float size = (float[]){1.0f, 8.0f, 90.0f, 1e-40f, 1e4f}[round % 5];
        float *x = floats(n, size, off), *y = floats(n, 2.0f, 1), *out = memory(n * sizeof *out, 4);
        k->add(x, y, n, out);
        for (size_t i = 0; i < n; i++) {
            check("add", out[i], (double)(x[i] + y[i]), 0);
        }
        k->multiply(x, y, n, out);
        for (size_t i = 0; i < n; i++) {
            check("multiply", out[i], (double)(x[i] * y[i]), 0);
        }
        k->scale(x, 0.3f, n, out);
        for (size_t i = 0; i < n; i++) {
            check("scale", out[i], (double)(x[i] * 0.3f), 0);
        }
        for (Unary kind = 0; kind < UNARY_KINDS; kind++) {
            k->unary(kind, x, n, out);
            for (size_t i = 0; i < n; i++) {
                check((const char *[]){"identity", "silu", "gelu", "gelu tanh", "quick gelu", "relu", "tanh", "sigmoid"}[kind], out[i], unary(kind, x[i]),
                      4e-7 * fmax(1, fabs((double)x[i])));
            }
            k->gated(kind, x, y, n, out);
            for (size_t i = 0; i < n; i++) {
                check("gated", out[i], unary(kind, x[i]) * y[i], 1e-6 * fmax(1, fabs((double)x[i])));
            }
        }
        release(x, off * sizeof *x);
        release(y, sizeof *y);
        release(out, 4);
    }
}

static void test_norms(const Kernels *k) {
    for (size_t round = 0; round < 100; round++) {
        const size_t n = 1 + below(300), off = below(8);
        const float size = (float[]){1.0f, 100.0f, 1e-30f, 1e15f}[round % 4], epsilon = 1e-5f;
        float *x = floats(n, size, off), *w = floats(n, 2.0f, 1), *b = floats(n, 1.0f, 1), *out = memory(n * sizeof *out, 4);
        double mean = 0, square = 0, variance = 0;
        for (size_t i = 0; i < n; i++) {
            mean += x[i] / (double)n;
            square += (double)x[i] * x[i] / (double)n;
        }
        for (size_t i = 0; i < n; i++) {
            variance += (x[i] - mean) * (x[i] - mean) / (double)n;
        }
        k->rms_norm(x, w, epsilon, n, out);
        for (size_t i = 0; i < n; i++) {
            check("rms_norm", out[i], x[i] / sqrt(square + epsilon) * w[i], 2e-5);
        }
        k->layer_norm(x, w, round % 2 ? b : NULL, epsilon, n, out);
        for (size_t i = 0; i < n; i++) {
            check("layer_norm", out[i], (x[i] - mean) / sqrt(variance + epsilon) * w[i] + (round % 2 ? b[i] : 0.0f), 5e-5);
        }
        k->rms_norm(x, w, epsilon, n, x); /* in place */
        release(x, off * sizeof *x);
        release(w, sizeof *w);
        release(b, sizeof *b);
        release(out, 4);
    }
}

static void test_attention(const Kernels *k) {
    for (size_t round = 0; round < 80; round++) {
        const size_t dim = (size_t[]){64, 16, 80, 7, 1, 128}[round % 6], keys = below(70), count = 1 + below(5), stride = keys + below(3);
        const CacheFormat format = round % 2 ? CACHE_FLOAT16 : CACHE_FLOAT32;
        const size_t element = format == CACHE_FLOAT16 ? 2 : 4;
        float *values = floats(keys * dim, 1.0f, 0), *queries = floats(count * dim, 1.0f, 1), *out = memory(count * stride * sizeof *out, 4);
        uint8_t *entries = memory(keys * dim * element, element);
        if (format == CACHE_FLOAT16) {
            k->to_half(values, keys * dim, (uint16_t *)(void *)entries);
            k->to_float((uint16_t *)(void *)entries, keys * dim, values);
        } else {
            memcpy(entries, values, keys * dim * element);
        }
        k->scores(queries, count, dim, entries, format, keys, out, stride);
        for (size_t q = 0; q < count; q++) {
            for (size_t key = 0; key < keys; key++) {
                double want = 0;
                for (size_t d = 0; d < dim; d++) {
                    want += (double)queries[q * dim + d] * values[key * dim + d];
                }
                check("scores", out[q * stride + key], want, 1e-5 * (double)dim);
            }
        }
        float *weights = floats(count * stride, 1.0f, 1), *sums = floats(count * dim, 1.0f, 1), *before = malloc(count * dim * sizeof *sums);
        memcpy(before, sums, count * dim * sizeof *sums);
        k->weighted(weights, stride, count, dim, entries, format, keys, sums);
        for (size_t q = 0; q < count; q++) {
            for (size_t d = 0; d < dim; d++) {
                double want = before[q * dim + d];
                for (size_t key = 0; key < keys; key++) {
                    want += (double)weights[q * stride + key] * values[key * dim + d];
                }
                check("weighted", sums[q * dim + d], want, 1e-5 * (double)(keys + 1));
            }
        }
        free(before);
        release(values, 0);
        release(queries, 4);
        release(out, 4);
        release(entries, element);
        release(weights, 4);
        release(sums, 4);
    }
}

static void test_softmax(const Kernels *k) {
    for (size_t round = 0; round < 100; round++) {
        const size_t n = below(90), off = below(8);
        float *x = floats(n, 100.0f, off);
        if (n > 3) {
            x[1] = -INFINITY;
            x[2] = -3e38f;
        }
        double highest = -INFINITY, sum = 0;
        for (size_t i = 0; i < n; i++) {
            highest = fmax(highest, x[i]);
        }
        const float most = k->maximum(x, n);
        if (n > 0) {
            check("maximum", most, highest, 0);
        } else if (most != -INFINITY) {
            check("maximum of nothing", most, -INFINITY, 0);
        }
        double *want = malloc((n + 1) * sizeof *want);
        for (size_t i = 0; i < n; i++) {
            want[i] = exp(x[i] - highest);
            sum += want[i];
        }
        const float got = k->exponentials(x, n, most);
        check("exponentials: sum", got, sum, 1e-5 * (sum + 1e-30));
        for (size_t i = 0; i < n; i++) {
            check("exponentials", x[i], want[i], want[i] < 1.2e-38 ? 2e-38 : 1e-5 * want[i]); /* the argument's own rounding counts */
        }
        free(want);
        release(x, off * sizeof *x);
    }
    float x[17] = {NAN};
    check("exponentials: NaN", k->exponentials(x, 17, 0.0f), NAN, 0);
}

static void test_halves(const Kernels *k) {
    for (uint32_t i = 0; i < 65536; i += 16) { /* every float16 there is */
        uint16_t half[19], back[19];
        float value[19];
        for (uint32_t j = 0; j < 16; j++) {
            half[j] = (uint16_t)(i + j);
        }
        k->to_float(half, 16, value);
        k->to_half(value, 16, back);
        for (uint32_t j = 0; j < 16; j++) {
            check("to_float", value[j], half_to_float(half[j]), 0);
            if (!isnan(value[j])) {
                check("to_half", back[j], half[j], 0);
            }
        }
    }
    for (size_t round = 0; round < 3000; round++) {
        float x[17];
        uint16_t half[17];
        for (size_t i = 0; i < 17; i++) {
            x[i] = (float)(uniform() * exp2(uniform() * 30));
        }
        k->to_half(x, 17, half);
        for (size_t i = 0; i < 17; i++) {
            check("to_half: rounding", half[i], float_to_half(x[i]), 0);
            check("to_half: nearest", fmin(fabs((double)half_to_float(half[i])), 65519), fmin(fabs((double)x[i]), 65519),
                  fmax(fabs((double)x[i]) / 2048, 3e-8));
        }
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void time_products(const Kernels *k) {
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

int main(int count, char **arguments) {
    const bool timed = count == 3 && strcmp(arguments[1], "--time") == 0;
    const Kernels *k = count > 1 ? kernels_named(arguments[count - 1]) : kernels_best();
    if (k == NULL) {
        printf("this CPU has no %s\n", arguments[count - 1]);
        return 2;
    }
    if (timed) {
        time_products(k);
        return 0;
    }
    test_quantize(k);
    test_integer_products(k);
    test_float_products(k);
    test_elementwise(k);
    test_norms(k);
    test_attention(k);
    test_softmax(k);
    test_halves(k);
    test_bytes(k);
    test_head_attention(k);
    printf("%s: %d differences\n", k->name, failures);
    return failures > 0;
}
