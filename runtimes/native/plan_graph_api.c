/* `_native.graph_run`: the plan of a graph on arrays. */
#include "plan_graph.h"
#include "session.h"

#include <stdlib.h>

typedef struct {
    Py_buffer *views;
    size_t count; /* taken so far */
    size_t images;
    bool known; /* `images` is */
    size_t length; /* the size that is open in the plan; 0 where none is */
    bool length_known;
} Arrays;

/* Views of the named arrays, whose first dimensions are so many rows for each of one number of images; other sizes are the plan's. */
static int take(Arrays *arrays, const SessionCore *core, const ValueInfo *values, size_t count, PyObject *given, bool writable) {
    for (size_t i = 0; i < count; i++) {
        const ValueInfo *info = &values[i];
        PyObject *array = PyMapping_GetItemString(given, info->name);
        if (array == NULL) {
            PyErr_Clear();
            PyErr_Format(native_device_error, "graph '%s': '%s' is missing", core->name, info->name);
            return -1;
        }
        Py_buffer *view = &arrays->views[arrays->count];
        const int taken = acquire_view(array, view, info->type, (int)info->rank, writable, info->name);
        Py_DECREF(array);
        if (taken != 0) {
            return -1;
        }
        arrays->count++;
        for (size_t d = 1; d < info->rank; d++) {
            if (info->shape[d] < 0 && !arrays->length_known) {
                arrays->length = (size_t)view->shape[d];
                arrays->length_known = true;
            }
            const int64_t wanted = info->shape[d] < 0 ? (int64_t)arrays->length : info->shape[d];
            if (view->shape[d] != wanted) {
                PyErr_Format(native_device_error, "graph '%s': '%s' has size %zd in dimension %zu, expected %lld", core->name, info->name, view->shape[d], d,
                             (long long)wanted);
                return -1;
            }
        }
        const Py_ssize_t each = (Py_ssize_t)-info->shape[0], images = view->shape[0] / each;
        if (view->shape[0] % each != 0) {
            PyErr_Format(native_device_error, "graph '%s': '%s' has %zd rows, expected a multiple of %zd", core->name, info->name, view->shape[0], each);
            return -1;
        }
        if (arrays->known && (size_t)images != arrays->images) {
            PyErr_Format(native_device_error, "graph '%s': '%s' is for %zd images, others for %zu", core->name, info->name, images, arrays->images);
            return -1;
        }
        arrays->images = (size_t)images;
        arrays->known = true;
    }
    return 0;
}

static int run(SessionCore *core, const Arrays *arrays) {
    char message[PLAN_MESSAGE_SIZE];
    const size_t inputs = core->input_count, outputs = core->output_count;
    const void **from = calloc(inputs + 1, sizeof *from);
    float **to = calloc(outputs + 1, sizeof *to);
    int failed = -1;
    if (from == NULL || to == NULL) {
        PyErr_NoMemory();
    } else {
        for (size_t i = 0; i < inputs; i++) {
            from[i] = arrays->views[i].buf;
        }
        for (size_t i = 0; i < outputs; i++) {
            to[i] = arrays->views[inputs + i].buf;
        }
        const GraphRun call = {.images = arrays->images, .length = arrays->length, .inputs = from, .outputs = to};
        Py_BEGIN_ALLOW_THREADS;
        platform_mutex_lock(&core->run_lock);
        failed = graph_run(core->plan, &call, message);
        platform_mutex_unlock(&core->run_lock);
        Py_END_ALLOW_THREADS;
        if (failed) {
            PyErr_Format(native_device_error, "graph '%s': %s", core->name, message);
        }
    }
    free(from);
    free(to);
    return failed;
}

PyObject *native_graph_run(PyObject *module, PyObject *args) {
    PyObject *session, *feeds, *results;
    if (!PyArg_ParseTuple(args, "OOO:graph_run", &session, &feeds, &results)) {
        return NULL;
    }
    SessionCore *core = session_core_from_object(session);
    if (core == NULL) {
        return NULL;
    }
    Arrays arrays = {0};
    int failed = -1;
    if (core->plan == NULL || !core->plan->graph) {
        PyErr_SetString(PyExc_TypeError, "expected a session of a graph's plan");
    } else if ((arrays.views = calloc(core->input_count + core->output_count + 1, sizeof *arrays.views)) == NULL) {
        PyErr_NoMemory();
    } else if (take(&arrays, core, core->inputs, core->input_count, feeds, false) == 0 &&
               take(&arrays, core, core->outputs, core->output_count, results, true) == 0) {
        failed = run(core, &arrays);
    }
    for (size_t i = 0; i < arrays.count; i++) {
        PyBuffer_Release(&arrays.views[i]);
    }
    free(arrays.views);
    return session_core_done(core, failed);
}
