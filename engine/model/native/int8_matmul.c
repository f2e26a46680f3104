// The product of some rows with an int8 weight, called by XLA: rounds each row as int8.py's round_rows or two_digit_rows do,
// and sums integers, exactly, so that results have the bits that XLA's own products have.
//
//     x (M, in) float32, weight (out / 16, in / 4, 16, 4) int8 -> sums (digits * M, out) int32, scales (M, 1) float32
#include "integers.h"

enum { FINE = 254 };                    // as in int8.py
enum { ROWS = 6 };                      // that share one reading of a strip's weights, at most
enum { STRIPS = W == 16 ? 4 : 1 };      // of 16 columns that share one reading of the rows: ROWS * STRIPS sums are in registers

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
  I sums[ROWS][STRIPS * VECTORS];
  UNROLL for (int row = 0; row < rows; row++) {
    x[row] = t->rows + active[row] * t->stride;
    UNROLL for (int v = 0; v < strips * VECTORS; v++) sums[row][v] = (I){0} - t->surplus[active[row]];
  }
  for (int64_t i = 0; i < steps; i++) {
    if (strips == 1) __builtin_prefetch(w + i * STEP + AHEAD, 0, 2);
    UNROLL for (int v = 0; v < strips * VECTORS; v++) {
      const Quads weights = signed_quads(w + (v / VECTORS * steps + i) * STEP + v % VECTORS * sizeof(Quads));
      UNROLL for (int row = 0; row < rows; row++) add_products(sums[row][v], weights, x[row] + i * INPUTS, 1);
    }
  }
  UNROLL for (int row = 0; row < rows; row++) {
    const int64_t place = active[row] % t->digits * t->M + active[row] / t->digits, column = strip * COLUMNS;
    UNROLL for (int v = 0; v < strips * VECTORS; v++)
      store_columns(t->sums + place * t->out, (F)sums[row][v], column + v * W, t->out);
  }
}

// All active rows times 16 * strips columns.
INLINE void multiply_rows(const Task *t, int64_t strip, const int strips) {
  for (int64_t first = 0; first < t->count; first += ROWS)
    WITH_ROWS(t->count - first, multiply(t, first, rows, strip, strips))
}

static void multiply_part(const void *task, int64_t part) {
  const Task *t = task;
  const int64_t stop = smaller((part + 1) * t->size, ceiling(t->out, COLUMNS));
  int64_t strip = part * t->size;
  if (t->count > ROWS)  // fewer are faster in one strip at a time, read in order
    for (; strip + STRIPS <= stop; strip += STRIPS) multiply_rows(t, strip, STRIPS);
  for (; strip < stop; strip++) multiply_rows(t, strip, 1);
}

// Rounds one row of x (in) to its digits, and returns its scale. Rounds where int8.py rounds.
static float round_row(const float *x, int64_t in, int digits, int8_t *rows, int64_t stride) {
  const uint32_t largest = largest_bits(x, in);
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
  const int64_t stop = smaller((part + 1) * t->size, t->M);
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

static void place(Task *t, char **at) {
  const int64_t rows = t->M * t->digits;
  t->rows = claim(at, rows * t->stride);
  t->surplus = claim(at, rows * sizeof *t->surplus);
  t->active = claim(at, rows * sizeof *t->active);
}

KERNEL(int8_matmul) {
  Task t = {.x = arguments[0]->data, .weight = arguments[1]->data, .sums = results[0]->data, .scales = results[1]->data,
            .M = arguments[0]->dims[0], .in = arguments[0]->dims[1], .out = results[0]->dims[1]};
  t.digits = results[0]->dims[0] / t.M;
  t.stride = arguments[1]->dims[1] * INPUTS;
  WITH_MEMORY(place, t)

  const int64_t threads = count_threads(call);
  t.size = ceiling(ROUNDED, t.in);
  XLA_FFI_Error *error = run(call, threads, round_part, &t, ceiling(t.M, t.size));
  if (!error) {
    for (int64_t row = 0; row < t.M * t.digits; row++)
      if (!isnan(t.scales[row / t.digits])) t.active[t.count++] = row;
    const int64_t strips = ceiling(t.out, COLUMNS);
    t.size = strips_of_part(strips, t.stride * COLUMNS, threads);
    error = run(call, threads, multiply_part, &t, t.count ? ceiling(strips, t.size) : 0);
  }
  free(memory);
  return error;
}
