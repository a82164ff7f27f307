#include "constraints.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

bool constraints_any(const Constraints *c) {
    return c->min_length > 0 || c->no_repeat_ngram_size > 0 || c->suppress.count > 0 || c->begin_suppress_count > 0 || c->forced_count > 0 ||
           c->bias_count > 0;
}

void constraints_free(Constraints *c) {
    for (size_t i = 0; i < c->begin_suppress_count; i++) {
        free(c->begin_suppress[i].list.tokens);
    }
    for (size_t i = 0; i < c->forced_count; i++) {
        free(c->forced[i].list.tokens);
    }
    for (size_t i = 0; i < c->bias_count; i++) {
        free(c->biases[i].sequence.tokens);
    }
    free(c->begin_suppress);
    free(c->forced);
    free(c->biases);
    free(c->eos.tokens);
    free(c->suppress.tokens);
    free(c->history);
    memset(c, 0, sizeof *c);
}

static bool looks_back(const Constraints *c) { return c->no_repeat_ngram_size > 0 || c->bias_count > 0; }

void constraints_accept(Constraints *c, int64_t token) {
    if (looks_back(c)) {
        if (c->length == c->room) {
            const size_t room = c->room > 0 ? 2 * c->room : 256;
            int64_t *grown = realloc(c->history, room * sizeof *grown);
            if (grown == NULL) {
                c->out_of_memory = true;
                return;
            }
            c->history = grown;
            c->room = room;
        }
        c->history[c->length] = token;
    }
    c->length++;
}

static void add(float *scores, size_t vocab, int64_t token, float bias) {
    if (token >= 0 && (uint64_t)token < vocab) {
        scores[token] += bias;
    }
}

static void forbid(float *scores, size_t vocab, const TokenList *list) {
    for (size_t i = 0; i < list->count; i++) {
        if (list->tokens[i] >= 0 && (uint64_t)list->tokens[i] < vocab) {
            scores[list->tokens[i]] = -INFINITY;
        }
    }
}

/* Whether `count` tokens equal the last ones so far. */
static bool ends_with(const Constraints *c, const int64_t *tokens, size_t count) {
    return count <= c->length && (count == 0 || memcmp(c->history + c->length - count, tokens, count * sizeof *tokens) == 0);
}

void constraints_bias(const Constraints *c, float *scores, size_t vocab) {
    for (size_t i = 0; i < c->bias_count; i++) {
        const SequenceBias *rule = &c->biases[i];
        const size_t before = rule->sequence.count - 1;
        if (ends_with(c, rule->sequence.tokens, before)) {
            add(scores, vocab, rule->sequence.tokens[before], (float)rule->bias);
        }
    }
}

/* Forbids each token that would complete an n-gram that is already there (Paulus et al. 2017, section 2.5). */
static void forbid_ngrams(const Constraints *c, float *scores, size_t vocab) {
    const size_t before = (size_t)c->no_repeat_ngram_size - 1;
    for (size_t start = 0; start + before < c->length; start++) {
        if (ends_with(c, c->history + start, before)) {
            const TokenList completing = {c->history + start + before, 1};
            forbid(scores, vocab, &completing);
        }
    }
}

static void force(float *scores, size_t vocab, const TokenList *list) {
    for (size_t i = 0; i < vocab; i++) {
        scores[i] = -INFINITY;
    }
    for (size_t i = 0; i < list->count; i++) {
        if (list->tokens[i] >= 0 && (uint64_t)list->tokens[i] < vocab) {
            scores[list->tokens[i]] = 0.0f;
        }
    }
}

void constraints_mask(const Constraints *c, float *scores, size_t vocab) {
    if (c->no_repeat_ngram_size > 0) {
        forbid_ngrams(c, scores, vocab);
    }
    if ((int64_t)c->length < c->min_length) {
        forbid(scores, vocab, &c->eos);
    }
    for (size_t i = 0; i < c->forced_count; i++) {
        if (c->forced[i].length == (int64_t)c->length) {
            force(scores, vocab, &c->forced[i].list);
        }
    }
    forbid(scores, vocab, &c->suppress);
    for (size_t i = 0; i < c->begin_suppress_count; i++) {
        if (c->begin_suppress[i].length == (int64_t)c->length) {
            forbid(scores, vocab, &c->begin_suppress[i].list);
        }
    }
}
