/* Few tokens times a matrix on an integer grid, and its entries. See grid.h for how it lies. */

#include "grid.h"

#define TOKENS 2 /* that share the unpacking of a row */
#define CHAINS 4 /* of sums at a time: each waits for its last addition */

/* One row with n tokens, n <= TOKENS: sum_g s_g (sum_j q_j x_j - z_g sum_j x_j). */
INLINE void row_product(const Grid *m, int64_t row, const float *x, const float *sums, float *y,
                        const int n, const int bits, const int by_eight) {
    const uint8_t *codes = m->codes + row * (m->d / 8) * bits;
    float shift[TOKENS] = {0};
#ifdef VECTORS
    Vector total[TOKENS];
    for (int t = 0; t < n; t++) total[t] = VEC(setzero_ps)();
#else
    float total[TOKENS] = {0};
#endif
    for (int64_t g = 0; g < m->groups; g++) {
        const int64_t first = g * m->width;
        const int64_t last = first + m->width < m->d ? first + m->width : m->d;
        const float scale = of_half(m->scales[row * m->groups + g]);
        const float zero = scale * zero_at(m, row, g);
        int64_t j = first;
#ifdef VECTORS
        Vector part[TOKENS][CHAINS];
        for (int t = 0; t < n; t++)
            for (int i = 0; i < CHAINS; i++) part[t][i] = VEC(setzero_ps)();
        for (; j + LANES * CHAINS <= last; j += LANES * CHAINS, codes += LANES / 8 * CHAINS * bits)
            for (int i = 0; i < CHAINS; i++) {
                const Vector q = codes_at(codes + LANES / 8 * i * bits, bits, by_eight);
                for (int t = 0; t < n; t++) {
                    const Vector at = VEC(loadu_ps)(x + t * m->d + j + LANES * i);
                    part[t][i] = VEC(fmadd_ps)(q, at, part[t][i]);
                }
            }
        for (; j + LANES <= last; j += LANES, codes += LANES / 8 * bits) {
            const Vector q = codes_at(codes, bits, by_eight);
            for (int t = 0; t < n; t++)
                part[t][0] = VEC(fmadd_ps)(q, VEC(loadu_ps)(x + t * m->d + j), part[t][0]);
        }
        for (; j < last; j += 8, codes += bits) {
            const Vector q = widened(eight(codes, bits, by_eight));
            for (int t = 0; t < n; t++) {
                const Vector at = widened(_mm256_loadu_ps(x + t * m->d + j));
                part[t][0] = VEC(fmadd_ps)(q, at, part[t][0]);
            }
        }
        const Vector times = VEC(set1_ps)(scale);
        for (int t = 0; t < n; t++) {
            for (int i = 1; i < CHAINS; i++) part[t][0] = VEC(add_ps)(part[t][0], part[t][i]);
            total[t] = VEC(fmadd_ps)(times, part[t][0], total[t]);
        }
#else
        float part[TOKENS][8] = {{0}};
        for (; j < last; j += 8, codes += bits) {
            float q[8];
            eight(q, codes, bits, by_eight);
            for (int t = 0; t < n; t++)
                for (int i = 0; i < 8; i++) part[t][i] += q[i] * x[t * m->d + j + i];
        }
        for (int t = 0; t < n; t++) {
            const float *p = part[t];
            total[t] += scale * (((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])));
        }
#endif
        for (int t = 0; t < n; t++) shift[t] += zero * sums[t * m->groups + g];
    }
    for (int t = 0; t < n; t++) {
#ifdef VECTORS
        y[t * m->o + row] = sum_of(total[t]) - shift[t];
#else
        y[t * m->o + row] = total[t] - shift[t];
#endif
    }
}

INLINE void rows_product(const Grid *m, int64_t first, int64_t last, const float *x,
                         const float *sums, float *y, int64_t n, const int bits) {
#define PRODUCT(n, by_eight)                                                                       \
    row_product(m, row, x + t * m->d, sums + t * m->groups, y + t * m->o, n, bits, by_eight)
    for (int64_t row = first; row < last; row++) {
        const int by_eight = reads_by_eight(m, row, bits);
        int64_t t = 0;
        if (by_eight) {
            for (; t + TOKENS <= n; t += TOKENS) PRODUCT(TOKENS, 1);
            for (; t < n; t++) PRODUCT(1, 1);
        } else
            for (; t < n; t++) PRODUCT(1, 0);
    }
#undef PRODUCT
}

INLINE void row_values(const Grid *m, int64_t row, float *out, const int bits, const int by_eight) {
    const uint8_t *codes = m->codes + row * (m->d / 8) * bits;
    for (int64_t g = 0; g < m->groups; g++) {
        const int64_t first = g * m->width;
        const int64_t last = first + m->width < m->d ? first + m->width : m->d;
        const float scale = of_half(m->scales[row * m->groups + g]);
        const float zero = zero_at(m, row, g);
        int64_t j = first;
#ifdef VECTORS
        const __m256 from = _mm256_set1_ps(zero), times = _mm256_set1_ps(scale);
#ifdef WIDE
        for (; j + 16 <= last; j += 16, codes += 2 * bits) {
            const __m512 levels = _mm512_sub_ps(codes_at(codes, bits, by_eight), _mm512_set1_ps(zero));
            _mm512_storeu_ps(out + j, _mm512_mul_ps(levels, _mm512_set1_ps(scale)));
        }
#endif
        for (; j < last; j += 8, codes += bits) {
            const __m256 levels = _mm256_sub_ps(eight(codes, bits, by_eight), from);
            _mm256_storeu_ps(out + j, _mm256_mul_ps(levels, times));
        }
#else
        for (; j < last; j += 8, codes += bits) {
            float q[8];
            eight(q, codes, bits, by_eight);
            for (int i = 0; i < 8; i++) out[j + i] = (q[i] - zero) * scale;
        }
#endif
    }
}

/* y (n, o) = x (n, d) W^T; 1 if there is no memory, else 0. */
int grid_product(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, int64_t o,
                 int64_t d, int64_t width, int bits, const float *x, int64_t n, float *y,
                 int threads) {
    const Grid m = grid_of(codes, scales, zeros, o, d, width, bits);
    float *sums = malloc(sizeof(float) * (size_t)(n * m.groups) + 1);
    if (sums == NULL) return 1;
    for (int64_t t = 0; t < n; t++)
        for (int64_t g = 0; g < m.groups; g++) {
            const int64_t last = (g + 1) * width < d ? (g + 1) * width : d;
            float part[8] = {0};
            for (int64_t j = g * width; j < last; j += 8)
                for (int i = 0; i < 8; i++) part[i] += x[t * d + j + i];
            sums[t * m.groups + g] = ((part[0] + part[1]) + (part[2] + part[3])) +
                                     ((part[4] + part[5]) + (part[6] + part[7]));
        }
    const int parts = workers(o * d * n, threads);
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        const int64_t first = share(o, part, parts), last = share(o, part + 1, parts);
#define CALL(b) rows_product(&m, first, last, x, sums, y, n, b)
        FOR_BITS(bits, CALL)
#undef CALL
    }
    free(sums);
    return 0;
}

/* Rows first .. last - 1 of W as float32, (last - first, d). */
void grid_values(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, int64_t o,
                 int64_t d, int64_t width, int bits, int64_t first, int64_t last, float *out,
                 int threads) {
    const Grid m = grid_of(codes, scales, zeros, o, d, width, bits);
    const int parts = workers((last - first) * d, threads);
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        const int64_t from = first + share(last - first, part, parts);
        const int64_t to = first + share(last - first, part + 1, parts);
        for (int64_t row = from; row < to; row++) {
            float *at = out + (row - first) * d;
#define CALL(b)                                                                                    \
    if (reads_by_eight(&m, row, b))                                                                \
        row_values(&m, row, at, b, 1);                                                             \
    else                                                                                           \
        row_values(&m, row, at, b, 0)
            FOR_BITS(bits, CALL)
#undef CALL
        }
    }
}
