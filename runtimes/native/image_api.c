/* Python's face of image.c and merge.c: arguments are checked, then the work runs with the interpreter lock released. */
#include "image.h"
#include "merge.h"
#include "native.h"

#include <string.h>

#define SIDE_MOST (PTRDIFF_MAX / (16 * MAX_CHANNELS)) /* of pixels in all: nothing computed from sizes overflows */

/* A view of an interleaved 8-bit image [height, width, channels] whose lines may lie apart. Raises TypeError or ValueError; the caller
 * releases the view. */
static int acquire_image(PyObject *object, Py_buffer *view, bool writable, Image *image, const char *what) {
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s must be a%s array of uint8", what, writable ? " writable" : "n");
        return -1;
    }
    const ElementType found = element_of_view(view);
    if (found != ELEMENT_UINT8) {
        PyErr_Format(PyExc_TypeError, "%s is %s, expected uint8", what, element_name(found));
    } else if (view->ndim != 3) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected [height, width, channels]", what, view->ndim);
    } else {
        const Py_ssize_t height = view->shape[0], width = view->shape[1], channels = view->shape[2];
        if (height < 1 || width < 1 || channels < 1 || channels > MAX_CHANNELS || height > SIDE_MOST / width) {
            PyErr_Format(PyExc_ValueError, "%s of %zd x %zd x %zd: sizes must be positive, with 1 to %d channels", what, height, width, channels,
                         MAX_CHANNELS);
        } else if (!(channels == 1 || view->strides[2] == 1) || !(width == 1 || view->strides[1] == channels) ||
                   !(height == 1 || view->strides[0] >= width * channels) || (writable && !PyBuffer_IsContiguous(view, 'C'))) {
            PyErr_Format(PyExc_TypeError, "%s has gaps %s: pass a copy", what, writable ? "or another order" : "within its lines");
        } else {
            *image = (Image){.data = view->buf,
                             .stride = (size_t)(height == 1 ? width * channels : view->strides[0]),
                             .height = (size_t)height,
                             .width = (size_t)width,
                             .channels = (size_t)channels};
            return 0;
        }
    }
    PyBuffer_Release(view);
    return -1;
}

static int read_per_channel(PyObject *values, size_t channels, float *out, const char *what) {
    PyObject *list = PySequence_List(values);
    if (list == NULL) {
        return -1;
    }
    if ((size_t)PyList_Size(list) != channels) {
        PyErr_Format(PyExc_ValueError, "%s has %zd values, the image has %zu channels", what, PyList_Size(list), channels);
        Py_DECREF(list);
        return -1;
    }
    for (size_t i = 0; i < channels; i++) {
        const double value = PyFloat_AsDouble(PyList_GetItem(list, (Py_ssize_t)i));
        if (value == -1.0 && PyErr_Occurred()) {
            Py_DECREF(list);
            return -1;
        }
        out[i] = (float)value;
    }
    Py_DECREF(list);
    return 0;
}

/* Frames that are held while they are read. */
typedef struct {
    PyObject *list;
    Py_buffer *views;
    Image *images;
    size_t count;
} Frames;

static void frames_release(Frames *frames) {
    for (size_t i = 0; i < frames->count; i++) {
        PyBuffer_Release(&frames->views[i]);
    }
    PyMem_Free(frames->views);
    PyMem_Free(frames->images);
    Py_XDECREF(frames->list);
}

/* On failure an error is set and there is nothing to release. */
static int frames_acquire(PyObject *sequence, Frames *frames) {
    *frames = (Frames){.list = PySequence_List(sequence)};
    if (frames->list == NULL) {
        return -1;
    }
    const size_t count = (size_t)PyList_Size(frames->list);
    frames->views = PyMem_Calloc(count + 1, sizeof *frames->views);
    frames->images = PyMem_Calloc(count + 1, sizeof *frames->images);
    int result = 0;
    if (frames->views == NULL || frames->images == NULL) {
        PyErr_NoMemory();
        result = -1;
    } else if (count == 0) {
        PyErr_SetString(PyExc_ValueError, "there are no frames");
        result = -1;
    }
    while (result == 0 && frames->count < count) {
        const size_t i = frames->count;
        result = acquire_image(PyList_GetItem(frames->list, (Py_ssize_t)i), &frames->views[i], false, &frames->images[i], "a frame");
        frames->count += result == 0;
        const Image *one = &frames->images[i], *first = &frames->images[0];
        if (result == 0 && (one->height != first->height || one->width != first->width || one->channels != first->channels)) {
            PyErr_Format(PyExc_ValueError, "frame %zu is %zu x %zu x %zu, the first one %zu x %zu x %zu: they must have one size", i, one->height,
                         one->width, one->channels, first->height, first->width, first->channels);
            result = -1;
        }
    }
    if (result != 0) {
        frames_release(frames);
    }
    return result;
}

static int check_layout(const Image *image, Py_ssize_t patch, Py_ssize_t merge, Py_ssize_t depth) {
    const size_t side = patch >= 0 && merge > 0 && patch <= INT16_MAX && merge <= INT16_MAX ? (size_t)(patch * merge) : 0;
    if (patch < 0 || merge < 1 || depth < 1 || depth > INT16_MAX || (patch > 0 && (side == 0 || image->height % side || image->width % side))) {
        PyErr_Format(PyExc_ValueError, "an image of %zu x %zu cannot be cut into blocks of %zd x %zd patches of %zd, %zd frames deep",
                     image->height, image->width, merge, merge, patch, depth);
        return -1;
    }
    return 0;
}

PyObject *native_normalize_u8(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"frames", "scale", "mean", "std", "out", "patch", "merge", "depth", "threads", NULL};
    PyObject *sequence, *mean_object, *std_object, *out_object;
    Py_ssize_t patch = 0, merge = 1, depth = 1, threads = 1;
    double scale;
    float mean[MAX_CHANNELS], std[MAX_CHANNELS];
    Frames frames;
    Py_buffer out;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OdOOO|nnnn:normalize_u8", names, &sequence, &scale, &mean_object, &std_object, &out_object,
                                     &patch, &merge, &depth, &threads) ||
        frames_acquire(sequence, &frames) != 0) {
        return NULL;
    }
    const Image *image = &frames.images[0];
    bool right = read_per_channel(mean_object, image->channels, mean, "mean") == 0 &&
                 read_per_channel(std_object, image->channels, std, "std") == 0 && check_layout(image, patch, merge, depth) == 0;
    for (size_t i = 0; right && i < image->channels; i++) {
        if (std[i] == 0.0f) {
            PyErr_Format(PyExc_ValueError, "std of channel %zu is 0", i);
            right = false;
        }
    }
    if (!right || acquire_view(out_object, &out, ELEMENT_FLOAT32, -1, true, "out") != 0) {
        frames_release(&frames);
        return NULL;
    }
    const size_t deep = patch > 0 ? (size_t)depth : 1, written = (frames.count + deep - 1) / deep * deep;
    const size_t elements = written * image->height * image->width * image->channels;
    right = (size_t)(out.len / out.itemsize) == elements;
    if (!right) {
        PyErr_Format(PyExc_ValueError, "out has %zd elements, the frames become %zu", out.len / out.itemsize, elements);
    } else {
        const FrameLayout layout = {.patch = (size_t)patch, .merge = (size_t)merge, .depth = (size_t)depth};
        Py_BEGIN_ALLOW_THREADS;
        normalize_u8(frames.images, frames.count, scale, mean, std, layout, out.buf, threads > 0 ? (size_t)threads : 1);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&out);
    frames_release(&frames);
    if (!right) {
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

static int read_filter(const char *name, ResampleFilter *filter) {
    for (size_t i = 0; i < sizeof FILTER_NAMES / sizeof *FILTER_NAMES; i++) {
        if (strcmp(FILTER_NAMES[i].name, name) == 0) {
            *filter = FILTER_NAMES[i].filter;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "unknown filter '%s': use box, bilinear, hamming, bicubic or lanczos", name);
    return -1;
}

static int read_order(const char *name, PassOrder *order) {
    static const char *const NAMES[] = {[PASSES_AUTO] = "auto", [PASSES_HORIZONTAL_FIRST] = "horizontal", [PASSES_VERTICAL_FIRST] = "vertical"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        if (strcmp(NAMES[i], name) == 0) {
            *order = (PassOrder)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "unknown order '%s': use auto, horizontal or vertical", name);
    return -1;
}

PyObject *native_resize_u8(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"source", "out", "filter", "order", "threads", "kernels", NULL};
    PyObject *source_object, *out_object;
    Py_ssize_t threads = 1;
    const char *filter_name, *order_name = "auto", *kernels_name = NULL;
    ResampleFilter filter;
    PassOrder order;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOs|snz:resize_u8", names, &source_object, &out_object, &filter_name, &order_name, &threads,
                                     &kernels_name) ||
        read_filter(filter_name, &filter) != 0 || read_order(order_name, &order) != 0) {
        return NULL;
    }
    const ImageKernels *kernels = kernels_name == NULL ? image_kernels_best() : image_kernels_named(kernels_name);
    if (kernels == NULL) {
        PyErr_Format(PyExc_ValueError, "this CPU has no kernels called '%s': it runs '%s'", kernels_name, image_kernels_best()->name);
        return NULL;
    }
    Py_buffer source_view, out_view;
    Image source, out;
    if (acquire_image(source_object, &source_view, false, &source, "the image") != 0) {
        return NULL;
    }
    if (acquire_image(out_object, &out_view, true, &out, "the resized image") != 0) {
        PyBuffer_Release(&source_view);
        return NULL;
    }
    PyObject *result = NULL;
    if (source.channels != out.channels) {
        PyErr_Format(PyExc_ValueError, "an image of %zu channels cannot be resized into one of %zu", source.channels, out.channels);
    } else {
        int failed;
        Py_BEGIN_ALLOW_THREADS;
        failed = resize_u8(&source, out_view.buf, out.height, out.width, filter, order, threads > 0 ? (size_t)threads : 1, kernels);
        Py_END_ALLOW_THREADS;
        result = failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
    }
    PyBuffer_Release(&source_view);
    PyBuffer_Release(&out_view);
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
