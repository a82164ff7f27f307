/* `_native.Tensor`: an output that ONNX Runtime allocated, as an exporter of the buffer protocol (no copy). */
#include "tensor_type.h"

#include <stdlib.h>

typedef struct {
    PyObject_HEAD
    SessionCore *core; /* the value's memory belongs to the session's allocator: keep it */
    OrtValue *value;
    void *data;
    ElementType type;
    int rank;
    Py_ssize_t size;
    Py_ssize_t shape[MAX_RANK];
    Py_ssize_t strides[MAX_RANK];
} TensorObject;

static PyTypeObject *tensor_type;

static int read_shape(TensorObject *tensor, char message[ORT_MESSAGE_SIZE]) {
    OrtTensorInfo *info = NULL;
    int is_tensor = 0, type = 0;
    size_t rank = 0;
    int64_t dims[MAX_RANK] = {0};
    if (ort_check(ort.IsTensor(tensor->value, &is_tensor), message) != 0) {
        return -1;
    }
    if (!is_tensor) {
        PyOS_snprintf(message, ORT_MESSAGE_SIZE, "the output is not a tensor");
        return -1;
    }
    if (ort_check(ort.GetTensorTypeAndShape(tensor->value, &info), message) != 0) {
        return -1;
    }
    int result = ort_check(ort.GetTensorElementType(info, &type), message);
    if (result == 0) {
        result = ort_check(ort.GetDimensionsCount(info, &rank), message);
    }
    if (result == 0 && (rank > MAX_RANK || element_size((ElementType)type) == 0)) {
        PyOS_snprintf(message, ORT_MESSAGE_SIZE, "the output has ONNX element type %d and %zu dimensions: not supported", type, rank);
        result = -1;
    }
    if (result == 0) {
        result = ort_check(ort.GetDimensions(info, dims, rank), message);
    }
    ort.ReleaseTensorTypeAndShapeInfo(info);
    if (result != 0 || ort_check(ort.GetTensorMutableData(tensor->value, &tensor->data), message) != 0) {
        return -1;
    }
    tensor->type = (ElementType)type;
    tensor->rank = (int)rank;
    tensor->size = (Py_ssize_t)element_size(tensor->type);
    for (size_t d = rank; d-- > 0;) {
        tensor->shape[d] = (Py_ssize_t)dims[d];
        tensor->strides[d] = tensor->size;
        tensor->size *= tensor->shape[d];
    }
    return 0;
}

PyObject *tensor_from_value(SessionCore *core, OrtValue *value, char message[ORT_MESSAGE_SIZE]) {
    allocfunc allocate = (allocfunc)PyType_GetSlot(tensor_type, Py_tp_alloc);
    TensorObject *tensor = (TensorObject *)allocate(tensor_type, 0);
    if (tensor == NULL) {
        ort.ReleaseValue(value);
        return NULL;
    }
    tensor->core = session_core_retain(core);
    tensor->value = value;
    if (read_shape(tensor, message) != 0) {
        PyErr_Format(native_device_error, "graph '%s': %s", core->name, message);
        Py_DECREF(tensor);
        return NULL;
    }
    return (PyObject *)tensor;
}

static void tensor_dealloc(PyObject *self) {
    TensorObject *tensor = (TensorObject *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (tensor->value != NULL) {
        ort.ReleaseValue(tensor->value);
    }
    session_core_release(tensor->core);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int tensor_get_buffer(PyObject *self, Py_buffer *view, int flags) {
    TensorObject *tensor = (TensorObject *)self;
    static char nothing; /* what an empty tensor points at */
    view->obj = Py_NewRef(self);
    view->buf = tensor->data != NULL ? tensor->data : &nothing;
    view->len = tensor->size;
    view->readonly = 0;
    view->itemsize = (Py_ssize_t)element_size(tensor->type);
    view->format = (flags & PyBUF_FORMAT) == PyBUF_FORMAT ? (char *)element_format(tensor->type) : NULL;
    view->ndim = tensor->rank;
    view->shape = (flags & PyBUF_ND) == PyBUF_ND ? tensor->shape : NULL;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? tensor->strides : NULL;
    view->suboffsets = NULL;
    view->internal = NULL;
    return 0;
}

static PyObject *tensor_get_dtype(PyObject *self, void *closure) {
    return PyUnicode_FromString(element_name(((TensorObject *)self)->type));
}

static PyObject *tensor_get_shape(PyObject *self, void *closure) {
    TensorObject *tensor = (TensorObject *)self;
    PyObject *shape = PyTuple_New(tensor->rank);
    for (int d = 0; shape != NULL && d < tensor->rank; d++) {
        PyObject *size = PyLong_FromSsize_t(tensor->shape[d]);
        if (size == NULL) {
            Py_CLEAR(shape);
        } else {
            PyTuple_SetItem(shape, d, size);
        }
    }
    return shape;
}

static PyGetSetDef tensor_getset[] = {
    {"dtype", tensor_get_dtype, NULL, "numpy name of the element type", NULL},
    {"shape", tensor_get_shape, NULL, "sizes of the dimensions", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tensor_slots[] = {
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_getset, tensor_getset},
    {Py_bf_getbuffer, tensor_get_buffer},
    {Py_tp_doc, "An output of a graph; exports the buffer protocol."},
    {0, NULL},
};

static PyType_Spec tensor_spec = {
    .name = "vlm_edge_runtime._native.Tensor",
    .basicsize = sizeof(TensorObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = tensor_slots,
};

int native_add_tensor_type(PyObject *module) {
    tensor_type = (PyTypeObject *)PyType_FromSpec(&tensor_spec);
    return tensor_type != NULL ? PyModule_AddObjectRef(module, "Tensor", (PyObject *)tensor_type) : -1;
}
