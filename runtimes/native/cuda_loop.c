#include "cuda_loop.h"

#include "platform.h"

#include <stdio.h>
#include <string.h>

typedef struct {
    const char *name;
    void *target; /* a function pointer */
} Symbol;

int cuda_api_open(CudaApi *api, const char *path, char message[CUDA_MESSAGE_SIZE]) {
    memset(api, 0, sizeof *api);
    api->library = platform_library_open(path, message, CUDA_MESSAGE_SIZE);
    if (api->library == NULL) {
        return -1;
    }
    const Symbol symbols[] = {
        {"cuGraphLaunch", &api->graph_launch},
        {"cuEventRecord", &api->event_record},
        {"cuEventSynchronize", &api->event_synchronize},
        {"cuGetErrorName", &api->error_name},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *address = platform_library_symbol(api->library, symbols[i].name);
        if (address == NULL) {
            snprintf(message, CUDA_MESSAGE_SIZE, "%s has no function %s: the driver is too old, or this is not a CUDA driver", path, symbols[i].name);
            return -1;
        }
        memcpy(symbols[i].target, &address, sizeof address);
    }
    return 0;
}

static int check(const CudaApi *api, int error, const char *call, char message[CUDA_MESSAGE_SIZE]) {
    const char *name = NULL;
    if (error == 0) {
        return 0;
    }
    if (api->error_name(error, &name) != 0 || name == NULL) {
        name = "unknown error";
    }
    snprintf(message, CUDA_MESSAGE_SIZE, "%s failed in a decode step: %s (%d)", call, name, error);
    return -1;
}

static int launch(const CudaApi *api, CudaRun *run, char message[CUDA_MESSAGE_SIZE]) {
    const size_t step = run->launched;
    const CudaStep *kind = &run->kinds[(run->turn + step) % 2];
    for (size_t i = 0; i < kind->count; i++) {
        const CudaPiece *piece = &kind->pieces[i];
        if (piece->graph != NULL ? check(api, api->graph_launch(piece->graph, run->stream), "cuGraphLaunch", message) != 0
                                 : bound_run_execute(piece->run, message) != 0) {
            return -1;
        }
    }
    run->launched++;
    return check(api, api->event_record(run->events[step % 2], run->stream), "cuEventRecord", message);
}

/* Takes over the records of the oldest step that is not taken yet; whether any row goes on after it. */
static bool collect(CudaRun *run) {
    const volatile CudaRecord *from = run->ring + (run->base + run->done) % run->slots * run->batch;
    CudaRecord *to = run->out + run->done * run->batch;
    bool open = false, stopped = false;
    for (size_t row = 0; row < run->batch; row++) {
        to[row].token = from[row].token;
        to[row].flags = from[row].flags;
        to[row].logprob = from[row].logprob;
        open |= (to[row].flags & CUDA_RECORD_EMITTED) && !(to[row].flags & CUDA_RECORD_FINISHED);
        stopped |= (to[row].flags & CUDA_RECORD_HALTED) || to[row].flags >> CUDA_RECORD_STATUS_SHIFT != 0;
    }
    run->done++;
    return open && !stopped;
}

int cuda_run(const CudaApi *api, CudaRun *run, const atomic_bool *cancelled, char message[CUDA_MESSAGE_SIZE]) {
    bool going = true;
    run->launched = run->done = 0;
    while (run->done < run->launched || (going && run->launched < run->steps)) {
        /* At most two steps are under way: there are two events, and a cancelled or finished call has little left to wait for. */
        while (going && run->launched < run->steps && run->launched < run->done + 2) {
            if (atomic_load(cancelled)) {
                going = false;
            } else if (launch(api, run, message) != 0) {
                return -1;
            }
        }
        if (run->done < run->launched) {
            if (check(api, api->event_synchronize(run->events[run->done % 2]), "cuEventSynchronize", message) != 0) {
                return -1;
            }
            going &= collect(run);
        }
    }
    return 0;
}
