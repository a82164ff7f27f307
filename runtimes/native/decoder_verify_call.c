/* `_native.DecoderState.verify`. */
#include "decoder_type.h"

#include <stdlib.h>

/* One list of tokens for each row; the lists' memory is the caller's, also after an error. */
static int read_drafts(PyObject *object, Draft *drafts, size_t batch) {
    PyObject *list = PySequence_List(object);
    int result = list != NULL ? 0 : -1;
    if (list != NULL && (size_t)PyList_Size(list) != batch) {
        PyErr_Format(PyExc_ValueError, "%zd drafts for %zu rows", PyList_Size(list), batch);
        result = -1;
    }
    for (size_t i = 0; result == 0 && i < batch; i++) {
        result = state_read_integers(PyList_GetItem(list, (Py_ssize_t)i), &drafts[i].tokens, &drafts[i].count);
    }
    Py_XDECREF(list);
    return result;
}

PyObject *state_verify(PyObject *self, PyObject *argument) {
    StateObject *state = (StateObject *)self;
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = NULL;
    Decoder *decoder = state_enter(state);
    if (decoder == NULL) {
        return NULL;
    }
    const size_t batch = decoder->batch;
    RowOutput *outputs = calloc(batch, sizeof *outputs);
    Draft *drafts = calloc(batch, sizeof *drafts);
    if (outputs == NULL || drafts == NULL) {
        PyErr_NoMemory();
    } else if (read_drafts(argument, drafts, batch) == 0) {
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_verify(decoder, drafts, &state->cancelled, outputs, message);
        Py_END_ALLOW_THREADS;
        result = state_rows_list(status, message, outputs, batch);
    }
    for (size_t i = 0; drafts != NULL && i < batch; i++) {
        free(drafts[i].tokens);
    }
    free(drafts);
    free(outputs);
    state_leave(state);
    return result;
}
