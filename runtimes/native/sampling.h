/* Choosing the next token from logits. No Python in here: the decode loop calls it with the interpreter lock released. */
#ifndef VLM_SAMPLING_H
#define VLM_SAMPLING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "constraints.h"
#include "ranking.h"

typedef struct {
    double temperature; /* 0: greedy */
    int64_t top_k;      /* 0: off */
    double top_p;       /* 1: off */
    double min_p;       /* 0: off */
    double repetition_penalty; /* 1: off */
    uint64_t seed;
    int64_t logprobs; /* −1: none, 0: the chosen token's, n: and the n most likely */
} SamplingParams;

typedef struct {
    int64_t token;
    double logprob;
} TokenLogprob;

typedef enum { SAMPLE_OK = 0, SAMPLE_NAN, SAMPLE_INFINITE, SAMPLE_ALL_MASKED, SAMPLE_ALL_FORBIDDEN, SAMPLE_NO_MEMORY } SampleStatus;

/* One row's sampler: its parameters, the tokens its penalty looks at, its place in the random stream, and scratch memory. */
typedef struct {
    SamplingParams params;
    Constraints constraints;
    bool constrained;
    size_t vocab;
    uint64_t step;      /* draws so far: the counter of the generator */
    uint8_t *seen;      /* [vocab] 1: the penalty applies; NULL when the penalty is off */
    int32_t *seen_list; /* the same as a list */
    size_t seen_count;
    float *scores;         /* [vocab] */
    Candidate *candidates; /* [vocab]; NULL until a sampled row needs them */
    double *weights;       /* [vocab] */
    Ranked *ranked;        /* [vocab]; NULL when top-p is off */
} Sampler;

/* What is wrong with the parameters, or NULL. */
const char *sampling_params_error(const SamplingParams *params);

/* 0, or −1 without memory. `params` must be valid. Takes over what `constraints` points to (NULL: none), on failure too. */
int sampler_init(Sampler *sampler, const SamplingParams *params, Constraints *constraints, size_t vocab);
void sampler_free(Sampler *sampler);

/* Adds a token to what the penalty and the constraints look at; the penalty ignores tokens outside the vocabulary. */
void sampler_accept(Sampler *sampler, int64_t token);

/* Whether it looks at nothing but the largest logit. */
bool sampler_takes_largest(const Sampler *sampler);

/* Chooses from `logits` [vocab]. Advances the random stream by one draw unless greedy. `chosen->logprob` is set when
 * params.logprobs ≥ 0, `top` [min(logprobs, vocab)] when it is > 0: both of the raw logits, before penalty and filters. */
SampleStatus sampler_choose(Sampler *sampler, const float *logits, TokenLogprob *chosen, TokenLogprob *top);

/* The distribution that sampler_choose draws from, over the whole vocabulary (greedy: all mass on one token). */
SampleStatus sampler_distribution(Sampler *sampler, const float *logits, double *probabilities);

/* Index of the first largest value; *status says whether a NaN or +∞ was met, or everything is −∞. */
size_t first_largest(const float *values, size_t count, SampleStatus *status);

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
/* The `step`-th draw of the stream `seed`: a double in [0, 1) with 53 random bits. */
double uniform_draw(uint64_t seed, uint64_t step);

/* Words for a status, for messages. */
const char *sample_status_text(SampleStatus status);

#endif
