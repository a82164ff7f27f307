/* Launching decode steps on a CUDA device, and collecting what each one chose. No Python in here: it runs with the interpreter lock
 * released. The driver is reached through its shared library, so that nothing of CUDA is needed to build this. */
#ifndef VLM_CUDA_LOOP_H
#define VLM_CUDA_LOOP_H

#include "bound_run.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CUDA_MESSAGE_SIZE ORT_MESSAGE_SIZE

/* What one row did in one step: written by the device into page-locked memory (kernels/decode_layout.h has the same structure). */
typedef struct {
    int32_t token; /* −1: none */
    int32_t flags;
    double logprob;
} CudaRecord;

enum { CUDA_RECORD_EMITTED = 1, CUDA_RECORD_FINISHED = 2, CUDA_RECORD_HALTED = 4, CUDA_RECORD_STATUS_SHIFT = 8 };

/* The driver's functions that the loop calls; each returns a CUresult, 0 being success. */
typedef struct {
    void *library;
    int (*graph_launch)(void *graph, void *stream);
    int (*event_record)(void *event, void *stream);
    int (*event_synchronize)(void *event);
    int (*error_name)(int error, const char **name);
} CudaApi;

/* A part of a step: a captured CUDA graph, or a run of ONNX Runtime, whose CUDA graph is its own affair. */
typedef struct {
    void *graph;
    BoundRun *run; /* where `graph` is NULL */
} CudaPiece;

#define CUDA_MAX_PIECES 8

/* What a step queues, one after another. */
typedef struct {
    CudaPiece pieces[CUDA_MAX_PIECES];
    size_t count;
} CudaStep;

/* `kinds` of steps take turns, `turn` is the first (one kind: both alike). Steps so far in the ring: `base`. */
typedef struct {
    void *stream;
    void *events[2];
    CudaStep kinds[2];
    size_t turn;
    const volatile CudaRecord *ring; /* [slots, batch] */
    size_t slots, batch, base, steps;
    CudaRecord *out;                 /* [steps, batch] */
    size_t launched, done;           /* results: steps that were launched, and those whose records are in `out` */
} CudaRun;

/* 0, or −1 with the reason in `message`. */
int cuda_api_open(CudaApi *api, const char *path, char message[CUDA_MESSAGE_SIZE]);

/* Launches up to `steps` steps, one ahead of the one that is waited for, so that the device never waits for the host. Stops when no row
 * goes on, a row has no room, a row's logits are unusable, or `cancelled` is set; steps launched by then are waited for (after the
 * rows' end they change nothing). −1 with the driver's error in `message`. */
int cuda_run(const CudaApi *api, CudaRun *run, const atomic_bool *cancelled, char message[CUDA_MESSAGE_SIZE]);

#endif
