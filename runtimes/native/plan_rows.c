/* Rows of an embedding's table as floats. */
#include "plan_rows.h"

#include <stdio.h>
#include <string.h>

size_t rows_stride(const PanelMatrix *table) {
    if ((int)table->format == WEIGHT_BYTE_ROWS) {
        return sizeof(float) + (table->width + 3) / 4 * 4;
    }
    return table->width * ((int)table->format == WEIGHT_HALF_ROWS ? sizeof(uint16_t) : sizeof(float));
}

static const PanelMatrix *table_of(const Plan *plan) {
    const int32_t weight = plan->step_count == 1 ? plan->steps[0].weight[0] : -1;
    return weight >= 0 && (uint32_t)weight < plan->weight_count ? &plan->weights[weight].matrix : NULL;
}

const char *rows_check(const Plan *plan) {
    const PanelMatrix *table = table_of(plan);
    const PlanValue *in = plan->inputs, *out = plan->outputs;
    if (plan->input_count != 1 || plan->output_count != 1 || in->type != 7 || in->rank != 2 || in->shape[0] >= 0 || in->shape[1] >= 0 || out->type != 1 ||
        out->rank != 3 || out->shape[0] >= 0 || out->shape[1] >= 0) {
        return "its signature is not that of an embedding";
    }
    const bool known = table != NULL && ((int)table->format == WEIGHT_VECTOR || (int)table->format == WEIGHT_HALF_ROWS || (int)table->format == WEIGHT_BYTE_ROWS);
    if (!known || table->width != plan->hidden || table->depth != plan->vocab || out->shape[2] != (int64_t)plan->hidden || plan->buffer_count != 0) {
        return "its table is not what the signature says";
    }
    return NULL;
}

static void expand(const Plan *plan, const PanelMatrix *table, const uint8_t *row, float *out) {
    if ((int)table->format == WEIGHT_HALF_ROWS) {
        plan->kernels->to_float((const uint16_t *)(const void *)row, table->width, out);
        return;
    }
    float scale;
    memcpy(&scale, row, sizeof scale);
    const int8_t *codes = (const int8_t *)row + sizeof scale;
    for (size_t i = 0; i < table->width; i++) {
        out[i] = scale * codes[i];
    }
}

int rows_run(Plan *plan, const int64_t *tokens, size_t count, float *out, char message[PLAN_MESSAGE_SIZE]) {
    const PanelMatrix *table = table_of(plan);
    const size_t stride = rows_stride(table);
    for (size_t i = 0; i < count; i++) {
        if (tokens[i] < 0 || (uint64_t)tokens[i] >= table->depth) {
            snprintf(message, PLAN_MESSAGE_SIZE, "token %lld is outside its table of %zu rows", (long long)tokens[i], table->depth);
            return -1;
        }
    }
    plan->scratch = plan_grown(plan->scratch, &plan->scratch_bytes, stride);
    if (plan->scratch == NULL) {
        snprintf(message, PLAN_MESSAGE_SIZE, "out of memory");
        return -1;
    }
    for (size_t i = 0; i < count; i++, out += table->width) {
        const uint64_t token = (uint64_t)((const volatile int64_t *)tokens)[i]; /* memory of the caller, who may have changed it since */
        const uint8_t *mapped = table->data + (size_t)(token < table->depth ? token : 0) * stride;
        const bool plain = (int)table->format == WEIGHT_VECTOR;
        void *to = plain ? (void *)out : plan->scratch;
        if (plan->descriptor < 0) {
            memcpy(to, mapped, stride);
        } else if (!descriptor_read(plan->descriptor, to, stride, (size_t)(mapped - (const uint8_t *)plan->file))) {
            snprintf(message, PLAN_MESSAGE_SIZE, "row %llu of its file cannot be read", (unsigned long long)token);
            return -1;
        }
        if (!plain) {
            expand(plan, table, plan->scratch, out);
        }
    }
    return 0;
}
