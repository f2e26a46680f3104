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
#include "integers.h"

enum { GROUP = 32 };
enum { Q4_0 = 288, Q4_1 = 320, Q8_0 = 544 };  // the kinds, by the bytes of 16 blocks
enum { ROWS = W == 16 ? 6 : 4 };              // that share one reading of a strip's weights, at most

typedef struct {
  float scale;     // of 32 numbers of x
  float sum;       // of the 32 numbers, rounded, for minima
  int32_t start;   // what is too high in each of a block's sums, taken off
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

// `rows` rows of the order from the given one on, times 16 columns. `rows` and `kind` are constants wherever this is inlined.
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int kind) {
  const int64_t groups = t->in / GROUP;
  const uint8_t *w = t->weight + strip * groups * kind;
  const int8_t *x[ROWS];
  const Scale *scales[ROWS];
  F y[ROWS][VECTORS];
  UNROLL for (int row = 0; row < rows; row++) {
    x[row] = t->rows + t->order[first + row] * t->in;
    scales[row] = t->scales + t->order[first + row] * groups;
    UNROLL for (int v = 0; v < VECTORS; v++) y[row][v] = (F){0};
  }
  for (int64_t group = 0; group < groups; group++, w += kind) {
    const int64_t from = group * GROUP;
    const uint8_t *after = w + (kind == Q8_0 ? 8 : 4) * STEP;  // scales
    UNROLL for (int i = 0; i < (kind + STEP - 1) / STEP; i++) __builtin_prefetch(w + i * STEP + AHEAD, 0, 2);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      I sums[ROWS];
      UNROLL for (int row = 0; row < rows; row++) sums[row] = (I){0} + (W == 8 || kind == Q4_1 ? 0 : scales[row][group].start);
      // Rows in turns: each row's sums wait for one another.
      for (int i = 0; i < (kind == Q8_0 ? 8 : 4); i++) {
        const uint8_t *quads = w + i * STEP + v * sizeof(Quads);
        if (kind == Q8_0) {
          const Quads weights = signed_quads(quads);
          UNROLL for (int row = 0; row < rows; row++) add_products(sums[row], weights, x[row] + from + 4 * i, 1);
        } else {
          const Quads both = load_quads(quads), low = both & 15, high = (Quads)((I)both >> 4) & 15;
          UNROLL for (int row = 0; row < rows; row++) add_products(sums[row], low, x[row] + from + 4 * i, 0);
          UNROLL for (int row = 0; row < rows; row++) add_products(sums[row], high, x[row] + from + 4 * i + 16, 0);
        }
      }
      const F scale = halves(after + 2 * W * v), least = kind == Q4_1 ? halves(after + 2 * (COLUMNS + W * v)) : scale;
      UNROLL for (int row = 0; row < rows; row++) {
        const Scale *s = scales[row] + group;
        I integers = finish(sums[row], kind == Q8_0);
        if (W == 8 && kind == Q4_0) integers += s->start;  // which 16 bits do not hold
        F total = __builtin_convertvector(integers, F) * scale;
        if (kind == Q4_1) total = fused(least, spread(s->sum), total);
        y[row][v] = fused(total, spread(s->scale), y[row][v]);
      }
    }
  }
  UNROLL for (int row = 0; row < rows; row++) UNROLL for (int v = 0; v < VECTORS; v++)
    store_columns(t->y + t->order[first + row] * t->out, y[row][v], strip * COLUMNS + v * W, t->out);
}

// All rows of the order times 16 columns.
INLINE void multiply_rows(const Task *t, int64_t strip, const int kind) {
  for (int64_t first = 0; first < t->count; first += ROWS)
    WITH_ROWS(t->count - first, multiply(t, first, rows, strip, kind))
}

static void multiply_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t stop = smaller((part + 1) * t->size, ceiling(t->out, COLUMNS));
  for (int64_t strip = part * t->size; strip < stop; strip++) switch (t->kind) {
    case Q4_0: multiply_rows(t, strip, Q4_0); break;
    case Q4_1: multiply_rows(t, strip, Q4_1); break;
    default: multiply_rows(t, strip, Q8_0);
  }
  const int64_t column = part * t->size * COLUMNS, after = smaller(stop * COLUMNS, t->out);
  for (int64_t i = t->count; i < t->M; i++) memset(t->y + t->order[i] * t->out + column, 0xff, (after - column) * sizeof *t->y);
}

// Rounds 32 numbers of x. Returns 0 when one of them is not finite. Rounds as blocks.py does.
static inline int round_group(const float *x, int8_t *rounded, Scale *s, int too_high) {
  const uint32_t largest = largest_bits(x, GROUP);
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
  const int64_t stop = smaller((part + 1) * t->size, t->M), groups = t->in / GROUP;
  for (int64_t row = part * t->size; row < stop; row++) {
    int finite = 1;
    for (int64_t group = 0; group < groups && finite; group++) {
      const int64_t from = row * t->in + group * GROUP;
      finite = round_group(t->x + from, t->rows + from, t->scales + row * groups + group, t->kind == Q4_0 ? 8 : TOO_HIGH);
    }
    t->finite[row] = finite;
  }
}

static void place(Task *t, char **at) {
  t->rows = claim(at, t->M * t->in);
  t->scales = claim(at, t->M * t->in / GROUP * sizeof *t->scales);
  t->order = claim(at, t->M * sizeof *t->order);
  t->finite = claim(at, t->M);
}

KERNEL(block_matmul) {
  Task t = {.x = arguments[0]->data, .weight = arguments[1]->data, .y = results[0]->data, .M = arguments[0]->dims[0],
            .in = arguments[0]->dims[1], .out = results[0]->dims[1], .kind = arguments[1]->dims[2]};
  WITH_MEMORY(place, t)

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
    t.size = strips_of_part(strips, t.in / GROUP * t.kind, threads);
    error = run(call, threads, multiply_part, &t, ceiling(strips, t.size));
  }
  free(memory);
  return error;
}
