/* What rows read besides tokens: static inputs, recurrent states, values per token; and their further outputs. */
#include "decoder.h"

#include <stdlib.h>
#include <string.h>

static size_t axis_size(const RowShape *shape, const size_t *sizes, size_t axis) {
    if (shape->fixed[axis] >= 0) {
        return (size_t)shape->fixed[axis];
    }
    return sizes[shape->dim[axis]] != SIZE_UNKNOWN ? sizes[shape->dim[axis]] : 0;
}

size_t row_shape_bytes(const RowShape *shape, const size_t *sizes) {
    size_t bytes = shape->element;
    for (size_t axis = 0; axis < shape->rank; axis++) {
        const size_t size = axis_size(shape, sizes, axis);
        if (size > 0 && bytes > SIZE_MAX / 4 / size) {
            return SIZE_MAX;
        }
        bytes *= size;
    }
    return bytes;
}

/* One row's share in memory: the size of each axis, at least what is copied. */
typedef struct {
    uint8_t *data;
    size_t axes[MAX_RANK];
} Block;

static Block block(const RowShape *shape, const size_t *sizes, const uint8_t *data) {
    Block b = {.data = (uint8_t *)(uintptr_t)data};
    for (size_t axis = 0; axis < shape->rank; axis++) {
        b.axes[axis] = axis_size(shape, sizes, axis);
    }
    return b;
}

/* Copies what two layouts of a share have in common: the smaller size along each axis. */
static void copy_block(const RowShape *shape, const Block *to, const Block *from) {
    size_t common[MAX_RANK], at[MAX_RANK] = {0}, lines = 1;
    for (size_t axis = 0; axis < shape->rank; axis++) {
        common[axis] = to->axes[axis] < from->axes[axis] ? to->axes[axis] : from->axes[axis];
        lines *= axis + 1 < shape->rank ? common[axis] : 1;
    }
    const size_t last = shape->rank > 0 ? shape->rank - 1 : 0;
    const size_t line = (shape->rank > 0 ? common[last] : 1) * shape->element;
    for (size_t i = 0; line > 0 && i < lines; i++) {
        size_t to_line = 0, from_line = 0;
        for (size_t axis = 0; axis < last; axis++) {
            to_line = to_line * to->axes[axis] + at[axis];
            from_line = from_line * from->axes[axis] + at[axis];
        }
        const size_t to_width = shape->rank > 0 ? to->axes[last] : 1, from_width = shape->rank > 0 ? from->axes[last] : 1;
        memcpy(to->data + to_line * to_width * shape->element, from->data + from_line * from_width * shape->element, line);
        for (size_t axis = last; axis-- > 0;) {
            if (++at[axis] < common[axis]) {
                break;
            }
            at[axis] = 0;
        }
    }
}

void row_shape_copy(const RowShape *shape, uint8_t *to, const size_t *to_sizes, const uint8_t *from, const size_t *from_sizes) {
    const Block target = block(shape, to_sizes, to), origin = block(shape, from_sizes, from);
    copy_block(shape, &target, &origin);
}

void decoder_longest(const Decoder *d, size_t *sizes) {
    for (size_t i = 0; i < d->dim_count; i++) {
        sizes[i] = d->dims[i].longest;
    }
}

bool decoder_sizes_differ(const Decoder *d, const size_t *sizes, const size_t *other) {
    return d->dim_count > 0 && memcmp(sizes, other, d->dim_count * sizeof *sizes) != 0;
}

bool decoder_bound_unlike(const Decoder *d, const size_t *sizes, const size_t *other) {
    for (size_t i = 0; i < d->dim_count; i++) {
        if (d->dims[i].of_static && sizes[i] != other[i]) {
            return true;
        }
    }
    return false;
}

DecoderStatus decoder_not_bound(const Decoder *d, size_t row, char message[ORT_MESSAGE_SIZE]) {
    const FurtherInput *first = d->inputs;
    while (first->kind == INPUT_TOKEN) {
        first++;
    }
    return decoder_fail(DECODER_USAGE, message, "row %zu is not bound: the decoder reads '%s' and whatever else it is bound to", row, first->info->name);
}

/* Whether a row still stands for work to do: one that was emptied after use may lose what it is bound to. */
static bool in_use(const DecoderRow *row) { return row->bound && (row->length > 0 || !row->used); }

/* New memory for one input with its rows in the new layout; NULL when it cannot be had. */
static uint8_t *laid_out(const Decoder *d, const FurtherInput *input, const size_t *before, const size_t *after, size_t row_bytes) {
    const size_t rows = input->shared ? 1 : d->batch;
    uint8_t *data = calloc(rows, row_bytes > 0 ? row_bytes : 1);
    for (size_t row = 0; data != NULL && row < rows; row++) {
        row_shape_copy(&input->shape, data + row * row_bytes, after, input->data + row * input->row_bytes, before);
    }
    return data;
}

/* Lays everything out anew. Nothing is changed when memory runs out. */
static DecoderStatus lay_out(Decoder *d, const size_t *before, const size_t *after, char message[ORT_MESSAGE_SIZE]) {
    const size_t count = d->input_count + d->output_count;
    uint8_t **data = calloc(count + 1, sizeof *data);
    bool ok = data != NULL;
    for (size_t i = 0; ok && i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        if (input->kind != INPUT_STATE) {
            const size_t row_bytes = row_shape_bytes(&input->shape, after);
            ok = row_bytes != SIZE_MAX && (data[i] = laid_out(d, input, before, after, row_bytes)) != NULL;
        }
    }
    for (size_t i = 0; ok && i < d->output_count; i++) {
        const size_t row_bytes = row_shape_bytes(&d->outputs[i].shape, after);
        ok = (data[d->input_count + i] = calloc(d->batch, row_bytes > 0 ? row_bytes : 1)) != NULL;
    }
    for (size_t i = 0; data != NULL && i < count; i++) {
        uint8_t **place = i < d->input_count ? &d->inputs[i].data : &d->outputs[i - d->input_count].data;
        if (ok && data[i] != NULL) {
            free(*place);
            *place = data[i];
        } else {
            free(data[i]);
        }
    }
    free(data);
    if (!ok) {
        return decoder_fail(DECODER_DEVICE, message, "no memory for the decoder's inputs of %zu rows", d->batch);
    }
    decoder_unbind(d);
    for (size_t i = 0; i < d->input_count; i++) {
        d->inputs[i].row_bytes = row_shape_bytes(&d->inputs[i].shape, after);
    }
    for (size_t i = 0; i < d->dim_count; i++) {
        d->dims[i].longest = after[i];
    }
    return DECODER_OK;
}

DecoderStatus decoder_fit(Decoder *d, size_t row, const size_t *sizes, char message[ORT_MESSAGE_SIZE]) {
    const size_t count = d->dim_count;
    if (count == 0) {
        return DECODER_OK;
    }
    size_t *before = malloc(2 * count * sizeof *before);
    if (before == NULL) {
        return decoder_fail(DECODER_DEVICE, message, "out of memory");
    }
    size_t *after = before + count;
    decoder_longest(d, before);
    for (size_t i = 0; i < count; i++) {
        after[i] = sizes[i] != SIZE_UNKNOWN ? sizes[i] : 0;
    }
    for (size_t other = 0; other < d->batch; other++) {
        DecoderRow *r = &d->rows[other];
        for (size_t i = 0; other != row && d->needs_binding && !in_use(r) && i < count; i++) {
            r->bound = r->bound && (d->dims[i].fillable || r->sizes[i] == sizes[i]);
        }
        for (size_t i = 0; other != row && r->bound && i < count; i++) {
            after[i] = r->sizes[i] != SIZE_UNKNOWN && r->sizes[i] > after[i] ? r->sizes[i] : after[i];
        }
    }
    DecoderStatus status = DECODER_OK;
    if (memcmp(before, after, count * sizeof *before) != 0) {
        status = lay_out(d, before, after, message);
    }
    if (status == DECODER_OK) {
        memcpy(d->rows[row].sizes, sizes, count * sizeof *sizes);
    }
    free(before);
    return status;
}

static DecoderStatus check_bindable(const Decoder *d, size_t row, const InputValues *values, char message[ORT_MESSAGE_SIZE]) {
    if (d->rows[row].length > 0) {
        return decoder_fail(DECODER_USAGE, message, "row %zu has %zu entries: truncate it to 0 before it is bound to other inputs", row,
                            d->rows[row].length);
    }
    for (size_t other = 0; other < d->batch; other++) {
        const DecoderRow *r = &d->rows[other];
        if (other == row || !in_use(r)) {
            continue;
        }
        for (size_t i = 0; i < d->dim_count; i++) {
            if (!d->dims[i].fillable && values->sizes[i] != r->sizes[i]) {
                return decoder_fail(DECODER_USAGE, message,
                                    "row %zu has size %zu in '%s', another row has %zu: they cannot run together, since the decoder has no mask input "
                                    "that would hide the filling of the shorter one",
                                    row, values->sizes[i], d->dims[i].name, r->sizes[i]);
            }
        }
        for (size_t i = 0; i < d->input_count; i++) {
            const FurtherInput *input = &d->inputs[i];
            if (input->shared && memcmp(input->data, values->data[i], input->row_bytes) != 0) {
                return decoder_fail(DECODER_USAGE, message, "row %zu has other values of '%s' than another row, which is one array for all rows", row,
                                    input->info->name);
            }
        }
    }
    return DECODER_OK;
}

/* Puts one row's share, of exactly the row's sizes, in its place. */
static void put(Decoder *d, const FurtherInput *input, size_t row, uint8_t *base, const uint8_t *value) {
    Block to = {.data = base + (input->shared ? 0 : row) * input->row_bytes};
    const Block from = block(&input->shape, d->rows[row].sizes, value);
    for (size_t axis = 0; axis < input->shape.rank; axis++) {
        const bool dynamic = input->shape.fixed[axis] < 0;
        to.axes[axis] = dynamic ? d->dims[input->shape.dim[axis]].longest : from.axes[axis];
    }
    memset(to.data, 0, input->row_bytes);
    copy_block(&input->shape, &to, &from);
}

DecoderStatus decoder_set_inputs(Decoder *d, size_t row, const InputValues *values, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    DecoderStatus status = check_bindable(d, row, values, message);
    if (status == DECODER_OK) {
        status = decoder_fit(d, row, values->sizes, message);
    }
    if (status != DECODER_OK) {
        return status;
    }
    r->bound = true;
    decoder_forget(d, row);
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        const bool changes = input->shared && memcmp(input->data, values->data[i], input->row_bytes) != 0;
        for (size_t other = 0; changes && other < d->batch; other++) {
            d->rows[other].bound = other == row || in_use(&d->rows[other]);
        }
        if (input->kind != INPUT_TOKEN) {
            put(d, input, row, input->kind == INPUT_STATE ? input->initial : input->data, values->data[i]);
        }
    }
    r->used = false;
    decoder_empty_row(d, row);
    return DECODER_OK;
}

void decoder_empty_row(Decoder *d, size_t row) {
    for (size_t i = 0; i < d->dim_count; i++) {
        if (!d->dims[i].of_static) {
            d->rows[row].sizes[i] = SIZE_UNKNOWN;
        }
    }
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        if (input->kind == INPUT_STATE) {
            memcpy(input->data + row * input->row_bytes, input->initial + row * input->row_bytes, input->row_bytes);
        }
    }
}

void decoder_keep_states(Decoder *d, size_t row) {
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        if (input->kind == INPUT_STATE) {
            memcpy(input->data + row * input->row_bytes, input->next + row * input->row_bytes, input->row_bytes);
        }
    }
}

void decoder_set_token_values(Decoder *d, size_t row, const InputValues *values) {
    for (size_t i = 0; i < d->input_count; i++) {
        const FurtherInput *input = &d->inputs[i];
        if (input->kind == INPUT_TOKEN && values != NULL && values->data[i] != NULL) {
            put(d, input, row, input->data, values->data[i]);
        } else if (input->kind == INPUT_TOKEN) {
            memset(input->data + row * input->row_bytes, 0, input->row_bytes);
        }
    }
}

DecoderStatus decoder_reserve_outputs(Decoder *d, size_t row, char message[ORT_MESSAGE_SIZE]) {
    DecoderRow *r = &d->rows[row];
    size_t bytes = 0;
    for (size_t i = 0; i < d->output_count; i++) {
        bytes += row_shape_bytes(&d->outputs[i].shape, r->sizes);
    }
    if (bytes > r->outputs_room) {
        uint8_t *grown = realloc(r->outputs, bytes);
        if (grown == NULL) {
            return decoder_fail(DECODER_DEVICE, message, "out of memory");
        }
        r->outputs = grown;
        r->outputs_room = bytes;
    }
    return DECODER_OK;
}

void decoder_keep_outputs(Decoder *d, size_t row, size_t at, uint8_t *const *outputs, size_t tokens, const size_t *sizes) {
    const size_t *own = d->rows[row].sizes;
    uint8_t *to = d->rows[row].outputs;
    for (size_t i = 0; i < d->output_count; i++) {
        const FurtherOutput *output = &d->outputs[i];
        const size_t row_bytes = row_shape_bytes(&output->shape, sizes), kept = row_shape_bytes(&output->shape, own);
        const uint8_t *from = outputs[i] + at * row_bytes * (output->sequence_axis > 0 ? tokens : 1);
        if (output->sequence_axis == 0 || tokens == 1) {
            row_shape_copy(&output->shape, to, own, from, sizes);
        } else {
            /* Several tokens are run for one row at a time, in its own sizes: lines of `inner` bytes, the last of each `tokens`. */
            size_t inner = output->shape.element;
            for (size_t axis = output->sequence_axis - 1; axis < output->shape.rank; axis++) {
                inner *= axis_size(&output->shape, sizes, axis);
            }
            for (size_t done = 0; done < kept; done += inner, from += tokens * inner) {
                memcpy(to + done, from + (tokens - 1) * inner, inner);
            }
        }
        to += kept;
    }
}
