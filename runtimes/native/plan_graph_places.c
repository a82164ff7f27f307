/* Steps of a graph's plan that read integers (positions, places, windows), and rotary positions. */
#include "plan_graph_call.h"
#include "plan_rows.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Rotary positions (Su et al., arXiv 2104.09864): numbers i and i + half of each head turn together. `out` may be `x`. */
static void rotate(const float *x, size_t heads, size_t size, const float *cosines, const float *sines, float *out) {
    const size_t half = size / 2;
    for (size_t head = 0; head < heads; head++, x += size, out += size) {
        for (size_t i = 0; i < half; i++) {
            const float a = x[i], b = x[half + i];
            out[i] = a * cosines[i] - b * sines[i];
            out[half + i] = b * cosines[half + i] + a * sines[half + i];
        }
    }
}

/* Which of `rows` rows a place means; negative ones count from the end. Places were checked, but lie in memory of the caller, who may have
 * changed them since: it is read once, and whatever it is then, a row. */
static size_t row_of(const volatile int64_t *place, size_t rows) {
    const int64_t given = *place;
    const uint64_t row = given < 0 ? (uint64_t)given + rows : (uint64_t)given;
    return row < rows ? (size_t)row : 0;
}

void place_work(const GraphCall *call, const PlanStep *step, size_t row) {
    const size_t width = step->width;
    float *out = row_at(call, step->out[0], row);
    if (step->kind == GRAPH_CONVERT) {
        const int64_t *x = integers_of(call, step->in[0]) + row * width;
        for (size_t i = 0; i < width; i++) {
            out[i] = (float)x[i];
        }
    } else if (step->kind == GRAPH_COSINE) {
        const float *x = row_at(call, step->in[0], row);
        for (size_t i = 0; i < width; i++) {
            out[i] = step->arg[0] == 0 ? cosf(x[i]) : sinf(x[i]);
        }
    } else if (step->kind == GRAPH_ROTARY) {
        rotate(row_at(call, step->in[0], row), (size_t)step->arg[0], (size_t)step->arg[1], row_at(call, step->in[1], row), row_at(call, step->in[2], row), out);
    } else {
        const PanelMatrix *table = step->in[0].buffer < 0 ? matrix_of(call, step->weight[0]) : NULL;
        const size_t from = row_of(integers_of(call, step->in[1]) + row, table != NULL ? table->depth : call->images * buffer_of(call, step->in[0])->rows);
        if (table == NULL) {
            memcpy(out, row_at(call, step->in[0], from), width * sizeof *out);
        } else {
            const uint8_t *given = table->data + from * rows_stride(table);
            if ((int)table->format == WEIGHT_HALF_ROWS) {
                call->plan->kernels->to_float((const uint16_t *)(const void *)given, width, out);
            } else {
                memcpy(out, given, width * sizeof *out);
            }
        }
    }
}

void pick_row(const GraphCall *call, const PlanStep *step, size_t image) {
    const size_t rows = buffer_of(call, step->in[0])->rows;
    const int64_t *given = integers_of(call, step->in[1]) + image * rows;
    size_t chosen = 0, valid = 0;
    for (size_t i = 0; i < rows; i++) {
        valid += given[i] != 0;
    }
    if (step->arg[0] == PICK_LARGEST) {
        for (size_t i = 1; i < rows; i++) {
            chosen = given[i] > given[chosen] ? i : chosen;
        }
    } else if (step->arg[0] == PICK_EQUAL) {
        while (chosen < rows && given[chosen] != step->arg[1]) {
            chosen++;
        }
        chosen = chosen < rows ? chosen : 0;
    } else {
        chosen = valid > 0 ? valid - 1 : rows - 1;
    }
    memcpy(row_at(call, step->out[0], image), row_at(call, step->in[0], image * rows + chosen), step->width * sizeof(float));
}

static const char *input_name(const GraphCall *call, PlanRef ref) { return call->plan->inputs[buffer_of(call, ref)->offset].name; }

/* Every place of a gathering is one of its rows; negative ones count from the end. */
static int places_fit(const GraphCall *call, const PlanStep *step, char message[PLAN_MESSAGE_SIZE]) {
    const int64_t *places = integers_of(call, step->in[1]);
    const bool computed = step->in[0].buffer >= 0;
    const int64_t rows = (int64_t)(computed ? call->images * buffer_of(call, step->in[0])->rows : matrix_of(call, step->weight[0])->depth);
    for (size_t i = 0; i < integers_count(call, step->in[1]); i++) {
        if (places[i] >= rows || places[i] < -rows) {
            snprintf(message, PLAN_MESSAGE_SIZE, "'%s' has %lld, there are %lld rows to take from", input_name(call, step->in[1]), (long long)places[i],
                     (long long)rows);
            return -1;
        }
    }
    return 0;
}

static int find_segments(GraphCall *call, PlanRef ref, char message[PLAN_MESSAGE_SIZE]) {
    const int64_t *ids = integers_of(call, ref);
    const size_t rows = integers_count(call, ref);
    call->segments = malloc((rows + 1) * sizeof *call->segments);
    if (call->segments == NULL) {
        snprintf(message, PLAN_MESSAGE_SIZE, "out of memory for %zu rows at once", rows);
        return -1;
    }
    for (size_t i = 0; i < rows; i++) {
        if (i > 0 && ids[i] < ids[i - 1]) {
            snprintf(message, PLAN_MESSAGE_SIZE, "'%s' has %lld after %lld, expected numbers that rise: rows that see each other lie together",
                     input_name(call, ref), (long long)ids[i], (long long)ids[i - 1]);
            return -1;
        }
        if (i == 0 || ids[i] != ids[i - 1]) {
            call->segments[call->segment_count++] = i;
        }
    }
    call->segments[call->segment_count] = rows;
    return 0;
}

int places_ready(GraphCall *call, char message[PLAN_MESSAGE_SIZE]) {
    const Plan *plan = call->plan;
    int failed = 0;
    for (uint32_t i = 0; i < plan->step_count && failed == 0; i++) {
        const PlanStep *step = &plan->steps[i];
        if (step->kind == GRAPH_GATHER) {
            failed = places_fit(call, step, message);
        } else if (step->kind == GRAPH_ATTENTION && step->arg[5] == OVER_SEGMENTS && call->segments == NULL) {
            failed = find_segments(call, step->in[3], message);
        }
    }
    if (failed != 0) {
        free(call->segments);
        call->segments = NULL;
    }
    return failed;
}
