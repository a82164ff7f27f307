#include "session.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *copy_text(const char *text) {
    const size_t size = strlen(text) + 1;
    char *copy = malloc(size);
    return copy != NULL ? memcpy(copy, text, size) : NULL;
}

SessionCore *session_core_retain(SessionCore *core) {
    atomic_fetch_add(&core->references, 1);
    return core;
}

static void free_values(ValueInfo *values, size_t count) {
    for (size_t i = 0; values != NULL && i < count; i++) {
        for (size_t d = 0; d < MAX_RANK; d++) {
            free(values[i].symbols[d]);
        }
        free(values[i].name);
    }
    free(values);
}

void session_core_release(SessionCore *core) {
    if (core == NULL || atomic_fetch_sub(&core->references, 1) != 1) {
        return;
    }
    if (core->session != NULL) {
        ort.ReleaseSession(core->session);
    }
    if (core->has_env) {
        ort_env_release();
    }
    plan_close(core->plan);
    free_values(core->inputs, core->input_count);
    free_values(core->outputs, core->output_count);
    free(core->input_names);
    free(core->output_names);
    free(core->name);
    platform_mutex_destroy(&core->run_lock);
    free(core);
}

PyObject *session_core_done(SessionCore *core, int failed) {
    Py_BEGIN_ALLOW_THREADS;
    session_core_release(core);
    Py_END_ALLOW_THREADS;
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static const ValueInfo *find_value(const ValueInfo *values, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++) {
        if (strcmp(values[i].name, name) == 0) {
            return &values[i];
        }
    }
    return NULL;
}

const ValueInfo *session_input(const SessionCore *core, const char *name) { return find_value(core->inputs, core->input_count, name); }
const ValueInfo *session_output(const SessionCore *core, const char *name) { return find_value(core->outputs, core->output_count, name); }

double session_run_bound(SessionCore *core, const OrtIoBinding *binding, char message[ORT_MESSAGE_SIZE]) {
    platform_mutex_lock(&core->run_lock);
    const double begin = platform_seconds();
    const int result = ort_check(ort.RunWithBinding(core->session, NULL, binding), message);
    const double seconds = platform_seconds() - begin;
    platform_mutex_unlock(&core->run_lock);
    return result == 0 ? seconds : -1.0;
}

static ElementType known_type(int type) { return element_size((ElementType)type) > 0 ? (ElementType)type : ELEMENT_UNKNOWN; }

static int describe_type(const OrtTypeInfo *info, ValueInfo *value, char message[ORT_MESSAGE_SIZE]) {
    const OrtTensorInfo *tensor = NULL;
    int type = 0;
    const char *symbols[MAX_RANK] = {NULL};
    if (ort_check(ort.CastTypeInfoToTensorInfo(info, &tensor), message) != 0) {
        return -1;
    }
    if (tensor == NULL) {
        return 0; /* a sequence or a map: no buffer can carry it, which `run` reports */
    }
    if (ort_check(ort.GetTensorElementType(tensor, &type), message) != 0 ||
        ort_check(ort.GetDimensionsCount(tensor, &value->rank), message) != 0) {
        return -1;
    }
    if (value->rank > MAX_RANK) {
        snprintf(message, ORT_MESSAGE_SIZE, "'%s' has %zu dimensions, at most %d are supported", value->name, value->rank, MAX_RANK);
        return -1;
    }
    if (ort_check(ort.GetDimensions(tensor, value->shape, value->rank), message) != 0 ||
        ort_check(ort.GetSymbolicDimensions(tensor, symbols, value->rank), message) != 0) {
        return -1;
    }
    for (size_t d = 0; d < value->rank; d++) {
        value->symbols[d] = copy_text(symbols[d] != NULL ? symbols[d] : "");
        if (value->symbols[d] == NULL) {
            snprintf(message, ORT_MESSAGE_SIZE, "out of memory");
            return -1;
        }
    }
    value->type = known_type(type);
    return 0;
}

static int describe(const SessionCore *core, bool inputs, size_t count, ValueInfo *values, const char **names, char message[ORT_MESSAGE_SIZE]) {
    OrtAllocator *allocator = NULL;
    if (ort_check(ort.GetAllocatorWithDefaultOptions(&allocator), message) != 0) {
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        char *name = NULL;
        OrtTypeInfo *info = NULL;
        if (ort_check((inputs ? ort.SessionGetInputName : ort.SessionGetOutputName)(core->session, i, allocator, &name), message) != 0) {
            return -1;
        }
        values[i].name = copy_text(name);
        OrtStatus *freed = ort.AllocatorFree(allocator, name);
        if (ort_check(freed, message) != 0 || values[i].name == NULL) {
            return -1;
        }
        names[i] = values[i].name;
        if (ort_check((inputs ? ort.SessionGetInputTypeInfo : ort.SessionGetOutputTypeInfo)(core->session, i, &info), message) != 0) {
            return -1;
        }
        const int result = describe_type(info, &values[i], message);
        ort.ReleaseTypeInfo(info);
        if (result != 0) {
            return -1;
        }
    }
    return 0;
}

static OrtStatus *configure(OrtSessionOptions *options, ConfigEntries config, const ConfigEntries *cuda, int optimization_level, int threads, bool spin,
                            bool shared) {
    OrtStatus *status = ort.SetSessionGraphOptimizationLevel(options, optimization_level);
    if (status == NULL) {
        status = ort.SetSessionLogSeverityLevel(options, ORT_LOG_FATAL);
    }
    if (status == NULL && shared) {
        status = ort.DisablePerSessionThreads(options);
    }
    if (status == NULL && !shared) {
        status = ort.SetIntraOpNumThreads(options, threads);
        if (status == NULL) {
            status = ort.AddSessionConfigEntry(options, "session.intra_op.allow_spinning", spin ? "1" : "0");
        }
    }
    for (size_t i = 0; status == NULL && i < config.count; i++) {
        status = ort.AddSessionConfigEntry(options, config.entries[i].key, config.entries[i].value);
    }
    return status == NULL && cuda != NULL ? session_append_cuda(options, cuda) : status;
}

static OrtStatus *create(const OrtEnv *env, const char *model, size_t model_bytes, const OrtSessionOptions *options, OrtSession **out) {
    if (model_bytes > 0) {
        return ort.CreateSessionFromArray(env, model, model_bytes, options, out);
    }
#ifdef _WIN32
    wchar_t *wide = platform_wide_path(model);
    OrtStatus *status = ort.CreateSession(env, wide != NULL ? wide : L"", options, out);
    free(wide);
    return status;
#else
    return ort.CreateSession(env, model, options, out);
#endif
}

SessionCore *session_core_load(const char *model, size_t model_bytes, const char *name, ConfigEntries config, const ConfigEntries *cuda,
                               int optimization_level, int threads, bool spin, char message[ORT_MESSAGE_SIZE]) {
    SessionCore *core = calloc(1, sizeof *core);
    OrtSessionOptions *options = NULL;
    OrtEnv *env = NULL;
    snprintf(message, ORT_MESSAGE_SIZE, "out of memory");
    if (core == NULL) {
        return NULL;
    }
    atomic_init(&core->references, 1);
    if (platform_mutex_init(&core->run_lock) != 0) {
        free(core);
        return NULL;
    }
    core->name = copy_text(name);
    if (core->name == NULL || ort_env_acquire(threads, spin, &env, &core->shared_pool, message) != 0) {
        goto failed;
    }
    core->has_env = true;
    if (ort_check(ort.CreateSessionOptions(&options), message) != 0 ||
        ort_check(configure(options, config, cuda, optimization_level, threads, spin, core->shared_pool), message) != 0 ||
        ort_check(create(env, model, model_bytes, options, &core->session), message) != 0 ||
        ort_check(ort.SessionGetInputCount(core->session, &core->input_count), message) != 0 ||
        ort_check(ort.SessionGetOutputCount(core->session, &core->output_count), message) != 0) {
        goto failed;
    }
    /* One more than needed, so that a graph without inputs does not look like an exhausted memory. */
    core->inputs = calloc(core->input_count + 1, sizeof *core->inputs);
    core->outputs = calloc(core->output_count + 1, sizeof *core->outputs);
    core->input_names = calloc(core->input_count + 1, sizeof *core->input_names);
    core->output_names = calloc(core->output_count + 1, sizeof *core->output_names);
    if (core->inputs == NULL || core->outputs == NULL || core->input_names == NULL || core->output_names == NULL) {
        snprintf(message, ORT_MESSAGE_SIZE, "out of memory");
        goto failed;
    }
    if (describe(core, true, core->input_count, core->inputs, core->input_names, message) != 0 ||
        describe(core, false, core->output_count, core->outputs, core->output_names, message) != 0) {
        goto failed;
    }
    ort.ReleaseSessionOptions(options);
    return core;
failed:
    if (options != NULL) {
        ort.ReleaseSessionOptions(options);
    }
    session_core_release(core);
    return NULL;
}

static int describe_plan(const PlanValue *from, size_t count, ValueInfo *values, const char **names) {
    for (size_t i = 0; i < count; i++) {
        ValueInfo *value = &values[i];
        value->name = copy_text(from[i].name);
        value->type = known_type((int)from[i].type);
        value->rank = from[i].rank;
        names[i] = value->name;
        for (size_t d = 0; d < value->rank; d++) {
            value->shape[d] = from[i].shape[d];
            value->symbols[d] = copy_text(from[i].symbols[d]);
            if (value->symbols[d] == NULL) {
                return -1;
            }
        }
        if (value->name == NULL) {
            return -1;
        }
    }
    return 0;
}

SessionCore *session_core_load_plan(const char *path, const char *name, int threads, bool spin, const char *kernels, char message[ORT_MESSAGE_SIZE]) {
    SessionCore *core = calloc(1, sizeof *core);
    snprintf(message, ORT_MESSAGE_SIZE, "out of memory");
    if (core == NULL) {
        return NULL;
    }
    atomic_init(&core->references, 1);
    if (platform_mutex_init(&core->run_lock) != 0) {
        free(core);
        return NULL;
    }
    core->name = copy_text(name);
    core->plan = core->name != NULL ? plan_open(path, (size_t)threads, spin, kernels, message) : NULL;
    if (core->plan == NULL) {
        session_core_release(core);
        return NULL;
    }
    core->input_count = core->plan->input_count;
    core->output_count = core->plan->output_count;
    core->inputs = calloc(core->input_count + 1, sizeof *core->inputs);
    core->outputs = calloc(core->output_count + 1, sizeof *core->outputs);
    core->input_names = calloc(core->input_count + 1, sizeof *core->input_names);
    core->output_names = calloc(core->output_count + 1, sizeof *core->output_names);
    if (core->inputs == NULL || core->outputs == NULL || core->input_names == NULL || core->output_names == NULL ||
        describe_plan(core->plan->inputs, core->input_count, core->inputs, core->input_names) != 0 ||
        describe_plan(core->plan->outputs, core->output_count, core->outputs, core->output_names) != 0) {
        snprintf(message, ORT_MESSAGE_SIZE, "out of memory");
        session_core_release(core);
        return NULL;
    }
    return core;
}
