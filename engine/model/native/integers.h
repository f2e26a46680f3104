// What products of integers share. Weights lie as a dot-product instruction takes them: 4 inputs of 16 columns side by side, a
// step, read once, in order. Few rows wait for that reading, many for the instruction.
#include "threads.h"
#include "adapters.h"

enum { COLUMNS = 16, INPUTS = 4, STEP = COLUMNS * INPUTS };  // of a step: its bytes are a cache line
enum { VECTORS = COLUMNS / W };
enum { ROUNDED = 16 * 1024 };  // numbers that a thread rounds at a time, about
enum { AHEAD = 4096 };  // bytes of weight
typedef int8_t Quads __attribute__((vector_size(4 * W)));  // 4 inputs of each of W columns

// Adds to the sums of W columns the products of their 4 inputs with those of a row. Weights without a sign are of 4 bits, and
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

INLINE Quads load_quads(const void *from) { return (Quads)load(from); }
INLINE Quads signed_quads(const void *from) { return load_quads(from) ^ (int8_t)TOO_HIGH; }

// Returns 1 / 127 of the largest magnitude. Bits sort as magnitudes do, an infinity's and a NaN's last.
INLINE float scale_of(const float *x, int64_t count) {
  uint32_t largest = 0;
  float scale;
  FOR(i, count) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  memcpy(&scale, &largest, sizeof scale);
  return scale * (1.0f / 127);
}

// ---- The walk that both kernels share

typedef struct {
  float scale;  // of some numbers of x
  float sum;  // of the numbers, rounded, for minima
  int32_t start;  // what is too high in each of their sums, taken off
} Scale;

typedef struct {
  const float *x;
  const uint8_t *weight;
  void *y;  // (digits * M, out)
  float *row_scales;  // (M), where rows have one
  int8_t *rows;  // (M * digits, stride), rounded
  Scale *scales;  // (M * digits, groups)
  uint8_t *finite;  // (M)
  int64_t *order;  // (count): the rows to multiply
  int64_t M, in, out, stride, digits, groups, kind, count;
  int64_t size;  // of a part, in rows of x or in strips of 16 columns
  Adapters adapters;  // of the rows of x, or none; each row's is a part
} Task;

static int round_row(const Task *t, int64_t row);  // whether it can be multiplied
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int how);
static void multiply_strips(const Task *t, int64_t strip, int64_t stop);

// All rows of the order, by a strip of one kind or by so many strips.
INLINE void multiply_rows(const Task *t, int64_t strip, const int how) {
  for (int64_t first = 0; first < t->count; first += ROWS)
    WITH_ROWS(t->count - first, multiply(t, first, rows, strip, how))
}

static void round_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t stop = smaller((part + 1) * t->size, t->M);
  for (int64_t row = part * t->size; row < stop; row++) t->finite[row] = round_row(t, row);
}

static void multiply_part(const void *task, int64_t part) {
  const Task *t = task;
  if (part < t->adapters.rows) return add_row(&t->adapters, part);
  part -= t->adapters.rows;
  multiply_strips(t, part * t->size, smaller((part + 1) * t->size, ceiling(t->out, COLUMNS)));
}

static void place(Task *t, Memory *memory) {
  const int64_t rows = t->M * t->digits;
  t->rows = claim(memory, rows * t->stride);
  t->scales = claim(memory, rows * t->groups * sizeof *t->scales);
  t->order = claim(memory, rows * sizeof *t->order);
  t->finite = claim(memory, t->M);
}

// Rounds the rows, then multiplies them by strips of so many bytes. Behind the arguments and results are those of adapters.
static Error *multiply_all(Call *call, Task t, int64_t bytes) {
  Buffer **in = (Buffer **)call->args.args, **out = (Buffer **)call->rets.rets;
  if (call->args.size > 2) t.adapters = adapters_of(in[0], in + 2, out[call->rets.size - 1]);
  WITH_MEMORY(place, t)
  const int64_t threads = count_threads(call), strips = ceiling(t.out, COLUMNS);
  t.size = ceiling(ROUNDED, t.in);
  run(call, threads, round_part, &t, ceiling(t.M, t.size));
  FOR(row, t.M * t.digits)
    if (t.finite[row / t.digits]) t.order[t.count++] = row;
  t.size = ceiling(strips, threads * ceiling(strips * bytes, threads * PART));  // as many parts for each thread
  run(call, threads, multiply_part, &t, t.adapters.rows + ceiling(strips, t.size));
  free(memory.start);
  return NULL;
}
