/* A disk that is full, or a process that is killed, at the n-th change that the process makes below a folder.
 *
 * cc -shared -fPIC -o disk.so disk.c -ldl; LD_PRELOAD=disk.so. Armed by disk_arm(), or by DISK_FOLDER, DISK_AT and DISK_MODE in the
 * environment, each process with its own count. A write that meets the end writes its first half, as a real disk does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, FULL = 1, KILL = 2 };

static char folder[4096];
static long at = 0, changes = 0;
static int mode = COUNT, armed = 0;

void disk_arm(const char *path, long number, int what) {
    snprintf(folder, sizeof folder, "%s/", path);
    at = number, mode = what, armed = path[0] != 0;
    __atomic_store_n(&changes, 0, __ATOMIC_SEQ_CST);
}

long disk_changes(void) { return __atomic_load_n(&changes, __ATOMIC_SEQ_CST); }

__attribute__((constructor)) static void from_environment(void) {
    const char *path = getenv("DISK_FOLDER"), *number = getenv("DISK_AT"), *what = getenv("DISK_MODE");
    if (path && number && what) disk_arm(path, atol(number), atoi(what));
}

/* A process that was to be counted says how many changes it made. */
__attribute__((destructor)) static void say(void) {
    if (armed && mode == COUNT && getenv("DISK_FOLDER")) fprintf(stderr, "disk: %ld changes\n", disk_changes());
}

static int below(const char *path) {
    if (!armed || !path || strncmp(path, folder, strlen(folder))) return 0;
    const char *name = strrchr(path, '/') + 1;
    return strcmp(name, "log") && strcmp(name, "said") && strcmp(name, "out"); /* the test's own */
}

static int below_fd(int fd) {
    char link[64], path[4096];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

/* -1: before the moment, 0: at it, 1: after it */
static int moment(void) {
    long now = __atomic_fetch_add(&changes, 1, __ATOMIC_SEQ_CST);
    return mode == COUNT || now < at ? -1 : now == at ? 0 : 1;
}

static int no_space(void) { errno = ENOSPC; return -1; }

/* Of a change that needs no space: it is a moment to be killed at, and no more. */
static void pass(int found) { if (found && moment() >= 0 && mode == KILL) raise(SIGKILL); }

/* Of a new name: 1 where the disk has no place for it. */
static int refused(int found) {
    if (!found || moment() < 0) return 0;
    if (mode == KILL) raise(SIGKILL);
    return 1;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

/* How many of `count` bytes go through; -1 none. */
static ssize_t fits(int fd, size_t count) {
    if (!below_fd(fd)) return (ssize_t)count;
    int when = moment();
    if (when < 0) return (ssize_t)count;
    return when == 0 ? (ssize_t)(count / 2) : -1;
}

static ssize_t put(int fd, const void *data, size_t count) { REAL(ssize_t, "write", int, const void *, size_t); return real(fd, data, count); }

ssize_t write(int fd, const void *data, size_t count) {
    ssize_t most = fits(fd, count);
    if (most == (ssize_t)count) return put(fd, data, count);
    ssize_t done = most > 0 ? put(fd, data, most) : no_space();
    if (mode == KILL) raise(SIGKILL);
    return done;
}

static ssize_t put_at(int fd, const void *data, size_t count, off_t place) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    ssize_t most = fits(fd, count);
    if (most == (ssize_t)count) return real(fd, data, count, place);
    ssize_t done = most > 0 ? real(fd, data, most, place) : no_space();
    if (mode == KILL) raise(SIGKILL);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t place) { return put_at(fd, data, count, place); }
ssize_t pwrite64(int fd, const void *data, size_t count, off_t place) { return put_at(fd, data, count, place); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (!below_fd(fd)) return real(fd, parts, count);
    int when = moment();
    if (when < 0) return real(fd, parts, count);
    ssize_t done = when == 0 && parts[0].iov_len > 1 ? put(fd, parts[0].iov_base, parts[0].iov_len / 2) : no_space();
    if (mode == KILL) raise(SIGKILL);
    return done;
}

static int is_new(const char *path, int flags) { return (flags & O_CREAT) && below(path) && access(path, F_OK); }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); int rights = va_arg(rest, int); va_end(rest); \
        return refused(is_new(path, flags)) ? no_space() : real(path, flags, rights); \
    }
#define OPENAT(name) \
    int name(int base, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); int rights = va_arg(rest, int); va_end(rest); \
        return refused(is_new(path, flags)) ? no_space() : real(base, path, flags, rights); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char *path, mode_t rights) {
    REAL(int, "mkdir", const char *, mode_t);
    return refused(below(path) && access(path, F_OK)) ? no_space() : real(path, rights);
}

int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    return refused(below(to)) ? no_space() : real(from, to);
}

int rename(const char *from, const char *to) { REAL(int, "rename", const char *, const char *); pass(below(to)); return real(from, to); }
int unlink(const char *path) { REAL(int, "unlink", const char *); pass(below(path)); return real(path); }
int ftruncate(int fd, off_t length) { REAL(int, "ftruncate", int, off_t); pass(below_fd(fd)); return real(fd, length); }
int ftruncate64(int fd, off_t length) { REAL(int, "ftruncate64", int, off_t); pass(below_fd(fd)); return real(fd, length); }
int fsync(int fd) { REAL(int, "fsync", int); pass(below_fd(fd)); return real(fd); }
