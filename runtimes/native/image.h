/* Image arithmetic without Python: 8-bit resampling and normalisation. */
#ifndef VLM_IMAGE_H
#define VLM_IMAGE_H

#include <stddef.h>
#include <stdint.h>

typedef enum { RESAMPLE_BOX, RESAMPLE_BILINEAR, RESAMPLE_HAMMING, RESAMPLE_BICUBIC, RESAMPLE_LANCZOS } ResampleFilter;

/* Which pass comes first matters, because its result is rounded to 8 bits. AUTO is what Pillow 13 was observed to do: along columns
 * first when that shrinks the image by more than twice what the pass along rows takes off it (sizes, not ratios: h − h' > 2 (w − w')
 * and h > h'); older Pillows always start along rows. */
typedef enum { PASSES_AUTO, PASSES_HORIZONTAL_FIRST, PASSES_VERTICAL_FIRST } PassOrder;

/* Resizes an interleaved 8-bit image [height, width, channels] into [out_height, out_width, channels]; 0, or −1 without memory.
 *
 * The arithmetic is Pillow's for 8 bits a channel, integer for integer: the filter's weights are normalised in double precision,
 * rounded to 22 fractional bits, summed in 32-bit integers with rounding, and clipped; a pass along rows and one along columns, each
 * skipped when its size does not change. Channels are independent (no premultiplied alpha). */
int resize_u8(const uint8_t *source, size_t height, size_t width, size_t channels, uint8_t *target, size_t out_height, size_t out_width,
              ResampleFilter filter, PassOrder order);

/* Interleaved 8-bit [height, width, channels] → float32 planes [channels, height, width]: (float(value · scale) − mean) / std.
 *
 * The product is taken in double precision and rounded to float once; the difference and the quotient are float: the order in
 * which transformers' numpy image processors compute, bit for bit. */
void normalize_hwc_u8(const uint8_t *source, size_t height, size_t width, size_t channels, double scale, const float *mean,
                      const float *std, float *target);

#endif
