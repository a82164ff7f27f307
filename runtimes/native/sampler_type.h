/* Reading sampling parameters from Python, shared by the Sampler type and the decoder state. */
#ifndef VLM_SAMPLER_TYPE_H
#define VLM_SAMPLER_TYPE_H

#include "native.h"
#include "sampling.h"

/* A sampler for a SamplingParams object. Returns 0, or −1 with TypeError, ValueError (values out of range) or MemoryError set; the
 * sampler then holds nothing. */
int sampler_from_object(Sampler *sampler, PyObject *params, size_t vocab);

#endif
