// Causal attention of whole texts, forward and backward, and of a prompt's chunk over its KV cache.
//
//     forward:  q (B, T, N, H), k, v (B, T, K, H), segments (B, T) or (0) int32
//               -> mixed values (B, T, N * H), sums (B, N, 2, T) float32: each softmax's largest score and its sum
//     backward: q, k, v, segments, mixed values, sums, gradient (B, T, N * H) -> those of q, k, v
//     prefill:  q (R, T, N, H), position (R), slot (R) int32, keys, values (B, K, S, H) -> mixed values (R, T, N * H)
//
// All but the sums is of one type, float32 or bfloat16. A query attends to itself and back, inside its segment.
// In prefill row r's queries are those of the slot's positions from position[r] on, whose keys and values lie there already;
// where there is no such slot or position the result is NaN. Keys and values can be int8 there, of float32 queries: behind each
// array comes that of its scales (B, K, S), a float32 for each H.
//
// A part of the work is a text's key head with its queries, or with a tile of them. It goes through tiles of BLOCK queries and
// BLOCK keys in a fixed order, forward with a running softmax (Milakov & Gimelshein 2018, 1805.02867; Dao et al. 2022,
// 2205.14135), so its bits depend on that text alone, and not on threads. Keys' tiles begin at fixed positions, so a token's
// bits do not depend on where its chunk of a prompt begins. Tiles that are masked whole are not computed.
//
// Scores are key-major: lanes of a vector are queries. One routine does all products: it reads the left side a word at a time,
// the right side in vectors. A word is a float32 or, where the processor multiplies them, a pair of bfloat16 that follow each
// other along the sum; `step` is how many numbers that is.
#include "threads.h"
#include "vectors.h"

typedef union {
  float number;
  int32_t pair;
} Word;

// Words of two vectors in turn: of their first halves, or of their second.
#define IN_FIRST(i) (i) / 2 + (i) % 2 * W
#define IN_SECOND(i) IN_FIRST(i) + W / 2

#if defined(__AVX512BF16__)
enum { PAIR = 2 };  // numbers in a word of bfloat16
INLINE F multiply_pairs(F sum, Word left, F right) {
  return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left.pair), (__m512bh)right);
}
INLINE Halves narrow_all(F f) { return (Halves)_mm512_cvtneps_pbh((__m512)f); }
INLINE F pairs_of(F even, F odd) {
  const uint16_t __attribute__((vector_size(64))) places = {EVERY(IN_FIRST), EVERY(IN_SECOND)};
  return (F)_mm512_permutexvar_epi16((__m512i)places, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#else
enum { PAIR = 1 };
#define multiply_pairs(sum, left, right) (sum)  // never called
#define narrow_all(f) ((Halves){0})
#define pairs_of(even, odd) (even)
#endif
// Of a product that are in registers, columns in vectors. No more rows than W: a diagonal tile has weights in steps of W.
enum { ROWS = W == 16 ? 8 : 4, COLUMNS = W == 4 ? 4 : 2 };
enum { BLOCK = 64 };  // queries of a tile, and keys
enum { LANES = COLUMNS * W };  // that a tile's queries are filled up to, with zeros

typedef struct {
  const char *q, *k, *v, *mixed, *gradient;  // the last two backward only
  char *to, *to_k, *to_v;  // `to`: mixed values or the queries' gradient
  float *sums;  // or NULL
  const int32_t *segments;  // or NULL
  const int32_t *positions, *slots;  // of prefill, or NULL
  const float *key_scales, *value_scales;  // of int8
  Type type;  // of keys and values
  int64_t B, T, N, K, H, S;  // texts or slots, queries, heads, key heads, their width, keys
  int64_t to_text, to_head, to_row;  // from a text's, a head's, a position's keys to the next, in numbers
  int64_t queries;  // of a part
  int64_t C, depth, padded;  // H in whole vectors; words of H numbers; keys of a text in whole LANES
  char *scratch;
  int64_t size;  // bytes of a thread's scratch
} Task;

typedef struct {
  const int32_t *segments;  // of all the text, or NULL
  int64_t query, key;  // the first
  int64_t keys, lanes;
  int is_diagonal;
} Tile;

typedef struct {
  Word weights[BLOCK * BLOCK], slopes[BLOCK * BLOCK], slopes_by_key[BLOCK * BLOCK];
  float scores[BLOCK * BLOCK], products[BLOCK * BLOCK];
  float best[BLOCK], total[BLOCK], factor[BLOCK];  // of queries; forward
  float inverse[BLOCK], delta[BLOCK];  // backward
} Scores;

typedef struct {
  Scores *scores;
  int32_t *segments;
  Word *keys, *values, *stacked_keys;  // of all the text
  Word *rows, *queries, *gradients, *stacked_queries, *stacked_gradients;  // of a tile
  float *mixed, *to_keys, *to_values;  // mixed: or the queries' gradient
} Scratch;

static Scratch cut(const Task *t, Memory *m) {
  const int64_t text = t->padded * t->C * sizeof(Word), backward = t->gradient ? text : 0, rows = BLOCK * t->C * sizeof(Word);
  claim(m, LINE);  // whether a thread has taken it
  return (Scratch){
      .scores = claim(m, sizeof(Scores)), .segments = claim(m, t->padded * 4), .keys = claim(m, text), .values = claim(m, text),
      .stacked_keys = claim(m, backward), .to_keys = claim(m, backward), .to_values = claim(m, backward),
      .rows = claim(m, rows), .queries = claim(m, rows), .gradients = claim(m, rows), .stacked_queries = claim(m, rows),
      .stacked_gradients = claim(m, rows), .mixed = claim(m, rows)};
}

INLINE int step_of(const Type type) { return type == BFLOAT16 ? PAIR : 1; }

INLINE uint16_t narrow(float number) {  // to the nearest, of two the even one
  const union { float number; uint32_t bits; } u = {number};
  if (number != number) return 0x7fc0;
  return (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16;
}

// Writes H numbers times a factor.
INLINE void write_row(char *to, const float *from, float factor, int64_t H, const Type type) {
  FOR(h, H) {
    if (type == BFLOAT16) ((uint16_t *)to)[h] = narrow(from[h] * factor);
    else ((float *)to)[h] = from[h] * factor;
  }
}

// ---- The layouts of a product's sides

typedef struct {
  const char *numbers;
  const float *scales;  // of int8, each row's
  int64_t stride, count;  // bytes from a row to the next; rows
} Rows;

// -> (lanes, depth) words: a left side that is summed over H. Behind the last row are zeros.
INLINE void pack(const Task *t, Word *to, const Rows from, int64_t lanes, const Type type) {
  const int64_t H = t->H, depth = t->depth, words = type == FLOAT32 ? W : 1;
  for (int64_t r = 0; r < from.count; r++, to += depth) {
    const char *row = from.numbers + r * from.stride;
    if ((type == FLOAT32 && H % W) || step_of(type) == 2) {  // the former is slow by `read`
      memset(to + depth - words, 0, words * sizeof *to);
      memcpy(to, row, H * bytes_of(type));
    } else
      for (int64_t c = 0; c * W < H; c++) store(to + c * W, read(row, c, H, type) * (type == INT8 ? from.scales[r] : 1));
  }
  memset(to, 0, (lanes - from.count) * depth * sizeof *to);
}

// -> (lanes / step, C) words: a right side that is summed over rows.
INLINE void stack(const Task *t, Word *to, const Rows from, int64_t lanes, const Type type) {
  if (step_of(type) == 1) return pack(t, to, from, lanes, type);
  uint16_t zeros[t->H];
  memset(zeros, 0, sizeof zeros);
  for (int64_t r = 0; r < lanes; r += 2, to += t->C) {
    const char *row = from.numbers + r * from.stride;
    const uint16_t *even = r < from.count ? (const uint16_t *)row : zeros;
    const uint16_t *odd = r + 1 < from.count ? (const uint16_t *)(row + from.stride) : zeros;
    FOR(h, t->H) to[h].pair = even[h] | (uint32_t)odd[h] << 16;
    for (int64_t h = t->H; h < t->C; h++) to[h].pair = 0;
  }
}

// (lanes, depth) words -> (depth, lanes): a right side that is summed over H.
static NOINLINE void turn(Word *to, const Word *from, int64_t lanes, int64_t depth) {
  for (int64_t r = 0; r < lanes; r += W) {
    int64_t d = 0;
    for (; d + W <= depth; d += W) {
      F square[W], zipped[W];
      EACH(i, W) square[i] = load(from + (r + i) * depth + d);
      for (int n = 1; n < W; n *= 2) {
        EACH(i, W / 2) {
          zipped[2 * i] = PICK(square[i], square[i + W / 2], IN_FIRST);
          zipped[2 * i + 1] = PICK(square[i], square[i + W / 2], IN_SECOND);
        }
        memcpy(square, zipped, sizeof square);
      }
      EACH(i, W) store(to + (d + i) * lanes + r, square[i]);
    }
    for (; d < depth; d++)
      FOR(i, W) to[d * lanes + r + i] = from[(r + i) * depth + d];
  }
}

// ---- The product

typedef struct {
  const Word *words;
  int64_t row, depth;  // words from one row to the next, and from one along the sum
} Left;

// On the diagonal a row's sum begins or ends at its own number, or its columns begin there.
typedef enum { WHOLE, SUM_FROM_ROW, SUM_TO_ROW, FROM_COLUMN } Trim;

INLINE void multiply_rows(const Left a, const Word *right, float *to, int64_t lanes, int64_t begin, int64_t end,
                          const int columns, const int adds, const int step) {
  F sums[ROWS][COLUMNS];
  EACH(r, ROWS) EACH(c, columns)
    sums[r][c] = adds ? load(to + r * lanes + c * W) : (F){0};
  for (int64_t d = begin; d < end; d++) {
    F side[COLUMNS];
    EACH(c, columns) side[c] = load(right + d * lanes + c * W);
    EACH(r, ROWS) {
      const Word left = a.words[r * a.row + d * a.depth];
      EACH(c, columns)
        sums[r][c] = step == 2 ? multiply_pairs(sums[r][c], left, side[c]) : sums[r][c] + left.number * side[c];
    }
  }
  EACH(r, ROWS) EACH(c, columns) store(to + r * lanes + c * W, sums[r][c]);
}

INLINE void multiply(Left a, const Word *right, float *to, int64_t rows, int64_t lanes, int64_t depth, Trim trim, const int adds,
                     const int step) {
  for (int64_t r = 0; r < rows; r += ROWS, a.words += ROWS * a.row, to += ROWS * lanes) {
    const int64_t begin = trim == SUM_FROM_ROW ? r / step : 0;
    const int64_t end = trim == SUM_TO_ROW ? smaller((r + ROWS) / step, depth) : depth;
    int64_t c = trim == FROM_COLUMN ? r / LANES * LANES : 0;
    for (; c + LANES <= lanes; c += LANES) multiply_rows(a, right + c, to + c, lanes, begin, end, COLUMNS, adds, step);
    for (; c < lanes; c += W) multiply_rows(a, right + c, to + c, lanes, begin, end, 1, adds, step);
  }
}

// to (rows, lanes) = or += left (rows, depth) right (depth, lanes), in words; rows are a multiple of ROWS, lanes of W.
static NOINLINE void product(Left a, const Word *right, float *to, int64_t rows, int64_t lanes, int64_t depth, Trim trim, int adds,
                             int step) {
  if (step == 1 && adds) multiply(a, right, to, rows, lanes, depth, trim, 1, 1);
  else if (step == 1) multiply(a, right, to, rows, lanes, depth, trim, 0, 1);
  else if (adds) multiply(a, right, to, rows, lanes, depth, trim, 1, PAIR);
  else multiply(a, right, to, rows, lanes, depth, trim, 0, PAIR);
}

// ---- A tile

// Whether tokens of the tiles at a and b can be of one segment.
static int may_meet(const int32_t *segments, int64_t a, int64_t b, int64_t T) {
  int32_t low[2] = {INT32_MAX, INT32_MAX}, high[2] = {INT32_MIN, INT32_MIN};
  for (int side = 0; side < 2; side++, a = b)
    for (int64_t i = a; i < smaller(a + BLOCK, T); i++) {
      low[side] = segments[i] < low[side] ? segments[i] : low[side];
      high[side] = segments[i] > high[side] ? segments[i] : high[side];
    }
  return low[0] <= high[1] && low[1] <= high[0];
}

// Which of the W queries from `lane` on attend to key i.
INLINE I attends(const Tile t, int64_t lane, int64_t i) {
  const int64_t query = t.query + lane, key = t.key + i;
  I mask = (I){EVERY()} >= (int32_t)(key - query);
  if (t.segments) mask &= (I)load(t.segments + query) == t.segments[key];
  return mask;
}

// Keys that some of them attend to.
INLINE int64_t keys_of(const Tile t, int64_t lane) { return t.is_diagonal ? smaller(lane + W, t.keys) : t.keys; }

// Writes two keys' numbers of W queries for a sum over keys: (keys / step, lanes).
INLINE void store_by_key(Word *to, int64_t lanes, int64_t key, F even, F odd, const int step) {
  if (step == 2) store(to + key / 2 * lanes, pairs_of(even, odd));
  else {
    store(to + key * lanes, even);
    store(to + (key + 1) * lanes, odd);
  }
}

// Writes a key's numbers of W queries for a sum over queries: (keys, lanes / step).
INLINE void store_by_query(Word *to, int64_t lanes, int64_t key, int64_t query, F numbers, const int step) {
  if (step == 1) store(to + key * lanes + query, numbers);
  else {
    const Halves halves = narrow_all(numbers);
    memcpy(to + (key * lanes + query) / 2, &halves, sizeof halves);
  }
}

INLINE void score(const Task *t, const Tile tile, const Word *keys, const Word *queries, float *to, const int step) {
  product((Left){keys + tile.key * t->depth, t->depth, 1}, queries, to, tile.keys, tile.lanes, t->depth,
          tile.is_diagonal ? FROM_COLUMN : WHOLE, 0, step);
}

// Brings the softmax up to date, and mixes values.
INLINE void mix_tile(const Task *t, const Tile tile, const Scratch *m, const int is_masked, const int step) {
  Scores *s = m->scores;
  const int64_t C = t->C, lanes = tile.lanes;
  score(t, tile, m->keys, m->queries, s->scores, step);
  for (int64_t lane = 0; lane < lanes; lane += W) {
    const int64_t count = keys_of(tile, lane);
    const F before = load(s->best + lane);
    F top = before, sum = {0};
    FOR(i, count) {
      F score = load(s->scores + i * lanes + lane);
      if (is_masked) score = choose(attends(tile, lane, i), score, spread(MASKED));
      top = larger(score, top);
    }
    for (int64_t i = 0; i < count; i += 2) {
      F p[2];
      EACH(j, 2) {
        p[j] = exponential(load(s->scores + (i + j) * lanes + lane) - top);
        if (is_masked) p[j] = choose(attends(tile, lane, i + j), p[j], (F){0});
        sum += p[j];
      }
      store_by_key(s->weights + lane, lanes, i, p[0], p[1], step);
    }
    const F scale = exponential(before - top);
    store(s->best + lane, top);
    store(s->total + lane, load(s->total + lane) * scale + sum);
    store(s->factor + lane, scale);
  }
  FOR(r, lanes)
    if (s->factor[r] != 1)
      for (int64_t c = 0; c < C; c += W) store(m->mixed + r * C + c, load(m->mixed + r * C + c) * s->factor[r]);
  product((Left){s->weights, 1, lanes}, m->values + tile.key / step * C, m->mixed, lanes, C, tile.keys / step,
          tile.is_diagonal ? SUM_TO_ROW : WHOLE, 1, step);
}

// With P the weights and o = P v: dv = P^T g, dP = g v^T, dS = P (dP - sum(o g)), dq = dS k, dk = dS^T q.
INLINE void slope_tile(const Task *t, const Tile tile, const Scratch *m, const int is_masked, const int step) {
  Scores *s = m->scores;
  const int64_t C = t->C, lanes = tile.lanes, keys = tile.keys, key = tile.key;
  score(t, tile, m->keys, m->queries, s->scores, step);
  score(t, tile, m->values, m->gradients, s->products, step);
  for (int64_t lane = 0; lane < lanes; lane += W) {
    const F best = load(s->best + lane), inverse = load(s->inverse + lane), delta = load(s->delta + lane);
    for (int64_t i = 0; i < keys_of(tile, lane); i += 2) {
      F slope[2];
      EACH(j, 2) {
        const int64_t at = (i + j) * lanes + lane;
        F p = exponential(load(s->scores + at) - best) * inverse;
        slope[j] = p * (load(s->products + at) - delta);
        if (is_masked) {
          const I mask = attends(tile, lane, i + j);
          p = choose(mask, p, (F){0});
          slope[j] = choose(mask, slope[j], (F){0});
        }
        store_by_query(s->weights, lanes, i + j, lane, p, step);
        store_by_query(s->slopes, lanes, i + j, lane, slope[j], step);
      }
      if (step == 2) store_by_key(s->slopes_by_key + lane, lanes, i, slope[0], slope[1], step);
    }
  }
  const Word *by_key = step == 2 ? s->slopes_by_key : s->slopes;
  const Trim from = tile.is_diagonal ? SUM_FROM_ROW : WHOLE, to = tile.is_diagonal ? SUM_TO_ROW : WHOLE;
  const int64_t depth = lanes / step;
  product((Left){s->weights, depth, 1}, m->stacked_gradients, m->to_values + key * C, keys, C, depth, from, 1, step);
  product((Left){s->slopes, depth, 1}, m->stacked_queries, m->to_keys + key * C, keys, C, depth, from, 1, step);
  product((Left){by_key, 1, lanes}, m->stacked_keys + key / step * C, m->mixed, lanes, C, keys / step, to, 1, step);
}

// ---- A part

INLINE float dot(const char *a, const char *b, int64_t H, const Type type) {
  F products = {0};
  for (int64_t c = 0; c * W < H; c++) products += read(a, c, H, type) * read(b, c, H, type);
  return sum(products);
}

// The queries of a part from `first` on. `type` is that of keys, which queries share unless it is int8.
INLINE void do_head(const Task *t, int64_t b, int64_t head, int64_t first, const Scratch *m, const Type type) {
  const Type numbers = type == INT8 ? FLOAT32 : type;
  const int step = step_of(type), is_backward = type != INT8 && t->gradient;
  const int64_t T = t->T, H = t->H, C = t->C, G = t->N / t->K, row = t->N * H * bytes_of(numbers);
  const int64_t begin = t->positions ? t->positions[b] : 0, slot = t->positions ? t->slots[b] : b;
  const int64_t end = smaller(first + t->queries, T), reach = smaller(begin + end, t->S);
  const int64_t from = (slot * t->to_text + head * t->to_head) * bytes_of(type), stride = t->to_row * bytes_of(type);
  const int is_used = begin >= 0 && slot >= 0 && slot < t->B;
  Scores *s = m->scores;
  const int32_t *segments = t->segments ? m->segments : NULL;
  if (t->segments) {
    memcpy(m->segments, t->segments + b * T, T * 4);
    memset(m->segments + T, 0xff, (t->padded - T) * 4);  // one that has no tokens
  }
  if (is_used) {
    const int64_t scale = from / H;
    const Rows keys = {t->k + from, type == INT8 ? t->key_scales + scale : NULL, stride, reach};
    const Rows values = {t->v + from, type == INT8 ? t->value_scales + scale : NULL, stride, reach};
    pack(t, m->keys, keys, t->padded, type);
    if (is_backward) {
      pack(t, m->values, values, t->padded, type);
      stack(t, m->stacked_keys, keys, t->padded, type);
      memset(m->to_keys, 0, t->padded * C * 4);
      memset(m->to_values, 0, t->padded * C * 4);
    } else
      stack(t, m->values, values, t->padded, type);
  }
  for (int64_t n = head * G; n < (head + 1) * G; n++)
    for (int64_t query = first; query < end; query += BLOCK) {
      const int64_t rows = smaller(end - query, BLOCK), lanes = ceiling(rows, LANES) * LANES, position = begin + query;
      const int64_t at = ((b * T + query) * t->N + n) * H * bytes_of(numbers);
      float *sums = t->sums ? t->sums + (b * t->N + n) * 2 * T + query : NULL;
      const Rows queries = {t->q + at, NULL, row, rows};
      pack(t, m->rows, queries, lanes, numbers);
      turn(m->queries, m->rows, lanes, t->depth);
      memset(m->mixed, 0, lanes * C * 4);
      if (is_backward) {
        const Rows gradients = {t->gradient + at, NULL, row, rows};
        pack(t, m->rows, gradients, lanes, numbers);
        turn(m->gradients, m->rows, lanes, t->depth);
        stack(t, m->stacked_queries, queries, lanes, numbers);
        stack(t, m->stacked_gradients, gradients, lanes, numbers);
      }
      FOR(r, lanes) {
        s->best[r] = !is_backward ? MASKED : r < rows ? sums[r] : 0;
        s->total[r] = 0;
        if (!is_backward) continue;
        s->inverse[r] = r < rows ? 1 / sums[T + r] : 0;
        s->delta[r] = r < rows ? dot(t->mixed + at + r * row, t->gradient + at + r * row, H, numbers) : 0;
      }
      for (int64_t key = 0; is_used && key < smaller(position + rows, reach); key += BLOCK) {
        const int64_t left = t->padded - key;
        const int is_diagonal = key == position && lanes <= left, is_masked = is_diagonal || segments || key + BLOCK > position;
        const Tile tile = {segments, position, key, is_diagonal ? lanes : smaller(left, BLOCK), lanes, is_diagonal};
        if (!is_diagonal && segments && !may_meet(segments, position, key, T)) continue;
        if (is_backward) is_masked ? slope_tile(t, tile, m, 1, step) : slope_tile(t, tile, m, 0, step);
        else is_masked ? mix_tile(t, tile, m, 1, step) : mix_tile(t, tile, m, 0, step);
      }
      FOR(r, rows)
        write_row(t->to + at + r * row, m->mixed + r * C, is_backward ? 1 : is_used ? 1 / s->total[r] : NAN, H, numbers);
      if (is_backward || !sums) continue;
      memcpy(sums, s->best, rows * sizeof *sums);
      memcpy(sums + T, s->total, rows * sizeof *sums);
    }
  for (int64_t r = 0; is_backward && r < T; r++) {
    write_row(t->to_k + from + r * stride, m->to_keys + r * C, 1, H, type);
    write_row(t->to_v + from + r * stride, m->to_values + r * C, 1, H, type);
  }
}

static void do_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t shares = ceiling(t->T, t->queries), b = part / shares / t->K, head = part / shares % t->K;
  const int64_t first = part % shares * t->queries;
  Memory memory = {t->scratch, 0};
  while (atomic_exchange((_Atomic int *)memory.start, 1)) memory.start += t->size;  // there is one for each thread
  const Scratch m = cut(t, &memory);
  WITH_TYPE(t->type, do_head(t, b, head, first, &m, type))
  atomic_store((_Atomic int *)memory.start, 0);
}

// ---- What XLA calls

static Error *do_heads(Call *call, Task t, int64_t texts) {
  int32_t last = 0;
  for (int64_t row = 0; t.positions && row < texts; row++) last = t.positions[row] > last ? t.positions[row] : last;
  t.C = ceiling(t.H, W) * W;
  t.depth = step_of(t.type) == 2 ? ceiling(t.H, 2) : t.C;
  t.padded = ceiling(smaller(last + t.T, t.S), LANES) * LANES;
  Memory memory = {0};
  cut(&t, &memory);
  t.size = memory.used;
  const int64_t parts = t.T ? texts * t.K * ceiling(t.T, t.queries) : 0, threads = smaller(count_threads(call), parts);
  t.scratch = aligned_alloc(LINE, threads * t.size);
  if (!t.scratch) return out_of_memory(call);
  FOR(i, threads) atomic_init((_Atomic int *)(t.scratch + i * t.size), 0);
  run(call, threads, do_part, &t, parts);
  free(t.scratch);
  return NULL;
}

// Whether queries, keys, values, segments, mixed values and sums are of one batch of texts.
static int are_texts(Buffer **in, const Buffer *mixed, const Buffer *sums) {
  const int64_t B = dim(in[0], 0), T = dim(in[0], 1), N = dim(in[0], 2), H = dim(in[0], 3), K = dim(in[1], 2);
  const XLA_FFI_DataType type = in[0]->dtype;
  const int has_segments = IS(in[3], S32, B, T) || IS(in[3], S32, 0);
  return (type == F32 || type == BF16) && H > 0 && K > 0 && N % K == 0 && has_segments && IS(in[0], type, B, T, N, H) &&
         IS(in[1], type, B, T, K, H) && IS(in[2], type, B, T, K, H) && IS(mixed, type, B, T, N * H) && IS(sums, F32, B, N, 2, T);
}

static int are_alike(const Buffer *a, const Buffer *b) { return is_array(a, b->dtype, b->rank, b->dims); }

static Task task_of(Buffer **in, Buffer **out, float *sums) {
  const int64_t *q = in[0]->dims, T = q[1], K = in[1]->dims[2], H = q[3];
  return (Task){.q = in[0]->data, .k = in[1]->data, .v = in[2]->data, .segments = in[3]->dims[0] ? in[3]->data : NULL,
                .to = out[0]->data, .sums = sums, .type = type_of(in[0]), .B = q[0], .T = T, .N = q[2], .K = K, .H = H, .S = T,
                .queries = T, .to_text = T * K * H, .to_head = H, .to_row = K * H};
}

KERNEL(causal_attention) {
  REQUIRE(call->args.size == 4 && call->rets.size == 2 && are_texts(in, out[0], out[1]))
  return do_heads(call, task_of(in, out, out[1]->data), in[0]->dims[0]);
}

KERNEL(causal_attention_backward) {
  REQUIRE(call->args.size == 7 && call->rets.size == 3 && are_texts(in, in[4], in[5]) && are_alike(in[6], in[4]))
  REQUIRE(are_alike(out[0], in[0]) && are_alike(out[1], in[1]) && are_alike(out[2], in[2]))
  Task t = task_of(in, out, in[5]->data);
  t.mixed = in[4]->data;
  t.gradient = in[6]->data;
  t.to_k = out[1]->data;
  t.to_v = out[2]->data;
  return do_heads(call, t, t.B);
}

KERNEL(prefill_attention) {
  REQUIRE(call->args.size == 5 || call->args.size == 7)
  const int is_int8 = call->args.size == 7;
  const XLA_FFI_DataType type = in[3]->dtype, numbers = is_int8 ? F32 : type;
  const Buffer *values = in[is_int8 ? 5 : 4];
  const int64_t R = dim(in[0], 0), T = dim(in[0], 1), N = dim(in[0], 2), H = dim(in[0], 3);
  const int64_t B = dim(in[3], 0), K = dim(in[3], 1), S = dim(in[3], 2);
  REQUIRE((is_int8 ? type == S8 : type == F32 || type == BF16) && H > 0 && K > 0 && N % K == 0 && call->rets.size == 1)
  REQUIRE(IS(in[0], numbers, R, T, N, H) && IS(in[1], S32, R) && IS(in[2], S32, R) && IS(out[0], numbers, R, T, N * H))
  REQUIRE(IS(in[3], type, B, K, S, H) && are_alike(values, in[3]))
  REQUIRE(!is_int8 || (IS(in[4], F32, B, K, S) && IS(in[6], F32, B, K, S)))
  Task t = {.q = in[0]->data, .positions = in[1]->data, .slots = in[2]->data, .k = in[3]->data, .v = values->data,
            .to = out[0]->data, .type = type_of(in[3]), .B = B, .T = T, .N = N, .K = K, .H = H, .S = S, .queries = BLOCK,
            .to_text = K * S * H, .to_head = S * H, .to_row = H};
  if (is_int8) t.key_scales = in[4]->data, t.value_scales = in[6]->data;
  return do_heads(call, t, R);
}
