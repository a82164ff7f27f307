#include "merge.h"

#include <string.h>

size_t merge_features(float *embeddings, const int64_t *ids, size_t tokens, int64_t image_token, const float *features, size_t rows,
                      size_t hidden) {
    size_t places = 0;
    for (size_t i = 0; i < tokens; i++) {
        places += ids[i] == image_token;
    }
    if (places != rows) {
        return places;
    }
    for (size_t i = 0; i < tokens; i++) {
        if (ids[i] == image_token) {
            memcpy(embeddings + i * hidden, features, hidden * sizeof *features);
            features += hidden;
        }
    }
    return places;
}
