/* `vlm_edge_runtime._native`: what Python sees of this folder. */
#include "kernels/kernels.h"
#include "native.h"
#include "plan.h"
#include "platform.h"

PyObject *native_device_error;
PyObject *native_context_length_error;
PyObject *native_prompt_error;

static PyObject *native_kernels(PyObject *module, PyObject *args) {
    static const char *const names[] = {"avx512", "avx2", "neon", "scalar"}; /* the order of kernels_best */
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < sizeof names / sizeof *names; i++) {
        PyObject *name = kernels_named(names[i]) != NULL ? PyUnicode_FromString(names[i]) : NULL;
        if (name != NULL && PyList_Append(list, name) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *native_trim_heap(PyObject *module, PyObject *args) {
    Py_BEGIN_ALLOW_THREADS;
    platform_trim_heap();
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *native_check_plan(PyObject *module, PyObject *args) {
    PyObject *path;
    char message[PLAN_MESSAGE_SIZE];
    int failed;
    if (!PyArg_ParseTuple(args, "O&:check_plan", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    const char *name = PyBytes_AsString(path);
    Py_BEGIN_ALLOW_THREADS;
    failed = plan_known(name, message);
    Py_END_ALLOW_THREADS;
    Py_DECREF(path);
    PyObject *text = failed ? PyUnicode_DecodeFSDefault(message) : NULL;
    if (text != NULL) {
        PyErr_SetObject(native_device_error, text);
        Py_DECREF(text);
    }
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *native_fill_pages(PyObject *module, PyObject *args) {
    Py_buffer mapping;
    bool filled;
    if (!PyArg_ParseTuple(args, "y*:fill_pages", &mapping)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    filled = platform_fill(mapping.buf, (size_t)mapping.len);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&mapping);
    return PyBool_FromLong(filled);
}

static PyMethodDef functions[] = {
    {"load_runtime", native_load_runtime, METH_VARARGS, "Opens ONNX Runtime's shared library; returns its version."},
    {"runtime_version", native_runtime_version, METH_NOARGS, "Version of the opened ONNX Runtime, or None."},
    {"session_placement", native_session_placement, METH_O, "(provider, operator, name) of a Session's nodes; None where ONNX Runtime cannot say."},
    {"normalize_u8", (PyCFunction)(void (*)(void))native_normalize_u8, METH_VARARGS | METH_KEYWORDS,
     "uint8 frames [h, w, c] → float32 planes or patches, (value · scale − mean) / std."},
    {"resize_u8", (PyCFunction)(void (*)(void))native_resize_u8, METH_VARARGS | METH_KEYWORDS,
     "Pillow's 8-bit resize of an interleaved image."},
    {"merge_features", (PyCFunction)(void (*)(void))native_merge_features, METH_VARARGS | METH_KEYWORDS,
     "Feature rows replace the embeddings of the image tokens, in order; returns how many."},
    {"kernels", native_kernels, METH_NOARGS, "Names of the native kernels that this CPU runs, fastest first."},
    {"plan_seconds", native_plan_seconds, METH_O, "What each step of a plan took since the last call."},
    {"graph_run", native_graph_run, METH_VARARGS, "Runs a graph's plan: {name: input array}, {name: output array}, which is filled."},
    {"rows_run", native_rows_run, METH_VARARGS, "Runs an embedding's plan: int64 tokens, float32 rows, which are filled."},
    {"plan_step", native_plan_step, METH_VARARGS, "One step of a decoder plan on arrays."},
    {"check_plan", native_check_plan, METH_VARARGS, "Raises DeviceError for a plan of another version."},
    {"fill_pages", native_fill_pages, METH_VARARGS, "Brings the pages of a mapped file into memory; whether they are there."},
    {"trim_heap", native_trim_heap, METH_NOARGS, "Gives back what the C library keeps of freed memory."},
    {"uniform", native_uniform, METH_VARARGS, "The step-th draw of a seed's stream, in [0, 1)."},
    {"philox", native_philox, METH_VARARGS, "Philox4x32-10 of a counter and a key."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "vlm_edge_runtime._native", .m_doc = "Native parts of the runtime.", .m_size = -1, .m_methods = functions,
};

static int import_errors(void) {
    PyObject *errors = PyImport_ImportModule("vlm_edge_runtime.errors");
    if (errors == NULL) {
        return -1;
    }
    native_device_error = PyObject_GetAttrString(errors, "DeviceError");
    native_context_length_error = PyObject_GetAttrString(errors, "ContextLengthError");
    native_prompt_error = PyObject_GetAttrString(errors, "PromptError");
    Py_DECREF(errors);
    return native_device_error != NULL && native_context_length_error != NULL && native_prompt_error != NULL ? 0 : -1;
}

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = import_errors() == 0 ? PyModule_Create(&definition) : NULL;
    if (module != NULL && (native_add_session_types(module) != 0 || native_add_sampler_type(module) != 0 || native_add_decoder_type(module) != 0 ||
                           native_add_bound_run_type(module) != 0 || native_add_cuda_loop_type(module) != 0)) {
        Py_CLEAR(module);
    }
    return module;
}
