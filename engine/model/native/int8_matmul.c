// The product of some rows with an int8 weight, called by XLA: rounds each row as int8.py's round_rows or two_digit_rows do,
// and sums integers, exactly, so that results have the bits that XLA's own products have.
//
//     x (M, in) float32, weight (out / 16, in / 4, 16, 4) int8 -> sums (digits * M, out) int32, scales (M, 1) float32
//
// Weights lie as a dot-product instruction takes them: 4 inputs of 16 columns side by side, read once, in order. Few rows
// wait for that reading, many for the instruction. Threads of XLA's own pool help. One that comes late finds no part left, so
// nobody waits for a thread that has not begun.
#include <math.h>

#include "threads.h"

enum { COLUMNS = 16, INPUTS = 4, STEP = COLUMNS * INPUTS };  // of a step: the bytes of weight side by side, a cache line
enum { FINE = 254 };                                         // as in int8.py
enum { ROWS = 6 };                                           // that share one reading of a strip's weights, at most
enum { ROUNDED = 16 * 1024 };                                // numbers that a thread rounds at a time, about
enum { AHEAD = 4096 };  // bytes of weight: processors fetch ahead, but not past a page. Into the second cache: the first is too small

// Sums: 16 int32, a column each. Weights: a step. Inputs: 4 of one row, for each column. STRIPS of 16 columns share one
// reading of the rows: as many as leave ROWS * STRIPS sums in registers, or nearly.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
enum { STRIPS = 4, TOO_HIGH = 128 };  // the instruction takes weights without a sign: 128 too high
typedef __m512i Sums, Weights, Inputs;
static inline Sums filled(int32_t value) { return _mm512_set1_epi32(value); }
static inline Weights read_weights(const int8_t *w) { return _mm512_xor_si512(_mm512_load_si512(w), _mm512_set1_epi8(-128)); }
static inline Inputs spread(int32_t inputs) { return _mm512_set1_epi32(inputs); }
// gcc 12 copies each sum before its intrinsic adds to it, and takes 1.8 times as long.
#define add_products(sums, weights, inputs) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs))
static inline void write_sums(int32_t *to, Sums sums) { _mm512_storeu_si512(to, sums); }
#elif defined(__AVX2__)
#include <immintrin.h>
enum { STRIPS = 1, TOO_HIGH = 0 };
typedef struct { __m256i half[2]; } Sums;
typedef struct { __m256i half[2], size[2]; } Weights;  // size: without their signs
typedef __m256i Inputs;
static inline Sums filled(int32_t value) { return (Sums){{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
static inline Weights read_weights(const int8_t *w) {
  const __m256i left = _mm256_load_si256((const __m256i *)w), right = _mm256_load_si256((const __m256i *)w + 1);
  return (Weights){{left, right}, {_mm256_abs_epi8(left), _mm256_abs_epi8(right)}};
}
static inline Inputs spread(int32_t inputs) { return _mm256_set1_epi32(inputs); }
// The instruction takes one side without a sign, which the other side then gets. It adds two products in 16 bits, where
// 2 * 127 * 127 fits, as neither side is ever -128.
#define add_products(sums, weights, inputs)                                                                             \
  for (int i = 0; i < 2; i++) {                                                                                         \
    const __m256i signed_inputs = _mm256_sign_epi8(inputs, (weights).half[i]);                                          \
    const __m256i pairs = _mm256_maddubs_epi16((weights).size[i], signed_inputs);                                       \
    (sums).half[i] = _mm256_add_epi32((sums).half[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));                  \
  }
static inline void write_sums(int32_t *to, Sums sums) {
  for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)to + i, sums.half[i]);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
enum { STRIPS = 1, TOO_HIGH = 0 };
typedef struct { int32x4_t val[4]; } Sums;  // not int32x4x4_t, whose registers clang keeps next to one another, by moving them
typedef struct { int8x16_t val[4]; } Weights;
typedef int8x16_t Inputs;
static inline Sums filled(int32_t value) {
  const int32x4_t four = vdupq_n_s32(value);
  return (Sums){{four, four, four, four}};
}
static inline Weights read_weights(const int8_t *w) {
  return (Weights){{vld1q_s8(w), vld1q_s8(w + 16), vld1q_s8(w + 32), vld1q_s8(w + 48)}};
}
static inline Inputs spread(int32_t inputs) { return vreinterpretq_s8_s32(vdupq_n_s32(inputs)); }
#define add_products(sums, weights, inputs) \
  for (int i = 0; i < 4; i++) (sums).val[i] = vdotq_s32((sums).val[i], (weights).val[i], inputs)
static inline void write_sums(int32_t *to, Sums sums) {
  for (int i = 0; i < 4; i++) vst1q_s32(to + 4 * i, sums.val[i]);
}
#else
#error "this processor is not known to multiply int8 fast"
#endif

typedef struct {
  const float *x;
  const int8_t *weight;
  int8_t *rows;       // (M * digits, stride), rounded; each begins a cache line, and ends a step in zeros
  float *scales;      // (M)
  int32_t *sums;      // (digits * M, out)
  int32_t *surplus;   // (M * digits), what TOO_HIGH adds to each sum, taken off from the start
  int64_t *active;    // (count), the rounded rows to multiply: those whose scale is a number
  int64_t M, in, out, stride, digits, count;
  int64_t size;  // of a part, in rows of x or in strips
} Task;

// `rows` active rows from the given one on, times 16 * strips columns. Both are constants wherever this is inlined.
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int strips) {
  const int64_t steps = t->stride / INPUTS, *active = t->active + first;
  const int8_t *w = t->weight + strip * steps * STEP, *x[ROWS];
  Sums sums[ROWS][STRIPS];
  UNROLL for (int row = 0; row < rows; row++) {
    x[row] = t->rows + active[row] * t->stride;
    UNROLL for (int s = 0; s < strips; s++) sums[row][s] = filled(-t->surplus[active[row]]);
  }
  for (int64_t i = 0; i < steps; i++) {
    Weights weights[STRIPS];
    UNROLL for (int s = 0; s < strips; s++) weights[s] = read_weights(w + (s * steps + i) * STEP);
    if (strips == 1) __builtin_prefetch(w + i * STEP + AHEAD, 0, 2);
    UNROLL for (int row = 0; row < rows; row++) {
      int32_t four;
      memcpy(&four, x[row] + i * INPUTS, sizeof four);
      const Inputs inputs = spread(four);
      UNROLL for (int s = 0; s < strips; s++) add_products(sums[row][s], weights[s], inputs);
    }
  }
  UNROLL for (int row = 0; row < rows; row++) {
    const int64_t place = active[row] % t->digits * t->M + active[row] / t->digits;
    UNROLL for (int s = 0; s < strips; s++) {
      const int64_t column = (strip + s) * COLUMNS, left = t->out - column;
      int32_t *to = t->sums + place * t->out + column;
      if (left >= COLUMNS) {
        write_sums(to, sums[row][s]);
      } else {
        int32_t all[COLUMNS];
        write_sums(all, sums[row][s]);
        memcpy(to, all, left * sizeof *to);
      }
    }
  }
}

// All active rows times 16 * strips columns.
INLINE void multiply_rows(const Task *t, int64_t strip, const int strips) {
  for (int64_t first = 0; first < t->count; first += ROWS) {
    switch (t->count - first) {
      case 1: multiply(t, first, 1, strip, strips); break;
      case 2: multiply(t, first, 2, strip, strips); break;
      case 3: multiply(t, first, 3, strip, strips); break;
      case 4: multiply(t, first, 4, strip, strips); break;
      case 5: multiply(t, first, 5, strip, strips); break;
      default: multiply(t, first, ROWS, strip, strips);
    }
  }
}

static void multiply_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t strips = (t->out + COLUMNS - 1) / COLUMNS, end = (part + 1) * t->size, stop = end < strips ? end : strips;
  int64_t strip = part * t->size;
  if (t->count > ROWS)  // fewer are faster in one strip at a time, read in order
    for (; strip + STRIPS <= stop; strip += STRIPS) multiply_rows(t, strip, STRIPS);
  for (; strip < stop; strip++) multiply_rows(t, strip, 1);
}

// Rounds one row of x (in) to its digits, and returns its scale. Rounds where int8.py rounds.
static float round_row(const float *x, int64_t in, int digits, int8_t *rows, int64_t stride) {
  uint32_t largest = 0;  // bits of a magnitude sort as it does, and those of a NaN come last
  for (int64_t i = 0; i < in; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float scale;
  memcpy(&scale, &largest, sizeof scale);
  scale *= 1.0f / 127;
  if (scale == 0) scale = 1;
  const float inverse = 1 / scale;
  if (isnan(scale)) return scale;
  if (isinf(scale)) {  // 0 or NaN, of which XLA makes 0 as well, and C anything
    memset(rows, 0, digits * stride);
    return scale;
  }
  if (digits == 1) {
    for (int64_t i = 0; i < in; i++) rows[i] = (int32_t)rintf(x[i] * inverse);
  } else {
    for (int64_t i = 0; i < in; i++) {
      const float steps = x[i] * inverse, nearest = rintf(steps);
      rows[i] = (int32_t)nearest;
      rows[stride + i] = (int32_t)rintf((steps - nearest) * FINE);
    }
  }
  return scale;
}

static void round_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t end = (part + 1) * t->size, stop = end < t->M ? end : t->M;
  for (int64_t row = part * t->size; row < stop; row++) {
    int8_t *rounded = t->rows + row * t->digits * t->stride;
    t->scales[row] = round_row(t->x + row * t->in, t->in, t->digits, rounded, t->stride);
    for (int digit = 0; digit < t->digits; digit++, rounded += t->stride) {
      int32_t total = 0;
      for (int64_t i = 0; i < t->in; i++) total += rounded[i];
      memset(rounded + t->in, 0, t->stride - t->in);
      t->surplus[row * t->digits + digit] = TOO_HIGH * total;
    }
  }
}

XLA_FFI_Error *thrice_int8_matmul(XLA_FFI_CallFrame *call) {
  if (answered_version(call)) return NULL;
  XLA_FFI_Buffer **arguments = (XLA_FFI_Buffer **)call->args.args, **results = (XLA_FFI_Buffer **)call->rets.rets;
  Task t = {.x = arguments[0]->data, .weight = arguments[1]->data, .sums = results[0]->data, .scales = results[1]->data,
            .M = arguments[0]->dims[0], .in = arguments[0]->dims[1], .out = results[0]->dims[1]};
  t.digits = results[0]->dims[0] / t.M;
  t.stride = arguments[1]->dims[1] * INPUTS;
  const int64_t all = t.M * t.digits;
  const size_t rounded = lines(all * t.stride), surplus = lines(all * sizeof *t.surplus);
  char *memory = aligned_alloc(STEP, rounded + surplus + lines(all * sizeof *t.active));
  if (!memory) return out_of_memory(call->api);
  t.rows = (int8_t *)memory;
  t.surplus = (int32_t *)(memory + rounded);
  t.active = (int64_t *)(memory + rounded + surplus);

  const int64_t threads = count_threads(call);
  t.size = ceiling(ROUNDED, t.in);
  XLA_FFI_Error *error = run(call, threads, round_part, &t, ceiling(t.M, t.size));
  if (!error) {
    for (int64_t row = 0; row < all; row++)
      if (!isnan(t.scales[row / t.digits])) t.active[t.count++] = row;
    const int64_t strips = ceiling(t.out, COLUMNS);
    const int64_t rounds = ceiling(strips * t.stride * COLUMNS, threads * PART);  // in which each thread takes a part
    t.size = ceiling(strips, threads * rounds);
    error = run(call, threads, multiply_part, &t, t.count ? ceiling(strips, t.size) : 0);
  }
  free(memory);
  return error;
}
