// Attention of one token a row over its own text, called by XLA: writes the tokens' keys and values into the KV cache, then
// attends. It reads what each row's text is long, and nothing for a row that is not in use.
//
//     q (R, K, G, H) float32, position (R), slot (R), source (U), target (U) int32, new keys and values (R, K, 1, H),
//     keys (B, K, S, H), values (B, K, S, H)
//     -> mixed values (R, K, G, H) float32, keys and values, in place
//
// Row r is at position[r], or at -1 if it is not in use: its result is NaN. It reads slot[r], which rows may share.
// Write u puts row source[u] into slot target[u], if there is such a slot. Keys and values are float32, bfloat16, or int8;
// behind each array of int8 comes that of its scales, a float32 for each H.
//
// A text's positions are taken in blocks, each with a softmax of its own, and these are combined in order (as flash-decoding
// does: Dao et al. 2023). Blocks begin at fixed positions, so a row's bits depend on its own text alone, and not on threads.
// Products are fused with their sums here. XLA rounds the softmax to the values' type, which is not done here.
#include <math.h>

#include "threads.h"
#include "vectors.h"

enum { KEYS = W == 8 ? 2 : 4 };  // read together, so that as many sums of QUERIES each are in registers
enum { BLOCK = 256 };   // positions
enum { QUERIES = 4 };   // that share one reading of a key
enum { VECTORS = 4 };   // of a value's W numbers, mixed at a time
enum { AHEAD = 4096 };  // bytes: as in integers.h
enum { PARTS = 2 };  // arrays that hold int8 keys: the numbers and their scales

typedef struct {
  const char *keys, *values;                // (count, H)
  const float *key_scales, *value_scales;   // (count)
  int64_t count;
  const F *q;       // (G, C)
  float *best, *total;  // (G), of the block's softmax
  F *mixed;         // (G, C)
} Block;

typedef struct {
  enum Type type;
  int64_t G, H, C, stride;  // C: vectors of H numbers, the last filled up with zeros; stride: bytes of H numbers
  const Block *blocks;
  int64_t count, parts;     // blocks, and how many shares they are done in
} Task;

// The lanes of a, then those of b, each two added up. Of W vectors, W - 1 such steps make one: the sum of each in a lane.
INLINE F add_pairs(F a, F b) {
#if W == 16
  return EACH(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         EACH(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif W == 8
  return EACH(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + EACH(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return EACH(a, b, 0, 2, 4, 6) + EACH(a, b, 1, 3, 5, 7);
#endif
}

INLINE float sum(F f) {
  for (int n = 1; n < W; n *= 2) f = add_pairs(f, f);
  return f[0];
}

// Scores of some queries with the W keys from the first on; of those behind the block's last, any numbers. `queries` and `type`
// are constants wherever this is inlined.
INLINE void score(const Task *t, const F *q, const Block *b, int64_t first, const int queries, const enum Type type,
                  float (*scores)[BLOCK]) {
  F sums[QUERIES][W];
  for (int j = 0; j < W; j += KEYS) {
    const char *key[KEYS];
    F s[QUERIES][KEYS];
    UNROLL for (int i = 0; i < KEYS; i++) {
      key[i] = b->keys + (first + j + i < b->count ? first + j + i : b->count - 1) * t->stride;
      __builtin_prefetch(key[i] + AHEAD, 0, 2);
      UNROLL for (int g = 0; g < queries; g++) s[g][i] = (F){0};
    }
    for (int64_t c = 0; c < t->C; c++) {
      F k[KEYS];
      UNROLL for (int i = 0; i < KEYS; i++) k[i] = read(key[i], c, t->H, type);
      UNROLL for (int g = 0; g < queries; g++) UNROLL for (int i = 0; i < KEYS; i++) s[g][i] += q[g * t->C + c] * k[i];
    }
    UNROLL for (int g = 0; g < queries; g++) UNROLL for (int i = 0; i < KEYS; i++) sums[g][j + i] = s[g][i];
  }
  UNROLL for (int g = 0; g < queries; g++) {
    for (int n = W / 2; n; n /= 2)
      for (int i = 0; i < n; i++) sums[g][i] = add_pairs(sums[g][2 * i], sums[g][2 * i + 1]);
    memcpy(scores[g] + first, &sums[g][0], sizeof(F));
  }
}

// Vectors c .. c + vectors - 1 of the values, mixed by each query's weights.
INLINE void mix(const Task *t, const Block *b, float (*weights)[BLOCK], int64_t c, const int vectors, const int queries,
                const enum Type type, F *mixed) {
  F sums[QUERIES][VECTORS];
  UNROLL for (int g = 0; g < queries; g++) UNROLL for (int v = 0; v < vectors; v++) sums[g][v] = (F){0};
  for (int64_t i = 0; i < b->count; i++) {
    const char *value = b->values + i * t->stride;
    __builtin_prefetch(value + AHEAD, 0, 2);
    UNROLL for (int v = 0; v < vectors; v++) {
      const F numbers = read(value, c + v, t->H, type);
      UNROLL for (int g = 0; g < queries; g++) sums[g][v] += weights[g][i] * numbers;
    }
  }
  UNROLL for (int g = 0; g < queries; g++) UNROLL for (int v = 0; v < vectors; v++) mixed[g * t->C + c + v] = sums[g][v];
}

INLINE void attend(const Task *t, const Block *b, int64_t first, const int queries, const enum Type type) {
  float weights[QUERIES][BLOCK] __attribute__((aligned(LINE)));
  const F *q = b->q + first * t->C;
  int64_t i;
  for (i = 0; i < b->count; i += W) score(t, q, b, i, queries, type, weights);
  UNROLL for (int g = 0; g < queries; g++) {
    if (type == INT8)
      for (i = 0; i < b->count; i++) weights[g][i] *= b->key_scales[i];
    for (i = b->count; i % W; i++) weights[g][i] = MASKED;
    F best = load(weights[g]), total = {0};
    for (i = W; i < b->count; i += W) best = larger(best, load(weights[g] + i));
    for (int n = 1; n < W; n++) best[0] = best[n] > best[0] ? best[n] : best[0];
    for (i = 0; i < b->count; i += W) {
      const F weight = exponential(load(weights[g] + i) - best[0]);
      total += weight;
      memcpy(weights[g] + i, &weight, sizeof weight);
    }
    if (type == INT8)
      for (i = 0; i < b->count; i++) weights[g][i] *= b->value_scales[i];
    b->best[first + g] = best[0];
    b->total[first + g] = sum(total);
  }
  int64_t c = 0;
  for (; c + VECTORS <= t->C; c += VECTORS) mix(t, b, weights, c, VECTORS, queries, type, b->mixed + first * t->C);
  for (; c < t->C; c++) mix(t, b, weights, c, 1, queries, type, b->mixed + first * t->C);
}

INLINE void attend_block(const Task *t, const Block *b, const enum Type type) {
  for (int64_t first = 0; first < t->G; first += QUERIES) {
    switch (t->G - first) {
      case 1: attend(t, b, first, 1, type); break;
      case 2: attend(t, b, first, 2, type); break;
      case 3: attend(t, b, first, 3, type); break;
      default: attend(t, b, first, QUERIES, type);
    }
  }
}

static void attend_float32(const Task *t, const Block *b) { attend_block(t, b, FLOAT32); }
static void attend_bfloat16(const Task *t, const Block *b) { attend_block(t, b, BFLOAT16); }
static void attend_int8(const Task *t, const Block *b) { attend_block(t, b, INT8); }

static void attend_part(const void *task, int64_t part) {
  const Task *t = task;
  for (int64_t i = part * t->count / t->parts; i < (part + 1) * t->count / t->parts; i++) {
    const Block *b = t->blocks + i;
    if (t->type == FLOAT32) attend_float32(t, b);
    else if (t->type == BFLOAT16) attend_bfloat16(t, b);
    else attend_int8(t, b);
  }
}

// Combines the blocks of one row's key head -> (G, H).
static void combine(const Task *t, const Block *blocks, int64_t count, float *out) {
  for (int64_t g = 0; g < t->G; g++) {
    float best = MASKED, total = 0;
    for (int64_t i = 0; i < count; i++) best = blocks[i].best[g] > best ? blocks[i].best[g] : best;
    for (int64_t c = 0; c < t->C; c++) {
      F mixed = {0};
      total = 0;
      for (int64_t i = 0; i < count; i++) {
        const F factor = exponential((F){0} + (blocks[i].best[g] - best));
        total += factor[0] * blocks[i].total[g];
        mixed += factor * blocks[i].mixed[g * t->C + c];
      }
      mixed = mixed / total;
      const int64_t left = t->H - c * W;
      memcpy(out + g * t->H + c * W, &mixed, (left < W ? left : W) * sizeof *out);
    }
  }
}

typedef struct {
  XLA_FFI_Buffer *const *sides[2];  // of the keys and of the values `parts` arrays: the numbers, and the scales of int8
  int64_t parts, B, K, S;
} Cache;

// Writes a row's new keys and values, each (K, H) and, for int8, their scales (K), at a position of a slot.
static void write(const Cache *cache, const Task *t, const char *const new[2][PARTS], int64_t slot, int64_t position) {
  for (int side = 0; side < 2; side++)
    for (int64_t part = 0; part < cache->parts; part++) {
      char *to = cache->sides[side][part]->data;
      const int64_t bytes = part ? (int64_t)sizeof(float) : t->stride;
      for (int64_t head = 0; head < cache->K; head++)
        memcpy(to + ((slot * cache->K + head) * cache->S + position) * bytes, new[side][part] + head * bytes, bytes);
    }
}

// Returns how many positions a row reads: as many as there are up to its own.
static int64_t reach(const Cache *cache, int64_t position) { return position + 1 < cache->S ? position + 1 : cache->S; }

// Writes the blocks of one head of a slot's first `reached` positions, and returns how many they are.
static int64_t cut(const Cache *cache, const Task *t, int64_t slot, int64_t head, int64_t reached, Block *blocks) {
  const char *const keys = cache->sides[0][0]->data, *const values = cache->sides[1][0]->data;
  for (int64_t i = 0; i < reached; i += BLOCK, blocks++) {
    const int64_t at = (slot * cache->K + head) * cache->S + i;
    blocks->count = reached - i < BLOCK ? reached - i : BLOCK;
    blocks->keys = keys + at * t->stride;
    blocks->values = values + at * t->stride;
    if (t->type == INT8) {
      blocks->key_scales = (const float *)cache->sides[0][1]->data + at;
      blocks->value_scales = (const float *)cache->sides[1][1]->data + at;
    }
  }
  return ceiling(reached, BLOCK);
}

KERNEL(decode_attention) {
  const float *q = arguments[0]->data;
  const int32_t *positions = arguments[1]->data, *slots = arguments[2]->data;
  const int32_t *source = arguments[3]->data, *target = arguments[4]->data;
  const int64_t R = arguments[0]->dims[0], K = arguments[0]->dims[1], G = arguments[0]->dims[2], H = arguments[0]->dims[3];
  XLA_FFI_Buffer **new = arguments + 5;
  const XLA_FFI_DataType stored = new[0]->dtype;
  Task t = {.type = stored == XLA_FFI_DataType_S8 ? INT8 : stored == XLA_FFI_DataType_BF16 ? BFLOAT16 : FLOAT32,
            .G = G, .H = H, .C = ceiling(H, W)};
  t.stride = H * bytes_of(t.type);
  const int64_t parts = t.type == INT8 ? PARTS : 1;
  const Cache cache = {.sides = {results + 1, results + 1 + parts}, .parts = parts, .B = results[1]->dims[0], .K = K,
                       .S = results[1]->dims[2]};

  for (int64_t u = 0; u < arguments[3]->dims[0]; u++) {
    const int64_t row = source[u], slot = target[u];
    if (slot < 0 || slot >= cache.B || positions[row] < 0 || positions[row] >= cache.S) continue;
    const char *from[2][PARTS];
    for (int side = 0; side < 2; side++)
      for (int64_t part = 0; part < cache.parts; part++)
        from[side][part] = (char *)new[side * cache.parts + part]->data + row * K * (part ? (int64_t)sizeof(float) : t.stride);
    write(&cache, &t, from, slot, positions[row]);
  }

  int64_t read_positions = 0;
  for (int64_t row = 0; row < R; row++) {
    t.count += K * ceiling(reach(&cache, positions[row]), BLOCK);
    read_positions += K * reach(&cache, positions[row]);
  }
  const size_t queries = R * K * G * t.C * sizeof(F), mixed = t.count * G * t.C * sizeof(F);
  const size_t sums = lines(t.count * G * 2 * sizeof(float)), blocks = lines(t.count * sizeof(Block));
  char *memory = aligned_alloc(LINE, lines(queries) + lines(mixed) + sums + blocks);
  if (!memory) return out_of_memory(call->api);
  F *padded = (F *)memory, *next_mixed = (F *)(memory + lines(queries));
  float *next_sums = (float *)(memory + lines(queries) + lines(mixed));
  Block *all = (Block *)(memory + lines(queries) + lines(mixed) + sums), *next = all;
  for (int64_t i = 0; i < R * K * G; i++)
    for (int64_t c = 0; c < t.C; c++) padded[i * t.C + c] = read((const char *)(q + i * H), c, H, FLOAT32);
  for (int64_t row = 0; row < R; row++)
    for (int64_t head = 0; head < K; head++)
      for (int64_t left = cut(&cache, &t, slots[row], head, reach(&cache, positions[row]), next); left; left--, next++) {
        next->q = padded + (row * K + head) * G * t.C;
        next->mixed = next_mixed, next_mixed += G * t.C;
        next->best = next_sums, next->total = next_sums + G, next_sums += 2 * G;
      }
  t.blocks = all;
  t.parts = 2 * read_positions * t.stride / PART;
  t.parts = t.parts < 1 ? 1 : t.parts > t.count ? t.count : t.parts;
  XLA_FFI_Error *error = t.count ? run(call, count_threads(call), attend_part, &t, t.parts) : NULL;
  float *out = results[0]->data;
  for (int64_t row = 0; row < R; row++) {
    const int64_t count = ceiling(reach(&cache, positions[row]), BLOCK);
    for (int64_t head = 0; head < K; head++, out += G * H, all += count) {
      if (count) combine(&t, all, count, out);
      else
        for (int64_t i = 0; i < G * H; i++) out[i] = NAN;
    }
  }
  free(memory);
  return error;
}

// Makes a KV cache of memory as it comes, which takes none until it is written: a text reads only what it has written.
XLA_FFI_Error *thrice_empty_cache(XLA_FFI_CallFrame *call) {
  answered_version(call);
  return NULL;
}
