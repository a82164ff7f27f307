/* Plans of graphs over texts and other rows whose number each call brings: sizes as functions of that length, and what masks hide. */
#include "plan_graph_call.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* --- sizes --- */

int graph_fit(Plan *plan, size_t length, char message[PLAN_MESSAGE_SIZE]) {
    if (plan->longest == 0 || (length != 0 && length == plan->length)) { /* a length of 0: what the last call brought was refused */
        return 0;
    }
    if (length == 0 || length > plan->longest) {
        snprintf(message, PLAN_MESSAGE_SIZE, "a length of %zu, expected 1 to %zu: shorten the text", length, plan->longest);
        return -1;
    }
    const PlanStep *step = &plan->steps[0];
    const int32_t *table = (const int32_t *)(const void *)plan->weights[step->weight[0]].matrix.data;
    const size_t times = (length + (size_t)step->arg[0] - 1) / (size_t)step->arg[0]; /* no buffer grows faster than the length */
    for (uint32_t i = 0; i < plan->buffer_count; i++) {
        PlanBuffer *b = &plan->buffers[i];
        const uint64_t rows = (uint64_t)table[2 * i] + (uint64_t)table[2 * i + 1] * length;
        b->rows = rows < UINT32_MAX ? (uint32_t)rows : 0; /* 0: refused below */
        b->offset = b->kind == BUFFER_INPUT || b->kind == BUFFER_OUTPUT ? b->place : b->place * times;
    }
    plan->token_bytes = plan->place_bytes * times;
    plan->length = length;
    const char *wrong = graph_check(plan);
    if (wrong != NULL) {
        plan->length = 0;
        snprintf(message, PLAN_MESSAGE_SIZE, "the plan is damaged: for a length of %zu, %s", length, wrong);
        return -1;
    }
    return 0;
}

/* --- copies whose places depend on the length --- */

GraphSpread graph_spread(const int32_t *run, size_t length) {
    int64_t found[GRAPH_SPREAD_NUMBERS / 2];
    for (size_t i = 0; i < GRAPH_SPREAD_NUMBERS / 2; i++) {
        found[i] = run[2 * i] + (int64_t)run[2 * i + 1] * (int64_t)length;
    }
    return (GraphSpread){.to = found[0], .from = found[1], .count = found[2], .to_step = found[3], .from_step = found[4], .numbers = found[5]};
}

void spread_work(const GraphCall *call, const PlanStep *step, size_t unit) {
    const PanelMatrix *table = matrix_of(call, step->weight[0]);
    const size_t runs = table->width / GRAPH_SPREAD_NUMBERS, image = unit / runs;
    const GraphSpread s = graph_spread((const int32_t *)(const void *)table->data + unit % runs * GRAPH_SPREAD_NUMBERS, call->plan->length);
    const float *from = step->in[0].buffer >= 0 ? row_at(call, step->in[0], image * buffer_of(call, step->in[0])->rows) : vector(call, step->weight[1]);
    float *to = row_at(call, step->out[0], image * buffer_of(call, step->out[0])->rows);
    for (int64_t i = 0; i < s.count; i++) {
        memcpy(to + s.to + i * s.to_step, from + s.from + i * s.from_step, (size_t)s.numbers * sizeof(float));
    }
}

/* --- what a query may see --- */

GraphSight graph_sight(const GraphCall *call, const PlanStep *step, size_t image, size_t query) {
    GraphSight s = {.query = query, .keys = buffer_of(call, step->in[1])->rows, .prefix = (size_t)step->arg[4], .causal = step->arg[3] != 0};
    if (step->in[3].buffer >= 0) {
        s.mask = integers_of(call, step->in[3]) + image * buffer_of(call, step->in[3])->rows;
        while (s.first < s.keys && s.first >= s.prefix && s.mask[s.first - s.prefix] == 0) {
            s.first++;
        }
    }
    return s;
}

void graph_hide(const void *context, size_t row, size_t key, size_t count, float *scores) {
    const GraphSight *s = context;
    const size_t query = s->query + row;
    if (s->first == s->keys || (s->causal && s->first > query)) { /* it sees nothing: what hides is as large as any score, and all keys are alike */
        memset(scores, 0, count * sizeof *scores);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        const size_t k = key + i;
        if ((s->causal && k > query) || (s->mask != NULL && k >= s->prefix && s->mask[k - s->prefix] == 0)) {
            scores[i] = -INFINITY;
        }
    }
}
