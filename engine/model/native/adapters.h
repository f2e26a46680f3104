// What adapters add to the product of some rows with a weight: each row reads its own pair, and one without reads nothing.
//
//     x (M, in) float32, index (M) int32, a (A, P R, in), b (A, R, out), scale (A, P R) float32, edges (P + 1) int32, from 0
//     to out -> added (M, out) float32
//
// a and b are both float32, bfloat16 or int8. Row m is multiplied by a[index[m]] and the scales. Columns edges[p] ..
// edges[p + 1] are the p-th R of those numbers times b[index[m]], without the last whose scale is 0: an adapter's rank may be
// below R, or 0, of which nothing is read, and -0 written. A row's bits depend on itself and its pair.
#include "vectors.h"

enum { SUMS = 2, DOTS = 4 };  // sums that are added to in turn, so that none waits for the last, of so many rows of a
enum { MIXED = 4 };  // vectors of columns that are mixed at a time
enum { NEAR = 512 };  // bytes of a row of b that are fetched ahead: rows lie far apart, where processors do not

typedef struct {
  const float *x, *scale;
  const char *a, *b;
  const int32_t *index, *edges;
  float *added;
  int64_t rows, in, out, rank, parts;
  Type type;
} Adapters;

// Of x (rows, width) and the arguments from the index on.
static Adapters adapters_of(const float *x, int64_t rows, int64_t width, Buffer **in, const Buffer *added) {
  return (Adapters){.x = x, .index = in[0]->data, .a = in[1]->data, .b = in[2]->data, .scale = in[3]->data,
                    .edges = in[4]->data, .added = added->data, .rows = rows, .in = width, .out = in[2]->dims[2],
                    .rank = in[2]->dims[1], .parts = in[4]->dims[0] - 1, .type = type_of(in[1])};
}

// Whether the arguments from the index on, and what is added, are of `rows` rows of x of that width.
INLINE int are_adapters(int64_t rows, int64_t width, Buffer **in, const Buffer *added) {
  const int64_t count = dim(in[1], 0), rank = dim(in[2], 1), out = dim(in[2], 2), parts = dim(in[4], 0) - 1;
  const XLA_FFI_DataType type = in[1]->dtype;
  const int is_known = type == F32 || type == BF16 || type == S8;
  if (!is_known || parts < 1 || !IS(in[0], S32, rows) || !IS(in[1], type, count, parts * rank, width) ||
      !IS(in[2], type, count, rank, out) || !IS(in[3], F32, count, parts * rank) || !IS(in[4], S32, parts + 1) ||
      !IS(added, F32, rows, out))
    return 0;
  const int32_t *index = in[0]->data, *edges = in[4]->data;
  FOR(row, rows)
    if (index[row] < 0 || index[row] >= count) return 0;
  FOR(part, parts)
    if (edges[part] > edges[part + 1]) return 0;
  return edges[0] == 0 && edges[parts] == out;
}

// The products of x with some rows of a, `stride` bytes apart, which share one reading of it.
INLINE void dots(const float *x, const char *a, int64_t count, int64_t stride, const int rows, const Type type, float *to) {
  const int64_t bytes = bytes_of(type);
  F sums[DOTS][SUMS] = {0};
  int64_t i = 0;
  for (; i + SUMS * W <= count; i += SUMS * W)
    EACH(s, SUMS) {
      const F numbers = load(x + i + s * W);
      EACH(r, rows) {
        const char *from = a + r * stride + (i + s * W) * bytes;
        if (s * W * bytes % LINE == 0) prefetch(from + rows * stride);  // of the next rows
        sums[r][s] = fused(numbers, widen(from, type), sums[r][s]);
      }
    }
  for (; i < count; i += W)
    EACH(r, rows)
      sums[r][0] = fused(read(x + i, 0, count - i, FLOAT32), read(a + r * stride + i * bytes, 0, count - i, type), sums[r][0]);
  EACH(r, rows) to[r] = sum(sums[r][0] + sums[r][1]);
}

// Mixes vectors of b's columns, from c on.
INLINE void mix(const float *inner, int64_t rank, const char *b, int64_t stride, float *to, int64_t c, int64_t columns,
                const int vectors, const Type type) {
  F mixed[MIXED];
  EACH(v, vectors) mixed[v] = spread(-0.0f);  // which adds nothing, to -0 either
  FOR(r, rank)
    EACH(v, vectors) {
      if (v * W * bytes_of(type) % LINE == 0) prefetch(b + r * stride + (c + v) * W * bytes_of(type) + NEAR);
      mixed[v] = fused(spread(inner[r]), read(b + r * stride, c + v, columns, type), mixed[v]);
    }
  EACH(v, vectors) store_columns(to, mixed[v], (c + v) * W, columns);
}

INLINE void add_adapter(const Adapters *t, int64_t row, const Type type) {
  float inner[t->rank];
  const int64_t index = t->index[row], bytes = bytes_of(type), stride = t->in * bytes;
  const float *x = t->x + row * t->in, *scale = t->scale + index * t->parts * t->rank;
  const char *a = t->a + index * t->parts * t->rank * stride, *b = t->b + index * t->rank * t->out * bytes;
  for (int64_t part = 0; part < t->parts; part++, a += t->rank * stride, scale += t->rank) {
    const int64_t begin = t->edges[part], columns = t->edges[part + 1] - begin;
    const char *from = b + begin * bytes;
    float *to = t->added + row * t->out + begin;
    int64_t rank = t->rank, r = 0, c = 0;
    while (rank && !scale[rank - 1]) rank--;
    FOR(i, rank)
      for (int64_t at = 0; at < smaller(columns * bytes, NEAR); at += LINE) prefetch(from + i * t->out * bytes + at);
    for (; r + DOTS <= rank; r += DOTS) dots(x, a + r * stride, t->in, stride, DOTS, type, inner + r);
    for (; r < rank; r++) dots(x, a + r * stride, t->in, stride, 1, type, inner + r);
    FOR(i, rank) inner[i] *= scale[i];
    for (; (c + MIXED) * W <= columns; c += MIXED) mix(inner, rank, from, t->out * bytes, to, c, columns, MIXED, type);
    for (; c * W < columns; c++) mix(inner, rank, from, t->out * bytes, to, c, columns, 1, type);
  }
}

static void add_row(const Adapters *t, int64_t row) { WITH_TYPE(t->type, add_adapter(t, row, type)) }
