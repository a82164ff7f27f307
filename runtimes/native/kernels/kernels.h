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

/* Before a loop whose count is a constant after inlining: its sums are then registers, not an array. */
#define KERNEL_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
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

typedef enum { UNARY_IDENTITY = 0, UNARY_SILU, UNARY_GELU, UNARY_GELU_TANH, UNARY_QUICK_GELU, UNARY_RELU, UNARY_TANH, UNARY_SIGMOID, UNARY_KINDS } Unary;
typedef enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16 } CacheFormat;

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
    /* x / sqrt(mean(x²) + epsilon) · weight, or the same of x − mean, plus bias (NULL: none). `out` may be `x`. */
    void (*rms_norm)(const float *x, const float *weight, float epsilon, size_t n, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon, size_t n, float *out);
    void (*add)(const float *x, const float *y, size_t n, float *out);
    void (*multiply)(const float *x, const float *y, size_t n, float *out);
    void (*scale)(const float *x, float factor, size_t n, float *out);
    void (*unary)(Unary kind, const float *x, size_t n, float *out);
    /* unary(gate) · up */
    void (*gated)(Unary kind, const float *gate, const float *up, size_t n, float *out);
    /* Dot products of `queries` [count][dim] with `keys` cache entries [keys][dim]: out [count][stride]; dim up to HEAD_SIZE_MOST. */
    void (*scores)(const float *queries, size_t count, size_t dim, const void *entries, CacheFormat format, size_t keys, float *out, size_t stride);
    /* sums [count][dim] += weights [count][stride] · entries [keys][dim] */
    void (*weighted)(const float *weights, size_t stride, size_t count, size_t dim, const void *entries, CacheFormat format, size_t keys, float *sums);
    /* x ← exp(x − shift), and their sum */
    float (*exponentials)(float *x, size_t n, float shift);
    float (*maximum)(const float *x, size_t n);
    void (*to_float)(const uint16_t *half, size_t n, float *out);
    void (*to_half)(const float *x, size_t n, uint16_t *out);
} Kernels;

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
