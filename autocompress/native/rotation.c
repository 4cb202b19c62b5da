/* Inputs times diag(signs) (C_m x H_n), a randomized Hadamard rotation: m parts of n columns, n a
   power of two.

   H_n is log2(n) rounds of sums and differences. Those of neighbours are made within a vector, all
   others between vectors, three rounds at a time in registers; a part stays in the first cache. */

#include "grid.h"

#ifdef WIDE
#define FLOATS 16
#define EACH(f, h)                                                                                 \
    {f(0, h), f(1, h), f(2, h),  f(3, h),  f(4, h),  f(5, h),  f(6, h),  f(7, h),                  \
     f(8, h), f(9, h), f(10, h), f(11, h), f(12, h), f(13, h), f(14, h), f(15, h)}
#else
#define FLOATS 8
#define EACH(f, h) {f(0, h), f(1, h), f(2, h), f(3, h), f(4, h), f(5, h), f(6, h), f(7, h)}
#endif
#define RADIX 8 /* vectors at a time */
#define TALL 4  /* parts that share the reading of a vector */

typedef float Floats __attribute__((vector_size(4 * FLOATS)));

INLINE Floats floats_at(const float *at) {
    Floats v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE void put(float *at, Floats v) { memcpy(at, &v, sizeof v); }

/* Sums and differences of lanes that are 1, 2, .. FLOATS / 2 apart. */
INLINE Floats within(Floats v) {
#define OTHER(i, h) v[(i) ^ (h)]
#define SIGN(i, h) ((i) & (h) ? -1.0f : 1.0f)
#define ROUND(h)                                                                                   \
    do {                                                                                           \
        const Floats others = EACH(OTHER, h), signs = EACH(SIGN, h);                               \
        v = others + signs * v;                                                                    \
    } while (0)
    ROUND(1);
    ROUND(2);
    ROUND(4);
#if FLOATS == 16
    ROUND(8);
#endif
    return v;
}

/* Sums and differences of those of r vectors that are `apart`. */
INLINE void round_of(Floats *v, const int r, const int apart) {
    for (int i = 0; i < r; i++)
        if (!(i & apart)) {
            const Floats one = v[i], other = v[i + apart];
            v[i] = one + other;
            v[i + apart] = one - other;
        }
}

INLINE void rounds(Floats *v, const int r) {
    if (r > 1) round_of(v, r, 1);
    if (r > 2) round_of(v, r, 2);
    if (r > 4) round_of(v, r, 4);
}

/* The rounds of the first r vectors of each r * FLOATS columns; reads x, which it signs. */
INLINE void first_rounds(float *to, const float *x, const float *signs, int64_t n, const int r) {
    for (int64_t j = 0; j < n; j += r * FLOATS) {
        Floats v[RADIX];
        for (int i = 0; i < r; i++) {
            const int64_t at = j + i * FLOATS;
            v[i] = within(floats_at(x + at) * floats_at(signs + at));
        }
        rounds(v, r);
        for (int i = 0; i < r; i++) put(to + j + i * FLOATS, v[i]);
    }
}

/* The rounds of columns that are `step`, 2 `step`, .. r / 2 `step` apart. */
INLINE void more_rounds(float *to, int64_t n, int64_t step, const int r) {
    for (int64_t first = 0; first < n; first += r * step)
        for (int64_t j = first; j < first + step; j += FLOATS) {
            Floats v[RADIX];
            for (int i = 0; i < r; i++) v[i] = floats_at(to + j + i * step);
            rounds(v, r);
            for (int i = 0; i < r; i++) put(to + j + i * step, v[i]);
        }
}

/* How many vectors meet is a constant in each case, so that they stay in registers. */
#define FOR_RADIX(left, call)                                                                      \
    switch (left) {                                                                                \
        case 1: call(1); break;                                                                    \
        case 2: call(2); break;                                                                    \
        case 4: call(4); break;                                                                    \
        default: call(8); break;                                                                   \
    }

/* One part of at least FLOATS columns. */
static void walsh(float *to, const float *x, const float *signs, int64_t n) {
#define FIRST(r) first_rounds(to, x, signs, n, r)
    FOR_RADIX(n / FLOATS, FIRST)
#undef FIRST
    for (int64_t step = RADIX * FLOATS; step < n; step *= RADIX) {
#define MORE(r) more_rounds(to, n, step, r)
        FOR_RADIX(n / step, MORE)
#undef MORE
    }
}

/* The same for any power of two. */
static void short_walsh(float *to, const float *x, const float *signs, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = x[j] * signs[j];
    for (int64_t step = 1; step < n; step *= 2)
        for (int64_t first = 0; first < n; first += 2 * step)
            for (int64_t j = first; j < first + step; j++) {
                const float one = to[j], other = to[j + step];
                to[j] = one + other;
                to[j + step] = one - other;
            }
}

/* Parts k .. k + tall - 1 of y: sums over all parts of x. */
INLINE void mixed(float *y, const float *x, const float *mixing, int64_t m, int64_t n, int64_t k,
                  const int tall) {
    int64_t c = 0;
    for (; c + FLOATS <= n; c += FLOATS) {
        Floats sum[TALL] = {{0}};
        for (int64_t j = 0; j < m; j++) {
            const Floats v = floats_at(x + j * n + c);
            for (int i = 0; i < tall; i++) sum[i] += v * mixing[(k + i) * m + j];
        }
        for (int i = 0; i < tall; i++) put(y + (k + i) * n + c, sum[i]);
    }
    for (; c < n; c++)
        for (int i = 0; i < tall; i++) {
            float sum = 0;
            for (int64_t j = 0; j < m; j++) sum += mixing[(k + i) * m + j] * x[j * n + c];
            y[(k + i) * n + c] = sum;
        }
}

/* One row; `signs` (m, n) have the size that makes H_n orthonormal, `space` is m n floats. */
static void row_rotated(float *y, const float *x, const float *signs, const float *mixing,
                        int64_t m, int64_t n, float *space) {
    float *to = m > 1 ? space : y;
    for (int64_t j = 0; j < m; j++) {
        if (n >= FLOATS)
            walsh(to + j * n, x + j * n, signs + j * n, n);
        else
            short_walsh(to + j * n, x + j * n, signs + j * n, n);
    }
    if (m == 1) return;
    int64_t k = 0;
    for (; k + TALL <= m; k += TALL) mixed(y, to, mixing, m, n, k, TALL);
    for (; k < m; k++) mixed(y, to, mixing, m, n, k, 1);
}

/* y (rows, m n) = x (rows, m n) diag(signs) (mixing^T x H_n); 1 if there is no memory, else 0. */
int rotation(const float *signs, const float *mixing, int64_t m, int64_t n, const float *x,
             int64_t rows, float *y, int threads) {
    const int64_t d = m * n;
    const int parts = workers(rows * d, threads);
    float *space = m > 1 ? malloc(sizeof(float) * (size_t)(parts * d)) : NULL;
    if (m > 1 && space == NULL) return 1;
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++)
        for (int64_t t = share(rows, part, parts); t < share(rows, part + 1, parts); t++)
            row_rotated(y + t * d, x + t * d, signs, mixing, m, n, space + part * d);
    free(space);
    return 0;
}
