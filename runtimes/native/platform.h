/* The few things that differ between operating systems: shared libraries, large zeroed memory, locks, the clock. */
#ifndef VLM_PLATFORM_H
#define VLM_PLATFORM_H

#include <stdbool.h>
#include <stddef.h>

/* Opens a shared library by UTF-8 path; NULL on failure, with the reason in `message`. */
void *platform_library_open(const char *path, char *message, size_t message_size);
/* The address of an exported function as a data pointer, or NULL. */
void *platform_library_symbol(void *library, const char *name);

/* Zeroed memory, at least 64-byte aligned, whose pages cost nothing until they are written. NULL when it cannot be had. */
void *platform_zeroed_alloc(size_t bytes);
void platform_zeroed_free(void *memory, size_t bytes);

/* Gives the pages of memory back that holds nothing any more; it stays allocated, and is taken anew where it is written. Does nothing
 * on systems without such a call. */
void platform_forget(void *memory, size_t bytes);
/* Asks for large pages for memory of many megabytes that is not yet written: it is then there in a few steps instead of one per 4 KiB. Whole
 * large pages within it only, and only a request. */
void platform_large_pages(void *memory, size_t bytes);
/* Brings pages of a mapped file into memory. False where the system cannot do that, or cannot read them: then reading the file says why. */
bool platform_fill(const void *memory, size_t bytes);
/* Gives back what the C library keeps of freed memory, where it can be told to. */
void platform_trim_heap(void);

/* Seconds of a monotonic clock. */
double platform_seconds(void);

#ifdef _WIN32
#include <wchar.h>
/* A UTF-8 path as UTF-16 from malloc, or NULL. */
wchar_t *platform_wide_path(const char *path);

typedef struct {
    void *state;
} PlatformMutex; /* layout of SRWLOCK, which needs no destruction */
#define PLATFORM_MUTEX_INITIALIZER {0}
#else
#include <pthread.h>
typedef pthread_mutex_t PlatformMutex;
#define PLATFORM_MUTEX_INITIALIZER PTHREAD_MUTEX_INITIALIZER
#endif

int platform_mutex_init(PlatformMutex *mutex);
void platform_mutex_destroy(PlatformMutex *mutex);
void platform_mutex_lock(PlatformMutex *mutex);
void platform_mutex_unlock(PlatformMutex *mutex);

#endif
