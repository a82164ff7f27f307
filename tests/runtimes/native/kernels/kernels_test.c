/* Every kernel of one instruction set against float64, on random shapes: odd tails, unaligned rows, nothing at all, denormals, large values.
 *
 *   kernels_test NAME     0: all agree; 1: a difference, printed; 2: this CPU has no such kernels
 *   kernels_test --time NAME   weight bytes a second and operations a second of the matrix products, for a look
 * A program of its own, so that it runs under qemu-user and the sanitizers without Python. */
#include "checking.h"

uint64_t state = 0x9e3779b97f4a7c15u;
int failures;

int main(int count, char **arguments) {
    const bool timed = count == 3 && strcmp(arguments[1], "--time") == 0;
    const Kernels *k = count > 1 ? kernels_named(arguments[count - 1]) : kernels_best();
    if (k == NULL) {
        printf("this CPU has no %s\n", arguments[count - 1]);
        return 2;
    }
    if (timed) {
        time_products(k);
        return 0;
    }
    test_quantize(k);
    test_integer_products(k);
    test_float_products(k);
    test_elementwise(k);
    test_norms(k);
    test_attention(k);
    test_caches(k);
    test_softmax(k);
    test_halves(k);
    test_bytes(k);
    test_head_attention(k);
    printf("%s: %d differences\n", k->name, failures);
    return failures > 0;
}
