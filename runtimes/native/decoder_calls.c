/* The calls of `_native.DecoderState` that work on its rows. */
#include "decoder_type.h"
#include "sampler_type.h"

#include <stdlib.h>

PyObject *state_raise(DecoderStatus status, const char *message) {
    PyObject *kind = status == DECODER_CONTEXT ? native_context_length_error : status == DECODER_USAGE ? PyExc_ValueError : native_device_error;
    PyErr_Format(kind, "%s", message);
    return NULL;
}

int state_check_row(const Decoder *decoder, Py_ssize_t row) {
    if (row < 0 || (size_t)row >= decoder->batch) {
        PyErr_Format(PyExc_ValueError, "row %zd is outside the batch of %zu", row, decoder->batch);
        return -1;
    }
    return 0;
}

static int acquire_prefill(const Decoder *decoder, PyObject *embeds_object, PyObject *positions_object, Py_buffer *embeds, Py_buffer *positions) {
    const bool axes = decoder->position_axes > 1;
    if (acquire_view(embeds_object, embeds, ELEMENT_FLOAT32, 2, false, "inputs_embeds") != 0) {
        return -1;
    }
    if (acquire_view(positions_object, positions, ELEMENT_INT64, axes ? 2 : 1, false, "positions") != 0) {
        PyBuffer_Release(embeds);
        return -1;
    }
    if ((size_t)embeds->shape[1] != decoder->hidden) {
        PyErr_Format(PyExc_ValueError, "inputs_embeds are %zd wide, the decoder takes %zu", embeds->shape[1], decoder->hidden);
    } else if (positions->shape[axes] != embeds->shape[0]) {
        PyErr_Format(PyExc_ValueError, "%zd positions for %zd embeddings", positions->shape[axes], embeds->shape[0]);
    } else if (axes && (size_t)positions->shape[0] != decoder->position_axes) {
        PyErr_Format(PyExc_ValueError, "positions have %zd axes, the decoder takes %zu", positions->shape[0], decoder->position_axes);
    } else {
        return 0;
    }
    PyBuffer_Release(embeds);
    PyBuffer_Release(positions);
    return -1;
}

PyObject *state_prefill(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"row", "inputs_embeds", "positions", "token_inputs", NULL};
    StateObject *state = (StateObject *)self;
    PyObject *embeds_object, *positions_object, *mapping = NULL, *result = NULL;
    Py_ssize_t row;
    Py_buffer embeds, positions;
    Given given;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nOO|O:prefill", names, &row, &embeds_object, &positions_object, &mapping)) {
        return NULL;
    }
    Decoder *decoder = state_enter(state);
    if (decoder == NULL) {
        return NULL;
    }
    if (state_check_row(decoder, row) == 0 && acquire_prefill(decoder, embeds_object, positions_object, &embeds, &positions) == 0) {
        if (given_acquire(decoder, (size_t)row, mapping, GIVEN_PREFILL, embeds.shape[0], &given) == 0) {
            const InputValues values = {given.data, given.sizes};
            DecoderStatus status;
            Py_BEGIN_ALLOW_THREADS;
            status = decoder_prefill(decoder, (size_t)row, embeds.buf, positions.buf, (size_t)embeds.shape[0], &values, message);
            Py_END_ALLOW_THREADS;
            given_release(decoder, &given);
            result = status == DECODER_OK ? Py_NewRef(Py_None) : state_raise(status, message);
        }
        PyBuffer_Release(&embeds);
        PyBuffer_Release(&positions);
    }
    state_leave(state);
    return result;
}

PyObject *state_logits(PyObject *self, PyObject *argument) {
    StateObject *state = (StateObject *)self;
    const Py_ssize_t row = PyLong_AsSsize_t(argument);
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = NULL;
    if (row == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Decoder *decoder = state_enter(state);
    if (decoder == NULL) {
        return NULL;
    }
    if (state_check_row(decoder, row) == 0) {
        const float *logits;
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_logits(decoder, (size_t)row, &logits, message);
        Py_END_ALLOW_THREADS;
        result = status == DECODER_OK ? PyBytes_FromStringAndSize((const char *)logits, (Py_ssize_t)(decoder->vocab * sizeof *logits))
                                      : state_raise(status, message);
    }
    state_leave(state);
    return result;
}

int state_read_integers(PyObject *object, int64_t **out, size_t *count) {
    PyObject *list = PySequence_List(object);
    if (list == NULL) {
        return -1;
    }
    const Py_ssize_t size = PyList_Size(list);
    int64_t *tokens = malloc(((size_t)size + 1) * sizeof *tokens);
    for (Py_ssize_t i = 0; tokens != NULL && i < size; i++) {
        tokens[i] = PyLong_AsLongLong(PyList_GetItem(list, i));
        if (tokens[i] == -1 && PyErr_Occurred()) {
            free(tokens);
            Py_DECREF(list);
            return -1;
        }
    }
    Py_DECREF(list);
    if (tokens == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    *out = tokens;
    *count = (size_t)size;
    return 0;
}

/* Builds what `start` hands over: the sampler with its history, and the EOS tokens. */
static int read_start(const Decoder *decoder, PyObject *params_object, PyObject *history_object, Sampler *sampler, int64_t **eos,
                      size_t *eos_count) {
    Py_buffer history;
    PyObject *eos_object = NULL;
    int result = -1;
    if (acquire_view(history_object, &history, ELEMENT_INT64, 1, false, "history") != 0) {
        return -1;
    }
    eos_object = PyObject_GetAttrString(params_object, "eos_token_ids");
    if (eos_object != NULL && state_read_integers(eos_object, eos, eos_count) == 0) {
        if (sampler_from_object(sampler, params_object, decoder->vocab) != 0) {
            free(*eos);
        } else {
            for (Py_ssize_t i = 0; i < history.shape[0]; i++) {
                sampler_accept(sampler, ((const int64_t *)history.buf)[i]);
            }
            result = 0;
        }
    }
    Py_XDECREF(eos_object);
    PyBuffer_Release(&history);
    return result;
}

PyObject *state_start(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"row", "params", "history", "next_position", "token_inputs", NULL};
    StateObject *state = (StateObject *)self;
    PyObject *params, *history, *mapping = NULL, *result = NULL;
    Py_ssize_t row;
    long long next_position;
    Sampler sampler;
    Given given = {0};
    int64_t *eos = NULL;
    size_t eos_count = 0;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nOOL|O:start", names, &row, &params, &history, &next_position, &mapping)) {
        return NULL;
    }
    Decoder *decoder = state_enter(state);
    if (decoder == NULL) {
        return NULL;
    }
    if (state_check_row(decoder, row) == 0 && given_acquire(decoder, (size_t)row, mapping, GIVEN_START, 0, &given) == 0 &&
        read_start(decoder, params, history, &sampler, &eos, &eos_count) == 0) {
        const InputValues values = {given.data, given.sizes};
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_start(decoder, (size_t)row, &sampler, eos, eos_count, next_position, &values, message);
        Py_END_ALLOW_THREADS;
        if (status == DECODER_OK) {
            atomic_store(&state->cancelled, false);
            result = Py_NewRef(Py_None);
        } else {
            sampler_free(&sampler);
            free(eos);
            state_raise(status, message);
        }
    }
    given_release(decoder, &given);
    state_leave(state);
    return result;
}

static PyObject *top_list(const TokenLogprob *top, size_t count) {
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *pair = Py_BuildValue("(Ld)", (long long)top[i].token, top[i].logprob);
        if (pair == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, (Py_ssize_t)i, pair);
        }
    }
    return list;
}

/* (tokens, logprobs, top_logprobs, finished) of one row; the lists that were not asked for are empty. */
static PyObject *row_tuple(const RowOutput *out) {
    PyObject *tokens = PyList_New((Py_ssize_t)out->count);
    PyObject *logprobs = PyList_New(out->logprobs != NULL ? (Py_ssize_t)out->count : 0);
    PyObject *top = PyList_New(out->top != NULL ? (Py_ssize_t)out->count : 0);
    bool ok = tokens != NULL && logprobs != NULL && top != NULL;
    for (size_t i = 0; ok && i < out->count; i++) {
        PyObject *token = PyLong_FromLongLong(out->tokens[i]);
        ok = token != NULL && PyList_SetItem(tokens, (Py_ssize_t)i, token) == 0;
        if (ok && out->logprobs != NULL) {
            PyObject *value = PyFloat_FromDouble(out->logprobs[i]);
            ok = value != NULL && PyList_SetItem(logprobs, (Py_ssize_t)i, value) == 0;
        }
        if (ok && out->top != NULL) {
            PyObject *list = top_list(out->top + i * out->top_count, out->top_count);
            ok = list != NULL && PyList_SetItem(top, (Py_ssize_t)i, list) == 0;
        }
    }
    PyObject *result = ok ? Py_BuildValue("(OOOO)", tokens, logprobs, top, out->finished ? Py_True : Py_False) : NULL;
    Py_XDECREF(tokens);
    Py_XDECREF(logprobs);
    Py_XDECREF(top);
    return result;
}

PyObject *state_rows_list(DecoderStatus status, const char *message, RowOutput *outputs, size_t batch) {
    PyObject *result = status == DECODER_OK ? PyList_New((Py_ssize_t)batch) : state_raise(status, message);
    for (size_t i = 0; result != NULL && i < batch; i++) {
        PyObject *row = row_tuple(&outputs[i]);
        if (row == NULL) {
            Py_CLEAR(result);
        } else {
            PyList_SetItem(result, (Py_ssize_t)i, row);
        }
    }
    row_outputs_free(outputs, batch);
    return result;
}

PyObject *state_decode(PyObject *self, PyObject *argument) {
    StateObject *state = (StateObject *)self;
    const Py_ssize_t steps = PyLong_AsSsize_t(argument);
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = NULL;
    if (steps == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (steps < 1) {
        PyErr_Format(PyExc_ValueError, "max_steps is %zd, expected 1 or more", steps);
        return NULL;
    }
    Decoder *decoder = state_enter(state);
    if (decoder == NULL) {
        return NULL;
    }
    const size_t batch = decoder->batch;
    RowOutput *outputs = calloc(batch, sizeof *outputs);
    if (outputs == NULL) {
        PyErr_NoMemory();
    } else {
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_decode(decoder, (size_t)steps, &state->cancelled, outputs, message);
        Py_END_ALLOW_THREADS;
        result = state_rows_list(status, message, outputs, batch);
        free(outputs);
    }
    state_leave(state);
    return result;
}

PyObject *state_push(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"row", "token", NULL};
    Py_ssize_t row;
    long long token;
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nL:push", names, &row, &token)) {
        return NULL;
    }
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    if (state_check_row(decoder, row) == 0) {
        const DecoderStatus status = decoder_push(decoder, (size_t)row, token, message);
        result = status == DECODER_OK ? Py_NewRef(Py_None) : state_raise(status, message);
    }
    state_leave((StateObject *)self);
    return result;
}

PyObject *state_truncate(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"row", "length", NULL};
    Py_ssize_t row, length;
    char message[ORT_MESSAGE_SIZE];
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nn:truncate", names, &row, &length)) {
        return NULL;
    }
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    if (length < 0) {
        PyErr_Format(PyExc_ValueError, "length is %zd, expected 0 or more", length);
    } else if (state_check_row(decoder, row) == 0) {
        const DecoderStatus status = decoder_truncate(decoder, (size_t)row, (size_t)length, message);
        result = status == DECODER_OK ? Py_NewRef(Py_None) : state_raise(status, message);
    }
    state_leave((StateObject *)self);
    return result;
}

PyObject *state_copy_prefix(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"row", "source", "source_row", "length", NULL};
    StateObject *state = (StateObject *)self;
    PyObject *source_object, *result = NULL;
    Py_ssize_t row, source_row, length;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nO!nn:copy_prefix", names, &row, state_type, &source_object, &source_row, &length)) {
        return NULL;
    }
    if (length < 0) {
        PyErr_Format(PyExc_ValueError, "length is %zd, expected 0 or more", length);
        return NULL;
    }
    Decoder *decoder = state_enter(state);
    if (decoder == NULL) {
        return NULL;
    }
    Decoder *source = source_object == self ? decoder : state_enter((StateObject *)source_object);
    if (source != NULL && state_check_row(decoder, row) == 0 && state_check_row(source, source_row) == 0) {
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_copy_prefix(decoder, (size_t)row, source, (size_t)source_row, (size_t)length, message);
        Py_END_ALLOW_THREADS;
        result = status == DECODER_OK ? Py_NewRef(Py_None) : state_raise(status, message);
    }
    if (source != NULL && source_object != self) {
        state_leave((StateObject *)source_object);
    }
    state_leave(state);
    return result;
}
