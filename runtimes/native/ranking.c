#include "ranking.h"

#include <math.h>

/* Restores a binary heap whose top is the candidate that comes last. */
static void sift_down(Candidate *heap, size_t count, size_t at) {
    const Candidate moved = heap[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= count) {
            break;
        }
        if (child + 1 < count && ranked_before(heap[child], heap[child + 1])) {
            child++;
        }
        if (ranked_before(heap[child], moved)) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moved;
}

static void make_heap(Candidate *heap, size_t count) {
    for (size_t i = count / 2; i-- > 0;) {
        sift_down(heap, count, i);
    }
}

size_t select_largest(const float *scores, size_t count, size_t wanted, Candidate *heap) {
    wanted = wanted < count ? wanted : count;
    for (size_t i = 0; i < wanted; i++) {
        heap[i] = (Candidate){scores[i], (int32_t)i};
    }
    make_heap(heap, wanted);
    float threshold = wanted > 0 ? heap[0].score : INFINITY;
    for (size_t i = wanted; i < count; i++) {
        if (scores[i] > threshold) {
            heap[0] = (Candidate){scores[i], (int32_t)i};
            sift_down(heap, wanted, 0);
            threshold = heap[0].score;
        }
    }
    return wanted;
}

int by_rank(const void *left, const void *right) {
    const Candidate *a = left, *b = right;
    return ranked_before(*a, *b) ? -1 : ranked_before(*b, *a) ? 1 : 0;
}

static void swap(Ranked *items, size_t a, size_t b) {
    const Ranked kept = items[a];
    items[a] = items[b];
    items[b] = kept;
}

static size_t middle_of_three(const Ranked *items, size_t a, size_t b, size_t c) {
    const bool ab = ranked_before(items[a].candidate, items[b].candidate), bc = ranked_before(items[b].candidate, items[c].candidate);
    const bool ac = ranked_before(items[a].candidate, items[c].candidate);
    return ab == bc ? b : ab == ac ? c : a;
}

Candidate nucleus_end(Ranked *items, size_t count, double wanted) {
    size_t low = 0, high = count;
    double above = 0.0; /* weight of everything ranked before items[low] */
    Candidate last = items[0].candidate;
    while (low < high) {
        swap(items, middle_of_three(items, low, low + (high - low) / 2, high - 1), high - 1);
        const Ranked pivot = items[high - 1];
        size_t place = low;
        double ahead = 0.0;
        for (size_t i = low; i + 1 < high; i++) {
            if (ranked_before(items[i].candidate, pivot.candidate)) {
                ahead += items[i].weight;
                swap(items, i, place++);
            }
        }
        swap(items, place, high - 1);
        if (place > low && above + ahead >= wanted) {
            high = place;
            continue;
        }
        last = pivot.candidate;
        above += ahead + pivot.weight;
        if (above >= wanted) {
            break;
        }
        low = place + 1;
    }
    return last;
}
