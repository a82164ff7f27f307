/* Reading the constraints of a SamplingParams object. */
#ifndef VLM_CONSTRAINTS_TYPE_H
#define VLM_CONSTRAINTS_TYPE_H

#include "constraints.h"
#include "native.h"

/* Reads `min_length`, `no_repeat_ngram_size`, `eos_token_ids`, `suppress_tokens`, `begin_suppress_tokens`, `forced_tokens` and
 * `sequence_bias`. Returns 0, or −1 with TypeError, ValueError or MemoryError set; the constraints then hold nothing. */
int constraints_from_object(PyObject *params, Constraints *constraints);

#endif
