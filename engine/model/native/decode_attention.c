// Attention of one token a row over its own text, called by XLA: writes the tokens' keys and values into the KV cache, then
// attends. It reads what a row's text is long, and nothing for a row that is not in use.
//
//     q (R, K, G, H) float32, position (R), slot (R), source (U), target (U) int32, new keys and values (R, K, 1, H),
//     keys (B, K, S, H), values (B, K, S, H)
//     -> mixed values (R, K, G, H) float32, keys and values, in place
//
// Row r is at position[r], or at -1 if it is not in use: its result is NaN. It reads slot[r], which rows may share.
// Write u puts row source[u] into slot target[u], if there is such a slot. Keys and values are float32, bfloat16, or int8;
// behind each array of int8 comes that of its scales, a float32 for each H.
//
// A text is taken in blocks, each with a softmax of its own, and these are combined in order (as flash-decoding does: Dao et
// al. 2023). Blocks begin at fixed positions, so a row's bits depend on its own text alone, and not on threads. XLA rounds the
// softmax to the values' type, which is not done here.
#include "threads.h"
#include "vectors.h"

enum { KEYS = W == 8 ? 2 : 4 };  // read together: KEYS * ROWS sums are in registers
enum { BLOCK = 256 };  // positions
enum { ROWS = 4 };  // queries that share one reading of a key
enum { VECTORS = 4 };  // of a value's W numbers, mixed at a time
enum { AHEAD = 4096 };  // bytes

typedef struct {
  const char *keys, *values;  // (count, H)
  const float *key_scales, *value_scales;  // (count), of int8
  int64_t count;
  float *best, *total;  // (G), of the block's softmax
  F *q, *mixed;  // (G, C)
} Block;

typedef struct {
  Type type;
  int64_t G, H, C, stride;  // C: vectors of H numbers, the last filled up with zeros; stride: bytes of H
  Block *blocks;
  float *sums;
  F *q, *mixed;
  int64_t rows, count, parts;  // of q; blocks, and how many shares they are done in
} Task;

// Scores of `rows` queries with W keys from the first on; behind the block's last they are any numbers.
INLINE void score(const Task *t, const F *q, const Block *b, int64_t first, const int rows, const Type type,
                  float (*scores)[BLOCK]) {
  F sums[ROWS][W];
  for (int j = 0; j < W; j += KEYS) {
    const char *key[KEYS];
    F s[ROWS][KEYS];
    EACH(i, KEYS) {
      key[i] = b->keys + (first + j + i < b->count ? first + j + i : b->count - 1) * t->stride;
      prefetch(key[i] + AHEAD);
      EACH(g, rows) s[g][i] = (F){0};
    }
    FOR(c, t->C) {
      F k[KEYS];
      EACH(i, KEYS) k[i] = read(key[i], c, t->H, type);
      EACH(g, rows) EACH(i, KEYS) s[g][i] += q[g * t->C + c] * k[i];
    }
    EACH(g, rows) EACH(i, KEYS) sums[g][j + i] = s[g][i];
  }
  EACH(g, rows) {
    for (int n = W / 2; n; n /= 2)
      FOR(i, n) sums[g][i] = add_pairs(sums[g][2 * i], sums[g][2 * i + 1]);
    store(scores[g] + first, sums[g][0]);
  }
}

// Mixes some vectors of the values, from c on.
INLINE void mix(const Task *t, const Block *b, float (*weights)[BLOCK], int64_t c, const int vectors, const int rows,
                const Type type, F *mixed) {
  F sums[ROWS][VECTORS];
  EACH(g, rows) EACH(v, vectors) sums[g][v] = (F){0};
  FOR(i, b->count) {
    const char *value = b->values + i * t->stride;
    prefetch(value + AHEAD);
    EACH(v, vectors) {
      const F numbers = read(value, c + v, t->H, type);
      EACH(g, rows) sums[g][v] += weights[g][i] * numbers;
    }
  }
  EACH(g, rows) EACH(v, vectors) mixed[g * t->C + c + v] = sums[g][v];
}

INLINE void attend(const Task *t, const Block *b, int64_t first, const int rows, const Type type) {
  float weights[ROWS][BLOCK] __attribute__((aligned(LINE)));
  const F *q = b->q + first * t->C;
  int64_t i, c = 0;
  for (i = 0; i < b->count; i += W) score(t, q, b, i, rows, type, weights);
  EACH(g, rows) {
    if (type == INT8)
      for (i = 0; i < b->count; i++) weights[g][i] *= b->key_scales[i];
    for (i = b->count; i % W; i++) weights[g][i] = MASKED;
    F best = load(weights[g]), total = {0};
    for (i = W; i < b->count; i += W) best = larger(best, load(weights[g] + i));
    for (int n = 1; n < W; n++) best[0] = best[n] > best[0] ? best[n] : best[0];
    for (i = 0; i < b->count; i += W) {
      const F weight = exponential(load(weights[g] + i) - best[0]);
      total += weight;
      store(weights[g] + i, weight);
    }
    if (type == INT8)
      for (i = 0; i < b->count; i++) weights[g][i] *= b->value_scales[i];
    b->best[first + g] = best[0];
    b->total[first + g] = sum(total);
  }
  for (; c + VECTORS <= t->C; c += VECTORS) mix(t, b, weights, c, VECTORS, rows, type, b->mixed + first * t->C);
  for (; c < t->C; c++) mix(t, b, weights, c, 1, rows, type, b->mixed + first * t->C);
}

INLINE void attend_block(const Task *t, const Block *b, const Type type) {
  for (int64_t first = 0; first < t->G; first += ROWS) WITH_ROWS(t->G - first, attend(t, b, first, rows, type))
}

static void attend_float32(const Task *t, const Block *b) { attend_block(t, b, FLOAT32); }
static void attend_bfloat16(const Task *t, const Block *b) { attend_block(t, b, BFLOAT16); }
static void attend_int8(const Task *t, const Block *b) { attend_block(t, b, INT8); }

static void attend_part(const void *task, int64_t part) {
  const Task *t = task;
  for (int64_t i = part * t->count / t->parts; i < (part + 1) * t->count / t->parts; i++) {
    if (t->type == FLOAT32) attend_float32(t, t->blocks + i);
    else if (t->type == BFLOAT16) attend_bfloat16(t, t->blocks + i);
    else attend_int8(t, t->blocks + i);
  }
}

// Combines a key head's blocks -> (G, H). NaN of none: 0 / 0.
static void combine(const Task *t, const Block *blocks, int64_t count, float *out) {
  for (int64_t g = 0; g < t->G; g++, out += t->H) {
    float best = MASKED;
    FOR(i, count) best = blocks[i].best[g] > best ? blocks[i].best[g] : best;
    FOR(c, t->C) {
      F mixed = {0};
      float total = 0;
      FOR(i, count) {
        const F factor = exponential(spread(blocks[i].best[g] - best));
        total += factor[0] * blocks[i].total[g];
        mixed += factor * blocks[i].mixed[g * t->C + c];
      }
      store_columns(out, mixed / total, c * W, t->H);
    }
  }
}

static void place(Task *t, Memory *memory) {
  t->q = claim(memory, t->rows * t->C * sizeof(F));
  t->mixed = claim(memory, t->count * t->G * t->C * sizeof(F));
  t->sums = claim(memory, t->count * t->G * 2 * sizeof(float));
  t->blocks = claim(memory, t->count * sizeof(Block));
}

// Whether a side's new numbers, those of the cache, and the scales behind both are of one type and fit each other.
static int are_rows_of(Buffer **new, Buffer **cache, int64_t R, int64_t K, int64_t H, int64_t B, int64_t S, int is_int8) {
  const XLA_FFI_DataType type = cache[0]->dtype;
  return (is_int8 ? type == S8 : type == F32 || type == BF16) && IS(new[0], type, R, K, 1, H) && IS(cache[0], type, B, K, S, H) &&
         (!is_int8 || (IS(new[1], F32, R, K, 1) && IS(cache[1], F32, B, K, S)));
}

KERNEL(decode_attention) {
  REQUIRE((call->rets.size == 3 || call->rets.size == 5) && call->args.size >= 4 + call->rets.size)
  const int32_t *positions = in[1]->data, *slots = in[2]->data;
  const int32_t *source = in[3]->data, *target = in[4]->data;
  const int arrays = call->rets.size - 1, half = arrays / 2;  // keys and values, of int8 each with its scales
  const int64_t R = dim(in[0], 0), K = dim(in[0], 1), G = dim(in[0], 2), H = dim(in[0], 3), U = dim(in[3], 0);
  const int64_t B = dim(out[1], 0), S = dim(out[1], 2);
  Buffer **new = in + 5, **cache = out + 1;
  REQUIRE(IS(in[0], F32, R, K, G, H) && IS(in[1], S32, R) && IS(in[2], S32, R) && IS(in[3], S32, U) && IS(in[4], S32, U))
  REQUIRE(IS(out[0], F32, R, K, G, H) && cache[half]->dtype == cache[0]->dtype)
  REQUIRE(are_rows_of(new, cache, R, K, H, B, S, half == 2) && are_rows_of(new + half, cache + half, R, K, H, B, S, half == 2))
  Task t = {.type = type_of(new[0]), .G = G, .H = H, .C = ceiling(H, W), .rows = R * K * G};
  t.stride = H * bytes_of(t.type);

  FOR(u, U) {
    const int64_t row = source[u], slot = target[u];
    REQUIRE(row >= 0 && row < R)
    const int64_t position = positions[row];
    if (slot < 0 || slot >= B || position < 0 || position >= S) continue;
    FOR(i, arrays)
      FOR(head, K) {
        const int64_t bytes = i % half ? (int64_t)sizeof(float) : t.stride;
        memcpy((char *)cache[i]->data + ((slot * K + head) * S + position) * bytes,
               (char *)new[i]->data + (row * K + head) * bytes, bytes);
      }
  }

  int64_t reach[R], positions_read = 0;
  FOR(row, R) {
    reach[row] = smaller(positions[row] + 1, S);
    REQUIRE(reach[row] <= 0 || (slots[row] >= 0 && slots[row] < B))
    t.count += K * ceiling(reach[row], BLOCK);
    positions_read += K * reach[row];
  }
  WITH_MEMORY(place, t)
  FOR(i, t.rows)
    FOR(c, t.C) t.q[i * t.C + c] = read((float *)in[0]->data + i * H, c, H, FLOAT32);
  Block *b = t.blocks;
  FOR(i, R * K) {
    const int64_t first = (slots[i / K] * K + i % K) * S, end = first + reach[i / K];
    for (int64_t at = first; at < end; at += BLOCK, b++) {
      const int64_t n = (b - t.blocks) * G;
      *b = (Block){.q = t.q + i * G * t.C, .keys = (char *)cache[0]->data + at * t.stride,
                   .values = (char *)cache[half]->data + at * t.stride, .count = smaller(end - at, BLOCK),
                   .best = t.sums + 2 * n, .total = t.sums + 2 * n + G, .mixed = t.mixed + n * t.C};
      if (arrays == 4) b->key_scales = (float *)cache[1]->data + at, b->value_scales = (float *)cache[3]->data + at;
    }
  }
  t.parts = smaller(2 * positions_read * t.stride / PART, t.count);
  if (!t.parts) t.parts = 1;
  if (t.count) run(call, count_threads(call), attend_part, &t, t.parts);
  b = t.blocks;
  FOR(i, R * K) {
    const int64_t count = ceiling(reach[i / K], BLOCK);
    combine(&t, b, count, (float *)out[0]->data + i * G * H);
    b += count;
  }
  free(memory.start);
  return NULL;
}

// A KV cache that takes no memory until it is written: a text reads only what it has written.
Error *thrice_empty_cache(Call *call) {
  answered_version(call);
  return NULL;
}
