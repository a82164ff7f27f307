/* Which kernels this CPU runs. */
#include "kernels.h"

#include <string.h>

extern const Kernels kernels_scalar;

#define CANDIDATES 3

#if defined(__x86_64__)
#include <cpuid.h>

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;

/* The compiler's own test looks at what the operating system saves, too. */
static const Kernels *has_avx512(void) {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    return has ? &kernels_avx512 : NULL;
}

static const Kernels *has_bf16(void) { return has_avx512() != NULL && __builtin_cpu_supports("avx512bf16") ? &kernels_avx512_bf16 : NULL; }

static const Kernels *has_avx2(void) {
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c ? &kernels_avx2 : NULL;
}

static const Kernels *candidates(size_t index) { return index == 0 ? has_bf16() : index == 1 ? has_avx512() : index == 2 ? has_avx2() : NULL; }

#elif defined(__aarch64__)
extern const Kernels kernels_neon;

#if defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
static const Kernels *candidates(size_t index) { return index == 0 && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) ? &kernels_neon : NULL; }
#elif defined(__APPLE__) /* every one of their 64-bit computers has the dot product */
static const Kernels *candidates(size_t index) { return index == 0 ? &kernels_neon : NULL; }
#else
static const Kernels *candidates(size_t index) { return NULL; }
#endif

#else
static const Kernels *candidates(size_t index) { return NULL; }
#endif

const Kernels *kernels_best(void) {
    for (size_t i = 0; i < CANDIDATES; i++) {
        const Kernels *found = candidates(i);
        if (found != NULL) {
            return found;
        }
    }
    return &kernels_scalar;
}

const Kernels *kernels_named(const char *name) {
    for (size_t i = 0; i < CANDIDATES; i++) {
        const Kernels *found = candidates(i);
        if (found != NULL && strcmp(found->name, name) == 0) {
            return found;
        }
    }
    return strcmp(name, kernels_scalar.name) == 0 ? &kernels_scalar : NULL;
}
