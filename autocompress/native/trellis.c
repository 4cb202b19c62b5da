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

/* Where paths may start: anywhere, or in the states that follow `seam`. */
INLINE void start(const Trellis *t, int64_t seam) {
    const int64_t n = (int64_t)1 << (t->window - t->bits);
    for (int64_t q = 0; q < n; q++)
        t->least[q] = seam < 0 || q == seam ? 0.0f : FAR;
    memset(t->from, 0, n);
}

#ifdef WIDE

#define LANES 64 /* sets of states that `choose_wide` takes at once */

INLINE void choose_wide(const Trellis *t, uint8_t *from, const int64_t n, const int64_t fan) {
    for (int64_t q = 0; q < n; q += LANES) {
        const float *costs = t->costs + q;
        __m512 least[4];
        __m512i which[4];
        for (int j = 0; j < 4; j++) {
            least[j] = _mm512_loadu_ps(costs + 16 * j);
            which[j] = _mm512_setzero_si512();
        }
        for (int64_t m = 1; m < fan; m++) {
            const __m512i number = _mm512_set1_epi32((int)m);
            for (int j = 0; j < 4; j++) {
                const __m512 other = _mm512_loadu_ps(costs + m * n + 16 * j);
                const __mmask16 better = _mm512_cmp_ps_mask(other, least[j], _CMP_LT_OQ);
                which[j] = _mm512_mask_mov_epi32(which[j], better, number);
                least[j] = _mm512_min_ps(other, least[j]);
            }
        }
        for (int j = 0; j < 4; j++) {
            _mm512_storeu_ps(t->least + q + 16 * j, least[j]);
            const __m128i bytes = _mm512_cvtepi32_epi8(which[j]);
            _mm_storeu_si128((__m128i *)(from + q + 16 * j), bytes);
        }
    }
}

INLINE void add_wide(const Trellis *t, const float at, const float weight, const int64_t n,
                     const int bits) {
    const __m512 target = _mm512_set1_ps(at), w = _mm512_set1_ps(weight);
    const __m512i lanes =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t q = 0; q < n; q += 16) {
        const __m512 least = _mm512_loadu_ps(t->least + q);
        for (int part = 0; part < 1 << bits; part++) {
            const __m512i state = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * part));
            const __m512 before = _mm512_permutexvar_ps(_mm512_srli_epi32(state, bits), least);
            const int64_t i = (q << bits) + 16 * part;
            const __m512 off = _mm512_sub_ps(target, _mm512_loadu_ps(t->table + i));
            const __m512 cost = _mm512_mul_ps(_mm512_mul_ps(off, off), w);
            _mm512_storeu_ps(t->costs + i, _mm512_add_ps(before, cost));
        }
    }
}

#endif

/* Of the states that share their low bits, the cheapest, and which it is. */
INLINE void choose(const Trellis *t, uint8_t *from, const int64_t n, const int64_t fan) {
#ifdef WIDE
    if (n % LANES == 0) {
        choose_wide(t, from, n, fan);
        return;
    }
#endif
    float *least = t->least;
    memcpy(least, t->costs, n * sizeof *least);
    memset(from, 0, n);
    for (int64_t m = 1; m < fan; m++) {
        const float *other = t->costs + m * n;
        for (int64_t q = 0; q < n; q++) {
            const int better = other[q] < least[q];
            from[q] = better ? (uint8_t)m : from[q];
            least[q] = better ? other[q] : least[q];
        }
    }
}

/* Costs of all states after a step to the value `at`. */
INLINE void add(const Trellis *t, const float at, const float weight, const int64_t n,
                const int bits) {
#ifdef WIDE
    if (n % LANES == 0) {
        add_wide(t, at, weight, n, bits);
        return;
    }
#endif
    const int64_t fan = (int64_t)1 << bits;
    for (int64_t q = 0; q < n; q++)
        for (int64_t b = 0; b < fan; b++) {
            const float off = at - t->table[q * fan + b];
            t->costs[q * fan + b] = t->least[q] + off * off * weight;
        }
}

INLINE void walk(const Trellis *t, const float *x, const float *w, int64_t steps, int64_t seam,
                 const int bits) {
    const int64_t n = (int64_t)1 << (t->window - bits);
    start(t, seam);
    add(t, x[0], w[0], n, bits);
    for (int64_t i = 1; i < steps; i++) {
        choose(t, t->from + i * n, n, (int64_t)1 << bits);
        add(t, x[i], w[i], n, bits);
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
