/* The Python object around a decoder's cache, shared by its lifecycle (decoder_type.c) and its calls (decoder_calls.c, decoder_input_calls.c). */
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

/* Sets the exception for a status that is not DECODER_OK; NULL. */
PyObject *state_raise(DecoderStatus status, const char *message);
/* ValueError and −1 for a row outside the batch. */
int state_check_row(const Decoder *decoder, Py_ssize_t row);
/* A sequence of Python integers as a malloc'd array. */
int state_read_integers(PyObject *object, int64_t **out, size_t *count);

typedef enum { GIVEN_BIND, GIVEN_PREFILL, GIVEN_START } GivenUse;

/* Arrays by name, checked against the decoder's further inputs. */
typedef struct {
    Py_buffer *views;
    const uint8_t **data; /* NULL where nothing was given */
    size_t *sizes;        /* the row's dynamic dimensions, with those that the arrays add */
} Given;

/* `mapping` may be NULL or None unless it is to be bound. −1 with TypeError or ValueError set; release otherwise. */
int given_acquire(const Decoder *decoder, size_t row, PyObject *mapping, GivenUse use, Py_ssize_t tokens, Given *given);
void given_release(const Decoder *decoder, Given *given);

/* (tokens, logprobs, top_logprobs, finished) of each row, or the error of a status; frees the rows. */
PyObject *state_rows_list(DecoderStatus status, const char *message, RowOutput *outputs, size_t batch);

/* Methods: (self, args, kwargs) or (self, argument). */
PyObject *state_prefill(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_logits(PyObject *self, PyObject *argument);
PyObject *state_start(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_decode(PyObject *self, PyObject *argument);
PyObject *state_verify(PyObject *self, PyObject *argument);
PyObject *state_push(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_truncate(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_copy_prefix(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_bind(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *state_step(PyObject *self, PyObject *argument);
PyObject *state_reorder(PyObject *self, PyObject *argument);
PyObject *state_outputs(PyObject *self, PyObject *argument);

#endif
