/* A file mapped for reading. */
#ifndef _WIN32
#define _DEFAULT_SOURCE
#endif
#include "plan.h"

#ifdef _WIN32
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#ifdef _WIN32
void *mapped_open(const char *path, size_t *bytes) {
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
#else
void *mapped_open(const char *path, size_t *bytes) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    void *memory = NULL;
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
        *bytes = (size_t)status.st_size;
        memory = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, file, 0);
        if (memory == MAP_FAILED) {
            memory = NULL;
        } else {
            madvise(memory, *bytes, MADV_WILLNEED);
        }
    }
    if (file >= 0) {
        close(file);
    }
    return memory;
}

void mapped_close(void *file, size_t bytes) {
    if (file != NULL) {
        munmap(file, bytes);
    }
}
#endif
