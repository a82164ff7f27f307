/* `_native.BoundRun`: a run of a Session over addresses. */
#include "bound_run.h"

#include <stdio.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    BoundRun run;
} RunObject;

static PyTypeObject *run_type;

BoundRun *bound_run_of(PyObject *object) {
    return PyObject_TypeCheck(object, run_type) ? &((RunObject *)object)->run : NULL;
}

int bound_run_execute(BoundRun *run, char message[ORT_MESSAGE_SIZE]) {
    platform_mutex_lock(&run->core->run_lock);
    const int result = ort_check(ort.RunWithBinding(run->core->session, run->options, run->binding), message);
    platform_mutex_unlock(&run->core->run_lock);
    atomic_fetch_add(&run->runs, 1);
    return result;
}

static int open_run(BoundRun *run, bool cuda, int graph_id, char message[ORT_MESSAGE_SIZE]) {
    char id[32];
    snprintf(id, sizeof id, "%d", graph_id);
    if (ort_check(ort.CreateIoBinding(run->core->session, &run->binding), message) != 0 ||
        ort_check(ort.CreateRunOptions(&run->options), message) != 0 ||
        ort_check(ort.RunOptionsSetRunLogSeverityLevel(run->options, ORT_LOG_FATAL), message) != 0) {
        return -1;
    }
    /* The stream keeps the order; waiting for it is the loop's affair. */
    return cuda && (ort_check(ort.CreateMemoryInfo("Cuda", ORT_ALLOCATOR_DEVICE, 0, ORT_MEMORY_DEFAULT, &run->memory), message) != 0 ||
                    ort_check(ort.AddRunConfigEntry(run->options, "gpu_graph_id", id), message) != 0 ||
                    ort_check(ort.AddRunConfigEntry(run->options, "disable_synchronize_execution_providers", "1"), message) != 0)
               ? -1
               : 0;
}

static int run_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"session", "cuda", "graph_id", NULL};
    BoundRun *run = &((RunObject *)self)->run;
    PyObject *session;
    int cuda = 0, graph_id = -1;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|pi:BoundRun", names, &session, &cuda, &graph_id)) {
        return -1;
    }
    if (run->core != NULL) {
        PyErr_SetString(PyExc_TypeError, "a BoundRun is initialised once");
        return -1;
    }
    run->core = session_core_from_object(session);
    if (run->core == NULL) {
        return -1;
    }
    if (run->core->session == NULL) {
        PyErr_SetString(PyExc_TypeError, "a plan has nothing to bind: it runs in a DecoderState");
        return -1;
    }
    if (open_run(run, cuda != 0, graph_id, message) != 0) {
        PyErr_Format(native_device_error, "graph '%s': %s", run->core->name, message);
        return -1;
    }
    return 0;
}

static void run_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    BoundRun *run = &((RunObject *)self)->run;
    if (run->binding != NULL) {
        ort.ReleaseIoBinding(run->binding);
    }
    if (run->options != NULL) {
        ort.ReleaseRunOptions(run->options);
    }
    if (run->memory != NULL) {
        ort.ReleaseMemoryInfo(run->memory);
    }
    session_core_release(run->core);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static BoundRun *opened(PyObject *self) {
    BoundRun *run = &((RunObject *)self)->run;
    if (run->binding == NULL || run->options == NULL) {
        PyErr_SetString(native_device_error, "the run was not opened");
        return NULL;
    }
    return run;
}

/* Reads a shape, checks it against the graph's; the tensor's bytes, or −1 with an error set. */
static Py_ssize_t read_shape(const SessionCore *core, const ValueInfo *value, PyObject *sizes, int64_t shape[MAX_RANK]) {
    const Py_ssize_t rank = PySequence_Size(sizes);
    Py_ssize_t bytes = (Py_ssize_t)element_size(value->type);
    if (rank < 0) {
        return -1;
    }
    if (bytes == 0 || (size_t)rank != value->rank) {
        PyErr_Format(native_device_error, "graph '%s': '%s' is %s of %zu dimensions, bound were %zd", core->name, value->name,
                     element_name(value->type), value->rank, rank);
        return -1;
    }
    for (Py_ssize_t i = 0; i < rank; i++) {
        PyObject *item = PySequence_GetItem(sizes, i);
        const long long size = item != NULL ? PyLong_AsLongLong(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred()) {
            return -1;
        }
        if (size < 0 || (value->shape[i] >= 0 && value->shape[i] != size) || (size > 0 && bytes > PY_SSIZE_T_MAX / size)) {
            PyErr_Format(native_device_error, "graph '%s': '%s' has size %lld in dimension %zd, expected %lld", core->name, value->name, size, i,
                         (long long)value->shape[i]);
            return -1;
        }
        shape[i] = size;
        bytes *= (Py_ssize_t)size;
    }
    return bytes;
}

static PyObject *run_bind(PyObject *self, PyObject *args, bool input) {
    const char *name;
    unsigned long long address;
    PyObject *sizes;
    int host = 0;
    int64_t shape[MAX_RANK] = {0};
    char message[ORT_MESSAGE_SIZE];
    BoundRun *run = opened(self);
    if (run == NULL || !PyArg_ParseTuple(args, "sKO|p:bind", &name, &address, &sizes, &host)) {
        return NULL;
    }
    const ValueInfo *value = input ? session_input(run->core, name) : session_output(run->core, name);
    if (value == NULL) {
        PyErr_Format(native_device_error, "graph '%s' has no %s '%s'", run->core->name, input ? "input" : "output", name);
        return NULL;
    }
    const Py_ssize_t bytes = read_shape(run->core, value, sizes, shape);
    if (bytes < 0) {
        return NULL;
    }
    if (address == 0 && bytes > 0) {
        PyErr_Format(native_device_error, "graph '%s': '%s' was bound to no memory", run->core->name, name);
        return NULL;
    }
    OrtValue *made = NULL;
    void *data = (void *)(uintptr_t)address;
    OrtStatus *status = host || run->memory == NULL
                            ? ort_wrap(data, (size_t)bytes, shape, value->rank, (int)value->type, &made)
                            : ort.CreateTensorWithDataAsOrtValue(run->memory, data, (size_t)bytes, shape, value->rank, (int)value->type, &made);
    if (status == NULL) {
        status = input ? ort.BindInput(run->binding, name, made) : ort.BindOutput(run->binding, name, made);
    }
    if (made != NULL) {
        ort.ReleaseValue(made); /* the binding keeps it */
    }
    if (ort_check(status, message) != 0) {
        PyErr_Format(native_device_error, "graph '%s': '%s': %s", run->core->name, name, message);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *run_bind_input(PyObject *self, PyObject *args) { return run_bind(self, args, true); }
static PyObject *run_bind_output(PyObject *self, PyObject *args) { return run_bind(self, args, false); }

static PyObject *run_run(PyObject *self, PyObject *args) {
    char message[ORT_MESSAGE_SIZE];
    BoundRun *run = opened(self);
    int failed;
    if (run == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    failed = bound_run_execute(run, message);
    Py_END_ALLOW_THREADS;
    if (failed) {
        PyErr_Format(native_device_error, "graph '%s': %s", run->core->name, message);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *run_get_runs(PyObject *self, void *closure) { return PyLong_FromSize_t(atomic_load(&((RunObject *)self)->run.runs)); }

static PyMethodDef run_methods[] = {
    {"bind_input", run_bind_input, METH_VARARGS, "bind_input(name, address, shape, host=False): memory of the caller's, which must stay."},
    {"bind_output", run_bind_output, METH_VARARGS, "bind_output(name, address, shape, host=False): memory of the caller's, which must stay."},
    {"run", run_run, METH_NOARGS, "Runs; on a GPU the work is queued, not done, when this returns."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef run_getset[] = {
    {"runs", run_get_runs, NULL, "how often it ran", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot run_slots[] = {
    {Py_tp_init, run_init},     {Py_tp_dealloc, run_dealloc}, {Py_tp_methods, run_methods},
    {Py_tp_getset, run_getset}, {Py_tp_doc, "BoundRun(session, cuda=False, graph_id=-1): a run over addresses."},
    {0, NULL},
};

static PyType_Spec run_spec = {
    .name = "vlm_edge_runtime._native.BoundRun",
    .basicsize = sizeof(RunObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = run_slots,
};

int native_add_bound_run_type(PyObject *module) {
    run_type = (PyTypeObject *)PyType_FromSpec(&run_spec);
    return run_type != NULL ? PyModule_AddObjectRef(module, "BoundRun", (PyObject *)run_type) : -1;
}
