/* Joining image features with the embeddings of the prompt's tokens. */
#ifndef VLM_MERGE_H
#define VLM_MERGE_H

#include <stddef.h>
#include <stdint.h>

/* Copies feature row i over the embedding row of the i-th token that equals `image_token`; returns how many such tokens there are.
 *
 * embeddings [tokens, hidden], ids [tokens], features [rows, hidden]. When the returned number is not `rows`, nothing was written. */
size_t merge_features(float *embeddings, const int64_t *ids, size_t tokens, int64_t image_token, const float *features, size_t rows,
                      size_t hidden);

#endif
