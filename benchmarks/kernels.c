/* What benchmarks/kernels.py times, as a shared library: the machine's limits, and the kernels' products, on threads of the runtime's own pool. */
#define _POSIX_C_SOURCE 200809L
#include "../runtimes/native/kernels/kernels.h"
#include "../runtimes/native/pool.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PIECES 64 /* per thread */

typedef struct {
    Pool *pool;
    const Kernels *kernels;
    /* The job. */
    const uint8_t *data;
    size_t bytes, rows;
    PanelMatrix matrix;
    QuantRows codes;
    const float *x;
    float *out;
    ByteMatrix bytes_matrix;
    ByteRows byte_rows;
    size_t heads, group;
    bool causal, half;
    void *scratch[POOL_MAX_THREADS];
    uint64_t sink[POOL_MAX_THREADS * 8];
} Bench;

/* One thread is timed by the processor time it was given, which others on the machine do not take from it. */
static double now(const Bench *b) {
    struct timespec t;
    clock_gettime(pool_threads(b->pool) == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static size_t pieces(void *context, size_t step, bool *small) {
    const Bench *b = context;
    (void)step;
    *small = false;
    return pool_threads(b->pool) * PIECES;
}

static double run(Bench *b, void (*work)(void *, size_t, size_t, size_t)) {
    const double begin = now(b);
    pool_run(b->pool, &(PoolJob){.steps = 1, .items = pieces, .work = work, .context = b});
    return now(b) - begin;
}

Bench *bench_open(size_t threads, const char *name) {
    Bench *b = calloc(1, sizeof *b);
    b->kernels = name != NULL && *name != '\0' ? kernels_named(name) : kernels_best();
    b->pool = pool_new(threads, true);
    return b->kernels != NULL ? b : NULL;
}

const char *bench_name(const Bench *b) { return b->kernels->name; }

static void read_work(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    const size_t count = pool_threads(b->pool) * PIECES, each = b->bytes / count / 64 * 64;
    const uint64_t *p = (const uint64_t *)(const void *)(b->data + item * each);
    typedef uint64_t wide __attribute__((vector_size(64), aligned(8), may_alias));
    wide sums[4] = {{0}, {0}, {0}, {0}};
    (void)step;
    for (size_t i = 0; i + 32 <= each / 8; i += 32) {
        for (size_t k = 0; k < 4; k++) {
            sums[k] ^= *(const wide *)(const void *)(p + i + k * 8);
        }
    }
    b->sink[thread * 8] ^= sums[0][0] ^ sums[1][1] ^ sums[2][2] ^ sums[3][3];
}

/* Seconds to read so many bytes once. */
double bench_read(Bench *b, const uint8_t *data, size_t bytes) {
    b->data = data;
    b->bytes = bytes;
    return run(b, read_work);
}

#define LOOPS 20000
#define KEEP(v) __asm__ volatile("" : "+x"(v))

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f,avx512vnni"))) static void peak512_int8(void *context, size_t step, size_t item, size_t thread) {
    __m512i s[12], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) {
        s[i] = _mm512_set1_epi32(i);
    }
    for (int k = 0; k < LOOPS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            s[i] = _mm512_dpbusd_epi32(s[i], x, y);
            __asm__ volatile("" : "+v"(s[i]));
        }
    }
    __m512i sum = s[0];
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) {
        sum = _mm512_add_epi32(sum, s[i]);
    }
    ((Bench *)context)->sink[thread * 8] ^= (uint64_t)_mm512_reduce_add_epi32(sum) + step + item;
}

__attribute__((target("avx512f"))) static void peak512_float(void *context, size_t step, size_t item, size_t thread) {
    __m512 s[12], x = _mm512_set1_ps(0.3f), y = _mm512_set1_ps(0.5f);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) {
        s[i] = _mm512_set1_ps((float)i);
    }
    for (int k = 0; k < LOOPS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            s[i] = _mm512_fmadd_ps(s[i], x, y);
            __asm__ volatile("" : "+v"(s[i]));
        }
    }
    __m512 sum = s[0];
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) {
        sum = _mm512_add_ps(sum, s[i]);
    }
    ((Bench *)context)->sink[thread * 8] ^= (uint64_t)_mm512_reduce_add_ps(sum) + step + item;
}

__attribute__((target("avx512f,avx512bf16"))) static void peak512_bf16(void *context, size_t step, size_t item, size_t thread) {
    const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3e99), y = (__m512bh)_mm512_set1_epi16(0x3f00); /* 0.3, 0.5 */
    __m512 s[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) {
        s[i] = _mm512_set1_ps((float)i);
    }
    for (int k = 0; k < LOOPS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            s[i] = _mm512_dpbf16_ps(s[i], x, y);
            __asm__ volatile("" : "+v"(s[i]));
        }
    }
    __m512 sum = s[0];
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) {
        sum = _mm512_add_ps(sum, s[i]);
    }
    ((Bench *)context)->sink[thread * 8] ^= (uint64_t)_mm512_reduce_add_ps(sum) + step + item;
}

/* Multiply, widen, add: three instructions for 32 products; the additions of pairs may wait, so this is what 8-bit weights allow. */
__attribute__((target("avx2"))) static void peak2_int8(void *context, size_t step, size_t item, size_t thread) {
    __m256i s[10], x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(5);
#pragma GCC unroll 12
    for (int i = 0; i < 10; i++) {
        s[i] = _mm256_set1_epi16((short)i);
    }
    for (int k = 0; k < LOOPS; k++) {
#pragma GCC unroll 10
        for (int i = 0; i < 10; i++) {
            __asm__ volatile("" : "+x"(x));
            s[i] = _mm256_add_epi16(s[i], _mm256_maddubs_epi16(x, y));
            __asm__ volatile("" : "+x"(s[i]));
        }
    }
    __m256i sum = s[0];
#pragma GCC unroll 12
    for (int i = 1; i < 10; i++) {
        sum = _mm256_add_epi16(sum, s[i]);
    }
    ((Bench *)context)->sink[thread * 8] ^= (uint64_t)_mm256_extract_epi32(sum, 0) + step + item;
}

__attribute__((target("avx2,fma"))) static void peak2_float(void *context, size_t step, size_t item, size_t thread) {
    __m256 s[10], x = _mm256_set1_ps(0.3f), y = _mm256_set1_ps(0.5f);
#pragma GCC unroll 12
    for (int i = 0; i < 10; i++) {
        s[i] = _mm256_set1_ps((float)i);
    }
    for (int k = 0; k < LOOPS; k++) {
#pragma GCC unroll 10
        for (int i = 0; i < 10; i++) {
            s[i] = _mm256_fmadd_ps(s[i], x, y);
            __asm__ volatile("" : "+x"(s[i]));
        }
    }
    __m256 sum = s[0];
#pragma GCC unroll 12
    for (int i = 1; i < 10; i++) {
        sum = _mm256_add_ps(sum, s[i]);
    }
    ((Bench *)context)->sink[thread * 8] ^= (uint64_t)_mm256_cvtss_f32(sum) + step + item;
}

/* Operations a second that the multipliers can do: 0 in 8 bits, 1 in floats, 2 in bfloat16 added up in floats; 0 where the CPU has no
 * such instruction or nobody wrote that loop. */
double bench_peak(Bench *b, int kind) {
    const double items = (double)(pool_threads(b->pool) * PIECES) * LOOPS;
    if (kind == 2) {
        return __builtin_cpu_supports("avx512bf16") ? items * 12 * 64 / run(b, peak512_bf16) : 0;
    }
    if (strncmp(b->kernels->name, "avx512", 6) == 0) {
        return items * 12 * (kind ? 32 : 128) / run(b, kind ? peak512_float : peak512_int8);
    }
    if (strcmp(b->kernels->name, "avx2") == 0) {
        return items * 10 * (kind ? 16 : 64) / run(b, kind ? peak2_float : peak2_int8);
    }
    return 0;
}
#else
double bench_peak(Bench *b, int kind) { return 0; }
#endif

static void product_work(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    const size_t panels = b->matrix.width / PANEL, count = pool_threads(b->pool) * PIECES;
    (void)step;
    (void)thread;
    for (size_t p = item * panels / count; p < (item + 1) * panels / count; p++) {
        const uint8_t *panel = b->data + p * b->matrix.panel_bytes;
        float *out = b->out + p * PANEL * b->rows;
        if (b->matrix.format == WEIGHT_INT4) {
            b->kernels->int4(&b->matrix, panel, &b->codes, 0, b->rows, out, PANEL);
        } else if (b->matrix.format == WEIGHT_INT8) {
            b->kernels->int8(&b->matrix, panel, &b->codes, 0, b->rows, out, PANEL);
        } else if (b->matrix.format == WEIGHT_FLOAT16) {
            b->kernels->float16((const uint16_t *)(const void *)panel, PANEL, b->matrix.depth, b->x, b->matrix.depth, b->rows, out, PANEL, false);
        } else {
            b->kernels->float32((const float *)(const void *)panel, PANEL, b->matrix.depth, b->x, b->matrix.depth, b->rows, out, PANEL, false);
        }
    }
}

/* Bytes of a panel of that format and depth. */
size_t bench_panel_bytes(int format, size_t depth, size_t block) {
    const PanelMatrix m = {.format = (WeightFormat)format, .depth = depth, .width = PANEL, .block = block};
    return block > 0 ? panel_bytes_of(&m, format == WEIGHT_INT4 ? 4 : 8) : (depth * PANEL * (format == WEIGHT_FLOAT16 ? 2 : 4) + 63) / 64 * 64;
}

/* Seconds for one product of `rows` rows with a packed matrix (64-byte aligned), activations in 8 bits included. */
double bench_product(Bench *b, int format, size_t depth, size_t width, size_t block, const uint8_t *data, size_t rows, const float *x) {
    const size_t blocks = (depth + BLOCK - 1) / BLOCK;
    b->matrix = (PanelMatrix){.format = (WeightFormat)format, .depth = depth, .width = width, .block = block, .scale = 1.0f,
                              .panel_bytes = bench_panel_bytes(format, depth, block), .data = data};
    b->data = data;
    b->rows = rows;
    b->x = x;
    b->out = malloc(width * rows * sizeof(float));
    b->codes = (QuantRows){.codes = malloc(rows * blocks * BLOCK), .scales = malloc(rows * blocks * 4), .offsets = malloc(rows * blocks * 4), .blocks = blocks};
    memset(b->out, 0, width * rows * sizeof(float));
    const double begin = now(b);
    for (size_t row = 0; block > 0 && row < rows; row++) {
        b->kernels->quantize(x + row * depth, depth, &b->codes, row);
    }
    const double seconds = now(b) - begin + run(b, product_work);
    free(b->out);
    free(b->codes.codes);
    free(b->codes.scales);
    free(b->codes.offsets);
    return seconds;
}

static void bytes_work(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    /* Four panels at a time, so that a row is read once for all of them. */
    const size_t panels = b->bytes_matrix.width / PANEL, fours = (panels + 3) / 4, count = pool_threads(b->pool) * PIECES;
    const size_t begin = item * fours / count * 4, last = (item + 1) * fours / count * 4, end = last < panels ? last : panels;
    (void)step;
    (void)thread;
    if (end > begin) {
        b->kernels->bytes(&b->bytes_matrix, begin, end - begin, &b->byte_rows, 0, b->rows, UNARY_IDENTITY, false, b->out + begin * PANEL, b->bytes_matrix.width);
    }
}

/* The same with one scale per row and output; `data` holds codes. */
double bench_bytes(Bench *b, size_t depth, size_t width, const uint8_t *data, size_t rows, const float *x) {
    const size_t stride = byte_stride(depth);
    float *scales = calloc(width, sizeof *scales);
    int32_t *sums = calloc(width, sizeof *sums);
    b->bytes_matrix = (ByteMatrix){.depth = depth, .width = width, .codes = (const int8_t *)data, .scales = scales, .sums = sums};
    b->byte_rows = (ByteRows){.codes = malloc(rows * stride), .scales = malloc(rows * 4), .zeros = malloc(rows * 4), .stride = stride};
    b->rows = rows;
    b->out = malloc(width * rows * sizeof(float));
    memset(b->out, 0, width * rows * sizeof(float));
    const double begin = now(b);
    for (size_t row = 0; row < rows; row++) {
        b->kernels->quantize_bytes(x + row * depth, depth, &b->byte_rows, row);
    }
    const double seconds = now(b) - begin + run(b, bytes_work);
    free(b->out);
    free(b->byte_rows.codes);
    free(b->byte_rows.scales);
    free(b->byte_rows.zeros);
    free(scales);
    free(sums);
    return seconds;
}

#define ATTENTION_ROWS 192 /* of an item: tokens times the query heads that share keys */

static size_t attention_pieces(void *context, size_t step, bool *small) {
    const Bench *b = context;
    (void)step;
    *small = false;
    const size_t each = ATTENTION_ROWS / b->group;
    return b->heads / b->group * ((b->rows + each - 1) / each);
}

static void attention_piece(void *context, size_t step, size_t item, size_t thread) {
    Bench *b = context;
    const size_t size = 64, kv = b->heads / b->group, each = ATTENTION_ROWS / b->group, head = item % kv, first = item / kv * each;
    const size_t tokens = b->rows - first < each ? b->rows - first : each;
    const float *query = b->x, *key = query + b->rows * b->heads * size, *value = key + b->rows * kv * size;
    b->kernels->attention(&(HeadAttention){.size = size, .group = b->group, .rows = tokens * b->group, .queries = query + (first * b->heads + head * b->group) * size,
                                           .query_stride = b->heads * size, .keys = key + head * size, .values = value + head * size, .key_stride = kv * size,
                                           .value_stride = kv * size, .format = CACHE_FLOAT32, .end = b->causal ? first + tokens : b->rows, .half = b->half,
                                           .causal = b->causal, .position = first, .scale = 0.125f, .out = b->out + (first * b->heads + head * b->group) * size,
                                           .out_stride = b->heads * size, .scratch = b->scratch[thread]});
    (void)step;
}

/* Seconds for attention over `tokens`, `heads` heads of 64 of which `group` share keys; x: queries, keys, values [tokens][heads · 64]. */
double bench_attention(Bench *b, size_t tokens, size_t heads, size_t group, int causal, int half, const float *x) {
    b->rows = tokens;
    b->heads = heads;
    b->group = group;
    b->causal = causal != 0;
    b->half = half != 0;
    b->x = x;
    b->out = malloc(tokens * heads * 64 * sizeof(float));
    memset(b->out, 0, tokens * heads * 64 * sizeof(float));
    for (size_t i = 0; i < pool_threads(b->pool) && b->scratch[i] == NULL; i++) {
        b->scratch[i] = aligned_alloc(64, (attention_bytes(ATTENTION_ROWS, 64) + 63) / 64 * 64);
    }
    const double begin = now(b);
    pool_run(b->pool, &(PoolJob){.steps = 1, .items = attention_pieces, .work = attention_piece, .context = b});
    const double seconds = now(b) - begin;
    free(b->out);
    return seconds;
}
