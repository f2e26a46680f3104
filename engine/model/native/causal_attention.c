// Causal attention of whole texts, forward and backward, and of a prompt's chunk over its KV cache. No scores reach memory beyond a tile's.
//
//     forward:  q (B, T, N, H), k, v (B, T, K, H), segments (B, T) or (0) int32
//               -> mixed values (B, T, N * H), sums (B, N, 2, T) float32: each softmax's largest score and its sum
//     backward: q, k, v, segments, mixed values, sums, gradient (B, T, N * H) -> those of q, k, v
//     prefill:  q (R, T, N, H), position (R), slot (R) int32, keys (B, K, S, H), values (B, K, S, H) -> mixed values (R, T, N * H)
//
// All but the sums is of one type, float32 or bfloat16. A query attends to itself and back, inside its segment.
// In prefill row r's queries are those of the slot's positions from position[r] on, whose keys and values lie there already;
// where there is no such slot or position the result is NaN. Keys and values can be int8 there, of float32 queries: behind each
// array comes that of its scales (B, K, S), a float32 for each H.
//
// A part of the work is a text's key head with its queries, or with a tile of them. It goes through tiles of BLOCK queries and
// BLOCK keys in a fixed order, forward with a running softmax (Milakov & Gimelshein 2018, 1805.02867; Dao et al. 2022,
// 2205.14135), so its bits depend on that text alone, and not on threads. Keys' tiles begin at fixed positions, so a token's
// bits do not depend on where its chunk of a prompt begins. Tiles that causality or segments mask whole are not computed.
//
// Scores are key-major: lanes of a vector are queries. A product reads its left side a word at a time and its right side in
// vectors, and one routine does all seven. A word is a float32 or, where the processor multiplies them, a pair of bfloat16
// that follow each other along the sum; `step` is how many numbers that is.
#include <math.h>

#include "threads.h"
#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
enum { MULTIPLIES_PAIRS = 1 };
#else
enum { MULTIPLIES_PAIRS = 0 };
#endif
enum { ROWS = W == 8 ? 4 : 8, COLUMNS = 2 };  // of a product that are in registers, columns in vectors
enum { BLOCK = 64 };                     // queries of a tile, and keys
enum { LANES = COLUMNS * W };            // that a tile's queries are filled up to, with zeros
typedef union {
  float number;
  int32_t pair;
} Word;
enum Trim { WHOLE, FROM_ROW, TO_ROW };   // on the diagonal a row's sum begins or ends at its own number

typedef struct {
  const char *q, *k, *v, *mixed, *gradient;
  char *to_mixed, *to_q, *to_k, *to_v;
  float *sums;
  const int32_t *segments;  // or NULL
  const int32_t *positions, *slots;         // of prefill, or NULL
  const float *key_scales, *value_scales;   // of int8, or NULL
  int64_t T, N, K, H, B, S;  // B, S: of prefill's cache
  int64_t tiles;             // of queries, that a part has
  int64_t C, depth, padded;  // H in whole vectors; words of H numbers; keys of a text in whole LANES
  char *scratch;
  int64_t size;              // bytes of scratch of a thread
  _Atomic int *busy;         // which threads' scratch is
} Task;

INLINE I load_integers(const int32_t *from) {
  I i;
  memcpy(&i, from, sizeof i);
  return i;
}

INLINE F choose(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }

INLINE float dot(const char *a, const char *b, int64_t H, const enum Type type) {
  F sum = {0};
  float total = 0;
  for (int64_t c = 0; c * W < H; c++) sum += read(a, c, H, type) * read(b, c, H, type);
  for (int i = 0; i < W; i++) total += sum[i];
  return total;
}

INLINE uint16_t narrow(float number) {  // to the nearest, of two the even one
  const union { float number; uint32_t bits; } u = {number};
  if (number != number) return 0x7fc0;
  return (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16;
}

// Writes H numbers times a factor, rounded to the arrays' type.
INLINE void write_row(char *to, const float *from, float factor, int64_t H, const enum Type type) {
  for (int64_t h = 0; h < H; h++) {
    if (type == BFLOAT16) ((uint16_t *)to)[h] = narrow(from[h] * factor);
    else ((float *)to)[h] = from[h] * factor;
  }
}

// ---- The layouts of a product's sides. `from`: rows of H numbers, `stride` numbers apart.

// Vector c of the H numbers of row r, which are multiplied by the row's scale where they are int8.
INLINE F read_scaled(const char *row, int64_t c, int64_t H, const float *scales, int64_t r, const enum Type type) {
  return type == INT8 ? read(row, c, H, type) * scales[r] : read(row, c, H, type);
}

// -> (lanes, depth) words: a left side that is summed over H. Rows behind the last are zeros.
INLINE void pack_rows(Word *to, const char *from, const float *scales, int64_t stride, int64_t rows, int64_t lanes, int64_t H,
                      int64_t depth, const enum Type type, const int step) {
  for (int64_t r = 0; r < rows; r++, to += depth) {
    const char *row = from + r * stride * bytes_of(type);
    if (step == 2) {
      if (H % 2) to[depth - 1].pair = 0;
      memcpy(to, row, H * 2);
    } else
      for (int64_t c = 0; c * W < H; c++) store(to + c * W, read_scaled(row, c, H, scales, r, type));
  }
  memset(to, 0, (lanes - rows) * depth * sizeof *to);
}

// Words of a and b in turn: those of their first halves, or of their second.
INLINE F zip_first(F a, F b) {
#if W == 16
  return EACH(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif W == 8
  return EACH(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return EACH(a, b, 0, 4, 1, 5);
#endif
}
INLINE F zip_second(F a, F b) {
#if W == 16
  return EACH(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif W == 8
  return EACH(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return EACH(a, b, 2, 6, 3, 7);
#endif
}

// (lanes, depth) words -> (depth, lanes): a right side that is summed over H.
static __attribute__((noinline)) void turn(Word *to, const Word *from, int64_t lanes, int64_t depth) {
  for (int64_t r = 0; r < lanes; r += W) {
    int64_t d = 0;
    for (; d + W <= depth; d += W) {
      F square[W], zipped[W];
      UNROLL for (int i = 0; i < W; i++) square[i] = load(from + (r + i) * depth + d);
      for (int n = 1; n < W; n *= 2) {
        UNROLL for (int i = 0; i < W / 2; i++) {
          zipped[2 * i] = zip_first(square[i], square[i + W / 2]);
          zipped[2 * i + 1] = zip_second(square[i], square[i + W / 2]);
        }
        memcpy(square, zipped, sizeof square);
      }
      UNROLL for (int i = 0; i < W; i++) store(to + (d + i) * lanes + r, square[i]);
    }
    for (; d < depth; d++)
      for (int i = 0; i < W; i++) to[d * lanes + r + i] = from[(r + i) * depth + d];
  }
}

// -> (lanes / step, C) words: a right side that is summed over rows. Rows behind the last are zeros.
INLINE void stack(Word *to, const char *from, const float *scales, int64_t stride, int64_t rows, int64_t lanes, int64_t H,
                  int64_t C, const enum Type type, const int step) {
  for (int64_t r = 0; r < lanes; r += step, to += C) {
    const char *row = from + r * stride * bytes_of(type);
    if (step == 2) {
      const uint16_t *even = (const uint16_t *)row, *odd = even + stride;
      if (r + 1 < rows)
        for (int64_t h = 0; h < H; h++) to[h].pair = even[h] | (uint32_t)odd[h] << 16;
      else
        for (int64_t h = 0; h < H; h++) to[h].pair = r < rows ? even[h] : 0;
      for (int64_t h = H; h < C; h++) to[h].pair = 0;
    } else
      for (int64_t c = 0; c * W < H; c++) store(to + c * W, r < rows ? read_scaled(row, c, H, scales, r, type) : (F){0});
  }
}

// ---- The product

typedef struct {
  const Word *words;
  int64_t row, depth;  // words from one row to the next, and from one along the sum
} Left;

INLINE F multiply_add(F sum, Word left, F right, const int step) {
#if defined(__AVX512BF16__)
  if (step == 2) return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left.pair), (__m512bh)right);
#endif
  return sum + left.number * right;
}

INLINE void multiply_rows(const Word *left, const Left a, const Word *right, int64_t lanes, float *to, int64_t to_row,
                          int64_t begin, int64_t end, const int columns, const int adds, const int step) {
  F sums[ROWS][COLUMNS];
  UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < columns; c++)
    sums[r][c] = adds ? load(to + r * to_row + c * W) : (F){0};
  for (int64_t d = begin; d < end; d++) {
    F side[COLUMNS];
    UNROLL for (int c = 0; c < columns; c++) side[c] = load(right + d * lanes + c * W);
    UNROLL for (int r = 0; r < ROWS; r++) {
      const Word word = left[r * a.row + d * a.depth];
      UNROLL for (int c = 0; c < columns; c++) sums[r][c] = multiply_add(sums[r][c], word, side[c], step);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < columns; c++) store(to + r * to_row + c * W, sums[r][c]);
}

// to (rows, lanes) += left (rows, depth) times right (depth, lanes), in words; rows a multiple of ROWS, lanes of W.
INLINE void add_any_product(const Left a, const Word *right, float *to, int64_t rows, int64_t lanes, int64_t depth,
                        const enum Trim trim, const int step) {
  for (int64_t r = 0; r < rows; r += ROWS) {
    const int64_t begin = trim == FROM_ROW ? r / step : 0, reach = (r + ROWS) / step;
    const int64_t end = trim == TO_ROW && reach < depth ? reach : depth;
    int64_t c = 0;
    for (; c + LANES <= lanes; c += LANES)
      multiply_rows(a.words + r * a.row, a, right + c, lanes, to + r * lanes + c, lanes, begin, end, COLUMNS, 1, step);
    for (; c < lanes; c += W)
      multiply_rows(a.words + r * a.row, a, right + c, lanes, to + r * lanes + c, lanes, begin, end, 1, 1, step);
  }
}

// Scores of keys (keys, depth) with queries (depth, lanes) -> (keys, lanes). On the diagonal what is before a key is not written.
INLINE void score_any(const Word *keys, const Word *queries, float *to, int64_t count, int64_t lanes, int64_t depth,
                  const int diagonal, const int step) {
  const Left a = {keys, depth, 1};
  for (int64_t r = 0; r < count; r += ROWS)
    for (int64_t c = diagonal ? r / LANES * LANES : 0; c < lanes; c += LANES)
      multiply_rows(keys + r * depth, a, queries + c, lanes, to + r * lanes + c, lanes, 0, depth, COLUMNS, 0, step);
}

// Compiled once for each kind of word.
#define FOR_WORDS(step, name)                                                                                              \
  static __attribute__((noinline)) void add_##name(const Left a, const Word *right, float *to, int64_t rows,              \
                                                   int64_t lanes, int64_t depth, enum Trim trim) {                        \
    add_any_product(a, right, to, rows, lanes, depth, trim, step);                                                        \
  }                                                                                                                        \
  static __attribute__((noinline)) void score_##name(const Word *keys, const Word *queries, float *to, int64_t count,     \
                                                     int64_t lanes, int64_t depth, int diagonal) {                        \
    score_any(keys, queries, to, count, lanes, depth, diagonal, step);                                                    \
  }
FOR_WORDS(1, numbers)
#if defined(__AVX512BF16__)
FOR_WORDS(2, pairs)
#define add_product(a, right, to, rows, lanes, depth, trim, step) \
  ((step) == 2 ? add_pairs : add_numbers)(a, right, to, rows, lanes, depth, trim)
#define score(keys, queries, to, count, lanes, depth, diagonal, step) \
  ((step) == 2 ? score_pairs : score_numbers)(keys, queries, to, count, lanes, depth, diagonal)
#else
#define add_product(a, right, to, rows, lanes, depth, trim, step) add_numbers(a, right, to, rows, lanes, depth, trim)
#define score(keys, queries, to, count, lanes, depth, diagonal, step) \
  score_numbers(keys, queries, to, count, lanes, depth, diagonal)
#endif

// ---- A tile

// Which of W queries, in lanes, attend to a key. Both are numbers of a text's tokens.
INLINE I attends(const int32_t *segments, int64_t query, int64_t key) {
  I lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  I mask = lane >= (int32_t)(key - query);
  if (segments) mask &= load_integers(segments + query) == segments[key];
  return mask;
}

// Copies the segments of a text's tokens; those behind the last are of one that has no tokens.
static const int32_t *pad_segments(const Task *t, int64_t b, char *to) {
  if (!t->segments) return NULL;
  memcpy(to, t->segments + b * t->T, t->T * 4);
  memset(to + t->T * 4, 0xff, (t->padded - t->T) * 4);
  return (int32_t *)to;
}

// Whether some of the tokens from `a` on and from `b` on can be of one segment.
static int may_meet(const int32_t *segments, int64_t a, int64_t b, int64_t T) {
  int32_t low[2] = {INT32_MAX, INT32_MAX}, high[2] = {INT32_MIN, INT32_MIN};
  for (int side = 0; side < 2; side++)
    for (int64_t i = side ? b : a; i < T && i < (side ? b : a) + BLOCK; i++) {
      low[side] = segments[i] < low[side] ? segments[i] : low[side];
      high[side] = segments[i] > high[side] ? segments[i] : high[side];
    }
  return low[0] <= high[1] && low[1] <= high[0];
}

// Writes a key's, or two keys', numbers for W queries as words for a sum over keys: (keys / step, lanes).
INLINE void store_by_key(Word *to, int64_t lanes, int64_t key, F even, F odd, const int step) {
#if defined(__AVX512BF16__)
  if (step == 2) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd)), 16);
    _mm512_storeu_si512(to + key / 2 * lanes, _mm512_or_si512(low, high));
    return;
  }
#endif
  store(to + key * lanes, even);
  store(to + (key + 1) * lanes, odd);
}

// Writes a key's numbers for W queries as words for a sum over queries: (keys, lanes / step).
INLINE void store_by_query(Word *to, int64_t lanes, int64_t key, int64_t query, F numbers, const int step) {
#if defined(__AVX512BF16__)
  if (step == 2) {
    _mm256_storeu_si256((__m256i *)(to + (key * lanes + query) / 2), (__m256i)_mm512_cvtneps_pbh((__m512)numbers));
    return;
  }
#endif
  store(to + key * lanes + query, numbers);
}

// Keys of a diagonal tile that some of the W queries from `lane` on attend to.
INLINE int64_t keys_of(int64_t keys, int64_t lane, const int diagonal) {
  return diagonal && lane + W < keys ? lane + W : keys;
}

// Makes weights of a tile's scores (keys, lanes), as words for a sum over keys, and brings the softmax up to date.
INLINE void add_softmax(const int32_t *segments, float *scores, Word *weights, int64_t query, int64_t key,
                        int64_t keys, int64_t lanes, float *best, float *total, float *factor, const int diagonal,
                        const int masked, const int step) {
  for (int64_t lane = 0; lane < lanes; lane += W) {
    const int64_t count = keys_of(keys, lane, diagonal);
    const F before = load(best + lane);
    F top = before, sum = {0};
    for (int64_t i = 0; i < count; i++) {
      F s = load(scores + i * lanes + lane);
      if (masked) s = choose(attends(segments, query + lane, key + i), s, (F){0} + MASKED);
      top = larger(s, top);
    }
    for (int64_t i = 0; i < count; i += 2) {
      F p[2];
      UNROLL for (int j = 0; j < 2; j++) {
        p[j] = exponential(load(scores + (i + j) * lanes + lane) - top);
        if (masked) p[j] = choose(attends(segments, query + lane, key + i + j), p[j], (F){0});
        sum += p[j];
      }
      store_by_key(weights + lane, lanes, i, p[0], p[1], step);
    }
    const F scale = exponential(before - top);
    store(best + lane, top);
    store(total + lane, load(total + lane) * scale + sum);
    store(factor + lane, scale);
  }
}

// ---- Forward

typedef struct {
  Word *keys, *values, *rows, *queries, *weights;
  float *scores, *mixed, *best, *total, *factor;
} Forward;

static void *words(char **at, int64_t count) { return claim(at, count * sizeof(Word)); }

static Forward cut_forward(const Task *t, char **at) {
  return (Forward){
      .keys = words(at, t->padded * t->depth), .values = words(at, t->padded * t->C), .rows = words(at, BLOCK * t->depth),
      .queries = words(at, BLOCK * t->depth), .weights = words(at, BLOCK * BLOCK), .scores = words(at, BLOCK * BLOCK),
      .mixed = words(at, BLOCK * t->C), .best = words(at, BLOCK), .total = words(at, BLOCK), .factor = words(at, BLOCK)};
}

INLINE void mix_tile(const Task *t, const Forward *f, const int32_t *segments, int64_t query, int64_t key, int64_t lanes,
                     const int diagonal, const int masked, const int step) {
  const int64_t keys = diagonal ? lanes : t->padded - key < BLOCK ? t->padded - key : BLOCK;
  score(f->keys + key * t->depth, f->queries, f->scores, keys, lanes, t->depth, diagonal, step);
  add_softmax(segments, f->scores, f->weights, query, key, keys, lanes, f->best, f->total, f->factor, diagonal, masked, step);
  for (int64_t r = 0; r < lanes; r++)
    if (f->factor[r] != 1)
      for (int64_t c = 0; c < t->C; c += W) store(f->mixed + r * t->C + c, load(f->mixed + r * t->C + c) * f->factor[r]);
  const Left weights = {f->weights, 1, lanes};
  add_product(weights, f->values + key / step * t->C, f->mixed, lanes, t->C, keys / step, diagonal ? TO_ROW : WHOLE, step);
}

// The queries of a head's tiles from `first` on. `type` is that of keys and values, which queries share unless it is int8.
INLINE void forward_head(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch, const enum Type type) {
  const enum Type numbers = type == INT8 ? FLOAT32 : type;
  const int step = type == BFLOAT16 && MULTIPLIES_PAIRS ? 2 : 1;
  const int64_t T = t->T, H = t->H, C = t->C, G = t->N / t->K, row = t->N * H, bytes = bytes_of(numbers);
  const int64_t end = first + t->tiles * BLOCK < T ? first + t->tiles * BLOCK : T;
  const int64_t begin = t->positions ? t->positions[b] : 0, slot = t->positions ? t->slots[b] : b;
  const int is_cached = t->positions != NULL, is_used = !is_cached || (begin >= 0 && slot >= 0 && slot < t->B);
  const int64_t text = begin + end, reach = is_cached && t->S < text ? t->S : text;
  const Forward f = cut_forward(t, &scratch);
  const int32_t *segments = pad_segments(t, b, scratch);
  if (is_used) {
    const int64_t at = is_cached ? (slot * t->K + head) * t->S : b * T * t->K + head, stride = is_cached ? H : t->K * H;
    const int64_t from = at * H * bytes_of(type);
    const float *key_scales = type == INT8 ? t->key_scales + at : NULL, *value_scales = type == INT8 ? t->value_scales + at : NULL;
    pack_rows(f.keys, t->k + from, key_scales, stride, reach, t->padded, H, t->depth, type, step);
    stack(f.values, t->v + from, value_scales, stride, reach, t->padded, H, C, type, step);
  }
  for (int64_t n = head * G; n < (head + 1) * G; n++)
    for (int64_t query = first; query < end; query += BLOCK) {
      const int64_t rows = end - query < BLOCK ? end - query : BLOCK, lanes = ceiling(rows, LANES) * LANES;
      const int64_t at = ((b * T + query) * t->N + n) * H * bytes, position = begin + query;
      pack_rows(f.rows, t->q + at, NULL, row, rows, lanes, H, t->depth, numbers, step);
      turn(f.queries, f.rows, lanes, t->depth);
      memset(f.mixed, 0, lanes * C * 4);
      for (int64_t r = 0; r < lanes; r++) f.best[r] = MASKED, f.total[r] = 0;
      for (int64_t key = 0; is_used && key < position + rows && key < reach; key += BLOCK) {
        if (key == position && lanes <= t->padded - key) mix_tile(t, &f, segments, position, key, lanes, 1, 1, step);
        else if (!segments && key + BLOCK <= position) mix_tile(t, &f, segments, position, key, lanes, 0, 0, step);
        else if (!segments || may_meet(segments, position, key, T)) mix_tile(t, &f, segments, position, key, lanes, 0, 1, step);
      }
      for (int64_t r = 0; r < rows; r++)
        write_row(t->to_mixed + at + r * row * bytes, f.mixed + r * C, is_used ? 1 / f.total[r] : NAN, H, numbers);
      if (!t->sums) continue;
      float *sums = t->sums + (b * t->N + n) * 2 * T + query;
      memcpy(sums, f.best, rows * sizeof *sums);
      memcpy(sums + T, f.total, rows * sizeof *sums);
    }
}

// ---- Backward

typedef struct {
  Word *keys, *values, *stacked_keys;              // of all the text
  float *to_keys, *to_values;
  Word *rows, *queries, *gradients, *stacked_queries, *stacked_gradients;  // of a tile
  Word *weights, *slopes, *slopes_by_key;
  float *scores, *products, *to_queries, *best, *inverse, *delta;
} Backward;

static Backward cut_backward(const Task *t, char **at) {
  const int64_t text = t->padded * t->C, tile = BLOCK * BLOCK;
  return (Backward){
      .keys = words(at, t->padded * t->depth), .values = words(at, t->padded * t->depth), .stacked_keys = words(at, text),
      .to_keys = words(at, text), .to_values = words(at, text), .rows = words(at, BLOCK * t->depth),
      .queries = words(at, BLOCK * t->depth), .gradients = words(at, BLOCK * t->depth),
      .stacked_queries = words(at, BLOCK * t->C), .stacked_gradients = words(at, BLOCK * t->C), .weights = words(at, tile),
      .slopes = words(at, tile), .slopes_by_key = words(at, tile), .scores = words(at, tile), .products = words(at, tile),
      .to_queries = words(at, BLOCK * t->C), .best = words(at, BLOCK), .inverse = words(at, BLOCK),
      .delta = words(at, BLOCK)};
}

// As in attention_in_blocks.py, with P the weights and o = P v:
// dv = P^T g, dP = g v^T, dS = P (dP - sum(o g)), dq = dS k, dk = dS^T q.
INLINE void slope_tile(const Task *t, const Backward *f, const int32_t *segments, int64_t query, int64_t key, int64_t lanes,
                       const int diagonal, const int masked, const int step) {
  const int64_t keys = diagonal ? lanes : BLOCK, C = t->C;
  score(f->keys + key * t->depth, f->queries, f->scores, keys, lanes, t->depth, diagonal, step);
  score(f->values + key * t->depth, f->gradients, f->products, keys, lanes, t->depth, diagonal, step);
  for (int64_t lane = 0; lane < lanes; lane += W) {
    const F best = load(f->best + lane), inverse = load(f->inverse + lane), delta = load(f->delta + lane);
    for (int64_t i = 0; i < keys_of(keys, lane, diagonal); i += 2) {
      F p[2], slope[2];
      UNROLL for (int j = 0; j < 2; j++) {
        const int64_t at = (i + j) * lanes + lane;
        p[j] = exponential(load(f->scores + at) - best) * inverse;
        slope[j] = p[j] * (load(f->products + at) - delta);
        if (masked) {
          const I mask = attends(segments, query + lane, key + i + j);
          p[j] = choose(mask, p[j], (F){0});
          slope[j] = choose(mask, slope[j], (F){0});
        }
        store_by_query(f->weights, lanes, i + j, lane, p[j], step);
        store_by_query(f->slopes, lanes, i + j, lane, slope[j], step);
      }
      if (step == 2) store_by_key(f->slopes_by_key + lane, lanes, i, slope[0], slope[1], step);
    }
  }
  const enum Trim from = diagonal ? FROM_ROW : WHOLE, to = diagonal ? TO_ROW : WHOLE;
  const Left weights = {f->weights, lanes / step, 1}, slopes = {f->slopes, lanes / step, 1};
  const Left by_key = {step == 2 ? f->slopes_by_key : f->slopes, 1, lanes};
  add_product(weights, f->stacked_gradients, f->to_values + key * C, keys, C, lanes / step, from, step);
  add_product(slopes, f->stacked_queries, f->to_keys + key * C, keys, C, lanes / step, from, step);
  add_product(by_key, f->stacked_keys + key / step * C, f->to_queries, lanes, C, keys / step, to, step);
}

INLINE void backward_head(const Task *t, int64_t b, int64_t head, char *scratch, const enum Type type) {
  const int step = type == BFLOAT16 && MULTIPLIES_PAIRS ? 2 : 1, bytes = bytes_of(type);
  const int64_t T = t->T, H = t->H, C = t->C, G = t->N / t->K, row = t->N * H, at_key = (b * T * t->K + head) * H * bytes;
  const Backward f = cut_backward(t, &scratch);
  const int32_t *segments = pad_segments(t, b, scratch);
  pack_rows(f.keys, t->k + at_key, NULL, t->K * H, T, t->padded, H, t->depth, type, step);
  pack_rows(f.values, t->v + at_key, NULL, t->K * H, T, t->padded, H, t->depth, type, step);
  stack(f.stacked_keys, t->k + at_key, NULL, t->K * H, T, t->padded, H, C, type, step);
  memset(f.to_keys, 0, t->padded * C * 4);
  memset(f.to_values, 0, t->padded * C * 4);
  for (int64_t n = head * G; n < (head + 1) * G; n++)
    for (int64_t query = 0; query < T; query += BLOCK) {
      const int64_t rows = T - query < BLOCK ? T - query : BLOCK, lanes = ceiling(rows, LANES) * LANES;
      const int64_t at = ((b * T + query) * t->N + n) * H * bytes;
      pack_rows(f.rows, t->q + at, NULL, row, rows, lanes, H, t->depth, type, step);
      turn(f.queries, f.rows, lanes, t->depth);
      pack_rows(f.rows, t->gradient + at, NULL, row, rows, lanes, H, t->depth, type, step);
      turn(f.gradients, f.rows, lanes, t->depth);
      stack(f.stacked_queries, t->q + at, NULL, row, rows, lanes, H, C, type, step);
      stack(f.stacked_gradients, t->gradient + at, NULL, row, rows, lanes, H, C, type, step);
      memset(f.to_queries, 0, lanes * C * 4);
      const float *sums = t->sums + (b * t->N + n) * 2 * T + query;
      for (int64_t r = 0; r < lanes; r++) {
        f.best[r] = r < rows ? sums[r] : 0;
        f.inverse[r] = r < rows ? 1 / sums[T + r] : 0;
        const int64_t from = at + r * row * bytes;
        f.delta[r] = r < rows ? dot(t->mixed + from, t->gradient + from, H, type) : 0;
      }
      for (int64_t key = 0; key < query; key += BLOCK) {
        if (!segments) slope_tile(t, &f, segments, query, key, lanes, 0, 0, step);
        else if (may_meet(segments, query, key, T)) slope_tile(t, &f, segments, query, key, lanes, 0, 1, step);
      }
      slope_tile(t, &f, segments, query, query, lanes, 1, 1, step);
      for (int64_t r = 0; r < rows; r++) write_row(t->to_q + at + r * row * bytes, f.to_queries + r * C, 1, H, type);
    }
  for (int64_t r = 0; r < T; r++) {
    write_row(t->to_k + at_key + r * t->K * H * bytes, f.to_keys + r * C, 1, H, type);
    write_row(t->to_v + at_key + r * t->K * H * bytes, f.to_values + r * C, 1, H, type);
  }
}

// ---- What XLA calls

static void forward_float32(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch) {
  forward_head(t, b, head, first, scratch, FLOAT32);
}
static void forward_bfloat16(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch) {
  forward_head(t, b, head, first, scratch, BFLOAT16);
}
static void forward_int8(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch) {
  forward_head(t, b, head, first, scratch, INT8);
}
static void backward_float32(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch) {
  (void)first;
  backward_head(t, b, head, scratch, FLOAT32);
}
static void backward_bfloat16(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch) {
  (void)first;
  backward_head(t, b, head, scratch, BFLOAT16);
}

typedef void Head(const Task *t, int64_t b, int64_t head, int64_t first, char *scratch);

typedef struct {
  Task task;
  Head *head;
} Job;

static void do_head(const void *job, int64_t part) {
  const Job *j = job;
  const Task *t = &j->task;
  const int64_t shares = ceiling(t->T, t->tiles * BLOCK), of_head = part / shares;
  int64_t mine = 0;
  while (atomic_exchange(&t->busy[mine], 1)) mine++;  // no more threads come than there is scratch for
  j->head(t, of_head / t->K, of_head % t->K, part % shares * t->tiles * BLOCK, t->scratch + mine * t->size);
  atomic_store(&t->busy[mine], 0);
}

static XLA_FFI_Error *do_heads(XLA_FFI_CallFrame *call, Job *job, int64_t B, int is_backward) {
  Task *t = &job->task;
  const int half = ((XLA_FFI_Buffer **)call->args.args)[0]->dtype == XLA_FFI_DataType_BF16;
  if (!B || !t->T) return NULL;
  int64_t keys = t->T;
  for (int64_t row = 0; t->positions && row < B; row++) keys = t->positions[row] + t->T > keys ? t->positions[row] + t->T : keys;
  t->C = ceiling(t->H, W) * W;
  t->depth = half && MULTIPLIES_PAIRS ? ceiling(t->H, 2) : t->C;
  t->padded = ceiling(t->positions && t->S < keys ? t->S : keys, LANES) * LANES;
  t->tiles = t->positions ? 1 : ceiling(t->T, BLOCK);
  if (is_backward) job->head = half ? backward_bfloat16 : backward_float32;
  else job->head = half ? forward_bfloat16 : t->key_scales ? forward_int8 : forward_float32;
  char *end = NULL;
  if (is_backward) cut_backward(t, &end);
  else cut_forward(t, &end);
  words(&end, t->padded);  // segments
  t->size = end - (char *)NULL;
  const int64_t threads = count_threads(call), parts = B * t->K * ceiling(t->T, t->tiles * BLOCK), sides = threads < parts ? threads : parts;
  char *memory = aligned_alloc(LINE, sides * t->size + lines(sides * sizeof *t->busy));
  if (!memory) return out_of_memory(call->api);
  t->scratch = memory;
  t->busy = (_Atomic int *)(memory + sides * t->size);
  for (int64_t i = 0; i < sides; i++) atomic_init(&t->busy[i], 0);
  XLA_FFI_Error *error = run(call, threads, do_head, job, parts);
  free(memory);
  return error;
}

static Job job_of(XLA_FFI_Buffer **arguments) {
  const int64_t *dims = arguments[0]->dims;
  return (Job){{.q = arguments[0]->data, .k = arguments[1]->data, .v = arguments[2]->data, .T = dims[1], .N = dims[2],
                .K = arguments[1]->dims[2], .H = dims[3],
                .segments = arguments[3]->dims[0] ? arguments[3]->data : NULL}, NULL};
}

KERNEL(causal_attention) {
  Job job = job_of(arguments);
  job.task.to_mixed = results[0]->data;
  job.task.sums = results[1]->data;
  return do_heads(call, &job, arguments[0]->dims[0], 0);
}

KERNEL(causal_attention_backward) {
  Job job = job_of(arguments);
  job.task.mixed = arguments[4]->data;
  job.task.sums = arguments[5]->data;
  job.task.gradient = arguments[6]->data;
  job.task.to_q = results[0]->data;
  job.task.to_k = results[1]->data;
  job.task.to_v = results[2]->data;
  return do_heads(call, &job, arguments[0]->dims[0], 1);
}

KERNEL(prefill_attention) {
  const int64_t *q = arguments[0]->dims, *keys = arguments[3]->dims;
  const int parts = call->args.size == 7 ? 2 : 1;  // arrays that hold keys: the numbers and, of int8, their scales
  Job job = {{.q = arguments[0]->data, .positions = arguments[1]->data, .slots = arguments[2]->data,
              .k = arguments[3]->data, .v = arguments[3 + parts]->data,
              .to_mixed = results[0]->data,
              .key_scales = parts == 2 ? arguments[4]->data : NULL, .value_scales = parts == 2 ? arguments[6]->data : NULL,
              .T = q[1], .N = q[2], .H = q[3], .B = keys[0], .K = keys[1], .S = keys[2]}, NULL};
  return do_heads(call, &job, q[0], 0);
}
