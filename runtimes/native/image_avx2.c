/* AVX2: 8 sums to a register, VPMADDWD multiplies two values with 16 bits of their weights. */
#include "image_kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#define TARGET_ISA "avx2"
#include "kernels/target_begin.inc"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define HIGH_SHIFT 15
#define WORDS 4

static void pack(const int32_t weights[TAP_GROUP], int32_t *words) {
    uint32_t low[TAP_GROUP], high[TAP_GROUP];
    for (size_t i = 0; i < TAP_GROUP; i++) {
        const int32_t rest = (weights[i] & 0x7fff) - ((weights[i] & 0x4000) << 1);
        low[i] = (uint32_t)rest & 0xffff;
        high[i] = (uint32_t)((weights[i] - rest) / (1 << HIGH_SHIFT)) & 0xffff;
    }
    for (size_t pair = 0; pair < 2; pair++) {
        words[pair] = (int32_t)(low[pair * 2] | low[pair * 2 + 1] << 16);
        words[2 + pair] = (int32_t)(high[pair * 2] | high[pair * 2 + 1] << 16);
    }
}

INLINE __m256i total(__m256i start, __m256i low, __m256i high) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_add_epi32(start, low), _mm256_slli_epi32(high, HIGH_SHIFT)), PRECISION_BITS);
}

INLINE void column32(const uint8_t *source, size_t stride, size_t count, const int32_t *words, __m256i start, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low[4] = {zero, zero, zero, zero}, high[4] = {zero, zero, zero, zero};
    for (size_t i = 0; i < count; i += 2, source += 2 * stride) {
        const int32_t *weights = words + i / TAP_GROUP * WORDS + i / 2 % 2;
        const __m256i a = _mm256_loadu_si256((const void *)source);
        const __m256i b = _mm256_loadu_si256((const void *)(source + (count - i > 1 ? stride : 0))); /* or its weight is 0 */
        const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
        const __m256i twos[4] = {_mm256_unpacklo_epi8(ab_low, zero), _mm256_unpackhi_epi8(ab_low, zero), _mm256_unpacklo_epi8(ab_high, zero),
                                 _mm256_unpackhi_epi8(ab_high, zero)};
        const __m256i low_weights = _mm256_set1_epi32(weights[0]), high_weights = _mm256_set1_epi32(weights[2]);
#pragma GCC unroll 4
        for (size_t k = 0; k < 4; k++) {
            low[k] = _mm256_add_epi32(low[k], _mm256_madd_epi16(twos[k], low_weights));
            high[k] = _mm256_add_epi32(high[k], _mm256_madd_epi16(twos[k], high_weights));
        }
    }
    const __m256i first = _mm256_packs_epi32(total(start, low[0], high[0]), total(start, low[1], high[1]));
    const __m256i second = _mm256_packs_epi32(total(start, low[2], high[2]), total(start, low[3], high[3]));
    _mm256_storeu_si256((void *)out, _mm256_packus_epi16(first, second));
}

static void column(const uint8_t *source, size_t stride, size_t count, const int32_t *words, int32_t start, uint8_t *out, size_t n) {
    const __m256i begin = _mm256_set1_epi32(start);
    size_t x = 0;
    for (; x + 32 <= n; x += 32) {
        column32(source + x, stride, count, words, begin, out + x);
    }
    if (x < n && n >= 32) { /* the last 32, some of them a second time */
        column32(source + n - 32, stride, count, words, begin, out + n - 32);
        return;
    }
    for (; x < n; x++) {
        int32_t low = 0, high = 0;
        for (size_t i = 0; i < count; i++) {
            const int32_t *weights = words + i / TAP_GROUP * WORDS + i / 2 % 2;
            low += source[i * stride + x] * (int16_t)((uint32_t)weights[0] >> (i % 2 * 16));
            high += source[i * stride + x] * (int16_t)((uint32_t)weights[2] >> (i % 2 * 16));
        }
        out[x] = clip_u8((int32_t)((uint32_t)start + (uint32_t)low + ((uint32_t)high << HIGH_SHIFT)));
    }
}

/* The same place of two lines, each in a half of the register. */
INLINE __m256i two_lines(const uint8_t *const *lines, size_t at) {
    const __m128i *a = (const void *)(lines[0] + at), *b = (const void *)(lines[1] + at);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(a)), _mm_loadu_si128(b), 1);
}

INLINE void four_lines(const uint8_t *const *lines, uint8_t *const *out, const ResampleWeights *w, size_t x) {
    /* r g b r g b … → r r g g b b 0 0 in 16 bits each, of the first two pixels and of the next two */
    const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    const __m256i zero = _mm256_setzero_si256();
    const int32_t *weights = w->words + x * w->stride;
    __m256i low[2] = {zero, zero}, high[2] = {zero, zero};
    size_t at = w->first[x] * 3;
    for (size_t i = 0; i < w->count[x]; i += TAP_GROUP, at += 3 * TAP_GROUP, weights += WORDS) {
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; half++) {
            const __m256i pixels = two_lines(lines + half * 2, at);
            const __m256i twos[2] = {_mm256_shuffle_epi8(pixels, first), _mm256_shuffle_epi8(pixels, second)};
#pragma GCC unroll 2
            for (size_t pair = 0; pair < 2; pair++) {
                low[half] = _mm256_add_epi32(low[half], _mm256_madd_epi16(twos[pair], _mm256_set1_epi32(weights[pair])));
                high[half] = _mm256_add_epi32(high[half], _mm256_madd_epi16(twos[pair], _mm256_set1_epi32(weights[2 + pair])));
            }
        }
    }
    const __m256i start = _mm256_set1_epi32(w->starts[x]);
    const __m256i words = _mm256_packs_epi32(total(start, low[0], high[0]), total(start, low[1], high[1]));
    uint32_t pixels[8];
    _mm256_storeu_si256((void *)pixels, _mm256_packus_epi16(words, words));
    const size_t some = x + 1 < w->size ? 4 : 3; /* the byte too much is the next pixel's */
    memcpy(out[0] + x * 3, &pixels[0], some);
    memcpy(out[1] + x * 3, &pixels[4], some);
    memcpy(out[2] + x * 3, &pixels[1], some);
    memcpy(out[3] + x * 3, &pixels[5], some);
}

static void rows(const uint8_t *const lines[IMAGE_LINES], uint8_t *const out[IMAGE_LINES], const ResampleWeights *w) {
    for (size_t line = 0; line < IMAGE_LINES; line += 4) {
        for (size_t x = 0; x < w->size; x++) {
            four_lines(lines + line, out + line, w, x);
        }
    }
}

const ImageKernels image_kernels_avx2 = {.name = "avx2", .words = WORDS, .pack = pack, .column = column, .rows = rows};

#include "kernels/target_end.inc"

#endif
