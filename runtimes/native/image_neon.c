/* NEON with the dot product (Armv8.2): 4 sums to a register, SDOT multiplies four values less 128 with four signed bytes of their weights. */
#include "image_kernels.h"

#if defined(__aarch64__)

#if defined(__clang__)
#define TARGET_ISA "dotprod"
#else
#define TARGET_ISA "arch=armv8.2-a+dotprod"
#endif
#include "kernels/target_begin.inc"

#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int32x4_t total(int32x4_t start, const int32x4_t sums[3]) {
    const int32x4_t low = vaddq_s32(vaddq_s32(start, sums[0]), vshlq_n_s32(sums[1], 8));
    return vshrq_n_s32(vaddq_s32(low, vshlq_n_s32(sums[2], 16)), PRECISION_BITS);
}

INLINE int8x16_t values(const uint8_t *at) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at), vdupq_n_u8(128))); }

INLINE int8x16_t digit_of(const int32_t *word) { return vreinterpretq_s8_s32(vdupq_n_s32(*word)); }

INLINE void column16(const uint8_t *source, size_t stride, size_t count, const int32_t *words, int32x4_t start, uint8_t *out) {
    int32x4_t sums[4][3];
    for (size_t k = 0; k < 4; k++) {
        for (size_t d = 0; d < 3; d++) {
            sums[k][d] = vdupq_n_s32(0);
        }
    }
    for (size_t i = 0; i < count; i += TAP_GROUP, source += TAP_GROUP * stride, words += 3) {
        const size_t left = count - i; /* what is not there has weights of 0 */
        const int8x16_t a = values(source), b = values(source + (left > 1 ? stride : 0));
        const int8x16_t c = values(source + (left > 2 ? 2 * stride : 0)), d = values(source + (left > 3 ? 3 * stride : 0));
        const int16x8_t ab_low = vreinterpretq_s16_s8(vzip1q_s8(a, b)), ab_high = vreinterpretq_s16_s8(vzip2q_s8(a, b));
        const int16x8_t cd_low = vreinterpretq_s16_s8(vzip1q_s8(c, d)), cd_high = vreinterpretq_s16_s8(vzip2q_s8(c, d));
        const int16x8_t fours[4] = {vzip1q_s16(ab_low, cd_low), vzip2q_s16(ab_low, cd_low), vzip1q_s16(ab_high, cd_high),
                                    vzip2q_s16(ab_high, cd_high)};
#pragma GCC unroll 3
        for (size_t digit = 0; digit < 3; digit++) {
            const int8x16_t weight = digit_of(words + digit);
#pragma GCC unroll 4
            for (size_t k = 0; k < 4; k++) {
                sums[k][digit] = vdotq_s32(sums[k][digit], vreinterpretq_s8_s16(fours[k]), weight);
            }
        }
    }
    const int16x8_t low = vcombine_s16(vqmovn_s32(total(start, sums[0])), vqmovn_s32(total(start, sums[1])));
    const int16x8_t high = vcombine_s16(vqmovn_s32(total(start, sums[2])), vqmovn_s32(total(start, sums[3])));
    vst1q_u8(out, vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
}

static void column(const uint8_t *source, size_t stride, size_t count, const int32_t *words, int32_t start, uint8_t *out, size_t n) {
    const int32x4_t begin = vdupq_n_s32(start);
    size_t x = 0;
    for (; x + 16 <= n; x += 16) {
        column16(source + x, stride, count, words, begin, out + x);
    }
    if (x < n && n >= 16) { /* the last 16, some of them a second time */
        column16(source + n - 16, stride, count, words, begin, out + n - 16);
        return;
    }
    for (; x < n; x++) {
        uint32_t sum = (uint32_t)start;
        for (size_t i = 0; i < count; i++) {
            const int32_t value = source[i * stride + x] - 128;
            for (size_t digit = 0; digit < 3; digit++) {
                const int8_t part = (int8_t)((uint32_t)words[i / TAP_GROUP * 3 + digit] >> (i % TAP_GROUP * 8));
                sum += (uint32_t)(value * part) << (8 * digit);
            }
        }
        out[x] = clip_u8((int32_t)sum);
    }
}

INLINE void four_lines(const uint8_t *const *lines, uint8_t *const *out, const ResampleWeights *w, size_t x) {
    /* r g b r g b r g b r g b → rrrr gggg bbbb and four that count for nothing */
    static const uint8_t BY_COLOUR[16] = {0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 255, 255, 255, 255};
    const uint8x16_t by_colour = vld1q_u8(BY_COLOUR);
    const int32_t *weights = w->words + x * w->stride;
    int32x4_t sums[4][3];
    for (size_t line = 0; line < 4; line++) {
        for (size_t d = 0; d < 3; d++) {
            sums[line][d] = vdupq_n_s32(0);
        }
    }
    size_t at = w->first[x] * 3;
    for (size_t i = 0; i < w->count[x]; i += TAP_GROUP, at += 3 * TAP_GROUP, weights += 3) {
        const int8x16_t digits[3] = {digit_of(weights), digit_of(weights + 1), digit_of(weights + 2)};
#pragma GCC unroll 4
        for (size_t line = 0; line < 4; line++) {
            const int8x16_t pixels = vqtbl1q_s8(values(lines[line] + at), by_colour);
#pragma GCC unroll 3
            for (size_t digit = 0; digit < 3; digit++) {
                sums[line][digit] = vdotq_s32(sums[line][digit], pixels, digits[digit]);
            }
        }
    }
    const int32x4_t start = vdupq_n_s32(w->starts[x]);
    const size_t some = x + 1 < w->size ? 4 : 3; /* the byte too much is the next pixel's */
    for (size_t line = 0; line < 4; line++) {
        const int16x4_t words = vqmovn_s32(total(start, sums[line]));
        const uint32_t pixel = vget_lane_u32(vreinterpret_u32_u8(vqmovun_s16(vcombine_s16(words, words))), 0);
        memcpy(out[line] + x * 3, &pixel, some);
    }
}

static void rows(const uint8_t *const lines[IMAGE_LINES], uint8_t *const out[IMAGE_LINES], const ResampleWeights *w) {
    for (size_t line = 0; line < IMAGE_LINES; line += 4) {
        for (size_t x = 0; x < w->size; x++) {
            four_lines(lines + line, out + line, w, x);
        }
    }
}

const ImageKernels image_kernels_neon = {.name = "neon", .words = 3, .bias = 128, .pack = pack_bytes, .column = column, .rows = rows};

#include "kernels/target_end.inc"

#endif
