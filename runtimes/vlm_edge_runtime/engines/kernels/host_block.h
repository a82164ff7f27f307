/* The kernels as plain C++: a block's threads are threads of the process, blocks run one after another. For tests. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

struct Dim {
    unsigned x, y;
};
static thread_local Dim threadIdx, blockIdx, blockDim, gridDim;
static pthread_barrier_t block_barrier;

#define SHARED static
#define DEVICE static inline
#define KERNEL extern "C" __attribute__((visibility("default")))
#define ADDRESS(type, value) ((type *)(uintptr_t)(value))
static inline void __syncthreads() {
    if (blockDim.x > 1) {
        pthread_barrier_wait(&block_barrier);
    }
}
static inline float negative_infinity() { return -INFINITY; }
static inline u32 float_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline void count_up(u32 *counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED); }
static inline float get(const float *place) {
    float value;
    __atomic_load(place, &value, __ATOMIC_RELAXED);
    return value;
}
static inline void put(float *place, float value) { __atomic_store(place, &value, __ATOMIC_RELAXED); }
