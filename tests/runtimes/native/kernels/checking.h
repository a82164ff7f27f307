/* What the tests of the kernels share: random numbers, memory with nothing behind it, and the comparison. */
#ifndef CHECKING_H
#define CHECKING_H

#define _POSIX_C_SOURCE 200809L

#include "../../../../runtimes/native/kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern uint64_t state;
extern int failures;

static inline uint64_t bits64(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du;
}

static inline size_t below(size_t n) { return (size_t)(bits64() >> 33) % n; }
static inline double uniform(void) { return (double)(bits64() >> 11) / 9007199254740992.0 * 2.0 - 1.0; }

/* Memory of exactly so many bytes at an address that is `off` beyond a multiple of 64: what lies behind belongs to the sanitizer. */
static inline void *memory(size_t bytes, size_t off) {
    void *raw = NULL;
    if (posix_memalign(&raw, 64, bytes + off + 1) != 0) {
        abort();
    }
    memset(raw, 0, bytes + off + 1);
    return (uint8_t *)raw + off;
}

static inline void release(void *at, size_t off) { free((uint8_t *)at - off); }

static inline float *floats(size_t n, float size, size_t off) {
    float *x = memory(n * sizeof *x, off * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)uniform() * size;
    }
    return x;
}

static inline void check(const char *what, double got, double want, double tolerance) {
    if (!(fabs(got - want) <= tolerance) && got != want && !(isnan(got) && isnan(want)) && failures++ < 20) {
        printf("%s: %.9g, expected %.9g (±%.3g)\n", what, got, want, tolerance);
    }
}

/* Relative error of the products of an attention: of float32, or, where its factors are bfloat16, of theirs. */
static inline double attention_error(const Kernels *k, bool half) { return half && strstr(k->name, "bf16") != NULL ? 0x1p-8 : 3e-6; }

/* products_test.c */
void test_quantize(const Kernels *k);
void test_integer_products(const Kernels *k);
void test_float_products(const Kernels *k);
void time_products(const Kernels *k);
/* numbers_test.c; the first: what an activation is */
double unary_of(Unary kind, double x);
void test_elementwise(const Kernels *k);
void test_norms(const Kernels *k);
void test_softmax(const Kernels *k);
void test_halves(const Kernels *k);
/* attention_test.c, cache_test.c and bytes_test.c */
void test_attention(const Kernels *k);
void test_caches(const Kernels *k);
void test_head_attention(const Kernels *k);
void test_bytes(const Kernels *k);

#endif
