/* Masks and biases of attention, key by key. */
#include "plan_sight.h"

#include <math.h>

/* The cells of the token at `position` that count, NULL where it sees them all. */
static const int64_t *cells_of(const Sight *sight, size_t position) {
    const int64_t *cells = sight->cells != NULL ? sight->cells + position * sight->cell_count : NULL;
    bool any = cells == NULL || !sight->blind_sees_all;
    for (size_t i = 0; !any && i < sight->cell_count; i++) {
        any = cells[i] != 0;
    }
    return any ? cells : NULL;
}

static bool named(const Sight *sight, const int64_t *cells, size_t at) {
    return (sight->mask == NULL || sight->mask[at] != 0) && (cells == NULL || cells[at / sight->cell_keys] != 0);
}

void sight_hide(const Sight *sight, size_t position, size_t key, size_t count, float *scores) {
    const int64_t *cells = cells_of(sight, position);
    for (size_t i = 0; i < count; i++) {
        const size_t at = key + i;
        bool seen = named(sight, cells, at);
        if (sight->causal) {
            const bool near = sight->window == 0 || at + sight->window > position;
            const int64_t *blocks = sight->blocks;
            seen = at <= position && near;
            if (blocks != NULL && at >= sight->past && blocks[position - sight->past] > 0 && blocks[at - sight->past] == blocks[position - sight->past]) {
                seen = sight->mutual == 1 || near;
            }
        }
        if (!seen) {
            scores[i] = -INFINITY;
        }
    }
}

bool sight_sees(const Sight *sight, size_t position, size_t count) {
    const int64_t *cells = cells_of(sight, position);
    bool any = false;
    for (size_t at = 0; !any && at < count; at++) {
        any = named(sight, cells, at);
    }
    return any;
}

void sight_bias(const Sight *sight, size_t head, size_t position, size_t key, size_t count, float factor, float *scores) {
    if (sight->bias == NULL || key > position) {
        return;
    }
    const float *line = sight->bias + head * sight->distances;
    const size_t distance = position - key, far = distance >= sight->distances ? distance - sight->distances + 1 : 0;
    const size_t end = distance + 1 < count ? distance + 1 : count; /* keys up to the token's own */
    size_t i = 0;
    for (; i < far && i < end; i++) {
        scores[i] += factor * line[0];
    }
    for (; i < end; i++) {
        scores[i] += factor * line[sight->distances - 1 - distance + i];
    }
}
