/* Threads that run one job together: a list of steps, each of so many independent items, one step after another.
 *
 * Each thread begins with its own share of a step's items, [pool_share(items, threads, thread), … of the next thread), so that it can know
 * beforehand what it will read, and helps others when it has none left: a thread that is late is not waited for. Whoever finishes the last
 * item goes on. Between steps threads ask for the memory they will read next, spin for a short while and then sleep. What an item computes must not depend on the thread that runs it. */
#ifndef VLM_POOL_H
#define VLM_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define POOL_MAX_THREADS 64
#define POOL_MAX_ITEMS ((size_t)1 << 20)

typedef struct Pool Pool;

#define POOL_AHEAD 16

/* Memory that is read soon. */
typedef struct {
    const uint8_t *data;
    size_t bytes;
} PoolAhead;

typedef struct {
    size_t steps;
    /* How many items a step has (fewer than POOL_MAX_ITEMS), asked once, when the steps before it are done. `small`: not worth sharing. */
    size_t (*items)(void *context, size_t step, bool *small);
    void (*work)(void *context, size_t step, size_t item, size_t thread);
    /* NULL, or what a thread will read after a step, in that order: up to POOL_AHEAD stretches, and how many. */
    size_t (*ahead)(void *context, size_t step, size_t thread, PoolAhead ahead[POOL_AHEAD]);
    void *context;
} PoolJob;

/* `threads` with the caller's own. NULL when memory or threads cannot be had. */
Pool *pool_new(size_t threads, bool spin);
void pool_free(Pool *pool);
size_t pool_threads(const Pool *pool);

/* Where a thread's share of a step's items begins. */
size_t pool_share(size_t items, size_t threads, size_t thread);

/* Called from work that computes more than it reads: asks for up to so many lines of what the thread reads after this step. */
void pool_ask(Pool *pool, size_t thread, size_t lines);

/* Runs the job and returns when all of it is done. One caller at a time. */
void pool_run(Pool *pool, const PoolJob *job);

#endif
