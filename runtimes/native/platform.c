#ifndef _WIN32
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#endif
#include "platform.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32

#include <windows.h>

wchar_t *platform_wide_path(const char *path) {
    const int size = MultiByteToWideChar(CP_UTF8, 0, path, -1, NULL, 0);
    wchar_t *wide = size > 0 ? malloc((size_t)size * sizeof *wide) : NULL;
    if (wide != NULL) {
        MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, size);
    }
    return wide;
}

void *platform_library_open(const char *path, char *message, size_t message_size) {
    HMODULE library = NULL;
    wchar_t *wide = platform_wide_path(path);
    if (wide != NULL) {
        library = LoadLibraryExW(wide, NULL, LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR | LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
        free(wide);
    }
    if (library == NULL) {
        snprintf(message, message_size, "LoadLibrary failed with error %lu", (unsigned long)GetLastError());
    }
    return (void *)library;
}

void *platform_library_symbol(void *library, const char *name) {
    return (void *)(uintptr_t)GetProcAddress((HMODULE)library, name);
}

void *platform_zeroed_alloc(size_t bytes) { return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

void platform_zeroed_free(void *memory, size_t bytes) {
    (void)bytes;
    if (memory != NULL) {
        VirtualFree(memory, 0, MEM_RELEASE);
    }
}

void platform_forget(void *memory, size_t bytes) {
    (void)memory;
    (void)bytes;
}

void platform_large_pages(void *memory, size_t bytes) {
    (void)memory;
    (void)bytes;
}

bool platform_fill(const void *memory, size_t bytes) {
    (void)memory;
    (void)bytes;
    return false;
}

void platform_trim_heap(void) {}

double platform_seconds(void) {
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    return (double)now.QuadPart / (double)frequency.QuadPart;
}

int platform_mutex_init(PlatformMutex *mutex) {
    InitializeSRWLock((SRWLOCK *)mutex);
    return 0;
}
void platform_mutex_destroy(PlatformMutex *mutex) { (void)mutex; }
void platform_mutex_lock(PlatformMutex *mutex) { AcquireSRWLockExclusive((SRWLOCK *)mutex); }
void platform_mutex_unlock(PlatformMutex *mutex) { ReleaseSRWLockExclusive((SRWLOCK *)mutex); }

#else

#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

void *platform_library_open(const char *path, char *message, size_t message_size) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *reason = dlerror();
        snprintf(message, message_size, "%s", reason != NULL ? reason : "dlopen failed");
    }
    return library;
}

void *platform_library_symbol(void *library, const char *name) { return dlsym(library, name); }

#if defined(__SANITIZE_ADDRESS__)
/* From the heap, so that AddressSanitizer guards both ends. */
void *platform_zeroed_alloc(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes) != 0) {
        return NULL;
    }
    return memset(memory, 0, bytes);
}

void platform_zeroed_free(void *memory, size_t bytes) {
    (void)bytes;
    free(memory);
}
#else
void *platform_zeroed_alloc(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void platform_zeroed_free(void *memory, size_t bytes) {
    if (memory != NULL) {
        munmap(memory, bytes);
    }
}
#endif

void platform_forget(void *memory, size_t bytes) {
#ifdef __linux__ /* elsewhere MADV_DONTNEED is a hint that changes nothing */
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)memory + page - 1) / page * page, last = ((uintptr_t)memory + bytes) / page * page;
    if (memory != NULL && last > first) {
        madvise((void *)first, last - first, MADV_DONTNEED);
    }
#else
    (void)memory;
    (void)bytes;
#endif
}

void platform_large_pages(void *memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)memory + page - 1) / page * page, last = ((uintptr_t)memory + bytes) / page * page;
    if (memory != NULL && last > first) {
        madvise((void *)first, last - first, MADV_HUGEPAGE);
    }
#else
    (void)memory;
    (void)bytes;
#endif
}

bool platform_fill(const void *memory, size_t bytes) {
#ifdef __linux__
    const int populate = 22; /* MADV_POPULATE_READ, Linux 5.14; madvise(2): fails, without a signal, where pages cannot be read */
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), end = (uintptr_t)memory + bytes;
    const size_t most = (size_t)4 << 20; /* at once: meanwhile other threads can map nothing */
    uintptr_t at = (uintptr_t)memory / page * page;
    madvise((void *)at, end - at, MADV_WILLNEED);
    while (at < end) {
        const size_t size = end - at < most ? end - at : most;
        if (madvise((void *)at, size, populate) == 0) {
            at += size;
        } else if (errno != EINTR) {
            return false;
        }
    }
    return true;
#else
    (void)memory;
    (void)bytes;
    return false;
#endif
}

void platform_trim_heap(void) {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

double platform_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int platform_mutex_init(PlatformMutex *mutex) { return pthread_mutex_init(mutex, NULL); }
void platform_mutex_destroy(PlatformMutex *mutex) { pthread_mutex_destroy(mutex); }
void platform_mutex_lock(PlatformMutex *mutex) { pthread_mutex_lock(mutex); }
void platform_mutex_unlock(PlatformMutex *mutex) { pthread_mutex_unlock(mutex); }

#endif
