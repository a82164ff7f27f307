/* Caches in 8 bits against float64: what is written, the dot products with queries, weighted sums, and attention of many queries. */
#include "checking.h"

#define BLOCKS(size) (((size) + BLOCK - 1) / BLOCK)

/* Entries [keys][size] in 8 bits and what they stand for; the scales' arrays are longer than the keys. */
typedef struct {
    size_t keys, size, stride;
    int8_t *codes;
    uint16_t *scales;
    float *values;
} Cache;

static Cache cached(const Kernels *k, size_t keys, size_t size, float large) {
    Cache c = {.keys = keys, .size = size, .stride = keys + below(5)};
    c.codes = memory(keys * size, 3);
    c.scales = memory(BLOCKS(size) * c.stride * sizeof *c.scales, 2);
    c.values = floats(keys * size, large, 0);
    for (size_t key = 0; key < keys; key++) {
        float *x = c.values + key * size;
        for (size_t d = 0; d < size; d++) {
            const size_t kind = key % 7;
            x[d] *= kind == 3 ? 0.0f : kind == 4 ? 1e-41f : kind == 5 ? 1e-6f : kind == 6 && d == size / 2 ? 300.0f : 1.0f; /* an outlier */
        }
        k->to_codes(x, size, c.codes + key * size, c.scales + key, c.stride);
    }
    return c;
}

static float value_of(const Cache *c, size_t key, size_t d) {
    return (float)c->codes[key * c->size + d] * half_to_float(c->scales[d / BLOCK * c->stride + key]);
}

static void free_cache(Cache *c) {
    release(c->codes, 3);
    release(c->scales, 2);
    release(c->values, 0);
}

/* Half a step of the block's largest number, and as in plain C bit for bit: another machine may go on with a cache. */
static void test_codes(const Kernels *k) {
    const Kernels *plain = kernels_named("scalar");
    for (size_t round = 0; round < 60; round++) {
        const size_t size = (size_t[]){64, 16, 80, 7, 1, 128, 256, 33}[round % 8];
        Cache c = cached(k, 1 + below(30), size, (float[]){1.0f, 1e-20f, 1e4f, 2e4f}[round % 4]);
        for (size_t key = 0; key < c.keys; key++) {
            int8_t codes[HEAD_SIZE_MOST];
            uint16_t scales[HEAD_SIZE_MOST / BLOCK];
            plain->to_codes(c.values + key * size, size, codes, scales, 1);
            for (size_t b = 0; b < BLOCKS(size); b++) {
                check("scale", c.scales[b * c.stride + key], scales[b], 0);
                double most = 0;
                for (size_t d = b * BLOCK; d < size && d < (b + 1) * BLOCK; d++) {
                    most = fmax(most, fabs((double)c.values[key * size + d]));
                }
                /* Steps of half precision's own, 2^-24, are the finest. */
                check("a scale's size", half_to_float(scales[b]), most / 127, most / 127 * 0x1p-10 + 0x1p-24);
                for (size_t d = b * BLOCK; d < size && d < (b + 1) * BLOCK; d++) {
                    check("code", c.codes[key * size + d], codes[d], 0);
                    check("entry", value_of(&c, key, d), c.values[key * size + d], most / 127 * 0.502 + 0x1p-25);
                }
            }
        }
        free_cache(&c);
    }
    /* What is no number is none in its whole block, and in no other. */
    const float wrong[] = {NAN, INFINITY, -INFINITY, 3e38f};
    for (size_t i = 0; i < 4; i++) {
        float x[40] = {0};
        int8_t codes[40];
        uint16_t scales[2];
        x[33] = wrong[i];
        x[3] = 127.0f;
        k->to_codes(x, 40, codes, scales, 1);
        check("beside what is no number", (double)codes[3] * half_to_float(scales[0]), 127.0, 0);
        check("what is no number", (double)codes[34] * half_to_float(scales[1]), NAN, 0);
    }
}

static void test_scores(const Kernels *k, size_t round) {
    const size_t size = (size_t[]){64, 16, 80, 7, 1, 128, 256, 33}[round % 8], count = 1 + below(7), keys = round % 11 == 0 ? 0 : below(200);
    Cache c = cached(k, keys, size, 2.0f);
    const size_t stride = keys + below(3);
    float *queries = floats(count * size, round % 5 == 4 ? 1e6f : round % 5 == 3 ? 1e-39f : 1.0f, 1), *out = memory(count * stride * sizeof *out, 4);
    const CacheEntries entries = {CACHE_INT8, c.codes, c.scales, c.stride};
    k->scores(queries, count, size, &entries, keys, out, stride);
    for (size_t q = 0; q < count; q++) {
        for (size_t key = 0; key < keys; key++) {
            double want = 0, most = 0, largest = 0;
            for (size_t d = 0; d < size; d++) {
                want += (double)queries[q * size + d] * value_of(&c, key, d);
                most += fabs((double)value_of(&c, key, d));
                largest = fmax(largest, fabs((double)queries[q * size + d]));
            }
            check("scores of codes", out[q * stride + key], want, most * largest * 4e-5 + 1e-33);
        }
    }
    /* Alone, the same bits: neither how many queries nor how many keys changes a score. */
    for (size_t i = 0; i < 3 && keys > 0; i++) {
        const size_t q = below(count), key = below(keys);
        const CacheEntries one = {CACHE_INT8, c.codes + key * size, c.scales + key, c.stride};
        float alone;
        k->scores(queries + q * size, 1, size, &one, 1, &alone, 1);
        check("score alone", alone, out[q * stride + key], strcmp(k->name, "avx512") == 0 || strstr(k->name, "bf16") != NULL ? 0 : 1e-5 * fabs((double)alone) + 1e-6);
    }
    free_cache(&c);
    release(queries, 4);
    release(out, 4);
}

static void test_weighted(const Kernels *k, size_t round) {
    const size_t size = (size_t[]){64, 16, 80, 7, 1, 128, 256, 33}[round % 8], count = 1 + below(7), keys = round % 11 == 0 ? 0 : below(300);
    Cache c = cached(k, keys, size, 2.0f);
    const size_t stride = keys + below(3);
    float *weights = floats(count * stride, 1.0f, 1), *sums = floats(count * size, 1.0f, 1), *before = malloc((count * size + 1) * sizeof *sums);
    for (size_t i = 0; i < count * stride; i++) {
        weights[i] = below(9) == 0 ? 0.0f : fabsf(weights[i]) * (round % 6 == 5 ? 1e-36f : 1.0f);
    }
    memcpy(before, sums, count * size * sizeof *sums);
    const CacheEntries entries = {CACHE_INT8, c.codes, c.scales, c.stride};
    k->weighted(weights, stride, count, size, &entries, keys, sums);
    for (size_t q = 0; q < count; q++) {
        for (size_t d = 0; d < size; d++) {
            double want = before[q * size + d], most = 0, all = 0;
            for (size_t key = 0; key < keys; key++) {
                want += (double)weights[q * stride + key] * value_of(&c, key, d);
                /* A weight is exact to 2^-17 of the largest one of its tile, times the entry's scale. */
                most = fmax(most, (double)weights[q * stride + key] * half_to_float(c.scales[d / BLOCK * c.stride + key]));
                all += abs(c.codes[key * size + d]);
            }
            check("weighted codes", sums[q * size + d], want, most * all * 0x1p-16 + 2e-6 * (1 + fabs(want)));
        }
    }
    free(before);
    free_cache(&c);
    release(weights, 4);
    release(sums, 4);
}

/* NaN and infinity come through both, in their own query and nowhere else. */
static void test_no_numbers(const Kernels *k) {
    for (size_t wrong = 0; wrong < 2; wrong++) {
        float x[3 * 64], queries[2 * 64], scores[2 * 3], weights[2 * 3] = {0.5f, 0.25f, 0.25f, 0.5f, 0.25f, 0.25f}, sums[2 * 64] = {0};
        int8_t codes[3 * 64];
        uint16_t scales[2 * 3];
        for (size_t i = 0; i < 3 * 64; i++) {
            x[i] = (float)uniform();
            queries[i % 128] = (float)uniform();
        }
        queries[5] = wrong ? INFINITY : NAN;
        weights[1] = NAN;
        for (size_t key = 0; key < 3; key++) {
            k->to_codes(x + key * 64, 64, codes + key * 64, scales + key, 3);
        }
        const CacheEntries entries = {CACHE_INT8, codes, scales, 3};
        k->scores(queries, 2, 64, &entries, 3, scores, 3);
        k->weighted(weights, 3, 2, 64, &entries, 3, sums);
        check("a query with NaN or infinity", isfinite(scores[0]), 0, 0);
        check("a query beside it", isfinite(scores[3]), 1, 0);
        check("a weight of NaN", sums[0], NAN, 0);
        check("weights beside it", isfinite(sums[64]), 1, 0);
        x[70] = wrong ? INFINITY : NAN; /* of the second key's first block */
        k->to_codes(x + 64, 64, codes + 64, scales + 1, 3);
        memset(sums, 0, sizeof sums);
        k->scores(queries + 64, 1, 64, &entries, 3, scores, 3);
        k->weighted(weights + 3, 3, 1, 64, &entries, 3, sums);
        check("a key that is no number", scores[1], NAN, 0);
        check("the keys beside it", isfinite(scores[0]) && isfinite(scores[2]), 1, 0);
        check("a value that is no number", isfinite(sums[0]), 0, 0);
        check("its other block", isfinite(sums[40]), 1, 0);
    }
}

/* Attention of many queries over codes is that over what they stand for. */
static void test_blocks(const Kernels *k, size_t round) {
    const size_t size = (size_t[]){64, 16, 80, 7, 1, 128, 256, 33}[round % 8], group = 1 + below(3), tokens = 1 + below(40), past = below(200), keys = past + tokens;
    Cache c[2] = {cached(k, keys, size, 1.0f), cached(k, keys, size, 1.0f)};
    c[1].stride = c[0].stride = keys; /* one stride for both */
    float *values[2], *queries = floats(tokens * group * size, 1.0f, 1), *out[2];
    for (size_t i = 0; i < 2; i++) {
        release(c[i].scales, 2);
        c[i].scales = memory(BLOCKS(size) * keys * sizeof *c[i].scales, 2);
        values[i] = memory(keys * size * sizeof(float), 0);
        out[i] = memory(tokens * group * size * sizeof(float), 4);
        for (size_t key = 0; key < keys; key++) {
            k->to_codes(c[i].values + key * size, size, c[i].codes + key * size, c[i].scales + key, keys);
        }
        for (size_t j = 0; j < keys * size; j++) {
            values[i][j] = value_of(&c[i], j / size, j % size);
        }
    }
    HeadAttention a = {.size = size, .group = group, .rows = tokens * group, .queries = queries, .query_stride = group * size, .end = keys};
    a.key_stride = a.value_stride = size;
    a.causal = true;
    a.position = past;
    a.window = round % 3 == 2 ? 20 : 0;
    a.scale = 1.0f / sqrtf((float)size);
    a.half = round % 2;
    a.out_stride = group * size;
    a.scratch = memory(attention_bytes(a.rows, size), 0);
    for (size_t i = 0; i < 2; i++) {
        a.format = i ? CACHE_INT8 : CACHE_FLOAT32;
        a.keys = i ? (const void *)c[0].codes : values[0];
        a.values = i ? (const void *)c[1].codes : values[1];
        a.key_scales = i ? c[0].scales : NULL;
        a.value_scales = i ? c[1].scales : NULL;
        a.scale_stride = i ? keys : 0;
        a.out = out[i];
        k->attention(&a);
    }
    for (size_t i = 0; i < tokens * group * size; i++) {
        check("attention over codes", out[1][i], out[0][i], 1e-6 * (1 + fabs((double)out[0][i])));
    }
    release(a.scratch, 0);
    release(queries, 4);
    for (size_t i = 0; i < 2; i++) {
        release(values[i], 0);
        release(out[i], 4);
        free_cache(&c[i]);
    }
}

void test_caches(const Kernels *k) {
    test_codes(k);
    test_no_numbers(k);
    for (size_t round = 0; round < 96; round++) {
        test_scores(k, round);
        test_weighted(k, round);
        test_blocks(k, round);
    }
}
