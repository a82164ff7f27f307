/* Plain C for any CPU, and what the other instruction sets are tested against. */
#include "kernels.h"

#include <math.h>
#include <string.h>

float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | fraction << 13;
    } else if (exponent > 0) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        const float value = (float)fraction * 5.9604644775390625e-8f; /* 2^−24 */
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00);
    }
    if (bits >= 0x477ff000) { /* from 65520 on */
        return (uint16_t)(sign | 0x7c00);
    }
    if (bits < 0x38800000) { /* below 2^−14: in steps of 2^−24, which adding 2^−1 rounds to */
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1); /* to nearest, ties to even */
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}

#define VW 1
#define ROWS 1
#define FLASH_ROWS 2
#define FLASH_VECTORS 4
#define GROUP 1
typedef float vf;
typedef int32_t vi;
#define v_load(p) (*(p))
#define v_store(p, v) (*(p) = (v))
#define v_load_half(p) half_to_float(*(p))
#define v_store_half(p, v) (*(p) = float_to_half(v))
#define v_load_codes(p) ((float)*(p))
#define v_set(x) (x)
#define v_fma(a, b, c) ((a) * (b) + (c))
#define v_sum(v) (v)
#define v_highest(v) (v)
#define v_sums(v) ((v)[0])
#define v_max(a, b) ((a) > (b) ? (a) : (b))
#define v_less(a, b) ((a) < (b) ? -1 : 0)
#define v_choose(mask, a, b) ((mask) ? (a) : (b))

static inline vi v_bits(float value) {
    vi bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline vf v_floats(int32_t bits) {
    vf value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Unsigned: of NaN, `n` is anything. */
#define v_power(n) v_floats((int32_t)((uint32_t)((n) + 127) << 23))

#include "float_kernels.inc"

static void quantize(const float *x, size_t n, const QuantRows *out, size_t row) {
    for (size_t b = 0; b < out->blocks; b++) {
        int8_t *codes = out->codes + (row * out->blocks + b) * BLOCK;
        const size_t count = n > b * BLOCK ? (n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK) : 0;
        float most = 0.0f;
        int32_t sum = 0;
        for (size_t i = 0; i < count; i++) {
            const float magnitude = fabsf(x[b * BLOCK + i]);
            most = magnitude > most || magnitude != magnitude ? magnitude : most;
        }
        const float inverse = most < SMALLEST ? 0.0f : 127.0f / most;
        for (size_t i = 0; i < BLOCK; i++) {
            const float value = i < count ? x[b * BLOCK + i] * inverse : 0.0f;
            codes[i] = value > -127.5f && value < 127.5f ? (int8_t)rintf(value) : 0; /* NaN: the scale says it */
            sum += codes[i];
        }
        out->scales[row * out->blocks + b] = most < SMALLEST ? 0.0f : most / 127.0f;
        out->offsets[row * out->blocks + b] = -8 * sum;
    }
}

/* Code of input `k` (of 32) and output `o` in a block of 4-bit or 8-bit weights. */
static int int4_code(const uint8_t *block, size_t k, size_t o) {
    const uint8_t byte = block[(k / 4 % 4) * 4 * PANEL + o * 4 + k % 4];
    return k < BLOCK / 2 ? byte & 15 : byte >> 4;
}

static int int8_code(const uint8_t *block, size_t k, size_t o) { return block[k / 4 * 4 * PANEL + o * 4 + k % 4]; }

static void product(const PanelMatrix *weight, const uint8_t *panel, const QuantRows *x, size_t first, size_t rows, float *out, size_t stride) {
    const bool four = weight->format == WEIGHT_INT4;
    const size_t bits = four ? 4 : 8;
    for (size_t row = 0; row < rows; row++) {
        for (size_t o = 0; o < PANEL; o++) {
            float sum = 0.0f;
            for (size_t b = 0; b < x->blocks; b++) {
                const uint8_t *block = panel_codes(weight, bits, panel, b);
                const size_t at = (first + row) * x->blocks + b;
                int32_t dot = x->offsets[at] * (four ? 1 : 16);
                for (size_t k = 0; k < BLOCK; k++) {
                    dot += (four ? int4_code(block, k, o) : int8_code(block, k, o)) * x->codes[at * BLOCK + k];
                }
                sum += (float)dot * (half_to_float(panel_scales(weight, bits, panel, b)[o]) * x->scales[at]);
            }
            out[row * stride + o] = sum * weight->scale;
        }
    }
}

void quantize_bytes_scalar(const float *x, size_t n, const ByteRows *out, size_t row) {
    float low = 0.0f, high = 0.0f; /* 0 is a code: beyond the depth, and where a ReLU was */
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        finite = finite && x[i] - x[i] == 0.0f;
    }
    float inverse;
    out->scales[row] = byte_scale(low, high, finite, &inverse, &out->zeros[row]);
    uint8_t *codes = out->codes + row * out->stride;
    for (size_t i = 0; i < n; i++) {
        const float code = rintf(x[i] * inverse) + (float)out->zeros[row];
        codes[i] = code > 0.0f ? code < 255.0f ? (uint8_t)code : 255 : 0;
    }
    memset(codes + n, 0, out->stride - n);
}

void products_bytes_scalar(const ByteMatrix *weight, size_t panel, size_t panels, const ByteRows *x, size_t first, size_t rows, bool add, float *out,
                           size_t stride) {
    for (size_t row = 0; row < rows; row++) {
        const uint8_t *codes = x->codes + (first + row) * x->stride;
        for (size_t o = 0; o < panels * PANEL; o++) {
            const size_t output = panel * PANEL + o;
            const int8_t *column = weight->codes + output / PANEL * byte_panel(weight->depth) + output % PANEL * 4;
            int32_t dot = 0;
            for (size_t k = 0; k < weight->depth; k++) {
                dot += (codes[k] - x->zeros[first + row]) * column[k / 4 * 4 * PANEL + k % 4];
            }
            float *to = out + row * stride + o;
            const float value = v_fma((float)dot, x->scales[first + row] * weight->scales[output], weight->bias != NULL ? weight->bias[output] : 0.0f);
            *to = add ? *to + value : value;
        }
    }
}

BYTES_KERNEL(products_bytes_scalar)

const Kernels kernels_scalar = {.name = "scalar", .int4 = product, .int8 = product, .quantize = quantize, .bytes = bytes_products_bytes_scalar,
                                .quantize_bytes = quantize_bytes_scalar, .attention = attention_floats, FLOAT_KERNELS};
