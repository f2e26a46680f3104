// Adds to a product what the adapters of some rows add, called by XLA: each row reads its own pair, and one without reads nothing.
//
//     sums (M, out) float32, x (M, in) float32, index (M) int32, a (A, P R, in), b (A, R, out), scale (A, P R) float32,
//     edges (P + 1) int32, from 0 to out -> sums, in place
//
// a and b are both float32, bfloat16 or int8. Row m is multiplied by a[index[m]] and the scales. To columns edges[p] ..
// edges[p + 1] the p-th R of those numbers times b[index[m]] are added, but for the last whose scale is 0: an adapter's rank may
// be below R. A row of index 0 stays as it is. A row's bits depend on itself and its pair.
#include "threads.h"
#include "vectors.h"

enum { SUMS = 2, ROWS = 4 };  // sums that are added to in turn, so that none waits for the last, of so many rows of a
enum { MIXED = 4 };  // vectors of columns that are mixed at a time

typedef struct {
  const float *x, *scale;
  const char *a, *b;
  const int32_t *index, *edges;
  float *sums;
  int64_t *active;  // rows that have an adapter
  int64_t in, out, rank, parts;
  Type type;
} Task;

// The products of x with some rows of a, `stride` bytes apart, which share one reading of it.
INLINE void dots(const float *x, const char *a, int64_t count, int64_t stride, const int rows, const Type type, float *to) {
  const int64_t bytes = bytes_of(type);
  F sums[ROWS][SUMS] = {0};
  int64_t i = 0;
  for (; i + SUMS * W <= count; i += SUMS * W)
    EACH(s, SUMS) {
      const F numbers = load(x + i + s * W);
      EACH(r, rows) {
        const char *from = a + r * stride + (i + s * W) * bytes;
        if (s * W * bytes % LINE == 0) prefetch(from + rows * stride);  // of the next rows
        sums[r][s] += numbers * widen(from, type);
      }
    }
  for (; i < count; i += W)
    EACH(r, rows)
      sums[r][0] += read(x + i, 0, count - i, FLOAT32) * read(a + r * stride + i * bytes, 0, count - i, type);
  EACH(r, rows) to[r] = sum(sums[r][0] + sums[r][1]);
}

INLINE void mix(const Task *t, const float *inner, int64_t rank, const char *b, float *sums, int64_t column, int64_t stop, const Type type) {
  const int64_t bytes = bytes_of(type), stride = t->out * bytes;
  for (; column + MIXED * W <= stop; column += MIXED * W) {
    F mixed[MIXED] = {0};
    FOR(r, rank) {
      const char *from = b + r * stride + column * bytes;
      EACH(s, MIXED) mixed[s] += inner[r] * widen(from + s * W * bytes, type);
    }
    EACH(s, MIXED) store(sums + column + s * W, load(sums + column + s * W) + mixed[s]);
  }
  for (; column < stop; column += W) {
    F mixed = {0};
    FOR(r, rank) mixed += inner[r] * read(b + r * stride + column * bytes, 0, stop - column, type);
    store_columns(sums, read(sums + column, 0, stop - column, FLOAT32) + mixed, column, stop);
  }
}

INLINE void add_adapter(const Task *t, int64_t row, const Type type) {
  float *sums = t->sums + row * t->out, inner[t->rank];
  const int64_t index = t->index[row], bytes = bytes_of(type), stride = t->in * bytes;
  const float *x = t->x + row * t->in, *scale = t->scale + index * t->parts * t->rank;
  const char *a = t->a + index * t->parts * t->rank * stride, *b = t->b + index * t->rank * t->out * bytes;
  // Columns of b's rows lie far apart, where processors do not fetch ahead.
  for (int64_t i = 0; i < t->rank * t->out * bytes; i += LINE) __builtin_prefetch(b + i);
  for (int64_t part = 0; part < t->parts; part++, a += t->rank * stride, scale += t->rank) {
    int64_t rank = t->rank, r = 0;
    while (rank && !scale[rank - 1]) rank--;
    for (; r + ROWS <= rank; r += ROWS) dots(x, a + r * stride, t->in, stride, ROWS, type, inner + r);
    for (; r < rank; r++) dots(x, a + r * stride, t->in, stride, 1, type, inner + r);
    for (r = 0; r < rank; r++) inner[r] *= scale[r];
    if (rank) mix(t, inner, rank, b, sums, t->edges[part], t->edges[part + 1], type);
  }
}

static void add_part(const void *task, int64_t part) {
  const Task *t = task;
  switch (t->type) {
    case FLOAT32: add_adapter(t, t->active[part], FLOAT32); break;
    case BFLOAT16: add_adapter(t, t->active[part], BFLOAT16); break;
    default: add_adapter(t, t->active[part], INT8);
  }
}

KERNEL(adapter_matmul) {
  const Buffer *x = in[1], *a = in[3], *b = in[4];
  Task t = {.x = x->data, .index = in[2]->data, .a = a->data, .b = b->data, .scale = in[5]->data,
            .edges = in[6]->data, .sums = out[0]->data, .in = x->dims[1], .out = b->dims[2], .rank = b->dims[1],
            .parts = in[6]->dims[0] - 1, .type = type_of(a)};
  const int64_t M = x->dims[0];
  int64_t active[M], count = 0;
  FOR(row, M)
    if (t.index[row]) active[count++] = row;
  t.active = active;
  const int64_t size = t.rank * (t.parts * t.in + t.out) * bytes_of(t.type);  // of a pair
  run(call, count * size < PART ? 1 : count_threads(call), add_part, &t, count);
  return NULL;
}
