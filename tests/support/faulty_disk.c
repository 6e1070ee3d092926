// A disk that fails once: preloaded, it refuses the n-th call that changes something below $FAULTY_ROOT.
// Counted are calls of the C library, so those of Python, NumPy, Rust and C++ alike.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls, doomed = -1;
static atomic_int code, goes_on;
static char last[4096];

// Calls from number `call` on count from 0; the one with this number fails, with `persistent` all later ones, too.
void faulty_arm(long call, int number, int persistent) {
  atomic_store(&calls, 0);
  atomic_store(&code, number);
  atomic_store(&goes_on, persistent);
  atomic_store(&doomed, call);
  last[0] = 0;
}
long faulty_calls(void) { return atomic_load(&calls); }
const char* faulty_last(void) { return last; }

static int is_inside(const char* path) {
  const char* root = getenv("FAULTY_ROOT");
  return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int fails(const char* what, const char* path) {
  long number = atomic_fetch_add(&calls, 1), end = atomic_load(&doomed);
  if (end < 0 || number < end || (number > end && !atomic_load(&goes_on))) return 0;
  if (number == end) snprintf(last, sizeof last, "%s %s", what, path);
  errno = atomic_load(&code);
  return 1;
}

static int fails_at(const char* what, const char* path) { return is_inside(path) && fails(what, path); }

static int fails_of(const char* what, int file) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  ssize_t length = readlink(name, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails_at(what, path);
}

#define REAL(name)                   \
  static __typeof__(&name) real;     \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENING(name)                                                                    \
  int name(const char* path, int flags, ...) {                                           \
    va_list list;                                                                        \
    va_start(list, flags);                                                               \
    mode_t mode = va_arg(list, mode_t);                                                  \
    va_end(list);                                                                        \
    REAL(name);                                         \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails_at("open", path)) return -1;    \
    return real(path, flags, mode);                                                      \
  }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                                 \
  int name(int folder, const char* path, int flags, ...) {                               \
    va_list list;                                                                        \
    va_start(list, flags);                                                               \
    mode_t mode = va_arg(list, mode_t);                                                  \
    va_end(list);                                                                        \
    REAL(name);                                    \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails_at("open", path)) return -1;    \
    return real(folder, path, flags, mode);                                              \
  }
OPENING_AT(openat)
OPENING_AT(openat64)

#define OF_FILE(type, name, parameters, arguments, what)                                 \
  type name parameters {                                                                 \
    REAL(name);                                                     \
    return fails_of(what, file) ? -1 : real arguments;                                   \
  }
OF_FILE(ssize_t, write, (int file, const void* data, size_t size), (file, data, size), "write")
OF_FILE(ssize_t, pwrite, (int file, const void* data, size_t size, off_t at), (file, data, size, at), "write")
OF_FILE(ssize_t, pwrite64, (int file, const void* data, size_t size, off64_t at), (file, data, size, at), "write")
OF_FILE(ssize_t, writev, (int file, const struct iovec* parts, int count), (file, parts, count), "write")
OF_FILE(int, fsync, (int file), (file), "fsync")
OF_FILE(int, fdatasync, (int file), (file), "fsync")
OF_FILE(int, ftruncate, (int file, off_t size), (file, size), "truncate")
OF_FILE(int, ftruncate64, (int file, off64_t size), (file, size), "truncate")
OF_FILE(ssize_t, copy_file_range, (int from, off64_t* a, int file, off64_t* b, size_t size, unsigned flags),
        (from, a, file, b, size, flags), "copy")
OF_FILE(ssize_t, sendfile, (int file, int from, off_t* at, size_t size), (file, from, at, size), "copy")
OF_FILE(ssize_t, sendfile64, (int file, int from, off64_t* at, size_t size), (file, from, at, size), "copy")

// These return the number instead of setting errno.
#define ALLOCATING(name, size_type)                                                      \
  int name(int file, size_type at, size_type size) {                                     \
    REAL(name);                                     \
    return fails_of("allocate", file) ? errno : real(file, at, size);                    \
  }
ALLOCATING(posix_fallocate, off_t)
ALLOCATING(posix_fallocate64, off64_t)

#define OF_PATH(name, parameters, arguments, path, what)                                 \
  int name parameters {                                                                  \
    REAL(name);                                                     \
    return fails_at(what, path) ? -1 : real arguments;                                   \
  }
OF_PATH(mkdir, (const char* path, mode_t mode), (path, mode), path, "mkdir")
OF_PATH(mkdirat, (int folder, const char* path, mode_t mode), (folder, path, mode), path, "mkdir")
OF_PATH(rename, (const char* from, const char* to), (from, to), to, "rename")
OF_PATH(renameat, (int a, const char* from, int b, const char* to), (a, from, b, to), to, "rename")
OF_PATH(renameat2, (int a, const char* from, int b, const char* to, unsigned f), (a, from, b, to, f), to, "rename")
OF_PATH(link, (const char* from, const char* to), (from, to), to, "link")
OF_PATH(symlink, (const char* from, const char* to), (from, to), to, "link")
OF_PATH(symlinkat, (const char* from, int folder, const char* to), (from, folder, to), to, "link")
