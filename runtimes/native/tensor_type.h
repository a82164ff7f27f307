#ifndef VLM_TENSOR_TYPE_H
#define VLM_TENSOR_TYPE_H

#include "session.h"

/* A Tensor that owns `value` (also when it fails). NULL with an error set. */
PyObject *tensor_from_value(SessionCore *core, OrtValue *value, char message[ORT_MESSAGE_SIZE]);
int native_add_tensor_type(PyObject *module);

#endif
