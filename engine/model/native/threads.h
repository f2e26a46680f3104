// What every kernel here needs of XLA: a task's parts done by the threads of its own pool, and its errors. Threads take parts as
// they come free. One that comes late finds no part left, so nobody waits for a thread that has not begun.
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define pause() __builtin_ia32_pause()
#else
#include <arm_neon.h>
#define pause() __asm__ volatile("yield")
#endif
#define FOR(i, count) for (int64_t i = 0; i < count; i++)
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)  // of a constant count, unrolled
// Processors fetch ahead, but not past a page. Into the second cache: the first is too small.
#define prefetch(address) __builtin_prefetch(address, 0, 2)
#define NOINLINE __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))  // `const` arguments are constants where it is used

typedef XLA_FFI_CallFrame Call;
typedef XLA_FFI_Buffer Buffer;
typedef XLA_FFI_Error Error;
enum { LINE = 64 };  // bytes of a cache line
enum { PART = 64 * 1024 };  // bytes of memory that a thread reads at a time, about
enum { PATIENCE = 10000 };  // looks at the others' parts before giving them the processor

INLINE int64_t ceiling(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef void Part(const void *task, int64_t part);

typedef struct {
  Part *do_part;
  const void *task;
  int64_t parts;
  _Atomic int64_t next, done;  // parts
  _Atomic int holders;  // threads that still read this
} Work;

INLINE void release(Work *w) {
  if (atomic_fetch_sub(&w->holders, 1) == 1) free(w);
}

INLINE void take_parts(Work *w) {
  for (int64_t part; (part = atomic_fetch_add(&w->next, 1)) < w->parts;) {
    w->do_part(w->task, part);
    atomic_fetch_add(&w->done, 1);
  }
}

INLINE void help(void *w) {
  take_parts(w);
  release(w);
}

INLINE Error *error_of(Call *call, XLA_FFI_Error_Code code, const char *message) {
  XLA_FFI_Error_Create_Args error = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return call->api->XLA_FFI_Error_Create(&error);
}
INLINE Error *out_of_memory(Call *call) { return error_of(call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory"); }

// Returns an error to XLA unless a condition on the arguments and results holds. Kernels ask before they read what lies there.
#define REQUIRE(condition) \
  if (!(condition)) return error_of(call, XLA_FFI_Error_Code_INVALID_ARGUMENT, "the kernel requires " #condition);

// A buffer's size along an axis; -1, which no buffer has, along one that it lacks.
INLINE int64_t dim(const Buffer *buffer, int64_t axis) { return axis < buffer->rank ? buffer->dims[axis] : -1; }

// Whether a buffer has this type and these dimensions, in order; one without a dimension is of a single number.
INLINE int is_array(const Buffer *buffer, XLA_FFI_DataType type, int64_t rank, const int64_t *dims) {
  if (buffer->dtype != type || buffer->rank != rank) return 0;
  FOR(axis, rank)
    if (buffer->dims[axis] != dims[axis]) return 0;
  return 1;
}
#define IS(buffer, type, ...) \
  is_array(buffer, type, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), (const int64_t[]){__VA_ARGS__})
#define F32 XLA_FFI_DataType_F32
#define BF16 XLA_FFI_DataType_BF16
#define S8 XLA_FFI_DataType_S8
#define S32 XLA_FFI_DataType_S32
#define U8 XLA_FFI_DataType_U8

// Returns 0 after dropping XLA's error.
INLINE int failed(Call *call, Error *error) {
  XLA_FFI_Error_Destroy_Args drop = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  if (error) call->api->XLA_FFI_Error_Destroy(&drop);
  return error != NULL;
}

INLINE int64_t count_threads(Call *call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args pool = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, call->ctx, &threads};
  return failed(call, call->api->XLA_FFI_ThreadPool_NumThreads(&pool)) || threads < 1 ? 1 : threads;
}

// Does all parts of a task. Threads that come late still read the Work: the last one frees it.
INLINE void run(Call *call, int64_t threads, Part *do_part, const void *task, int64_t parts) {
  const int64_t helpers = smaller(threads, parts) - 1;
  Work *w = helpers < 1 ? NULL : malloc(sizeof *w);
  if (!w) {
    FOR(part, parts) do_part(task, part);
    return;
  }
  *w = (Work){.do_part = do_part, .task = task, .parts = parts, .holders = 1 + helpers};
  FOR(i, helpers) {
    XLA_FFI_ThreadPool_Schedule_Args helper = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, call->ctx, help, w};
    if (failed(call, call->api->XLA_FFI_ThreadPool_Schedule(&helper))) release(w);
  }
  take_parts(w);
  for (int spins = 0; atomic_load(&w->done) < parts; spins++) {
    if (spins < PATIENCE) pause();
    else sched_yield();  // to a thread that was interrupted within its part
  }
  release(w);
}

// Answers XLA when it asks, before the first call, for which version of its interface this is; else returns 0.
INLINE int answered_version(Call *call) {
  if (!call->extension_start || call->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)call->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

// The function that XLA calls. Its body has `call`, and its arguments and results, `in` and `out`.
#define KERNEL(name) \
  static Error *name(Call *call, Buffer **in, Buffer **out); \
  Error *thrice_##name(Call *call) { \
    if (answered_version(call)) return NULL; \
    return name(call, (Buffer **)call->args.args, (Buffer **)call->rets.rets); \
  } \
  static Error *name(Call *call, Buffer **in, Buffer **out)

// Memory that arrays are taken from, each in cache lines of its own. One without a start only counts their bytes.
typedef struct {
  char *start;
  size_t used;
} Memory;

INLINE void *claim(Memory *memory, size_t bytes) {
  void *here = memory->start ? memory->start + memory->used : NULL;
  memory->used += ceiling(bytes, LINE) * LINE;
  return here;
}

// Gives a task the arrays that place(&task, &memory) claims.
#define WITH_MEMORY(place, task) \
  Memory memory = {0}; \
  place(&task, &memory); \
  memory.start = aligned_alloc(LINE, memory.used + LINE); \
  if (!memory.start) return out_of_memory(call); \
  memory.used = 0; \
  place(&task, &memory);
