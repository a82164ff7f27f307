/* The machine's limits: bytes read and operations done a second, on threads of the runtime's own pool. */
#ifndef BENCH_LIMITS_H
#define BENCH_LIMITS_H
#include "../runtimes/native/pool.h"

#include <stddef.h>
#include <stdint.h>

#define PIECES 64  /* per thread */
#define AHEAD 6144 /* bytes, as the kernels of runtimes/native/kernels/avx512.c do */

typedef struct {
    Pool *pool;
    const uint8_t *data;
    size_t bytes;
    uint64_t sink[POOL_MAX_THREADS * 8];
} Limits;

/* One line after the other; each asked for AHEAD bytes before it is read; four streams side by side. */
typedef enum { READ_PLAIN, READ_AHEAD, READ_FOUR, READ_LOOPS } ReadLoop;
typedef enum { PEAK_INT8, PEAK_FLOAT32, PEAK_BFLOAT16 } PeakKind;

Limits *limits_open(size_t threads);

/* Seconds; one thread is timed by the processor time it was given, which others on the machine do not take from it. */
double limits_now(const Limits *l);

/* Seconds for `work` on PIECES items a thread; it is given `context`. */
double limits_run(const Limits *l, void (*work)(void *, size_t, size_t, size_t), void *context);

/* Seconds to read so many bytes once. Which loop is the fastest differs between CPUs, sizes of pages and minutes, so the limit is the best of
 * all of them. */
double limits_read(Limits *l, const uint8_t *data, size_t bytes, int loop);

/* Operations a second that the multipliers can do, with the instructions of a family (a name that begins with "avx512" or is "avx2";
 * empty: the best that this CPU has); a multiplication and an addition are two. 0 where the CPU has no such instruction or nobody wrote
 * that loop. */
double limits_peak(Limits *l, const char *family, int kind);
#endif
