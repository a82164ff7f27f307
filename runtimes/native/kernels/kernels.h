/* The arithmetic of a decoder: matrix products of quantised weights, norms, activations, attention. No Python, no allocation, no threads.
 *
 * One table of functions per instruction set; `kernels_best` picks by what the CPU has. Every function works on any length (odd
 * tails included) and any alignment of float data; packed weights are 64-byte aligned.
 *
 * Weights are stored in panels of 16 outputs, the same bytes for every instruction set, and each is read front to back:
 *   quantised  for every two blocks of the weight: their scales float16 [2][16], then their codes, per 32 inputs
 *              8 bits: [8 groups of 4 inputs][16 outputs][4 inputs] of code + 128
 *              4 bits: [4][16 outputs][4 inputs], group g in the low half of the byte and group g + 4 in the high one, code + 8
 *   floating   [inputs][16 outputs] of float16 or float32
 * Scales stand between the codes because a second stream of addresses per panel, however short, cost more than half of the memory's
 * speed (4 bits, one thread, weights in memory: 11 GB/s with the scales in front of each panel, 31 so; reading alone: 30).
 * One 32-bit lane holds four inputs of one output: what VPDPBUSD and SDOT multiply and add at once, without any sum across
 * lanes. Inputs beyond the matrix are code 0, outputs beyond it are zero columns. */
#ifndef VLM_KERNELS_H
#define VLM_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Before a loop whose count is a constant after inlining: its sums are then registers, not an array. AddressSanitizer instruments every
 * access: unrolled, that takes minutes to compile. */
#define KERNEL_PRAGMA(x) _Pragma(#x)
#if defined(__SANITIZE_ADDRESS__)
#define UNROLL
#elif defined(__clang__)
#define UNROLL KERNEL_PRAGMA(clang loop unroll(full))
#elif defined(__GNUC__)
#define UNROLL KERNEL_PRAGMA(GCC unroll 16)
#else
#define UNROLL
#endif

#define PANEL 16 /* outputs of one panel */
#define BLOCK 32 /* inputs that share a scale of the activations */
#define HEAD_SIZE_MOST 256 /* numbers of an attention head */
#define ATTENTION_KEYS 64 /* keys that are taken together */
#define FLASH_KEYS 128    /* and by many queries */
#define FLASH_PACKED 1024 /* keys of 8 bits that are packed before any query sees them, where all see all */

typedef enum { WEIGHT_INT4 = 0, WEIGHT_INT8, WEIGHT_FLOAT16, WEIGHT_FLOAT32, WEIGHT_FORMATS } WeightFormat;

/* A packed matrix of `depth` inputs and `width` outputs. */
typedef struct {
    WeightFormat format;
    size_t depth, width;
    size_t block;       /* inputs per scale: 32, 64 or 128; 0 for floating formats */
    size_t panel_bytes; /* a multiple of 64 */
    float scale;        /* what all scales are multiplied with: a power of two that brings them into float16 */
    const uint8_t *data;
} PanelMatrix;

/* Rows of activations in 8 bits: value ≈ code · scale of its block. */
typedef struct {
    int8_t *codes;    /* [rows][blocks · 32] */
    float *scales;    /* [rows][blocks] */
    int32_t *offsets; /* [rows][blocks]: −8 times the sum of the block's codes, which takes the weights' offset away again */
    size_t blocks;
} QuantRows;

/* Rows of activations in 8 bits with one scale and one zero point each: value ≈ (code − zero) · scale. For products whose int32 sums run
 * over the whole depth. */
typedef struct {
    uint8_t *codes; /* [rows][stride]; those beyond the depth meet weights of 0 */
    float *scales;  /* [rows] */
    int32_t *zeros; /* [rows] */
    size_t stride;  /* bytes: at least byte_stride(depth) */
} ByteRows;

/* Weights in 8 bits with one scale per output, in panels [groups of 4 inputs][16 outputs][4 inputs] of codes −127…127; inputs beyond the
 * depth, up to a multiple of 32, and outputs beyond the width are code 0. */
typedef struct {
    size_t depth, width;  /* depth up to 65,536: int32 holds the sums */
    const int8_t *codes;  /* 64-byte aligned, byte_panel(depth) bytes a panel */
    const float *scales;  /* [panels · 16], 0 beyond the width */
    const float *bias;    /* [panels · 16], or NULL */
    const int32_t *sums;  /* [panels · 16]: the sum of each output's codes */
} ByteMatrix;

typedef enum { UNARY_IDENTITY = 0, UNARY_SILU, UNARY_GELU, UNARY_GELU_TANH, UNARY_QUICK_GELU, UNARY_RELU, UNARY_TANH, UNARY_SIGMOID, UNARY_KINDS } Unary;
typedef enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16, CACHE_INT8 } CacheFormat;

/* Entries of a cache, one after another: floats, or codes of 8 bits from −127 to 127 with a scale in half precision for each BLOCK of an
 * entry's numbers. A block with NaN or infinity has such a scale, and no number of it is one. */
typedef struct {
    CacheFormat format;
    const void *data;
    const uint16_t *scales; /* [blocks][scale_stride], by entry; of CACHE_INT8 */
    size_t scale_stride;
} CacheEntries;

/* Attention of `rows` queries of one head (or of the heads that share keys) over the keys [begin, end):
 * softmax(scale · query · keyᵀ) · value, the scores never more than a block at a time. Row i is query head i % group of token i / group. */
typedef struct {
    size_t size, group, rows;    /* numbers of a head, up to HEAD_SIZE_MOST; query heads side by side in a token's row; tokens · group */
    const float *queries;        /* [tokens][query_stride] */
    size_t query_stride;         /* numbers */
    const void *keys, *values;   /* [end][stride] of `format` */
    size_t key_stride, value_stride; /* numbers */
    CacheFormat format;
    const uint16_t *key_scales, *value_scales; /* of CACHE_INT8: [blocks][scale_stride], by key */
    size_t scale_stride;
    size_t begin, end;
    bool half;                   /* the products may be of bfloat16, where the CPU multiplies those */
    bool bytes;                  /* and of codes of 8 bits, where the CPU multiplies those and every query sees every key */
    bool causal;                 /* token t sees the keys up to position + t, */
    size_t position, window;     /* and of those the last `window`; 0: all */
    float scale, cap;            /* cap: scores become cap · tanh(score / cap); 0: none */
    const float *bias;           /* [rows][bias_stride], from key 0 on, added to the scores; or NULL */
    size_t bias_stride;
    /* Writes −∞ to the scores of the keys [key, key + count) that a row may not see; NULL: all are seen. A row that sees none of all is NaN.
     * The scores are exponents of 2: what is added here is natural ones times log2(e). */
    void (*hide)(const void *context, size_t row, size_t key, size_t count, float *scores);
    const void *context;
    float *out;                  /* [tokens][out_stride], query heads side by side */
    size_t out_stride;           /* numbers */
    void *scratch;               /* attention_bytes(rows, size), 64-byte aligned */
} HeadAttention;

typedef struct {
    const char *name;
    /* Products of one panel: out[row][16] of `rows` rows, `stride` floats apart, from quantised activations. */
    void (*int4)(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride);
    void (*int8)(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride);
    /* The same from floats: `panel` [depth][16], its rows `panel_stride` numbers apart; x [rows][depth], `x_stride` apart.
     * With `add` the products are added to what is in `out`. */
    void (*float32)(const float *panel, size_t panel_stride, size_t depth, const float *x, size_t x_stride, size_t rows, float *out, size_t stride,
                    bool add);
    void (*float16)(const uint16_t *panel, size_t panel_stride, size_t depth, const float *x, size_t x_stride, size_t rows, float *out, size_t stride,
                    bool add);
    /* One row of n floats into row `row` of `out`; codes beyond n are 0. */
    void (*quantize)(const float *x, size_t n, const QuantRows *out, size_t row);
    /* out = unary(x · weight + bias), or with `add` out + that, for the panels [panel, panel + panels): rows [first, first + rows) of x into
     * out [rows][panels · 16], `stride` floats apart. */
    void (*bytes)(const ByteMatrix *weight, size_t panel, size_t panels, const ByteRows *x, size_t first, size_t rows, Unary unary, bool add, float *out,
                  size_t stride);
    /* One row of n floats into row `row` of `out`. A row with NaN or infinity has such a scale. */
    void (*quantize_bytes)(const float *x, size_t n, const ByteRows *out, size_t row);
    void (*attention)(const HeadAttention *a);
    /* x / sqrt(mean(x²) + epsilon) · weight, or the same of x − mean, plus bias (NULL: none). `out` may be `x`. */
    void (*rms_norm)(const float *x, const float *weight, float epsilon, size_t n, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon, size_t n, float *out);
    void (*add)(const float *x, const float *y, size_t n, float *out);
    void (*multiply)(const float *x, const float *y, size_t n, float *out);
    void (*scale)(const float *x, float factor, size_t n, float *out);
    void (*unary)(Unary kind, const float *x, size_t n, float *out);
    /* Turns the pairs (i, i + half) of x by angles of which these are the cosines and sines [half]. `out` may be `x`. */
    void (*rotate)(const float *x, size_t half, const float *cosine, const float *sine, float *out);
    /* unary(gate) · up */
    void (*gated)(Unary kind, const float *gate, const float *up, size_t n, float *out);
    /* Dot products of `queries` [count][dim] with `keys` cache entries [keys][dim]: out [count][stride]; dim up to HEAD_SIZE_MOST. */
    void (*scores)(const float *queries, size_t count, size_t dim, const CacheEntries *entries, size_t keys, float *out, size_t stride);
    /* sums [count][dim] += weights [count][stride] · entries [keys][dim]; weights of entries in 8 bits are not negative */
    void (*weighted)(const float *weights, size_t stride, size_t count, size_t dim, const CacheEntries *entries, size_t keys, float *sums);
    /* One entry of a cache in 8 bits: n codes, and its scales [blocks], `stride` apart. The same for every instruction set. */
    void (*to_codes)(const float *x, size_t n, int8_t *codes, uint16_t *scales, size_t stride);
    /* x ← exp(x − shift), and their sum */
    float (*exponentials)(float *x, size_t n, float shift);
    float (*maximum)(const float *x, size_t n);
    void (*to_float)(const uint16_t *half, size_t n, float *out);
    void (*to_half)(const float *x, size_t n, uint16_t *out);
} Kernels;

/* The scale of a row in 8 bits whose numbers lie in [low, high], which holds 0; its inverse (0: all codes are the zero point) and zero point. */
static inline float byte_scale(float low, float high, bool finite, float *inverse, int32_t *zero) {
    const float scale = high / 255.0f - low / 255.0f; /* the difference itself may overflow */
    *inverse = finite && scale >= 1e-37f ? 1.0f / scale : 0.0f;
    *zero = *inverse > 0.0f ? (int32_t)(-low * *inverse + 0.5f) : 0;
    return *inverse > 0.0f ? scale : finite ? 0.0f : __builtin_nanf("");
}

/* Bytes of a row of activations, and of a panel of weights, of so many inputs. */
static inline size_t byte_stride(size_t depth) { return (depth + 63) / 64 * 64; }
static inline size_t byte_panel(size_t depth) { return (depth + BLOCK - 1) / BLOCK * BLOCK * PANEL; }

/* The scratch of an attention. */
static inline size_t attention_bytes(size_t rows, size_t size) {
    const size_t padded = (size + 31) / 32 * 32, lines = (rows + 31) / 16 * 16; /* tiles of up to 16 */
    return (lines * (2 * padded + 17) + FLASH_PACKED * padded) * sizeof(float); /* of which a block of floats is 2 · FLASH_KEYS · padded */
}

/* Those of plain C, which a table without its own takes. */
void quantize_bytes_scalar(const float *x, size_t n, const ByteRows *out, size_t row);
void products_bytes_scalar(const ByteMatrix *weight, size_t panel, size_t panels, const ByteRows *x, size_t first, size_t rows, bool add, float *out,
                           size_t stride);

/* The fastest this CPU has, and by name ("scalar", "avx2", "avx512", "neon"; NULL: not built in, or the CPU lacks it). */
const Kernels *kernels_best(void);
const Kernels *kernels_named(const char *name);

/* Portable conversions, exact, round to nearest even. */
float half_to_float(uint16_t half);
uint16_t float_to_half(float value);

/* Whether the scales of two blocks of the weight stand before block `b` of 32 inputs. */
static inline bool panel_has_scales(unsigned shift, size_t b) { return (b & (((size_t)2 << shift) - 1)) == 0; }

/* log2 of how many blocks of activations share a scale of the weights. */
static inline unsigned panel_scale_shift(const PanelMatrix *weight) { return (unsigned)__builtin_ctzll(weight->block) - 5; }

/* Of block `b` of 32 inputs: where its scales and its codes are in a panel of `bits` bits. */
static inline const uint16_t *panel_scales(const PanelMatrix *weight, size_t bits, const uint8_t *panel, size_t b) {
    const unsigned shift = panel_scale_shift(weight);
    const size_t pair = b >> (shift + 1), codes = pair << (shift + 1);
    return (const uint16_t *)(const void *)(panel + pair * 64 + codes * bits * 64) + (b >> shift & 1) * PANEL;
}

static inline const uint8_t *panel_codes(const PanelMatrix *weight, size_t bits, const uint8_t *panel, size_t b) {
    return panel + ((b >> (panel_scale_shift(weight) + 1)) + 1) * 64 + b * bits * 64;
}

/* Bytes of a quantised panel. */
static inline size_t panel_bytes_of(const PanelMatrix *weight, size_t bits) {
    const size_t blocks = (weight->depth + BLOCK - 1) / BLOCK, pair = (size_t)2 << panel_scale_shift(weight);
    return (blocks + pair - 1) / pair * 64 + blocks * bits * 64;
}

#endif
