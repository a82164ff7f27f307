/* Image arithmetic without Python: 8-bit resampling, normalisation, patches. */
#ifndef VLM_IMAGE_H
#define VLM_IMAGE_H

#include "image_kernels.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { RESAMPLE_BOX, RESAMPLE_BILINEAR, RESAMPLE_HAMMING, RESAMPLE_BICUBIC, RESAMPLE_LANCZOS } ResampleFilter;

/* Which pass comes first matters, because its result is rounded to 8 bits. AUTO is what Pillow 13 was observed to do: along columns
 * first when that shrinks the image by more than twice what the pass along rows takes off it (sizes, not ratios: h − h' > 2 (w − w')
 * and h > h'); older Pillows always start along rows. */
typedef enum { PASSES_AUTO, PASSES_HORIZONTAL_FIRST, PASSES_VERTICAL_FIRST } PassOrder;

/* Interleaved 8-bit pixels [height, width, channels]; a line begins `stride` bytes after the one before: a part of a larger image is one
 * too. */
typedef struct {
    const uint8_t *data;
    size_t stride, height, width, channels;
} Image;

/* Resizes `source` into [out_height, out_width, channels] without gaps; 0, or −1 without memory.
 *
 * The arithmetic is Pillow's for 8 bits a channel, integer for integer: the filter's weights are normalised in double precision,
 * rounded to 22 fractional bits, summed in 32-bit integers with rounding, and clipped; a pass along rows and one along columns, each
 * skipped when its size does not change. Channels are independent (no premultiplied alpha).
 * `kernels`: the result is the same with any. `threads`: at most so many, fewer for small images. */
int resize_u8(const Image *source, uint8_t *target, size_t out_height, size_t out_width, ResampleFilter filter, PassOrder order, size_t threads,
              const ImageKernels *kernels);

/* Where the numbers of frames go. `patch` 0: planes [frames, channels, height, width]. Else patches of patch × patch pixels (which divide
 * both sides): [⌈frames / depth⌉ · rows · columns, channels, depth, patch, patch], the last frame filling up the last step; the patches of
 * one merge × merge block (which divide rows and columns) stand next to each other, blocks in reading order. */
typedef struct {
    size_t patch, merge, depth;
} FrameLayout;

/* `count` frames of one size → float32: (float(value · scale) − mean) / std, one mean and std for each of at most 4 channels.
 *
 * The product is taken in double precision and rounded to float once; the difference and the quotient are float: the order in
 * which transformers' numpy image processors compute, bit for bit. */
void normalize_u8(const Image *frames, size_t count, double scale, const float *mean, const float *std, FrameLayout layout, float *target,
                  size_t threads);

#define MAX_CHANNELS 4

#endif
