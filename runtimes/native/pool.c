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
#define LINE 64
#define LINES 2     /* of memory that are asked for between two looks at whether there is work */

/* A thread's share of the open step, [end | next item] in one word, so that an item is claimed by one atomic addition: by the thread
 * itself, which finds its memory near, or by one that has none left. Whose step it is does not matter to the claim: a step does not end
 * before all of its items are counted, so what is claimed belongs to the one that is open. */
typedef struct {
    _Alignas(LINE) atomic_uint_fast64_t word;
} Share;

#define NEXT(word) ((size_t)((word) & UINT32_MAX))
#define END(word) ((size_t)((word) >> 32))

typedef struct {
    _Alignas(LINE) Pool *pool;
    size_t index;
    PoolAhead ahead[POOL_AHEAD]; /* what is still to be asked for, from `first` on */
    size_t first;
} Worker;

struct Pool {
    _Alignas(LINE) atomic_size_t opened; /* steps so far; what follows on this line is written before it */
    const PoolJob *job;
    size_t step, total;                  /* total: its items, and one that whoever opened it holds while it does so */
    atomic_bool finished, quit;
    _Alignas(LINE) atomic_size_t done;   /* items of the open step that are finished and counted */
    _Alignas(LINE) atomic_size_t sleepers;
    size_t threads, started, spins;
    Lock lock;
    Condition changed;
    Thread handles[POOL_MAX_THREADS];
    Share shares[POOL_MAX_THREADS];
    Worker workers[POOL_MAX_THREADS];
};

static bool has_item(uint64_t word) { return NEXT(word) < END(word); }

static void wake(Pool *pool) {
    if (atomic_load(&pool->sleepers) > 0) {
        lock_take(&pool->lock);
        condition_wake(&pool->changed);
        lock_give(&pool->lock);
    }
}

size_t pool_share(size_t items, size_t threads, size_t thread) { return items * thread / threads; }

/* Opens the next step that is worth sharing; those before it are run right here. Called by one thread, with no step open; false when there
 * is none left. True: the caller holds one item, to be counted when its others are. */
static bool advance(Pool *pool, size_t thread) {
    const PoolJob *job = pool->job;
    for (size_t step = pool->step + 1; step < job->steps; step++) {
        bool small = false;
        const size_t items = job->items(job->context, step, &small);
        if (items > 1 && !small) {
            pool->step = step;
            pool->total = items + 1;
            atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
            for (size_t i = 0; i < pool->threads; i++) {
                const uint64_t begin = pool_share(items, pool->threads, i), end = pool_share(items, pool->threads, i + 1);
                atomic_store_explicit(&pool->shares[i].word, end << 32 | begin, memory_order_release);
            }
            atomic_fetch_add(&pool->opened, 1);
            wake(pool);
            return true;
        }
        for (size_t item = 0; item < items; item++) {
            job->work(job->context, step, item, thread);
        }
    }
    atomic_store(&pool->finished, true);
    wake(pool);
    return false;
}

/* What the thread will read after this step, so that it can be asked for while there is nothing to do. Called with an item held. */
static void look_ahead(Pool *pool, size_t thread) {
    Worker *worker = &pool->workers[thread];
    worker->first = POOL_AHEAD;
    if (pool->job->ahead != NULL) {
        const size_t count = pool->job->ahead(pool->job->context, pool->step, thread, worker->ahead);
        worker->first = 0;
        for (size_t i = count; i < POOL_AHEAD; i++) {
            worker->ahead[i] = (PoolAhead){0};
        }
    }
}

/* Asking for memory that is gone by now does nothing. */
void pool_ask(Pool *pool, size_t thread, size_t lines) {
    Worker *worker = &pool->workers[thread];
    while (worker->first < POOL_AHEAD && lines > 0) {
        PoolAhead *next = &worker->ahead[worker->first];
        for (; lines > 0 && next->bytes > 0; lines--) {
            __builtin_prefetch(next->data, 0, 2);
            const size_t step = next->bytes < LINE ? next->bytes : LINE;
            next->data += step;
            next->bytes -= step;
        }
        worker->first += next->bytes == 0;
    }
}

/* Takes items until the open step, and those that this thread opens itself, have none left. `held`: items it has already, to be counted. */
static void take_items(Pool *pool, size_t thread, size_t held) {
    for (;;) {
        size_t taken = held;
        bool looked = false;
        for (size_t i = 0; i < pool->threads; i++) {
            Share *share = &pool->shares[(thread + i) % pool->threads];
            while (has_item(atomic_load_explicit(&share->word, memory_order_relaxed))) {
                const uint64_t word = atomic_fetch_add(&share->word, 1);
                if (!has_item(word)) {
                    break;
                }
                /* The step cannot end before this item is counted, so what belongs to it stands still. */
                if (!looked) {
                    look_ahead(pool, thread);
                    looked = true;
                }
                pool->job->work(pool->job->context, pool->step, NEXT(word), thread);
                taken++;
            }
        }
        if (taken == 0) {
            return;
        }
        const size_t total = pool->total;
        if (atomic_fetch_add(&pool->done, taken) + taken != total || !advance(pool, thread)) {
            return;
        }
        held = 1;
    }
}

/* Until a step is opened after number `seen`, or `flag`. */
static void wait_for_step(Pool *pool, size_t thread, size_t seen, const atomic_bool *flag) {
    for (size_t i = 0; i < pool->spins; i++) {
        if (atomic_load_explicit(&pool->opened, memory_order_relaxed) != seen || atomic_load_explicit(flag, memory_order_relaxed)) {
            return;
        }
        if (pool->workers[thread].first < POOL_AHEAD) {
            pool_ask(pool, thread, LINES);
        } else {
            relax();
        }
    }
    lock_take(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->opened) == seen && !atomic_load(flag)) {
        condition_wait(&pool->changed, &pool->lock);
    }
    atomic_fetch_sub(&pool->sleepers, 1);
    lock_give(&pool->lock);
}

static THREAD_RESULT worker_main(void *argument) {
    const Worker *worker = argument;
    Pool *pool = worker->pool;
    while (!atomic_load(&pool->quit)) {
        const size_t seen = atomic_load(&pool->opened);
        take_items(pool, worker->index, 0);
        wait_for_step(pool, worker->index, seen, &pool->quit);
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
    atomic_init(&pool->opened, 0);
    atomic_init(&pool->done, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->finished, true);
    atomic_init(&pool->quit, false);
    pool->spins = spin ? SPINS : 0;
    lock_init(&pool->lock);
    condition_init(&pool->changed);
    for (size_t i = 0; i < pool->threads; i++) {
        atomic_init(&pool->shares[i].word, 0);
        pool->workers[i] = (Worker){.pool = pool, .index = i, .first = POOL_AHEAD};
    }
    for (size_t i = 1; i < pool->threads; i++) {
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
    if (advance(pool, 0)) {
        take_items(pool, 0, 1);
    }
    while (!atomic_load(&pool->finished)) {
        const size_t seen = atomic_load(&pool->opened);
        take_items(pool, 0, 0);
        wait_for_step(pool, 0, seen, &pool->finished);
    }
}
