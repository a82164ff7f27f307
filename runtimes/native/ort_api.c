#include "ort_api.h"

#include "platform.h"

#include <stdio.h>
#include <string.h>

OrtFunctions ort;

typedef struct {
    const void *const *(ORT_CALL *GetApi)(uint32_t version);
    const char *(ORT_CALL *GetVersionString)(void);
} OrtApiBase;

static PlatformMutex guard = PLATFORM_MUTEX_INITIALIZER;
static const char *version;
static OrtMemoryInfo *cpu_memory;
static OrtPlacementFunctions placement;
static bool has_placement;

static struct {
    OrtEnv *env;
    size_t users;
    int threads;
    bool spin;
} shared_env;

int ort_check(OrtStatus *status, char message[ORT_MESSAGE_SIZE]) {
    if (status == NULL) {
        return 0;
    }
    snprintf(message, ORT_MESSAGE_SIZE, "%s", ort.GetErrorMessage(status));
    ort.ReleaseStatus(status);
    return -1;
}

static int load(const char *path, char message[ORT_MESSAGE_SIZE]) {
    void *library = platform_library_open(path, message, ORT_MESSAGE_SIZE);
    if (library == NULL) {
        return -1;
    }
    const OrtApiBase *(ORT_CALL *get_base)(void) = NULL;
    void *symbol = platform_library_symbol(library, "OrtGetApiBase");
    memcpy(&get_base, &symbol, sizeof symbol); /* ISO C has no cast from a data pointer to a function pointer */
    const OrtApiBase *base = get_base != NULL ? get_base() : NULL;
    if (base == NULL) {
        snprintf(message, ORT_MESSAGE_SIZE, "it exports no OrtGetApiBase: this is not ONNX Runtime");
        return -1;
    }
    const char *found = base->GetVersionString();
    int major = 0, minor = 0;
    if (sscanf(found, "%d.%d", &major, &minor) != 2 || major != 1 || minor < ORT_API_VERSION_WANTED) {
        snprintf(message, ORT_MESSAGE_SIZE, "its version is %.40s, needed is 1.%d or newer (below 2)", found, ORT_API_VERSION_WANTED);
        return -1;
    }
    const void *const *table = base->GetApi(ORT_API_VERSION_WANTED);
    if (table == NULL) {
        snprintf(message, ORT_MESSAGE_SIZE, "version %.40s no longer serves API version %d", found, ORT_API_VERSION_WANTED);
        return -1;
    }
#define ORT_FILL(slot, name, result, parameters) memcpy(&ort.name, &table[slot], sizeof ort.name);
    ORT_FUNCTIONS(ORT_FILL)
#undef ORT_FILL
    const void *const *newer = minor >= ORT_PLACEMENT_VERSION ? base->GetApi(ORT_PLACEMENT_VERSION) : NULL;
    if (newer != NULL) {
#define ORT_FILL(slot, name, result, parameters) memcpy(&placement.name, &newer[slot], sizeof placement.name);
        ORT_PLACEMENT_FUNCTIONS(ORT_FILL)
#undef ORT_FILL
        has_placement = true;
    }
    if (ort_check(ort.CreateCpuMemoryInfo(ORT_ALLOCATOR_DEVICE, ORT_MEMORY_DEFAULT, &cpu_memory), message) != 0) {
        return -1;
    }
    version = found;
    return 0;
}

int ort_load(const char *path, char message[ORT_MESSAGE_SIZE]) {
    platform_mutex_lock(&guard);
    const int result = version != NULL ? 0 : load(path, message);
    platform_mutex_unlock(&guard);
    return result;
}

const char *ort_version(void) { return version; }

const OrtPlacementFunctions *ort_placement(void) { return has_placement ? &placement : NULL; }

OrtStatus *ort_wrap(void *data, size_t bytes, const int64_t *shape, size_t rank, int type, OrtValue **out) {
    return ort.CreateTensorWithDataAsOrtValue(cpu_memory, data, bytes, shape, rank, type, out);
}

static OrtStatus *create_env(int threads, bool spin) {
    OrtThreadingOptions *options = NULL;
    OrtStatus *status = ort.CreateThreadingOptions(&options);
    if (status == NULL) {
        status = ort.SetGlobalIntraOpNumThreads(options, threads);
    }
    if (status == NULL) {
        status = ort.SetGlobalInterOpNumThreads(options, 1); /* graphs run node after node: the calling thread is enough */
    }
    if (status == NULL) {
        status = ort.SetGlobalSpinControl(options, spin);
    }
    if (status == NULL) {
        /* Every failure comes back as a status; a library has no business on stderr. */
        status = ort.CreateEnvWithGlobalThreadPools(ORT_LOG_FATAL, "vlm-edge", options, &shared_env.env);
    }
    if (options != NULL) {
        ort.ReleaseThreadingOptions(options);
    }
    return status;
}

int ort_env_acquire(int threads, bool spin, OrtEnv **env, bool *shared, char message[ORT_MESSAGE_SIZE]) {
    int result = 0;
    platform_mutex_lock(&guard);
    if (shared_env.users == 0) {
        result = ort_check(create_env(threads, spin), message);
        shared_env.threads = threads;
        shared_env.spin = spin;
    }
    if (result == 0) {
        shared_env.users++;
        *env = shared_env.env;
        *shared = shared_env.threads == threads && shared_env.spin == spin;
    }
    platform_mutex_unlock(&guard);
    return result;
}

void ort_env_release(void) {
    platform_mutex_lock(&guard);
    if (--shared_env.users == 0) {
        ort.ReleaseEnv(shared_env.env);
        shared_env.env = NULL;
    }
    platform_mutex_unlock(&guard);
}
