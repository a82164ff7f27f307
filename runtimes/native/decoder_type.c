/* `_native.DecoderState`: a KV cache and its token loop. One call at a time; a second thread's call is refused, not queued. */
#include "decoder_type.h"

PyTypeObject *state_type;

static void free_decoder(StateObject *state) {
    Decoder *decoder = state->decoder;
    state->decoder = NULL;
    Py_BEGIN_ALLOW_THREADS;
    decoder_free(decoder);
    Py_END_ALLOW_THREADS;
}

Decoder *state_enter(StateObject *state) {
    if (atomic_exchange(&state->busy, true)) {
        PyErr_SetString(native_device_error, "the decoder state is in use by another thread: one call at a time");
        return NULL;
    }
    if (state->decoder == NULL) {
        atomic_store(&state->busy, false);
        PyErr_SetString(native_device_error, "the decoder state is closed");
    }
    return state->decoder;
}

void state_leave(StateObject *state) {
    if (atomic_load(&state->close_wanted)) {
        free_decoder(state);
    }
    atomic_store(&state->busy, false);
}

static int state_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"decoder", "embed_tokens", "batch", "capacity", "prefill_chunk", NULL};
    StateObject *state = (StateObject *)self;
    PyObject *decoder_object, *embed_object;
    Py_ssize_t batch, capacity, chunk = 0;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOnn|n:DecoderState", names, &decoder_object, &embed_object, &batch, &capacity, &chunk)) {
        return -1;
    }
    if (state->batch != 0) {
        PyErr_SetString(PyExc_TypeError, "a DecoderState is initialised once");
        return -1;
    }
    if (batch < 1 || batch > DECODER_MAX_BATCH || capacity < 1 || capacity >= INT32_MAX || chunk < 0) {
        PyErr_Format(PyExc_ValueError, "batch %zd, capacity %zd, prefill_chunk %zd: expected 1 to %d, 1 to 2147483646, 0 or more", batch, capacity, chunk,
                     DECODER_MAX_BATCH);
        return -1;
    }
    SessionCore *decoder = session_core_from_object(decoder_object);
    SessionCore *embed = decoder != NULL ? session_core_from_object(embed_object) : NULL;
    if (embed != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        state->decoder = decoder_new(decoder, embed, (size_t)batch, (size_t)capacity, (size_t)chunk, message);
        Py_END_ALLOW_THREADS;
        if (state->decoder == NULL) {
            PyErr_Format(native_device_error, "%s", message);
        } else {
            state->batch = batch;
            state->capacity = capacity;
        }
    }
    session_core_release(decoder);
    session_core_release(embed);
    return state->decoder != NULL ? 0 : -1;
}

static void state_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    free_decoder((StateObject *)self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *times_list(RunTimes *times) {
    PyObject *list = PyList_New((Py_ssize_t)times->count);
    for (size_t i = 0; list != NULL && i < times->count; i++) {
        PyObject *seconds = PyFloat_FromDouble(times->seconds[i]);
        if (seconds == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, (Py_ssize_t)i, seconds);
        }
    }
    times->count = 0;
    return list;
}

static PyObject *state_take_times(PyObject *self, PyObject *args) {
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    PyObject *embed = times_list(&decoder->embed_times), *steps = times_list(&decoder->decoder_times);
    PyObject *result = embed != NULL && steps != NULL ? PyTuple_Pack(2, embed, steps) : NULL;
    Py_XDECREF(embed);
    Py_XDECREF(steps);
    state_leave((StateObject *)self);
    return result;
}

static PyObject *state_cancel(PyObject *self, PyObject *args) {
    atomic_store(&((StateObject *)self)->cancelled, true);
    Py_RETURN_NONE;
}

static PyObject *state_close(PyObject *self, PyObject *args) {
    StateObject *state = (StateObject *)self;
    atomic_store(&state->close_wanted, true);
    atomic_store(&state->cancelled, true);
    if (!atomic_exchange(&state->busy, true)) {
        state_leave(state);
    }
    Py_RETURN_NONE;
}

static PyObject *state_get_lengths(PyObject *self, void *closure) {
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    PyObject *list = PyList_New((Py_ssize_t)decoder->batch);
    for (size_t i = 0; list != NULL && i < decoder->batch; i++) {
        PyObject *length = PyLong_FromSize_t(decoder->rows[i].length);
        if (length == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, (Py_ssize_t)i, length);
        }
    }
    state_leave((StateObject *)self);
    return list;
}

static PyObject *state_get_batch(PyObject *self, void *closure) { return PyLong_FromSsize_t(((StateObject *)self)->batch); }
static PyObject *state_get_capacity(PyObject *self, void *closure) { return PyLong_FromSsize_t(((StateObject *)self)->capacity); }

static PyObject *state_get_kv_bytes(PyObject *self, void *closure) {
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    PyObject *bytes = PyLong_FromSize_t(decoder->kv_bytes);
    state_leave((StateObject *)self);
    return bytes;
}

static PyObject *state_get_verifies(PyObject *self, void *closure) {
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    const bool verifies = decoder_verifies(decoder);
    state_leave((StateObject *)self);
    return PyBool_FromLong(verifies);
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))function, METH_VARARGS | METH_KEYWORDS

static PyMethodDef state_methods[] = {
    {"bind", KEYWORDS(state_bind), "Sets an empty row's static inputs and initial states."},
    {"prefill", KEYWORDS(state_prefill), "Appends embeddings to a row."},
    {"logits", state_logits, METH_O, "float32 [vocab] as bytes: what follows the row's last token."},
    {"start", KEYWORDS(state_start), "Arms a row for decode."},
    {"decode", state_decode, METH_O, "Up to so many tokens for each armed row."},
    {"verify", state_verify, METH_O, "One step of each armed row with a draft of what follows it: as many tokens as decode would give."},
    {"push", KEYWORDS(state_push), "Replaces the row's newest token."},
    {"truncate", KEYWORDS(state_truncate), "Forgets a row's entries from a length on."},
    {"copy_prefix", KEYWORDS(state_copy_prefix), "Copies the first entries of another row."},
    {"step", state_step, METH_O, "Runs one token of every row; float32 [batch, vocab] as bytes: what follows."},
    {"reorder", state_reorder, METH_O, "Row i becomes what row sources[i] was."},
    {"outputs", state_outputs, METH_O, "Further outputs of a row's newest token: name -> (bytes, type, shape)."},
    {"take_times", state_take_times, METH_NOARGS, "Seconds of the runs since the last call: (embed_tokens, decoder)."},
    {"cancel", state_cancel, METH_NOARGS, "Makes a running decode return after its step."},
    {"close", state_close, METH_NOARGS, "Frees the cache."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef state_getset[] = {
    {"batch", state_get_batch, NULL, "rows", NULL},
    {"capacity", state_get_capacity, NULL, "entries per row", NULL},
    {"lengths", state_get_lengths, NULL, "valid entries per row", NULL},
    {"kv_bytes", state_get_kv_bytes, NULL, "bytes of the cache", NULL},
    {"verifies", state_get_verifies, NULL, "whether verify can be had", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot state_slots[] = {
    {Py_tp_init, state_init},     {Py_tp_dealloc, state_dealloc}, {Py_tp_methods, state_methods},
    {Py_tp_getset, state_getset}, {Py_tp_doc, "DecoderState(decoder, embed_tokens, batch, capacity, prefill_chunk=0)"},
    {0, NULL},
};

static PyType_Spec state_spec = {
    .name = "vlm_edge_runtime._native.DecoderState",
    .basicsize = sizeof(StateObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = state_slots,
};

int native_add_decoder_type(PyObject *module) {
    state_type = (PyTypeObject *)PyType_FromSpec(&state_spec);
    return state_type != NULL ? PyModule_AddObjectRef(module, "DecoderState", (PyObject *)state_type) : -1;
}
