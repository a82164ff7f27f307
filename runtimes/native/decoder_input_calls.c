/* The calls of `_native.DecoderState` with further inputs and outputs, and those for beams. */
#include "decoder_type.h"

#include <stdlib.h>
#include <string.h>

#define TEXT_SIZE 512

/* Appends as much as fits. */
static void append(char text[TEXT_SIZE], const char *more) { strncat(text, more, TEXT_SIZE - strlen(text) - 1); }

static bool of_use(const FurtherInput *input, GivenUse use) { return (input->kind == INPUT_TOKEN) == (use != GIVEN_BIND); }

/* Every key must be an input of this use. */
static int check_names(const Decoder *d, PyObject *mapping, GivenUse use) {
    PyObject *keys = PyMapping_Keys(mapping);
    int result = keys != NULL ? 0 : -1;
    for (Py_ssize_t i = 0; result == 0 && i < PyList_Size(keys); i++) {
        PyObject *key = PyList_GetItem(keys, i);
        bool known = false;
        for (size_t k = 0; k < d->input_count; k++) {
            known = known || (of_use(&d->inputs[k], use) && PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, d->inputs[k].info->name) == 0);
        }
        if (!known) {
            char text[TEXT_SIZE] = "";
            for (size_t k = 0; k < d->input_count; k++) {
                if (of_use(&d->inputs[k], use)) {
                    append(text, *text != '\0' ? ", '" : "'");
                    append(text, d->inputs[k].info->name);
                    append(text, "'");
                }
            }
            PyErr_Format(PyExc_ValueError, use == GIVEN_BIND ? "the decoder has no input %R to bind; it takes %s" : "the decoder has no per-token input %R; it takes %s",
                         key, *text != '\0' ? text : "none");
            result = -1;
        }
    }
    Py_XDECREF(keys);
    return result;
}

/* The expected shape in words: "[5, source, 16]". `tokens` −1: there is no such dimension. */
static void describe(const Decoder *d, const RowShape *shape, Py_ssize_t tokens, char text[TEXT_SIZE]) {
    char number[32];
    *text = '\0';
    append(text, "[");
    if (tokens >= 0) {
        PyOS_snprintf(number, sizeof number, shape->rank > 0 ? "%zd, " : "%zd", tokens);
        append(text, number);
    }
    for (size_t axis = 0; axis < shape->rank; axis++) {
        PyOS_snprintf(number, sizeof number, "%lld", (long long)shape->fixed[axis]);
        append(text, axis > 0 ? ", " : "");
        append(text, shape->fixed[axis] >= 0 ? number : d->dims[shape->dim[axis]].name);
    }
    append(text, "]");
}

/* Checks one array against its input; dynamic dimensions must agree with `sizes`, or are added to it. */
static int check_sizes(const Decoder *d, const FurtherInput *input, const Py_buffer *view, Py_ssize_t tokens, size_t *sizes) {
    const RowShape *shape = &input->shape;
    const size_t front = tokens >= 0 ? 1 : 0;
    char text[TEXT_SIZE];
    if ((size_t)view->ndim != shape->rank + front) {
        describe(d, shape, tokens, text);
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected %zu: %s", input->info->name, view->ndim, shape->rank + front, text);
        return -1;
    }
    for (size_t axis = 0; axis < shape->rank + front; axis++) {
        const size_t size = (size_t)view->shape[axis];
        size_t expected = (size_t)tokens;
        PyOS_snprintf(text, sizeof text, "%zd", tokens);
        if (axis >= front) {
            const int64_t fixed = shape->fixed[axis - front];
            size_t *named = fixed < 0 ? &sizes[shape->dim[axis - front]] : NULL;
            if (named != NULL && *named == SIZE_UNKNOWN) {
                *named = size;
            }
            expected = named != NULL ? *named : (size_t)fixed;
            PyOS_snprintf(text, sizeof text, "%lld", (long long)fixed);
            if (named != NULL) {
                PyOS_snprintf(text, sizeof text, "%s", d->dims[shape->dim[axis - front]].name);
            }
        }
        if (size != expected) {
            PyErr_Format(PyExc_ValueError, "%s has size %zu in dimension %zu (%s), expected %zu", input->info->name, size, axis, text, expected);
            return -1;
        }
    }
    return 0;
}

/* A value per token that is not given is zero, but its size must be known. */
static int check_absent(const Decoder *d, const FurtherInput *input, const size_t *sizes) {
    for (size_t axis = 0; axis < input->shape.rank; axis++) {
        if (input->shape.fixed[axis] < 0 && sizes[input->shape.dim[axis]] == SIZE_UNKNOWN) {
            PyErr_Format(PyExc_ValueError, "the decoder's per-token input '%s' must be given: nothing else says how large '%s' is", input->info->name,
                         d->dims[input->shape.dim[axis]].name);
            return -1;
        }
    }
    return 0;
}

int given_acquire(const Decoder *d, size_t row, PyObject *mapping, GivenUse use, Py_ssize_t tokens, Given *given) {
    const size_t count = d->input_count + 1, dims = d->dim_count + 1;
    const DecoderRow *r = &d->rows[row];
    *given = (Given){.views = calloc(count, sizeof *given->views), .data = calloc(count, sizeof *given->data), .sizes = calloc(dims, sizeof *given->sizes)};
    const bool some = mapping != NULL && mapping != Py_None;
    int result = 0;
    if (given->views == NULL || given->data == NULL || given->sizes == NULL) {
        PyErr_NoMemory();
        result = -1;
    }
    for (size_t i = 0; result == 0 && i < d->dim_count; i++) {
        const bool kept = use != GIVEN_BIND && (d->dims[i].of_static || r->length > 0);
        given->sizes[i] = kept ? r->sizes[i] : SIZE_UNKNOWN;
    }
    if (result == 0 && some) {
        result = check_names(d, mapping, use);
    }
    for (size_t i = 0; result == 0 && i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        const char *name = input->info->name;
        if (!of_use(input, use)) {
            continue;
        }
        if (!some || !PyMapping_HasKeyString(mapping, name)) {
            if (use == GIVEN_BIND) {
                PyErr_Format(PyExc_ValueError, "the decoder's input '%s' is missing: all of a row's inputs are bound at once", name);
                result = -1;
            }
            continue;
        }
        PyObject *array = PyMapping_GetItemString(mapping, name);
        result = array != NULL ? acquire_view(array, &given->views[i], input->info->type, -1, false, name) : -1;
        Py_XDECREF(array);
        if (result == 0) {
            given->data[i] = given->views[i].buf;
            result = check_sizes(d, input, &given->views[i], use == GIVEN_PREFILL ? tokens : -1, given->sizes);
        }
    }
    for (size_t i = 0; result == 0 && i < d->input_count; i++) {
        if (use == GIVEN_PREFILL && d->inputs[i].kind == INPUT_TOKEN && given->data[i] == NULL) {
            result = check_absent(d, &d->inputs[i], given->sizes);
        }
    }
    if (result != 0) {
        given_release(d, given);
    }
    return result;
}

void given_release(const Decoder *d, Given *given) {
    for (size_t i = 0; given->views != NULL && i < d->input_count; i++) {
        if (given->views[i].obj != NULL) {
            PyBuffer_Release(&given->views[i]);
        }
    }
    free(given->views);
    free(given->data);
    free(given->sizes);
    *given = (Given){0};
}

PyObject *state_bind(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"row", "inputs", NULL};
    PyObject *mapping, *result = NULL;
    Py_ssize_t row;
    Given given;
    char message[ORT_MESSAGE_SIZE];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nO:bind", names, &row, &mapping)) {
        return NULL;
    }
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    if (state_check_row(decoder, row) == 0 && given_acquire(decoder, (size_t)row, mapping, GIVEN_BIND, 0, &given) == 0) {
        const InputValues values = {given.data, given.sizes};
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_set_inputs(decoder, (size_t)row, &values, message);
        Py_END_ALLOW_THREADS;
        given_release(decoder, &given);
        result = status == DECODER_OK ? Py_NewRef(Py_None) : state_raise(status, message);
    }
    state_leave((StateObject *)self);
    return result;
}

PyObject *state_step(PyObject *self, PyObject *argument) {
    Py_buffer tokens;
    PyObject *result = NULL;
    char message[ORT_MESSAGE_SIZE];
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    if (acquire_view(argument, &tokens, ELEMENT_INT64, 1, false, "tokens") == 0) {
        if ((size_t)tokens.shape[0] != decoder->batch) {
            PyErr_Format(PyExc_ValueError, "tokens has the shape (%zd,), expected (%zu,): one for every row", tokens.shape[0], decoder->batch);
        } else {
            DecoderStatus status;
            Py_BEGIN_ALLOW_THREADS;
            status = decoder_step(decoder, tokens.buf, message);
            Py_END_ALLOW_THREADS;
            const size_t bytes = decoder->batch * decoder->vocab * sizeof *decoder->logits;
            result = status == DECODER_OK ? PyBytes_FromStringAndSize((const char *)decoder->logits, (Py_ssize_t)bytes) : state_raise(status, message);
        }
        PyBuffer_Release(&tokens);
    }
    state_leave((StateObject *)self);
    return result;
}

PyObject *state_reorder(PyObject *self, PyObject *argument) {
    int64_t *rows = NULL;
    size_t count = 0, *sources = NULL;
    PyObject *result = NULL;
    char message[ORT_MESSAGE_SIZE];
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    bool ok = state_read_integers(argument, &rows, &count) == 0;
    if (ok && count != decoder->batch) {
        PyErr_Format(PyExc_ValueError, "%zu sources for %zu rows", count, decoder->batch);
        ok = false;
    }
    if (ok && (sources = malloc((count + 1) * sizeof *sources)) == NULL) {
        PyErr_NoMemory();
        ok = false;
    }
    for (size_t i = 0; ok && i < count; i++) {
        ok = state_check_row(decoder, (Py_ssize_t)rows[i]) == 0;
        sources[i] = (size_t)rows[i];
    }
    if (ok) {
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_reorder(decoder, sources, message);
        Py_END_ALLOW_THREADS;
        result = status == DECODER_OK ? Py_NewRef(Py_None) : state_raise(status, message);
    }
    free(rows);
    free(sources);
    state_leave((StateObject *)self);
    return result;
}

/* (bytes, type, shape) of one further output. */
static PyObject *output_tuple(const FurtherOutput *output, const size_t *sizes, const uint8_t *data) {
    PyObject *shape = PyTuple_New((Py_ssize_t)output->shape.rank);
    for (size_t axis = 0; shape != NULL && axis < output->shape.rank; axis++) {
        const int64_t fixed = output->shape.fixed[axis];
        PyObject *size = PyLong_FromSize_t(fixed >= 0 ? (size_t)fixed : sizes[output->shape.dim[axis]]);
        if (size == NULL) {
            Py_CLEAR(shape);
        } else {
            PyTuple_SetItem(shape, (Py_ssize_t)axis, size);
        }
    }
    const Py_ssize_t bytes = (Py_ssize_t)row_shape_bytes(&output->shape, sizes);
    return shape != NULL ? Py_BuildValue("(y#sN)", (const char *)data, bytes, element_name(output->info->type), shape) : NULL;
}

PyObject *state_outputs(PyObject *self, PyObject *argument) {
    const Py_ssize_t row = PyLong_AsSsize_t(argument);
    const float *logits;
    PyObject *result = NULL;
    char message[ORT_MESSAGE_SIZE];
    if (row == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Decoder *decoder = state_enter((StateObject *)self);
    if (decoder == NULL) {
        return NULL;
    }
    if (state_check_row(decoder, row) == 0) {
        DecoderStatus status;
        Py_BEGIN_ALLOW_THREADS;
        status = decoder_logits(decoder, (size_t)row, &logits, message);
        Py_END_ALLOW_THREADS;
        result = status == DECODER_OK ? PyDict_New() : state_raise(status, message);
        const uint8_t *next = decoder->rows[row].outputs;
        for (size_t i = 0; result != NULL && i < decoder->output_count; i++) {
            const FurtherOutput *output = &decoder->outputs[i];
            PyObject *value = output_tuple(output, decoder->rows[row].sizes, next);
            if (value == NULL || PyDict_SetItemString(result, output->info->name, value) != 0) {
                Py_CLEAR(result);
            }
            Py_XDECREF(value);
            next += row_shape_bytes(&output->shape, decoder->rows[row].sizes);
        }
    }
    state_leave((StateObject *)self);
    return result;
}
