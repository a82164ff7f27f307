/* One run of a `_native.Session` on arrays. */
#include "session.h"
#include "tensor_type.h"

#include <stdlib.h>

static void raise_device(const char *name, const char *message) { PyErr_Format(native_device_error, "graph '%s': %s", name, message); }

/* Says which dimension does not fit; 0 when all do. ONNX Runtime would say so too, but not by our names. */
static int check_shape(const SessionCore *core, const ValueInfo *value, const Py_buffer *view) {
    if ((size_t)view->ndim != value->rank) {
        PyErr_Format(native_device_error, "graph '%s': input '%s' has %d dimensions, expected %zu", core->name, value->name, view->ndim,
                     value->rank);
        return -1;
    }
    for (size_t d = 0; d < value->rank; d++) {
        if (value->shape[d] >= 0 && value->shape[d] != view->shape[d]) {
            PyErr_Format(native_device_error, "graph '%s': input '%s' has size %zd in dimension %zu, expected %lld", core->name, value->name,
                         view->shape[d], d, (long long)value->shape[d]);
            return -1;
        }
    }
    return 0;
}

static int acquire_input(const SessionCore *core, const ValueInfo *value, PyObject *feeds, Py_buffer *view, OrtValue **out) {
    char message[ORT_MESSAGE_SIZE];
    int64_t shape[MAX_RANK];
    PyObject *name = PyUnicode_FromString(value->name);
    PyObject *array = name != NULL ? PyObject_GetItem(feeds, name) : NULL;
    Py_XDECREF(name);
    if (array == NULL) {
        if (PyErr_ExceptionMatches(PyExc_KeyError)) {
            PyErr_Clear();
            PyErr_Format(native_device_error, "graph '%s': input '%s' is missing", core->name, value->name);
        }
        return -1;
    }
    if (PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
        PyErr_Clear();
        PyErr_Format(native_device_error, "graph '%s': input '%s' is not a C-contiguous array", core->name, value->name);
        Py_DECREF(array);
        return -1;
    }
    Py_DECREF(array);
    const ElementType found = element_of_view(view);
    if (found != value->type || found == ELEMENT_UNKNOWN) {
        PyErr_Format(native_device_error, "graph '%s': input '%s' is %s, expected %s", core->name, value->name, element_name(found),
                     element_name(value->type));
    } else if (check_shape(core, value, view) == 0) {
        for (size_t d = 0; d < value->rank; d++) {
            shape[d] = view->shape[d];
        }
        if (ort_check(ort_wrap(view->buf, (size_t)view->len, shape, value->rank, (int)value->type, out), message) == 0) {
            return 0;
        }
        raise_device(core->name, message);
    }
    PyBuffer_Release(view);
    return -1;
}

static PyObject *collect_outputs(SessionCore *core, OrtValue **values) {
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = PyDict_New();
    for (size_t i = 0; i < core->output_count; i++) {
        OrtValue *value = values[i];
        values[i] = NULL;
        if (result == NULL) {
            ort.ReleaseValue(value);
            continue;
        }
        PyObject *tensor = tensor_from_value(core, value, message);
        if (tensor == NULL || PyDict_SetItemString(result, core->output_names[i], tensor) != 0) {
            Py_CLEAR(result);
        }
        Py_XDECREF(tensor);
    }
    return result;
}

PyObject *session_run_feeds(SessionCore *core, PyObject *feeds) {
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = NULL;
    if (core->plan != NULL) {
        raise_device(core->name, "a plan runs in a DecoderState only");
        return NULL;
    }
    const Py_ssize_t given = PyMapping_Size(feeds);
    if (given < 0) {
        return NULL;
    }
    session_core_retain(core); /* another thread may close the session while it runs */
    size_t ready = 0;
    Py_buffer *views = calloc(core->input_count + 1, sizeof *views);
    OrtValue **inputs = calloc(core->input_count + 1, sizeof *inputs);
    OrtValue **outputs = calloc(core->output_count + 1, sizeof *outputs);
    if (views == NULL || inputs == NULL || outputs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (; ready < core->input_count; ready++) {
        if (acquire_input(core, &core->inputs[ready], feeds, &views[ready], &inputs[ready]) != 0) {
            goto done;
        }
    }
    if ((size_t)given != core->input_count) {
        PyErr_Format(native_device_error, "graph '%s': %zd inputs were given, it has %zu", core->name, given, core->input_count);
        goto done;
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    platform_mutex_lock(&core->run_lock);
    failed = ort_check(ort.Run(core->session, NULL, core->input_names, (const OrtValue *const *)inputs, core->input_count, core->output_names,
                               core->output_count, outputs),
                       message);
    platform_mutex_unlock(&core->run_lock);
    Py_END_ALLOW_THREADS;
    if (failed) {
        raise_device(core->name, message);
    } else {
        result = collect_outputs(core, outputs);
    }
done:
    for (size_t i = 0; i < ready; i++) {
        ort.ReleaseValue(inputs[i]);
        PyBuffer_Release(&views[i]);
    }
    free(views);
    free(inputs);
    free(outputs);
    Py_BEGIN_ALLOW_THREADS;
    session_core_release(core);
    Py_END_ALLOW_THREADS;
    return result;
}
