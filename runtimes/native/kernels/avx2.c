/* AVX2 with FMA and F16C: 8 outputs to a register, VPMADDUBSW multiplies unsigned with signed bytes into saturating 16-bit pairs. */
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#define TARGET_ISA "avx2,fma,f16c"
#include "target_begin.inc"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define VW 8
#define ROWS 5
#define FLASH_ROWS 6
#define FLASH_VECTORS 2
#define GROUP 2
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
#define v_load(p) ((vf)_mm256_loadu_ps(p))
#define v_store(p, v) _mm256_storeu_ps(p, (__m256)(v))
#define v_load_half(p) ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p))))
#define v_store_half(p, v) _mm_storeu_si128((__m128i *)(void *)(p), _mm256_cvtps_ph((__m256)(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define v_load_codes(p) ((vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p)))))
#define v_set(x) ((vf)_mm256_set1_ps(x))
#define v_fma(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define v_max(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define v_bits(v) ((vi)(v))
#define v_floats(v) ((vf)(v))
#define v_power(n) v_floats(((n) + 127) << 23)
#define v_less(a, b) ((vi)_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_LT_OQ))
#define v_choose(mask, a, b) ((vf)_mm256_blendv_ps((__m256)(b), (__m256)(a), (__m256)(mask)))

static inline __attribute__((always_inline)) float v_sum(vf v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline __attribute__((always_inline)) float v_highest(vf v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline __attribute__((always_inline)) vf v_sums(const vf v[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4], (__m256)v[5]), _mm256_hadd_ps((__m256)v[6], (__m256)v[7]));
    return (vf)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#include "float_kernels.inc"

INLINE int32_t sum_of_lanes(__m256i v) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

static void quantize(const float *x, size_t n, const QuantRows *out, size_t row) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (size_t b = 0; b < out->blocks; b++) {
        const size_t at = row * out->blocks + b, begin = b * BLOCK;
        float buffer[BLOCK] = {0};
        const float *from = x + begin;
        if (n < begin + BLOCK) {
            if (n > begin) {
                memcpy(buffer, from, (n - begin) * sizeof *from);
            }
            from = buffer;
        }
        __m256 v[4];
        __m256i bits = _mm256_setzero_si256(); /* compared as integers, NaN is larger than any number */
        UNROLL
        for (size_t i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(from + i * 8);
            bits = _mm256_max_epi32(bits, _mm256_castps_si256(_mm256_and_ps(v[i], magnitude)));
        }
        const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
        const bool tiny = most < SMALLEST;
        const __m256 inverse = _mm256_set1_ps(tiny ? 0.0f : 127.0f / most);
        __m256i i[4];
        UNROLL
        for (size_t j = 0; j < 4; j++) {
            i[j] = _mm256_cvtps_epi32(_mm256_mul_ps(v[j], inverse));
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]));
        const __m256i codes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(void *)(out->codes + at * BLOCK), codes);
        out->scales[at] = tiny ? 0.0f : most / 127.0f;
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(8), codes);
        out->offsets[at] = -sum_of_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
}

INLINE __m256i four_inputs(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm256_set1_epi32(four);
}

#define TILE_ROWS 4

/* Half a panel of one block of 4-bit weights: 8 groups of 4 inputs of 8 outputs. */
INLINE void load_half(const uint8_t *at, __m256i w[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    UNROLL
    for (size_t g = 0; g < 4; g++) {
        const __m256i both = _mm256_load_si256((const __m256i *)(const void *)(at + g * 64));
        w[g] = _mm256_and_si256(both, nibble);
        w[g + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    }
}

/* 32 products of four inputs and 8 outputs, w given by its magnitude and sign: |w| ≤ 128 times ±x is at most 32,512 for a pair, so each
 * pair is widened by itself. */
INLINE __m256i products_of(__m256i magnitude, __m256i w, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}

/* Products of a block with one row, 4 bits: eight pairs of at most 15 · 127 · 2 stay below 2^15. */
INLINE __m256i dot_half(const __m256i w[8], const int8_t *line, int32_t offset) {
    __m256i pairs = _mm256_maddubs_epi16(w[0], four_inputs(line));
    UNROLL
    for (size_t g = 1; g < 8; g++) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[g], four_inputs(line + g * 4)));
    }
    return _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), _mm256_set1_epi32(offset));
}

/* Products of a block with `n` rows, 8 bits: group by group, so that a magnitude is taken once for all rows. */
INLINE void dots_half(const uint8_t *at, const int8_t *codes, size_t row_bytes, const size_t n, __m256i dots[TILE_ROWS]) {
    UNROLL
    for (size_t t = 0; t < n; t++) {
        dots[t] = _mm256_setzero_si256();
    }
    UNROLL
    for (size_t g = 0; g < 8; g++) {
        const __m256i w = _mm256_xor_si256(_mm256_load_si256((const __m256i *)(const void *)(at + g * 64)), _mm256_set1_epi8((char)0x80));
        const __m256i magnitude = _mm256_abs_epi8(w);
        UNROLL
        for (size_t t = 0; t < n; t++) {
            dots[t] = _mm256_add_epi32(dots[t], products_of(magnitude, w, four_inputs(codes + t * row_bytes + g * 4)));
        }
    }
}

/* `n` rows (a constant where it is called) times half a panel, or a whole one where `halves` is 2. */
INLINE void tile(const int bits, const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, const size_t n, size_t half,
                 const size_t halves, float *out, size_t stride) {
    const size_t blocks = x->blocks;
    const unsigned shift = panel_scale_shift(weight);
    const uint8_t *at = panel, *scales_at = panel;
    const int8_t *codes = x->codes + first * blocks * BLOCK;
    const float *scales = x->scales + first * blocks;
    const int32_t *offsets = x->offsets + first * blocks;
    __m256 sums[ROWS * 2];
    UNROLL
    for (size_t t = 0; t < n * halves; t++) {
        sums[t] = _mm256_setzero_ps();
    }
    for (size_t b = 0; b < blocks; b++, at += (size_t)bits * 64) {
        if (panel_has_scales(shift, b)) {
            scales_at = at;
            at += 64;
        }
        UNROLL
        for (size_t h = 0; h < halves; h++) {
            __m256i w[8], dots[TILE_ROWS];
            if (bits == 4) {
                load_half(at + (half + h) * 32, w);
            } else {
                dots_half(at + (half + h) * 32, codes + b * BLOCK, blocks * BLOCK, n, dots);
            }
            const uint8_t *stored = scales_at + (b >> shift & 1) * 32 + (half + h) * 16;
            const __m256 scale = _mm256_cvtph_ps(_mm_load_si128((const __m128i *)(const void *)stored));
            UNROLL
            for (size_t t = 0; t < n; t++) {
                const __m256i dot = bits == 4 ? dot_half(w, codes + (t * blocks + b) * BLOCK, offsets[t * blocks + b]) : dots[t];
                const __m256 factor = _mm256_mul_ps(scale, _mm256_broadcast_ss(scales + t * blocks + b));
                sums[t * halves + h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, sums[t * halves + h]);
            }
        }
    }
    UNROLL
    for (size_t t = 0; t < n; t++) {
        UNROLL
        for (size_t h = 0; h < halves; h++) {
            _mm256_storeu_ps(out + t * stride + (half + h) * 8, _mm256_mul_ps(sums[t * halves + h], _mm256_set1_ps(weight->scale)));
        }
    }
}

#define PRODUCT(name, bits)                                                                                                              \
    static void name(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride) { \
        for (; rows >= TILE_ROWS; rows -= TILE_ROWS, first += TILE_ROWS, out += TILE_ROWS * stride) {                                    \
            tile(bits, weight, panel, x, first, TILE_ROWS, 0, 1, out, stride);                                                           \
            tile(bits, weight, panel, x, first, TILE_ROWS, 1, 1, out, stride);                                                           \
        }                                                                                                                                \
        for (; rows > 0; rows--, first++, out += stride) {                                                                               \
            tile(bits, weight, panel, x, first, 1, 0, 2, out, stride);                                                                   \
        }                                                                                                                                \
    }

PRODUCT(product_int4, 4)
PRODUCT(product_int8, 8)

static void quantize_bytes(const float *x, size_t n, const ByteRows *out, size_t row) {
    vf low = v_set(0.0f), high = v_set(0.0f); /* 0 is a code: beyond the depth, and where a ReLU was */
    __m256i largest = _mm256_setzero_si256(); /* as integers: from infinity's bits on, something is not finite */
    for (size_t i = 0; i < n; i += VW) {
        const vf v = n - i < VW ? load_some(x + i, n - i) : v_load(x + i);
        low = (vf)_mm256_min_ps((__m256)low, (__m256)v);
        high = v_max(high, v);
        largest = _mm256_max_epi32(largest, _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0x7fffffff)));
    }
    const bool finite = _mm256_movemask_epi8(_mm256_cmpgt_epi32(largest, _mm256_set1_epi32(0x7f7fffff))) == 0;
    float inverse;
    out->scales[row] = byte_scale(-v_highest(-low), v_highest(high), finite, &inverse, &out->zeros[row]);
    uint8_t *codes = out->codes + row * out->stride;
    const __m256i zero = _mm256_set1_epi32(out->zeros[row]);
    for (size_t i = 0; i < n; i += VW) {
        const vf v = (n - i < VW ? load_some(x + i, n - i) : v_load(x + i)) * v_set(inverse);
        const __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)v), zero);
        const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        const __m128i bytes = _mm_packus_epi16(pairs, pairs);
        if (n - i < VW) {
            uint8_t rest[16];
            _mm_storeu_si128((__m128i *)(void *)rest, bytes);
            memcpy(codes + i, rest, n - i);
        } else {
            _mm_storel_epi64((__m128i *)(void *)(codes + i), bytes);
        }
    }
    memset(codes + n, 0, out->stride - n);
}

/* `n` rows (a constant where it is called) times 8 outputs. The activations less 128 give the magnitude here: −128 has one, and no sign to turn. */
INLINE void tile_bytes(const ByteMatrix *weight, size_t panel, size_t half, const ByteRows *x, size_t first, const size_t n, bool add, float *out,
                       size_t stride) {
    const size_t bytes = byte_panel(weight->depth), output = panel * PANEL + half * 8;
    const int8_t *at = weight->codes + panel * bytes + half * 32, *end = at + bytes;
    const uint8_t *codes = x->codes + first * x->stride;
    __m256i dots[TILE_ROWS];
    UNROLL
    for (size_t t = 0; t < n; t++) {
        dots[t] = _mm256_setzero_si256();
    }
    for (; at < end; at += 64, codes += 4) {
        const __m256i w = _mm256_load_si256((const __m256i *)(const void *)at);
        UNROLL
        for (size_t t = 0; t < n; t++) {
            const __m256i four = _mm256_xor_si256(four_inputs((const int8_t *)codes + t * x->stride), _mm256_set1_epi8((char)0x80));
            dots[t] = _mm256_add_epi32(dots[t], products_of(_mm256_abs_epi8(four), four, w));
        }
    }
    const vf scale = v_load(weight->scales + output), bias = weight->bias != NULL ? v_load(weight->bias + output) : v_set(0.0f);
    const __m256i sums = _mm256_loadu_si256((const __m256i *)(const void *)(weight->sums + output));
    UNROLL
    for (size_t t = 0; t < n; t++) {
        const __m256i dot = _mm256_add_epi32(dots[t], _mm256_mullo_epi32(sums, _mm256_set1_epi32(128 - x->zeros[first + t])));
        const vf value = v_fma((vf)_mm256_cvtepi32_ps(dot), scale * v_set(x->scales[first + t]), bias);
        v_store(out + t * stride, add ? v_load(out + t * stride) + value : value);
    }
}

static void products_bytes(const ByteMatrix *weight, size_t panel, size_t panels, const ByteRows *x, size_t first, size_t rows, bool add, float *out,
                           size_t stride) {
    for (size_t p = 0; p < 2 * panels; p++) {
        size_t row = 0;
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS) {
            tile_bytes(weight, panel + p / 2, p % 2, x, first + row, TILE_ROWS, add, out + row * stride + p * 8, stride);
        }
        for (; row < rows; row++) {
            tile_bytes(weight, panel + p / 2, p % 2, x, first + row, 1, add, out + row * stride + p * 8, stride);
        }
    }
}

BYTES_KERNEL(products_bytes)

const Kernels kernels_avx2 = {.name = "avx2", .int4 = product_int4, .int8 = product_int8, .quantize = quantize, .bytes = bytes_products_bytes,
                                .quantize_bytes = quantize_bytes, .attention = attention_floats, FLOAT_KERNELS};

#include "target_end.inc"

#endif
