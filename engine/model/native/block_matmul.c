// The product of some rows with a weight in GGUF's blocks as they are in the file, called by XLA. A block is 32 inputs of a
// column: Q4_0, numbers from 0 to 15 and a scale s that stand for s (n - 8); Q4_1, a scale and a minimum m that stand for
// s n + m; Q8_0, numbers from -128 to 127 and a scale. Scales and minima are float16.
//
//     x (M, in) float32, weight (out / 16, in / 32, bytes of 16 blocks) uint8 -> y (M, out) float32
//
// 16 blocks, of as many columns, lie side by side: 4 inputs of each column in 64 bytes, then the scales, then the minima. Of
// 4 bits a byte holds the inputs i and i + 16. x is rounded to int8 with a scale for each 32 numbers. Within a block integers
// are summed, exactly; blocks are added in order, by the same operations however many rows there are, so that a row's bits
// depend on the row alone. A row with a number that is not finite gives NaN.
#include <math.h>

#include "threads.h"

enum { COLUMNS = 16, GROUP = 32, STEP = 64 };  // STEP: bytes of 4 inputs of all columns, a cache line
enum { Q4_0 = 288, Q4_1 = 320, Q8_0 = 544 };   // the kinds, by the bytes of 16 blocks
enum { ROUNDED = 16 * 1024 };                  // numbers that a thread rounds at a time, about
enum { AHEAD = 4096 };                         // bytes of weight: as in int8_matmul.c

// Vectors of W columns: Bytes, 4 inputs of each; Ints; Floats. A block's sums begin, get the products of 4 inputs of a row with
// each column, and finish as integers of 32 bits.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define ROWS 6
enum { W = 16, VECTORS = COLUMNS / W, TOO_HIGH = 128 };  // the instruction takes weights without a sign: Q8_0's are 128 too high
typedef __m512i Bytes, Ints;
typedef __m512 Floats;
static inline Bytes load(const uint8_t *w) { return _mm512_loadu_si512(w); }
static inline Bytes low(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline Bytes high(Bytes w) { return low(_mm512_srli_epi16(w, 4)); }
static inline Bytes byte(Bytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
static inline Floats halves(const uint8_t *w) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w)); }
static inline Floats spread(float value) { return _mm512_set1_ps(value); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
static inline void store(float *to, Floats f) { _mm512_storeu_ps(to, f); }
typedef int32_t __attribute__((may_alias)) Four;
#define begin(start, kind) _mm512_set1_epi32(start)
// As in int8_matmul.c: gcc 12 copies each sum before its intrinsic adds to it. Four inputs of x are spread as they are read.
#define add_products(sums, weights, x, kind) \
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*(const Four *)(x)))
#define finish(sums, start, kind) (sums)
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define ROWS 4
enum { W = 8, VECTORS = COLUMNS / W, TOO_HIGH = 0 };
typedef __m256i Bytes, Ints;
typedef __m256 Floats;
static inline Bytes load(const uint8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }
static inline Bytes low(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline Bytes high(Bytes w) { return low(_mm256_srli_epi16(w, 4)); }
static inline Bytes byte(Bytes w) { return w; }
static inline Floats halves(const uint8_t *w) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w)); }
static inline Floats spread(float value) { return _mm256_set1_ps(value); }
static inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats to_floats(Ints i) { return _mm256_cvtepi32_ps(i); }
static inline void store(float *to, Floats f) { _mm256_storeu_ps(to, f); }
static inline __m256i spread_inputs(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}
// Of 4 bits pairs of products stay in 16 bits to the end, where 16 of at most 15 * 127 fit; of Q8_0, 2 of 128 * 127 do.
#define begin(start, kind) _mm256_setzero_si256()
static inline void add_products_to(Ints *sums, Bytes weights, const int8_t *x, const int kind) {
  const __m256i inputs = spread_inputs(x);
  if (kind == Q8_0) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
    *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  } else {
    *sums = _mm256_add_epi16(*sums, _mm256_maddubs_epi16(weights, inputs));
  }
}
#define add_products(sums, weights, x, kind) add_products_to(&(sums), weights, x, kind)
static inline Ints finish(Ints sums, int32_t start, const int kind) {
  if (kind == Q8_0) return sums;
  sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  return kind == Q4_0 ? _mm256_add_epi32(sums, _mm256_set1_epi32(start)) : sums;
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define ROWS 4
enum { W = 4, VECTORS = COLUMNS / W, TOO_HIGH = 0 };
typedef int8x16_t Bytes;
typedef int32x4_t Ints;
typedef float32x4_t Floats;
static inline Bytes load(const uint8_t *w) { return vld1q_s8((const int8_t *)w); }
static inline Bytes low(Bytes w) { return vandq_s8(w, vdupq_n_s8(15)); }
static inline Bytes high(Bytes w) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4)); }
static inline Bytes byte(Bytes w) { return w; }
static inline Floats halves(const uint8_t *w) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(w))); }
static inline Floats spread(float value) { return vdupq_n_f32(value); }
static inline Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
static inline Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline Floats to_floats(Ints i) { return vcvtq_f32_s32(i); }
static inline void store(float *to, Floats f) { vst1q_f32(to, f); }
#define begin(start, kind) vdupq_n_s32(start)
static inline Ints add_products_to(Ints sums, Bytes weights, const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return vdotq_s32(sums, weights, vreinterpretq_s8_s32(vdupq_n_s32(four)));
}
#define add_products(sums, weights, x, kind) ((sums) = add_products_to(sums, weights, x))
#define finish(sums, start, kind) (sums)
#else
#error "this processor is not known to multiply int8 fast"
#endif

typedef struct {
  float scale;     // of 32 numbers of x
  float sum;       // of the 32 numbers, rounded, for minima
  int32_t start;   // what is too high in each of a block's sums, taken off from the start
} Scale;

typedef struct {
  const float *x;
  const uint8_t *weight;
  float *y;
  int8_t *rows;      // (M, in), rounded
  Scale *scales;     // (M, in / 32)
  uint8_t *finite;   // (M)
  int64_t *order;    // (M): the `count` rows to multiply, then the others
  int64_t M, in, out, kind, count;
  int64_t size;      // of a part, in rows of x or in strips of 16 columns
} Task;

// `rows` rows of the order from the given one on, times 16 columns. `rows` and `kind` are constants wherever this is inlined.
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int kind) {
  const int64_t groups = t->in / GROUP, column = strip * COLUMNS, left = t->out - column;
  const uint8_t *w = t->weight + strip * groups * kind;
  const int8_t *x[ROWS];
  const Scale *scales[ROWS];
  Floats y[ROWS][VECTORS];
  UNROLL for (int row = 0; row < rows; row++) {
    x[row] = t->rows + t->order[first + row] * t->in;
    scales[row] = t->scales + t->order[first + row] * groups;
    UNROLL for (int v = 0; v < VECTORS; v++) y[row][v] = spread(0);
  }
  for (int64_t group = 0; group < groups; group++, w += kind) {
    const int64_t from = group * GROUP;
    const uint8_t *after = w + (kind == Q8_0 ? 8 : 4) * STEP;  // scales
    Ints sums[ROWS][VECTORS];
    UNROLL for (int i = 0; i < (kind + STEP - 1) / STEP; i++) __builtin_prefetch(w + i * STEP + AHEAD, 0, 2);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      UNROLL for (int row = 0; row < rows; row++) sums[row][v] = begin(kind == Q4_1 ? 0 : scales[row][group].start, kind);
      // Rows in turns: each row's sums wait for one another.
      for (int i = 0; i < (kind == Q8_0 ? 8 : 4); i++) {
        const Bytes weights = load(w + i * STEP + 4 * W * v);
        if (kind == Q8_0) {
          UNROLL for (int row = 0; row < rows; row++) add_products(sums[row][v], byte(weights), x[row] + from + 4 * i, kind);
        } else {
          UNROLL for (int row = 0; row < rows; row++) add_products(sums[row][v], low(weights), x[row] + from + 4 * i, kind);
          UNROLL for (int row = 0; row < rows; row++) add_products(sums[row][v], high(weights), x[row] + from + 4 * i + 16, kind);
        }
      }
      const Floats scale = halves(after + 2 * W * v), least = kind == Q4_1 ? halves(after + 2 * (COLUMNS + W * v)) : scale;
      UNROLL for (int row = 0; row < rows; row++) {
        const Scale *s = scales[row] + group;
        Floats total = times(to_floats(finish(sums[row][v], s->start, kind)), scale);
        if (kind == Q4_1) total = fused(least, spread(s->sum), total);
        y[row][v] = fused(total, spread(s->scale), y[row][v]);
      }
    }
  }
  UNROLL for (int row = 0; row < rows; row++) {
    float all[COLUMNS], *to = t->y + t->order[first + row] * t->out + column;
    UNROLL for (int v = 0; v < VECTORS; v++) store(left < COLUMNS ? all + W * v : to + W * v, y[row][v]);
    if (left < COLUMNS) memcpy(to, all, left * sizeof *to);
  }
}

// All rows of the order times 16 columns.
INLINE void multiply_rows(const Task *t, int64_t strip, const int kind) {
  for (int64_t first = 0; first < t->count; first += ROWS) {
    switch (t->count - first) {
      case 1: multiply(t, first, 1, strip, kind); break;
      case 2: multiply(t, first, 2, strip, kind); break;
      case 3: multiply(t, first, 3, strip, kind); break;
#if ROWS > 4
      case 4: multiply(t, first, 4, strip, kind); break;
      case 5: multiply(t, first, 5, strip, kind); break;
#endif
      default: multiply(t, first, ROWS, strip, kind);
    }
  }
}

static void multiply_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t strips = ceiling(t->out, COLUMNS), end = (part + 1) * t->size, stop = end < strips ? end : strips;
  for (int64_t strip = part * t->size; strip < stop; strip++) switch (t->kind) {
    case Q4_0: multiply_rows(t, strip, Q4_0); break;
    case Q4_1: multiply_rows(t, strip, Q4_1); break;
    default: multiply_rows(t, strip, Q8_0);
  }
  const int64_t column = part * t->size * COLUMNS, after = stop * COLUMNS < t->out ? stop * COLUMNS : t->out;
  for (int64_t i = t->count; i < t->M; i++) memset(t->y + t->order[i] * t->out + column, 0xff, (after - column) * sizeof *t->y);
}

// Rounds 32 numbers of x. Returns 0 when one of them is not finite. Rounds as blocks.py does.
static inline int round_group(const float *x, int8_t *rounded, Scale *s, int too_high) {
  uint32_t largest = 0;  // bits of a magnitude sort as it does, and those of an infinity and of a NaN come last
  for (int i = 0; i < GROUP; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7f800000) return 0;
  memcpy(&s->scale, &largest, sizeof s->scale);
  s->scale *= 1.0f / 127;
  if (s->scale < 1.17549435e-38f) s->scale = 1;  // else its inverse could be infinite
  const float inverse = 1 / s->scale;
  int32_t sum = 0;
  for (int i = 0; i < GROUP; i++) {
    const int32_t nearest = (int32_t)rintf(x[i] * inverse);
    rounded[i] = nearest;
    sum += nearest;
  }
  s->sum = sum;
  s->start = -too_high * sum;
  return 1;
}

static void round_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t end = (part + 1) * t->size, stop = end < t->M ? end : t->M, groups = t->in / GROUP;
  for (int64_t row = part * t->size; row < stop; row++) {
    int finite = 1;
    for (int64_t group = 0; group < groups && finite; group++) {
      const int64_t from = row * t->in + group * GROUP;
      finite = round_group(t->x + from, t->rows + from, t->scales + row * groups + group, t->kind == Q4_0 ? 8 : TOO_HIGH);
    }
    t->finite[row] = finite;
  }
}

XLA_FFI_Error *thrice_block_matmul(XLA_FFI_CallFrame *call) {
  if (answered_version(call)) return NULL;
  XLA_FFI_Buffer **arguments = (XLA_FFI_Buffer **)call->args.args, **results = (XLA_FFI_Buffer **)call->rets.rets;
  Task t = {.x = arguments[0]->data, .weight = arguments[1]->data, .y = results[0]->data, .M = arguments[0]->dims[0],
            .in = arguments[0]->dims[1], .out = results[0]->dims[1], .kind = arguments[1]->dims[2]};
  const size_t rows = lines(t.M * t.in), scales = lines(t.M * t.in / GROUP * sizeof *t.scales), order = lines(t.M * sizeof *t.order);
  char *memory = aligned_alloc(LINE, rows + scales + order + lines(t.M));
  if (!memory) return out_of_memory(call->api);
  t.rows = (int8_t *)memory;
  t.scales = (Scale *)(memory + rows);
  t.order = (int64_t *)(memory + rows + scales);
  t.finite = (uint8_t *)(memory + rows + scales + order);

  const int64_t threads = count_threads(call);
  t.size = ceiling(ROUNDED, t.in);
  XLA_FFI_Error *error = run(call, threads, round_part, &t, ceiling(t.M, t.size));
  if (!error) {
    int64_t others = t.M;
    for (int64_t row = t.M - 1; row >= 0; row--)
      if (!t.finite[row]) t.order[--others] = row;
    for (int64_t row = 0; row < t.M; row++)
      if (t.finite[row]) t.order[t.count++] = row;
    const int64_t strips = ceiling(t.out, COLUMNS);
    const int64_t rounds = ceiling(strips * t.in / GROUP * t.kind, threads * PART);  // in which each thread takes a part
    t.size = ceiling(strips, threads * rounds);
    error = run(call, threads, multiply_part, &t, ceiling(strips, t.size));
  }
  free(memory);
  return error;
}
