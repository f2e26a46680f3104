// What the adapters of some rows add to a product, called by XLA: each row reads its own pair, and one without reads nothing.
//
//     x (M, in), index (M) int32, a (A, P R, in), b (A, R, out), edges (P + 1) int32, from 0 to out -> sums (M, out) float32
//
// x, a and b are all float32 or all bfloat16. Row m is multiplied by a[index[m]], then columns edges[p] .. edges[p + 1] are
// made of the p-th R of those numbers by b[index[m]]; a row of index 0 gets zeros. A row's bits depend on itself and its pair.
#include "threads.h"
#include "vectors.h"

enum { SUMS = 2, ROWS = 4 };  // sums that are added to in turn, so that none waits for the last, of so many rows of a
enum { MIXED = 4 };           // vectors of columns that are mixed at a time
enum { AHEAD = 512 };         // bytes of each row of b: their columns lie far apart, where processors do not fetch ahead

typedef struct {
  const char *x, *a, *b;
  const int32_t *index, *edges;
  float *sums;
  int64_t *active;  // rows that have an adapter
  int64_t in, out, rank, parts;
  enum Type type;
} Task;

INLINE float read_one(const char *number, const enum Type type) {
  uint32_t bits = 0;
  memcpy((char *)&bits + 4 - bytes_of(type), number, bytes_of(type));  // little-endian
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

INLINE float sum(F f) {
  float total = 0;
  for (int n = 0; n < W; n++) total += f[n];
  return total;
}

// The products of x with some rows of a, `stride` bytes apart, which share one reading of it.
INLINE void dots(const char *x, const char *a, int64_t count, int64_t stride, const int rows, const enum Type type, float *to) {
  const int64_t bytes = bytes_of(type);
  F sums[ROWS][SUMS] = {0};
  int64_t i = 0;
  for (; i + SUMS * W <= count; i += SUMS * W)
    UNROLL for (int s = 0; s < SUMS; s++) {
      const F numbers = widen(x + (i + s * W) * bytes, type);
      UNROLL for (int r = 0; r < rows; r++) {
        const char *from = a + r * stride + (i + s * W) * bytes;
        if (s * W * bytes % LINE == 0) __builtin_prefetch(from + rows * stride, 0, 2);  // of the next rows
        sums[r][s] += numbers * widen(from, type);
      }
    }
  UNROLL for (int r = 0; r < rows; r++) to[r] = sum(sums[r][0] + sums[r][1]);
  for (; i < count; i++)
    UNROLL for (int r = 0; r < rows; r++)
      to[r] += read_one(x + i * bytes, type) * read_one(a + r * stride + i * bytes, type);
}

INLINE void mix(const Task *t, const float *inner, const char *b, float *sums, int64_t column, int64_t stop, const enum Type type) {
  const int64_t bytes = bytes_of(type), stride = t->out * bytes;
  for (; column + MIXED * W <= stop; column += MIXED * W) {
    F mixed[MIXED] = {0};
    for (int64_t r = 0; r < t->rank; r++) {
      const char *from = b + r * stride + column * bytes;
      UNROLL for (int s = 0; s < MIXED; s++) {
        if (s * W * bytes % LINE == 0) __builtin_prefetch(from + AHEAD + s * W * bytes, 0, 2);
        mixed[s] += inner[r] * widen(from + s * W * bytes, type);
      }
    }
    memcpy(sums + column, mixed, sizeof mixed);
  }
  for (; column < stop; column++) {
    float mixed = 0;
    for (int64_t r = 0; r < t->rank; r++) mixed += inner[r] * read_one(b + r * stride + column * bytes, type);
    sums[column] = mixed;
  }
}

INLINE void add_adapter(const Task *t, int64_t row, const enum Type type) {
  float *sums = t->sums + row * t->out, inner[t->rank];
  const int64_t index = t->index[row], bytes = bytes_of(type), stride = t->in * bytes;
  const char *x = t->x + row * stride, *a = t->a + index * t->parts * t->rank * stride;
  for (int64_t part = 0; part < t->parts; part++, a += t->rank * stride) {
    int64_t r = 0;
    for (; r + ROWS <= t->rank; r += ROWS) dots(x, a + r * stride, t->in, stride, ROWS, type, inner + r);
    for (; r < t->rank; r++) dots(x, a + r * stride, t->in, stride, 1, type, inner + r);
    mix(t, inner, t->b + index * t->rank * t->out * bytes, sums, t->edges[part], t->edges[part + 1], type);
  }
}

static void add_part(const void *task, int64_t part) {
  const Task *t = task;
  if (t->type == FLOAT32) add_adapter(t, t->active[part], FLOAT32);
  else add_adapter(t, t->active[part], BFLOAT16);
}

KERNEL(adapter_matmul) {
  const XLA_FFI_Buffer *x = arguments[0], *b = arguments[3];
  Task t = {.x = x->data, .index = arguments[1]->data, .a = arguments[2]->data, .b = b->data, .edges = arguments[4]->data,
            .sums = results[0]->data, .in = x->dims[1], .out = b->dims[2], .rank = b->dims[1],
            .parts = arguments[4]->dims[0] - 1, .type = x->dtype == XLA_FFI_DataType_F32 ? FLOAT32 : BFLOAT16};
  const int64_t M = x->dims[0];
  int64_t active[M], count = 0;
  for (int64_t row = 0; row < M; row++) {
    if (t.index[row]) active[count++] = row;
    else memset(t.sums + row * t.out, 0, t.out * sizeof *t.sums);
  }
  t.active = active;
  const int64_t size = t.rank * (t.parts * t.in + t.out) * bytes_of(t.type);  // of a pair
  return run(call, count * size < PART ? 1 : count_threads(call), add_part, &t, count);
}
