/* `_native.rows_run`: the plan of an embedding on arrays. */
#include "plan_rows.h"
#include "session.h"

static int run(SessionCore *core, const Py_buffer *tokens, const Py_buffer *rows) {
    char message[PLAN_MESSAGE_SIZE];
    const size_t count = (size_t)tokens->shape[0] * (size_t)tokens->shape[1];
    if (rows->shape[0] != tokens->shape[0] || rows->shape[1] != tokens->shape[1] || (size_t)rows->shape[2] != core->plan->hidden) {
        PyErr_Format(PyExc_ValueError, "rows of [%zd, %zd, %zd] for tokens of [%zd, %zd], each of which has %zu numbers", rows->shape[0], rows->shape[1],
                     rows->shape[2], tokens->shape[0], tokens->shape[1], core->plan->hidden);
        return -1;
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    platform_mutex_lock(&core->run_lock);
    failed = rows_run(core->plan, tokens->buf, count, rows->buf, message);
    platform_mutex_unlock(&core->run_lock);
    Py_END_ALLOW_THREADS;
    if (failed) {
        PyErr_Format(native_device_error, "graph '%s': %s", core->name, message);
    }
    return failed;
}

PyObject *native_rows_run(PyObject *module, PyObject *args) {
    PyObject *session, *given, *results;
    Py_buffer tokens, rows;
    if (!PyArg_ParseTuple(args, "OOO:rows_run", &session, &given, &results)) {
        return NULL;
    }
    SessionCore *core = session_core_from_object(session);
    if (core == NULL) {
        return NULL;
    }
    int failed = -1;
    if (core->plan == NULL || !core->plan->rows) {
        PyErr_SetString(PyExc_TypeError, "expected a session of an embedding's plan");
    } else if (acquire_view(given, &tokens, ELEMENT_INT64, 2, false, "tokens") == 0) {
        if (acquire_view(results, &rows, ELEMENT_FLOAT32, 3, true, "rows") == 0) {
            failed = run(core, &tokens, &rows);
            PyBuffer_Release(&rows);
        }
        PyBuffer_Release(&tokens);
    }
    return session_core_done(core, failed);
}
