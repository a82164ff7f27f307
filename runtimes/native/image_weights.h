/* The weights of a resampling filter from one number of pixels to another. */
#ifndef VLM_IMAGE_WEIGHTS_H
#define VLM_IMAGE_WEIGHTS_H

#include "image.h"

typedef struct KeptWeights KeptWeights;

/* Packed for `kernels`, or for the scalar code where those cannot hold them (see weights_kernels). NULL without memory.
 * To be given back; safe from any thread. */
KeptWeights *weights_take(size_t in_size, size_t out_size, ResampleFilter filter, const ImageKernels *kernels);
void weights_give(KeptWeights *kept);
const ResampleWeights *weights_of(const KeptWeights *kept);
const ImageKernels *weights_kernels(const KeptWeights *kept);

#endif
