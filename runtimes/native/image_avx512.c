/* AVX-512 with VNNI: 16 sums to a register, VPDPBUSD multiplies four unsigned values with four signed bytes of their weights. */
#include "image_kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#define TARGET_ISA "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#include "kernels/target_begin.inc"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE __m512i total(__m512i start, const __m512i sums[3]) {
    const __m512i low = _mm512_add_epi32(_mm512_add_epi32(start, sums[0]), _mm512_slli_epi32(sums[1], 8));
    return _mm512_srai_epi32(_mm512_add_epi32(low, _mm512_slli_epi32(sums[2], 16)), PRECISION_BITS);
}

static void column(const uint8_t *source, size_t stride, size_t count, const int32_t *words, int32_t start, uint8_t *out, size_t n) {
    const __m512i begin = _mm512_set1_epi32(start);
    for (size_t x = 0; x < n; x += 64) {
        const __mmask64 there = n - x < 64 ? ((__mmask64)1 << (n - x)) - 1 : ~(__mmask64)0;
        __m512i sums[4][3];
        for (size_t k = 0; k < 4; k++) {
            for (size_t d = 0; d < 3; d++) {
                sums[k][d] = _mm512_setzero_si512();
            }
        }
        const uint8_t *at = source + x;
        const int32_t *weights = words;
        for (size_t i = 0; i < count; i += TAP_GROUP, at += TAP_GROUP * stride, weights += 3) {
            const size_t left = count - i; /* what is not there has weights of 0 */
            const __m512i a = _mm512_maskz_loadu_epi8(there, at);
            const __m512i b = _mm512_maskz_loadu_epi8(there, at + (left > 1 ? stride : 0));
            const __m512i c = _mm512_maskz_loadu_epi8(there, at + (left > 2 ? 2 * stride : 0));
            const __m512i d = _mm512_maskz_loadu_epi8(there, at + (left > 3 ? 3 * stride : 0));
            const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
            const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
            const __m512i fours[4] = {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                                      _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
#pragma GCC unroll 3
            for (size_t digit = 0; digit < 3; digit++) {
                const __m512i weight = _mm512_set1_epi32(weights[digit]);
#pragma GCC unroll 4
                for (size_t k = 0; k < 4; k++) {
                    sums[k][digit] = _mm512_dpbusd_epi32(sums[k][digit], fours[k], weight);
                }
            }
        }
        const __m512i low = _mm512_packs_epi32(total(begin, sums[0]), total(begin, sums[1]));
        const __m512i high = _mm512_packs_epi32(total(begin, sums[2]), total(begin, sums[3]));
        _mm512_mask_storeu_epi8(out + x, there, _mm512_packus_epi16(low, high));
    }
}

/* The same place of four lines, each in a quarter of the register. */
INLINE __m512i four_lines(const uint8_t *const *lines, size_t at) {
    const __m128i *a = (const void *)(lines[0] + at), *b = (const void *)(lines[1] + at);
    const __m128i *c = (const void *)(lines[2] + at), *d = (const void *)(lines[3] + at);
    const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(a)), _mm_loadu_si128(b), 1);
    const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(c)), _mm_loadu_si128(d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

static void rows(const uint8_t *const lines[IMAGE_LINES], uint8_t *const out[IMAGE_LINES], const ResampleWeights *w) {
    /* r g b r g b r g b r g b → rrrr gggg bbbb 0000 */
    const __m512i by_colour = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    for (size_t x = 0; x < w->size; x++) {
        const int32_t *weights = w->words + x * w->stride;
        __m512i sums[2][3];
        for (size_t half = 0; half < 2; half++) {
            for (size_t d = 0; d < 3; d++) {
                sums[half][d] = _mm512_setzero_si512();
            }
        }
        size_t at = w->first[x] * 3;
        for (size_t i = 0; i < w->count[x]; i += TAP_GROUP, at += 3 * TAP_GROUP, weights += 3) {
            const __m512i upper = _mm512_shuffle_epi8(four_lines(lines, at), by_colour);
            const __m512i lower = _mm512_shuffle_epi8(four_lines(lines + 4, at), by_colour);
#pragma GCC unroll 3
            for (size_t digit = 0; digit < 3; digit++) {
                const __m512i weight = _mm512_set1_epi32(weights[digit]);
                sums[0][digit] = _mm512_dpbusd_epi32(sums[0][digit], upper, weight);
                sums[1][digit] = _mm512_dpbusd_epi32(sums[1][digit], lower, weight);
            }
        }
        const __m512i start = _mm512_set1_epi32(w->starts[x]);
        const __m512i words = _mm512_packs_epi32(total(start, sums[0]), total(start, sums[1]));
        const __m512i bytes = _mm512_packus_epi16(words, words); /* each quarter: a pixel of one line, and of the one 4 below */
        uint32_t pixels[16];
        _mm512_storeu_si512(pixels, bytes);
        const size_t some = x + 1 < w->size ? 4 : 3; /* the byte too much is the next pixel's */
        for (size_t line = 0; line < 4; line++) {
            memcpy(out[line] + x * 3, &pixels[line * 4], some);
            memcpy(out[line + 4] + x * 3, &pixels[line * 4 + 1], some);
        }
    }
}

const ImageKernels image_kernels_avx512 = {.name = "avx512", .words = 3, .pack = pack_bytes, .column = column, .rows = rows};

#include "kernels/target_end.inc"

#endif
