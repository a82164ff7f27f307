/* NEON with the dot product (Armv8.2): 4 outputs to a register, SDOT multiplies signed bytes with one lane of the activations. */
#include "kernels.h"

#if defined(__aarch64__)

#if defined(__clang__)
#define TARGET_ISA "dotprod"
#else
#define TARGET_ISA "arch=armv8.2-a+dotprod"
#endif
#include "target_begin.inc"

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#define VW 4
#define ROWS 4
#define FLASH_ROWS 8
#define FLASH_VECTORS 2
#define GROUP 4
typedef float32x4_t vf;
typedef int32x4_t vi;
#define v_load(p) vld1q_f32(p)
#define v_store(p, v) vst1q_f32(p, v)
#define v_load_half(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define v_store_half(p, v) vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)))
#define v_load_codes(p) codes_of(p)
#define v_set(x) vdupq_n_f32(x)
#define v_fma(a, b, c) vfmaq_f32(c, a, b)
#define v_sum(v) vaddvq_f32(v)
#define v_highest(v) vmaxvq_f32(v)
#define v_sums(v) vpaddq_f32(vpaddq_f32((v)[0], (v)[1]), vpaddq_f32((v)[2], (v)[3]))
#define v_max(a, b) vmaxq_f32(a, b)
#define v_bits(v) vreinterpretq_s32_f32(v)
#define v_floats(v) vreinterpretq_f32_s32(v)
#define v_power(n) v_floats(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23))
#define v_less(a, b) vreinterpretq_s32_u32(vcltq_f32(a, b))
#define v_choose(mask, a, b) vbslq_f32(vreinterpretq_u32_s32(mask), a, b)

static inline __attribute__((always_inline)) vf codes_of(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}

#include "float_kernels.inc"

static void quantize(const float *x, size_t n, const QuantRows *out, size_t row) {
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
        float32x4_t v[8];
        int32x4_t bits = vdupq_n_s32(0); /* compared as integers, NaN is larger than any number */
        UNROLL
        for (size_t i = 0; i < 8; i++) {
            v[i] = vld1q_f32(from + i * 4);
            bits = vmaxq_s32(bits, vreinterpretq_s32_f32(vabsq_f32(v[i])));
        }
        const int32_t highest = vmaxvq_s32(bits);
        float most;
        memcpy(&most, &highest, sizeof most);
        const bool tiny = most < SMALLEST;
        const float inverse = tiny ? 0.0f : 127.0f / most;
        int16x8_t sum = vdupq_n_s16(0);
        UNROLL
        for (size_t i = 0; i < 4; i++) {
            const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i], inverse)), high = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i + 1], inverse));
            const int8x8_t codes = vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
            vst1_s8(out->codes + at * BLOCK + i * 8, codes);
            sum = vaddw_s8(sum, codes);
        }
        out->scales[at] = tiny ? 0.0f : most / 127.0f;
        out->offsets[at] = -8 * vaddlvq_s16(sum);
    }
}

/* A quarter of a panel of one block: 8 groups of 4 inputs of 4 outputs. */
INLINE void load_quarter(const int bits, const uint8_t *at, size_t quarter, int8x16_t w[8]) {
    UNROLL
    for (size_t g = 0; g < 4; g++) {
        const uint8x16_t both = vld1q_u8(at + g * 64 + quarter * 16);
        if (bits == 4) {
            w[g] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
            w[g + 4] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        } else { /* code + 128 → code */
            w[g] = vreinterpretq_s8_u8(veorq_u8(both, vdupq_n_u8(0x80)));
            w[g + 4] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at + (g + 4) * 64 + quarter * 16), vdupq_n_u8(0x80)));
        }
    }
}

INLINE int32x4_t dot_quarter(const int8x16_t w[8], const int8_t *line, int32_t offset) {
    const int8x16_t low = vld1q_s8(line), high = vld1q_s8(line + 16);
    int32x4_t a = vdotq_laneq_s32(vdupq_n_s32(offset), w[0], low, 0), b = vdotq_laneq_s32(vdupq_n_s32(0), w[4], high, 0);
    a = vdotq_laneq_s32(a, w[1], low, 1);
    b = vdotq_laneq_s32(b, w[5], high, 1);
    a = vdotq_laneq_s32(a, w[2], low, 2);
    b = vdotq_laneq_s32(b, w[6], high, 2);
    a = vdotq_laneq_s32(a, w[3], low, 3);
    b = vdotq_laneq_s32(b, w[7], high, 3);
    return vaddq_s32(a, b);
}

/* `n` rows times `quarters` quarters of a panel, from `first_quarter` on; both are constants where it is called. */
INLINE void tile(const int bits, const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, const size_t n, size_t first_quarter,
                 const size_t quarters, float *out, size_t stride) {
    const size_t blocks = x->blocks;
    const unsigned shift = panel_scale_shift(weight);
    const uint8_t *at = panel, *scales_at = panel;
    float32x4_t sums[8];
    UNROLL
    for (size_t t = 0; t < n * quarters; t++) {
        sums[t] = vdupq_n_f32(0.0f);
    }
    for (size_t b = 0; b < blocks; b++, at += (size_t)bits * 64) {
        if (panel_has_scales(shift, b)) {
            scales_at = at;
            at += 64;
        }
        UNROLL
        for (size_t q = 0; q < quarters; q++) {
            int8x16_t w[8];
            load_quarter(bits, at, first_quarter + q, w);
            const uint16_t *stored = (const uint16_t *)(const void *)scales_at + (b >> shift & 1) * PANEL + (first_quarter + q) * 4;
            const float32x4_t scale = v_load_half(stored);
            UNROLL
            for (size_t t = 0; t < n; t++) {
                const size_t place = (first + t) * blocks + b;
                const int32x4_t dot = dot_quarter(w, x->codes + place * BLOCK, bits == 4 ? x->offsets[place] : 0);
                sums[t * quarters + q] = vfmaq_f32(sums[t * quarters + q], vcvtq_f32_s32(dot), vmulq_n_f32(scale, x->scales[place]));
            }
        }
    }
    UNROLL
    for (size_t t = 0; t < n; t++) {
        UNROLL
        for (size_t q = 0; q < quarters; q++) {
            vst1q_f32(out + t * stride + (first_quarter + q) * 4, vmulq_n_f32(sums[t * quarters + q], weight->scale));
        }
    }
}

#define TILE_ROWS 8
#define PRODUCT(name, bits)                                                                                                              \
    static void name(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride) { \
        for (; rows >= TILE_ROWS; rows -= TILE_ROWS, first += TILE_ROWS, out += TILE_ROWS * stride) {                                    \
            for (size_t quarter = 0; quarter < 4; quarter++) {                                                                           \
                tile(bits, weight, panel, x, first, TILE_ROWS, quarter, 1, out, stride);                                                 \
            }                                                                                                                            \
        }                                                                                                                                \
        for (; rows > 0; rows--, first++, out += stride) {                                                                               \
            tile(bits, weight, panel, x, first, 1, 0, 4, out, stride);                                                                   \
        }                                                                                                                                \
    }

PRODUCT(product_int4, 4)
PRODUCT(product_int8, 8)

static void quantize_bytes(const float *x, size_t n, const ByteRows *out, size_t row) {
    vf low = v_set(0.0f), high = v_set(0.0f);  /* 0 is a code: beyond the depth, and where a ReLU was */
    int32x4_t largest = vdupq_n_s32(0);        /* as integers: from infinity's bits on, something is not finite */
    for (size_t i = 0; i < n; i += VW) {
        const vf v = n - i < VW ? load_some(x + i, n - i) : v_load(x + i);
        low = vminq_f32(low, v);
        high = vmaxq_f32(high, v);
        largest = vmaxq_s32(largest, vreinterpretq_s32_f32(vabsq_f32(v)));
    }
    float inverse;
    out->scales[row] = byte_scale(vminvq_f32(low), vmaxvq_f32(high), vmaxvq_s32(largest) < 0x7f800000, &inverse, &out->zeros[row]);
    uint8_t *codes = out->codes + row * out->stride;
    const int32x4_t zero = vdupq_n_s32(out->zeros[row]);
    for (size_t i = 0; i < n; i += VW) {
        const vf v = vmulq_n_f32(n - i < VW ? load_some(x + i, n - i) : v_load(x + i), inverse);
        const uint16x4_t code = vqmovun_s32(vaddq_s32(vcvtnq_s32_f32(v), zero));
        uint8_t four[8];
        vst1_u8(four, vqmovn_u16(vcombine_u16(code, code)));
        memcpy(codes + i, four, n - i < VW ? n - i : VW);
    }
    memset(codes + n, 0, out->stride - n);
}

/* `n` rows (a constant where it is called) times a panel; activations less 128, which SDOT takes as signed. */
INLINE void tile_bytes(const ByteMatrix *weight, size_t panel, const ByteRows *x, size_t first, const size_t n, bool add, float *out, size_t stride) {
    const size_t bytes = byte_panel(weight->depth);
    const int8_t *at = weight->codes + panel * bytes, *end = at + bytes;
    const uint8_t *codes = x->codes + first * x->stride;
    int32x4_t dots[4][4];
    UNROLL
    for (size_t t = 0; t < n; t++) {
        UNROLL
        for (size_t q = 0; q < 4; q++) {
            dots[t][q] = vdupq_n_s32(0);
        }
    }
    for (; at < end; at += 256, codes += 16) {
        int8x16_t four[4];
        UNROLL
        for (size_t t = 0; t < n; t++) {
            four[t] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + t * x->stride), vdupq_n_u8(0x80)));
        }
#define GROUP_OF(g)                                                                       \
    UNROLL                                                                                \
    for (size_t q = 0; q < 4; q++) {                                                      \
        const int8x16_t w = vld1q_s8(at + (g) * 64 + q * 16);                             \
        UNROLL                                                                            \
        for (size_t t = 0; t < n; t++) {                                                  \
            dots[t][q] = vdotq_laneq_s32(dots[t][q], w, four[t], g);                      \
        }                                                                                 \
    }
        GROUP_OF(0)
        GROUP_OF(1)
        GROUP_OF(2)
        GROUP_OF(3)
#undef GROUP_OF
    }
    UNROLL
    for (size_t q = 0; q < 4; q++) {
        const size_t output = panel * PANEL + q * 4;
        const vf scale = v_load(weight->scales + output), bias = weight->bias != NULL ? v_load(weight->bias + output) : v_set(0.0f);
        const int32x4_t sums = vld1q_s32(weight->sums + output);
        UNROLL
        for (size_t t = 0; t < n; t++) {
            float *to = out + t * stride + q * 4;
            const int32x4_t dot = vmlaq_n_s32(dots[t][q], sums, 128 - x->zeros[first + t]);
            const vf value = v_fma(vcvtq_f32_s32(dot), vmulq_n_f32(scale, x->scales[first + t]), bias);
            v_store(to, add ? vaddq_f32(v_load(to), value) : value);
        }
    }
}

static void products_bytes(const ByteMatrix *weight, size_t panel, size_t panels, const ByteRows *x, size_t first, size_t rows, bool add, float *out,
                           size_t stride) {
    for (size_t p = 0; p < panels; p++) {
        size_t row = 0;
        for (; row + 4 <= rows; row += 4) {
            tile_bytes(weight, panel + p, x, first + row, 4, add, out + row * stride + p * PANEL, stride);
        }
        for (; row < rows; row++) {
            tile_bytes(weight, panel + p, x, first + row, 1, add, out + row * stride + p * PANEL, stride);
        }
    }
}

BYTES_KERNEL(products_bytes)

const Kernels kernels_neon = {.name = "neon", .int4 = product_int4, .int8 = product_int8, .quantize = quantize, .bytes = bytes_products_bytes,
                                .quantize_bytes = quantize_bytes, .attention = attention_floats, FLOAT_KERNELS};

#include "target_end.inc"

#endif
