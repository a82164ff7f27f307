/* A graph that ONNX Runtime has loaded, with its signature; shared by the Session type and the decoder states that run it. */
#ifndef VLM_SESSION_H
#define VLM_SESSION_H

#include "native.h"
#include "ort_api.h"
#include "plan.h"
#include "platform.h"

#include <stdatomic.h>

#define MAX_RANK 8

typedef struct {
    char *name;
    ElementType type; /* ELEMENT_UNKNOWN: not a tensor, or a type without a buffer format */
    size_t rank;
    int64_t shape[MAX_RANK]; /* −1: dynamic */
    char *symbols[MAX_RANK]; /* the dynamic dimension's name; "" where it has none */
} ValueInfo;

/* Counted by references: a Session object, each of its states and each output that is still alive hold one. */
typedef struct {
    atomic_size_t references;
    OrtSession *session;
    Plan *plan; /* what runs the graph where `session` is NULL */
    bool has_env;
    bool shared_pool;
    char *name;
    size_t input_count, output_count;
    ValueInfo *inputs, *outputs;
    const char **input_names, **output_names;
    PlatformMutex run_lock; /* one run at a time: a second one would only fight for the same cores and grow the arena */
} SessionCore;

SessionCore *session_core_retain(SessionCore *core);
void session_core_release(SessionCore *core);

/* The input or output of that name, or NULL. */
const ValueInfo *session_input(const SessionCore *core, const char *name);
const ValueInfo *session_output(const SessionCore *core, const char *name);

/* Runs with bound inputs and outputs, under the run lock. Call without the interpreter lock. Returns seconds, −1 on failure. */
double session_run_bound(SessionCore *core, const OrtIoBinding *binding, char message[ORT_MESSAGE_SIZE]);

/* The core of a `_native.Session` that is open, as a new reference; NULL with TypeError or DeviceError set. */
SessionCore *session_core_from_object(PyObject *object);

/* `Session.run`: {name: array} → {name: Tensor}; NULL with the error set. The caller's core may be closed meanwhile. */
PyObject *session_run_feeds(SessionCore *core, PyObject *feeds);

/* The end of an entry point that has such a reference: gives it back, without the interpreter lock since the last one closes the session.
 * Returns None, or NULL where something `failed` and its error is set. */
PyObject *session_core_done(SessionCore *core, int failed);

typedef struct {
    const char *key, *value;
} ConfigEntry;

typedef struct {
    const ConfigEntry *entries;
    size_t count;
} ConfigEntries;

/* Loads a model (a path, or bytes when `model_bytes` is not 0). `cuda`: options of the CUDA provider, NULL for the CPU. Call without the
 * interpreter lock. NULL on failure. */
SessionCore *session_core_load(const char *model, size_t model_bytes, const char *name, ConfigEntries config, const ConfigEntries *cuda,
                               int optimization_level, int threads, bool spin, char message[ORT_MESSAGE_SIZE]);

/* Puts the CUDA provider before the CPU's; `user_compute_stream` is a stream's address in digits. */
OrtStatus *session_append_cuda(OrtSessionOptions *options, const ConfigEntries *cuda);

/* The same for a decoder's plan, which needs no ONNX Runtime. `kernels`: a name, or NULL for the best there are. */
SessionCore *session_core_load_plan(const char *path, const char *name, int threads, bool spin, const char *kernels, char message[ORT_MESSAGE_SIZE]);

#endif
