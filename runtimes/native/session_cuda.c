/* Sessions of ONNX Runtime's CUDA provider: its options, and which provider runs which node. */
#include "session.h"

#include <stdlib.h>
#include <string.h>

#define MAX_OPTIONS 32

static const char stream_key[] = "user_compute_stream";

/* A stream is no text: the function for texts leaves it out in some versions, so it goes in as the pointer that it is. */
static OrtStatus *set_options(OrtCudaOptions *options, const ConfigEntries *cuda) {
    OrtStatus *status = NULL;
    for (size_t i = 0; status == NULL && i < cuda->count; i++) {
        const ConfigEntry *entry = &cuda->entries[i];
        if (strcmp(entry->key, stream_key) == 0) {
            status = ort.UpdateCUDAProviderOptionsWithValue(options, entry->key, (void *)(uintptr_t)strtoull(entry->value, NULL, 10));
        }
    }
    return status;
}

OrtStatus *session_append_cuda(OrtSessionOptions *options, const ConfigEntries *cuda) {
    OrtCudaOptions *made = NULL;
    const char *keys[MAX_OPTIONS], *values[MAX_OPTIONS];
    size_t count = 0;
    if (cuda->count > MAX_OPTIONS) {
        return ort.CreateStatus(ORT_INVALID_ARGUMENT, "too many options for the CUDA provider");
    }
    OrtStatus *status = ort.CreateCUDAProviderOptions(&made); /* a library without the provider says so here */
    for (size_t i = 0; i < cuda->count; i++) {
        if (strcmp(cuda->entries[i].key, stream_key) != 0) {
            keys[count] = cuda->entries[i].key;
            values[count++] = cuda->entries[i].value;
        }
    }
    if (status == NULL) {
        status = ort.UpdateCUDAProviderOptions(made, keys, values, count);
    }
    if (status == NULL) {
        status = set_options(made, cuda); /* after the texts, which may set the whole structure anew */
    }
    if (status == NULL) {
        status = ort.SessionOptionsAppendExecutionProvider_CUDA_V2(options, made);
    }
    if (made != NULL) {
        ort.ReleaseCUDAProviderOptions(made);
    }
    return status;
}

/* (provider, operator, node's name) of one subgraph's nodes into `list`. */
static int list_nodes(const OrtPlacementFunctions *api, const OrtSubgraph *subgraph, PyObject *list, char message[ORT_MESSAGE_SIZE]) {
    const OrtAssignedNode *const *nodes = NULL;
    const char *provider = NULL;
    size_t count = 0;
    if (ort_check(api->EpAssignedSubgraph_GetEpName(subgraph, &provider), message) != 0 ||
        ort_check(api->EpAssignedSubgraph_GetNodes(subgraph, &nodes, &count), message) != 0) {
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        const char *name = NULL, *type = NULL;
        if (ort_check(api->EpAssignedNode_GetName(nodes[i], &name), message) != 0 ||
            ort_check(api->EpAssignedNode_GetOperatorType(nodes[i], &type), message) != 0) {
            return -1;
        }
        PyObject *item = Py_BuildValue("(sss)", provider, type, name);
        const int result = item != NULL ? PyList_Append(list, item) : -1;
        Py_XDECREF(item);
        if (result != 0) {
            message[0] = '\0'; /* Python's error stands */
            return -1;
        }
    }
    return 0;
}

PyObject *native_session_placement(PyObject *module, PyObject *session) {
    const OrtPlacementFunctions *api = ort_placement();
    const OrtSubgraph *const *subgraphs = NULL;
    char message[ORT_MESSAGE_SIZE];
    size_t count = 0;
    SessionCore *core = session_core_from_object(session);
    if (core == NULL) {
        return NULL;
    }
    if (api == NULL || core->session == NULL) {
        session_core_release(core);
        Py_RETURN_NONE;
    }
    PyObject *list = PyList_New(0);
    int failed = list == NULL || ort_check(api->Session_GetEpGraphAssignmentInfo(core->session, &subgraphs, &count), message) != 0;
    for (size_t i = 0; !failed && i < count; i++) {
        failed = list_nodes(api, subgraphs[i], list, message) != 0;
    }
    if (failed) {
        if (!PyErr_Occurred()) {
            PyErr_Format(native_device_error, "graph '%s': %s", core->name, message);
        }
        Py_CLEAR(list);
    }
    session_core_release(core);
    return list;
}
