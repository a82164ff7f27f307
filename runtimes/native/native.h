/* What every file of the extension shares: the Python API, the error classes, typed views of buffers. */
#ifndef VLM_NATIVE_H
#define VLM_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Classes of vlm_edge_runtime.errors, fetched once when the module is imported. */
extern PyObject *native_device_error;
extern PyObject *native_context_length_error;
extern PyObject *native_prompt_error;

/* Element types, by the numbers that ONNX (TensorProto.DataType) and ONNX Runtime's C API give them. */
typedef enum {
    ELEMENT_UNKNOWN = 0,
    ELEMENT_FLOAT32 = 1,
    ELEMENT_UINT8 = 2,
    ELEMENT_INT8 = 3,
    ELEMENT_UINT16 = 4,
    ELEMENT_INT16 = 5,
    ELEMENT_INT32 = 6,
    ELEMENT_INT64 = 7,
    ELEMENT_BOOL = 9,
    ELEMENT_FLOAT16 = 10,
    ELEMENT_FLOAT64 = 11,
    ELEMENT_UINT32 = 12,
    ELEMENT_UINT64 = 13
} ElementType;

/* Bytes of one element; 0 for a type that has no buffer format. */
size_t element_size(ElementType type);
/* numpy's name of the type ("float32"), "unsupported" for others. */
const char *element_name(ElementType type);
/* The struct-module format character that buffers of this type carry, or NULL. */
const char *element_format(ElementType type);
/* The element type of an exported buffer; ELEMENT_UNKNOWN for structured or byte-swapped ones. */
ElementType element_of_view(const Py_buffer *view);

/* Fills `view` with a C-contiguous buffer of the given type; `rank` −1 accepts any. Raises TypeError or ValueError naming
 * `what`, returns −1. The caller releases the view. */
int acquire_view(PyObject *object, Py_buffer *view, ElementType type, int rank, bool writable, const char *what);

/* One function per type that the module exports. Each adds its type to the module and returns 0, or −1 with an error set. */
int native_add_session_types(PyObject *module);
int native_add_sampler_type(PyObject *module);
int native_add_decoder_type(PyObject *module);
int native_add_bound_run_type(PyObject *module);
int native_add_cuda_loop_type(PyObject *module);

/* Module functions. */
PyObject *native_load_runtime(PyObject *module, PyObject *args);
PyObject *native_runtime_version(PyObject *module, PyObject *args);
PyObject *native_session_placement(PyObject *module, PyObject *session);
PyObject *native_normalize_u8(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *native_resize_u8(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *native_merge_features(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *native_plan_step(PyObject *module, PyObject *args);
PyObject *native_plan_seconds(PyObject *module, PyObject *session);
PyObject *native_graph_run(PyObject *module, PyObject *args);
PyObject *native_rows_run(PyObject *module, PyObject *args);
PyObject *native_uniform(PyObject *module, PyObject *args);
PyObject *native_philox(PyObject *module, PyObject *args);

#endif
