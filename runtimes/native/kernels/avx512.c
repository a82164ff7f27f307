/* AVX-512 with VNNI: 16 outputs to a register, VPDPBUSD multiplies unsigned weights with signed activations. */
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#define TARGET_ISA "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"
#include "target_begin.inc"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define VW 16
#define ROWS 12
#define FLOAT_ROWS 8 /* 12 rows that are a multiple of 4 KB apart do not fit the eight lines of a place in the nearest cache: 86 GFLOP/s for 117 */
#define FLASH_ROWS 8
#define FLASH_VECTORS 2
#define FLASH_PACKS
#define OWN_CODES
#define GROUP 3
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
#define v_load(p) ((vf)_mm512_loadu_ps(p))
#define v_store(p, v) _mm512_storeu_ps(p, (__m512)(v))
#define v_load_half(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p))))
#define v_store_half(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define v_load_codes(p) ((vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p)))))
#define v_set(x) ((vf)_mm512_set1_ps(x))
#define v_fma(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define v_sum(v) _mm512_reduce_add_ps((__m512)(v))
#define v_highest(v) _mm512_reduce_max_ps((__m512)(v))
#define v_max(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define v_reciprocal(v) reciprocal(v)
#define v_bits(v) ((vi)(v))
#define v_floats(v) ((vf)(v))
#define v_power(n) v_floats(((n) + 127) << 23)
#define v_less(a, b) ((vi)_mm512_movm_epi32(_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_LT_OQ)))
#define v_choose(mask, a, b) ((vf)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)(mask)), (__m512)(b), (__m512)(a)))

/* Two vectors become one that holds the pairwise sums of both, four times: 16 sums across the lanes in 15 additions. */
static inline __attribute__((always_inline)) vf v_sums(const vf v[16]) {
    __m512 a[8], b[4], c[2];
    UNROLL
    for (int i = 0; i < 8; i++) {
        const __m512 x = (__m512)v[i], y = (__m512)v[i + 8];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee)); /* lanes x0+x2, x1+x3, y0+y2, y1+y3 */
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd)); /* i, i+8, i+4, i+12 */
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
        c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    }
    const __m512 sums = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
    return (vf)_mm512_shuffle_f32x4(sums, sums, 0xd8);
}

#define OWN_EXP
/* 1 / x to two units in the last place; 0 where it is denormal. */
static inline __attribute__((always_inline)) vf reciprocal(vf x) {
    const __m512 first = _mm512_rcp14_ps((__m512)x);
    return (vf)_mm512_mul_ps(first, _mm512_fnmadd_ps((__m512)x, first, _mm512_set1_ps(2.0f)));
}

/* The same e^x as in float_kernels.inc, with the instructions for 2^n. */
static inline __attribute__((always_inline)) vf v_exp(vf given) {
    /* The second operand is what NaN leaves; −∞ would have no distance to its integer. */
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(88.3762626647950f), (__m512)given));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x));
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return (vf)_mm512_scalef_ps(p, n);
}

#include "float_kernels.inc"

/* One block; lanes beyond the row are 0. */
INLINE void quantize_block(const float *x, size_t count, int8_t *codes, float *scale, int32_t *offset) {
    const __mmask16 low = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
    const __mmask16 high = count >= 32 ? 0xffff : count > 16 ? (__mmask16)((1u << (count - 16)) - 1) : 0;
    const __m512 v0 = _mm512_maskz_loadu_ps(low, x), v1 = _mm512_maskz_loadu_ps(high, x + 16);
    /* Compared as integers, NaN is larger than any number. */
    const __m512i bits = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(v0)), _mm512_castps_si512(_mm512_abs_ps(v1)));
    const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(bits))));
    const bool tiny = most < SMALLEST;
    const __m512 inverse = _mm512_set1_ps(tiny ? 0.0f : 127.0f / most);
    const __m512i i0 = _mm512_cvtps_epi32(_mm512_mul_ps(v0, inverse)), i1 = _mm512_cvtps_epi32(_mm512_mul_ps(v1, inverse));
    _mm_storeu_si128((__m128i *)(void *)codes, _mm512_cvtsepi32_epi8(i0));
    _mm_storeu_si128((__m128i *)(void *)(codes + 16), _mm512_cvtsepi32_epi8(i1));
    *scale = tiny ? 0.0f : most / 127.0f;
    *offset = (int32_t)(-8u * (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(i0, i1))); /* of NaN anything: the scale says it */
}

/* One of 16 vectors each into the lanes of one: the maximum, or the sum, across their lanes. */
#define ACROSS(name, combine)                                                                                                    \
    INLINE __m512i name(const __m512i v[16]) {                                                                                   \
        __m512i a[8], b[4], c[2];                                                                                                \
        UNROLL                                                                                                                   \
        for (int i = 0; i < 8; i++) {                                                                                            \
            a[i] = combine(_mm512_shuffle_i32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_i32x4(v[i], v[i + 8], 0xee));              \
        }                                                                                                                        \
        UNROLL                                                                                                                   \
        for (int i = 0; i < 4; i++) {                                                                                            \
            b[i] = combine(_mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd));              \
        }                                                                                                                        \
        UNROLL                                                                                                                   \
        for (int i = 0; i < 2; i++) {                                                                                            \
            c[i] = combine(_mm512_unpacklo_epi32(b[i], b[i + 2]), _mm512_unpackhi_epi32(b[i], b[i + 2]));                        \
        }                                                                                                                        \
        const __m512i all = combine(_mm512_unpacklo_epi32(c[0], c[1]), _mm512_unpackhi_epi32(c[0], c[1]));                       \
        return _mm512_shuffle_i32x4(all, all, 0xd8);                                                                             \
    }
ACROSS(maxima_of, _mm512_max_epi32)
ACROSS(sums_of, _mm512_add_epi32)

/* 16 whole blocks at once: one division, and sums across the lanes, for all of them. The same bits as one by one. */
static void quantize_sixteen(const float *x, int8_t *codes, float *scales, int32_t *offsets) {
    __m512i v[16];
    UNROLL
    for (size_t b = 0; b < 16; b++) {
        const __m512 v0 = _mm512_loadu_ps(x + b * BLOCK), v1 = _mm512_loadu_ps(x + b * BLOCK + 16);
        v[b] = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(v0)), _mm512_castps_si512(_mm512_abs_ps(v1)));
    }
    const __m512 most = _mm512_castsi512_ps(maxima_of(v));
    const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(SMALLEST), _CMP_NLT_UQ);
    _mm512_storeu_ps(scales, _mm512_maskz_div_ps(some, most, _mm512_set1_ps(127.0f)));
    float inverses[16];
    _mm512_storeu_ps(inverses, _mm512_maskz_div_ps(some, _mm512_set1_ps(127.0f), most));
    UNROLL
    for (size_t b = 0; b < 16; b++) {
        const __m512 inverse = _mm512_set1_ps(inverses[b]);
        const __m512i i0 = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + b * BLOCK), inverse));
        const __m512i i1 = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + b * BLOCK + 16), inverse));
        _mm_storeu_si128((__m128i *)(void *)(codes + b * BLOCK), _mm512_cvtsepi32_epi8(i0));
        _mm_storeu_si128((__m128i *)(void *)(codes + b * BLOCK + 16), _mm512_cvtsepi32_epi8(i1));
        v[b] = _mm512_add_epi32(i0, i1);
    }
    _mm512_storeu_si512((void *)offsets, _mm512_mullo_epi32(sums_of(v), _mm512_set1_epi32(-8)));
}

static void quantize(const float *x, size_t n, const QuantRows *out, size_t row) {
    const size_t begin = row * out->blocks;
    size_t b = 0;
    for (; (b + 16) * BLOCK <= n; b += 16) {
        quantize_sixteen(x + b * BLOCK, out->codes + (begin + b) * BLOCK, out->scales + begin + b, out->offsets + begin + b);
    }
    for (; b < out->blocks; b++) {
        quantize_block(x + b * BLOCK, n > b * BLOCK ? n - b * BLOCK : 0, out->codes + (begin + b) * BLOCK, out->scales + begin + b, out->offsets + begin + b);
    }
}

INLINE __m512i four_inputs(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

#define SOON 6144 /* bytes from what a product of one row reads to what it asks for: the hardware looks no farther than a page, and begins anew with each */

/* One row times a panel of `bits` bits: the memory's speed decides, and two sums side by side hide the latency. What follows SOON is asked
 * for, every line of it: those left out would be waited for. */
INLINE void tile_row(const int bits, const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t row, float *out) {
    const size_t blocks = x->blocks;
    const unsigned shift = panel_scale_shift(weight);
    const uint8_t *at = panel, *stored = panel;
    const int8_t *codes = x->codes + row * blocks * BLOCK;
    const float *scales = x->scales + row * blocks;
    const int32_t *offsets = x->offsets + row * blocks;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum = _mm512_setzero_ps();
    for (size_t b = 0; b < blocks; b++, at += (size_t)bits * 64) {
        if (panel_has_scales(shift, b)) {
            _mm_prefetch((const char *)(at + SOON), _MM_HINT_T1);
            stored = at;
            at += 64;
        }
        const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)(stored + (b >> shift & 1) * 32)));
        const int8_t *line = codes + b * BLOCK;
        __m512i dot = _mm512_set1_epi32(bits == 4 ? offsets[b] : offsets[b] * 16), other = _mm512_setzero_si512();
        UNROLL
        for (size_t g = 0; g < 4; g++) {
            __m512i low = _mm512_load_si512((const void *)(at + g * 64)), high;
            if (bits == 4) { /* the high codes stay where they are, 16 times too large, which costs one shift a block */
                __asm__("" : "+v"(low)); /* loaded once, not by both of its readers */
                high = _mm512_andnot_si512(nibble, low);
                low = _mm512_and_si512(low, nibble);
            } else {
                high = _mm512_load_si512((const void *)(at + (g + 4) * 64));
            }
            _mm_prefetch((const char *)(at + SOON + g * 64), _MM_HINT_T1);
            if (bits == 8) {
                _mm_prefetch((const char *)(at + SOON + (g + 4) * 64), _MM_HINT_T1);
            }
            dot = _mm512_dpbusd_epi32(dot, low, four_inputs(line + g * 4));
            other = _mm512_dpbusd_epi32(other, high, four_inputs(line + (g + 4) * 4));
        }
        dot = _mm512_add_epi32(dot, bits == 4 ? _mm512_srai_epi32(other, 4) : other);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(scales[b])), sum);
    }
    _mm512_storeu_ps(out, _mm512_mul_ps(sum, _mm512_set1_ps(weight->scale)));
}

/* `sums` + four products each, with the same four codes for all. GCC 12 loads them by an instruction of their own. */
INLINE __m512i dot_four(__m512i sums, __m512i weights, const int8_t *codes) {
#if defined(__GNUC__) && !defined(__clang__)
    __asm__("vpdpbusd\t%2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*(const int8_t(*)[4])codes));
    return sums;
#else
    return _mm512_dpbusd_epi32(sums, weights, four_inputs(codes));
#endif
}

/* `n` rows (a constant where it is called) times a panel, the same bits as row by row. Group by group over all rows: two vectors of
 * weights are then alive at a time, and the rows' sums of a block and of all blocks fit the registers. What bounds it: for every 8
 * VPDPBUSD a multiplication and a multiply-add by the scales go through the same two ports, 80 % of the peak. */
INLINE void tile(const int bits, const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, const size_t n, float *out,
                 size_t stride) {
    const size_t blocks = x->blocks;
    const unsigned shift = panel_scale_shift(weight);
    const uint8_t *at = panel, *stored = panel;
    const int8_t *codes = x->codes + first * blocks * BLOCK;
    const float *scales = x->scales + first * blocks;
    const int32_t *offsets = x->offsets + first * blocks;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sums[ROWS];
    UNROLL
    for (size_t t = 0; t < n; t++) {
        sums[t] = _mm512_setzero_ps();
    }
    for (size_t b = 0; b < blocks; b++, at += (size_t)bits * 64) {
        if (panel_has_scales(shift, b)) {
            stored = at;
            at += 64;
        }
        if (n >= 6) { /* the next panel, which would be waited for when its turn comes: 4 % of a prompt of 96 tokens */
            UNROLL
            for (size_t g = 0; g < (size_t)bits; g++) {
                _mm_prefetch((const char *)(at + weight->panel_bytes + g * 64), _MM_HINT_T1);
            }
        }
        __m512i dots[ROWS];
        UNROLL
        for (size_t t = 0; t < n; t++) {
            dots[t] = _mm512_set1_epi32(offsets[t * blocks + b]);
            if (bits == 8) {
                dots[t] = _mm512_slli_epi32(dots[t], 4);
            }
        }
        UNROLL
        for (size_t g = 0; g < 4; g++) {
            __m512i low = _mm512_load_si512((const void *)(at + g * 64)), high;
            __asm__("" : "+v"(low));
            if (bits == 4) {
                high = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
                low = _mm512_and_si512(low, nibble);
            }
            UNROLL
            for (size_t t = 0; t < n; t++) {
                dots[t] = dot_four(dots[t], low, codes + (t * blocks + b) * BLOCK + g * 4);
            }
            if (bits == 8) {
                high = _mm512_load_si512((const void *)(at + (g + 4) * 64));
                __asm__("" : "+v"(high));
            }
            UNROLL
            for (size_t t = 0; t < n; t++) {
                dots[t] = dot_four(dots[t], high, codes + (t * blocks + b) * BLOCK + (g + 4) * 4);
            }
        }
        const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)(stored + (b >> shift & 1) * 32)));
        UNROLL
        for (size_t t = 0; t < n; t++) {
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), _mm512_mul_ps(scale, _mm512_set1_ps(scales[t * blocks + b])), sums[t]);
        }
    }
    UNROLL
    for (size_t t = 0; t < n; t++) {
        _mm512_storeu_ps(out + t * stride, _mm512_mul_ps(sums[t], _mm512_set1_ps(weight->scale)));
    }
}

/* Rows this far apart, or a multiple, are in the same eight lines of the nearest cache, with the weights that pass by: no more than 6 rows
 * then (depth 4096, 96 rows: 176 GOP/s with 12, 352 with 6). */
#define PLACES 4096
#define PRODUCT_ROWS(bits, count)                                                            \
    for (; rows >= (count); rows -= (count), first += (count), out += (count) * stride) {    \
        tile(bits, weight, panel, x, first, count, out, stride);                             \
    }
#define PRODUCT(name, bits)                                                                                                              \
    static void name(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride) { \
        if (x->blocks * BLOCK % PLACES != 0) {                                                                                           \
            PRODUCT_ROWS(bits, ROWS)                                                                                                     \
            PRODUCT_ROWS(bits, 8)                                                                                                        \
        }                                                                                                                                \
        PRODUCT_ROWS(bits, 6)                                                                                                            \
        PRODUCT_ROWS(bits, 4)                                                                                                            \
        PRODUCT_ROWS(bits, 2)                                                                                                            \
        if (rows > 0) {                                                                                                                  \
            tile_row(bits, weight, panel, x, first, out);                                                                                \
        }                                                                                                                                \
    }

PRODUCT(product_int4, 4)
PRODUCT(product_int8, 8)

#include "avx512_products8.inc"

#include "avx512_flash.inc"
#include "avx512_cache.inc"
#include "avx512_bytes.inc"

static void attention_plain(const HeadAttention *a) {
    if (sees_bytes(a)) {
        attention_bytes_seen(a);
    } else {
        attention_floats(a);
    }
}

const Kernels kernels_avx512 = {.name = "avx512", .int4 = product_int4, .int8 = product_int8, .quantize = quantize, .bytes = products_bytes,
                                .quantize_bytes = quantize_bytes, .attention = attention_plain, FLOAT_KERNELS};

#include "target_end.inc"

#include "avx512_bf16.inc"

#endif
