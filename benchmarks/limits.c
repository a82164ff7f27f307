/* What benchmarks/peers/limits.py and benchmarks/kernels.py hold speeds against. */
#define _POSIX_C_SOURCE 200809L
#include "limits.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

Limits *limits_open(size_t threads) {
    Limits *l = calloc(1, sizeof *l);
    if (l != NULL && (l->pool = pool_new(threads, true)) == NULL) {
        free(l);
        return NULL;
    }
    return l;
}

double limits_now(const Limits *l) {
    struct timespec t;
    clock_gettime(pool_threads(l->pool) == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    Pool *pool;
    void (*work)(void *, size_t, size_t, size_t);
    void *context;
} Job;

static size_t pieces(void *context, size_t step, bool *small) {
    const Job *job = context;
    (void)step;
    *small = false;
    return pool_threads(job->pool) * PIECES;
}

static void piece(void *context, size_t step, size_t item, size_t thread) {
    const Job *job = context;
    job->work(job->context, step, item, thread);
}

double limits_run(const Limits *l, void (*work)(void *, size_t, size_t, size_t), void *context) {
    Job job = {l->pool, work, context};
    const double begin = limits_now(l);
    pool_run(l->pool, &(PoolJob){.steps = 1, .items = pieces, .work = piece, .context = &job});
    return limits_now(l) - begin;
}

/* Reads a piece as so many streams side by side, four lines at a time; each line is asked for `ahead` bytes before, unless that is 0. A macro:
 * wide loads are lowered before anything is inlined. Past the end of the data asking does nothing. */
#define READ(name, target_of, streams, ahead)                                                               \
    target_of static void name(void *context, size_t step, size_t item, size_t thread) {                    \
        Limits *l = context;                                                                                \
        const size_t count = pool_threads(l->pool) * PIECES, each = l->bytes / count / 256 * 256;           \
        const uint8_t *p = l->data + item * each;                                                           \
        typedef uint64_t wide __attribute__((vector_size(64), aligned(8), may_alias));                      \
        wide sums[4] = {{0}, {0}, {0}, {0}};                                                                \
        for (size_t i = 0; i < each / (streams); i += 256 / (streams)) {                                    \
            _Pragma("GCC unroll 4") for (size_t k = 0; k < 4; k++) {                                        \
                const uint8_t *at = p + k % (streams) * (each / (streams)) + i + k / (streams) * 64;        \
                if ((ahead) > 0) {                                                                          \
                    __builtin_prefetch((const void *)((uintptr_t)at + (ahead)), 0, 2); /* to the 2nd cache */ \
                }                                                                                           \
                sums[k] ^= *(const wide *)(const void *)at;                                                 \
            }                                                                                               \
        }                                                                                                   \
        l->sink[thread * 8] ^= sums[0][0] ^ sums[1][1] ^ sums[2][2] ^ sums[3][3] ^ step;                    \
    }

READ(read_plain, , 1, 0)
READ(read_ahead, , 1, AHEAD)
READ(read_four, , 4, 0)
#if defined(__x86_64__)
#define WIDE __attribute__((target("avx512f")))
READ(wide_plain, WIDE, 1, 0)
READ(wide_ahead, WIDE, 1, AHEAD)
READ(wide_four, WIDE, 4, 0)
#endif

double limits_read(Limits *l, const uint8_t *data, size_t bytes, int loop) {
    static void (*const narrow[READ_LOOPS])(void *, size_t, size_t, size_t) = {read_plain, read_ahead, read_four};
    void (*work)(void *, size_t, size_t, size_t) = narrow[loop];
#if defined(__x86_64__)
    static void (*const wide[READ_LOOPS])(void *, size_t, size_t, size_t) = {wide_plain, wide_ahead, wide_four};
    if (__builtin_cpu_supports("avx512f")) {
        work = wide[loop];
    }
#endif
    l->data = data;
    l->bytes = bytes;
    return limits_run(l, work, l);
}

#if defined(__x86_64__)
#include <immintrin.h>

#define LOOPS 20000

/* A loop of `count` independent chains, so that the multipliers never wait for a result. `begin`: chain i's first value, `step_of`: its
 * next one, `place`: the register that the compiler must keep it in (it would fold the loop otherwise), `add` and `word`: what it all
 * comes to, so that nothing is left out. x and y are what is multiplied. */
#define PEAK(name, targets, type, operand, count, first, second, begin, step_of, place, add, word)                  \
    __attribute__((target(targets))) static void name(void *context, size_t step, size_t item, size_t thread) {     \
        operand x = first;                                                                                          \
        const operand y = second;                                                                                   \
        type s[count];                                                                                              \
        _Pragma("GCC unroll 12") for (int i = 0; i < count; i++) {                                                  \
            s[i] = begin;                                                                                           \
        }                                                                                                           \
        for (int k = 0; k < LOOPS; k++) {                                                                           \
            _Pragma("GCC unroll 12") for (int i = 0; i < count; i++) {                                              \
                __asm__ volatile("" : "+" place(x));                                                                \
                s[i] = step_of;                                                                                     \
                __asm__ volatile("" : "+" place(s[i]));                                                             \
            }                                                                                                       \
        }                                                                                                           \
        type sum = s[0];                                                                                            \
        _Pragma("GCC unroll 12") for (int i = 1; i < count; i++) {                                                  \
            sum = add(sum, s[i]);                                                                                   \
        }                                                                                                           \
        ((Limits *)context)->sink[thread * 8] ^= (uint64_t)(word) + step + item;                                    \
    }

PEAK(peak512_int8, "avx512f,avx512vnni", __m512i, __m512i, 12, _mm512_set1_epi32(0x03030303), _mm512_set1_epi32(0x05050505),
     _mm512_set1_epi32(i), _mm512_dpbusd_epi32(s[i], x, y), "v", _mm512_add_epi32, _mm512_reduce_add_epi32(sum))
PEAK(peak512_float, "avx512f", __m512, __m512, 12, _mm512_set1_ps(0.3f), _mm512_set1_ps(0.5f), _mm512_set1_ps((float)i),
     _mm512_fmadd_ps(s[i], x, y), "v", _mm512_add_ps, _mm512_reduce_add_ps(sum))
PEAK(peak512_bf16, "avx512f,avx512bf16", __m512, __m512bh, 12, (__m512bh)_mm512_set1_epi32(0x3e993e99) /* 0.3 */,
     (__m512bh)_mm512_set1_epi32(0x3f003f00) /* 0.5 */, _mm512_set1_ps((float)i), _mm512_dpbf16_ps(s[i], x, y), "v", _mm512_add_ps,
     _mm512_reduce_add_ps(sum))
/* Multiply, widen, add: three instructions for 32 products; the additions of pairs may wait, so this is what 8-bit weights allow. */
PEAK(peak2_int8, "avx2", __m256i, __m256i, 10, _mm256_set1_epi8(3), _mm256_set1_epi8(5), _mm256_set1_epi16((short)i),
     _mm256_add_epi16(s[i], _mm256_maddubs_epi16(x, y)), "x", _mm256_add_epi16, _mm256_extract_epi32(sum, 0))
PEAK(peak2_float, "avx2,fma", __m256, __m256, 10, _mm256_set1_ps(0.3f), _mm256_set1_ps(0.5f), _mm256_set1_ps((float)i),
     _mm256_fmadd_ps(s[i], x, y), "x", _mm256_add_ps, _mm256_cvtss_f32(sum))

double limits_peak(Limits *l, const char *family, int kind) {
    const double items = (double)(pool_threads(l->pool) * PIECES) * LOOPS;
    const bool any = family == NULL || *family == '\0', vnni = __builtin_cpu_supports("avx512vnni");
    if (kind == PEAK_BFLOAT16) {
        return __builtin_cpu_supports("avx512bf16") ? items * 12 * 64 / limits_run(l, peak512_bf16, l) : 0;
    }
    if (any ? vnni : strncmp(family, "avx512", 6) == 0) {
        return items * 12 * (kind ? 32 : 128) / limits_run(l, kind ? peak512_float : peak512_int8, l);
    }
    if (any ? __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") : strcmp(family, "avx2") == 0) {
        return items * 10 * (kind ? 16 : 64) / limits_run(l, kind ? peak2_float : peak2_int8, l);
    }
    return 0;
}
#else
double limits_peak(Limits *l, const char *family, int kind) {
    (void)l;
    (void)family;
    (void)kind;
    return 0;
}
#endif
