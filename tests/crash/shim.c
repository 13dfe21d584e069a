/* Counts the file system calls that touch one folder and lets one of them fail.
 *
 * Preloaded into a python process (LD_PRELOAD), steered through the control block that
 * `shim_control` returns: it is shared with forked children, so a parent arms it, forks, and reads
 * afterwards what happened. Calls are numbered from 1. The first call from number `at` on that the
 * fault makes sense for gets it, and where `sticky` is set all later ones do as well. (Not simply
 * number `at`: threads may do their calls in another order than last time.)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/stat.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* What a call does, and so which faults make sense for it. */
enum {
    CHANGES = 1,   /* the tree is different afterwards */
    ALLOCATES = 2, /* may need blocks, inodes or quota */
    INTERRUPTS = 4, /* may be interrupted by a signal, and is retried then */
    MOVES = 8,     /* moves a number of bytes, perhaps fewer than asked for */
};

enum { NONE, KILL, TORN, SHORT, ERROR, LATE }; /* ERROR: instead of the call; LATE: after it */

enum { NO_EXCHANGE = 1, NO_RENAMEAT2 = 2, SKIP_SYNC = 4 };

struct control {
    char root[1024];
    long at;
    long count;
    int fault;
    int code;   /* errno of ERROR and LATE */
    int needs;  /* bits of the above that a call must have for the fault */
    int sticky;
    int flags;
    int fired;  /* how many calls could have had the fault */
    char fired_name[32];
    char fired_path[1024];
    long log_length;
    char log[1 << 20]; /* name, bits, path: a line each; only written while `at` is 0 */
};

static struct control *control;

struct control *shim_control(void) { return control; }

__attribute__((constructor)) static void begin(void) {
    void *block = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                       -1, 0);
    if (block == MAP_FAILED) abort();
    control = block;
}

/* The function of the same name that would have been called without us. */
#define REAL(name)                                                    \
    static __typeof__(&name) real;                                    \
    if (!real && !(real = (__typeof__(&name))dlsym(RTLD_NEXT, #name))) abort()

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* The absolute path that a call means; not normalised, links are not followed. */
static int name_path(char *out, size_t size, int fd, const char *path) {
    char link[64];
    ssize_t length = 0;
    if (path == NULL || path[0] != '/') {
        int saved = errno;
        snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
        length = syscall(SYS_readlinkat, AT_FDCWD, link, out, size - 1);
        errno = saved;
        if (length < 0) return 0;
    }
    out[length] = 0;
    if (path != NULL && path[0] != 0)
        snprintf(out + length, size - length, "%s%s", length ? "/" : "", path);
    return 1;
}

static int below_root(const char *path) {
    size_t length = strlen(control->root);
    return length && strncmp(path, control->root, length) == 0 &&
           (path[length] == '/' || path[length] == 0);
}

/* What became of a call: `error` is for before it, the others for after it. */
struct verdict {
    int error, late, dies;
};

static struct verdict gate(const char *name, int bits, int fd, const char *path, size_t *count) {
    struct verdict verdict = {0, 0, 0};
    char full[1024];
    if (!control || !control->root[0] || !name_path(full, sizeof full, fd, path) ||
        !below_root(full))
        return verdict;
    long number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (control->at == 0) {
        char line[sizeof full + 64];
        long length = snprintf(line, sizeof line, "%s\t%d\t%s\n", name, bits, full);
        long start = __atomic_fetch_add(&control->log_length, length, __ATOMIC_SEQ_CST);
        if (start + length > (long)sizeof control->log) abort(); /* a list with holes is worse */
        memcpy(control->log + start, line, length);
        return verdict;
    }
    if (control->fault == NONE || number < control->at) return verdict;
    if ((bits & control->needs) != control->needs) return verdict;
    if (__atomic_fetch_add(&control->fired, 1, __ATOMIC_SEQ_CST) && !control->sticky)
        return verdict;
    if (control->fault == SHORT || control->fault == TORN) *count /= 2;
    if (!control->fired_name[0]) {
        snprintf(control->fired_name, sizeof control->fired_name, "%s", name);
        snprintf(control->fired_path, sizeof control->fired_path, "%s", full);
    }
    switch (control->fault) {
    case KILL: die(); break;
    case TORN: verdict.dies = 1; break;
    case ERROR: verdict.error = control->code; break;
    case LATE: verdict.late = control->code; break;
    }
    return verdict;
}

#define BEFORE(name, bits, fd, path, count)                           \
    struct verdict verdict = gate(name, bits, fd, path, count);       \
    if (verdict.error) {                                              \
        errno = verdict.error;                                        \
        return -1;                                                    \
    }
#define AFTER(expression)                                             \
    __extension__({                                                   \
        __auto_type result = (expression);                            \
        if (verdict.dies) die();                                      \
        if (verdict.late && result >= 0) {                            \
            errno = verdict.late;                                     \
            result = -1;                                              \
        }                                                             \
        result;                                                       \
    })

/* Opening */

#define OPEN_BITS(flags) \
    (INTERRUPTS | (flags & (O_CREAT | O_TRUNC) ? CHANGES : 0) | (flags & O_CREAT ? ALLOCATES : 0))
#define MODE_ARGUMENT                                                 \
    mode_t mode = 0;                                                  \
    if (flags & (O_CREAT | __O_TMPFILE)) {                            \
        va_list list;                                                 \
        va_start(list, flags);                                        \
        mode = va_arg(list, mode_t);                                  \
        va_end(list);                                                 \
    }

#define OPEN(name)                                                    \
    int name(const char *path, int flags, ...) {                      \
        MODE_ARGUMENT                                                 \
        REAL(name);                                                   \
        BEFORE("open", OPEN_BITS(flags), AT_FDCWD, path, NULL)        \
        return AFTER(real(path, flags, mode));                        \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                  \
    int name(int fd, const char *path, int flags, ...) {              \
        MODE_ARGUMENT                                                 \
        REAL(name);                                                   \
        BEFORE("open", OPEN_BITS(flags), fd, path, NULL)              \
        return AFTER(real(fd, path, flags, mode));                    \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(close);
    struct verdict verdict = gate("close", ALLOCATES, fd, NULL, NULL);
    int result = real(fd); /* an error does not keep it open */
    if (verdict.error) {
        errno = verdict.error;
        return -1;
    }
    return result;
}

/* Names */

#define SIMPLE(name, label, bits, parameters, arguments, fd, path)    \
    int name parameters {                                             \
        REAL(name);                                                   \
        BEFORE(label, bits, fd, path, NULL)                           \
        return AFTER(real arguments);                                 \
    }
#define NAMES (CHANGES | ALLOCATES)
SIMPLE(mkdir, "mkdir", NAMES, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
SIMPLE(mkdirat, "mkdir", NAMES, (int d, const char *p, mode_t m), (d, p, m), d, p)
SIMPLE(unlink, "unlink", CHANGES, (const char *p), (p), AT_FDCWD, p)
SIMPLE(unlinkat, f & AT_REMOVEDIR ? "rmdir" : "unlink", CHANGES,
       (int d, const char *p, int f), (d, p, f), d, p)
SIMPLE(rmdir, "rmdir", CHANGES, (const char *p), (p), AT_FDCWD, p)
SIMPLE(rename, "rename", NAMES, (const char *a, const char *b), (a, b), AT_FDCWD, b)
SIMPLE(renameat, "rename", NAMES, (int d, const char *a, int e, const char *b), (d, a, e, b), e, b)
SIMPLE(link, "link", NAMES, (const char *a, const char *b), (a, b), AT_FDCWD, b)
SIMPLE(linkat, "link", NAMES, (int d, const char *a, int e, const char *b, int f),
       (d, a, e, b, f), e, b)
SIMPLE(symlink, "symlink", NAMES, (const char *a, const char *b), (a, b), AT_FDCWD, b)
SIMPLE(symlinkat, "symlink", NAMES, (const char *a, int e, const char *b), (a, e, b), e, b)
SIMPLE(chmod, "chmod", CHANGES, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
SIMPLE(fchmod, "chmod", CHANGES, (int fd, mode_t m), (fd, m), fd, NULL)
SIMPLE(fchmodat, "chmod", CHANGES, (int d, const char *p, mode_t m, int f), (d, p, m, f), d, p)
SIMPLE(utimensat, "utime", CHANGES, (int d, const char *p, const struct timespec t[2], int f),
       (d, p, t, f), d, p)
SIMPLE(futimens, "utime", CHANGES, (int fd, const struct timespec t[2]), (fd, t), fd, NULL)

static int refused(unsigned flags) {
    if (control->flags & NO_RENAMEAT2) return ENOSYS;
    if ((control->flags & NO_EXCHANGE) && (flags & RENAME_EXCHANGE)) return EINVAL;
    return 0;
}

int renameat2(int d, const char *a, int e, const char *b, unsigned flags) {
    REAL(renameat2);
    BEFORE(flags & RENAME_EXCHANGE ? "exchange" : "rename", NAMES, e, b, NULL)
    if ((errno = refused(flags))) return -1;
    return AFTER(real(d, a, e, b, flags));
}

long syscall(long number, ...) {
    REAL(syscall);
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_renameat2)
        return renameat2((int)a[0], (const char *)a[1], (int)a[2], (const char *)a[3],
                         (unsigned)a[4]);
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* Bytes */

#define BYTES(name, label, bits, parameters, arguments, fd)           \
    ssize_t name parameters {                                         \
        REAL(name);                                                   \
        BEFORE(label, (bits) | INTERRUPTS | (n > 1 ? MOVES : 0), fd, NULL, &n) \
        return AFTER(real arguments);                                 \
    }
BYTES(read, "read", 0, (int fd, void *b, size_t n), (fd, b, n), fd)
BYTES(pread, "read", 0, (int fd, void *b, size_t n, off_t o), (fd, b, n, o), fd)
BYTES(pread64, "read", 0, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o), fd)
BYTES(write, "write", NAMES, (int fd, const void *b, size_t n), (fd, b, n), fd)
BYTES(pwrite, "write", NAMES, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), fd)
BYTES(pwrite64, "write", NAMES, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), fd)
BYTES(copy_file_range, "copy_file_range", NAMES,
      (int s, off64_t *i, int fd, off64_t *o, size_t n, unsigned f), (s, i, fd, o, n, f), fd)
BYTES(sendfile, "sendfile", NAMES, (int fd, int s, off_t *o, size_t n), (fd, s, o, n), fd)
BYTES(sendfile64, "sendfile", NAMES, (int fd, int s, off64_t *o, size_t n), (fd, s, o, n), fd)

SIMPLE(ftruncate, "ftruncate", NAMES | INTERRUPTS, (int fd, off_t n), (fd, n), fd, NULL)
SIMPLE(ftruncate64, "ftruncate", NAMES | INTERRUPTS, (int fd, off64_t n), (fd, n), fd, NULL)
SIMPLE(fallocate64, "fallocate", NAMES | INTERRUPTS, (int fd, int m, off64_t o, off64_t n),
       (fd, m, o, n), fd, NULL)
SIMPLE(flock, "flock", INTERRUPTS, (int fd, int operation), (fd, operation), fd, NULL)

/* The processes here are killed, not the machine: what is written is there without waiting. */
#define SYNC(name)                                                    \
    int name(int fd) {                                                \
        REAL(name);                                                   \
        BEFORE(#name, ALLOCATES | INTERRUPTS, fd, NULL, NULL)         \
        return AFTER(control->flags & SKIP_SYNC ? fcntl(fd, F_GETFD) < 0 ? -1 : 0 : real(fd)); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define SEEK(name, type)                                              \
    type name(int fd, type offset, int whence) {                      \
        REAL(name);                                                   \
        BEFORE("lseek", 0, fd, NULL, NULL)                            \
        return AFTER(real(fd, offset, whence));                       \
    }
SEEK(lseek, off_t)
SEEK(lseek64, off64_t)

int ioctl(int fd, unsigned long request, ...) {
    REAL(ioctl);
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (request != FICLONERANGE && request != FICLONE) return real(fd, request, argument);
    BEFORE("ficlonerange", NAMES, fd, NULL, NULL)
    return AFTER(real(fd, request, argument));
}

/* Looking */

SIMPLE(stat, "stat", 0, (const char *p, struct stat *s), (p, s), AT_FDCWD, p)
SIMPLE(stat64, "stat", 0, (const char *p, struct stat64 *s), (p, s), AT_FDCWD, p)
SIMPLE(lstat, "stat", 0, (const char *p, struct stat *s), (p, s), AT_FDCWD, p)
SIMPLE(lstat64, "stat", 0, (const char *p, struct stat64 *s), (p, s), AT_FDCWD, p)
SIMPLE(fstat, "stat", 0, (int fd, struct stat *s), (fd, s), fd, NULL)
SIMPLE(fstat64, "stat", 0, (int fd, struct stat64 *s), (fd, s), fd, NULL)
SIMPLE(fstatat, "stat", 0, (int d, const char *p, struct stat *s, int f), (d, p, s, f), d, p)
SIMPLE(fstatat64, "stat", 0, (int d, const char *p, struct stat64 *s, int f), (d, p, s, f), d, p)
SIMPLE(statx, "stat", 0, (int d, const char *p, int f, unsigned m, struct statx *s),
       (d, p, f, m, s), d, p)
SIMPLE(access, "access", 0, (const char *p, int m), (p, m), AT_FDCWD, p)
SIMPLE(statvfs, "statvfs", 0, (const char *p, struct statvfs *s), (p, s), AT_FDCWD, p)
SIMPLE(statvfs64, "statvfs", 0, (const char *p, struct statvfs64 *s), (p, s), AT_FDCWD, p)
SIMPLE(fstatvfs, "statvfs", 0, (int fd, struct statvfs *s), (fd, s), fd, NULL)
SIMPLE(fstatvfs64, "statvfs", 0, (int fd, struct statvfs64 *s), (fd, s), fd, NULL)

ssize_t readlink(const char *path, char *buffer, size_t size) {
    REAL(readlink);
    BEFORE("readlink", 0, AT_FDCWD, path, NULL)
    return AFTER(real(path, buffer, size));
}

ssize_t readlinkat(int fd, const char *path, char *buffer, size_t size) {
    REAL(readlinkat);
    BEFORE("readlink", 0, fd, path, NULL)
    return AFTER(real(fd, path, buffer, size));
}

DIR *opendir(const char *path) {
    REAL(opendir);
    struct verdict verdict = gate("opendir", 0, AT_FDCWD, path, NULL);
    if (verdict.error) return errno = verdict.error, NULL;
    return real(path);
}

DIR *fdopendir(int fd) {
    REAL(fdopendir);
    struct verdict verdict = gate("opendir", 0, fd, NULL, NULL);
    if (verdict.error) return errno = verdict.error, NULL;
    return real(fd);
}

#define READDIR(name, type)                                           \
    struct type *name(DIR *stream) {                                  \
        REAL(name);                                                   \
        struct verdict verdict = gate("readdir", 0, dirfd(stream), NULL, NULL); \
        if (verdict.error) return errno = verdict.error, NULL;        \
        return real(stream);                                          \
    }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)
