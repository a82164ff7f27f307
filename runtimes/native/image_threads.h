/* The threads that images are worked on with: made when first wanted, asleep in between, for one caller at a time. */
#ifndef VLM_IMAGE_THREADS_H
#define VLM_IMAGE_THREADS_H

#include "pool.h"

/* Runs a job with at most so many threads, the caller's own among them; with that alone where another caller has the others. */
void image_run(const PoolJob *job, size_t threads);

#endif
