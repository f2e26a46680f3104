// What every kernel here needs of XLA: a task's parts done by the threads of its own pool, and its errors.
//
// Threads take parts as they come free. One that comes late finds no part left, so nobody waits for a thread that has not begun.
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#if defined(__x86_64__)
#define pause() __builtin_ia32_pause()
#else
#define pause() __asm__ volatile("yield")
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

enum { LINE = 64 };           // bytes of a cache line
enum { PART = 64 * 1024 };    // bytes of memory that a thread reads at a time, about
enum { PATIENCE = 10000 };    // looks at the others' parts before giving them the processor

typedef void Part(const void *task, int64_t part);

typedef struct {
  Part *do_part;
  const void *task;
  int64_t parts;
  _Atomic int64_t next, done;  // parts
  _Atomic int holders;         // threads that still read this
} Work;

static inline void release(Work *w) {
  if (atomic_fetch_sub(&w->holders, 1) == 1) free(w);
}

static inline void take_parts(Work *w) {
  for (int64_t part; (part = atomic_fetch_add(&w->next, 1)) < w->parts;) {
    w->do_part(w->task, part);
    atomic_fetch_add(&w->done, 1);
  }
}

static inline void help(void *w) {
  take_parts(w);
  release(w);
}

static inline XLA_FFI_Error *out_of_memory(const XLA_FFI_Api *xla) {
  XLA_FFI_Error_Create_Args error = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, "out of memory",
                                     XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return xla->XLA_FFI_Error_Create(&error);
}

// Returns 0 after dropping XLA's error.
static inline int failed(const XLA_FFI_Api *xla, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args drop = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  if (error) xla->XLA_FFI_Error_Destroy(&drop);
  return error != NULL;
}

static inline int64_t count_threads(XLA_FFI_CallFrame *call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args pool = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, call->ctx, &threads};
  return failed(call->api, call->api->XLA_FFI_ThreadPool_NumThreads(&pool)) || threads < 1 ? 1 : threads;
}

// Does all parts of a task, with the threads of XLA's pool. Those that come late still read the Work, so it is freed by the last.
static inline XLA_FFI_Error *run(XLA_FFI_CallFrame *call, int64_t threads, Part *do_part, const void *task, int64_t parts) {
  const XLA_FFI_Api *xla = call->api;
  if (parts < 2 || threads < 2) {
    for (int64_t part = 0; part < parts; part++) do_part(task, part);
    return NULL;
  }
  Work *w = malloc(sizeof *w);
  if (!w) return out_of_memory(xla);
  const int helpers = threads < parts ? threads - 1 : parts - 1;
  *w = (Work){.do_part = do_part, .task = task, .parts = parts, .holders = 1 + helpers};
  for (int i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args helper = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, call->ctx, help, w};
    if (failed(xla, xla->XLA_FFI_ThreadPool_Schedule(&helper))) release(w);
  }
  take_parts(w);
  for (int spins = 0; atomic_load(&w->done) < parts; spins++) {
    if (spins < PATIENCE) pause();
    else sched_yield();  // to a thread that was interrupted within its part
  }
  release(w);
  return NULL;
}

// Answers XLA when it asks, before the first call, which version of its interface this is for; else returns 0.
static inline int answered_version(XLA_FFI_CallFrame *call) {
  if (!call->extension_start || call->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)call->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

// The function that XLA calls. Its body has `call`, `arguments` and `results`.
#define KERNEL(name)                                                                                                      \
  static XLA_FFI_Error *name(XLA_FFI_CallFrame *call, XLA_FFI_Buffer **arguments, XLA_FFI_Buffer **results);              \
  XLA_FFI_Error *thrice_##name(XLA_FFI_CallFrame *call) {                                                                 \
    if (answered_version(call)) return NULL;                                                                              \
    return name(call, (XLA_FFI_Buffer **)call->args.args, (XLA_FFI_Buffer **)call->rets.rets);                            \
  }                                                                                                                       \
  static XLA_FFI_Error *name(XLA_FFI_CallFrame *call, XLA_FFI_Buffer **arguments, XLA_FFI_Buffer **results)

static inline int64_t ceiling(int64_t count, int64_t size) { return (count + size - 1) / size; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline size_t lines(size_t bytes) { return ceiling(bytes, LINE) * LINE; }

// Places an array at the end of a piece of memory, in cache lines of its own, or counts its bytes where there is none yet.
static inline void *claim(char **at, size_t bytes) {
  void *here = *at;
  *at += lines(bytes);
  return here;
}

// Gives a task its arrays in one piece, `memory`: place(&task, &at) claims them.
#define WITH_MEMORY(place, task)                                        \
  char *end = NULL;                                                     \
  place(&task, &end);                                                   \
  char *memory = aligned_alloc(LINE, end - (char *)NULL);               \
  if (!memory) return out_of_memory(call->api);                         \
  end = memory;                                                         \
  place(&task, &end);
