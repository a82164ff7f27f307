/* Reading sampling parameters from Python, shared by the Sampler type and the decoder state. */
#ifndef VLM_SAMPLER_TYPE_H
#define VLM_SAMPLER_TYPE_H

#include "native.h"
#include "sampling.h"

/* Reads (temperature, top_k, top_p, min_p, repetition_penalty, seed, logprobs) from attributes of a SamplingParams object.
 * Raises ValueError for values out of range; returns −1. */
int sampling_params_from_object(PyObject *object, SamplingParams *params);

#endif
