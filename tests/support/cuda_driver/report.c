/* What tests ask the stand-in. */
#include "driver.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static char misuses[4096];

void misuse(const char *format, ...) {
    size_t length = strlen(misuses);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(misuses + length, sizeof misuses - length, format, arguments);
    va_end(arguments);
    strncat(misuses, "\n", sizeof misuses - strlen(misuses) - 1);
}

#define EXPORTED __attribute__((visibility("default")))

/* Where the host finds the bytes of device memory, for host functions in the place of kernels. NULL outside of live allocations. */
EXPORTED void *stand_in_bytes(CUdeviceptr address, size_t size) {
    LOCKED;
    return bytes_at(address, size);
}

/* The lines of misuse so far, in memory that the next call does not change. */
EXPORTED void stand_in_misuses(char *text, size_t size) {
    LOCKED;
    snprintf(text, size, "%s", misuses);
}

/* What is alive: bytes of device memory used and reserved, bytes of pinned memory, graphs, executable graphs, streams, events. */
EXPORTED void stand_in_alive(long long counts[7]) {
    LOCKED;
    run_all();
    counts[0] = (long long)memory_used();
    counts[1] = (long long)memory_reserved();
    counts[2] = (long long)pinned_used();
    counts[3] = live_graphs;
    counts[4] = live_execs;
    counts[5] = live_streams;
    counts[6] = live_events;
}
