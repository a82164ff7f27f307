/* Attention over the cache and over static keys: softmax(q · kᵀ) · v with the largest score and the sum carried along as keys are
 * read (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135), so that no more than a block of scores exists. */
#include "plan_heads.h"
#include "plan_sight.h"

#include <math.h>
#include <string.h>

#define QUERIES 192   /* rows of queries that share a block of keys: tokens times the query heads of one key head */
#define MOST_PARTS 8  /* of one token's keys, for threads to share */
#define LOG2_E 1.44269504088896341f
#define TILE 128      /* keys that one token's attention scores at a time */

static size_t number_bytes(CacheFormat format) { return format == CACHE_FLOAT32 ? 4 : format == CACHE_FLOAT16 ? 2 : 1; }

Heads heads_of(const PlanCall *call, const PlanStep *step) {
    const int32_t *a = step->arg;
    const PlanRun *run = call->run;
    const size_t entry = (size_t)a[ARG_SIZE] * number_bytes(step->cache), blocks = ((size_t)a[ARG_SIZE] + BLOCK - 1) / BLOCK;
    const bool codes = step->cache == CACHE_INT8;
    return (Heads){.format = step->cache,
                   .heads = (size_t)a[ARG_HEADS],
                   .kv_heads = (size_t)a[ARG_KV_HEADS],
                   .group = (size_t)(a[ARG_HEADS] / a[ARG_KV_HEADS]),
                   .size = (size_t)a[ARG_SIZE],
                   .keys = run->caches[a[ARG_KEYS]],
                   .values = run->caches[a[ARG_VALUES]],
                   .key_scales = codes ? (const uint16_t *)(const void *)run->caches[a[ARG_KEY_SCALES]] : NULL,
                   .value_scales = codes ? (const uint16_t *)(const void *)run->caches[a[ARG_VALUE_SCALES]] : NULL,
                   .row_bytes = run->cache_row_bytes[a[ARG_KEYS]],
                   .head_bytes = run->capacity * entry,
                   .entry_bytes = entry,
                   .row_scales = codes ? run->cache_row_bytes[a[ARG_KEY_SCALES]] / sizeof(uint16_t) : 0,
                   .head_scales = codes ? blocks * run->capacity : 0,
                   .capacity = run->capacity};
}

CacheEntries entries_of(const Heads *h, bool values, size_t row, size_t kv, size_t first) {
    const uint8_t *data = (values ? h->values : h->keys) + row * h->row_bytes + kv * h->head_bytes + first * h->entry_bytes;
    const uint16_t *scales = values ? h->value_scales : h->key_scales;
    return (CacheEntries){.format = h->format,
                          .data = data,
                          .scales = scales != NULL ? scales + row * h->row_scales + kv * h->head_scales + first : NULL,
                          .scale_stride = h->capacity};
}

/* Keys of each part of a token that sees `length` of them: its own length alone decides, so that neither the other rows nor the other
 * tokens of a call change what comes out. */
static size_t part_keys(size_t length) {
    const size_t part = (length + MOST_PARTS - 1) / MOST_PARTS;
    return (part + ATTENTION_KEYS - 1) / ATTENTION_KEYS * ATTENTION_KEYS;
}

static size_t parts_of(size_t length) { return (length + part_keys(length) - 1) / part_keys(length); }

/* Keys that token `row` of the call's sees. */
static size_t seen_by(const PlanCall *call, size_t row) { return plan_past(call, row / call->tokens) + row % call->tokens + 1; }

void attention_split(PlanCall *call) {
    call->parts = 1;
    for (size_t row = 0; plan_single(call) && row < call->rows; row++) {
        const size_t parts = parts_of(seen_by(call, row));
        call->parts = parts > call->parts ? parts : call->parts;
    }
}

static size_t block_tokens(const Heads *h) { return h->group < QUERIES ? QUERIES / h->group : 1; }

size_t attention_items(const PlanCall *call, const PlanStep *step) {
    const Heads h = heads_of(call, step);
    if (plan_single(call)) {
        return call->rows * h.kv_heads * call->parts;
    }
    const size_t tokens = block_tokens(&h);
    return call->run->rows * h.kv_heads * ((call->tokens + tokens - 1) / tokens);
}

size_t attention_scratch(const PlanStep *step) {
    const size_t size = (size_t)step->arg[ARG_SIZE], group = (size_t)(step->arg[ARG_HEADS] / step->arg[ARG_KV_HEADS]);
    const size_t block = attention_bytes(group < QUERIES ? QUERIES : group, size), single = group * (TILE + 2 * size + 2) * sizeof(float);
    return ((block > single ? block : single) + 63) / 64 * 64;
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

/* Asks for `count` entries: what the next kernel reads, while the one before it computes. */
static void ask(const Heads *h, const CacheEntries *entries, size_t count) {
    for (size_t at = 0; at < count * h->entry_bytes; at += 64) {
        __builtin_prefetch((const uint8_t *)entries->data + at, 0, 2);
    }
}

/* The keys [begin, end) of key head `kv` for the query heads of one token that share it: sums, and what brings them to scale. */
static void attend_one(const Kernels *kernels, const Heads *h, const Sight *sight, float cap, const float *queries, size_t position, size_t row, size_t kv,
                       size_t begin, size_t end, float *highest, float *sum, float *out, float *scores) {
    for (size_t g = 0; g < h->group; g++) {
        highest[g] = -INFINITY;
        sum[g] = 0.0f;
    }
    memset(out, 0, h->group * h->size * sizeof *out);
    for (size_t key = begin; key < end; key += TILE) {
        const size_t count = end - key < TILE ? end - key : TILE;
        const CacheEntries keys = entries_of(h, false, row, kv, key), values = entries_of(h, true, row, kv, key);
        ask(h, &values, count);
        kernels->scores(queries, h->group, h->size, &keys, count, scores, TILE);
        for (size_t g = 0; g < h->group; g++) {
            soft_cap(kernels, cap, scores + g * TILE, count);
            sight_bias(sight, g, position, key, count, 1.0f, scores + g * TILE);
            if (sight_hides(sight)) {
                sight_hide(sight, position, key, count, scores + g * TILE);
            }
            take_scores(kernels, scores + g * TILE, count, &highest[g], &sum[g], out + g * h->size, h->size);
        }
        const CacheEntries next = entries_of(h, false, row, kv, key + count); /* of this part or, as likely, of the next one */
        const size_t left = key + count < h->capacity ? h->capacity - key - count : 0;
        ask(h, &next, left < TILE ? left : TILE);
        kernels->weighted(scores, TILE, h->group, h->size, &values, count, out);
    }
}

/* `sight` with the biases of the query heads of a key head, where the step has some. */
static Sight with_bias(const PlanCall *call, const PlanStep *step, const Heads *h, size_t kv, Sight sight) {
    if (step->weight[0] >= 0) {
        const PanelMatrix *table = &call->plan->weights[step->weight[0]].matrix;
        sight.distances = table->width;
        sight.bias = (const float *)(const void *)table->data + kv * h->group * table->width;
    }
    return sight;
}

/* What a part leaves: per query head the sums, the largest score and the sum of weights. */
static float *part_of(const PlanCall *call, const Heads *h, size_t row, size_t head, size_t part) {
    return call->plan->parts + ((row * h->heads + head) * call->parts + part) * (h->size + 2);
}

static void single_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    const Heads h = heads_of(call, step);
    /* The tokens of a row follow each other: they read the same keys. */
    const size_t token = item % call->tokens, rest = item / call->tokens, part = rest % call->parts, kv = rest / call->parts % h.kv_heads;
    const size_t batch = rest / call->parts / h.kv_heads, row = batch * call->tokens + token;
    const size_t window = (size_t)step->arg[ARG_WINDOW], length = seen_by(call, row);
    const size_t first = window > 0 && length > window ? length - window : 0;
    size_t begin = part * part_keys(length), end = begin + part_keys(length);
    if (begin >= length) {
        return; /* another token has more parts */
    }
    begin = begin < first ? first : begin;
    end = end > length ? length : end;
    end = end < begin ? begin : end;
    const float *queries = plan_row(call, step->in[0], false, row) + kv * h.group * h.size;
    float *scores = (float *)(void *)scratch, *sums = scores + h.group * TILE, *highest = sums + h.group * h.size, *sum = highest + h.group;
    const Sight sight = with_bias(call, step, &h, kv, (Sight){0}); /* the range says what is seen */
    attend_one(call->plan->kernels, &h, &sight, step->real[1], queries, length - 1, batch, kv, begin, end, highest, sum, sums, scores);
    for (size_t g = 0; g < h.group; g++) {
        if (parts_of(length) == 1) {
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
    const size_t parts = plan_single(call) ? parts_of(seen_by(call, row)) : 1;
    if (parts == 1) {
        return;
    }
    const Heads h = heads_of(call, step);
    for (size_t head = 0; head < h.heads; head++) {
        const float *part = part_of(call, &h, row, head, 0);
        float *out = plan_row(call, step->out[0], false, row) + head * h.size;
        float highest = -INFINITY, sum = 0.0f, weights[MOST_PARTS];
        for (size_t i = 0; i < parts; i++) {
            const float most = part[i * (h.size + 2) + h.size];
            highest = most > highest || most != most ? most : highest;
        }
        for (size_t i = 0; i < parts; i++) {
            weights[i] = expf(part[i * (h.size + 2) + h.size] - highest);
            sum += weights[i] * part[i * (h.size + 2) + h.size + 1];
        }
        memset(out, 0, h.size * sizeof *out);
        for (size_t i = 0; i < parts; i++) {
            weights[i] /= sum;
        }
        for (size_t i = 0; i < parts; i++) {
            const float weight = weights[i];
            const float *from = part + i * (h.size + 2);
            for (size_t d = 0; d < h.size; d++) {
                out[d] += weight * from[d];
            }
        }
    }
}

/* Which of a row's tokens, and which key head, an item is for. */
typedef struct {
    size_t row, kv, first, count;
} Item;

static Item item_of(const PlanCall *call, const Heads *h, size_t item) {
    const size_t tokens = block_tokens(h), blocks = (call->tokens + tokens - 1) / tokens;
    /* The last tokens see the most keys: they go first, so that no thread is left with a long item at the end. */
    const size_t first = (blocks - 1 - item % blocks) * tokens;
    return (Item){.row = item / blocks / h->kv_heads,
                  .kv = item / blocks % h->kv_heads,
                  .first = first,
                  .count = call->tokens - first < tokens ? call->tokens - first : tokens};
}

/* The row of the buffers that an item's token number `t` is in. */
static size_t row_of(const PlanCall *call, const PlanStep *step, const Item *item, size_t t) {
    return step->last && !call->run->each ? item->row : item->row * call->tokens + item->first + t;
}

/* What attention over several tokens may see beyond what is causal, for HeadAttention. */
typedef struct {
    Sight sight;
    size_t position, group;
} Rule;

static void hide_row(const void *context, size_t row, size_t key, size_t count, float *scores) {
    const Rule *rule = context;
    const size_t position = rule->position + row / rule->group;
    sight_bias(&rule->sight, row % rule->group, position, key, count, LOG2_E, scores); /* of powers of two, in there */
    sight_hide(&rule->sight, position, key, count, scores);
}

/* An item of several tokens. */
static HeadAttention item_attention(const PlanCall *call, const PlanStep *step, const Heads *h, const Item *item, uint8_t *scratch) {
    const size_t row = row_of(call, step, item, 0), column = item->kv * h->group * h->size;
    const CacheEntries keys = entries_of(h, false, item->row, item->kv, 0), values = entries_of(h, true, item->row, item->kv, 0);
    return (HeadAttention){.size = h->size,
                           .group = h->group,
                           .rows = item->count * h->group,
                           .queries = plan_row(call, step->in[0], step->last != 0, row) + column,
                           .query_stride = plan_stride(call, step->in[0]),
                           .keys = keys.data,
                           .values = values.data,
                           .key_scales = keys.scales,
                           .value_scales = values.scales,
                           .scale_stride = h->capacity,
                           .key_stride = h->size,
                           .value_stride = h->size,
                           .format = h->format,
                           .scale = 1.0f,
                           .cap = step->real[1],
                           .out = plan_row(call, step->out[0], step->last != 0, row) + column,
                           .out_stride = plan_stride(call, step->out[0]),
                           .scratch = scratch};
}

static void block_work(const PlanCall *call, const PlanStep *step, size_t index, uint8_t *scratch) {
    const Heads h = heads_of(call, step);
    const Item item = item_of(call, &h, index);
    const size_t past = plan_past(call, item.row), window = (size_t)step->arg[ARG_WINDOW], first = past + item.first;
    const Sight sight = {.causal = true, .window = window, .past = past, .mutual = step->arg[ARG_BLOCKS]};
    Rule rule = {.sight = with_bias(call, step, &h, item.kv, sight), .position = first, .group = h.group};
    HeadAttention a = item_attention(call, step, &h, &item, scratch);
    /* Entries of half precision or less are those of weights in 4 or 8 bits, whose own error is some ten times that of bfloat16. */
    a.half = h.format != CACHE_FLOAT32;
    if (rule.sight.mutual != 0 && call->plan->block_input >= 0) {
        rule.sight.blocks = (const int64_t *)(const void *)call->run->inputs[call->plan->block_input] + item.row * call->run->tokens + call->first;
        a.hide = hide_row;
        a.context = &rule;
        a.end = past + call->tokens;
    } else {
        a.causal = true;
        a.position = first;
        a.window = window;
        /* A block begins where it would for any other item. */
        a.begin = window > 0 && first + 1 > window ? (first + 1 - window) / FLASH_KEYS * FLASH_KEYS : 0;
        a.end = first + item.count;
        a.hide = rule.sight.bias != NULL ? hide_row : NULL;
        a.context = &rule;
    }
    call->plan->kernels->attention(&a);
}

void attention_work(const PlanCall *call, const PlanStep *step, size_t item, uint8_t *scratch) {
    if (plan_single(call)) {
        single_work(call, step, item, scratch);
    } else {
        block_work(call, step, item, scratch);
    }
}

/* Static keys and values [rows][kv heads][entries][size] of float32; a mask [rows][entries] of int64, and one [rows][tokens][images (· tiles)]
 * of what each token sees of each image, entries / images entries of one after another. */
enum { ARG_MASK = 5, ARG_CELLS, ARG_BLIND };

static Heads cross_heads(const PlanCall *call, const PlanStep *step) {
    const int32_t *a = step->arg;
    const size_t entry = (size_t)a[ARG_SIZE] * sizeof(float), entries = call->run->input_sizes[a[ARG_KEYS]];
    return (Heads){.format = CACHE_FLOAT32,
                   .heads = (size_t)a[ARG_HEADS],
                   .kv_heads = (size_t)a[ARG_KV_HEADS],
                   .group = (size_t)(a[ARG_HEADS] / a[ARG_KV_HEADS]),
                   .size = (size_t)a[ARG_SIZE],
                   .keys = call->run->inputs[a[ARG_KEYS]],
                   .values = call->run->inputs[a[ARG_VALUES]],
                   .row_bytes = (size_t)a[ARG_KV_HEADS] * entries * entry,
                   .head_bytes = entries * entry,
                   .entry_bytes = entry};
}

size_t cross_items(const PlanCall *call, const PlanStep *step) {
    const Heads h = cross_heads(call, step);
    const size_t tokens = call->run->each ? 1 : block_tokens(&h);
    return call->run->rows * h.kv_heads * (step->last && !call->run->each ? 1 : (call->tokens + tokens - 1) / tokens);
}

void cross_work(const PlanCall *call, const PlanStep *step, size_t index, uint8_t *scratch) {
    const Heads h = cross_heads(call, step);
    const bool single = step->last || plan_single(call);
    const size_t tokens = call->run->each ? call->tokens : 1, each = index / h.kv_heads; /* of a row, and which one of all */
    const Item item = single ? (Item){.row = each / tokens, .kv = index % h.kv_heads, .first = each % tokens, .count = 1} : item_of(call, &h, index);
    const size_t entries = call->run->input_sizes[step->arg[ARG_KEYS]];
    Sight sight = {0};
    if (step->arg[ARG_MASK] >= 0) {
        sight.mask = (const int64_t *)(const void *)call->run->inputs[step->arg[ARG_MASK]] + item.row * entries;
    }
    if (step->arg[ARG_CELLS] >= 0 && entries > 0) {
        const size_t count = call->run->input_sizes[step->arg[ARG_CELLS]], token = plan_token(call, step, row_of(call, step, &item, 0));
        sight.cells = (const int64_t *)(const void *)call->run->inputs[step->arg[ARG_CELLS]] + token * count;
        sight.cell_count = count;
        sight.cell_keys = entries / count;
        sight.blind_sees_all = step->arg[ARG_BLIND] != 0;
    }
    HeadAttention a = item_attention(call, step, &h, &item, scratch);
    if (!single) {
        const Rule rule = {.sight = sight, .group = h.group};
        a.scale = step->real[0];
        a.end = entries;
        a.hide = sight_hides(&sight) ? hide_row : NULL;
        a.context = &rule;
        call->plan->kernels->attention(&a);
        for (size_t t = 0; t < item.count; t++) {
            if (!sight_sees(&sight, t, entries)) {
                memset(a.out + t * a.out_stride, 0, h.group * h.size * sizeof *a.out);
            }
        }
        return;
    }
    const Kernels *kernels = call->plan->kernels;
    float *queries = (float *)(void *)scratch, *scores = queries + h.group * h.size, *sums = scores + h.group * TILE;
    float *highest = sums + h.group * h.size, *sum = highest + h.group;
    kernels->scale(a.queries, step->real[0], h.group * h.size, queries);
    attend_one(kernels, &h, &sight, step->real[1], queries, 0, item.row, item.kv, 0, entries, highest, sum, sums, scores);
    for (size_t g = 0; g < h.group; g++) {
        kernels->scale(sums + g * h.size, sum[g] == 0.0f ? 0.0f : 1.0f / sum[g], h.size, a.out + g * h.size); /* 0: nothing was seen */
    }
}
