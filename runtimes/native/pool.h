/* Threads that run one job together: a list of steps, each of so many independent items, one step after another.
 *
 * Between steps threads spin for a short while and then sleep. A thread that is late is not waited for: whoever is there takes the
 * items, and whoever finishes the last one goes on. What an item computes must not depend on the thread that runs it. */
#ifndef VLM_POOL_H
#define VLM_POOL_H

#include <stdbool.h>
#include <stddef.h>

#define POOL_MAX_THREADS 64
#define POOL_MAX_ITEMS ((size_t)1 << 20)

typedef struct Pool Pool;

typedef struct {
    size_t steps;
    /* How many items a step has (fewer than POOL_MAX_ITEMS), asked once, when the steps before it are done. `small`: not worth sharing. */
    size_t (*items)(void *context, size_t step, bool *small);
    void (*work)(void *context, size_t step, size_t item, size_t thread);
    void *context;
} PoolJob;

/* `threads` with the caller's own. NULL when memory or threads cannot be had. */
Pool *pool_new(size_t threads, bool spin);
void pool_free(Pool *pool);
size_t pool_threads(const Pool *pool);

/* Runs the job and returns when all of it is done. One caller at a time. */
void pool_run(Pool *pool, const PoolJob *job);

#endif
