/* Rotary positions (Su et al., arXiv 2104.09864), and new entries of the cache. */
#include "plan_heads.h"

#include <math.h>
#include <string.h>

void angles_work(const PlanCall *call, const PlanStep *step, size_t row) {
    const size_t half = step->width / 2, all = call->run->rows * call->run->tokens;
    const size_t token = row / call->tokens * call->run->tokens + call->first + row % call->tokens;
    const float *frequencies = (const float *)(const void *)call->plan->weights[step->weight[0]].matrix.data;
    const int32_t *axes = (const int32_t *)(const void *)call->plan->weights[step->weight[1]].matrix.data;
    float *out = plan_row(call, step->out[0], false, row);
    for (size_t i = 0; i < half; i++) {
        const float angle = (float)call->run->positions[(size_t)axes[i] * all + token] * frequencies[i];
        out[i] = cosf(angle) * step->real[0];
        out[half + i] = sinf(angle) * step->real[0];
    }
}

/* One head: pairs (i, i + half), or neighbours where interleaved. */
static void rotate(const Kernels *kernels, const float *x, size_t size, size_t half, bool interleaved, const float *cosine, const float *sine, float *out) {
    if (interleaved) {
        for (size_t i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            out[2 * i] = a * cosine[i] - b * sine[i];
            out[2 * i + 1] = a * sine[i] + b * cosine[i];
        }
    } else {
        kernels->rotate(x, half, cosine, sine, out);
    }
    if (out != x) {
        memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof *x);
    }
}

/* The memory is the caller's, who gave it to be written. */
static void write_entry(const Kernels *kernels, const CacheEntries *entry, const float *x, size_t size) {
    void *data = (void *)(uintptr_t)entry->data;
    switch (entry->format) {
    case CACHE_FLOAT32:
        memcpy(data, x, size * sizeof *x);
        break;
    case CACHE_FLOAT16:
        kernels->to_half(x, size, data);
        break;
    case CACHE_INT8:
        kernels->to_codes(x, size, data, (uint16_t *)(uintptr_t)entry->scales, entry->scale_stride);
        break;
    }
}

void rotary_work(const PlanCall *call, const PlanStep *step, size_t row) {
    const Plan *plan = call->plan;
    const Kernels *kernels = plan->kernels;
    const Heads h = heads_of(call, step);
    const size_t batch = row / call->tokens, index = plan_past(call, batch) + row % call->tokens;
    const size_t half = (size_t)step->arg[ARG_ROTARY] / 2;
    const bool interleaved = step->arg[ARG_INTERLEAVED] != 0;
    const float *cosine = NULL, *sine = NULL;
    if (step->arg[ARG_ANGLES] == 3) {
        cosine = plan_row(call, step->in[3], false, row);
        sine = cosine + half;
    } else if (step->arg[ARG_ANGLES] != 0) {
        const size_t token = batch * call->run->tokens + call->first + row % call->tokens;
        const size_t position = step->arg[ARG_ANGLES] == 1 ? (size_t)call->run->positions[token] : index;
        cosine = (const float *)(const void *)plan->weights[step->weight[0]].matrix.data + position * half;
        sine = (const float *)(const void *)plan->weights[step->weight[1]].matrix.data + position * half;
    }
    const float *q = plan_row(call, step->in[0], false, row), *k = plan_row(call, step->in[1], false, row), *v = plan_row(call, step->in[2], false, row);
    float *out = plan_row(call, step->out[0], false, row);
    for (size_t head = 0; head < h.heads; head++) {
        rotate(kernels, q + head * h.size, h.size, half, interleaved, cosine, sine, out + head * h.size);
    }
    kernels->scale(out, step->real[0], h.heads * h.size, out);
    float turned[h.size];
    for (size_t head = 0; head < h.kv_heads; head++) {
        const CacheEntries key = entries_of(&h, false, batch, head, index), value = entries_of(&h, true, batch, head, index);
        rotate(kernels, k + head * h.size, h.size, half, interleaved, cosine, sine, turned);
        write_entry(kernels, &key, turned, h.size);
        write_entry(kernels, &value, v + head * h.size, h.size);
    }
}
