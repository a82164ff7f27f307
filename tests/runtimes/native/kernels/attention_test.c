/* Attention of one head against float64: all keys, causal, a window, a mask, biases, a cap; caches in both formats. */
#include "checking.h"

typedef struct {
    size_t past, window, group;
    bool causal;
    const uint8_t *seen; /* or NULL */
} Rule;

static bool visible(const Rule *rule, size_t row, size_t key) {
    const size_t at = rule->past + row / rule->group;
    return (rule->seen == NULL || rule->seen[key]) && (!rule->causal || (key <= at && (rule->window == 0 || key + rule->window > at)));
}

static void hide(const void *context, size_t row, size_t key, size_t count, float *scores) {
    for (size_t i = 0; i < count; i++) {
        if (!visible(context, row, key + i)) {
            scores[i] = -INFINITY;
        }
    }
}

/* A line of n numbers becomes what codes of 8 bits leave of it, 127 steps to either side. */
static void rounded(float *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        most = fmax(most, fabs(x[i]));
    }
    for (size_t i = 0; i < n && most > 0; i++) {
        x[i] = (float)(rint(x[i] * 127 / most) * most / 127);
    }
}

/* What attention in 8 bits multiplies: queries, keys less their mean, and values around the middle of each column. */
static void round_all(const HeadAttention *a, float *queries, float *keys, float *values) {
    for (size_t row = 0; row < a->rows; row++) {
        rounded(queries + row / a->group * a->query_stride + row % a->group * a->size, a->size);
    }
    for (size_t d = 0; d < a->size; d++) {
        double mean = 0, low = INFINITY, high = -INFINITY;
        for (size_t i = 0; i < a->end; i++) {
            mean += keys[i * a->key_stride + d] / (double)a->end;
            low = fmin(low, values[i * a->value_stride + d]);
            high = fmax(high, values[i * a->value_stride + d]);
        }
        const double middle = (low + high) / 2, step = (high - low) / 254;
        for (size_t i = 0; i < a->end; i++) {
            float *value = &values[i * a->value_stride + d];
            keys[i * a->key_stride + d] -= (float)mean;
            *value = (float)(middle + (step > 0 ? rint((*value - middle) / step) * step : 0));
        }
    }
    for (size_t i = 0; i < a->end; i++) {
        rounded(keys + i * a->key_stride, a->size);
    }
}

/* `pictured`: keys of a picture, more than are packed at once, of which every query sees all. `bytes`: products of 8 bits will do. */
static void test_one(const Kernels *k, size_t round, size_t pictured, bool bytes) {
    const size_t size = (size_t[]){64, 16, 80, 7, 1, 128, 72, 256}[round % 8], group = 1 + below(3), tokens = 1 + below(round % 10 == 0 ? 200 : 40), rows = tokens * group;
    const size_t past = pictured > 0 ? pictured : below(round % 10 == 1 ? 400 : 90), keys = past + tokens, extra = below(3);
    const CacheFormat format = round % 2 && !bytes ? CACHE_FLOAT16 : CACHE_FLOAT32;
    const size_t element = format == CACHE_FLOAT16 ? 2 : 4, query_stride = group * size + below(3), stride = size + below(5);
    const float large = bytes ? (float[]){1.0f, 4.0f, 1e-20f, 2.5f}[round % 4] : (float[]){1.0f, 1.0f, 1e-20f, 1.0f, 1.0f, 30.0f}[round % 6]; /* products of 1e-40 too */
    float *queries = floats(tokens * query_stride, large, 1), *key = floats(keys * stride, large, 1), *value = floats(keys * stride, 1.0f, 1);
    float *out = memory(tokens * (group * size + extra) * sizeof *out, 4), *bias = floats(rows * keys, 3.0f, 1);
    void *held[2] = {key, value};
    for (size_t i = 0; i < 2 && format == CACHE_FLOAT16; i++) { /* unaligned halves, and what they stand for */
        held[i] = memory(keys * stride * element, 2);
        k->to_half(i ? value : key, keys * stride, held[i]);
        k->to_float(held[i], keys * stride, i ? value : key);
    }
    uint8_t *seen = memory(keys, 0);
    for (size_t i = 0; i < keys; i++) {
        seen[i] = i == 0 || below(3) > 0;
    }
    const Rule rule = {.past = past, .window = round % 5 == 4 ? 1 + below(50) : 0, .group = group, .causal = round % 3 != 0, .seen = round % 9 == 8 ? seen : NULL};
    const size_t begin = rule.causal && rule.window > 0 && past + 1 > rule.window ? past + 1 - rule.window : 0;
    HeadAttention a = {.size = size, .group = group, .rows = rows, .queries = queries, .query_stride = query_stride, .keys = held[0], .values = held[1]};
    a.key_stride = a.value_stride = stride;
    a.format = format;
    a.begin = begin;
    a.end = keys;
    a.scale = 1.0f / sqrtf((float)size);
    a.cap = round % 7 == 6 ? 5.0f : 0.0f;
    a.bias = round % 4 == 3 ? bias : NULL;
    a.bias_stride = keys;
    a.causal = rule.causal && round / 2 % 2 == 0; /* by itself, or as the caller says */
    a.position = rule.past;
    a.window = rule.window;
    a.hide = (rule.causal && !a.causal) || rule.seen != NULL ? hide : NULL;
    a.context = &rule;
    a.half = round / 4 % 2 == 0;
    a.bytes = bytes;
    a.out = out;
    a.out_stride = group * size + extra;
    a.scratch = memory(attention_bytes(rows, size), 0);
    k->attention(&a);
    const bool coarse = bytes && strncmp(k->name, "avx512", 6) == 0 && !a.causal && a.cap <= 0 && a.bias == NULL && a.hide == NULL;
    if (coarse) {
        round_all(&a, queries, key, value);
    }
    double *weights = malloc(keys * sizeof *weights);
    for (size_t row = 0; row < rows; row++) {
        const float *query = queries + row / group * query_stride + row % group * size;
        double highest = -INFINITY, sum = 0, sharpness = 0, lost = 0;
        for (size_t i = 0; i < keys; i++) {
            double dot = 0, parts = 0;
            for (size_t d = 0; d < size; d++) {
                dot += (double)query[d] * key[i * stride + d];
                parts += fabs((double)query[d] * key[i * stride + d]);
            }
            dot *= a.scale;
            dot = a.cap > 0 ? a.cap * tanh(dot / a.cap) : dot;
            dot += a.bias != NULL ? bias[row * keys + i] : 0;
            weights[i] = visible(&rule, row, i) ? dot : -INFINITY;
            highest = fmax(highest, weights[i]);
            sharpness = fmax(sharpness, parts * a.scale);
        }
        for (size_t i = 0; i < keys; i++) {
            weights[i] = exp(weights[i] - highest);
            sum += weights[i];
            lost += fmin(weights[i], 1.0 / 510);
        }
        for (size_t d = 0; d < size; d++) {
            double want = 0;
            for (size_t i = 0; i < keys; i++) {
                want += weights[i] / sum * value[i * stride + d];
            }
            /* A score's error is a weight's relative error; values are at most 1. */
            if (coarse) { /* exponents in steps of 1/64, weights of 1/255; and where one code lies between two, either */
                const double tolerance = 2 * (0.0056 + lost / sum + 2.0 * large * large / 127 * a.scale) + 1e-4;
                check("attention of bytes", out[row / group * a.out_stride + row % group * size + d], want, tolerance);
                continue;
            }
            check("attention", out[row / group * a.out_stride + row % group * size + d], want, attention_error(k, a.half) * (2 + 2 * sharpness));
        }
    }
    free(weights);
    release(a.scratch, 0);
    release(queries, 4);
    release(key, 4);
    release(value, 4);
    release(out, 4);
    release(bias, 4);
    release(seen, 0);
    for (size_t i = 0; i < 2 && format == CACHE_FLOAT16; i++) {
        release(held[i], 2);
    }
}

/* 2^x by itself: one key of weight 1 has the value 1, the others have weight 2^−f and value 0, so that 1 / (1 + others · 2^−f) comes out.
 * Queries and keys are numbers that bfloat16 holds, and weights are rounded to it only where they multiply values, which 1 survives: what is
 * left is the error of 2^x and that of a sum of floats. */
static void test_powers(const Kernels *k) {
    enum { KEYS = 70, STEPS = 128 };
    float query = 1.0f, keys[KEYS] = {0}, values[KEYS] = {1.0f}, out;
    HeadAttention a = {.size = 1, .group = 1, .rows = 1, .queries = &query, .query_stride = 1, .keys = keys, .values = values};
    a.key_stride = a.value_stride = a.out_stride = 1;
    a.end = KEYS;
    a.position = KEYS - 1;
    a.scale = 0.693147180559945309f; /* scores are powers of e */
    a.out = &out;
    a.scratch = memory(attention_bytes(1, 1), 0);
    for (int way = 0; way < 4; way++) { /* in halves, and where later keys are left out */
        a.half = way % 2 != 0;
        a.causal = way / 2 != 0;
        for (size_t step = 0; step < 2 * STEPS; step++) {
            for (size_t i = 1; i < KEYS; i++) {
                keys[i] = -(float)step / STEPS;
            }
            k->attention(&a);
            const double want = 1 / (1 + (KEYS - 1) * exp2(-(double)step / STEPS));
            check("attention: 2^x", out, want, want * (3e-6 + KEYS * 0x1p-24));
        }
    }
    release(a.scratch, 0);
}

/* Two keys, one 2^−x times as heavy: the steps of weights in 8 bits one by one. */
static void test_steps(const Kernels *k) {
    const bool coarse = strncmp(k->name, "avx512", 6) == 0;
    const float query = 1.0f, values[2] = {0.0f, 1.0f};
    for (size_t j = 0; j < 620; j += 3) {
        float keys[2] = {0.0f, -((float)j + 0.1f) / 64.0f}, out;
        HeadAttention a = {.size = 1, .group = 1, .rows = 1, .queries = &query, .keys = keys, .values = values, .key_stride = 1, .value_stride = 1, .end = 2};
        a.bytes = true;
        a.scale = 0.69314718f;
        a.out = &out;
        a.scratch = memory(attention_bytes(1, 1), 0);
        k->attention(&a);
        const double exact = 255 * exp2(coarse ? -(double)j / 64 : keys[1]), weight = coarse ? floor(exact + 0.5) : exact;
        const double tie = coarse && fabs(exact + 0.5 - rint(exact + 0.5)) < 0.01 ? 1.0 / 255 : 0; /* the table has 16 bits */
        check("attention: a step of the weights", out, weight / (255 + weight), tie + 1e-5);
        release(a.scratch, 0);
    }
}

/* Many blocks of equal keys, one lifted to twice the weight, first, last or none: what comes of them does not hang on when they come. */
static void test_order(const Kernels *k) {
    enum { BLOCK_KEYS = 256, BLOCKS = 96, ALL = BLOCK_KEYS * BLOCKS };
    const float query = 1.0f;
    float *keys = floats(ALL, 0.0f, 0), *values = floats(ALL, 0.0f, 0), out;
    HeadAttention a = {.size = 1, .group = 1, .rows = 1, .queries = &query, .keys = keys, .values = values, .key_stride = 1, .value_stride = 1, .end = ALL};
    a.bytes = true;
    a.scale = 0.69314718f;
    a.out = &out;
    a.scratch = memory(attention_bytes(1, 1), 0);
    for (size_t lifted = 0; lifted < 3; lifted++) {
        double sum = 0, total = 0;
        for (size_t i = 0; i < ALL; i++) {
            const size_t block = i / BLOCK_KEYS;
            keys[i] = lifted > 0 && block == (lifted == 1 ? 0 : BLOCKS - 1) ? 1.0f : 0.0f;
            values[i] = block < BLOCKS / 2 ? 1.0f : -1.0f;
            sum += (1.0 + keys[i]) * values[i];
            total += 1.0 + keys[i];
        }
        k->attention(&a);
        check("attention: order of blocks", out, sum / total, lifted > 0 ? 4e-6 : 1e-6); /* 8e-5 of a power, of 1 in 96 blocks */
    }
    release(a.scratch, 0);
    release(keys, 0);
    release(values, 0);
}

/* Numbers whose sum is no float, and neighbours, between which there is none. */
static void test_extremes(const Kernels *k) {
    enum { KEYS = 700 };
    const float query = 1.0f;
    float keys[KEYS], values[KEYS], out;
    HeadAttention a = {.size = 1, .group = 1, .rows = 1, .queries = &query, .keys = keys, .values = values, .key_stride = 1, .value_stride = 1, .end = KEYS};
    a.bytes = true;
    a.scale = 1.0f;
    a.out = &out;
    a.scratch = memory(attention_bytes(1, 1), 0);
    for (size_t i = 0; i < KEYS; i++) {
        keys[i] = 1e36f;
        values[i] = (1.0f + (float)(i % 2)) * 1e36f;
    }
    k->attention(&a);
    if (strncmp(k->name, "avx512", 6) == 0) { /* other kernels add the values themselves */
        check("attention: the mean of large numbers", out, 1.5e36, 1e36 / 254);
    }
    for (size_t i = 0; i < KEYS; i++) {
        keys[i] = 1.0f;
        values[i] = i % 4 > 0 ? 1.0f + 0x1p-23f : 1.0f;
    }
    k->attention(&a);
    check("attention: neighbours", out, 1.0 + 0.75 * 0x1p-23, 1e-5);
    release(a.scratch, 0);
}

void test_head_attention(const Kernels *k) {
    test_steps(k);
    test_order(k);
    test_extremes(k);
    test_powers(k);
    for (size_t round = 0; round < 120; round++) {
        test_one(k, round, 0, false);
    }
    for (size_t i = 0; i < 4; i++) { /* rounds in halves, with nothing hidden, capped or added */
        test_one(k, (size_t[]){0, 9, 18, 24}[i], (size_t[]){1024 - 30, 2048, 1153, 700}[i], false);
    }
    for (size_t round = 0; round < 48; round += 3) { /* in bytes every query sees every key */
        test_one(k, round, round % 8 == 0 ? (size_t[]){1024 - 30, 2048, 250}[round / 8 % 3] : 0, true);
    }
    /* NaN is seen in what comes out, and only in its own row. */
    float queries[2] = {NAN, 1.0f}, keys[3] = {1.0f, 2.0f, 3.0f}, out[2];
    HeadAttention a = {.size = 1, .group = 1, .rows = 2, .queries = queries, .query_stride = 1, .keys = keys, .values = keys};
    a.key_stride = a.value_stride = a.out_stride = 1;
    a.end = 3;
    a.scale = 0.0f;
    a.out = out;
    a.scratch = memory(attention_bytes(2, 1), 0);
    for (int half = 0; half < 3; half++) {
        a.half = half != 0;
        a.bytes = half == 2;
        k->attention(&a);
        check("attention: NaN", out[0], NAN, 0);
        check("attention: beside NaN", out[1], 2.0, 1e-2);
    }
    release(a.scratch, 0);
    /* Without keys there is nothing to take a mean of, and without queries nothing is written. */
    float kept[2] = {7.0f, 7.0f};
    a.scratch = memory(attention_bytes(2, 1), 0);
    a.end = 0;
    a.rows = 1;
    a.out = kept;
    k->attention(&a);
    check("attention: no keys", kept[0], NAN, 0);
    kept[0] = 7.0f;
    a.end = 3;
    a.rows = 0;
    k->attention(&a);
    check("attention: no queries", kept[0], 7.0, 0);
    check("attention: the row behind", kept[1], 7.0, 0);
    release(a.scratch, 0);
}

/* Its parts, for one query: the dot products with keys, and the weighted sum of values. */
void test_attention(const Kernels *k) {
    for (size_t round = 0; round < 80; round++) {
        const size_t dim = (size_t[]){64, 16, 80, 7, 1, 128}[round % 6], keys = below(70), count = 1 + below(5), stride = keys + below(3);
        const CacheFormat format = round % 2 ? CACHE_FLOAT16 : CACHE_FLOAT32;
        const size_t element = format == CACHE_FLOAT16 ? 2 : 4;
        const double large = (double[]){1, 1e-38, 1e15, 1}[round / 2 % 4]; /* of the queries, and of the weights */
        float *values = floats(keys * dim, 1.0f, 0), *queries = floats(count * dim, (float)large, 1), *out = memory(count * stride * sizeof *out, 4);
        uint8_t *entries = memory(keys * dim * element, element);
        if (format == CACHE_FLOAT16) {
            k->to_half(values, keys * dim, (uint16_t *)(void *)entries);
            k->to_float((uint16_t *)(void *)entries, keys * dim, values);
        } else {
            memcpy(entries, values, keys * dim * element);
        }
        const CacheEntries cached = {.format = format, .data = entries};
        k->scores(queries, count, dim, &cached, keys, out, stride);
        for (size_t q = 0; q < count; q++) {
            for (size_t key = 0; key < keys; key++) {
                double want = 0;
                for (size_t d = 0; d < dim; d++) {
                    want += (double)queries[q * dim + d] * values[key * dim + d];
                }
                check("scores", out[q * stride + key], want, (1e-6 * large + 1e-44) * (double)dim);
            }
        }
        float *weights = floats(count * stride, (float)large, 1), *sums = floats(count * dim, (float)large, 1), *before = malloc(count * dim * sizeof *sums);
        memcpy(before, sums, count * dim * sizeof *sums);
        k->weighted(weights, stride, count, dim, &cached, keys, sums);
        for (size_t q = 0; q < count; q++) {
            for (size_t d = 0; d < dim; d++) {
                double want = before[q * dim + d];
                for (size_t key = 0; key < keys; key++) {
                    want += (double)weights[q * stride + key] * values[key * dim + d];
                }
                check("weighted", sums[q * dim + d], want, (1e-6 * large + 1e-44) * (double)(keys + 1));
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
