/* Python's face of image.c and merge.c: arguments are checked, then the work runs with the interpreter lock released. */
#include "image.h"
#include "merge.h"
#include "native.h"

#include <stdlib.h>
#include <string.h>

#define MAX_CHANNELS 4

static int check_size(const char *what, Py_ssize_t height, Py_ssize_t width, Py_ssize_t channels) {
    if (height < 1 || width < 1 || channels < 1 || channels > MAX_CHANNELS || height > INT32_MAX || width > INT32_MAX ||
        height > PTRDIFF_MAX / (16 * MAX_CHANNELS) / width) {
        PyErr_Format(PyExc_ValueError, "%s of %zd x %zd x %zd: sizes must be positive, with 1 to %d channels", what, height, width, channels,
                     MAX_CHANNELS);
        return -1;
    }
    return 0;
}

static int check_bytes(const char *what, const Py_buffer *view, Py_ssize_t elements) {
    if (view->len / view->itemsize != elements) {
        PyErr_Format(PyExc_ValueError, "%s has %zd elements, its size says %zd", what, view->len / view->itemsize, elements);
        return -1;
    }
    return 0;
}

static int read_per_channel(PyObject *values, Py_ssize_t channels, float *out, const char *what) {
    PyObject *list = PySequence_List(values);
    if (list == NULL) {
        return -1;
    }
    if (PyList_Size(list) != channels) {
        PyErr_Format(PyExc_ValueError, "%s has %zd values, the image has %zd channels", what, PyList_Size(list), channels);
        Py_DECREF(list);
        return -1;
    }
    for (Py_ssize_t i = 0; i < channels; i++) {
        const double value = PyFloat_AsDouble(PyList_GetItem(list, i));
        if (value == -1.0 && PyErr_Occurred()) {
            Py_DECREF(list);
            return -1;
        }
        out[i] = (float)value;
    }
    Py_DECREF(list);
    return 0;
}

PyObject *native_normalize_hwc_u8(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"source", "height", "width", "channels", "scale", "mean", "std", "out", NULL};
    PyObject *source_object, *mean_object, *std_object, *out_object;
    Py_ssize_t height, width, channels;
    double scale;
    float mean[MAX_CHANNELS], std[MAX_CHANNELS];
    Py_buffer source, out;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnnndOOO:normalize_hwc_u8", names, &source_object, &height, &width, &channels, &scale,
                                     &mean_object, &std_object, &out_object) ||
        check_size("image", height, width, channels) != 0 || read_per_channel(mean_object, channels, mean, "mean") != 0 ||
        read_per_channel(std_object, channels, std, "std") != 0) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < channels; i++) {
        if (std[i] == 0.0f) {
            PyErr_Format(PyExc_ValueError, "std of channel %zd is 0", i);
            return NULL;
        }
    }
    if (acquire_view(source_object, &source, ELEMENT_UINT8, -1, false, "source") != 0) {
        return NULL;
    }
    if (acquire_view(out_object, &out, ELEMENT_FLOAT32, -1, true, "out") != 0) {
        PyBuffer_Release(&source);
        return NULL;
    }
    const Py_ssize_t elements = height * width * channels;
    const bool fits = check_bytes("source", &source, elements) == 0 && check_bytes("out", &out, elements) == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        normalize_hwc_u8(source.buf, (size_t)height, (size_t)width, (size_t)channels, scale, mean, std, out.buf);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    if (!fits) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static const struct {
    const char *name;
    ResampleFilter filter;
} FILTER_NAMES[] = {
    {"box", RESAMPLE_BOX},         {"bilinear", RESAMPLE_BILINEAR}, {"hamming", RESAMPLE_HAMMING},
    {"bicubic", RESAMPLE_BICUBIC}, {"lanczos", RESAMPLE_LANCZOS},
};

PyObject *native_resize_u8(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"source", "height", "width", "channels", "out_height", "out_width", "filter", "order", NULL};
    PyObject *source_object;
    Py_ssize_t height, width, channels, out_height, out_width;
    const char *filter_name, *order_name = "auto";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Onnnnns|s:resize_u8", names, &source_object, &height, &width, &channels, &out_height,
                                     &out_width, &filter_name, &order_name) ||
        check_size("image", height, width, channels) != 0 || check_size("resized image", out_height, out_width, channels) != 0) {
        return NULL;
    }
    const size_t known = sizeof FILTER_NAMES / sizeof *FILTER_NAMES;
    size_t chosen = 0;
    while (chosen < known && strcmp(FILTER_NAMES[chosen].name, filter_name) != 0) {
        chosen++;
    }
    if (chosen == known) {
        PyErr_Format(PyExc_ValueError, "unknown filter '%s': use box, bilinear, hamming, bicubic or lanczos", filter_name);
        return NULL;
    }
    PassOrder order = PASSES_AUTO;
    if (strcmp(order_name, "horizontal") == 0) {
        order = PASSES_HORIZONTAL_FIRST;
    } else if (strcmp(order_name, "vertical") == 0) {
        order = PASSES_VERTICAL_FIRST;
    } else if (strcmp(order_name, "auto") != 0) {
        PyErr_Format(PyExc_ValueError, "unknown order '%s': use auto, horizontal or vertical", order_name);
        return NULL;
    }
    Py_buffer source;
    if (acquire_view(source_object, &source, ELEMENT_UINT8, -1, false, "source") != 0) {
        return NULL;
    }
    PyObject *result = NULL;
    if (check_bytes("source", &source, height * width * channels) == 0) {
        result = PyBytes_FromStringAndSize(NULL, out_height * out_width * channels);
    }
    if (result != NULL) {
        int failed;
        uint8_t *target = (uint8_t *)PyBytes_AsString(result);
        Py_BEGIN_ALLOW_THREADS;
        failed = resize_u8(source.buf, (size_t)height, (size_t)width, (size_t)channels, target, (size_t)out_height, (size_t)out_width,
                           FILTER_NAMES[chosen].filter, order);
        Py_END_ALLOW_THREADS;
        if (failed) {
            Py_DECREF(result);
            result = PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&source);
    return result;
}

PyObject *native_merge_features(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"embeddings", "input_ids", "image_token_id", "features", NULL};
    PyObject *embeddings_object, *ids_object, *features_object;
    long long token;
    Py_buffer embeddings, ids, features;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOLO:merge_features", names, &embeddings_object, &ids_object, &token, &features_object) ||
        acquire_view(embeddings_object, &embeddings, ELEMENT_FLOAT32, 2, true, "embeddings") != 0) {
        return NULL;
    }
    if (acquire_view(ids_object, &ids, ELEMENT_INT64, 1, false, "input_ids") != 0) {
        PyBuffer_Release(&embeddings);
        return NULL;
    }
    if (acquire_view(features_object, &features, ELEMENT_FLOAT32, 2, false, "features") != 0) {
        PyBuffer_Release(&embeddings);
        PyBuffer_Release(&ids);
        return NULL;
    }
    const Py_ssize_t tokens = ids.shape[0], hidden = embeddings.shape[1], rows = features.shape[0];
    PyObject *result = NULL;
    if (embeddings.shape[0] != tokens) {
        PyErr_Format(PyExc_ValueError, "embeddings have %zd rows for %zd input_ids", embeddings.shape[0], tokens);
    } else if (features.shape[1] != hidden) {
        PyErr_Format(PyExc_ValueError, "features are %zd wide, embeddings %zd", features.shape[1], hidden);
    } else {
        size_t places;
        Py_BEGIN_ALLOW_THREADS;
        places = merge_features(embeddings.buf, ids.buf, (size_t)tokens, token, features.buf, (size_t)rows, (size_t)hidden);
        Py_END_ALLOW_THREADS;
        if (places != (size_t)rows) {
            PyErr_Format(native_prompt_error,
                         "the prompt has %zu image tokens (id %lld), the images gave %zd feature rows: the number of images and of image "
                         "placeholders must agree",
                         places, token, rows);
        } else {
            result = PyLong_FromSize_t(places);
        }
    }
    PyBuffer_Release(&embeddings);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&features);
    return result;
}
