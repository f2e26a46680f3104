// The product of some rows with a weight in GGUF's blocks as they are in the file, called by XLA. A block is 32 inputs of a
// column: Q4_0, numbers from 0 to 15 and a scale s that stand for s (n - 8); Q4_1, a scale and a minimum m that stand for
// s n + m; Q8_0, numbers from -128 to 127 and a scale. Scales and minima are float16.
//
//     x (M, in) float32, weight (out / 16, in / 32, bytes of 16 blocks) uint8 -> y (M, out) float32
//
// 16 blocks, of as many columns, lie side by side: 4 inputs of each column in 64 bytes, then the scales, then the minima. Of
// 4 bits a byte holds the inputs i and i + 16. x is rounded to int8 with a scale for each 32 numbers. A block's integers are
// summed exactly; blocks are added in order, by the same operations for any number of rows, so a row's bits depend on the row
// alone. A row with a number that is not finite gives NaN.
#define ROWS (W == 16 ? 6 : 4)  // that share one reading of a strip's weights, at most
#include "integers.h"

enum { GROUP = 32 };
enum { Q4_0 = 288, Q4_1 = 320, Q8_0 = 544 };  // the kinds, by the bytes of 16 blocks

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

// `rows` rows of the order, from the given one on, times 16 columns.
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int kind) {
  const int64_t groups = t->groups;
  const uint8_t *w = t->weight + strip * groups * kind;
  const int8_t *x[ROWS];
  const Scale *scales[ROWS];
  F y[ROWS][VECTORS];
  EACH(row, rows) {
    x[row] = t->rows + t->order[first + row] * t->in;
    scales[row] = t->scales + t->order[first + row] * groups;
    EACH(v, VECTORS) y[row][v] = (F){0};
  }
  for (int64_t group = 0; group < groups; group++, w += kind) {
    const int64_t from = group * GROUP;
    const uint8_t *after = w + (kind == Q8_0 ? 8 : 4) * STEP;  // scales
    EACH(i, (kind + STEP - 1) / STEP) prefetch(w + i * STEP + AHEAD);
    EACH(v, VECTORS) {
      I sums[ROWS];
      EACH(row, rows) sums[row] = (I){0} + (W == 8 || kind == Q4_1 ? 0 : scales[row][group].start);
      // Rows in turns: each row's sums wait for one another.
      FOR(i, (kind == Q8_0 ? 8 : 4)) {
        const uint8_t *quads = w + i * STEP + v * sizeof(Quads);
        if (kind == Q8_0) {
          const Quads weights = signed_quads(quads);
          EACH(row, rows) add_products(sums[row], weights, x[row] + from + 4 * i, 1);
        } else {
          const Quads both = load_quads(quads), low = both & 15, high = (Quads)((I)both >> 4) & 15;
          EACH(row, rows) add_products(sums[row], low, x[row] + from + 4 * i, 0);
          EACH(row, rows) add_products(sums[row], high, x[row] + from + 4 * i + 16, 0);
        }
      }
      const F scale = halves(after + 2 * W * v), least = kind == Q4_1 ? halves(after + 2 * (COLUMNS + W * v)) : scale;
      EACH(row, rows) {
        const Scale *s = scales[row] + group;
        I integers = finish(sums[row], kind == Q8_0);
        if (W == 8 && kind == Q4_0) integers += s->start;  // which 16 bits do not hold
        F total = __builtin_convertvector(integers, F) * scale;
        if (kind == Q4_1) total = fused(least, spread(s->sum), total);
        y[row][v] = fused(total, spread(s->scale), y[row][v]);
      }
    }
  }
  EACH(row, rows) EACH(v, VECTORS)
    store_columns((float *)t->y + t->order[first + row] * t->out, y[row][v], strip * COLUMNS + v * W, t->out);
}

static void multiply_strips(const Task *t, int64_t strip, int64_t stop) {
  const int64_t column = strip * COLUMNS, after = smaller(stop * COLUMNS, t->out);
  for (; strip < stop; strip++) switch (t->kind) {
    case Q4_0: multiply_rows(t, strip, Q4_0); break;
    case Q4_1: multiply_rows(t, strip, Q4_1); break;
    default: multiply_rows(t, strip, Q8_0);
  }
  FOR(row, t->M)
    if (!t->finite[row]) memset((float *)t->y + row * t->out + column, 0xff, (after - column) * 4);
}

// Rounds 32 numbers of x as blocks.py does. Returns whether all are finite.
INLINE int round_group(const float *x, int8_t *rounded, Scale *s, int too_high) {
  s->scale = scale_of(x, GROUP);
  if (!isfinite(s->scale)) return 0;
  if (s->scale < 1.17549435e-38f) s->scale = 1;  // else its inverse could be infinite
  const float inverse = 1 / s->scale;
  int32_t sum = 0;
  FOR(i, GROUP) {
    const int32_t nearest = (int32_t)rintf(x[i] * inverse);
    rounded[i] = nearest;
    sum += nearest;
  }
  s->sum = sum;
  s->start = -too_high * sum;
  return 1;
}

static int round_row(const Task *t, int64_t row) {
  for (int64_t group = row * t->groups; group < (row + 1) * t->groups; group++)
    if (!round_group(t->x + group * GROUP, t->rows + group * GROUP, t->scales + group, t->kind == Q4_0 ? 8 : TOO_HIGH)) return 0;
  return 1;
}

KERNEL(block_matmul) {
  const int64_t *x = in[0]->dims, kind = in[1]->dims[2], groups = x[1] / GROUP;
  const Task t = {.x = in[0]->data, .weight = in[1]->data, .y = out[0]->data, .M = x[0], .in = x[1], .out = out[0]->dims[1],
                  .stride = x[1], .digits = 1, .groups = groups, .kind = kind};
  return multiply_all(call, t, groups * kind);
}
