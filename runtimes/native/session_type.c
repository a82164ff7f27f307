/* `_native.Session`: one loaded graph. */
#include "session.h"
#include "tensor_type.h"

#include <stdlib.h>

typedef struct {
    PyObject_HEAD
    SessionCore *core; /* NULL: closed */
} SessionObject;

static PyTypeObject *session_type;

static void raise_device(const char *name, const char *message) { PyErr_Format(native_device_error, "graph '%s': %s", name, message); }

PyObject *native_load_runtime(PyObject *module, PyObject *args) {
    const char *path;
    char message[ORT_MESSAGE_SIZE];
    int failed;
    if (!PyArg_ParseTuple(args, "s:load_runtime", &path)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    failed = ort_load(path, message);
    Py_END_ALLOW_THREADS;
    if (failed) {
        PyErr_Format(native_device_error, "cannot use ONNX Runtime at %s: %s", path, message);
        return NULL;
    }
    return PyUnicode_FromString(ort_version());
}

PyObject *native_runtime_version(PyObject *module, PyObject *args) {
    if (ort_version() == NULL) {
        Py_RETURN_NONE;
    }
    return PyUnicode_FromString(ort_version());
}

/* Reads {str: str} into an array that borrows from `texts` (a list of bytes that keeps them alive). */
static int read_config(PyObject *mapping, PyObject **texts, ConfigEntry **entries, size_t *count) {
    PyObject *items = PyMapping_Items(mapping);
    if (items == NULL) {
        return -1;
    }
    const Py_ssize_t size = PyList_Size(items);
    *texts = PyList_New(0);
    *entries = calloc((size_t)size + 1, sizeof **entries);
    *count = (size_t)size;
    int result = *texts != NULL && *entries != NULL ? 0 : -1;
    for (Py_ssize_t i = 0; result == 0 && i < size; i++) {
        PyObject *item = PyList_GetItem(items, i);
        for (Py_ssize_t side = 0; result == 0 && side < 2; side++) {
            PyObject *text = PyUnicode_AsUTF8String(PyTuple_GetItem(item, side));
            if (text == NULL || PyList_Append(*texts, text) != 0) {
                result = -1;
            } else {
                *(side == 0 ? &(*entries)[i].key : &(*entries)[i].value) = PyBytes_AsString(text);
            }
            Py_XDECREF(text);
        }
    }
    if (result != 0 && !PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    Py_DECREF(items);
    return result;
}

static int session_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model", "name", "config", "optimization_level", "threads", "spin", "plan", "kernels", "cuda", NULL};
    SessionObject *object = (SessionObject *)self;
    PyObject *model_object, *config_object = NULL, *cuda_object = NULL, *model_bytes = NULL, *texts = NULL, *cuda_texts = NULL;
    ConfigEntry *config = NULL, *options = NULL;
    ConfigEntries entries = {NULL, 0}, cuda = {NULL, 0};
    const char *name, *kernels = NULL;
    int level = 99, threads = 1, spin = 1, plan = 0, result = -1;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|OiippzO:Session", names, &model_object, &name, &config_object, &level, &threads, &spin, &plan,
                                     &kernels, &cuda_object)) {
        return -1;
    }
    if (!plan && ort_version() == NULL) {
        PyErr_SetString(native_device_error, "ONNX Runtime is not loaded: call load_runtime first");
        return -1;
    }
    if (object->core != NULL) {
        PyErr_SetString(PyExc_TypeError, "a Session is initialised once");
        return -1;
    }
    if (threads < 1) {
        PyErr_Format(PyExc_ValueError, "threads is %d, expected 1 or more", threads);
        return -1;
    }
    if (plan && PyBytes_Check(model_object)) {
        PyErr_SetString(PyExc_TypeError, "a plan is opened by its path");
        return -1;
    }
    const bool in_memory = PyBytes_Check(model_object);
    model_bytes = in_memory ? Py_NewRef(model_object) : PyUnicode_EncodeFSDefault(model_object);
    if (cuda_object == Py_None) {
        cuda_object = NULL;
    }
    if (model_bytes == NULL || (config_object != NULL && read_config(config_object, &texts, &config, &entries.count) != 0) ||
        (cuda_object != NULL && read_config(cuda_object, &cuda_texts, &options, &cuda.count) != 0)) {
        goto done;
    }
    entries.entries = config;
    cuda.entries = options;
    const char *model = PyBytes_AsString(model_bytes);
    const size_t size = in_memory ? (size_t)PyBytes_Size(model_bytes) : 0;
    if (in_memory && size == 0) {
        PyErr_SetString(PyExc_ValueError, "model is empty");
        goto done;
    }
    SessionCore *core;
    Py_BEGIN_ALLOW_THREADS;
    core = plan ? session_core_load_plan(model, name, threads, spin != 0, kernels, message)
                : session_core_load(model, size, name, entries, cuda_object != NULL ? &cuda : NULL, level, threads, spin != 0, message);
    Py_END_ALLOW_THREADS;
    if (core == NULL) {
        raise_device(name, message);
    } else {
        object->core = core;
        result = 0;
    }
done:
    free(config);
    free(options);
    Py_XDECREF(texts);
    Py_XDECREF(cuda_texts);
    Py_XDECREF(model_bytes);
    return result;
}

static void session_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    session_core_release(((SessionObject *)self)->core);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static SessionCore *open_core(PyObject *self) {
    SessionCore *core = ((SessionObject *)self)->core;
    if (core == NULL) {
        PyErr_SetString(native_device_error, "the graph is closed");
    }
    return core;
}

SessionCore *session_core_from_object(PyObject *object) {
    if (!PyObject_TypeCheck(object, session_type)) {
        PyErr_SetString(PyExc_TypeError, "expected a _native.Session");
        return NULL;
    }
    SessionCore *core = open_core(object);
    return core != NULL ? session_core_retain(core) : NULL;
}

static PyObject *session_close(PyObject *self, PyObject *args) {
    SessionObject *object = (SessionObject *)self;
    SessionCore *core = object->core;
    object->core = NULL;
    Py_BEGIN_ALLOW_THREADS;
    session_core_release(core);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *value_shape(const ValueInfo *value) {
    PyObject *shape = PyTuple_New((Py_ssize_t)value->rank);
    for (size_t d = 0; shape != NULL && d < value->rank; d++) {
        PyObject *size = value->shape[d] >= 0 ? PyLong_FromLongLong(value->shape[d]) : PyUnicode_FromString(value->symbols[d]);
        if (size == NULL) {
            Py_CLEAR(shape);
        } else {
            PyTuple_SetItem(shape, (Py_ssize_t)d, size);
        }
    }
    return shape;
}

static PyObject *value_list(const ValueInfo *values, size_t count) {
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *shape = value_shape(&values[i]);
        PyObject *item = shape != NULL ? Py_BuildValue("(ssN)", values[i].name, element_name(values[i].type), shape) : NULL;
        if (item == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, (Py_ssize_t)i, item);
        }
    }
    return list;
}

static PyObject *session_get_inputs(PyObject *self, void *closure) {
    SessionCore *core = open_core(self);
    return core != NULL ? value_list(core->inputs, core->input_count) : NULL;
}

static PyObject *session_get_outputs(PyObject *self, void *closure) {
    SessionCore *core = open_core(self);
    return core != NULL ? value_list(core->outputs, core->output_count) : NULL;
}

static PyObject *session_get_name(PyObject *self, void *closure) {
    SessionCore *core = open_core(self);
    return core != NULL ? PyUnicode_FromString(core->name) : NULL;
}

/* {name: rows of the first dimension that are one image} of a graph's plan, whose inputs and outputs have such a dimension. */
static PyObject *session_get_together(PyObject *self, void *closure) {
    SessionCore *core = open_core(self);
    PyObject *found = core != NULL ? PyDict_New() : NULL;
    const size_t count = core != NULL && core->plan != NULL && core->plan->graph ? core->input_count + core->output_count : 0;
    for (size_t i = 0; found != NULL && i < count; i++) {
        const ValueInfo *value = i < core->input_count ? &core->inputs[i] : &core->outputs[i - core->input_count];
        PyObject *each = PyLong_FromLongLong(-value->shape[0]);
        if (each == NULL || PyDict_SetItemString(found, value->name, each) != 0) {
            Py_CLEAR(found);
        }
        Py_XDECREF(each);
    }
    return found;
}

static PyObject *session_get_shared_pool(PyObject *self, void *closure) {
    SessionCore *core = open_core(self);
    return core != NULL ? PyBool_FromLong(core->shared_pool) : NULL;
}

static PyObject *session_run(PyObject *self, PyObject *feeds) {
    SessionCore *core = open_core(self);
    return core != NULL ? session_run_feeds(core, feeds) : NULL;
}

static PyObject *session_get_kernels(PyObject *self, void *closure) {
    const SessionCore *core = open_core(self);
    if (core == NULL) {
        return NULL;
    }
    if (core->plan == NULL) {
        Py_RETURN_NONE;
    }
    return PyUnicode_FromString(core->plan->kernels->name);
}

static PyMethodDef session_methods[] = {
    {"run", session_run, METH_O, "All outputs for {name: array}."},
    {"close", session_close, METH_NOARGS, "Frees the session once nothing uses it any more."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef session_getset[] = {
    {"name", session_get_name, NULL, "the graph's role", NULL},
    {"inputs", session_get_inputs, NULL, "(name, dtype, shape) of each input", NULL},
    {"outputs", session_get_outputs, NULL, "(name, dtype, shape) of each output", NULL},
    {"kernels", session_get_kernels, NULL, "the instruction set that a plan runs with; None for a graph of ONNX Runtime", NULL},
    {"together", session_get_together, NULL, "Rows of a graph's plan that are one image, by name.", NULL},
    {"shared_pool", session_get_shared_pool, NULL, "whether it runs on the process-wide thread pool", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot session_slots[] = {
    {Py_tp_init, session_init},       {Py_tp_dealloc, session_dealloc}, {Py_tp_methods, session_methods},
    {Py_tp_getset, session_getset},   {Py_tp_doc, "Session(model, name, config={}, optimization_level=99, threads=1, spin=True, cuda=None)"},
    {0, NULL},
};

static PyType_Spec session_spec = {
    .name = "vlm_edge_runtime._native.Session",
    .basicsize = sizeof(SessionObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = session_slots,
};

int native_add_session_types(PyObject *module) {
    if (native_add_tensor_type(module) != 0) {
        return -1;
    }
    session_type = (PyTypeObject *)PyType_FromSpec(&session_spec);
    return session_type != NULL ? PyModule_AddObjectRef(module, "Session", (PyObject *)session_type) : -1;
}
