/* A stand-in for libcudart under ONNX Runtime's real CUDA provider: memory is the process's, kernels do nothing, and what is called on
 * streams is written to stderr. The rest of the libraries' functions are made by stand_in_provider.py and return 0. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAY(...) (fprintf(stderr, "[cudart] " __VA_ARGS__), fputc('\n', stderr))
#define EXPORT __attribute__((visibility("default")))
typedef struct { unsigned x, y, z; } Dim3;
static int capturing;

/* The beginning of CUDA 13's cudaDeviceProp, as far as the provider reads it. */
typedef struct {
    char name[256], uuid[16], luid[8];
    unsigned mask;
    size_t memory, shared;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constant;
    int major, minor;
    size_t alignment, pitch_alignment;
    int processors;
} Properties;

EXPORT int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
EXPORT int cudaGetDevice(int *device) { *device = 0; return 0; }
EXPORT int cudaGetDeviceProperties(void *properties, int device) {
    const Properties made = {.name = "stand-in", .memory = (size_t)8 << 30, .shared = 48 << 10, .registers = 65536, .warp = 32, .threads = 1024,
                             .block = {1024, 1024, 64}, .grid = {1 << 30, 65535, 65535}, .major = 8, .minor = 6, .processors = 16};
    (void)device;
    memcpy(properties, &made, sizeof made);
    return 0;
}
EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : attribute == 16 ? 16 : 1024;
    return 0;
}
EXPORT int cudaMemGetInfo(size_t *available, size_t *total) { *available = (size_t)7 << 30; *total = (size_t)8 << 30; return 0; }
EXPORT int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
EXPORT int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }

static int allocate(void **memory, size_t size) {
    const int result = posix_memalign(memory, 256, size != 0 ? size : 1);
    if (result == 0) {
        memset(*memory, 0, size);
    }
    return result != 0 ? 2 : 0;
}
EXPORT int cudaMalloc(void **memory, size_t size) {
    if (capturing) {
        SAY("malloc while capturing");
        return 900;
    }
    return allocate(memory, size);
}
EXPORT int cudaMallocHost(void **memory, size_t size) { return allocate(memory, size); }
EXPORT int cudaHostAlloc(void **memory, size_t size, unsigned flags) { (void)flags; return allocate(memory, size); }
EXPORT int cudaFree(void *memory) { free(memory); return 0; }
EXPORT int cudaFreeHost(void *memory) { free(memory); return 0; }
EXPORT int cudaMemcpy(void *to, const void *from, size_t size, int kind) { (void)kind; memmove(to, from, size); return 0; }
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    SAY("copy kind %d stream %p", kind, stream);
    memmove(to, from, size);
    return 0;
}
EXPORT int cudaMemset(void *memory, int value, size_t size) { memset(memory, value, size); return 0; }
EXPORT int cudaMemsetAsync(void *memory, int value, size_t size, void *stream) { (void)stream; memset(memory, value, size); return 0; }
EXPORT int cudaStreamCreate(void **stream) { *stream = malloc(1); return 0; }
EXPORT int cudaStreamCreateWithFlags(void **stream, unsigned flags) { (void)flags; *stream = malloc(1); return 0; }
EXPORT int cudaStreamSynchronize(void *stream) { SAY("wait stream %p", stream); return capturing ? 900 : 0; }
EXPORT int cudaStreamIsCapturing(void *stream, int *status) { (void)stream; *status = capturing; return 0; }
EXPORT int cudaStreamBeginCapture(void *stream, int mode) { SAY("begin capture stream %p mode %d", stream, mode); capturing = 1; return 0; }
EXPORT int cudaStreamEndCapture(void *stream, void **graph) { SAY("end capture stream %p", stream); capturing = 0; *graph = malloc(1); return 0; }
EXPORT int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    (void)graph, (void)flags;
    *executable = malloc(1);
    return 0;
}
EXPORT int cudaGraphLaunch(void *graph, void *stream) { (void)graph; SAY("graph stream %p", stream); return 0; }
EXPORT int cudaEventCreate(void **event) { *event = malloc(1); return 0; }
EXPORT int cudaEventCreateWithFlags(void **event, unsigned flags) { (void)flags; *event = malloc(1); return 0; }
EXPORT int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    SAY("host function stream %p", stream);
    function(data);
    return 0;
}
EXPORT int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void **stream) {
    *grid = *block = (Dim3){1, 1, 1};
    *shared = 0;
    *stream = NULL;
    return 0;
}
EXPORT int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
EXPORT int cudaPointerGetAttributes(void *attributes, const void *pointer) {
    (void)pointer;
    memset(attributes, 0, 32);
    *(int *)attributes = 2; /* device memory */
    return 0;
}
EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
    (void)name, (void)version, (void)flags;
    *function = NULL;
    if (status != NULL) {
        *status = 1;
    }
    return 0;
}
EXPORT const char *cudaGetErrorString(int error) { return error ? "stand-in error" : "no error"; }
EXPORT const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }
static void *binary[1];
EXPORT void *__cudaRegisterFatBinary(void) { return binary; }
