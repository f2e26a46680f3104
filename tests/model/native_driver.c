// Calls kernels as XLA does, without XLA: of random shapes and contents, from several threads at once over one pool of threads.
//
//     native_driver SEED CALLS LIBRARY...     of each library the kernels that this knows
//
// Each call is made once by a single thread, then by CALLERS threads at a time that share its inputs: all results must have the
// same bits. Arrays have the bytes that they need and no more, so a sanitiser sees what lies outside. Prints for each kernel
// a digest of its results, by which two versions of a kernel compare. Contents: ordinary numbers, zeros, denormals, numbers
// near the largest, infinities and NaN.
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

enum { THREADS = 3, CALLERS = 3, MOST = 24, QUEUE = 1024 };
typedef XLA_FFI_Error *Kernel(XLA_FFI_CallFrame *);
enum Type { F32 = XLA_FFI_DataType_F32, BF16 = XLA_FFI_DataType_BF16, S8 = XLA_FFI_DataType_S8, U8 = XLA_FFI_DataType_U8, S32 = XLA_FFI_DataType_S32 };

// ---- The pool of threads

static struct {
  XLA_FFI_Task *task;
  void *data;
} queue[QUEUE];
static int first, count, is_over;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void *work(void *_) {
  pthread_mutex_lock(&lock);
  for (;;) {
    while (!count && !is_over) pthread_cond_wait(&changed, &lock);
    if (!count) break;
    const int at = first;
    XLA_FFI_Task *task = queue[at].task;
    void *data = queue[at].data;
    first = (first + 1) % QUEUE;
    count--;
    pthread_mutex_unlock(&lock);
    task(data);
    pthread_mutex_lock(&lock);
  }
  pthread_mutex_unlock(&lock);
  return _;
}

// `ctx` points to how many threads the pool has for a call.
static XLA_FFI_Error *schedule(XLA_FFI_ThreadPool_Schedule_Args *args) {
  pthread_mutex_lock(&lock);
  if (count == QUEUE) abort();
  queue[(first + count++) % QUEUE].task = args->task;
  queue[(first + count - 1) % QUEUE].data = args->data;
  pthread_cond_signal(&changed);
  pthread_mutex_unlock(&lock);
  return NULL;
}

static XLA_FFI_Error *count_threads(XLA_FFI_ThreadPool_NumThreads_Args *args) {
  *args->num_threads = *(const int64_t *)args->ctx;
  return NULL;
}

static const XLA_FFI_Api api = {
    .struct_size = XLA_FFI_Api_STRUCT_SIZE, .XLA_FFI_ThreadPool_Schedule = schedule, .XLA_FFI_ThreadPool_NumThreads = count_threads};

// ---- Arrays

typedef struct {
  XLA_FFI_Buffer buffers[MOST];
  int64_t dims[MOST][5];
  size_t bytes[MOST];
  int size;
} Arrays;

static uint64_t state;
static uint64_t draw(void) {  // xorshift
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state * 0x2545f4914f6cdd1d >> 16;
}
static int64_t below(int64_t most) { return draw() % most; }
static int64_t one_of(int count, const int64_t *values) { return values[below(count)]; }
#define ONE_OF(...) one_of(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), (int64_t[]){__VA_ARGS__})

static void *add(Arrays *a, enum Type type, int64_t d0, int64_t d1, int64_t d2, int64_t d3, int64_t d4) {
  const int64_t dims[5] = {d0, d1, d2, d3, d4};
  int i = a->size++, rank = 0;
  size_t numbers = 1;
  if (i == MOST) abort();
  for (; rank < 5 && dims[rank] >= 0; rank++) numbers *= a->dims[i][rank] = dims[rank];
  a->bytes[i] = numbers * (type == F32 || type == S32 ? 4 : type == BF16 ? 2 : 1);
  a->buffers[i] = (XLA_FFI_Buffer){XLA_FFI_Buffer_STRUCT_SIZE, NULL, (XLA_FFI_DataType)type, NULL, rank, a->dims[i]};
  if (posix_memalign(&a->buffers[i].data, 64, a->bytes[i] ? a->bytes[i] : 1)) abort();
  memset(a->buffers[i].data, 0xa5, a->bytes[i]);
  return a->buffers[i].data;
}

// Fills array i with numbers, of which a few are unusual where `is_wild`.
static void fill(Arrays *a, int i, int is_wild) {
  static const float unusual[] = {0.0f, -0.0f, 1e-40f, -1e-45f, 3e38f, -3e38f, 1e-30f, 1e30f, __builtin_inff(), -__builtin_inff(), __builtin_nanf("")};
  const enum Type type = (enum Type)a->buffers[i].dtype;
  const size_t size = type == F32 ? 4 : type == BF16 ? 2 : 1;
  const uint64_t rarely = is_wild ? ONE_OF(2, 50, 1000) : 0, kind = below(11);
  for (size_t at = 0; at < a->bytes[i]; at += size) {
    float f = ((int64_t)below(2001) - 1000) * 1e-3f;
    if (rarely && !below(rarely)) f = unusual[below(3) ? kind : (uint64_t)below(11)];
    uint32_t bits;
    memcpy(&bits, &f, 4);
    int8_t byte = below(255) - 127;
    char *to = (char *)a->buffers[i].data + at;
    if (type == S8) memcpy(to, &byte, 1);
    else if (type == U8) *to = below(256);
    else memcpy(to, (char *)&bits + 4 - size, size);
  }
}

static void put(void *to, int i, int32_t value) { ((int32_t *)to)[i] = value; }

// Adds arrays that are the same, in memory of their own.
static void copy(const Arrays *a, Arrays *b) {
  for (int i = 0; i < a->size; i++) {
    const int64_t *d = a->dims[i], rank = a->buffers[i].rank;
    void *to = add(b, (enum Type)a->buffers[i].dtype, rank > 0 ? d[0] : -1, rank > 1 ? d[1] : -1, rank > 2 ? d[2] : -1,
                   rank > 3 ? d[3] : -1, rank > 4 ? d[4] : -1);
    memcpy(to, a->buffers[i].data, a->bytes[i]);
  }
}

static void drop(Arrays *a) {
  for (int i = 0; i < a->size; i++) free(a->buffers[i].data);
}

// ---- The kernels' arguments and results. A kernel that writes to arguments in place has them among its results.

// Adapters of M rows, and what they add.
static void add_adapters(Arrays *in, Arrays *out, int64_t M, int64_t inputs, int64_t columns) {
  const int64_t A = 1 + below(4), most = columns < 3 ? columns : 3, P = 1 + below(most), rank = 1 + below(9);
  const enum Type type = ONE_OF(F32, BF16, S8);
  int32_t *index = add(in, S32, M, -1, -1, -1, -1);
  for (int i = 0; i < M; i++) put(index, i, below(A));
  add(in, type, A, P * rank, inputs, -1, -1), fill(in, in->size - 1, 1);
  add(in, type, A, rank, columns, -1, -1), fill(in, in->size - 1, 1);
  float *scale = add(in, F32, A, P * rank, -1, -1, -1);
  fill(in, in->size - 1, 1);
  for (int i = 0; i < A * P * rank; i++) if (!below(3)) scale[i] = 0;
  int32_t *edges = add(in, S32, P + 1, -1, -1, -1, -1);
  for (int i = 0; i <= P; i++) put(edges, i, i == P ? columns : i ? edges[i - 1] + 1 + below(columns - edges[i - 1] - (P - i)) : 0);
  add(out, F32, M, columns, -1, -1, -1);
}

static void block_matmul(Arrays *in, Arrays *out) {
  const int64_t M = ONE_OF(1, 2, 3, 5, 6, 7, 12, 40), columns = 1 + below(150);
  const int64_t size = ONE_OF(288, 320, 352, 384, 544, 2368, 2880, 3360);  // the last three of 8 groups a block
  const int64_t blocks = 1 + below(size > 2000 ? 2 : 9), groups = blocks * (size > 2000 ? 8 : 1);
  const int has_minimum = size == 320 || size == 384 || size == 2368 || size == 2880;
  const int64_t before = below(3);  // nothing, a norm, or SwiGLU
  add(in, F32, M, (before == 2 ? 64 : 32) * groups, -1, -1, -1), fill(in, 0, 1);
  const enum Type type = size == 288 && below(2) ? S8 : U8;  // IQ4_NL, and every other kind
  uint8_t *weight = add(in, type, (columns + 15) / 16, blocks, size, -1, -1);
  fill(in, 1, 0);
  for (size_t at = 0; at < in->bytes[1]; at++)  // scales and minima are finite
    if (at % size >= (size_t)(size - (has_minimum ? 64 : 32)) && at % 2) weight[at] &= 0xbf;
  add(in, F32, before == 1 ? 32 * groups : 0, -1, -1, -1, -1), fill(in, 2, 1);
  *(float *)add(in, F32, -1, -1, -1, -1, -1) = 1e-5f;
  add(out, F32, M, columns, -1, -1, -1);
  if (below(2)) add_adapters(in, out, M, 32 * groups, columns);
}

static void adapter_matmul(Arrays *in, Arrays *out) {
  const int64_t M = 1 + below(9), inputs = 1 + below(140);
  add(in, F32, M, inputs, -1, -1, -1), fill(in, 0, 1);
  add_adapters(in, out, M, inputs, 1 + below(150));
}

// Keys and values, those of int8 with their scales behind them.
static void add_cache(Arrays *to, enum Type type, int64_t B, int64_t K, int64_t S, int64_t H) {
  for (int side = 0; side < 2; side++) {
    add(to, type, B, K, S, H, -1), fill(to, to->size - 1, 1);
    if (type == S8) add(to, F32, B, K, S, -1, -1), fill(to, to->size - 1, 1);
  }
}

static void decode_attention(Arrays *in, Arrays *out) {
  const int64_t B = 1 + below(4), R = B + below(3), K = 1 + below(3), G = 1 + below(6), U = R + below(3);
  const int64_t H = ONE_OF(1, 4, 15, 16, 20, 33, 64, 128), S = ONE_OF(1, 3, 40, 300, 700), type = ONE_OF(F32, BF16, S8);
  add(in, F32, R, K, G, H, -1), fill(in, 0, 1);
  void *position = add(in, S32, R, -1, -1, -1, -1), *slot = add(in, S32, R, -1, -1, -1, -1);
  void *source = add(in, S32, U, -1, -1, -1, -1), *target = add(in, S32, U, -1, -1, -1, -1);
  for (int r = 0; r < R; r++) put(position, r, below(S + 1) - 1), put(slot, r, below(B));
  for (int u = 0; u < U; u++) put(source, u, below(R)), put(target, u, u < B ? u : B);  // no slot is written twice
  add(out, F32, R, K, G, H, -1);
  add_cache(in, type, R, K, 1, H);
  add_cache(out, type, B, K, S, H);
}

static void prefill_attention(Arrays *in, Arrays *out) {
  const int64_t R = 1 + below(3), T = ONE_OF(1, 3, 16, 64, 70, 130), K = 1 + below(2), N = K * (1 + below(3)), B = 1 + below(3);
  const int64_t H = ONE_OF(1, 4, 15, 16, 20, 33, 64, 128), S = T + below(200), type = ONE_OF(F32, BF16, S8);
  const enum Type numbers = type == BF16 ? BF16 : F32;
  add(in, numbers, R, T, N, H, -1), fill(in, 0, 1);
  void *position = add(in, S32, R, -1, -1, -1, -1), *slot = add(in, S32, R, -1, -1, -1, -1);
  for (int r = 0; r < R; r++) put(position, r, below(S - T + 2) - 1), put(slot, r, below(B + 1));
  add_cache(in, type, B, K, S, H);
  add(out, numbers, R, T, N * H, -1, -1);
}

static void causal_attention(Arrays *in, Arrays *out) {
  const int64_t B = 1 + below(2), T = ONE_OF(1, 2, 7, 31, 64, 65, 130), K = 1 + below(2), N = K * (1 + below(3)), H = ONE_OF(1, 4, 15, 16, 20, 33, 64, 128);
  const enum Type type = below(2) ? F32 : BF16;
  add(in, type, B, T, N, H, -1), fill(in, 0, 1);
  for (int side = 1; side < 3; side++) add(in, type, B, T, K, H, -1), fill(in, side, 1);
  if (below(2)) {
    void *segments = add(in, S32, B, T, -1, -1, -1);
    for (int i = 0; i < B * T; i++) put(segments, i, below(3));
  } else
    add(in, S32, 0, -1, -1, -1, -1);
  add(out, type, B, T, N * H, -1, -1);
  add(out, F32, B, N, 2, T, -1);
}

// Of any sums, not those of a forward pass.
static void causal_attention_backward(Arrays *in, Arrays *out) {
  Arrays results = {0};
  causal_attention(in, &results);
  for (int i = 0; i < 3; i++) {
    const XLA_FFI_Buffer *like = &results.buffers[i % 2];
    add(in, (enum Type)like->dtype, like->dims[0], like->dims[1], like->dims[2], i == 1 ? like->dims[3] : -1, -1);
    fill(in, in->size - 1, 1);
  }
  drop(&results);
  for (int i = 0; i < 3; i++) {
    const int64_t *d = in->dims[i];
    add(out, (enum Type)in->buffers[i].dtype, d[0], d[1], d[2], d[3], -1);
  }
}

static const struct {
  const char *name;
  void (*make)(Arrays *in, Arrays *out);
} KERNELS[] = {{"thrice_block_matmul", block_matmul}, {"thrice_adapter_matmul", adapter_matmul},
               {"thrice_decode_attention", decode_attention}, {"thrice_prefill_attention", prefill_attention},
               {"thrice_causal_attention", causal_attention},
               {"thrice_causal_attention_backward", causal_attention_backward}};

// ---- Calls

static void call(Kernel *kernel, const Arrays *in, const Arrays *out, int64_t threads) {
  void *arguments[2 * MOST], *results[MOST];
  int size = 0;
  for (int i = 0; i < in->size; i++) arguments[size++] = (void *)&in->buffers[i];
  for (int i = 0; i < out->size; i++) results[i] = (void *)&out->buffers[i];
  XLA_FFI_CallFrame frame = {.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE, .api = &api, .ctx = (XLA_FFI_ExecutionContext *)&threads,
                             .args = {.size = size, .args = arguments}, .rets = {.size = out->size, .rets = results}};
  if (kernel(&frame)) abort();
}

typedef struct {
  Kernel *kernel;
  const Arrays *in;
  Arrays out;
} Caller;

static void *make_call(void *caller) {
  Caller *c = caller;
  call(c->kernel, c->in, &c->out, THREADS + 1);
  return NULL;
}

int main(int size, char **words) {
  pthread_t pool[THREADS], threads[CALLERS];
  for (int i = 0; i < THREADS; i++) pthread_create(&pool[i], NULL, work, NULL);
  int failures = 0;
  for (int l = 3; l < size; l++) {
    void *library = dlopen(words[l], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
    for (unsigned k = 0; k < sizeof KERNELS / sizeof *KERNELS; k++) {
      Kernel *kernel = (Kernel *)dlsym(library, KERNELS[k].name);
      uint64_t digest = 0xcbf29ce484222325;  // FNV-1a
      state = 2 * strtoull(words[1], NULL, 10) + 1;
      for (int n = 0; kernel && n < atoi(words[2]); n++) {
        Arrays in = {0}, out = {0};
        KERNELS[k].make(&in, &out);
        Caller callers[CALLERS];
        for (int i = 0; i < CALLERS; i++) callers[i] = (Caller){kernel, &in}, copy(&out, &callers[i].out);
        call(kernel, &in, &out, 1);
        for (int i = 0; i < CALLERS; i++) pthread_create(&threads[i], NULL, make_call, &callers[i]);
        for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
        for (int o = 0; o < out.size; o++) {
          for (int i = 0; i < CALLERS; i++)
            if (memcmp(out.buffers[o].data, callers[i].out.buffers[o].data, out.bytes[o])) {
              fprintf(stderr, "%s, call %d: result %d depends on threads\n", KERNELS[k].name, n, o);
              failures++;
            }
          for (size_t at = 0; at < out.bytes[o]; at++) digest = (digest ^ ((uint8_t *)out.buffers[o].data)[at]) * 0x100000001b3;
        }
        for (int i = 0; i < CALLERS; i++) drop(&callers[i].out);
        drop(&in), drop(&out);
      }
      if (kernel) printf("%s %016llx\n", KERNELS[k].name, (unsigned long long)digest);
    }
  }
  pthread_mutex_lock(&lock);
  is_over = 1;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  for (int i = 0; i < THREADS; i++) pthread_join(pool[i], NULL);
  return failures > 0;
}
