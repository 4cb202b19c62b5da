/* The cheapest cyclic path through a bit-shift trellis: see methods/trellis.py.

   A state is a window of bits; each step shifts `bits` new ones in. Of the 2^bits states that share
   their low bits only the cheapest goes on, so a step is one pass over the states for the minima and
   one for the costs of the values. Sums are in the order of methods/viterbi.py, so that both find
   the same path. */

#include "grid.h"

#define FAR 1e30f
#define MEETING 64 /* steps on each side of the seam that choose where a cycle closes */

typedef struct {
    const float *table;
    int window, bits;
    float *costs, *least;
    uint8_t *from; /* (steps, 2^(window - bits)) */
} Trellis;

INLINE void walk(const Trellis *t, const float *x, const float *w, int64_t steps, int64_t seam,
                 const int bits) {
    const int64_t n = (int64_t)1 << (t->window - bits), fan = (int64_t)1 << bits;
    float *costs = t->costs, *least = t->least;
    for (int64_t i = 0; i < steps; i++) {
        uint8_t *from = t->from + i * n;
        if (i == 0) {
            for (int64_t q = 0; q < n; q++)
                least[q] = seam < 0 || q == seam ? 0.0f : FAR;
            memset(from, 0, n);
        } else {
            memcpy(least, costs, n * sizeof *least);
            memset(from, 0, n);
            for (int64_t m = 1; m < fan; m++) {
                const float *other = costs + m * n;
                for (int64_t q = 0; q < n; q++) {
                    const int better = other[q] < least[q];
                    from[q] = better ? (uint8_t)m : from[q];
                    least[q] = better ? other[q] : least[q];
                }
            }
        }
        const float at = x[i], weight = w[i];
        for (int64_t q = 0; q < n; q++)
            for (int64_t b = 0; b < fan; b++) {
                const float off = at - t->table[q * fan + b];
                costs[q * fan + b] = least[q] + off * off * weight;
            }
    }
}

/* States of the cheapest path; one that leaves from and arrives at `seam` unless that is below 0. */
static void path(const Trellis *t, const float *x, const float *w, int64_t steps, int64_t seam,
                 int16_t *states) {
    const int64_t n = (int64_t)1 << (t->window - t->bits), fan = (int64_t)1 << t->bits;
    switch (t->bits) {
    case 1: walk(t, x, w, steps, seam, 1); break;
    case 2: walk(t, x, w, steps, seam, 2); break;
    case 3: walk(t, x, w, steps, seam, 3); break;
    case 4: walk(t, x, w, steps, seam, 4); break;
    case 5: walk(t, x, w, steps, seam, 5); break;
    default: walk(t, x, w, steps, seam, 6);
    }
    const int64_t stride = seam < 0 ? 1 : n, count = seam < 0 ? n * fan : fan;
    int64_t state = seam < 0 ? 0 : seam;
    for (int64_t m = 1, first = state; m < count; m++)
        if (t->costs[first + m * stride] < t->costs[state])
            state = first + m * stride;
    for (int64_t i = steps - 1; i >= 0; i--) {
        states[i] = (int16_t)state;
        const int64_t q = state >> t->bits;
        state = t->from[i * n + q] * n + q;
    }
}

static int cycle(const float *x, const float *w, int64_t steps, const float *table, int window,
                 int bits, int16_t *states) {
    const int64_t n = (int64_t)1 << (window - bits);
    const int64_t side = steps / 2 < MEETING ? steps / 2 : MEETING;
    const int64_t longest = steps > 2 * side ? steps : 2 * side;
    float *floats = malloc(((n << bits) + n + 4 * side) * sizeof *floats);
    uint8_t *from = malloc(longest * n);
    const int failed = !floats || !from;
    if (!failed) {
        const Trellis t = {table, window, bits, floats, floats + (n << bits), from};
        float *near = floats + (n << bits) + n, *weights = near + 2 * side;
        memcpy(near, x + steps - side, side * sizeof *near);
        memcpy(near + side, x, side * sizeof *near);
        memcpy(weights, w + steps - side, side * sizeof *near);
        memcpy(weights + side, w, side * sizeof *near);
        path(&t, near, weights, 2 * side, -1, states);
        path(&t, x, w, steps, states[side - 1] & (n - 1), states);
    }
    free(floats);
    free(from);
    return failed;
}

/* States (o,) of the values nearest to x (o,), errors weighted by w (o,): cycles of `run` rows, the
   last with the rest. Not 0: there is no memory. */
int trellis_states(const float *x, const float *w, int64_t o, int64_t run, const float *table,
                   int window, int bits, int16_t *states, int threads) {
    const int64_t runs = o / run > 1 ? o / run : 1;
    int failed = 0;
    (void)threads;
#pragma omp parallel for num_threads(threads) reduction(| : failed) if (runs > 1)
    for (int64_t i = 0; i < runs; i++) {
        const int64_t start = i * run, stop = i + 1 < runs ? start + run : o;
        failed |= cycle(x + start, w + start, stop - start, table, window, bits, states + start);
    }
    return failed;
}
