#include "sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#define LANES 16
#define BLOCK 1024

/* Where the loader can choose between versions of a function, one for wider registers. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define VECTOR_CLONES
#endif

const char *sampling_params_error(const SamplingParams *p) {
    /* Written so that a NaN fails. */
    if (!(p->temperature >= 0.0 && p->temperature < INFINITY)) {
        return "temperature must be 0 (greedy) or a positive number";
    }
    if (p->top_k < 0) {
        return "top_k must be 0 (off) or positive";
    }
    if (!(p->top_p > 0.0 && p->top_p <= 1.0)) {
        return "top_p must be above 0 and at most 1 (off)";
    }
    if (!(p->min_p >= 0.0 && p->min_p <= 1.0)) {
        return "min_p must be between 0 (off) and 1";
    }
    if (!(p->repetition_penalty > 0.0 && p->repetition_penalty < INFINITY)) {
        return "repetition_penalty must be a positive number (1: off)";
    }
    if (p->logprobs < -1) {
        return "logprobs must be -1 (none), 0 or positive";
    }
    return NULL;
}

const char *sample_status_text(SampleStatus status) {
    switch (status) {
    case SAMPLE_NAN:
        return "NaN";
    case SAMPLE_INFINITE:
        return "infinity";
    case SAMPLE_ALL_MASKED:
        return "only minus infinity";
    case SAMPLE_ALL_FORBIDDEN:
        return "no token that the generation options (forced, suppressed, bad words, n-grams, shortest length) allow";
    case SAMPLE_NO_MEMORY:
        return "more tokens than there is memory for";
    default:
        return "valid";
    }
}

int sampler_init(Sampler *s, const SamplingParams *params, Constraints *constraints, size_t vocab) {
    memset(s, 0, sizeof *s);
    s->params = *params;
    s->vocab = vocab;
    if (constraints != NULL) {
        s->constraints = *constraints;
        memset(constraints, 0, sizeof *constraints);
        s->constrained = constraints_any(&s->constraints);
    }
    const bool penalised = params->repetition_penalty != 1.0, drawn = params->temperature > 0.0;
    bool ok = true;
    if (penalised) {
        s->seen = calloc(vocab, sizeof *s->seen);
        s->seen_list = malloc(vocab * sizeof *s->seen_list);
        ok = s->seen != NULL && s->seen_list != NULL;
    }
    if (ok && (penalised || drawn || s->constrained)) {
        s->scores = malloc(vocab * sizeof *s->scores);
        ok = s->scores != NULL;
    }
    if (ok && (drawn || params->logprobs > 0)) {
        s->candidates = malloc(vocab * sizeof *s->candidates);
        ok = s->candidates != NULL;
    }
    if (ok && drawn) {
        s->weights = malloc(vocab * sizeof *s->weights);
        ok = s->weights != NULL;
    }
    if (ok && drawn && params->top_p < 1.0) {
        s->ranked = malloc(vocab * sizeof *s->ranked);
        ok = s->ranked != NULL;
    }
    if (!ok) {
        sampler_free(s);
        return -1;
    }
    return 0;
}

void sampler_free(Sampler *s) {
    constraints_free(&s->constraints);
    free(s->seen);
    free(s->seen_list);
    free(s->scores);
    free(s->candidates);
    free(s->weights);
    free(s->ranked);
    memset(s, 0, sizeof *s);
}

bool sampler_takes_largest(const Sampler *s) {
    return s->params.temperature == 0.0 && s->params.logprobs < 0 && s->seen == NULL && !s->constrained;
}

void sampler_accept(Sampler *s, int64_t token) {
    if (s->constrained) {
        constraints_accept(&s->constraints, token);
    }
    if (s->seen != NULL && token >= 0 && (uint64_t)token < s->vocab && !s->seen[token]) {
        s->seen[token] = 1;
        s->seen_list[s->seen_count++] = (int32_t)token;
    }
}

/* The largest of `count` values (a multiple of LANES), −∞ for none; sets *nan when there is one. Independent lanes let the compiler use
 * packed maximum without being allowed to reorder floating point. */
VECTOR_CLONES static float block_largest(const float *values, size_t count, int32_t *nan) {
    float best[LANES];
    int32_t unordered[LANES] = {0};
    for (size_t lane = 0; lane < LANES; lane++) {
        best[lane] = -INFINITY;
    }
    for (size_t i = 0; i < count; i += LANES) {
        for (size_t lane = 0; lane < LANES; lane++) {
            const float value = values[i + lane];
            best[lane] = value > best[lane] ? value : best[lane];
            unordered[lane] |= value != value;
        }
    }
    float largest = -INFINITY;
    for (size_t lane = 0; lane < LANES; lane++) {
        largest = best[lane] > largest ? best[lane] : largest;
        *nan |= unordered[lane];
    }
    return largest;
}

size_t first_largest(const float *values, size_t count, SampleStatus *status) {
    const size_t whole = count / LANES * LANES;
    float largest = -INFINITY;
    int32_t nan = 0;
    size_t found = 0; /* where the block begins that first held the largest value */
    for (size_t i = 0; i < whole; i += BLOCK) {
        const size_t size = whole - i < BLOCK ? whole - i : BLOCK;
        const float best = block_largest(values + i, size, &nan);
        if (best > largest) {
            largest = best;
            found = i;
        }
    }
    for (size_t i = whole; i < count; i++) {
        nan |= values[i] != values[i];
        if (values[i] > largest) {
            largest = values[i];
            found = i;
        }
    }
    *status = nan ? SAMPLE_NAN : largest == INFINITY ? SAMPLE_INFINITE : largest == -INFINITY ? SAMPLE_ALL_MASKED : SAMPLE_OK;
    while (found < count && values[found] != largest) {
        found++;
    }
    return found < count ? found : 0;
}

static void raw_logprobs(Sampler *s, const float *logits, TokenLogprob *chosen, TokenLogprob *top) {
    SampleStatus status;
    const double largest = logits[first_largest(logits, s->vocab, &status)];
    double total = 0.0;
    for (size_t i = 0; i < s->vocab; i++) {
        total += exp((double)logits[i] - largest);
    }
    const double normaliser = largest + log(total);
    chosen->logprob = logits[chosen->token] - normaliser;
    if (s->params.logprobs > 0) {
        const size_t count = select_largest(logits, s->vocab, (size_t)s->params.logprobs, s->candidates);
        qsort(s->candidates, count, sizeof *s->candidates, by_rank);
        for (size_t i = 0; i < count; i++) {
            top[i] = (TokenLogprob){s->candidates[i].token, s->candidates[i].score - normaliser};
        }
    }
}

/* CTRL's penalty (Keskar et al. 2019) as transformers applies it (once per distinct token, away from zero for negative logits), between
 * biases and masks. */
static const float *controlled(Sampler *s, const float *logits) {
    if (s->seen == NULL && !s->constrained) {
        return logits;
    }
    memcpy(s->scores, logits, s->vocab * sizeof *logits);
    if (s->constrained) {
        constraints_bias(&s->constraints, s->scores, s->vocab);
    }
    const float penalty = (float)s->params.repetition_penalty;
    for (size_t i = 0; i < s->seen_count; i++) {
        float *score = &s->scores[s->seen_list[i]];
        *score = *score < 0.0f ? *score * penalty : *score / penalty;
    }
    if (s->constrained) {
        constraints_mask(&s->constraints, s->scores, s->vocab);
    }
    return s->scores;
}

/* Leaves the surviving tokens in `candidates`, by increasing token, and their unnormalised probabilities in `weights`; returns how
 * many there are. `largest` is the highest score. The filters are transformers' and run in its order: top-k (ties with the k-th
 * stay), top-p (Holtzman et al. 2019: the shortest head of the ranking whose mass reaches p), min-p (Nguyen et al. 2024). */
static size_t survivors(Sampler *s, const float *scores, float largest, double *total) {
    const SamplingParams *p = &s->params;
    Candidate *kept = s->candidates, end = {-INFINITY, INT32_MAX};
    size_t count = 0, passed = 0;
    float threshold = -INFINITY;
    double mass = 0.0;
    if (p->top_k > 0 && (uint64_t)p->top_k < s->vocab) {
        select_largest(scores, s->vocab, (size_t)p->top_k, kept);
        threshold = kept[0].score;
    }
    for (size_t i = 0; i < s->vocab; i++) {
        if (scores[i] >= threshold && scores[i] > -INFINITY) {
            kept[count] = (Candidate){scores[i], (int32_t)i};
            s->weights[count] = exp((double)scores[i] - largest);
            mass += s->weights[count++];
        }
    }
    if (s->ranked != NULL) {
        for (size_t i = 0; i < count; i++) {
            s->ranked[i] = (Ranked){kept[i], s->weights[i]};
        }
        end = nucleus_end(s->ranked, count, p->top_p * mass);
    }
    *total = 0.0;
    for (size_t i = 0; i < count; i++) {
        const double weight = s->weights[i];
        /* min-p is relative to the most likely token, whose weight is 1. */
        if (!ranked_before(end, kept[i]) && weight >= p->min_p) {
            kept[passed] = kept[i];
            s->weights[passed++] = weight;
            *total += weight;
        }
    }
    return passed;
}

/* Controls and temperature. On success *scores and *largest are set; the greedy choice is returned. */
static size_t prepare(Sampler *s, const float *logits, const float **scores, float *largest, SampleStatus *status) {
    const float *values = controlled(s, logits);
    const size_t best = first_largest(values, s->vocab, status);
    if (s->constrained && *status == SAMPLE_ALL_MASKED) {
        *status = SAMPLE_ALL_FORBIDDEN;
    }
    if (s->constraints.out_of_memory) {
        *status = SAMPLE_NO_MEMORY;
    }
    if (*status == SAMPLE_OK && s->params.temperature > 0.0) {
        const float temperature = (float)s->params.temperature;
        for (size_t i = 0; i < s->vocab; i++) {
            s->scores[i] = values[i] / temperature;
        }
        values = s->scores;
        if (isinf(values[best])) {
            *status = SAMPLE_INFINITE;
        }
    }
    *scores = values;
    *largest = values[best];
    return best;
}

SampleStatus sampler_choose(Sampler *s, const float *logits, TokenLogprob *chosen, TokenLogprob *top) {
    const float *scores;
    float largest;
    SampleStatus status;
    const size_t best = prepare(s, logits, &scores, &largest, &status);
    if (status != SAMPLE_OK) {
        return status;
    }
    chosen->token = (int64_t)best;
    chosen->logprob = 0.0;
    if (s->params.temperature > 0.0) {
        double total, below = 0.0;
        const size_t count = survivors(s, scores, largest, &total);
        const double target = uniform_draw(s->params.seed, s->step++) * total;
        size_t pick = 0;
        /* Inverse of the cumulative distribution, tokens in increasing order; the last one takes what rounding leaves over. */
        for (; pick + 1 < count; pick++) {
            below += s->weights[pick];
            if (target < below) {
                break;
            }
        }
        chosen->token = s->candidates[pick].token;
    }
    if (s->params.logprobs >= 0) {
        raw_logprobs(s, logits, chosen, top);
    }
    return SAMPLE_OK;
}

SampleStatus sampler_distribution(Sampler *s, const float *logits, double *probabilities) {
    const float *scores;
    float largest;
    SampleStatus status;
    const size_t best = prepare(s, logits, &scores, &largest, &status);
    if (status != SAMPLE_OK) {
        return status;
    }
    memset(probabilities, 0, s->vocab * sizeof *probabilities);
    if (s->params.temperature == 0.0) {
        probabilities[best] = 1.0;
        return SAMPLE_OK;
    }
    double total;
    const size_t count = survivors(s, scores, largest, &total);
    for (size_t i = 0; i < count; i++) {
        probabilities[s->candidates[i].token] = s->weights[i] / total;
    }
    return SAMPLE_OK;
}
