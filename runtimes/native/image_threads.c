#ifndef _WIN32
#define _DEFAULT_SOURCE
#include <unistd.h>
#endif
#include "image_threads.h"

#include <stdatomic.h>

#ifdef _WIN32
static long process(void) { return 0; }
#else
static long process(void) { return (long)getpid(); }
#endif

static struct {
    atomic_flag busy;
    Pool *pool;
    long process;
} shared = {.busy = ATOMIC_FLAG_INIT};

static void run_alone(const PoolJob *job) {
    for (size_t step = 0; step < job->steps; step++) {
        bool small;
        const size_t items = job->items(job->context, step, &small);
        for (size_t item = 0; item < items; item++) {
            job->work(job->context, step, item, 0);
        }
    }
}

void image_run(const PoolJob *job, size_t threads) {
    threads = threads < POOL_MAX_THREADS ? threads : POOL_MAX_THREADS;
    if (threads < 2 || atomic_flag_test_and_set_explicit(&shared.busy, memory_order_acquire)) {
        run_alone(job);
        return;
    }
    if (shared.pool != NULL && shared.process != process()) {
        shared.pool = NULL; /* a fork took none of the threads along; what is left of the pool is the parent's */
    }
    if (shared.pool != NULL && pool_threads(shared.pool) != threads) {
        pool_free(shared.pool);
        shared.pool = NULL;
    }
    if (shared.pool == NULL) {
        shared.pool = pool_new(threads, false);
        shared.process = process();
    }
    if (shared.pool != NULL) {
        pool_run(shared.pool, job);
    } else {
        run_alone(job);
    }
    atomic_flag_clear_explicit(&shared.busy, memory_order_release);
}
