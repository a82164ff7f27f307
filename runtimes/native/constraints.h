/* Which tokens may come next, by rules that look at the tokens so far: the length and repetition controls of text generation. */
#ifndef VLM_CONSTRAINTS_H
#define VLM_CONSTRAINTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    int64_t *tokens;
    size_t count;
} TokenList;

/* A rule for the moment at which `length` tokens are there, the prompt's among them. */
typedef struct {
    int64_t length;
    TokenList list;
} TokensAt;

/* Added to the score of the sequence's last token when the tokens so far end with the others; −∞ forbids it. */
typedef struct {
    TokenList sequence;
    double bias;
} SequenceBias;

/* All lengths count the prompt's tokens too. Zeroed: no rule. */
typedef struct {
    int64_t min_length;           /* no token of `eos` before so many tokens are there */
    int64_t no_repeat_ngram_size; /* no n-gram twice; 0: off */
    TokenList eos, suppress;      /* `suppress`: never */
    TokensAt *begin_suppress;     /* not at that length */
    size_t begin_suppress_count;
    TokensAt *forced; /* at that length nothing else */
    size_t forced_count;
    SequenceBias *biases;
    size_t bias_count;
    int64_t *history; /* all tokens so far; kept only when a rule looks at them */
    size_t length, room;
    bool out_of_memory; /* the history could not grow */
} Constraints;

/* Whether there is any rule. */
bool constraints_any(const Constraints *constraints);
/* Frees what it points to and clears it. */
void constraints_free(Constraints *constraints);

/* Adds a token to those so far. */
void constraints_accept(Constraints *constraints, int64_t token);

/* Adds the biases to `scores` [vocab]; comes before the repetition penalty. */
void constraints_bias(const Constraints *constraints, float *scores, size_t vocab);
/* Sets the scores of forbidden tokens to −∞; comes after the repetition penalty. A forced token gets 0. */
void constraints_mask(const Constraints *constraints, float *scores, size_t vocab);

#endif
