/* From the attributes of a SamplingParams object to constraints: tuples of tokens, of (length, tokens) and of (sequence, bias). */
#include "constraints_type.h"

#include <stdlib.h>
#include <string.h>

static int read_length(PyObject *params, const char *name, int64_t *out) {
    PyObject *value = PyObject_GetAttrString(params, name);
    if (value == NULL) {
        return -1;
    }
    *out = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (*out == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (*out < 0) {
        PyErr_Format(PyExc_ValueError, "%s must be 0 (off) or positive", name);
        return -1;
    }
    return 0;
}

/* A sequence of integers, which may be empty. */
static int read_list(PyObject *object, TokenList *out) {
    PyObject *list = PySequence_List(object);
    if (list == NULL) {
        return -1;
    }
    const Py_ssize_t size = PyList_Size(list);
    int result = 0;
    out->tokens = malloc(((size_t)size + 1) * sizeof *out->tokens);
    if (out->tokens == NULL) {
        PyErr_NoMemory();
        result = -1;
    }
    for (Py_ssize_t i = 0; result == 0 && i < size; i++) {
        out->tokens[i] = PyLong_AsLongLong(PyList_GetItem(list, i));
        result = out->tokens[i] == -1 && PyErr_Occurred() ? -1 : 0;
        out->count = (size_t)i + 1;
    }
    Py_DECREF(list);
    return result;
}

static int read_tokens(PyObject *params, const char *name, TokenList *out) {
    PyObject *value = PyObject_GetAttrString(params, name);
    const int result = value != NULL ? read_list(value, out) : -1;
    Py_XDECREF(value);
    return result;
}

/* Reads one element of an attribute that is a sequence of pairs into the item at `out`. */
typedef int (*ReadPair)(PyObject *first, PyObject *second, void *out);

static int read_at(PyObject *length, PyObject *tokens, void *out) {
    TokensAt *rule = out;
    rule->length = PyLong_AsLongLong(length);
    return rule->length == -1 && PyErr_Occurred() ? -1 : read_list(tokens, &rule->list);
}

static int read_bias(PyObject *sequence, PyObject *bias, void *out) {
    SequenceBias *rule = out;
    if (read_list(sequence, &rule->sequence) != 0) {
        return -1;
    }
    if (rule->sequence.count == 0) {
        PyErr_SetString(PyExc_ValueError, "sequence_bias: a sequence must have at least one token");
        return -1;
    }
    rule->bias = PyFloat_AsDouble(bias);
    return rule->bias == -1.0 && PyErr_Occurred() ? -1 : 0;
}

/* An attribute that is a sequence of pairs, as an array of zeroed items of `size` bytes, each filled by `read`. `*count` covers the items
 * that may hold memory, also on failure. */
static int read_pairs(PyObject *params, const char *name, size_t size, ReadPair read, void **items, size_t *count) {
    PyObject *value = PyObject_GetAttrString(params, name);
    PyObject *list = value != NULL ? PySequence_List(value) : NULL;
    int result = list != NULL ? 0 : -1;
    const Py_ssize_t pairs = list != NULL ? PyList_Size(list) : 0;
    if (pairs > 0 && (*items = calloc((size_t)pairs, size)) == NULL) {
        PyErr_NoMemory();
        result = -1;
    }
    for (Py_ssize_t i = 0; result == 0 && i < pairs; i++) {
        PyObject *pair = PySequence_Tuple(PyList_GetItem(list, i));
        *count = (size_t)i + 1;
        if (pair == NULL || PyTuple_Size(pair) != 2) {
            if (pair != NULL) {
                PyErr_Format(PyExc_ValueError, "%s must be a sequence of pairs", name);
            }
            result = -1;
        } else {
            result = read(PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1), (char *)*items + (size_t)i * size);
        }
        Py_XDECREF(pair);
    }
    Py_XDECREF(list);
    Py_XDECREF(value);
    return result;
}

int constraints_from_object(PyObject *params, Constraints *c) {
    memset(c, 0, sizeof *c);
    void *begin = NULL, *forced = NULL, *biases = NULL;
    const bool read = read_length(params, "min_length", &c->min_length) == 0 &&
                      read_length(params, "no_repeat_ngram_size", &c->no_repeat_ngram_size) == 0 && read_tokens(params, "eos_token_ids", &c->eos) == 0 &&
                      read_tokens(params, "suppress_tokens", &c->suppress) == 0 &&
                      read_pairs(params, "begin_suppress_tokens", sizeof(TokensAt), read_at, &begin, &c->begin_suppress_count) == 0 &&
                      read_pairs(params, "forced_tokens", sizeof(TokensAt), read_at, &forced, &c->forced_count) == 0 &&
                      read_pairs(params, "sequence_bias", sizeof(SequenceBias), read_bias, &biases, &c->bias_count) == 0;
    c->begin_suppress = begin;
    c->forced = forced;
    c->biases = biases;
    if (!read) {
        constraints_free(c);
        return -1;
    }
    return 0;
}
