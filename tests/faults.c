/* Counts what a process changes on disk below one folder, and at the k-th change ends the process or refuses it.

   cc -shared -fPIC -O1 faults.c -o faults.so -ldl; LD_PRELOAD=faults.so, then fault_arm(...). It stands between the process
   and libc, so it sees every library: opens for writing, writes, truncations, fsyncs, renames,
   removals, new folders and changes of mode. A process that ends in the middle of a write has written half of it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ENDED = 77 };  /* the exit code */
static char folder[PATH_MAX];
static long at, seen;
static int error, once, log_to = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* From now on changes below `below` are counted from 1. Change `k` (0: none) ends the process where `code` is 0, else fails
   with that errno: it alone where `single`, else each one from there on. Each change is a line of the file `log`. */
void fault_arm(const char *below, long k, int code, int single, const char *log) {
  at = k, error = code, once = single, seen = 0;
  log_to = *log ? open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
  strncpy(folder, below, sizeof folder - 1);
}

/* The absolute path of `path` below the handle `dir`, or of the handle itself where there is no path. */
static const char *absolute(int dir, const char *path, char *out) {
  if (path && (*path == '/' || dir == AT_FDCWD)) return path;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
  ssize_t n = readlink(link, out, PATH_MAX - 1);
  if (n < 0) return "";
  out[n] = 0;
  if (path) strncat(strcat(out, "/"), path, PATH_MAX - 2 - n);
  return out;
}

/* Counts a change. Returns 0: go on; -1: refuse, with errno; 1: this is the last one, `end` after half of it. */
static int change(const char *kind, int dir, const char *path, const char *old) {
  if (!*folder) return 0;
  char buffer[2 * PATH_MAX];
  int before = errno, verdict = 0;
  path = absolute(dir, path, buffer);
  if (strncmp(path, folder, strlen(folder))) return errno = before, 0;
  pthread_mutex_lock(&lock);
  long k = ++seen;
  if (log_to >= 0) dprintf(log_to, "%s\t%s\t%s\n", kind, path, old);
  if (at && (k == at || (k > at && error && !once))) verdict = error ? -1 : 1;
  if (verdict == 1 && strcmp(kind, "write")) _exit(ENDED);
  if (verdict != 1) pthread_mutex_unlock(&lock); /* nobody goes on beside the last write */
  errno = verdict < 0 ? error : before;
  return verdict;
}

#define OPEN(name, dir, path, call)                                   \
  mode_t mode = 0;                                                    \
  if (flags & (O_CREAT | __O_TMPFILE)) {                              \
    va_list rest;                                                     \
    va_start(rest, flags);                                            \
    mode = va_arg(rest, mode_t);                                      \
    va_end(rest);                                                     \
  }                                                                   \
  REAL(name);                                                         \
  return (flags & O_ACCMODE) != O_RDONLY && change("open", dir, path, "") ? -1 : call
int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path, real(path, flags, mode)); }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path, real(path, flags, mode)); }
int openat(int dir, const char *path, int flags, ...) { OPEN(openat, dir, path, real(dir, path, flags, mode)); }
int openat64(int dir, const char *path, int flags, ...) { OPEN(openat64, dir, path, real(dir, path, flags, mode)); }

#define WRITE(name, half, call)                  \
  REAL(name);                                    \
  int verdict = change("write", handle, NULL, "");   \
  if (verdict > 0) (void)!half, _exit(ENDED);    \
  return verdict ? -1 : call
ssize_t write(int handle, const void *data, size_t size) {
  WRITE(write, real(handle, data, size / 2), real(handle, data, size));
}
ssize_t pwrite(int handle, const void *data, size_t size, off_t from) {
  WRITE(pwrite, real(handle, data, size / 2, from), real(handle, data, size, from));
}
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t from) {
  WRITE(pwrite64, real(handle, data, size / 2, from), real(handle, data, size, from));
}
ssize_t writev(int handle, const struct iovec *parts, int count) {
  WRITE(writev, real(handle, parts, count / 2), real(handle, parts, count));
}

#define CHANGE(kind, name, dir, path, old, parameters, arguments) \
  int name parameters {                                      \
    REAL(name);                                              \
    return change(kind, dir, path, old) ? -1 : real arguments; \
  }
CHANGE("fsync", fsync, handle, NULL, "", (int handle), (handle))
CHANGE("fsync", fdatasync, handle, NULL, "", (int handle), (handle))
CHANGE("truncate", ftruncate, handle, NULL, "", (int handle, off_t size), (handle, size))
CHANGE("truncate", ftruncate64, handle, NULL, "", (int handle, off64_t size), (handle, size))
CHANGE("rename", rename, AT_FDCWD, new, old, (const char *old, const char *new), (old, new))
CHANGE("rename", renameat, to, new, old, (int from, const char *old, int to, const char *new), (from, old, to, new))
CHANGE("remove", unlink, AT_FDCWD, path, "", (const char *path), (path))
CHANGE("remove", unlinkat, dir, path, "", (int dir, const char *path, int flags), (dir, path, flags))
CHANGE("remove", rmdir, AT_FDCWD, path, "", (const char *path), (path))
CHANGE("mkdir", mkdir, AT_FDCWD, path, "", (const char *path, mode_t mode), (path, mode))
CHANGE("mkdir", mkdirat, dir, path, "", (int dir, const char *path, mode_t mode), (dir, path, mode))
CHANGE("chmod", chmod, AT_FDCWD, path, "", (const char *path, mode_t mode), (path, mode))
CHANGE("chmod", fchmod, handle, NULL, "", (int handle, mode_t mode), (handle, mode))
