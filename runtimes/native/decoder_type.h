/* The Python object around a decoder's cache, shared by its lifecycle (decoder_type.c) and its calls (decoder_calls.c). */
#ifndef VLM_DECODER_TYPE_H
#define VLM_DECODER_TYPE_H

#include "decoder.h"

typedef struct {
    PyObject_HEAD
    Decoder *decoder; /* NULL: closed */
    Py_ssize_t batch, capacity;
    atomic_bool busy;
    atomic_bool close_wanted; /* close() came while a call was running: that call closes on its way out */
    atomic_bool cancelled;
} StateObject;

extern PyTypeObject *state_type;

/* Takes the state for one call. NULL with DeviceError set when it is closed or in use. */
Decoder *state_enter(StateObject *state);
/* Ends the call, and frees the cache if it was to be closed meanwhile. */
void state_leave(StateObject *state);

/* Methods: (self, args, kwargs) or (self, argument). */
PyObject *state_prefill(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_logits(PyObject *self, PyObject *argument);
PyObject *state_start(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_decode(PyObject *self, PyObject *argument);
PyObject *state_push(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_truncate(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_copy_prefix(PyObject *self, PyObject *args, PyObject *kwargs);

#endif
