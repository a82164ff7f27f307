/* `_native.plan_step`: one step of a plan on arrays, as a graph would be run. For checking; the decode loop does not go this way. */
#include "plan_graph.h"
#include "session.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    SessionCore *core;
    Py_buffer *views; /* one per input; `obj` NULL: not taken */
    uint8_t **caches; /* copies, which the step changes */
    size_t *cache_bytes, *entries;
    const uint8_t **further;
    PlanRun run;
} Call;

static bool is_cache(const ValueInfo *value) { return strncmp(value->name, "past_key_values.", 16) == 0; }

static int take_views(Call *c, PyObject *feeds) {
    for (size_t i = 0; i < c->core->input_count; i++) {
        const ValueInfo *info = &c->core->inputs[i];
        PyObject *key = PyUnicode_FromString(info->name), *array = key != NULL ? PyObject_GetItem(feeds, key) : NULL;
        Py_XDECREF(key);
        if (array == NULL) {
            return -1;
        }
        const int taken = acquire_view(array, &c->views[i], info->type, (int)info->rank, false, info->name);
        Py_DECREF(array);
        if (taken != 0) {
            return -1;
        }
        for (size_t d = 0; d < info->rank; d++) {
            if (info->shape[d] >= 0 && c->views[i].shape[d] != info->shape[d]) {
                PyErr_Format(PyExc_ValueError, "'%s' has size %zd in dimension %zu, the plan takes %lld", info->name, c->views[i].shape[d], d, (long long)info->shape[d]);
                return -1;
            }
        }
    }
    return 0;
}

/* The sizes that have to agree: rows and tokens everywhere, one capacity, lengths that fit it. */
static int read_sizes(Call *c, size_t *rows_bytes) {
    const SessionCore *core = c->core;
    size_t caches = 0, further = 0;
    bool fits = true;
    for (size_t i = 0; i < core->input_count; i++) {
        if (strcmp(core->inputs[i].name, "inputs_embeds") == 0) {
            c->run.rows = (size_t)c->views[i].shape[0];
            c->run.tokens = (size_t)c->views[i].shape[1];
            c->run.embeds = c->views[i].buf;
        }
    }
    for (size_t i = 0; i < core->input_count; i++) {
        const ValueInfo *info = &core->inputs[i];
        const Py_buffer *view = &c->views[i];
        if (strcmp(info->name, "position_ids") == 0) {
            c->run.positions = view->buf;
            fits = fits && (size_t)view->len == c->run.rows * c->run.tokens * c->core->plan->position_axes * sizeof(int64_t);
        } else if (strcmp(info->name, "seqlens_k") == 0) {
            c->run.seqlens = view->buf;
            fits = fits && (size_t)view->len == c->run.rows * sizeof(int32_t);
        } else if (is_cache(info)) {
            fits = fits && (size_t)view->shape[0] == c->run.rows && (caches == 0 || (size_t)view->shape[2] == c->run.capacity);
            c->run.capacity = (size_t)view->shape[2];
            c->cache_bytes[caches] = c->run.rows > 0 ? (size_t)view->len / c->run.rows : 0;
            c->caches[caches] = malloc((size_t)view->len + 1);
            if (c->caches[caches] == NULL) {
                PyErr_NoMemory();
                return -1;
            }
            memcpy(c->caches[caches++], view->buf, (size_t)view->len);
        } else if (strcmp(info->name, "inputs_embeds") != 0 && strcmp(info->name, "total_sequence_length") != 0) {
            const bool by_token = info->rank > 1 && info->symbols[1] != NULL && strcmp(info->symbols[1], "sequence") == 0;
            c->entries[further] = (size_t)view->shape[info->rank > 2 ? 2 : info->rank - 1];
            for (size_t d = 3; by_token && d < info->rank; d++) {
                c->entries[further] *= (size_t)view->shape[d];
            }
            fits = fits && (!by_token || (size_t)view->shape[0] * (size_t)view->shape[1] == c->run.rows * c->run.tokens);
            c->further[further++] = view->buf;
        }
    }
    for (size_t row = 0; fits && row < c->run.rows; row++) {
        const int64_t length = (c->run.seqlens != NULL ? c->run.seqlens[row] : -1) + (int64_t)1;
        fits = length >= (int64_t)c->run.tokens && (size_t)length <= c->run.capacity;
    }
    if (!fits || c->run.rows == 0 || c->run.tokens == 0 || c->run.seqlens == NULL) {
        PyErr_SetString(PyExc_ValueError, "the arrays' rows, tokens, lengths and capacity do not fit each other");
        return -1;
    }
    *rows_bytes = c->run.rows * c->core->plan->vocab * sizeof(float);
    return 0;
}

static int put(PyObject *result, const char *name, const void *data, size_t bytes, const ValueInfo *info, const Py_ssize_t *shape) {
    PyObject *dims = PyTuple_New((Py_ssize_t)info->rank), *content = PyBytes_FromStringAndSize(data, (Py_ssize_t)bytes);
    for (size_t d = 0; dims != NULL && d < info->rank; d++) {
        PyTuple_SetItem(dims, (Py_ssize_t)d, PyLong_FromSsize_t(shape[d]));
    }
    PyObject *entry = dims != NULL && content != NULL ? Py_BuildValue("(OsO)", content, element_name(info->type), dims) : NULL;
    const int failed = entry == NULL || PyDict_SetItemString(result, name, entry) != 0;
    Py_XDECREF(entry);
    Py_XDECREF(dims);
    Py_XDECREF(content);
    return failed ? -1 : 0;
}

static PyObject *collect(const Call *c, size_t logits_bytes) {
    const SessionCore *core = c->core;
    PyObject *result = PyDict_New();
    size_t caches = 0;
    for (size_t i = 0; result != NULL && i < core->output_count; i++) {
        const ValueInfo *info = &core->outputs[i];
        const Py_ssize_t shape[] = {(Py_ssize_t)c->run.rows, 1, (Py_ssize_t)core->plan->vocab};
        if (strcmp(info->name, "logits") == 0 && put(result, info->name, c->run.logits, logits_bytes, info, shape) != 0) {
            Py_CLEAR(result);
        }
    }
    for (size_t i = 0; result != NULL && i < core->input_count; i++) {
        const ValueInfo *info = &core->inputs[i];
        char name[256];
        if (is_cache(info)) {
            snprintf(name, sizeof name, "present.%s", info->name + 16);
            if (put(result, name, c->caches[caches], (size_t)c->views[i].len, info, c->views[i].shape) != 0) {
                Py_CLEAR(result);
            }
            caches++;
        }
    }
    return result;
}

PyObject *native_plan_step(PyObject *module, PyObject *args) {
    PyObject *session, *feeds, *result = NULL;
    char message[PLAN_MESSAGE_SIZE];
    size_t bytes = 0;
    if (!PyArg_ParseTuple(args, "OO:plan_step", &session, &feeds)) {
        return NULL;
    }
    Call c = {.core = session_core_from_object(session)};
    if (c.core == NULL) {
        return NULL;
    }
    if (c.core->plan == NULL || c.core->plan->graph) {
        PyErr_SetString(PyExc_TypeError, "expected a session of a decoder's plan");
        session_core_release(c.core);
        return NULL;
    }
    const size_t inputs = c.core->input_count;
    c.views = calloc(inputs + 1, sizeof *c.views);
    c.caches = calloc(inputs + 1, sizeof *c.caches);
    c.cache_bytes = calloc(inputs + 1, sizeof *c.cache_bytes);
    c.entries = calloc(inputs + 1, sizeof *c.entries);
    c.further = calloc(inputs + 1, sizeof *c.further);
    if (c.views == NULL || c.caches == NULL || c.cache_bytes == NULL || c.entries == NULL || c.further == NULL) {
        PyErr_NoMemory();
    } else if (take_views(&c, feeds) == 0 && read_sizes(&c, &bytes) == 0) {
        c.run.logits = calloc(1, bytes + 1);
        c.run.caches = c.caches;
        c.run.cache_row_bytes = c.cache_bytes;
        c.run.inputs = c.further;
        c.run.input_sizes = c.entries;
        if (c.run.logits == NULL) {
            PyErr_NoMemory();
        } else {
            int failed;
            Py_BEGIN_ALLOW_THREADS;
            platform_mutex_lock(&c.core->run_lock);
            failed = plan_run(c.core->plan, &c.run, message);
            platform_mutex_unlock(&c.core->run_lock);
            Py_END_ALLOW_THREADS;
            if (failed) {
                PyErr_Format(native_device_error, "graph '%s': %s", c.core->name, message);
            } else {
                result = collect(&c, bytes);
            }
        }
    }
    for (size_t i = 0; i < inputs; i++) {
        if (c.views != NULL && c.views[i].obj != NULL) {
            PyBuffer_Release(&c.views[i]);
        }
        free(c.caches != NULL ? c.caches[i] : NULL);
    }
    free(c.views);
    free(c.caches);
    free(c.cache_bytes);
    free(c.entries);
    free(c.further);
    free(c.run.logits);
    session_core_release(c.core);
    return result;
}

/* A name, the width and the seconds of each step, all threads together, since the last call. The first call begins to measure. */
PyObject *native_plan_seconds(PyObject *module, PyObject *session) {
    static const char *const names[] = {"",     "quantize", "matmul", "gated", "norm", "angles", "rotary", "attention", "combine", "cross",
                                        "last", "unary",    "add",    "multiply", "lookup", "select", "seen", "greater",  "refine"};
    static const char *const graph_names[] = {"", "copy", "quantize", "matmul", "norm", "attention", "unary", "add", "multiply",
                                              "convert", "cosine", "rotary", "gather", "length", "spread", "pick"};
    _Static_assert(sizeof names / sizeof *names == STEP_KINDS && sizeof graph_names / sizeof *graph_names == GRAPH_KINDS, "a name for every kind");
    SessionCore *core = session_core_from_object(session);
    if (core == NULL) {
        return NULL;
    }
    if (core->plan == NULL) {
        session_core_release(core);
        PyErr_SetString(PyExc_TypeError, "expected a session of a plan");
        return NULL;
    }
    Plan *plan = core->plan;
    const size_t threads = pool_threads(plan->pool), steps = plan->step_count;
    PyObject *list = PyList_New((Py_ssize_t)steps);
    Py_BEGIN_ALLOW_THREADS;
    platform_mutex_lock(&core->run_lock);
    Py_END_ALLOW_THREADS;
    for (size_t i = 0; list != NULL && i < steps; i++) {
        double sum = 0.0;
        for (size_t thread = 0; plan->seconds != NULL && thread < threads; thread++) {
            sum += plan->seconds[thread * steps + i];
        }
        PyObject *entry = Py_BuildValue("(sId)", plan->rows ? "rows" : (plan->graph ? graph_names : names)[plan->steps[i].kind], plan->steps[i].width, sum);
        if (entry == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, (Py_ssize_t)i, entry);
        }
    }
    if (plan->seconds == NULL) {
        plan->seconds = calloc(threads * steps + 1, sizeof *plan->seconds);
    } else {
        memset(plan->seconds, 0, threads * steps * sizeof *plan->seconds);
    }
    platform_mutex_unlock(&core->run_lock);
    session_core_release(core);
    return list;
}
