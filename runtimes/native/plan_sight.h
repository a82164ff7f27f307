/* Which keys a token may see, and what is added to their scores. */
#ifndef VLM_PLAN_SIGHT_H
#define VLM_PLAN_SIGHT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* All keys may be seen, or those that `mask` [keys] and `cells` name, or, causally, those up to a token's own and what shares its block. */
typedef struct {
    bool causal;
    size_t window, past;
    int mutual;            /* 1: tokens of a block see each other; 2: within the window */
    const int64_t *blocks; /* of the row's new tokens, or NULL */
    const int64_t *mask;   /* or NULL */
    const int64_t *cells;  /* [tokens][cell_count], or NULL: whether a token sees the keys of each image (or tile) */
    size_t cell_count, cell_keys;
    bool blind_sees_all;   /* a token whose cells are all 0 sees what `mask` names; otherwise it sees nothing */
    const float *bias;     /* of each query head of a key head [distances], the farthest first; or NULL */
    size_t distances;
} Sight;

/* Whether there is anything to hide, causality aside. */
static inline bool sight_hides(const Sight *s) { return s->mask != NULL || s->blocks != NULL || s->cells != NULL; }

/* Keys that the token at `position` may not see become −∞. */
void sight_hide(const Sight *sight, size_t position, size_t key, size_t count, float *scores);

/* Whether the token at `position` sees any of `count` keys, where nothing is causal. */
bool sight_sees(const Sight *sight, size_t position, size_t count);

/* Adds `factor` times what query head `head` of a group adds for the distance from `position` back to each key. */
void sight_bias(const Sight *sight, size_t head, size_t position, size_t key, size_t count, float factor, float *scores);

#endif
