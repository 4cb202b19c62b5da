/* A matrix on an integer grid, read as it lies in the file.

   Eight codes of b bits are a chunk of b bytes, a little-endian integer; rows are d codes, d a
   multiple of eight, one after the other. A group of `width` columns, a multiple of eight, has a
   scale (float16) and a zero point: an entry is (q - z) * s. */

#ifndef GRID_H
#define GRID_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__BMI2__) && defined(__FMA__) && defined(__F16C__) && \
    !defined(PORTABLE)
#include <immintrin.h>
#define VECTORS
#if defined(__AVX512F__) && defined(__AVX512VBMI__) && !defined(NARROW)
#define WIDE
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PANELS
#endif
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
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

/* Whether eight bytes may be read at every chunk of a row. */
INLINE int reads_by_eight(const Grid *m, int64_t row, const int bits) {
    return (m->o - 1 - row) * (m->d / 8) * bits >= 8 - bits;
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

INLINE int64_t share(int64_t n, int part, int parts) { return n * part / parts; }

INLINE int workers(int64_t weights, int threads) {
    const int64_t most = weights / SMALL + 1;
    return most < threads ? (int)most : threads;
}

INLINE Grid grid_of(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, int64_t o,
                    int64_t d, int64_t width, int bits) {
    const Grid m = {codes, scales, zeros, o, d, width, (d + width - 1) / width, 1u << (bits - 1)};
    return m;
}

#endif
