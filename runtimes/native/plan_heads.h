/* The heads of an attention and where a cache keeps them, for the steps that write it and read it. */
#ifndef VLM_PLAN_HEADS_H
#define VLM_PLAN_HEADS_H

#include "plan.h"

/* Of STEP_ROTARY and, up to ARG_SIZE and then from ARG_WINDOW on, of STEP_ATTENTION and STEP_COMBINE. Of caches in 8 bits also those of
 * their scales. */
enum { ARG_KEYS, ARG_VALUES, ARG_HEADS, ARG_KV_HEADS, ARG_SIZE, ARG_ROTARY, ARG_INTERLEAVED, ARG_ANGLES, ARG_WINDOW = 5, ARG_BLOCKS,
       ARG_KEY_SCALES = 8, ARG_VALUE_SCALES };

typedef struct {
    CacheFormat format;
    size_t heads, kv_heads, group, size;
    const uint8_t *keys, *values;               /* of all rows, [kv heads][entries][size] each */
    const uint16_t *key_scales, *value_scales;  /* of CACHE_INT8: [kv heads][blocks of a head][entries] of half precision */
    size_t row_bytes, head_bytes, entry_bytes;
    size_t row_scales, head_scales, capacity;   /* scales of a row and of a key head; entries that there is room for */
} Heads;

Heads heads_of(const PlanCall *call, const PlanStep *step);

/* The keys or values of one key head of a row, from entry `first` on. */
CacheEntries entries_of(const Heads *h, bool values, size_t row, size_t kv, size_t first);

#endif
