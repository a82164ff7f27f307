/* A stand-in for the CUDA driver's library: device memory is the process's, work is done at once or, while a stream is captured, kept in
 * a list that a graph replays. Kernels come from the host-compiled library that VLM_HOST_KERNELS names. Wrong handles, addresses outside
 * what was allocated, and calls that a capture forbids are errors. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long Ptr;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, UNSUPPORTED = 900 };
#define EXPORT __attribute__((visibility("default")))

#define MAX_BLOCKS 65536
static struct { Ptr at; size_t size; } blocks[MAX_BLOCKS];
static size_t block_count, used;
static int current, context_token, stream_token, module_token;

/* Whether a range lies within one allocation. */
static int known(Ptr at, size_t size) {
    for (size_t i = 0; i < block_count; i++) {
        if (at >= blocks[i].at && at + size <= blocks[i].at + blocks[i].size) {
            return 1;
        }
    }
    return size == 0;
}

typedef enum { COPY, COPY2D, SET, KERNEL, HOST } Kind;
typedef struct {
    Kind kind;
    Ptr to, from;
    size_t to_pitch, from_pitch, width, height;
    void *function, *data;
    unsigned x, y, threads;
    Ptr argument;
} Work;
typedef struct {
    Work *works;
    size_t count;
} Graph;

static Graph *captured;

typedef void (*Launch)(void *, const void *, unsigned, unsigned, unsigned);
static void *kernels(void) {
    static void *library;
    return library != NULL ? library : (library = dlopen(getenv("VLM_HOST_KERNELS"), RTLD_NOW));
}

static void perform(const Work *w) {
    switch (w->kind) {
    case COPY:
        memmove((void *)w->to, (void *)w->from, w->width);
        break;
    case COPY2D:
        for (size_t i = 0; i < w->height; i++) {
            memmove((void *)(w->to + i * w->to_pitch), (void *)(w->from + i * w->from_pitch), w->width);
        }
        break;
    case SET:
        memset((void *)w->to, 0, w->width);
        break;
    case KERNEL:
        ((Launch)dlsym(kernels(), "launch"))(w->function, (void *)w->argument, w->x, w->y, 1);
        break;
    default:
        ((void (*)(void *))w->function)(w->data);
    }
}

static CUresult queue(Work w) {
    if (!current) {
        return INVALID_CONTEXT;
    }
    if (captured == NULL) {
        perform(&w);
        return SUCCESS;
    }
    captured->works = realloc(captured->works, (captured->count + 1) * sizeof w);
    captured->works[captured->count++] = w;
    return SUCCESS;
}

EXPORT CUresult cuInit(unsigned flags) { return getenv("VLM_NO_GPU") != NULL ? NO_DEVICE : (int)flags; }
EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = getenv("VLM_DRIVER") != NULL ? atoi(getenv("VLM_DRIVER")) : 13000;
    return SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
EXPORT CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal == 0 ? SUCCESS : INVALID_VALUE; }
EXPORT CUresult cuDeviceGetName(char *name, int size, int device) { (void)device; snprintf(name, (size_t)size, "stand-in GPU"); return SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : 0;
    return *value ? SUCCESS : INVALID_VALUE;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &context_token; return SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(void *context) { current = context == &context_token; return SUCCESS; }
EXPORT CUresult cuStreamCreate(void **stream, unsigned flags) { *stream = &stream_token; return flags == 1 ? SUCCESS : INVALID_VALUE; }
EXPORT CUresult cuStreamDestroy_v2(void *stream) { return stream == &stream_token ? SUCCESS : INVALID_VALUE; }
EXPORT CUresult cuStreamSynchronize(void *stream) { return stream != &stream_token ? INVALID_VALUE : captured != NULL ? UNSUPPORTED : SUCCESS; }
EXPORT CUresult cuEventCreate(void **event, unsigned flags) { *event = malloc(1); return flags & 2 ? SUCCESS : INVALID_VALUE; }
EXPORT CUresult cuEventDestroy_v2(void *event) { free(event); return SUCCESS; }
EXPORT CUresult cuEventRecord(void *event, void *stream) { return event != NULL && stream == &stream_token ? SUCCESS : INVALID_VALUE; }
EXPORT CUresult cuEventSynchronize(void *event) { return event != NULL ? SUCCESS : INVALID_VALUE; }

static CUresult allocate(Ptr *at, size_t size) {
    const char *limit = getenv("VLM_GPU_BYTES");
    if (!current) {
        return INVALID_CONTEXT;
    }
    if (captured != NULL || size == 0 || (limit != NULL && used + size > (size_t)atoll(limit))) {
        return captured != NULL ? UNSUPPORTED : size == 0 ? INVALID_VALUE : OUT_OF_MEMORY;
    }
    void *memory = NULL;
    if (block_count == MAX_BLOCKS || posix_memalign(&memory, 256, size) != 0) {
        return OUT_OF_MEMORY;
    }
    memset(memory, getenv("VLM_GPU_ZEROS") != NULL ? 0 : 0xFF, size); /* NaN in every float type, or numbers that logits can be */
    blocks[block_count].at = *at = (Ptr)memory;
    blocks[block_count++].size = size;
    used += size;
    return SUCCESS;
}
static CUresult release(Ptr at) {
    for (size_t i = 0; i < block_count; i++) {
        if (blocks[i].at == at) {
            used -= blocks[i].size;
            blocks[i] = blocks[--block_count];
            free((void *)at);
            return SUCCESS;
        }
    }
    return INVALID_VALUE;
}
EXPORT CUresult cuMemAlloc_v2(Ptr *at, size_t size) { return allocate(at, size); }
EXPORT CUresult cuMemFree_v2(Ptr at) { return release(at); }
EXPORT CUresult cuMemHostAlloc(void **at, size_t size, unsigned flags) { return flags & 2 ? allocate((Ptr *)at, size) : INVALID_VALUE; }
EXPORT CUresult cuMemFreeHost(void *at) { return release((Ptr)at); }
EXPORT CUresult cuMemHostGetDevicePointer_v2(Ptr *device, void *host, unsigned flags) {
    *device = (Ptr)host;
    return known((Ptr)host, 1) && flags == 0 ? SUCCESS : INVALID_VALUE;
}
EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    *total = (size_t)8 << 30;
    *available = *total - used;
    return SUCCESS;
}
EXPORT CUresult cuMemcpyHtoDAsync_v2(Ptr to, const void *from, size_t size, void *stream) {
    return stream != &stream_token || !known(to, size) ? INVALID_VALUE : captured != NULL ? UNSUPPORTED
         : queue((Work){.kind = COPY, .to = to, .from = (Ptr)from, .width = size});
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, Ptr from, size_t size, void *stream) {
    return stream != &stream_token || !known(from, size) ? INVALID_VALUE : captured != NULL ? UNSUPPORTED
         : queue((Work){.kind = COPY, .to = (Ptr)to, .from = from, .width = size});
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(Ptr to, Ptr from, size_t size, void *stream) {
    return stream != &stream_token || !known(to, size) || !known(from, size) ? INVALID_VALUE
         : queue((Work){.kind = COPY, .to = to, .from = from, .width = size});
}
/* CUDA_MEMCPY2D as the driver API's documentation lays it out. */
typedef struct {
    size_t src_x, src_y; int src_type; const void *src_host; Ptr src_device; void *src_array; size_t src_pitch;
    size_t dst_x, dst_y; int dst_type; void *dst_host; Ptr dst_device; void *dst_array; size_t dst_pitch;
    size_t width, height;
} Copy2D;
EXPORT CUresult cuMemcpy2DAsync_v2(const Copy2D *c, void *stream) {
    const int device = 2;
    if (stream != &stream_token || c->src_type != device || c->dst_type != device || c->width > c->src_pitch || c->width > c->dst_pitch ||
        !known(c->src_device, (c->height - 1) * c->src_pitch + c->width) || !known(c->dst_device, (c->height - 1) * c->dst_pitch + c->width)) {
        return INVALID_VALUE;
    }
    return queue((Work){.kind = COPY2D, .to = c->dst_device, .from = c->src_device, .to_pitch = c->dst_pitch, .from_pitch = c->src_pitch,
                        .width = c->width, .height = c->height});
}
EXPORT CUresult cuMemsetD8Async(Ptr to, unsigned char value, size_t size, void *stream) {
    return stream != &stream_token || value != 0 || !known(to, size) ? INVALID_VALUE : queue((Work){.kind = SET, .to = to, .width = size});
}
EXPORT CUresult cuModuleLoadData(void **module, const void *image) {
    *module = &module_token;
    return memcmp(image, "\177ELF", 4) == 0 ? SUCCESS : INVALID_VALUE;
}
EXPORT CUresult cuModuleUnload(void *module) { return module == &module_token ? SUCCESS : INVALID_VALUE; }
EXPORT CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = dlsym(kernels(), name);
    return module == &module_token && *function != NULL ? SUCCESS : INVALID_VALUE;
}
EXPORT CUresult cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                               void *stream, void **parameters, void **extra) {
    if (z != 1 || by != 1 || bz != 1 || shared != 0 || stream != &stream_token || extra != NULL || x == 0 || y == 0 || bx == 0 || bx > 512) {
        return INVALID_VALUE;
    }
    const Ptr argument = *(const Ptr *)parameters[0];
    return known(argument, 8) ? queue((Work){.kind = KERNEL, .function = function, .x = x, .y = y, .threads = bx, .argument = argument})
                              : INVALID_VALUE;
}
EXPORT CUresult cuLaunchHostFunc(void *stream, void *function, void *data) {
    return stream == &stream_token ? queue((Work){.kind = HOST, .function = function, .data = data}) : INVALID_VALUE;
}
EXPORT CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
    if (stream != &stream_token || mode != 1 || captured != NULL) {
        return INVALID_VALUE;
    }
    captured = calloc(1, sizeof *captured);
    return SUCCESS;
}
EXPORT CUresult cuStreamEndCapture(void *stream, void **graph) {
    *graph = captured;
    captured = NULL;
    return stream == &stream_token && *graph != NULL ? SUCCESS : INVALID_VALUE;
}
EXPORT CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    Graph *copy = malloc(sizeof *copy);
    *copy = *(Graph *)graph;
    copy->works = malloc(copy->count * sizeof *copy->works);
    memcpy(copy->works, ((Graph *)graph)->works, copy->count * sizeof *copy->works);
    *executable = copy;
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}
static CUresult free_graph(Graph *graph) {
    free(graph->works);
    free(graph);
    return SUCCESS;
}
EXPORT CUresult cuGraphDestroy(void *graph) { return free_graph(graph); }
EXPORT CUresult cuGraphExecDestroy(void *graph) { return free_graph(graph); }
EXPORT CUresult cuGraphLaunch(void *executable, void *stream) {
    if (stream != &stream_token || !current) {
        return INVALID_VALUE;
    }
    const Graph *graph = executable;
    for (size_t i = 0; i < graph->count; i++) {
        perform(&graph->works[i]);
    }
    return SUCCESS;
}
EXPORT CUresult cuGetErrorName(int error, const char **name) { *name = error == 0 ? "CUDA_SUCCESS" : "CUDA_ERROR_STAND_IN"; return SUCCESS; }

/* Functions by name, without the suffixes of their versions. */
EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    char full[128];
    *function = NULL;
    for (int i = 2; i >= 1 && *function == NULL; i--) {
        snprintf(full, sizeof full, i == 2 ? "%s_v2" : "%s", name);
        *function = dlsym(RTLD_DEFAULT, full);
        if (*function == NULL) {
            void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
            *function = self != NULL ? dlsym(self, full) : NULL;
        }
    }
    if (*function == NULL && strcmp(name, "cuGraphInstantiate") == 0) {
        *function = (void *)cuGraphInstantiateWithFlags;
    }
    if (status != NULL) {
        *status = *function != NULL ? 0 : 1;
    }
    return *function != NULL ? SUCCESS : 500;
}
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
