/* What the parts of the stand-in share. Everything here is guarded by one lock, which each function of the API holds. */
#ifndef DRIVER_H
#define DRIVER_H

#include <cuda.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Handles begin with a tag, so that a handle of another kind, or of an object that was destroyed, is recognized. */
enum { CONTEXT = 0x43545854, STREAM, EVENT, GRAPH, EXEC, POOL, USER_OBJECT, DESTROYED };

typedef struct CUctx_st { unsigned tag; } Context;

/* The default memory pool. Freed memory stays reserved until the pool is trimmed. */
typedef struct CUmemPoolHandle_st {
    unsigned tag;
    cuuint64_t threshold, reserved, used;
} Pool;

/* A Python object that a graph keeps alive. */
typedef struct CUuserObject_st {
    unsigned tag;
    void *data;
    CUhostFn destroy;
    long users;
} UserObject;

typedef enum { COPY, FILL, HOST_FUNCTION, RECORD, FREE, LAUNCH } Kind;

/* One piece of work of a stream or a graph. */
typedef struct Work {
    Kind kind;
    CUdeviceptr target, source;
    size_t size;
    unsigned char value;
    CUhostFn function;
    void *data;
    struct CUevent_st *event;
    struct CUgraphExec_st *exec;
    struct Work *next;
} Work;

typedef struct { Work *first, *last; } Queue;

/* A captured stream leaves one list of work, in order: streams that wait for each other are not supported. */
typedef struct CUgraph_st {
    unsigned tag;
    Queue work;
    struct { UserObject *object; long users; } held[8];
    int n_held;
} Graph;

typedef struct CUgraphExec_st {
    unsigned tag;
    Graph *graph;
    long users; /* its handle, and each launch that has not run yet */
} Exec;

typedef struct CUstream_st {
    unsigned tag, flags;
    Queue work;
    unsigned long enqueued, done; /* pieces of work so far */
    bool running;                 /* a thread is doing this stream's work at the moment */
    pthread_t runner;
    Graph *graph;                 /* not NULL while the stream is captured */
    CUstreamCaptureMode mode;
    pthread_t capturing_thread;
    bool broken; /* the capture has failed and can only be ended */
    struct CUstream_st *next;
} Stream;

typedef struct CUevent_st {
    unsigned tag, flags;
    Stream *stream; /* NULL until it is recorded */
    unsigned long position;
    double milliseconds;
} Event;

extern pthread_mutex_t driver_lock;
extern bool initialized;
extern CUresult sticky;              /* an error of work that ran: every later call returns it */
extern __thread Context *current;    /* of the calling thread */
extern __thread bool in_host_function;
extern Context primary;
extern Stream *streams;
extern long live_graphs, live_execs, live_streams, live_events;

/* Every function of the API: `API(name, parameters) { ...; return result; }`. The lock is released when the function returns. */
void unlock_driver(int *unused);
#define API(name, ...) \
    __attribute__((visibility("default"))) CUresult CUDAAPI name(__VA_ARGS__)
#define LOCKED \
    pthread_mutex_lock(&driver_lock); \
    int locked __attribute__((cleanup(unlock_driver), unused)) = 0
#define NEED(condition, error) \
    do { if (!(condition)) return error; } while (0)
#define NEED_CONTEXT \
    do { CUresult state = context_state(__func__); if (state) return state; } while (0)
/* Small numbers are CUDA's names of default streams, which the stand-in does not have. */
#define NEED_HANDLE(handle, kind) NEED((uintptr_t)(handle) > 2 && (handle)->tag == (kind), CUDA_ERROR_INVALID_HANDLE)

/* report.c: what a program must not do, although the driver would let it. */
void misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* device.c */
CUresult context_state(const char *function);

/* memory.c */
void memory_begin(void);
size_t memory_used(void), memory_reserved(void), pinned_used(void);
char *bytes_at(CUdeviceptr address, size_t size);
void release_block(CUdeviceptr address);

/* stream.c */
CUresult enqueue(Stream *stream, Work work);
void append(Queue *queue, Work work);
void run_until(Stream *stream, unsigned long position);
void run_all(void);
CUresult unsafe_call(void);

/* graph.c */
void run_graph(Graph *graph);
void drop_exec_user(Exec *exec);

#endif
