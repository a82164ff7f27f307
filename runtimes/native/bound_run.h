/* One run of a session whose inputs and outputs are addresses that stay: bound once, run many times, also from C loops that do not hold
 * the interpreter lock. */
#ifndef VLM_BOUND_RUN_H
#define VLM_BOUND_RUN_H

#include "session.h"

typedef struct {
    SessionCore *core;
    OrtIoBinding *binding;
    OrtRunOptions *options;
    OrtMemoryInfo *memory; /* where addresses point to; NULL: the host */
    atomic_size_t runs;    /* how often it ran */
} BoundRun;

/* Runs. For the CUDA provider this queues the work on the session's stream. −1 with the reason in `message`. */
int bound_run_execute(BoundRun *run, char message[ORT_MESSAGE_SIZE]);

/* What a `_native.BoundRun` holds, or NULL where the object is none. It lives as long as the object. */
BoundRun *bound_run_of(PyObject *object);

#endif
