/* `_native.CudaLoop`: the loop over decode steps, for one decoder state. */
#include "cuda_loop.h"
#include "native.h"

#include <stdlib.h>

typedef struct {
    PyObject_HEAD
    CudaApi api;
    atomic_bool cancelled;
} LoopObject;

static int loop_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"library", NULL};
    LoopObject *loop = (LoopObject *)self;
    const char *path;
    char message[CUDA_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s:CudaLoop", names, &path)) {
        return -1;
    }
    if (cuda_api_open(&loop->api, path, message) != 0) {
        PyErr_Format(native_device_error, "the CUDA driver's library cannot be used: %s", message);
        return -1;
    }
    return 0;
}

static void loop_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* An integer handle of a captured graph, a BoundRun, or a sequence of those. −1 with an error set. */
static int read_step(PyObject *object, CudaStep *step) {
    if (!PyLong_Check(object) && bound_run_of(object) == NULL && PySequence_Check(object)) {
        const Py_ssize_t count = PySequence_Size(object);
        for (Py_ssize_t i = 0; i < count; i++) {
            PyObject *item = PySequence_GetItem(object, i); /* the caller's sequence keeps it */
            const int result = item != NULL && !PySequence_Check(item) ? read_step(item, step) : -1;
            Py_XDECREF(item);
            if (result != 0) {
                return -1;
            }
        }
        return count < 0 ? -1 : 0;
    }
    if (step->count == CUDA_MAX_PIECES) {
        PyErr_Format(PyExc_ValueError, "CudaLoop.run: a step of more than %d pieces", CUDA_MAX_PIECES);
        return -1;
    }
    CudaPiece *piece = &step->pieces[step->count++];
    piece->run = bound_run_of(object);
    if (piece->run == NULL) {
        piece->graph = (void *)(uintptr_t)PyLong_AsUnsignedLongLong(object);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* Whether every piece is there. */
static bool whole(const CudaStep *step) {
    for (size_t i = 0; i < step->count; i++) {
        if (step->pieces[i].graph == NULL && step->pieces[i].run == NULL) {
            return false;
        }
    }
    return step->count > 0;
}

static PyObject *loop_run(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "events", "graphs", "turn", "ring", "slots", "batch", "base", "steps", NULL};
    LoopObject *loop = (LoopObject *)self;
    unsigned long long stream, events[2], ring;
    PyObject *kinds[2];
    Py_ssize_t turn, slots, batch, base, steps;
    char message[CUDA_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K(KK)(OO)nKnnnn:run", names, &stream, &events[0], &events[1], &kinds[0], &kinds[1], &turn,
                                     &ring, &slots, &batch, &base, &steps)) {
        return NULL;
    }
    CudaRun run = {.stream = (void *)(uintptr_t)stream, .turn = (size_t)turn, .ring = (const volatile CudaRecord *)(uintptr_t)ring,
                   .slots = (size_t)slots, .batch = (size_t)batch, .base = (size_t)base, .steps = (size_t)steps};
    for (size_t i = 0; i < 2; i++) {
        run.events[i] = (void *)(uintptr_t)events[i];
        if (read_step(kinds[i], &run.kinds[i]) != 0) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_TypeError, "CudaLoop.run: a step is a graph's handle, a BoundRun, or a sequence of those");
            }
            return NULL;
        }
    }
    if (turn < 0 || slots < 2 || batch < 1 || base < 0 || steps < 1 || ring == 0 || !whole(&run.kinds[0]) || !whole(&run.kinds[1])) {
        PyErr_SetString(PyExc_ValueError, "CudaLoop.run: expected turn ≥ 0, slots ≥ 2, batch ≥ 1, base ≥ 0, steps ≥ 1, a ring and two steps");
        return NULL;
    }
    run.out = calloc(run.steps * run.batch, sizeof *run.out);
    if (run.out == NULL) {
        return PyErr_NoMemory();
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = cuda_run(&loop->api, &run, &loop->cancelled, message);
    Py_END_ALLOW_THREADS;
    PyObject *result = NULL;
    if (failed) {
        PyErr_Format(native_device_error, "%s", message);
    } else {
        result = Py_BuildValue("(y#n)", (const char *)run.out, (Py_ssize_t)(run.done * run.batch * sizeof *run.out), (Py_ssize_t)run.launched);
    }
    free(run.out);
    return result;
}

static PyObject *loop_cancel(PyObject *self, PyObject *args) {
    atomic_store(&((LoopObject *)self)->cancelled, true);
    Py_RETURN_NONE;
}

static PyObject *loop_resume(PyObject *self, PyObject *args) {
    atomic_store(&((LoopObject *)self)->cancelled, false);
    Py_RETURN_NONE;
}

static PyObject *loop_get_cancelled(PyObject *self, void *closure) {
    return PyBool_FromLong(atomic_load(&((LoopObject *)self)->cancelled));
}

static PyMethodDef loop_methods[] = {
    {"run", (PyCFunction)(void (*)(void))loop_run, METH_VARARGS | METH_KEYWORDS, "(records [steps, batch] as bytes, how many steps were launched)."},
    {"cancel", loop_cancel, METH_NOARGS, "Ends a running call after the step that is under way, and later ones at once."},
    {"resume", loop_resume, METH_NOARGS, "Takes `cancel` back."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef loop_getset[] = {
    {"cancelled", loop_get_cancelled, NULL, "Whether `cancel` was called since the last `resume`.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot loop_slots[] = {
    {Py_tp_init, loop_init},
    {Py_tp_dealloc, loop_dealloc},
    {Py_tp_methods, loop_methods},
    {Py_tp_getset, loop_getset},
    {Py_tp_doc, "CudaLoop(library): launches decode steps through the CUDA driver's shared library."},
    {0, NULL},
};

static PyType_Spec loop_spec = {
    .name = "vlm_edge_runtime._native.CudaLoop",
    .basicsize = sizeof(LoopObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = loop_slots,
};

int native_add_cuda_loop_type(PyObject *module) {
    PyObject *type = PyType_FromSpec(&loop_spec);
    const int result = type != NULL ? PyModule_AddObjectRef(module, "CudaLoop", type) : -1;
    Py_XDECREF(type);
    return result;
}
