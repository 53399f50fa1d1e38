/* The smallest executor: does what extra_args ask for, and ends.
 *
 * first      reports when it got to its first instruction
 * last       waits for 5 ms, and reports when it is about to end
 * hold       stays until it is killed
 * write=N    writes N MiB to stdout
 * log=N      writes N records to its log
 *
 * It reports nanoseconds of CLOCK_MONOTONIC to the FIFO that BENCH_FIFO names.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static long long now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void report(long long at) {
    int fd = open(getenv("BENCH_FIFO"), O_WRONLY);
    if (fd < 0 || write(fd, &at, sizeof at) < 0) _exit(1);
}

static void write_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t written = write(fd, data, size);
        if (written <= 0) _exit(1);
        data += written;
        size -= written;
    }
}

int main(int argc, char **argv) {
    static char block[128 << 10], line[] =
        "{\"level\":\"info\",\"message\":\"storage read\",\"target\":\"genvm::host\","
        "\"slot\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAE=\",\"bytes\":32}\n";
    long long at = now();
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "first") == 0) report(at);
        if (strcmp(argv[i], "last") == 0) {
            struct timespec pause = {0, 5000000};
            nanosleep(&pause, NULL);
            report(now());
        }
        while (strcmp(argv[i], "hold") == 0) pause();
        if (strncmp(argv[i], "write=", 6) == 0) {
            memset(block, 'x', sizeof block);
            for (long n = 8 * atol(argv[i] + 6); n > 0; n--) write_all(1, block, sizeof block);
        }
        if (strncmp(argv[i], "log=", 4) == 0) {
            for (long n = atol(argv[i] + 4); n > 0; n--) write_all(3, line, sizeof line - 1);
        }
    }
    return 0;
}
