/* Choosing the next token on the device: what runtimes/native/sampling.c computes, in its order, with its random numbers.
 *
 * Three kernels: controls (rules, temperature, largest score, top-k threshold), weights (exponentials, by many blocks), choose. Sums
 * are taken in a fixed order, so that a seed gives the same tokens every time; against the C sampler only the last bits of sums may
 * differ, which decides nothing unless a draw falls within 1e-15 of a boundary. Log probabilities of further tokens are the host's. */
#include "decode_layout.h"

#define NOT_SURVIVING -1.0
#define NEVER_REACHED -1e300
#define NEGLIGIBLE -50.0 /* e^-50 × any vocabulary is below half a unit in the last place of a sum that contains 1 */

/* A rule list: count, then its tokens. */
typedef struct {
    const i32 *tokens;
    i32 count;
} List;

DEVICE List take(const i32 **rules) {
    const List list = {*rules + 1, **rules};
    *rules += 1 + list.count;
    return list;
}

/* Whether a row takes part in this step's sampling. */
DEVICE bool samples(const Step *s, const Row *row) { return row->active && row->pending < 0 && !ADDRESS(Control, s->control)->halted; }

/* An order-preserving map of floats (no NaN) to unsigned integers; −0 and +0 are equal, as they are for the C sampler. */
DEVICE u32 ordered(float value) {
    const u32 bits = float_bits(value == 0.0f ? 0.0f : value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Largest value, the first place that has it, and whether there is a NaN. Every thread of the block gets the result. */
DEVICE float first_largest(const float *values, i32 count, i32 *place, bool *nan) {
    SHARED float best[MAX_THREADS];
    SHARED i32 places[MAX_THREADS], unordered;
    float largest = negative_infinity();
    i32 found = count;
    bool bad = false;
    if (THREAD == 0) {
        unordered = 0;
    }
    __syncthreads();
    for (i32 i = (i32)THREAD; i < count; i += (i32)THREADS) {
        const float value = values[i];
        bad |= value != value;
        if (value > largest) {
            largest = value;
            found = i;
        }
    }
    best[THREAD] = largest;
    places[THREAD] = found;
    if (bad) {
        unordered = 1;
    }
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (THREAD < half) {
            const u32 other = THREAD + half;
            if (best[other] > best[THREAD] || (best[other] == best[THREAD] && places[other] < places[THREAD])) {
                best[THREAD] = best[other];
                places[THREAD] = places[other];
            }
        }
    }
    __syncthreads();
    *place = places[0] < count ? places[0] : 0;
    *nan = unordered != 0;
    largest = best[0];
    __syncthreads(); /* the shared memory may be used again */
    return largest;
}

/* The sum over all threads, in their order. Every thread gets it. */
DEVICE double block_sum(double value) {
    SHARED double sums[MAX_THREADS];
    sums[THREAD] = value;
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (THREAD < half) {
            sums[THREAD] += sums[THREAD + half];
        }
    }
    __syncthreads();
    const double total = sums[0];
    __syncthreads();
    return total;
}

DEVICE void forbid(float *scores, i32 vocab, List list) {
    for (i32 i = (i32)THREAD; i < list.count; i += (i32)THREADS) {
        if (list.tokens[i] >= 0 && list.tokens[i] < vocab) {
            put(scores + list.tokens[i], negative_infinity());
        }
    }
    __syncthreads();
}

/* Whether the row's tokens so far end with these. */
DEVICE bool ends_with(const Row *row, const i32 *tokens, i64 count) {
    if (count > row->tokens) {
        return false;
    }
    const i32 *last = ADDRESS(i32, row->history) + row->tokens - count;
    for (i64 i = 0; i < count; i++) {
        if (last[i] != tokens[i]) {
            return false;
        }
    }
    return true;
}

DEVICE float as_float(i32 bits) {
    union {
        i32 bits;
        float value;
    } both;
    both.bits = bits;
    return both.value;
}

/* Biases of one token are added in the order of the rules, as the C sampler does; then what −∞ is added to is forbidden. */
DEVICE void add_biases(const Row *row, const i32 *rules, float *scores, i32 vocab) {
    for (i32 pass = 0; pass < 2; pass++) {
        const i32 *rule = rules;
        for (i32 i = 0; i < row->bias_count; i++) {
            const float bias = as_float(*rule++);
            const List sequence = take(&rule);
            const bool always = bias == negative_infinity();
            if (always != (pass == 1) || (always ? i % (i32)THREADS != (i32)THREAD : THREAD != 0)) {
                continue;
            }
            const i32 token = sequence.tokens[sequence.count - 1];
            if (token >= 0 && token < vocab && ends_with(row, sequence.tokens, sequence.count - 1)) {
                if (always) {
                    put(scores + token, get(scores + token) + bias);
                } else {
                    scores[token] += bias;
                }
            }
        }
        __syncthreads();
    }
}

DEVICE void forbid_ngrams(const Row *row, float *scores, i32 vocab) {
    const i32 *history = ADDRESS(i32, row->history);
    const i64 before = row->ngram - 1;
    for (i64 start = THREAD; start + before < row->tokens; start += THREADS) {
        const i32 token = history[start + before];
        if (token >= 0 && token < vocab && ends_with(row, history + start, before)) {
            put(scores + token, negative_infinity());
        }
    }
    __syncthreads();
}

/* The rules' masks, after the repetition penalty, in the order of constraints.c. */
DEVICE void mask(const Row *row, const i32 *rules, float *scores, i32 vocab) {
    const List eos = take(&rules), suppressed = take(&rules);
    const i32 *forced = rules;
    if (row->ngram > 0) {
        forbid_ngrams(row, scores, vocab);
    }
    if (row->tokens < row->min_length) {
        forbid(scores, vocab, eos);
    }
    for (i32 i = 0; i < row->begin_count; i++) {
        forced++;
        take(&forced);
    }
    for (i32 i = 0; i < row->forced_count; i++) {
        const i64 length = *forced++;
        const List list = take(&forced);
        if (length == row->tokens) {
            for (i32 token = (i32)THREAD; token < vocab; token += (i32)THREADS) {
                put(scores + token, negative_infinity());
            }
            __syncthreads();
            for (i32 at = (i32)THREAD; at < list.count; at += (i32)THREADS) {
                if (list.tokens[at] >= 0 && list.tokens[at] < vocab) {
                    scores[list.tokens[at]] = 0.0f;
                }
            }
            __syncthreads();
        }
    }
    forbid(scores, vocab, suppressed);
    for (i32 i = 0; i < row->begin_count; i++) {
        const i64 length = *rules++;
        const List list = take(&rules);
        if (length == row->tokens) {
            forbid(scores, vocab, list);
        }
    }
}

/* Biases, penalty and masks, onto a copy of the logits. */
DEVICE void control(const Row *row, const float *logits, float *scores, i32 vocab) {
    const i32 *rules = ADDRESS(const i32, row->rules), *biases = rules;
    for (i32 i = (i32)THREAD; i < vocab; i += (i32)THREADS) {
        scores[i] = logits[i];
    }
    __syncthreads();
    if (row->constrained) {
        take(&biases);
        take(&biases);
        for (i32 i = 0; i < row->begin_count + row->forced_count; i++) {
            biases++;
            take(&biases);
        }
        add_biases(row, biases, scores, vocab);
    }
    for (i32 i = (i32)THREAD; i < row->seen_count; i += (i32)THREADS) {
        float *score = &scores[ADDRESS(i32, row->seen_list)[i]];
        *score = *score < 0.0f ? *score * row->penalty : *score / row->penalty;
    }
    __syncthreads();
    if (row->constrained) {
        mask(row, rules, scores, vocab);
    }
}

/* The k-th largest score: the digits of its ordered bits, eight at a time from above. 0 < wanted < count. */
DEVICE u32 kth_largest(const float *scores, i32 count, i64 wanted) {
    SHARED u32 histogram[256], digit;
    SHARED i64 left;
    u32 prefix = 0;
    if (THREAD == 0) {
        left = wanted;
    }
    for (i32 shift = 24; shift >= 0; shift -= 8) {
        const u32 above = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
        for (u32 i = THREAD; i < 256; i += THREADS) {
            histogram[i] = 0;
        }
        __syncthreads();
        for (i32 i = (i32)THREAD; i < count; i += (i32)THREADS) {
            const u32 key = ordered(scores[i]);
            if ((key & above) == prefix) {
                count_up(&histogram[key >> shift & 255]);
            }
        }
        __syncthreads();
        if (THREAD == 0) {
            u32 at = 255;
            while (at > 0 && histogram[at] < left) {
                left -= histogram[at--];
            }
            digit = at;
        }
        __syncthreads();
        prefix |= digit << shift;
        __syncthreads();
    }
    return prefix;
}

DEVICE float from_ordered(u32 key) { return as_float((i32)(key & 0x80000000u ? key & 0x7fffffffu : ~key)); }

/* One block per row. */
KERNEL void vlm_controls(const Step *s) {
    Row *row = ADDRESS(Row, s->rows) + blockIdx.y;
    if (!samples(s, row)) {
        return;
    }
    const float *logits = ADDRESS(float, s->logits) + blockIdx.y * s->stride, *values = logits;
    float *scores = ADDRESS(float, s->scores) + blockIdx.y * s->stride;
    i32 best;
    bool nan;
    float raw = 0.0f;
    if (row->logprobs >= 0) {
        i32 place;
        raw = first_largest(logits, s->vocab, &place, &nan);
    }
    if (row->seen != 0 || row->constrained) {
        control(row, logits, scores, s->vocab);
        values = scores;
    }
    float largest = first_largest(values, s->vocab, &best, &nan);
    i32 status = nan ? SAMPLE_NAN : largest == -negative_infinity() ? SAMPLE_INFINITE : largest != negative_infinity() ? SAMPLE_OK
                 : row->constrained ? SAMPLE_ALL_FORBIDDEN : SAMPLE_ALL_MASKED;
    float threshold = negative_infinity();
    if (status == SAMPLE_OK && row->temperature > 0.0) {
        const float temperature = (float)row->temperature;
        for (i32 i = (i32)THREAD; i < s->vocab; i += (i32)THREADS) {
            scores[i] = values[i] / temperature;
        }
        __syncthreads();
        largest = scores[best];
        if (largest == -negative_infinity() || largest == negative_infinity()) {
            status = SAMPLE_INFINITE;
        } else if (row->top_k > 0 && row->top_k < s->vocab) {
            threshold = from_ordered(kth_largest(scores, s->vocab, row->top_k));
        }
    }
    __syncthreads();
    if (THREAD == 0) {
        row->status = status;
        row->best = best;
        row->largest = largest;
        row->threshold = threshold;
        row->raw_largest = raw;
    }
}

/* Blocks: s->blocks × rows, each a contiguous part of the vocabulary. */
KERNEL void vlm_weights(const Step *s) {
    const Row *row = ADDRESS(Row, s->rows) + blockIdx.y;
    if (!samples(s, row) || row->status != SAMPLE_OK) {
        return;
    }
    const i32 share = (s->vocab + s->blocks - 1) / s->blocks, begin = (i32)blockIdx.x * share;
    const i32 end = begin + share < s->vocab ? begin + share : s->vocab;
    if (row->temperature > 0.0) {
        const float *scores = ADDRESS(float, s->scores) + blockIdx.y * s->stride;
        double *weights = ADDRESS(double, s->weights) + blockIdx.y * s->stride;
        for (i32 i = begin + (i32)THREAD; i < end; i += (i32)THREADS) {
            const double below = (double)scores[i] - row->largest;
            const bool survives = scores[i] >= row->threshold && scores[i] > negative_infinity();
            weights[i] = !survives ? NOT_SURVIVING : below < NEGLIGIBLE ? 0.0 : exp(below);
        }
    }
    if (row->logprobs >= 0) {
        const float *logits = ADDRESS(float, s->logits) + blockIdx.y * s->stride;
        double sum = 0.0;
        for (i32 i = begin + (i32)THREAD; i < end; i += (i32)THREADS) {
            sum += exp((double)logits[i] - row->raw_largest);
        }
        sum = block_sum(sum);
        if (THREAD == 0) {
            ADDRESS(double, s->partials)[blockIdx.y * s->blocks + blockIdx.x] = sum;
        }
    }
}
