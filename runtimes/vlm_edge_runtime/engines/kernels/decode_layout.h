/* Memory that the host and the kernels of the decode_*.cu share; cuda_layout.py has the same structures as numpy types.
 *
 * Everything is addressed by 64-bit integers, so that one layout serves the device, and a host that runs the kernels as plain C++. */
#ifndef VLM_DECODE_LAYOUT_H
#define VLM_DECODE_LAYOUT_H

typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define MAX_THREADS 512

#ifdef VLM_HOST /* one block at a time, its threads as threads of the process */
#include "host_block.h"
#else
#define SHARED __shared__
#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ __launch_bounds__(MAX_THREADS) /* or a block might ask for more registers than there are */
#define ADDRESS(type, value) ((type *)(value))
DEVICE float negative_infinity() { return __int_as_float(0xff800000); }
DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
DEVICE void count_up(u32 *counter) { atomicAdd(counter, 1u); }
/* Several threads may write the same value to one place. */
DEVICE float get(const float *place) { return *(const volatile float *)place; }
DEVICE void put(float *place, float value) { *(volatile float *)place = value; }
#endif

#define THREAD threadIdx.x
#define THREADS blockDim.x

/* Statuses of a sampled row; the numbers are those of sampling.h. */
enum { SAMPLE_OK = 0, SAMPLE_NAN, SAMPLE_INFINITE, SAMPLE_ALL_MASKED, SAMPLE_ALL_FORBIDDEN };

/* What one row reports of one step. */
enum { RECORD_EMITTED = 1, RECORD_FINISHED = 2, RECORD_HALTED = 4, RECORD_STATUS_SHIFT = 8 };
typedef struct {
    i32 token, flags;
    double logprob;
} Record;

/* A row's place in the token loop, and its sampler. */
typedef struct {
    i64 pending;  /* newest token, not yet in the cache; −1: none */
    i64 position; /* of the pending (or next) token */
    i32 length;   /* valid cache entries */
    i32 active;   /* takes part in decode, and is sampled here */
    i32 marked;   /* runs its pending token, and is not sampled here */
    i32 running;  /* set by begin: the step is for this row */
    /* Parameters, as SamplingParams has them. */
    double temperature, top_p, min_p;
    u64 seed, draws;
    i64 top_k;
    float penalty;
    i32 logprobs;
    /* Rules on what may come next: int32 lists at `rules`, each one `count` and its tokens, in this order: EOS; suppressed; then
     * `begin_count` and `forced_count` times a length and a list; then `bias_count` times float bits of the bias and a list. */
    i64 rules;
    i64 min_length;
    i32 constrained, ngram, begin_count, forced_count, bias_count, spare;
    /* Tokens so far: how many, and where rules look back, which. `seen` u8 [vocab] and `seen_list` i32 [vocab] for the penalty. */
    i64 tokens, history, seen, seen_list;
    i32 seen_count;
    /* From one kernel of the sampler to the next. */
    i32 status, best;
    float largest, threshold, raw_largest;
} Row;

/* One tensor of which running rows keep what the step gave: `bytes` per row. */
typedef struct {
    i64 from, from_stride, to, to_stride, bytes;
} KeptTensor;

/* One cache tensor [batch, heads, bucket, entry bytes]; `save` [batch, heads, entry bytes]. */
typedef struct {
    i64 past, present, save, heads, entry;
} GuardedCache;

typedef struct {
    i32 slot;   /* steps begun since the host set it to 0 */
    i32 halted; /* a row has no room: steps do nothing until the host says so */
} Control;

/* The argument of every kernel. */
typedef struct {
    i64 rows, control, ring;              /* Row [batch], Control, Record [slots, batch] */
    i64 logits, scores, weights, partials; /* float [batch, stride] (twice), double [batch, stride], double [batch, blocks] */
    i64 ids, past, positions;             /* the engines' inputs */
    i64 kept, guarded;                    /* KeptTensor [kept_count], GuardedCache [guarded_count] */
    i64 stride;
    i32 batch, capacity, bucket, vocab, axes, wide_ids, wide_positions, slots, blocks, kept_count, guarded_count, spare;
} Step;

/* The sizes come from cuda_layout.py, as compiler options. */
static_assert(sizeof(Record) == RECORD_BYTES && sizeof(Row) == ROW_BYTES && sizeof(Step) == STEP_BYTES, "cuda_layout.py differs");
static_assert(sizeof(KeptTensor) == KEPT_BYTES && sizeof(GuardedCache) == GUARDED_BYTES, "cuda_layout.py differs");

#endif
