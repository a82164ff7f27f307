/* `_native.Sampler`: the decode loop's sampler by itself, for engines whose token loop is Python and for tests. */
#include "sampler_type.h"
#include "constraints_type.h"

#include <stdlib.h>
#include <string.h>

static int read_double(PyObject *object, const char *name, double *out) {
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL) {
        return -1;
    }
    *out = PyFloat_AsDouble(value);
    Py_DECREF(value);
    return *out == -1.0 && PyErr_Occurred() ? -1 : 0;
}

static int read_int64(PyObject *object, const char *name, int64_t *out) {
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL) {
        return -1;
    }
    *out = PyLong_AsLongLong(value);
    Py_DECREF(value);
    return *out == -1 && PyErr_Occurred() ? -1 : 0;
}

static int read_seed(PyObject *object, uint64_t *out) {
    PyObject *value = PyObject_GetAttrString(object, "seed");
    if (value == NULL) {
        return -1;
    }
    *out = PyLong_AsUnsignedLongLongMask(value); /* any Python integer, modulo 2⁶⁴ */
    Py_DECREF(value);
    return PyErr_Occurred() ? -1 : 0;
}

static int params_from_object(PyObject *object, SamplingParams *p) {
    if (read_double(object, "temperature", &p->temperature) != 0 || read_int64(object, "top_k", &p->top_k) != 0 ||
        read_double(object, "top_p", &p->top_p) != 0 || read_double(object, "min_p", &p->min_p) != 0 ||
        read_double(object, "repetition_penalty", &p->repetition_penalty) != 0 || read_seed(object, &p->seed) != 0 ||
        read_int64(object, "logprobs", &p->logprobs) != 0) {
        return -1;
    }
    const char *error = sampling_params_error(p);
    if (error != NULL) {
        PyErr_SetString(PyExc_ValueError, error);
        return -1;
    }
    return 0;
}

int sampler_from_object(Sampler *sampler, PyObject *object, size_t vocab) {
    SamplingParams params;
    Constraints constraints;
    if (params_from_object(object, &params) != 0 || constraints_from_object(object, &constraints) != 0) {
        return -1;
    }
    if (sampler_init(sampler, &params, &constraints, vocab) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

typedef struct {
    PyObject_HEAD
    Sampler sampler;
    bool ready;
} SamplerObject;

static int sampler_object_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"vocab_size", "params", NULL};
    SamplerObject *object = (SamplerObject *)self;
    Py_ssize_t vocab;
    PyObject *params;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nO:Sampler", names, &vocab, &params)) {
        return -1;
    }
    if (vocab < 1 || vocab > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "vocab_size is %zd, expected 1 to 2147483647", vocab);
        return -1;
    }
    if (object->ready) {
        sampler_free(&object->sampler);
        object->ready = false;
    }
    if (sampler_from_object(&object->sampler, params, (size_t)vocab) != 0) {
        return -1;
    }
    object->ready = true;
    return 0;
}

static void sampler_object_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    sampler_free(&((SamplerObject *)self)->sampler);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static Sampler *ready_sampler(PyObject *self) {
    SamplerObject *object = (SamplerObject *)self;
    if (!object->ready) {
        PyErr_SetString(PyExc_ValueError, "Sampler was not initialised");
        return NULL;
    }
    return &object->sampler;
}

static int acquire_logits(const Sampler *sampler, PyObject *object, Py_buffer *view) {
    if (acquire_view(object, view, ELEMENT_FLOAT32, 1, false, "logits") != 0) {
        return -1;
    }
    if ((size_t)view->shape[0] != sampler->vocab) {
        PyErr_Format(PyExc_ValueError, "logits have %zd entries, the vocabulary %zu", view->shape[0], sampler->vocab);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

static PyObject *raise_status(SampleStatus status) {
    PyErr_Format(native_device_error, "the decoder's logits contain %s: the graph computed no usable next token", sample_status_text(status));
    return NULL;
}

static PyObject *sampler_object_accept(PyObject *self, PyObject *argument) {
    Sampler *sampler = ready_sampler(self);
    const long long token = PyLong_AsLongLong(argument);
    if (sampler == NULL || (token == -1 && PyErr_Occurred())) {
        return NULL;
    }
    sampler_accept(sampler, token);
    Py_RETURN_NONE;
}

static PyObject *sampler_object_choose(PyObject *self, PyObject *argument) {
    Sampler *sampler = ready_sampler(self);
    Py_buffer logits;
    if (sampler == NULL || acquire_logits(sampler, argument, &logits) != 0) {
        return NULL;
    }
    TokenLogprob chosen;
    TokenLogprob *top = NULL;
    Py_ssize_t wanted = sampler->params.logprobs > 0 ? (Py_ssize_t)sampler->params.logprobs : 0;
    wanted = wanted < (Py_ssize_t)sampler->vocab ? wanted : (Py_ssize_t)sampler->vocab;
    PyObject *result = NULL, *list = NULL;
    if (wanted > 0 && (top = malloc((size_t)wanted * sizeof *top)) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    const SampleStatus status = sampler_choose(sampler, logits.buf, &chosen, top);
    if (status != SAMPLE_OK) {
        raise_status(status);
        goto done;
    }
    list = PyList_New(wanted);
    for (Py_ssize_t i = 0; list != NULL && i < wanted; i++) {
        PyObject *pair = Py_BuildValue("(Ld)", (long long)top[i].token, top[i].logprob);
        if (pair == NULL) {
            goto done;
        }
        PyList_SetItem(list, i, pair);
    }
    if (list != NULL) {
        result = Py_BuildValue("(LdO)", (long long)chosen.token, chosen.logprob, list);
    }
done:
    Py_XDECREF(list);
    free(top);
    PyBuffer_Release(&logits);
    return result;
}

static PyObject *sampler_object_distribution(PyObject *self, PyObject *argument) {
    Sampler *sampler = ready_sampler(self);
    Py_buffer logits;
    if (sampler == NULL || acquire_logits(sampler, argument, &logits) != 0) {
        return NULL;
    }
    double *probabilities = malloc(sampler->vocab * sizeof *probabilities);
    PyObject *result = NULL;
    if (probabilities == NULL) {
        PyErr_NoMemory();
    } else {
        const SampleStatus status = sampler_distribution(sampler, logits.buf, probabilities);
        result = status == SAMPLE_OK ? PyBytes_FromStringAndSize((const char *)probabilities, (Py_ssize_t)(sampler->vocab * sizeof(double)))
                                     : raise_status(status);
    }
    free(probabilities);
    PyBuffer_Release(&logits);
    return result;
}

PyObject *native_uniform(PyObject *module, PyObject *args) {
    unsigned long long seed, step;
    return PyArg_ParseTuple(args, "KK:uniform", &seed, &step) ? PyFloat_FromDouble(uniform_draw(seed, step)) : NULL;
}

PyObject *native_philox(PyObject *module, PyObject *args) {
    unsigned int c[4], k[2];
    if (!PyArg_ParseTuple(args, "(IIII)(II):philox", &c[0], &c[1], &c[2], &c[3], &k[0], &k[1])) {
        return NULL;
    }
    const uint32_t counter[4] = {c[0], c[1], c[2], c[3]}, key[2] = {k[0], k[1]};
    uint32_t out[4];
    philox4x32(counter, key, out);
    return Py_BuildValue("(IIII)", out[0], out[1], out[2], out[3]);
}

static PyMethodDef sampler_methods[] = {
    {"accept", sampler_object_accept, METH_O, "Adds a token to what the repetition penalty and the constraints look at."},
    {"choose", sampler_object_choose, METH_O, "(token, log probability, most likely tokens) for logits float32 [vocab]."},
    {"distribution", sampler_object_distribution, METH_O, "float64 [vocab] as bytes: what `choose` draws from."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sampler_slots[] = {
    {Py_tp_init, sampler_object_init},
    {Py_tp_dealloc, sampler_object_dealloc},
    {Py_tp_methods, sampler_methods},
    {Py_tp_doc, "Sampler(vocab_size, params): chooses tokens for one row."},
    {0, NULL},
};

static PyType_Spec sampler_spec = {
    .name = "vlm_edge_runtime._native.Sampler",
    .basicsize = sizeof(SamplerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = sampler_slots,
};

int native_add_sampler_type(PyObject *module) {
    PyObject *type = PyType_FromSpec(&sampler_spec);
    const int result = type != NULL ? PyModule_AddObjectRef(module, "Sampler", type) : -1;
    Py_XDECREF(type);
    return result;
}
