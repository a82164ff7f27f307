/* The thread pool: every item of every step runs once, and no step begins before the one before it is done; what lies ahead is asked of
 * a thread while it holds an item of that step. `pool_test THREADS` */
#include "../../../../runtimes/native/pool.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define STEPS 400
#define MOST 50

typedef struct {
    size_t items[STEPS];
    bool small[STEPS];
    /* Plain memory: a race between steps is a race that ThreadSanitizer sees. */
    uint32_t ran[STEPS][MOST];
    uint64_t sums[STEPS + 1];
    atomic_size_t wrong, asked;
    uint8_t memory[MOST * 64];
    Pool *pool;
} Job;

static size_t items(void *context, size_t step, bool *small) {
    const Job *job = context;
    *small = job->small[step];
    return job->items[step];
}

static void work(void *context, size_t step, size_t item, size_t thread) {
    Job *job = context;
    if (step > 0) { /* what every item of the step before left is there */
        for (size_t i = 0; i < job->items[step - 1]; i++) {
            if (job->ran[step - 1][i] != 1) {
                atomic_fetch_add(&job->wrong, 1);
            }
        }
    }
    job->ran[step][item]++;
    pool_ask(job->pool, thread, item % 3);
}

static size_t ahead(void *context, size_t step, size_t thread, PoolAhead ahead[POOL_AHEAD]) {
    Job *job = context;
    atomic_fetch_add(&job->asked, 1);
    for (size_t i = 0; step > 0 && i < job->items[step - 1]; i++) {
        if (job->ran[step - 1][i] != 1) { /* read while the step is open: a race if it were not */
            atomic_fetch_add(&job->wrong, 1);
        }
    }
    for (size_t i = 0; i < POOL_AHEAD; i++) {
        ahead[i] = (PoolAhead){job->memory + 64 * (i + thread), 1 + (step + i) % 200};
    }
    return step % (POOL_AHEAD + 1);
}

int main(int count, char **arguments) {
    const size_t threads = count > 1 ? (size_t)atoi(arguments[1]) : 2;
    size_t wrong = 0;
    uint32_t state = 1;
    for (int spin = 0; spin < 2; spin++) {
        Pool *pool = pool_new(threads, spin != 0);
        if (pool == NULL || pool_threads(pool) != threads) {
            printf("no pool\n");
            return 1;
        }
        for (size_t run = 0; run < 20; run++) {
            Job *job = calloc(1, sizeof *job);
            for (size_t i = 0; i < STEPS; i++) {
                state = state * 1664525u + 1013904223u;
                job->items[i] = state >> 8 & 15 ? (state >> 16) % MOST : 0;
                job->small[i] = (state >> 28) == 0;
            }
            job->pool = pool;
            pool_run(pool, &(PoolJob){.steps = STEPS, .items = items, .work = work, .ahead = run % 2 ? ahead : NULL, .context = job});
            for (size_t i = 0; i < STEPS; i++) {
                for (size_t k = 0; k < MOST; k++) {
                    wrong += job->ran[i][k] != (k < job->items[i]);
                }
            }
            wrong += atomic_load(&job->wrong);
            wrong += (atomic_load(&job->asked) > 0) != (run % 2 == 1 && threads > 1);
            free(job);
        }
        pool_free(pool);
    }
    pool_free(pool_new(threads, true)); /* never used */
    for (size_t count = 0; count < 200; count++) { /* shares are one after another, and all of it */
        wrong += pool_share(count, threads, 0) != 0 || pool_share(count, threads, threads) != count;
        for (size_t i = 0; i < threads; i++) {
            wrong += pool_share(count, threads, i) > pool_share(count, threads, i + 1);
        }
    }
    printf("%zu threads: %zu wrong\n", threads, wrong);
    return wrong > 0;
}
