#ifndef _WIN32
#define _DEFAULT_SOURCE
#endif
#include "pool.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef _WIN32
#include <windows.h>
typedef HANDLE Thread;
typedef SRWLOCK Lock;
typedef CONDITION_VARIABLE Condition;
#define THREAD_RESULT DWORD WINAPI
#define lock_init(l) InitializeSRWLock(l)
#define lock_take(l) AcquireSRWLockExclusive(l)
#define lock_give(l) ReleaseSRWLockExclusive(l)
#define condition_init(c) InitializeConditionVariable(c)
#define condition_wait(c, l) SleepConditionVariableSRW(c, l, INFINITE, 0)
#define condition_wake(c) WakeAllConditionVariable(c)
#else
#include <pthread.h>
typedef pthread_t Thread;
typedef pthread_mutex_t Lock;
typedef pthread_cond_t Condition;
#define THREAD_RESULT void *
#define lock_init(l) pthread_mutex_init(l, NULL)
#define lock_take(l) pthread_mutex_lock(l)
#define lock_give(l) pthread_mutex_unlock(l)
#define condition_init(c) pthread_cond_init(c, NULL)
#define condition_wait(c, l) pthread_cond_wait(c, l)
#define condition_wake(c) pthread_cond_broadcast(c)
#endif

#if defined(__x86_64__) || defined(__i386__)
#define relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define relax() __asm__ volatile("yield")
#else
#define relax() ((void)0)
#endif

#define SPINS 10000 /* a few hundred microseconds: longer than choosing a token takes */

/* The open step as one word, so that an item is claimed by one atomic addition and never from a step that is over:
 * [its number | items | next item]. */
#define FIELD 21
#define ONE_STEP ((uint64_t)1 << (2 * FIELD))
#define NEXT(word) ((word) & (((uint64_t)1 << FIELD) - 1))
#define ITEMS(word) ((word) >> FIELD & (((uint64_t)1 << FIELD) - 1))

typedef struct {
    Pool *pool;
    size_t index;
} Worker;

struct Pool {
    _Alignas(64) atomic_uint_fast64_t word;
    _Alignas(64) atomic_size_t done;      /* items of the open step that are finished */
    _Alignas(64) atomic_size_t sleepers;
    atomic_bool finished, quit;
    const PoolJob *job;
    size_t step;
    size_t threads, started, spins;
    Lock lock;
    Condition changed;
    Thread handles[POOL_MAX_THREADS];
    Worker workers[POOL_MAX_THREADS];
};

static bool has_item(uint64_t word) { return NEXT(word) < ITEMS(word); }

static void wake(Pool *pool) {
    if (atomic_load(&pool->sleepers) > 0) {
        lock_take(&pool->lock);
        condition_wake(&pool->changed);
        lock_give(&pool->lock);
    }
}

/* Opens the next step that is worth sharing; those before it are run right here. Called by one thread, with no step open. */
static void advance(Pool *pool, size_t thread) {
    const PoolJob *job = pool->job;
    for (size_t step = pool->step + 1; step < job->steps; step++) {
        bool small = false;
        const size_t items = job->items(job->context, step, &small);
        if (items > 1 && !small) {
            pool->step = step;
            atomic_store(&pool->done, 0);
            const uint64_t number = atomic_load_explicit(&pool->word, memory_order_relaxed) / ONE_STEP + 1;
            atomic_store(&pool->word, number * ONE_STEP | (uint64_t)items << FIELD);
            wake(pool);
            return;
        }
        for (size_t item = 0; item < items; item++) {
            job->work(job->context, step, item, thread);
        }
    }
    atomic_store(&pool->finished, true);
    wake(pool);
}

/* Takes items until the open step has none left. */
static void take_items(Pool *pool, size_t thread) {
    while (has_item(atomic_load_explicit(&pool->word, memory_order_relaxed))) {
        const uint64_t word = atomic_fetch_add(&pool->word, 1);
        if (!has_item(word)) {
            return;
        }
        /* The step cannot end before this item does, so what belongs to it stands still. */
        pool->job->work(pool->job->context, pool->step, (size_t)NEXT(word), thread);
        if (atomic_fetch_add(&pool->done, 1) + 1 == ITEMS(word)) {
            advance(pool, thread);
        }
    }
}

/* Until there are items, or `flag`. */
static void wait_for_items(Pool *pool, const atomic_bool *flag) {
    for (size_t i = 0; i < pool->spins; i++) {
        if (has_item(atomic_load_explicit(&pool->word, memory_order_relaxed)) || atomic_load_explicit(flag, memory_order_relaxed)) {
            return;
        }
        relax();
    }
    lock_take(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_item(atomic_load(&pool->word)) && !atomic_load(flag)) {
        condition_wait(&pool->changed, &pool->lock);
    }
    atomic_fetch_sub(&pool->sleepers, 1);
    lock_give(&pool->lock);
}

static THREAD_RESULT worker_main(void *argument) {
    const Worker *worker = argument;
    while (!atomic_load(&worker->pool->quit)) {
        wait_for_items(worker->pool, &worker->pool->quit);
        take_items(worker->pool, worker->index);
    }
    return 0;
}

static bool start(Worker *worker, Thread *handle) {
#ifdef _WIN32
    *handle = CreateThread(NULL, 0, worker_main, worker, 0, NULL);
    return *handle != NULL;
#else
    return pthread_create(handle, NULL, worker_main, worker) == 0;
#endif
}

static void join(Thread handle) {
#ifdef _WIN32
    WaitForSingleObject(handle, INFINITE);
    CloseHandle(handle);
#else
    pthread_join(handle, NULL);
#endif
}

Pool *pool_new(size_t threads, bool spin) {
    Pool *pool = NULL;
#ifdef _WIN32
    pool = _aligned_malloc(sizeof *pool, 64);
#else
    if (posix_memalign((void **)&pool, 64, sizeof *pool) != 0) {
        pool = NULL;
    }
#endif
    if (pool == NULL) {
        return NULL;
    }
    *pool = (Pool){.threads = threads < 1 ? 1 : threads > POOL_MAX_THREADS ? POOL_MAX_THREADS : threads};
    atomic_init(&pool->word, 0);
    atomic_init(&pool->done, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->finished, true);
    atomic_init(&pool->quit, false);
    pool->spins = spin ? SPINS : 0;
    lock_init(&pool->lock);
    condition_init(&pool->changed);
    for (size_t i = 1; i < pool->threads; i++) {
        pool->workers[i] = (Worker){pool, i};
        if (!start(&pool->workers[i], &pool->handles[i])) {
            pool_free(pool);
            return NULL;
        }
        pool->started = i;
    }
    return pool;
}

void pool_free(Pool *pool) {
    if (pool == NULL) {
        return;
    }
    atomic_store(&pool->quit, true);
    lock_take(&pool->lock);
    condition_wake(&pool->changed);
    lock_give(&pool->lock);
    for (size_t i = 1; i <= pool->started; i++) {
        join(pool->handles[i]);
    }
#ifdef _WIN32
    _aligned_free(pool);
#else
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->changed);
    free(pool);
#endif
}

size_t pool_threads(const Pool *pool) { return pool->threads; }

void pool_run(Pool *pool, const PoolJob *job) {
    if (pool->threads == 1) {
        for (size_t step = 0; step < job->steps; step++) {
            bool small;
            const size_t items = job->items(job->context, step, &small);
            for (size_t item = 0; item < items; item++) {
                job->work(job->context, step, item, 0);
            }
        }
        return;
    }
    pool->job = job;
    pool->step = SIZE_MAX; /* the one before the first */
    atomic_store(&pool->finished, false);
    advance(pool, 0);
    while (!atomic_load(&pool->finished)) {
        take_items(pool, 0);
        if (!atomic_load(&pool->finished)) {
            wait_for_items(pool, &pool->finished);
        }
    }
}
