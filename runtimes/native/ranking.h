/* The order of candidates by score, and the two selections that sampling needs from it. */
#ifndef VLM_RANKING_H
#define VLM_RANKING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    float score;
    int32_t token;
} Candidate;

typedef struct {
    Candidate candidate;
    double weight;
} Ranked;

/* Whether a comes before b: higher score first, lower token among equals. */
static inline bool ranked_before(Candidate a, Candidate b) { return a.score != b.score ? a.score > b.score : a.token < b.token; }
/* The same for qsort. */
int by_rank(const void *left, const void *right);

/* The `wanted` first candidates of `scores`, as a heap with the last of them on top. Returns how many there are. */
size_t select_largest(const float *scores, size_t count, size_t wanted, Candidate *heap);

/* The last candidate of the shortest head of the ranking whose weights reach `wanted`; a quickselect by weight, which reorders `items`
 * but need not sort them. `count` > 0 and `wanted` > 0. */
Candidate nucleus_end(Ranked *items, size_t count, double wanted);

#endif
