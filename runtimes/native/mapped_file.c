/* A file mapped for reading, or read piece by piece. */
#ifndef _WIN32
#define _DEFAULT_SOURCE
#endif
#include "plan.h"

#ifdef _WIN32
#include <windows.h>
#else
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#ifdef _WIN32
void *mapped_open(const char *path, size_t *bytes, int *descriptor) {
    *descriptor = -1;
    wchar_t wide[32768];
    if (MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 32768) == 0) {
        return NULL;
    }
    HANDLE file = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
    LARGE_INTEGER size = {0};
    void *memory = NULL;
    if (file != INVALID_HANDLE_VALUE && GetFileSizeEx(file, &size) && size.QuadPart > 0) {
        HANDLE mapping = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
        if (mapping != NULL) {
            memory = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
            CloseHandle(mapping);
        }
    }
    if (file != INVALID_HANDLE_VALUE) {
        CloseHandle(file);
    }
    *bytes = (size_t)size.QuadPart;
    return memory;
}

void mapped_close(void *file, size_t bytes) {
    if (file != NULL) {
        UnmapViewOfFile(file);
    }
}

void mapped_want(void *file, size_t bytes) {}

void descriptor_close(int descriptor) {}

bool descriptor_read(int descriptor, void *to, size_t bytes, size_t offset) { return false; }
#else
void *mapped_open(const char *path, size_t *bytes, int *descriptor) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    void *memory = NULL;
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
        *bytes = (size_t)status.st_size;
        memory = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, file, 0);
        if (memory == MAP_FAILED) {
            memory = NULL;
        }
    }
    *descriptor = file;
    if (file >= 0 && memory == NULL) {
        close(file);
        *descriptor = -1;
    }
    return memory;
}

void mapped_want(void *file, size_t bytes) { madvise(file, bytes, MADV_WILLNEED); }

void descriptor_close(int descriptor) {
    if (descriptor >= 0) {
        close(descriptor);
    }
}

bool descriptor_read(int descriptor, void *to, size_t bytes, size_t offset) {
    uint8_t *at = to;
    while (bytes > 0) {
        const ssize_t taken = pread(descriptor, at, bytes, (off_t)offset);
        if (taken < 0 && errno == EINTR) {
            continue;
        }
        if (taken <= 0) {
            return false;
        }
        at += taken;
        offset += (size_t)taken;
        bytes -= (size_t)taken;
    }
    return true;
}

void mapped_close(void *file, size_t bytes) {
    if (file != NULL) {
        munmap(file, bytes);
    }
}
#endif
