/* What is done number by number or row by row, against float64: activations, norms, softmax, conversions. */
#include "checking.h"

double unary_of(Unary kind, double x) {
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

void test_elementwise(const Kernels *k) {
    for (size_t round = 0; round < 200; round++) {
        const size_t n = below(70), off = below(8);
        const float size = (float[]){1.0f, 8.0f, 90.0f, 1e-40f, 1e4f, 1.6e38f}[round % 6];
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
        const size_t half = n / 2;
        float *angles = floats(n, 1.0f, 3), *turned = memory(n * sizeof *turned, 8);
        k->rotate(x, half, angles, angles + half, out);
        for (size_t i = 0; i < half; i++) {
            const double a = x[i], b = x[half + i], c = angles[i], s = angles[half + i], most = 2e-7 * (fabs(a) + fabs(b)) + 1e-44;
            check("rotate: first", out[i], a * c - b * s, most);
            check("rotate: second", out[half + i], a * s + b * c, most);
        }
        memcpy(turned, x, n * sizeof *x);
        k->rotate(turned, half, angles, angles + half, turned);
        check("rotate: in its place", memcmp(out, turned, 2 * half * sizeof *out), 0, 0);
        release(turned, 8);
        release(angles, 3 * sizeof *angles);
        for (Unary kind = 0; kind < UNARY_KINDS; kind++) {
            k->unary(kind, x, n, out);
            for (size_t i = 0; i < n; i++) {
                check((const char *[]){"identity", "silu", "gelu", "gelu tanh", "quick gelu", "relu", "tanh", "sigmoid"}[kind], out[i], unary_of(kind, x[i]),
                      4e-7 * fmax(1, fabs((double)x[i])));
            }
            k->gated(kind, x, y, n, out);
            for (size_t i = 0; i < n; i++) {
                check("gated", out[i], unary_of(kind, x[i]) * y[i], 1e-6 * fmax(1, fabs((double)x[i])));
            }
        }
        release(x, off * sizeof *x);
        release(y, sizeof *y);
        release(out, 4);
    }
}

void test_norms(const Kernels *k) {
    for (size_t round = 0; round < 100; round++) {
        const size_t n = 1 + below(300), off = below(8);
        const float size = (float[]){1.0f, 100.0f, 1e-30f, 1e15f, 1e-41f}[round % 5], epsilon = 1e-5f, middle = round % 5 < 2 ? (float)below(3) * 50.0f * size : 0.0f;
        float *x = floats(n, size, off), *w = floats(n, 2.0f, 1), *b = floats(n, 1.0f, 1), *out = memory(n * sizeof *out, 4);
        double mean = 0, square = 0, variance = 0;
        for (size_t i = 0; i < n; i++) {
            x[i] += middle; /* far from 0, where squares less the mean's would lose all */
        }
        for (size_t i = 0; i < n; i++) {
            mean += x[i] / (double)n;
            square += (double)x[i] * x[i] / (double)n;
        }
        for (size_t i = 0; i < n; i++) {
            variance += (x[i] - mean) * (x[i] - mean) / (double)n;
        }
        double largest = 0;
        for (size_t i = 0; i < n; i++) {
            largest = fmax(largest, fabs((double)x[i]));
        }
        k->rms_norm(x, w, epsilon, n, out);
        for (size_t i = 0; i < n; i++) {
            check("rms_norm", out[i], x[i] / sqrt(square + epsilon) * w[i], 4e-6 * largest / sqrt(square + epsilon) + 1e-44);
        }
        k->layer_norm(x, w, round % 2 ? b : NULL, epsilon, n, out);
        for (size_t i = 0; i < n; i++) {
            check("layer_norm", out[i], (x[i] - mean) / sqrt(variance + epsilon) * w[i] + (round % 2 ? b[i] : 0.0f),
                  5e-5 + 2e-6 * (double)(middle / size)); /* the mean itself is rounded */
        }
        k->rms_norm(x, w, epsilon, n, x); /* in place */
        release(x, off * sizeof *x);
        release(w, sizeof *w);
        release(b, sizeof *b);
        release(out, 4);
    }
}

void test_softmax(const Kernels *k) {
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

void test_halves(const Kernels *k) {
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
