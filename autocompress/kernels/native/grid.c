/* Products with a matrix on an integer grid, read as it lies in the file.

   Eight codes of b bits are a chunk of b bytes, a little-endian integer; rows are d codes, d a
   multiple of eight, one after the other. A group of `width` columns, a multiple of eight, has a
   scale (float16) and a zero point: an entry is (q - z) * s. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__BMI2__) && defined(__FMA__) && defined(__F16C__) && \
    !defined(PORTABLE)
#include <immintrin.h>
#define VECTORS
#if defined(__AVX512F__) && defined(__AVX512VBMI__) && !defined(NARROW)
#define WIDE
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define TOKENS 2 /* that share the unpacking of a row */
#define CHAINS 4 /* of sums at a time: each waits for its last addition */
#define SMALL 131072 /* weights that are not worth a second thread */

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales; /* (o, groups) float16 */
    const uint8_t *zeros;   /* (o, groups); NULL: all are `zero` */
    int64_t o, d, width, groups;
    uint8_t zero;
} Grid;

INLINE float of_half(uint16_t half) {
#ifdef VECTORS
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu, bits;
    float found;
    if (rest < 0x400u) { /* subnormal: the integer times 2^-24 */
        found = (float)rest * 0x1p-24f;
        return sign ? -found : found;
    }
    bits = sign | ((rest << 13) + 0x38000000u);
    memcpy(&found, &bits, 4);
    return found;
#endif
}

INLINE float zero_at(const Grid *m, int64_t row, int64_t g) {
    return (float)(m->zeros ? m->zeros[row * m->groups + g] : m->zero);
}

/* A chunk in the low bits. Where eight bytes may be read, one load gets it whatever its width, and
   what follows it stands above. */
INLINE uint64_t chunk_at(const uint8_t *at, const int bits, const int by_eight) {
    uint64_t word = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (by_eight) {
        memcpy(&word, at, 8);
        return word;
    }
#endif
    for (int i = 0; i < bits; i++) word |= (uint64_t)at[i] << (8 * i);
    return word;
}

#ifdef VECTORS
INLINE __m256 eight(const uint8_t *at, const int bits, const int by_eight) {
    if (bits <= 4) { /* a chunk fits 32 bits: each lane shifts its code down */
        const __m256i places = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits,
                                                 6 * bits, 7 * bits);
        const __m256i chunk = _mm256_set1_epi32((int32_t)chunk_at(at, bits, by_eight));
        const __m256i codes = _mm256_srlv_epi32(chunk, places);
        return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << bits) - 1)));
    }
    const uint64_t lanes = 0x0101010101010101ull * ((1u << bits) - 1);
    const __m128i bytes = bits == 8
                              ? _mm_loadl_epi64((const __m128i *)at)
                              : _mm_cvtsi64_si128(
                                    (int64_t)_pdep_u64(chunk_at(at, bits, by_eight), lanes));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

#ifdef WIDE
#define LANES 16
#define VEC(name) _mm512_##name
typedef __m512 Vector;

/* Two chunks. Up to four bits they fit one word, and a table of 16 floats masks what stands above a
   code while it looks it up. */
INLINE Vector codes_at(const uint8_t *at, const int bits, const int by_eight) {
    if (bits == 8)
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)));
    const int step = bits <= 4 ? 8 * bits : 0; /* of the second chunk, in its word */
    const __m512i first =
        _mm512_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits, 0,
                          bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits);
    const __m512i places = _mm512_mask_add_epi32(first, 0xff00, first, _mm512_set1_epi32(step));
    if (bits <= 4) {
        const int mask = (1 << bits) - 1;
        const __m512 values = _mm512_cvtepi32_ps(_mm512_and_si512(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_set1_epi32(mask)));
        const __m512i words = _mm512_set1_epi64((int64_t)chunk_at(at, 2 * bits, by_eight));
        return _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(places, words), values);
    }
    const __m512i low = _mm512_set1_epi64((int64_t)chunk_at(at, bits, by_eight));
    const __m512i words =
        _mm512_mask_set1_epi64(low, 0xf0, (int64_t)chunk_at(at + bits, bits, by_eight));
    const __m512i codes = _mm512_multishift_epi64_epi8(places, words);
    return _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << bits) - 1)));
}

INLINE Vector widened(__m256 v) { return _mm512_zextps256_ps512(v); }

INLINE float sum_of(Vector v) { return _mm512_reduce_add_ps(v); }
#else
#define LANES 8
#define VEC(name) _mm256_##name
typedef __m256 Vector;

INLINE Vector codes_at(const uint8_t *at, const int bits, const int by_eight) {
    return eight(at, bits, by_eight);
}

INLINE Vector widened(__m256 v) { return v; }

INLINE float sum_of(Vector v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif
#else
INLINE void eight(float *found, const uint8_t *at, const int bits, const int by_eight) {
    const uint64_t word = chunk_at(at, bits, by_eight), mask = (1u << bits) - 1;
    for (int i = 0; i < 8; i++) found[i] = (float)(word >> (i * bits) & mask);
}
#endif

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

/* Whether eight bytes may be read at every chunk of a row. */
INLINE int reads_by_eight(const Grid *m, int64_t row, const int bits) {
    return (m->o - 1 - row) * (m->d / 8) * bits >= 8 - bits;
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

/* The width of codes is a constant in each case, so that the compiler unrolls for it. */
#define FOR_BITS(bits, call)                                                                       \
    switch (bits) {                                                                                \
        case 1: call(1); break;                                                                    \
        case 2: call(2); break;                                                                    \
        case 3: call(3); break;                                                                    \
        case 4: call(4); break;                                                                    \
        case 5: call(5); break;                                                                    \
        case 6: call(6); break;                                                                    \
        case 7: call(7); break;                                                                    \
        default: call(8); break;                                                                   \
    }

static int64_t share(int64_t n, int part, int parts) { return n * part / parts; }

static int workers(int64_t weights, int threads) {
    const int64_t most = weights / SMALL + 1;
    return most < threads ? (int)most : threads;
}

static Grid grid_of(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, int64_t o,
                    int64_t d, int64_t width, int bits) {
    const Grid m = {codes, scales, zeros, o, d, width, (d + width - 1) / width, 1u << (bits - 1)};
    return m;
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
