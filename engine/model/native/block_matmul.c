// The product of some rows with a weight in GGUF's blocks as they are in the file, called by XLA. A block is 32 inputs of a
// column: Q4_0, numbers n from 0 to 15 and a scale s that stand for s (n - 8); Q5_0, from 0 to 31, s (n - 16); Q4_1 and Q5_1,
// with a minimum m, s n + m; Q8_0, numbers from -128 to 127 and a scale. Scales and minima are float16. Blocks that end in K
// are of 256 inputs, eight groups of 32: Q4_K and Q5_K with a small scale a and minimum b of each group, a s n - b m; Q6_K, from
// 0 to 63, with a small scale of each 16 inputs, a s (n - 32). IQ4_NL: places n from 0 to 15 in a table of values, s v[n]; as
// many bytes as Q4_0, from which it is told by int8 in place of uint8.
//
//     x (M, in) or (M, 2 in) float32, weight (out / 16, in / inputs of a block, bytes of 16 blocks) uint8 or int8, gain (in or
//     0) and eps float32
//       -> y (M, out) float32, and behind it what adapters add, if their arguments are behind eps (adapters.h)
//
// With a gain x is normalised first. Of 2 in columns SwiGLU is multiplied: the silu of the first half times the second.
//
// 16 blocks, of as many columns, lie side by side: 4 inputs of each column in 64 bytes, as a dot-product instruction takes
// them. Of 4 bits a byte holds the inputs i and i + 16. Fifth bits of a group follow in 64 bytes, in which bit k is of the
// inputs 4 k to 4 k + 3; fifth and sixth ones in twice 64, of inputs 0 to 15 and of 16 to 31. After the numbers of all groups
// come small scales, small minima, scales and minima. A weight is read once, in order: few rows wait for that, many for the
// instruction.
//
// x is rounded to int8 with a scale for each 32 numbers. A group's integers are summed exactly; groups are added in order, by
// the same operations for any number of rows, so a row's bits depend on the row alone. A row with a number that is not finite
// gives NaN.
#include "threads.h"
#include "adapters.h"

enum { ROWS = W == 16 ? 6 : 4 };  // that share one reading of a strip's weights, at most
enum { GROUP = 32 };
// The kinds, by the bytes of 16 blocks; IQ4_NL has those of Q4_0.
enum { Q4_0 = 288, Q4_1 = 320, Q5_0 = 352, Q5_1 = 384, Q8_0 = 544, Q4_K = 2368, Q5_K = 2880, Q6_K = 3360, IQ4_NL = 1 };
enum { COLUMNS = 16, STEP = 64, VECTORS = COLUMNS / W };  // of a strip; bytes of 4 inputs of each, a cache line
enum { ROUNDED = 16 * 1024 };  // numbers that a thread rounds at a time, about
enum { AHEAD = 4096 };  // bytes of weight
typedef int8_t Quads __attribute__((vector_size(4 * W)));  // 4 inputs of each of W columns

// Adds to the sums of W columns the products of their 4 inputs with those of a row. Weights without a sign are below 16, and
// `finish` makes their sums whole.
#if defined(__AVX512VNNI__)
enum { TOO_HIGH = 128 };  // the instruction takes weights without a sign: signed ones 128 too high
typedef int32_t __attribute__((may_alias)) Four;
// gcc 12 copies each sum before its intrinsic adds to it, and takes 1.8 times as long. Inputs are spread as they are read.
#define add_products(sums, weights, x, is_signed) \
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*(const Four *)(x)))
#define finish(sums, is_signed) (sums)
#elif defined(__AVX2__)
enum { TOO_HIGH = 0 };
// The instruction takes one side without a sign, which the other side then gets. It adds two products in 16 bits, where
// 2 * 128 * 127 fits: no input is ever -128. Those of weights without a sign stay there to a block's end: 16 of 15 * 127 fit.
INLINE I add_four(I sums, Quads weights, const int8_t *x, const int is_signed) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  const __m256i inputs = _mm256_set1_epi32(four), w = (__m256i)weights, ones = _mm256_set1_epi16(1);
  if (!is_signed) return (I)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16(w, inputs));
  return sums + (I)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(inputs, w)), ones);
}
#define add_products(sums, weights, x, is_signed) ((sums) = add_four(sums, weights, x, is_signed))
INLINE I finish(I sums, const int is_signed) {
  return is_signed ? sums : (I)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
enum { TOO_HIGH = 0 };
#define add_products(sums, weights, x, is_signed) \
  ((sums) = (I)vdotq_s32((int32x4_t)(sums), (int8x16_t)(weights), vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(x)))))
#define finish(sums, is_signed) (sums)
#else
#error "this processor is not known to multiply int8 fast"
#endif

INLINE int is_kind(const int64_t kind) {
  return kind == Q4_0 || kind == Q4_1 || kind == Q5_0 || kind == Q5_1 || kind == Q8_0 || kind == Q4_K || kind == Q5_K ||
         kind == Q6_K || kind == IQ4_NL;
}
INLINE int64_t bytes_of_kind(const int kind) { return kind == IQ4_NL ? Q4_0 : kind; }
INLINE int64_t groups_of(const int kind) { return kind >= Q4_K ? 8 : 1; }
INLINE int bits_of(const int kind) {
  return kind == Q8_0 ? 8 : kind == Q6_K ? 6 : kind == Q5_0 || kind == Q5_1 || kind == Q5_K ? 5 : 4;
}
INLINE int has_minimum(const int kind) { return kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K; }
// What each number is too high.
INLINE int offset_of(const int kind) {
  return kind == Q8_0 || kind == IQ4_NL ? TOO_HIGH : kind == Q6_K ? 32 : kind == Q5_0 ? 16 : kind == Q4_0 ? 8 : 0;
}

INLINE Quads load_quads(const void *from) { return (Quads)load(from); }

// The bits from `place` on of each byte, as the bits from 4 on.
INLINE Quads upper_bits(Quads bits, const int place, const int8_t mask) {
  return (Quads)(place < 4 ? (I)bits << (4 - place) : (I)bits >> (place - 4)) & mask;
}

// The values of IQ4_NL (llama.cpp's ggml-common.h), each TOO_HIGH, at places from 0 to 15.
INLINE Quads values_at(Quads places) {
  static const int8_t values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
#if W == 16
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
  return (Quads)_mm512_shuffle_epi8(table, (__m512i)places) ^ (int8_t)TOO_HIGH;
#elif W == 8
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
  return (Quads)_mm256_shuffle_epi8(table, (__m256i)places);
#else
  return (Quads)vqtbl1q_s8(vld1q_s8(values), (uint8x16_t)places);
#endif
}

// W float16 as float32.
INLINE F halves(const uint8_t *from) {
#if W == 16
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif W == 8
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
  return (F)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
#endif
}

// W small factors, of a byte each.
INLINE F small_factors(const uint8_t *from) { return widen((const char *)from, INT8); }

typedef struct {
  float scale;  // of 32 numbers of x
  float sum;  // of the numbers, rounded, for minima
  int32_t starts[2];  // what is too high in each of their sums, taken off: of all, or of each half
} Scale;

typedef struct {
  const float *x;
  const uint8_t *weight;
  float *y;
  int8_t *rows;  // (M, in), rounded
  Scale *scales;  // (M, groups)
  uint8_t *finite;  // (M)
  int64_t *order;  // (count): the rows to multiply
  const float *gain;  // of `in` numbers, or NULL
  float *prepared;  // (M, in): normalised, or after SwiGLU; NULL where x is multiplied as it is
  float eps;
  int64_t M, in, out, groups, kind, count, width;  // `width` of x
  int64_t size;  // of a part, in rows of x or in strips of 16 columns
  Adapters adapters;  // of the rows of x, or none; each row's is a part
} Task;

// Rounds 32 numbers of x as blocks.py does, to the steps of their largest magnitude. Returns whether all are finite.
INLINE int round_group(const float *x, int8_t *rounded, Scale *s, int offset, int in_halves) {
  uint32_t largest = 0;  // bits sort as magnitudes do, an infinity's and a NaN's last
  FOR(i, GROUP) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  memcpy(&s->scale, &largest, sizeof s->scale);
  s->scale *= 1.0f / 127;
  if (!isfinite(s->scale)) return 0;
  if (s->scale < 1.17549435e-38f) s->scale = 1;  // else its inverse could be infinite
  const float inverse = 1 / s->scale;
  int32_t sum = 0, of_second_half = 0;
  FOR(i, GROUP) {
    const int32_t nearest = (int32_t)rintf(x[i] * inverse);
    rounded[i] = nearest;
    sum += nearest;
  }
  if (in_halves) FOR(i, GROUP / 2) of_second_half += rounded[GROUP / 2 + i];
  s->sum = sum;
  s->starts[0] = -offset * (sum - of_second_half);
  s->starts[1] = -offset * of_second_half;
  return 1;
}

INLINE void normalise(const float *x, const float *gain, float eps, int64_t count, float *to) {
  F squares = {0};
  for (int64_t i = 0; i < count; i += W) squares = fused(load(x + i), load(x + i), squares);
  const F factor = spread(1 / sqrtf(sum(squares) / count + eps));
  for (int64_t i = 0; i < count; i += W) store(to + i, load(x + i) * factor * load(gain + i));
}

INLINE void swiglu(const float *gate, const float *up, int64_t count, float *to) {
  for (int64_t i = 0; i < count; i += W) {
    const F x = load(gate + i), e = exponential(-larger(x, -x)), one = spread(1);
    store(to + i, x * choose(x > 0, one, e) / (one + e) * load(up + i));
  }
}

static int round_row(const Task *t, int64_t row) {
  const float *x = t->x + row * t->width;
  if (t->prepared) {
    float *prepared = t->prepared + row * t->in;
    if (t->gain) normalise(x, t->gain, t->eps, t->in, prepared);
    else swiglu(x, x + t->in, t->in, prepared);
    x = prepared;
  }
  for (int64_t g = 0, first = row * t->groups; g < t->groups; g++)
    if (!round_group(x + g * GROUP, t->rows + (first + g) * GROUP, t->scales + first + g, offset_of(t->kind), t->kind == Q6_K))
      return 0;
  return 1;
}

static void round_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t stop = smaller((part + 1) * t->size, t->M);
  for (int64_t row = part * t->size; row < stop; row++) t->finite[row] = round_row(t, row);
}

// `rows` rows of the order, from the given one on, times 16 columns.
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int kind) {
  const int64_t groups = t->groups, together = groups_of(kind), number_bytes = bits_of(kind) * STEP;
  const int bits = bits_of(kind), has_offset = offset_of(kind) != 0;
  // AVX2 adds products of 4 bits in 16, which do not hold what is too high: that is taken off at the end.
  const int is_wide = bits > 4 || kind == IQ4_NL, is_late = W == 8 && !is_wide;
  const int64_t bytes = bytes_of_kind(kind);  // of 16 blocks
  const uint8_t *start = t->weight + strip * (groups / together) * bytes;
  const int8_t *x[ROWS];
  const Scale *scales[ROWS];
  F y[ROWS][VECTORS];
  EACH(row, rows) {
    x[row] = t->rows + t->order[first + row] * t->in;
    scales[row] = t->scales + t->order[first + row] * groups;
    EACH(v, VECTORS) y[row][v] = (F){0};
  }
  for (int64_t group = 0; group < groups; group++) {
    const int64_t inner = group % together, from = group * GROUP;
    const uint8_t *w = start + group / together * bytes, *numbers = w + inner * number_bytes;
    const uint8_t *small = w + together * number_bytes, *factors = small + (together > 1 ? 2 * together * COLUMNS : 0);
    EACH(i, (bytes / together + STEP - 1) / STEP) prefetch(w + inner * (bytes / together) + i * STEP + AHEAD);
    EACH(v, VECTORS) {
      const uint8_t *quads = numbers + v * sizeof(Quads);
      I sums[ROWS], others[ROWS];  // of Q6_K, the others are of the second half
      EACH(row, rows) {
        const Scale *s = scales[row] + group;
        sums[row] = (I){0} + (has_offset && !is_late ? s->starts[0] : 0);
        if (kind == Q6_K) others[row] = (I){0} + s->starts[1];
      }
      Quads upper[2];
      if (bits == 5) upper[0] = upper[1] = load_quads(quads + 4 * STEP);
      if (bits == 6) EACH(half, 2) upper[half] = load_quads(quads + (4 + half) * STEP);
      // Rows in turns: each row's sums wait for one another.
      FOR(i, (bits == 8 ? 8 : 4)) {
        const Quads both = load_quads(quads + i * STEP);
        if (bits == 8) {
          const Quads weights = both ^ (int8_t)TOO_HIGH;
          EACH(row, rows) add_products(sums[row], weights, x[row] + from + 4 * i, 1);
          continue;
        }
        Quads low = both & 15, high = (Quads)((I)both >> 4) & 15;
        if (bits == 5) low |= upper_bits(upper[0], i, 16), high |= upper_bits(upper[1], i + 4, 16);
        if (bits == 6) low |= upper_bits(upper[0], 2 * i, 48), high |= upper_bits(upper[1], 2 * i, 48);
        if (kind == IQ4_NL) low = values_at(low), high = values_at(high);
        EACH(row, rows) add_products(sums[row], low, x[row] + from + 4 * i, is_wide);
        if (kind == Q6_K) EACH(row, rows) add_products(others[row], high, x[row] + from + 4 * i + 16, 1);
        else EACH(row, rows) add_products(sums[row], high, x[row] + from + 4 * i + 16, is_wide);
      }
      F scale = halves(factors + 2 * W * v), least = scale, scale_of_others = scale;
      if (has_minimum(kind)) least = halves(factors + 2 * (COLUMNS + W * v));
      if (kind == Q6_K) {
        scale_of_others = scale * small_factors(small + (2 * inner + 1) * COLUMNS + W * v);
        scale *= small_factors(small + 2 * inner * COLUMNS + W * v);
      } else if (together > 1) {
        scale *= small_factors(small + inner * COLUMNS + W * v);
        least *= -small_factors(small + (together + inner) * COLUMNS + W * v);
      }
      EACH(row, rows) {
        const Scale *s = scales[row] + group;
        I integers = finish(sums[row], is_wide);
        if (has_offset && is_late) integers += s->starts[0];
        F total = __builtin_convertvector(integers, F) * scale;
        if (kind == Q6_K) total = fused(__builtin_convertvector(others[row], F), scale_of_others, total);
        if (has_minimum(kind)) total = fused(least, spread(s->sum), total);
        y[row][v] = fused(total, spread(s->scale), y[row][v]);
      }
    }
  }
  EACH(row, rows) EACH(v, VECTORS)
    store_columns(t->y + t->order[first + row] * t->out, y[row][v], strip * COLUMNS + v * W, t->out);
}

// All rows of the order.
INLINE void multiply_strip(const Task *t, int64_t strip, const int kind) {
  for (int64_t first = 0; first < t->count; first += ROWS)
    WITH_ROWS(t->count - first, multiply(t, first, rows, strip, kind))
}

static void multiply_part(const void *task, int64_t part) {
  const Task *t = task;
  if (part < t->adapters.rows) return add_row(&t->adapters, part);
  part -= t->adapters.rows;
  const int64_t first = part * t->size * COLUMNS, after = smaller(first + t->size * COLUMNS, t->out);
  for (int64_t strip = part * t->size; strip * COLUMNS < after; strip++) switch (t->kind) {
    case Q4_0: multiply_strip(t, strip, Q4_0); break;
    case Q4_1: multiply_strip(t, strip, Q4_1); break;
    case Q5_0: multiply_strip(t, strip, Q5_0); break;
    case Q5_1: multiply_strip(t, strip, Q5_1); break;
    case Q4_K: multiply_strip(t, strip, Q4_K); break;
    case Q5_K: multiply_strip(t, strip, Q5_K); break;
    case Q6_K: multiply_strip(t, strip, Q6_K); break;
    case IQ4_NL: multiply_strip(t, strip, IQ4_NL); break;
    default: multiply_strip(t, strip, Q8_0);
  }
  FOR(row, t->M)
    if (!t->finite[row]) memset(t->y + row * t->out + first, 0xff, (after - first) * 4);
}

static void place(Task *t, Memory *memory) {
  t->rows = claim(memory, t->M * t->in);
  t->scales = claim(memory, t->M * t->groups * sizeof *t->scales);
  t->order = claim(memory, t->M * sizeof *t->order);
  t->finite = claim(memory, t->M);
  if (t->gain || t->width > t->in) t->prepared = claim(memory, t->M * t->in * sizeof *t->prepared);
}

// Rounds the rows, then multiplies them.
KERNEL(block_matmul) {
  const int is_adapted = call->args.size > 4;
  REQUIRE(call->args.size == (is_adapted ? 9 : 4) && call->rets.size == (is_adapted ? 2 : 1))
  const int64_t M = dim(in[0], 0), width = dim(in[0], 1), blocks = dim(in[1], 1), bytes = dim(in[1], 2), gains = dim(in[2], 0);
  const int64_t kind = in[1]->dtype == S8 && bytes == bytes_of_kind(IQ4_NL) ? IQ4_NL : bytes;
  REQUIRE(is_kind(kind))
  const int64_t groups = blocks * groups_of(kind), inputs = groups * GROUP, columns = dim(out[0], 1);
  REQUIRE(blocks > 0 && columns > 0)
  REQUIRE(IS(in[1], kind == IQ4_NL ? S8 : U8, ceiling(columns, COLUMNS), blocks, bytes))
  REQUIRE(IS(in[0], F32, M, width) && IS(out[0], F32, M, columns))
  REQUIRE((width == inputs && (gains == 0 || gains == inputs)) || (width == 2 * inputs && gains == 0))
  REQUIRE(IS(in[2], F32, gains) && is_array(in[3], F32, 0, NULL))
  REQUIRE(!is_adapted || (are_adapters(M, inputs, in + 4, out[1]) && dim(out[1], 1) == columns))
  Task t = {.x = in[0]->data, .weight = in[1]->data, .y = out[0]->data, .gain = gains ? in[2]->data : NULL,
            .eps = *(const float *)in[3]->data, .M = M, .in = inputs, .out = columns, .groups = groups, .kind = kind,
            .width = width};
  WITH_MEMORY(place, t)
  if (is_adapted) t.adapters = adapters_of(t.prepared ? t.prepared : t.x, t.M, t.in, in + 4, out[1]);
  const int64_t threads = count_threads(call), strips = ceiling(t.out, COLUMNS);
  t.size = ceiling(ROUNDED, t.in);
  run(call, threads, round_part, &t, ceiling(t.M, t.size));
  FOR(row, t.M)
    if (t.finite[row]) t.order[t.count++] = row;
  t.size = ceiling(strips, threads * ceiling(strips * blocks * bytes, threads * PART));  // as many parts for each thread
  run(call, threads, multiply_part, &t, t.adapters.rows + ceiling(strips, t.size));
  free(memory.start);
  return NULL;
}
