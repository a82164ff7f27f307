/* Products of activations and weights in 8 bits with one scale per row and per output, against float64. */
#include "checking.h"

static ByteRows byte_rows(size_t rows, size_t depth) {
    const size_t stride = byte_stride(depth) + 64 * below(2);
    return (ByteRows){.codes = memory(rows * stride, 0), .scales = memory(rows * 4, 4), .zeros = memory(rows * 4, 4), .stride = stride};
}

static void byte_rows_free(ByteRows *x) {
    release(x->codes, 0);
    release(x->scales, 4);
    release(x->zeros, 4);
}

static void test_quantize_bytes(const Kernels *k) {
    const float sizes[] = {1.0f, 1e-41f, 1e-30f, 1e30f, 3e38f, 0.0f};
    for (size_t round = 0; round < 200; round++) {
        const size_t n = below(150), off = below(4);
        float *x = floats(n, sizes[round % 6], off);
        for (size_t i = 0; i < n && round % 4 == 1; i++) {
            x[i] = fabsf(x[i]); /* 0 stays a code */
        }
        ByteRows q = byte_rows(2, n);
        memset(q.codes, 77, 2 * q.stride);
        k->quantize_bytes(x, n, &q, 1);
        double low = 0, high = 0;
        for (size_t i = 0; i < n; i++) {
            low = fmin(low, x[i]);
            high = fmax(high, x[i]);
        }
        const double scale = (high - low) / 255;
        check("quantize_bytes: scale", q.scales[1], scale < 1e-37 ? 0 : scale, scale * 1e-6);
        check("quantize_bytes: zero point", q.zeros[1], q.scales[1] > 0 ? -low / scale : 0, 0.501);
        for (size_t i = 0; i < n && q.scales[1] > 0; i++) {
            check("quantize_bytes: value", (q.codes[q.stride + i] - q.zeros[1]) * (double)q.scales[1], x[i], 1.01 * scale);
        }
        if (q.stride > 0) {
            check("quantize_bytes: the row before", q.codes[q.stride - 1], 77, 0);
        }
        release(x, off * sizeof *x);
        byte_rows_free(&q);
    }
    for (size_t at = 0; at < 70; at += 23) {
        float x[70] = {1.0f, -1.0f};
        ByteRows q = byte_rows(1, 70);
        x[at] = at % 2 ? NAN : -INFINITY;
        k->quantize_bytes(x, 70, &q, 0);
        check("quantize_bytes: not finite", q.scales[0] - q.scales[0], NAN, 0);
        byte_rows_free(&q);
    }
}

/* `hardest`: all codes as large as they get. */
static void test_product(const Kernels *k, size_t depth, bool hardest) {
    const size_t width = 1 + below(150), panels = (width + PANEL - 1) / PANEL, first = below(3), rows = below(45), bytes = byte_panel(depth);
    const size_t panel = below(panels), some = 1 + below(panels - panel), stride = some * PANEL + below(3);
    const Unary unary = below(2) ? UNARY_IDENTITY : (Unary)below(UNARY_KINDS);
    const float large = (float[]){1.0f, 1.0f, 1e20f, 1e-30f, 1e-41f}[below(5)];
    const bool add = below(2) == 0;
    int8_t *codes = memory(panels * bytes, 0);
    float *scales = memory(panels * PANEL * 4, 4), *bias = memory(panels * PANEL * 4, 4);
    int32_t *sums = memory(panels * PANEL * 4, 4);
    for (size_t o = 0; o < width; o++) {
        scales[o] = (float)fabs(uniform()) + 0.01f;
        bias[o] = (float)uniform();
        for (size_t i = 0; i < depth; i++) {
            const int8_t code = hardest ? (o % 2 ? 127 : -127) : (int8_t)((int)below(255) - 127);
            codes[o / PANEL * bytes + i / 4 * 64 + o % PANEL * 4 + i % 4] = code;
            sums[o] += code;
        }
    }
    const ByteMatrix w = {.depth = depth, .width = width, .codes = codes, .scales = scales, .bias = below(3) ? bias : NULL, .sums = sums};
    ByteRows x = byte_rows(first + rows, depth);
    for (size_t row = 0; row < first + rows; row++) {
        float *values = floats(depth, row % 5 == 4 ? 1e-3f * large : large, 1);
        k->quantize_bytes(values, depth, &x, row);
        release(values, 4);
        if (hardest) {
            memset(x.codes + row * x.stride, 255, depth);
            x.zeros[row] = row % 2 ? 255 : 0;
        }
    }
    float *out = floats(rows * stride, 1.0f, 1), *before = malloc((rows * stride + 1) * sizeof *before);
    memcpy(before, out, rows * stride * sizeof *out);
    k->bytes(&w, panel, some, &x, first, rows, unary, add, out, stride);
    /* A polynomial of 8e-5 and a reciprocal of 6e-5: beside the rounding of products of 8 bits that is nothing. */
    const bool near = strncmp(k->name, "avx512", 6) == 0 && (unary == UNARY_SILU || unary == UNARY_QUICK_GELU || unary == UNARY_GELU_TANH);
    for (size_t row = 0; row < rows; row++) {
        for (size_t o = 0; o < stride; o++) {
            const size_t output = panel * PANEL + o;
            if (o >= some * PANEL) {
                check("bytes: beyond the panels", out[row * stride + o], before[row * stride + o], 0);
                continue;
            }
            double want = 0;
            for (size_t i = 0; i < depth && output < width; i++) {
                const int code = codes[output / PANEL * bytes + i / 4 * 64 + output % PANEL * 4 + i % 4];
                want += (double)(x.codes[(first + row) * x.stride + i] - x.zeros[first + row]) * code;
            }
            const double product = want * x.scales[first + row] * scales[output];
            const double value = unary_of(unary, product + (w.bias != NULL ? bias[output] : 0));
            want = value + (add ? before[row * stride + o] : 0);
            check("bytes", out[row * stride + o], want, 1e-6 * (fabs(product) + fabs(want) + 2) + (near ? 1.6e-4 * fabs(value) : 0));
        }
    }
    free(before);
    release(codes, 0);
    release(scales, 4);
    release(bias, 4);
    release(sums, 4);
    byte_rows_free(&x);
    release(out, 4);
}

void test_bytes(const Kernels *k) {
    const size_t depths[] = {32, 64, 1, 33, 95, 128, 300};
    test_quantize_bytes(k);
    for (size_t round = 0; round < 120; round++) {
        test_product(k, depths[round % 7], round % 10 == 9);
    }
    test_product(k, 3072, true);
}
