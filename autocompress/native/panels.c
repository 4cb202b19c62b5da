/* Many tokens times a matrix on an integer grid, in bfloat16 with AVX-512 BF16.

   A pair is two columns in a word, low half first: what one lane of the product multiplies and adds
   to a float32. Tokens lie in panels of 16 lanes, pair by pair, so that a pair of W meets 16 tokens
   in one instruction. A tile of W is decoded once for all tokens and read from the second cache, as
   is the panel that it meets. Subnormal inputs count as zero, as the instruction has it. */

#include "grid.h"

#ifdef PANELS
#define LANE 16
#define LINE 64 /* bytes of the cache: a vector that crosses it is read twice */
#define TALL 8  /* rows and */
#define BROAD 3 /* panels of a block: its sums are 24 of 32 registers */
#define TILE_ROWS 64
#define TILE_COLUMNS 2048
#define TILE ((int64_t)TILE_ROWS * TILE_COLUMNS)

/* The first n lanes. */
INLINE __mmask16 first_of(int64_t n) {
    return n >= LANE ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

/* 16 x 16 words: four perfect shuffles exchange the bits of row and column. */
INLINE void transpose(__m512i rows[LANE]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int turn = 0; turn < 4; turn++) {
        __m512i mixed[LANE];
        for (int i = 0; i < LANE / 2; i++) {
            mixed[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[i + 8]);
            mixed[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[i + 8]);
        }
        for (int i = 0; i < LANE; i++) rows[i] = mixed[i];
    }
}

/* Up to 16 tokens (n, d) as a panel (d / 2, 16) of pairs; lanes without a token are zero. */
static void fill(uint32_t *panel, const float *x, int64_t n, int64_t d) {
    for (int64_t j = 0; j < d; j += 2 * LANE) {
        const __mmask16 near = first_of(d - j), far = first_of(d - j - LANE);
        __m512i rows[LANE];
        for (int t = 0; t < LANE; t++) {
            const __mmask16 here = t < n ? near : 0, there = t < n ? far : 0;
            const float *at = t < n ? x + t * d + j : x;
            const __m512 first = _mm512_maskz_loadu_ps(here, at);
            const __m512 second = _mm512_maskz_loadu_ps(there, there ? at + LANE : at);
            rows[t] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        }
        transpose(rows);
        for (int i = 0; i < LANE && j + 2 * i < d; i++)
            _mm512_storeu_si512(panel + (j / 2 + i) * LANE, rows[i]);
    }
}

/* Sums (16, BROAD, 16) of 16 rows of a tile with `broad` panels, `step` words apart. */
INLINE void block(float *sums, const uint16_t *tile, const uint32_t *panels, int64_t step,
                  int64_t pairs, const int broad) {
    for (int top = 0; top < LANE; top += TALL) {
        __m512 sum[TALL][BROAD];
        for (int r = 0; r < TALL; r++)
            for (int i = 0; i < broad; i++) sum[r][i] = _mm512_setzero_ps();
        for (int64_t p = 0; p < pairs; p++) {
            __m512bh tokens[BROAD];
            for (int i = 0; i < broad; i++)
                tokens[i] = (__m512bh)_mm512_loadu_si512(panels + i * step + p * LANE);
            for (int r = 0; r < TALL; r++) {
                int32_t pair;
                memcpy(&pair, tile + (top + r) * TILE_COLUMNS + 2 * p, 4);
                const __m512bh all = (__m512bh)_mm512_set1_epi32(pair);
                for (int i = 0; i < broad; i++)
                    sum[r][i] = _mm512_dpbf16_ps(sum[r][i], tokens[i], all);
            }
        }
        for (int r = 0; r < TALL; r++)
            for (int i = 0; i < broad; i++)
                _mm512_storeu_ps(sums + ((top + r) * BROAD + i) * LANE, sum[r][i]);
    }
}

/* y (n, o) of up to 16 rows and `broad` panels is, or with `more` grows by, their sums. */
INLINE void outputs(float *y, int64_t o, int64_t n, int64_t rows, const float *sums, int more,
                    const int broad) {
    const __mmask16 some = first_of(rows);
    for (int i = 0; i < broad; i++) {
        __m512i part[LANE];
        for (int r = 0; r < LANE; r++)
            part[r] = _mm512_loadu_si512(sums + (r * BROAD + i) * LANE);
        transpose(part);
        for (int t = 0; t < LANE && i * LANE + t < n; t++) {
            float *at = y + (i * LANE + t) * o;
            const __m512 found = _mm512_castsi512_ps(part[t]);
            const __m512 before = more ? _mm512_maskz_loadu_ps(some, at) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(at, some, _mm512_add_ps(before, found));
        }
    }
}

/* Entries of 32 codes, in bfloat16. */
INLINE __m512i entries(__m512 first, __m512 second, __m512 zero, __m512 scale) {
    const __m512 low = _mm512_mul_ps(_mm512_sub_ps(first, zero), scale);
    const __m512 high = _mm512_mul_ps(_mm512_sub_ps(second, zero), scale);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Every code of up to four bits, over and over. */
INLINE __m512 all_codes(const int bits) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << bits) - 1)));
}

/* 32 codes of up to four bits at the bottom of words, and above them what follows in the file. */
INLINE __m512i words_at(const uint8_t *at, const int bits, const int by_eight) {
    const __m512i low = _mm512_set1_epi64((int64_t)chunk_at(at, 2 * bits, by_eight));
    const __m512i chunks = _mm512_mask_set1_epi64(
        low, 0xf0, (int64_t)chunk_at(at + 2 * bits, 2 * bits, by_eight));
    const __m256i order = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places =
        _mm512_mullo_epi16(_mm512_broadcast_i64x4(order), _mm512_set1_epi16(bits));
    return _mm512_multishift_epi64_epi8(places, chunks);
}

/* Columns from .. to - 1 of a row, multiples of eight. Up to four bits the entries of a group are a
   table; a lookup takes five bits of a word, so the table stands there twice. */
INLINE void row_halves(uint16_t *out, const Grid *m, int64_t row, int64_t from, int64_t to,
                       const int bits, const int by_eight) {
    const uint8_t *codes = m->codes + (row * m->d + from) / 8 * bits;
    int64_t j = from;
    for (int64_t g = from / m->width; j < to; g++) {
        const int64_t last = (g + 1) * m->width < to ? (g + 1) * m->width : to;
        const __m512 scale = _mm512_set1_ps(of_half(m->scales[row * m->groups + g]));
        const __m512 zero = _mm512_set1_ps(zero_at(m, row, g));
        const __m512i table = bits <= 4 ? entries(all_codes(bits), all_codes(bits), zero, scale)
                                        : _mm512_setzero_si512();
        for (; j + 32 <= last; j += 32, codes += 4 * bits) {
            __m512i found;
            if (bits <= 4)
                found = _mm512_permutexvar_epi16(words_at(codes, bits, by_eight), table);
            else
                found = entries(codes_at(codes, bits, by_eight),
                                codes_at(codes + 2 * bits, bits, by_eight), zero, scale);
            _mm512_storeu_si512(out + j - from, found);
        }
        for (; j < last; j += 8, codes += bits) {
            const __m512 some = _mm512_zextps256_ps512(eight(codes, bits, by_eight));
            const __m512i found = entries(some, some, zero, scale);
            _mm_storeu_si128((__m128i *)(out + j - from), _mm512_castsi512_si128(found));
        }
    }
}

/* Rows first .. last - 1 in whole blocks of 16, the last row again where there are none. */
static void decode(uint16_t *tile, const Grid *m, int64_t first, int64_t last, int64_t from,
                   int64_t to, int bits) {
    const int64_t rows = (last - first + LANE - 1) / LANE * LANE;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = first + r < last ? first + r : last - 1;
        uint16_t *at = tile + r * TILE_COLUMNS;
#define CALL(b)                                                                                    \
    if (reads_by_eight(m, row, b))                                                                 \
        row_halves(at, m, row, from, to, b, 1);                                                    \
    else                                                                                           \
        row_halves(at, m, row, from, to, b, 0)
        FOR_BITS(bits, CALL)
#undef CALL
    }
}

/* Rows first .. last - 1 of one tile, columns from .. to - 1, with all tokens. */
static void tile_product(float *y, const Grid *m, int64_t first, int64_t last, int64_t from,
                         int64_t to, const uint16_t *tile, const uint32_t *panels, int64_t n) {
    const int64_t step = m->d / 2 * LANE;
    float sums[LANE * BROAD * LANE];
    for (int64_t t = 0; t < n; t += BROAD * LANE)
        for (int64_t row = first; row < last; row += LANE) {
            const uint16_t *rows = tile + (row - first) * TILE_COLUMNS;
            const uint32_t *some = panels + t / LANE * step + from / 2 * LANE;
            for (int64_t i = t; i < n && i < t + BROAD * LANE; i++)
                __builtin_prefetch(y + i * m->o + row, 1); /* here by the time the sums are */
#define CALL(broad)                                                                                \
    block(sums, rows, some, step, (to - from) / 2, broad);                                         \
    outputs(y + t * m->o + row, m->o, n - t, last - row, sums, from > 0, broad)
            if (n - t <= LANE) {
                CALL(1);
            } else if (n - t <= 2 * LANE) {
                CALL(2);
            } else {
                CALL(BROAD);
            }
#undef CALL
        }
}

/* y (n, o) = x (n, d) W^T, both rounded to bfloat16; 1 if there is no memory, else 0. */
int grid_panels(const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, int64_t o,
                int64_t d, int64_t width, int bits, const float *x, int64_t n, float *y,
                int threads) {
    const Grid m = grid_of(codes, scales, zeros, o, d, width, bits);
    const int64_t blocks = (o + LANE - 1) / LANE, filled = (n + LANE - 1) / LANE;
    const int parts = workers(o * d * n, threads < blocks ? threads : (int)blocks);
    if (n == 0) return 0;
    uint32_t *panels = aligned_alloc(LINE, sizeof(uint32_t) * (size_t)(filled * LANE * (d / 2)));
    uint16_t *tiles = aligned_alloc(LINE, sizeof(uint16_t) * (size_t)(parts * TILE));
    if (panels == NULL || tiles == NULL) {
        free(panels);
        free(tiles);
        return 1;
    }
    const int fillers = workers(n * d, threads);
#pragma omp parallel for schedule(static) num_threads(fillers) if (fillers > 1)
    for (int64_t i = 0; i < filled; i++)
        fill(panels + i * LANE * (d / 2), x + i * LANE * d, n - i * LANE, d);
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        uint16_t *tile = tiles + part * TILE;
        const int64_t whole = share(blocks, part + 1, parts) * LANE, end = whole < o ? whole : o;
        for (int64_t row = share(blocks, part, parts) * LANE; row < end; row += TILE_ROWS) {
            const int64_t last = row + TILE_ROWS < end ? row + TILE_ROWS : end;
            for (int64_t from = 0; from < d; from += TILE_COLUMNS) {
                const int64_t to = from + TILE_COLUMNS < d ? from + TILE_COLUMNS : d;
                decode(tile, &m, row, last, from, to, bits);
                tile_product(y, &m, row, last, from, to, tile, panels, n);
            }
        }
    }
    free(panels);
    free(tiles);
    return 0;
}
#endif
