/* What the next steps of a decoder read: a token reads all weights once, so whatever the memory does not deliver while threads wait or
 * compute is time lost. */
#include "plan_heads.h"
#include "plan_work.h"

#define AHEAD_BYTES ((size_t)256 << 10) /* per thread: a part of the second-level cache */
#define AHEAD_ROWS 4                    /* of more rows, the products take longer than reading their weights */

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Keys and values that the items [begin, end) of one token's attention read: of each head, the parts that are the thread's. Which entries
 * they begin at may be off by a few: nothing but time depends on it. */
static size_t cache_ahead(const PlanCall *call, const PlanStep *step, size_t begin, size_t end, PoolAhead *ahead, size_t most) {
    const Heads h = heads_of(call, step);
    const size_t length = call->longest, part = (length + call->parts - 1) / call->parts, each = (part + ATTENTION_KEYS - 1) / ATTENTION_KEYS * ATTENTION_KEYS;
    const size_t window = (size_t)step->arg[ARG_WINDOW], hidden = window > 0 && length > window ? length - window : 0;
    size_t count = 0;
    for (size_t item = begin; item < end && count + 2 <= most; item = (item / call->parts + 1) * call->parts) {
        const size_t kv = item / call->parts, first = item % call->parts * each, from = first < hidden ? hidden : first;
        const size_t to = smaller(smaller(end - kv * call->parts, call->parts) * each, length);
        if (from < to) {
            const size_t at = kv * h.head_bytes + from * h.entry_bytes, bytes = (to - from) * h.entry_bytes;
            ahead[count++] = (PoolAhead){h.keys + at, bytes};
            ahead[count++] = (PoolAhead){h.values + at, bytes};
        }
    }
    return count;
}

static PoolAhead weights_ahead(const Plan *plan, const PlanStep *step, size_t begin, size_t end) {
    const PanelMatrix *m = &plan->weights[step->weight[0]].matrix;
    const size_t each = plan_panels_per_item(plan, step) * (step->kind == STEP_GATED ? 2 : 1), panels = (m->width + PANEL - 1) / PANEL;
    return (PoolAhead){m->data + begin * each * m->panel_bytes, (smaller(end * each, panels) - begin * each) * m->panel_bytes};
}

size_t plan_ahead(void *context, size_t index, size_t thread, PoolAhead ahead[POOL_AHEAD]) {
    const PlanCall *call = context;
    const Plan *plan = call->plan;
    const size_t threads = pool_threads(plan->pool);
    size_t count = 0, bytes = 0;
    for (size_t i = index + 1; i < plan->step_count && call->rows <= AHEAD_ROWS && count < POOL_AHEAD && bytes < AHEAD_BYTES; i++) {
        const PlanStep *step = &plan->steps[i];
        const bool product = step->kind == STEP_MATMUL || step->kind == STEP_GATED;
        if (!product && (step->kind != STEP_ATTENTION || call->rows > 1)) {
            continue;
        }
        bool small = false;
        const size_t items = plan_items(context, i, &small);
        const size_t begin = pool_share(items, threads, thread), end = pool_share(items, threads, thread + 1), before = count;
        if (small || begin == end) {
            continue;
        }
        if (product) {
            ahead[count++] = weights_ahead(plan, step, begin, end);
        } else {
            count += cache_ahead(call, step, begin, end, ahead + count, POOL_AHEAD - count);
        }
        for (size_t k = before; k < count; k++) {
            ahead[k].bytes = smaller(ahead[k].bytes, AHEAD_BYTES - bytes);
            bytes += ahead[k].bytes;
        }
    }
    return count;
}
