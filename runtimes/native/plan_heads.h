/* The heads of an attention and where a cache keeps them, for the steps that write it and read it. */
#ifndef VLM_PLAN_HEADS_H
#define VLM_PLAN_HEADS_H

#include "plan.h"

/* Of STEP_ROTARY and, up to ARG_SIZE and then from ARG_WINDOW on, of STEP_ATTENTION and STEP_COMBINE. */
enum { ARG_KEYS, ARG_VALUES, ARG_HEADS, ARG_KV_HEADS, ARG_SIZE, ARG_ROTARY, ARG_INTERLEAVED, ARG_ANGLES, ARG_WINDOW = 5, ARG_BLOCKS };

typedef struct {
    CacheFormat format;
    size_t heads, kv_heads, group, size;
    const uint8_t *keys, *values; /* of all rows */
    size_t row_bytes, head_bytes, entry_bytes;
} Heads;

Heads heads_of(const PlanCall *call, const PlanStep *step);

#endif
