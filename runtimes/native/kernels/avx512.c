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
#define GROUP 3
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
#define v_load(p) ((vf)_mm512_loadu_ps(p))
#define v_store(p, v) _mm512_storeu_ps(p, (__m512)(v))
#define v_load_half(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p))))
#define v_store_half(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define v_set(x) ((vf)_mm512_set1_ps(x))
#define v_fma(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define v_sum(v) _mm512_reduce_add_ps((__m512)(v))
#define v_highest(v) _mm512_reduce_max_ps((__m512)(v))
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

#include "float_kernels.inc"

static void quantize(const float *x, size_t n, const QuantRows *out, size_t row) {
    for (size_t b = 0; b < out->blocks; b++) {
        const size_t at = row * out->blocks + b, begin = b * BLOCK, count = n > begin ? n - begin : 0;
        const __mmask16 low = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
        const __mmask16 high = count >= 32 ? 0xffff : count > 16 ? (__mmask16)((1u << (count - 16)) - 1) : 0;
        const __m512 v0 = _mm512_maskz_loadu_ps(low, x + begin), v1 = _mm512_maskz_loadu_ps(high, x + begin + 16);
        /* Compared as integers, NaN is larger than any number. */
        const __m512i bits = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(v0)), _mm512_castps_si512(_mm512_abs_ps(v1)));
        const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(bits))));
        const bool tiny = most < SMALLEST;
        const __m512 inverse = _mm512_set1_ps(tiny ? 0.0f : 127.0f / most);
        const __m512i i0 = _mm512_cvtps_epi32(_mm512_mul_ps(v0, inverse)), i1 = _mm512_cvtps_epi32(_mm512_mul_ps(v1, inverse));
        _mm_storeu_si128((__m128i *)(void *)(out->codes + at * BLOCK), _mm512_cvtsepi32_epi8(i0));
        _mm_storeu_si128((__m128i *)(void *)(out->codes + at * BLOCK + 16), _mm512_cvtsepi32_epi8(i1));
        out->scales[at] = tiny ? 0.0f : most / 127.0f;
        /* Of what was stored, not of i0 and i1: NaN saturates. */
        const __m256i codes = _mm256_loadu_si256((const __m256i *)(const void *)(out->codes + at * BLOCK));
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(8), codes);
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        out->offsets[at] = -_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
}

INLINE __m512i four_inputs(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

/* `n` rows (a constant where it is called) times a panel of `bits` bits. */
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
        __m512i w[8];
        UNROLL
        for (size_t g = 0; g < 4; g++) {
            if (bits == 4) {
                __m512i both = _mm512_load_si512((const void *)(at + g * 64));
                __asm__("" : "+v"(both)); /* loaded once, not by both of its readers */
                w[g] = _mm512_and_si512(both, nibble);
                /* For a single row the high codes stay where they are, 16 times too large, which costs one shift a block. */
                w[g + 4] = n == 1 ? _mm512_andnot_si512(nibble, both) : _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            } else {
                w[g] = _mm512_load_si512((const void *)(at + g * 64));
                w[g + 4] = _mm512_load_si512((const void *)(at + (g + 4) * 64));
            }
        }
        const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)(stored + (b >> shift & 1) * 32)));
        UNROLL
        for (size_t t = 0; t < n; t++) {
            const int8_t *line = codes + (t * blocks + b) * BLOCK;
            __m512i dot = _mm512_set1_epi32(bits == 4 ? offsets[t * blocks + b] : offsets[t * blocks + b] * 16);
            if (n == 1) { /* two sums side by side: nothing else hides the latency */
                __m512i other = _mm512_setzero_si512();
                UNROLL
                for (size_t g = 0; g < 4; g++) {
                    dot = _mm512_dpbusd_epi32(dot, w[g], four_inputs(line + g * 4));
                    other = _mm512_dpbusd_epi32(other, w[g + 4], four_inputs(line + (g + 4) * 4));
                }
                dot = _mm512_add_epi32(dot, bits == 4 ? _mm512_srai_epi32(other, 4) : other);
            } else {
                UNROLL
                for (size_t g = 0; g < 8; g++) {
                    dot = _mm512_dpbusd_epi32(dot, w[g], four_inputs(line + g * 4));
                }
            }
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(scales[t * blocks + b])), sums[t]);
        }
    }
    UNROLL
    for (size_t t = 0; t < n; t++) {
        _mm512_storeu_ps(out + t * stride, _mm512_mul_ps(sums[t], _mm512_set1_ps(weight->scale)));
    }
}

#define PRODUCT(name, bits)                                                                                                              \
    static void name(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride) { \
        for (; rows >= ROWS; rows -= ROWS, first += ROWS, out += ROWS * stride) {                                                        \
            tile(bits, weight, panel, x, first, ROWS, out, stride);                                                                      \
        }                                                                                                                                \
        for (; rows >= 4; rows -= 4, first += 4, out += 4 * stride) {                                                                    \
            tile(bits, weight, panel, x, first, 4, out, stride);                                                                         \
        }                                                                                                                                \
        for (; rows > 0; rows--, first++, out += stride) {                                                                               \
            tile(bits, weight, panel, x, first, 1, out, stride);                                                                         \
        }                                                                                                                                \
    }

PRODUCT(product_int4, 4)
PRODUCT(product_int8, 8)

BYTES_KERNEL(products_bytes_scalar)

const Kernels kernels_avx512 = {.name = "avx512", .int4 = product_int4, .int8 = product_int8, .quantize = quantize, .bytes = bytes_products_bytes_scalar,
                                .quantize_bytes = quantize_bytes_scalar, FLOAT_KERNELS};

#include "target_end.inc"

#endif
