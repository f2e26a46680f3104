// The product of some rows with an int8 weight, called by XLA: rounds each row as int8.py's round_rows or two_digit_rows do,
// and sums integers, exactly, so that results have the bits that XLA's own products have.
//
//     x (M, in) float32, weight (out / 16, in / 4, 16, 4) int8 -> sums (digits * M, out) int32, scales (M, 1) float32
#define ROWS 6  // that share one reading of a strip's weights, at most
#include "integers.h"

enum { FINE = 254 };  // as in int8.py
enum { STRIPS = W == 16 ? 4 : 1 };  // of 16 columns that share one reading of the rows: ROWS * STRIPS sums are in registers

// `rows` rows of the order, from the given one on, times 16 * strips columns.
INLINE void multiply(const Task *t, int64_t first, const int rows, int64_t strip, const int strips) {
  const int64_t steps = t->stride / INPUTS, *order = t->order + first;
  const uint8_t *w = t->weight + strip * steps * STEP;
  const int8_t *x[ROWS];
  I sums[ROWS][STRIPS * VECTORS];
  EACH(row, rows) {
    x[row] = t->rows + order[row] * t->stride;
    EACH(v, strips * VECTORS) sums[row][v] = (I){0} + t->scales[order[row]].start;
  }
  FOR(i, steps) {
    if (strips == 1) prefetch(w + i * STEP + AHEAD);
    EACH(v, strips * VECTORS) {
      const Quads weights = signed_quads(w + (v / VECTORS * steps + i) * STEP + v % VECTORS * sizeof(Quads));
      EACH(row, rows) add_products(sums[row][v], weights, x[row] + i * INPUTS, 1);
    }
  }
  EACH(row, rows) {
    const int64_t place = order[row] % t->digits * t->M + order[row] / t->digits, column = strip * COLUMNS;
    EACH(v, strips * VECTORS)
      store_columns((int32_t *)t->y + place * t->out, (F)sums[row][v], column + v * W, t->out);
  }
}

static void multiply_strips(const Task *t, int64_t strip, int64_t stop) {
  if (t->count > ROWS)  // fewer are faster in one strip at a time, read in order
    for (; strip + STRIPS <= stop; strip += STRIPS) multiply_rows(t, strip, STRIPS);
  for (; strip < stop; strip++) multiply_rows(t, strip, 1);
}

// Rounds where int8.py rounds.
static int round_row(const Task *t, int64_t row) {
  const int64_t in = t->in, stride = t->stride, rounded = row * t->digits;
  const float *x = t->x + row * in;
  int8_t *rows = t->rows + rounded * stride;
  float scale = scale_of(x, in);
  if (scale == 0) scale = 1;
  const float inverse = 1 / scale;
  t->row_scales[row] = scale;
  if (isnan(scale)) return 0;
  if (isinf(scale)) {  // 0 or NaN, of which XLA makes 0 as well, and C anything
    memset(rows, 0, t->digits * stride);
  } else if (t->digits == 1) {
    FOR(i, in) rows[i] = (int32_t)rintf(x[i] * inverse);
  } else {
    FOR(i, in) {
      const float steps = x[i] * inverse, nearest = rintf(steps);
      rows[i] = (int32_t)nearest;
      rows[stride + i] = (int32_t)rintf((steps - nearest) * FINE);
    }
  }
  for (int64_t digit = 0; digit < t->digits; digit++, rows += stride) {
    int32_t total = 0;
    FOR(i, in) total += rows[i];
    memset(rows + in, 0, stride - in);
    t->scales[rounded + digit].start = -TOO_HIGH * total;
  }
  return 1;
}

KERNEL(int8_matmul) {
  const int64_t *x = in[0]->dims, *sums = out[0]->dims, stride = in[1]->dims[1] * INPUTS;
  const Task t = {.x = in[0]->data, .weight = in[1]->data, .y = out[0]->data, .row_scales = out[1]->data,
                  .M = x[0], .in = x[1], .out = sums[1], .stride = stride, .digits = sums[0] / x[0], .groups = 1};
  return multiply_all(call, t, stride * COLUMNS);
}
