/* Rotary positions, the cache, and attention over it: softmax(q · kᵀ) · v with the largest score and the sum carried along as keys are
 * read (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135), so that no more than a block of scores exists. */
#include "plan.h"

#include <math.h>
#include <string.h>

#define QUERIES 96    /* rows of queries that share a block of keys: tokens times the query heads of one key head */
#define MOST_PARTS 8  /* of one token's keys, for threads to share */
#define TILE 128      /* keys that one token's attention scores at a time */

enum { ARG_KEYS, ARG_VALUES, ARG_HEADS, ARG_KV_HEADS, ARG_SIZE, ARG_ROTARY, ARG_INTERLEAVED, ARG_ANGLES, ARG_WINDOW = 5, ARG_BLOCKS };

typedef struct {
    CacheFormat format;
    size_t heads, kv_heads, group, size;
    const uint8_t *keys, *values; /* of all rows */
    size_t row_bytes, head_bytes, entry_bytes;
} Heads;

static CacheFormat cache_format(const Plan *plan, int32_t index) {
    for (uint32_t i = 0; i < plan->input_count; i++) {
        if (strncmp(plan->inputs[i].name, "past_key_values.", 16) == 0 && index-- == 0) {
            return plan->inputs[i].type == 10 ? CACHE_FLOAT16 : CACHE_FLOAT32;
        }
    }
    return CACHE_FLOAT32;
}

static Heads heads_of(const PlanCall *call, const PlanStep *step) {
    const int32_t *a = step->arg;
    const CacheFormat format = cache_format(call->plan, a[ARG_KEYS]);
    const size_t entry = (size_t)a[ARG_SIZE] * (format == CACHE_FLOAT16 ? 2 : 4);
    return (Heads){.format = format,
                   .heads = (size_t)a[ARG_HEADS],
                   .kv_heads = (size_t)a[ARG_KV_HEADS],
                   .group = (size_t)(a[ARG_HEADS] / a[ARG_KV_HEADS]),
                   .size = (size_t)a[ARG_SIZE],
                   .keys = call->run->caches[a[ARG_KEYS]],
                   .values = call->run->caches[a[ARG_VALUES]],
                   .row_bytes = call->run->cache_row_bytes[a[ARG_KEYS]],
                   .head_bytes = call->run->capacity * entry,
                   .entry_bytes = entry};
}

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
static void rotate(const float *x, size_t size, size_t half, bool interleaved, const float *cosine, const float *sine, float *out) {
    if (interleaved) {
        for (size_t i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            out[2 * i] = a * cosine[i] - b * sine[i];
            out[2 * i + 1] = a * sine[i] + b * cosine[i];
        }
    } else {
        for (size_t i = 0; i < half; i++) {
            const float a = x[i], b = x[half + i];
            out[i] = a * cosine[i] - b * sine[i];
            out[half + i] = a * sine[i] + b * cosine[i];
        }
    }
    if (out != x) {
        memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof *x);
    }
}

static void write_entry(const Kernels *kernels, CacheFormat format, const float *x, size_t size, uint8_t *entry) {
    if (format == CACHE_FLOAT16) {
        kernels->to_half(x, size, (uint16_t *)(void *)entry);
    } else {
        memcpy(entry, x, size * sizeof *x);
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
        rotate(q + head * h.size, h.size, half, interleaved, cosine, sine, out + head * h.size);
    }
    kernels->scale(out, step->real[0], h.heads * h.size, out);
    float turned[h.size];
    for (size_t head = 0; head < h.kv_heads; head++) {
        const size_t at = batch * h.row_bytes + head * h.head_bytes + index * h.entry_bytes;
        rotate(k + head * h.size, h.size, half, interleaved, cosine, sine, turned);
        write_entry(kernels, h.format, turned, h.size, call->run->caches[step->arg[ARG_KEYS]] + at);
        write_entry(kernels, h.format, v + head * h.size, h.size, call->run->caches[step->arg[ARG_VALUES]] + at);
    }
}

void attention_split(PlanCall *call) {
    const size_t part = (call->longest + MOST_PARTS - 1) / MOST_PARTS;
    call->part_keys = (part + ATTENTION_KEYS - 1) / ATTENTION_KEYS * ATTENTION_KEYS;
    call->parts = call->tokens == 1 ? (call->longest + call->part_keys - 1) / call->part_keys : 1;
}

static size_t block_tokens(const Heads *h) { return h->group < QUERIES ? QUERIES / h->group : 1; }

size_t attention_items(const PlanCall *call, const PlanStep *step) {
    const Heads h = heads_of(call, step);
    if (call->tokens == 1) {
        return call->run->rows * h.kv_heads * call->parts;
    }
    const size_t tokens = block_tokens(&h);
    return call->run->rows * h.kv_heads * ((call->tokens + tokens - 1) / tokens);
}

static size_t padded(size_t size) { return (size + PANEL - 1) / PANEL * PANEL; }

size_t attention_scratch(const PlanStep *step) {
    const size_t size = padded((size_t)step->arg[ARG_SIZE]), group = (size_t)(step->arg[ARG_HEADS] / step->arg[ARG_KV_HEADS]);
    const size_t rows = group < QUERIES ? QUERIES : group;
    const size_t block = rows * (2 * size + ATTENTION_KEYS + 2) + 2 * ATTENTION_KEYS * size;
    const size_t single = group * (TILE + size + 2);
    return ((block > single ? block : single) * sizeof(float) + 63) / 64 * 64;
}

static void soft_cap(const Kernels *kernels, float cap, float *scores, size_t count) {
    if (cap > 0.0f) {
        kernels->scale(scores, 1.0f / cap, count, scores);
        kernels->unary(UNARY_TANH, scores, count, scores);
        kernels->scale(scores, cap, count, scores);
    }
}

/* Takes one line of scores into a softmax that is under way: scores become weights, the sum so far is scaled to the new maximum. */
static void take_scores(const Kernels *kernels, float *scores, size_t count, float *highest, float *sum, float *values, size_t size) {
    const float most = kernels->maximum(scores, count);
    if (most == -INFINITY) {
        memset(scores, 0, count * sizeof *scores);
        return;
    }
    if (most > *highest) {
        const float factor = *highest == -INFINITY ? 0.0f : expf(*highest - most);
        *sum *= factor;
        kernels->scale(values, factor, size, values);
        *highest = most;
    } else if (most != most) {
        *highest = most; /* NaN shall be seen in what comes out */
    }
    *sum += kernels->exponentials(scores, count, *highest);
}

/* The keys [begin, end) of one token's query heads that share a key head: sums, and what brings them to scale. */
static void attend_one(const PlanCall *call, const PlanStep *step, const Heads *h, const float *queries, const uint8_t *keys, const uint8_t *values,
                       size_t begin, size_t end, float *highest, float *sum, float *out, float *scores) {
    const Kernels *kernels = call->plan->kernels;
    for (size_t g = 0; g < h->group; g++) {
        highest[g] = -INFINITY;
        sum[g] = 0.0f;
    }
    memset(out, 0, h->group * h->size * sizeof *out);
    for (size_t key = begin; key < end; key += TILE) {
        const size_t count = end - key < TILE ? end - key : TILE;
        kernels->scores(queries, h->group, h->size, keys + key * h->entry_bytes, h->format, count, scores, TILE);
        for (size_t g = 0; g < h->group; g++) {
            soft_cap(kernels, step->real[1], scores + g * TILE, count);
            take_scores(kernels, scores + g * TILE, count, &highest[g], &sum[g], out + g * h->size, h->size);
        }
        kernels->weighted(scores, TILE, h->group, h->size, values + key * h->entry_bytes, h->format, count, out);
    }
}

/* What a part leaves: per query head the sums, the largest score and the sum of weights. */
static float *part_of(const PlanCall *call, const Heads *h, size_t row, size_t head, size_t part) {
    return call->plan->parts + ((row * h->heads + head) * call->parts + part) * (h->size + 2);
}

static void single_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Heads h = heads_of(call, step);
    const size_t part = item % call->parts, kv = item / call->parts % h.kv_heads, row = item / call->parts / h.kv_heads;
    const size_t window = (size_t)step->arg[ARG_WINDOW], length = plan_past(call, row) + 1;
    const size_t first = window > 0 && length > window ? length - window : 0;
    size_t begin = part * call->part_keys, end = begin + call->part_keys;
    begin = begin < first ? first : begin;
    end = end > length ? length : end;
    end = end < begin ? begin : end;
    const size_t at = row * h.row_bytes + kv * h.head_bytes;
    const float *queries = plan_row(call, step->in[0], false, row) + kv * h.group * h.size;
    float *scores = (float *)(void *)scratch, *sums = scores + h.group * TILE, *highest = sums + h.group * h.size, *sum = highest + h.group;
    attend_one(call, step, &h, queries, h.keys + at, h.values + at, begin, end, highest, sum, sums, scores);
    for (size_t g = 0; g < h.group; g++) {
        if (call->parts == 1) {
            call->plan->kernels->scale(sums + g * h.size, 1.0f / sum[g], h.size, plan_row(call, step->out[0], false, row) + (kv * h.group + g) * h.size);
        } else {
            float *to = part_of(call, &h, row, kv * h.group + g, part);
            memcpy(to, sums + g * h.size, h.size * sizeof *to);
            to[h.size] = highest[g];
            to[h.size + 1] = sum[g];
        }
    }
}

void attention_combine(const PlanCall *call, const PlanStep *step, size_t row) {
    if (call->tokens > 1 || call->parts == 1) {
        return;
    }
    const Heads h = heads_of(call, step);
    for (size_t head = 0; head < h.heads; head++) {
        const float *part = part_of(call, &h, row, head, 0);
        float *out = plan_row(call, step->out[0], false, row) + head * h.size;
        float highest = -INFINITY, sum = 0.0f, weights[MOST_PARTS];
        for (size_t i = 0; i < call->parts; i++) {
            const float most = part[i * (h.size + 2) + h.size];
            highest = most > highest || most != most ? most : highest;
        }
        for (size_t i = 0; i < call->parts; i++) {
            weights[i] = expf(part[i * (h.size + 2) + h.size] - highest);
            sum += weights[i] * part[i * (h.size + 2) + h.size + 1];
        }
        memset(out, 0, h.size * sizeof *out);
        for (size_t i = 0; i < call->parts; i++) {
            weights[i] /= sum;
        }
        for (size_t i = 0; i < call->parts; i++) {
            const float weight = weights[i];
            const float *from = part + i * (h.size + 2);
            for (size_t d = 0; d < h.size; d++) {
                out[d] += weight * from[d];
            }
        }
    }
}

/* One block of keys as panels of 16 keys, [panel][size][16]; one of values as lines of floats. */
static void load_block(const Kernels *kernels, const Heads *h, const uint8_t *keys, const uint8_t *values, size_t count, float *panels, float *lines) {
    const size_t size = padded(h->size);
    for (size_t key = 0; key < ATTENTION_KEYS; key++) {
        float *line = lines + key * size;
        float *panel = panels + key / PANEL * h->size * PANEL + key % PANEL;
        if (key >= count) {
            for (size_t d = 0; d < h->size; d++) {
                panel[d * PANEL] = 0.0f;
            }
            memset(line, 0, size * sizeof *line);
            continue;
        }
        const float *from = (const float *)(const void *)(keys + key * h->entry_bytes);
        if (h->format == CACHE_FLOAT16) { /* `line` is free until the value is read */
            kernels->to_float((const uint16_t *)(const void *)from, h->size, line);
            from = line;
        }
        for (size_t d = 0; d < h->size; d++) {
            panel[d * PANEL] = from[d];
        }
        if (h->format == CACHE_FLOAT16) {
            kernels->to_float((const uint16_t *)(const void *)(values + key * h->entry_bytes), h->size, line);
        } else {
            memcpy(line, values + key * h->entry_bytes, h->size * sizeof *line);
        }
        memset(line + h->size, 0, (size - h->size) * sizeof *line);
    }
}

/* Keys that the token at `position` may not see become −∞. A block's tokens see each other, before and behind. */
static void hide(const PlanCall *call, const PlanStep *step, size_t row, size_t position, size_t key, size_t count, float *scores) {
    const size_t window = (size_t)step->arg[ARG_WINDOW], past = plan_past(call, row);
    const int64_t *blocks = NULL;
    if (step->arg[ARG_BLOCKS] != 0 && call->plan->block_input >= 0) {
        blocks = (const int64_t *)(const void *)call->run->inputs[call->plan->block_input] + row * call->run->tokens;
    }
    for (size_t i = 0; i < count; i++) {
        const size_t at = key + i;
        const bool near = window == 0 || at + window > position;
        bool seen = at <= position && near;
        if (blocks != NULL && at >= past && blocks[position - past] > 0 && blocks[at - past] == blocks[position - past]) {
            seen = step->arg[ARG_BLOCKS] == 1 || near; /* 2: the window holds inside blocks, too */
        }
        if (!seen) {
            scores[i] = -INFINITY;
        }
    }
}

static void block_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Kernels *kernels = call->plan->kernels;
    const Heads h = heads_of(call, step);
    const size_t tokens = block_tokens(&h), blocks = (call->tokens + tokens - 1) / tokens, size = padded(h.size);
    const size_t kv = item / blocks % h.kv_heads, row = item / blocks / h.kv_heads;
    /* The last tokens see the most keys: they go first, so that no thread is left with a long item at the end. */
    const size_t first = (blocks - 1 - item % blocks) * tokens, count = call->tokens - first < tokens ? call->tokens - first : tokens;
    const size_t past = plan_past(call, row), rows = count * h.group;
    const bool mutual = step->arg[ARG_BLOCKS] != 0 && call->plan->block_input >= 0;
    const size_t window = (size_t)step->arg[ARG_WINDOW];
    const size_t begin = window > 0 && !mutual && past + first + 1 > window ? past + first + 1 - window : 0;
    const size_t end = mutual ? past + call->tokens : past + first + count;
    float *queries = (float *)(void *)scratch, *sums = queries + rows * h.size, *scores = sums + rows * size;
    float *panels = scores + rows * ATTENTION_KEYS, *lines = panels + ATTENTION_KEYS * size, *highest = lines + ATTENTION_KEYS * size, *sum = highest + rows;
    for (size_t t = 0; t < count; t++) {
        const float *from = plan_row(call, step->in[0], false, row * call->tokens + first + t) + kv * h.group * h.size;
        memcpy(queries + t * h.group * h.size, from, h.group * h.size * sizeof *from);
    }
    memset(sums, 0, rows * size * sizeof *sums);
    for (size_t i = 0; i < rows; i++) {
        highest[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    const size_t at = row * h.row_bytes + kv * h.head_bytes;
    for (size_t key = begin / ATTENTION_KEYS * ATTENTION_KEYS; key < end; key += ATTENTION_KEYS) {
        const size_t some = end - key < ATTENTION_KEYS ? end - key : ATTENTION_KEYS;
        load_block(kernels, &h, h.keys + at + key * h.entry_bytes, h.values + at + key * h.entry_bytes, some, panels, lines);
        for (size_t p = 0; p < ATTENTION_KEYS / PANEL; p++) {
            kernels->float32(panels + p * h.size * PANEL, PANEL, h.size, queries, h.size, rows, scores + p * PANEL, ATTENTION_KEYS, false);
        }
        for (size_t i = 0; i < rows; i++) {
            const size_t position = past + first + i / h.group;
            float *line = scores + i * ATTENTION_KEYS;
            soft_cap(kernels, step->real[1], line, some);
            if (mutual || key + some > position + 1 || (window > 0 && key + window <= position)) {
                hide(call, step, row, position, key, some, line);
            }
            take_scores(kernels, line, some, &highest[i], &sum[i], sums + i * size, size);
            memset(line + some, 0, (ATTENTION_KEYS - some) * sizeof *line);
        }
        for (size_t d = 0; d < size; d += PANEL) {
            kernels->float32(lines + d, size, ATTENTION_KEYS, scores, ATTENTION_KEYS, rows, sums + d, size, true);
        }
    }
    for (size_t i = 0; i < rows; i++) {
        float *out = plan_row(call, step->out[0], false, row * call->tokens + first + i / h.group) + (kv * h.group + i % h.group) * h.size;
        kernels->scale(sums + i * size, 1.0f / sum[i], h.size, out);
    }
}

void attention_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    if (call->tokens == 1) {
        single_work(call, step, item, scratch);
    } else {
        block_work(call, step, item, scratch);
    }
}
