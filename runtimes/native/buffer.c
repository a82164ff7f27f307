/* Element types and typed views of objects that export the buffer protocol (numpy arrays, bytes, memoryviews). */
#include "native.h"

#include <string.h>

typedef struct {
    ElementType type;
    size_t size;
    const char *name;
    const char *format;
} ElementInfo;

static const ElementInfo ELEMENTS[] = {
    {ELEMENT_FLOAT32, 4, "float32", "f"}, {ELEMENT_UINT8, 1, "uint8", "B"},   {ELEMENT_INT8, 1, "int8", "b"},
    {ELEMENT_UINT16, 2, "uint16", "H"},   {ELEMENT_INT16, 2, "int16", "h"},   {ELEMENT_INT32, 4, "int32", "i"},
    {ELEMENT_INT64, 8, "int64", "q"},     {ELEMENT_BOOL, 1, "bool", "?"},     {ELEMENT_FLOAT16, 2, "float16", "e"},
    {ELEMENT_FLOAT64, 8, "float64", "d"}, {ELEMENT_UINT32, 4, "uint32", "I"}, {ELEMENT_UINT64, 8, "uint64", "Q"},
};

static const ElementInfo *info_of(ElementType type) {
    for (size_t i = 0; i < sizeof ELEMENTS / sizeof *ELEMENTS; i++) {
        if (ELEMENTS[i].type == type) {
            return &ELEMENTS[i];
        }
    }
    return NULL;
}

size_t element_size(ElementType type) {
    const ElementInfo *info = info_of(type);
    return info != NULL ? info->size : 0;
}

const char *element_name(ElementType type) {
    const ElementInfo *info = info_of(type);
    return info != NULL ? info->name : "unsupported";
}

const char *element_format(ElementType type) {
    const ElementInfo *info = info_of(type);
    return info != NULL ? info->format : NULL;
}

ElementType element_of_view(const Py_buffer *view) {
    const char *format = view->format != NULL ? view->format : "B";
    const uint16_t probe = 1;
    const bool little = *(const uint8_t *)&probe == 1;
    if (*format == '@' || *format == '=' || *format == (little ? '<' : '>')) {
        format++;
    }
    if (format[0] == '\0' || format[1] != '\0') {
        return ELEMENT_UNKNOWN;
    }
    /* C's int and long differ between platforms: the kind comes from the letter, the width from the item size. */
    const size_t size = (size_t)view->itemsize;
    if (strchr("bhilqn", *format) != NULL) {
        return size == 1 ? ELEMENT_INT8 : size == 2 ? ELEMENT_INT16 : size == 4 ? ELEMENT_INT32 : ELEMENT_INT64;
    }
    if (strchr("BHILQN", *format) != NULL) {
        return size == 1 ? ELEMENT_UINT8 : size == 2 ? ELEMENT_UINT16 : size == 4 ? ELEMENT_UINT32 : ELEMENT_UINT64;
    }
    switch (*format) {
    case 'f':
        return ELEMENT_FLOAT32;
    case 'd':
        return ELEMENT_FLOAT64;
    case 'e':
        return ELEMENT_FLOAT16;
    case '?':
        return ELEMENT_BOOL;
    default:
        return ELEMENT_UNKNOWN;
    }
}

int acquire_view(PyObject *object, Py_buffer *view, ElementType type, int rank, bool writable, const char *what) {
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, view, flags) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous%s array of %s", what, writable ? ", writable" : "", element_name(type));
        return -1;
    }
    const ElementType found = element_of_view(view);
    if (found != type) {
        PyErr_Format(PyExc_TypeError, "%s is %s, expected %s", what, element_name(found), element_name(type));
        PyBuffer_Release(view);
        return -1;
    }
    if (rank >= 0 && view->ndim != rank) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected %d", what, view->ndim, rank);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}
