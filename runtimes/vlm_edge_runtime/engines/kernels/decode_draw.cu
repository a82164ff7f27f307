/* Drawing the next token from what decode_sample.cu left of the logits, and telling the host: the third of its kernels, which the reductions
 * there serve too. */
#include "decode_layout.h"

/* Philox4x32-10 (Salmon et al., SC 2011): draw `step` of stream `seed`, in [0, 1), as runtimes/native/random.c. */
DEVICE double uniform_draw(u64 seed, u64 step) {
    u32 c0 = (u32)step, c1 = (u32)(step >> 32), c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
    for (i32 round = 0; round < 10; round++) {
        const u64 left = (u64)0xD2511F53u * c0, right = (u64)0xCD9E8D57u * c2;
        const u32 n0 = (u32)(right >> 32) ^ c1 ^ k0, n2 = (u32)(left >> 32) ^ c3 ^ k1;
        c1 = (u32)right;
        c3 = (u32)left;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((u64)c0 << 32 | c1) >> 11) * (1.0 / 9007199254740992.0);
}

/* The last candidate of the shortest head of the ranking (higher score first, lower token among equals) whose weights reach `wanted`:
 * its score's ordered bits, found four bits at a time from above, and its token. Rounding may keep all weights together below `wanted`:
 * then the head is everything. */
DEVICE void nucleus_end(const float *scores, const double *weights, i32 count, double wanted, u32 *end_key, i32 *end_token) {
    SHARED u32 there[16], digit;
    SHARED double above;
    SHARED i32 ties[MAX_THREADS], included;
    double sums[16];
    u32 prefix = 0;
    if (THREAD == 0) {
        above = 0.0;
    }
    for (i32 shift = 28; shift >= 0; shift -= 4) {
        const u32 fixed = shift == 28 ? 0u : 0xffffffffu << (shift + 4);
        u32 present = 0;
        for (i32 i = 0; i < 16; i++) {
            sums[i] = 0.0;
        }
        for (i32 i = (i32)THREAD; i < count; i += (i32)THREADS) {
            const u32 key = ordered(scores[i]);
            if (weights[i] >= 0.0 && (key & fixed) == prefix) {
                sums[key >> shift & 15] += weights[i];
                present |= 1u << (key >> shift & 15);
            }
        }
        for (u32 i = THREAD; i < 16; i += THREADS) {
            there[i] = 0;
        }
        __syncthreads();
        for (i32 i = 0; i < 16; i++) {
            if (present >> i & 1) {
                count_up(&there[i]);
            }
        }
        __syncthreads();
        bool found = false;
        for (i32 i = 15; i >= 0 && !found; i--) {
            if (there[i] == 0) {
                continue;
            }
            const double sum = block_sum(sums[i]);
            found = above + sum >= wanted;
            __syncthreads();
            if (THREAD == 0) {
                digit = (u32)i;
                above += found ? 0.0 : sum;
            }
            __syncthreads();
        }
        if (!found && THREAD == 0) {
            above = NEVER_REACHED;
        }
        __syncthreads();
        prefix |= digit << shift;
    }
    /* Candidates of this score belong to it by increasing token; each thread counts those in a contiguous part of the vocabulary. */
    const i32 share = (count + (i32)THREADS - 1) / (i32)THREADS, begin = (i32)THREAD * share;
    const i32 stop = begin + share < count ? begin + share : count;
    i32 own = 0;
    for (i32 i = begin; i < stop; i++) {
        if (weights[i] >= 0.0 && ordered(scores[i]) == prefix) {
            own++;
        }
    }
    ties[THREAD] = own;
    __syncthreads();
    if (THREAD == 0) {
        i32 all = 0, first = -1;
        for (u32 i = 0; i < THREADS; i++) {
            first = first < 0 && ties[i] > 0 ? (i32)i : first;
            all += ties[i];
        }
        double each = 0.0; /* the weight that all of them have */
        for (i32 i = first * share; first >= 0 && i < count && i < (first + 1) * share; i++) {
            if (weights[i] >= 0.0 && ordered(scores[i]) == prefix) {
                each = weights[i];
                break;
            }
        }
        double reached = above + each;
        for (included = 1; included < all && reached < wanted; included++) {
            reached += each;
        }
    }
    __syncthreads();
    i32 earlier = 0;
    for (u32 i = 0; i < THREAD; i++) {
        earlier += ties[i];
    }
    const i32 wanted_here = included - earlier;
    __syncthreads();
    if (wanted_here >= 1 && wanted_here <= own) {
        i32 at = begin;
        for (i32 i = begin, n = 0; n < wanted_here; i++) {
            if (weights[i] >= 0.0 && ordered(scores[i]) == prefix) {
                n++;
                at = i;
            }
        }
        included = at; /* from now on the token */
    }
    __syncthreads();
    *end_key = prefix;
    *end_token = included;
    __syncthreads();
}

/* Draws from the survivors of top-k, top-p and min-p, by the inverse of the cumulative distribution in the order of tokens. */
DEVICE i32 draw(Row *row, const float *scores, const double *weights, i32 count) {
    SHARED double parts[MAX_THREADS + 1];
    SHARED i32 finals[MAX_THREADS], chosen, last;
    u32 end_key = 0;
    i32 end_token = count;
    if (row->top_p < 1.0) {
        double mass = 0.0;
        for (i32 i = (i32)THREAD; i < count; i += (i32)THREADS) {
            mass += weights[i] > 0.0 ? weights[i] : 0.0;
        }
        mass = block_sum(mass);
        nucleus_end(scores, weights, count, row->top_p * mass, &end_key, &end_token);
    }
    const i32 share = (count + (i32)THREADS - 1) / (i32)THREADS, begin = (i32)THREAD * share;
    const i32 stop = begin + share < count ? begin + share : count;
    double own = 0.0;
    i32 final = -1;
#define PASSES(i) \
    (weights[i] >= 0.0 && weights[i] >= row->min_p && (ordered(scores[i]) > end_key || (ordered(scores[i]) == end_key && (i) <= end_token)))
    for (i32 i = begin; i < stop; i++) {
        if (PASSES(i)) {
            own += weights[i];
            final = i;
        }
    }
    parts[THREAD + 1] = own;
    finals[THREAD] = final;
    __syncthreads();
    if (THREAD == 0) {
        parts[0] = 0.0;
        chosen = count;
        last = 0;
        for (u32 i = 0; i < THREADS; i++) {
            parts[i + 1] += parts[i];
            last = finals[i] >= 0 ? finals[i] : last;
        }
    }
    __syncthreads();
    const double target = uniform_draw(row->seed, row->draws) * parts[THREADS];
    double below = parts[THREAD];
    if (final >= 0 && target < parts[THREAD + 1] && (THREAD == 0 || target >= parts[THREAD])) {
        i32 pick = begin;
        for (i32 i = begin; i <= final; i++) {
            if (PASSES(i)) {
                pick = i;
                below += weights[i];
                if (target < below) {
                    break;
                }
            }
        }
        chosen = pick; /* one thread alone: the parts follow one another without overlap */
    }
#undef PASSES
    __syncthreads();
    const i32 token = chosen < count ? chosen : last; /* what rounding leaves over is the last one's */
    __syncthreads();
    return token;
}

/* One block per row. Publishes what every row did in this step, also those that did nothing. */
KERNEL void vlm_choose(const Step *s) {
    Row *row = ADDRESS(Row, s->rows) + blockIdx.y;
    const Control *control = ADDRESS(Control, s->control);
    Record *record = ADDRESS(Record, s->ring) + (i64)((control->slot - 1) % s->slots) * s->batch + blockIdx.y;
    const bool takes_part = samples(s, row), valid = takes_part && row->status == SAMPLE_OK;
    i32 token = row->best;
    if (valid && row->temperature > 0.0) {
        token = draw(row, ADDRESS(float, s->scores) + blockIdx.y * s->stride, ADDRESS(double, s->weights) + blockIdx.y * s->stride, s->vocab);
    }
    __syncthreads();
    if (THREAD != 0) {
        return;
    }
    record->token = -1;
    record->logprob = 0.0;
    record->flags = control->halted ? RECORD_HALTED : 0;
    if (takes_part && !valid) {
        record->flags |= row->status << RECORD_STATUS_SHIFT;
        row->active = 0;
    }
    if (!valid) {
        return;
    }
    if (row->temperature > 0.0) {
        row->draws++;
    }
    if (row->logprobs >= 0) {
        double total = 0.0;
        for (i32 i = 0; i < s->blocks; i++) {
            total += ADDRESS(double, s->partials)[blockIdx.y * s->blocks + i];
        }
        record->logprob = ADDRESS(float, s->logits)[blockIdx.y * s->stride + token] - (row->raw_largest + log(total));
    }
    row->pending = token;
    record->token = token;
    record->flags |= RECORD_EMITTED;
    const i32 *rules = ADDRESS(const i32, row->rules);
    const List eos = take(&rules);
    for (i32 i = 0; i < eos.count; i++) {
        if (eos.tokens[i] == token) {
            row->active = 0;
            record->flags |= RECORD_FINISHED;
        }
    }
}
