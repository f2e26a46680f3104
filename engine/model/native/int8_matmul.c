// The product of a few rows with an int8 weight, called by XLA: rounds each row as int8.py's round_rows or two_digit_rows do,
// and sums integers, exactly, so that results have the bits that XLA's own products have.
//
//     x (M, in) float32, weight (out, in) int8 -> sums (digits * M, out) int32, scales (M, 1) float32
//
// A decode step reads every weight once and does little with it, so this is a loop over memory in order. Threads of XLA's own
// pool help. One that comes late finds no part left, so nobody waits for a thread that has not begun.
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

// Dot-product instructions of x86 multiply an unsigned byte by a signed one: weights are taken 128 too high.
#if defined(__x86_64__)
typedef uint8_t Weight;
enum { TOO_HIGH = 128 };
#include <immintrin.h>
#define pause() _mm_pause()
#else
typedef int8_t Weight;
enum { TOO_HIGH = 0 };
#define pause()
#endif

enum { LINE = 64, GROUP = 6, FINE = 254 };  // bytes of a cache line; rows that share one reading; as in int8.py
enum { PART = 64 * 1024 };                  // bytes of weight that a thread takes at a time, at most
enum { PATIENCE = 10000 };                  // looks at the others' parts before giving them the processor

typedef struct {
  const int8_t *weight;
  int8_t *rows;       // (count, stride), rounded; each begins a cache line, and ends one in zeros
  int32_t **sums;     // (count), where a row's results go
  int32_t *surplus;   // (count), what TOO_HIGH adds to them
  int64_t in, columns, stride, part_columns, parts;
  int count;
  _Atomic int64_t next, done;  // parts
  _Atomic int holders;         // threads that still read this
} Product;

#define UNROLL _Pragma("GCC unroll 8")

// Rows first .. first + rows - 1 times columns start .. stop - 1. `rows` is a constant wherever this is inlined.
static inline __attribute__((always_inline)) void multiply(const Product *p, int first, const int rows, int64_t start,
                                                           int64_t stop) {
  const int64_t in = p->in, stride = p->stride;
  const int8_t *restrict x = p->rows + first * stride;
  for (int64_t column = start; column < stop; column++) {
    const int8_t *restrict w = p->weight + column * in;
    int32_t sums[GROUP] = {0};
#ifdef __AVX512VNNI__  // gcc makes the same of the loop below; clang 22 takes 2.6 to 6 times as long without
    __m512i wide[GROUP];
    UNROLL for (int row = 0; row < rows; row++) wide[row] = _mm512_setzero_si512();
    for (int64_t i = 0; i < in; i += LINE) {
      const __mmask64 inside = in - i < LINE ? ((__mmask64)1 << (in - i)) - 1 : ~(__mmask64)0;
      const __m512i values = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, w + i), _mm512_set1_epi8((char)TOO_HIGH));
      UNROLL for (int row = 0; row < rows; row++)
        wide[row] = _mm512_dpbusd_epi32(wide[row], values, _mm512_load_si512(x + row * stride + i));
    }
    UNROLL for (int row = 0; row < rows; row++) sums[row] = _mm512_reduce_add_epi32(wide[row]);
#else
    for (int64_t i = 0; i < in; i++) {
      const Weight value = w[i] ^ TOO_HIGH;
      UNROLL for (int row = 0; row < rows; row++) sums[row] += value * x[row * stride + i];
    }
#endif
    UNROLL for (int row = 0; row < rows; row++) p->sums[first + row][column] = sums[row] - p->surplus[first + row];
  }
}

static void multiply_part(const Product *p, int64_t part) {
  const int64_t start = part * p->part_columns, end = start + p->part_columns, stop = end < p->columns ? end : p->columns;
  for (int first = 0; first < p->count; first += GROUP) {
    switch (p->count - first) {
      case 1: multiply(p, first, 1, start, stop); break;
      case 2: multiply(p, first, 2, start, stop); break;
      case 3: multiply(p, first, 3, start, stop); break;
      case 4: multiply(p, first, 4, start, stop); break;
      case 5: multiply(p, first, 5, start, stop); break;
      default: multiply(p, first, GROUP, start, stop);
    }
  }
}

static void release(Product *p) {
  if (atomic_fetch_sub(&p->holders, 1) == 1) free(p);
}

static void take_parts(Product *p) {
  for (int64_t part; (part = atomic_fetch_add(&p->next, 1)) < p->parts;) {
    multiply_part(p, part);
    atomic_fetch_add(&p->done, 1);
  }
}

static void help(void *p) {
  take_parts(p);
  release(p);
}

// Returns the scale of x (in), and writes its digits: 1, or 2 that lie `stride` apart. Rounds where int8.py rounds.
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

static size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// Returns 0 after dropping XLA's error.
static int failed(const XLA_FFI_Api *xla, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args drop = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  if (error) xla->XLA_FFI_Error_Destroy(&drop);
  return error != NULL;
}

XLA_FFI_Error *thrice_int8_matmul(XLA_FFI_CallFrame *call) {
  const XLA_FFI_Api *xla = call->api;
  if (call->extension_start && call->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)call->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return NULL;
  }
  XLA_FFI_Buffer **arguments = (XLA_FFI_Buffer **)call->args.args, **results = (XLA_FFI_Buffer **)call->rets.rets;
  const float *x = arguments[0]->data;
  const int64_t M = arguments[0]->dims[0], in = arguments[0]->dims[1], columns = arguments[1]->dims[0];
  const int digits = results[0]->dims[0] / M;
  int32_t *sums = results[0]->data;
  float *scales = results[1]->data;

  const size_t stride = lines(in), count = M * digits, head = lines(sizeof(Product));
  const size_t pointers = lines(count * sizeof(int32_t *)), surplus = lines(count * sizeof(int32_t));
  char *memory = aligned_alloc(LINE, head + pointers + surplus + count * stride);
  if (!memory) {
    XLA_FFI_Error_Create_Args error = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, "out of memory",
                                       XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
    return xla->XLA_FFI_Error_Create(&error);
  }
  Product *p = (Product *)memory;
  *p = (Product){.weight = arguments[1]->data, .rows = (int8_t *)memory + head + pointers + surplus,
                 .sums = (int32_t **)(memory + head), .surplus = (int32_t *)(memory + head + pointers), .in = in,
                 .columns = columns, .stride = stride};
  for (int64_t row = 0; row < M; row++) {
    int8_t *rounded = p->rows + p->count * stride;
    scales[row] = round_row(x + row * in, in, digits, rounded, stride);
    if (isnan(scales[row])) continue;  // as of rows not in use: their results are NaN whatever the sums are
    for (int digit = 0; digit < digits; digit++) {
      int32_t total = 0;
      for (int64_t i = 0; i < in; i++) total += rounded[digit * stride + i];
      memset(rounded + digit * stride + in, 0, stride - in);
      p->surplus[p->count] = TOO_HIGH * total;
      p->sums[p->count++] = sums + (digit * M + row) * columns;
    }
  }

  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args pool = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, call->ctx, &threads};
  if (failed(xla, xla->XLA_FFI_ThreadPool_NumThreads(&pool)) || threads < 1) threads = 1;
  const int64_t rounds = (in * columns + threads * PART - 1) / (threads * PART);  // in which each thread takes a part
  p->part_columns = (columns + threads * rounds - 1) / (threads * rounds);
  p->parts = p->count ? (columns + p->part_columns - 1) / p->part_columns : 0;
  const int helpers = threads < p->parts ? threads - 1 : p->parts ? p->parts - 1 : 0;
  atomic_store(&p->holders, 1 + helpers);
  for (int i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, call->ctx, help, p};
    if (failed(xla, xla->XLA_FFI_ThreadPool_Schedule(&task))) release(p);
  }
  take_parts(p);
  for (int spins = 0; atomic_load(&p->done) < p->parts; spins++) {
    if (spins < PATIENCE) pause();
    else sched_yield();  // to a thread that was interrupted within its part
  }
  release(p);
  return NULL;
}
