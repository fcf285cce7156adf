/* Streams and events. Work is deferred: it runs when somebody waits for it, so that a missing wait shows. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

Stream *streams;
long live_streams, live_events;
static pthread_cond_t idle = PTHREAD_COND_INITIALIZER;

void append(Queue *queue, Work work) {
    Work *kept = malloc(sizeof *kept);
    *kept = work;
    kept->next = NULL;
    if (queue->last) queue->last->next = kept;
    else queue->first = kept;
    queue->last = kept;
}

/* Work for a stream, or for the graph that the stream is captured into. */
CUresult enqueue(Stream *stream, Work work) {
    if (stream->graph) {
        NEED(!stream->broken, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        append(&stream->graph->work, work);
        return CUDA_SUCCESS;
    }
    append(&stream->work, work);
    stream->enqueued++;
    return sticky;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static void run(Work *work) {
    char *target = work->kind == COPY || work->kind == FILL ? bytes_at(work->target, work->size) : NULL;
    char *source = work->kind == COPY ? bytes_at(work->source, work->size) : target;
    if ((work->kind == COPY || work->kind == FILL) && (!target || !source)) {
        misuse("work used memory that was freed before it ran");
        sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
        return;
    }
    switch (work->kind) {
    case COPY: memmove(target, source, work->size); break;
    case FILL: memset(target, work->value, work->size); break;
    case RECORD: work->event->milliseconds = now(); break;
    case FREE: release_block(work->target); break;
    case LAUNCH: run_graph(work->exec->graph); break;
    case HOST_FUNCTION: /* without the lock, because the function may wait for a thread that calls the driver */
        in_host_function = true;
        pthread_mutex_unlock(&driver_lock);
        work->function(work->data);
        pthread_mutex_lock(&driver_lock);
        in_host_function = false;
    }
}

void run_graph(Graph *graph) {
    for (Work *work = graph->work.first; work; work = work->next) run(work);
}

static void run_next(Stream *stream) {
    Work *work = stream->work.first;
    stream->work.first = work->next;
    if (!work->next) stream->work.last = NULL;
    stream->running = true;
    stream->runner = pthread_self();
    run(work);
    stream->running = false;
    stream->done++;
    pthread_cond_broadcast(&idle);
    if (work->kind == LAUNCH) drop_exec_user(work->exec);
    free(work);
}

void run_until(Stream *stream, unsigned long position) {
    while (stream->done < position) {
        if (!stream->running) run_next(stream);
        else if (pthread_equal(stream->runner, pthread_self())) return;
        else pthread_cond_wait(&idle, &driver_lock);
    }
}

void run_all(void) {
    for (Stream *stream = streams; stream; stream = stream->next) run_until(stream, stream->enqueued);
}

/* A call that a capture forbids: to the capturing thread, or, in global mode, to every thread. It breaks the capture. */
CUresult unsafe_call(void) {
    for (Stream *stream = streams; stream; stream = stream->next) {
        if (!stream->graph || stream->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
        bool ours = pthread_equal(stream->capturing_thread, pthread_self());
        if (stream->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && !ours) continue;
        stream->broken = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return CUDA_SUCCESS;
}

API(cuStreamCreateWithPriority, CUstream *stream, unsigned flags, int priority) {
    LOCKED;
    NEED_CONTEXT;
    (void)priority;
    Stream *made = calloc(1, sizeof *made);
    *made = (Stream){.tag = STREAM, .flags = flags, .next = streams};
    streams = *stream = made;
    live_streams++;
    return CUDA_SUCCESS;
}

API(cuStreamDestroy, CUstream stream) {
    LOCKED;
    NEED_HANDLE(stream, STREAM);
    run_until(stream, stream->enqueued);
    stream->tag = DESTROYED; /* it stays in the list: events may still refer to it */
    live_streams--;
    return CUDA_SUCCESS;
}

/* The default stream has no work of its own, but waiting for it waits for the others, as cuda-core does before it frees pinned
 * memory. */
API(cuStreamSynchronize, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    if (!stream || stream == CU_STREAM_LEGACY) {
        NEED(!unsafe_call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        run_all();
        return sticky;
    }
    NEED_HANDLE(stream, STREAM);
    if (stream->graph) {
        stream->broken = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    run_until(stream, stream->enqueued);
    return sticky;
}

API(cuLaunchHostFunc, CUstream stream, CUhostFn function, void *data) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(stream, STREAM);
    return enqueue(stream, (Work){.kind = HOST_FUNCTION, .function = function, .data = data});
}

API(cuEventCreate, CUevent *event, unsigned flags) {
    LOCKED;
    NEED_CONTEXT;
    *event = calloc(1, sizeof **event);
    **event = (Event){.tag = EVENT, .flags = flags};
    live_events++;
    return CUDA_SUCCESS;
}

API(cuEventDestroy, CUevent event) {
    LOCKED;
    NEED_HANDLE(event, EVENT);
    event->tag = DESTROYED; /* its few bytes stay: work that is under way may still refer to it */
    live_events--;
    return CUDA_SUCCESS;
}

API(cuEventRecordWithFlags, CUevent event, CUstream stream, unsigned flags) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(event, EVENT);
    NEED_HANDLE(stream, STREAM);
    NEED(!flags && !stream->graph, CUDA_ERROR_NOT_SUPPORTED); /* events of a captured stream are not supported */
    CUresult result = enqueue(stream, (Work){.kind = RECORD, .event = event});
    event->stream = stream;
    event->position = stream->enqueued;
    return result;
}

API(cuEventRecord, CUevent event, CUstream stream) { return cuEventRecordWithFlags(event, stream, 0); }

static bool reached(const Event *event) { return !event->stream || event->stream->done >= event->position; }

/* Something is done at each call, so that a program that asks again and again comes to an end. */
API(cuEventQuery, CUevent event) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(event, EVENT);
    NEED(!unsafe_call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    NEED(!reached(event), sticky);
    if (!event->stream->running) run_next(event->stream);
    return CUDA_ERROR_NOT_READY;
}

API(cuEventSynchronize, CUevent event) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(event, EVENT);
    NEED(!unsafe_call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (event->stream) run_until(event->stream, event->position);
    return sticky;
}

API(cuEventElapsedTime, float *milliseconds, CUevent start, CUevent end) {
    LOCKED;
    NEED_HANDLE(start, EVENT);
    NEED_HANDLE(end, EVENT);
    NEED(!((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) && start->stream && end->stream, CUDA_ERROR_INVALID_HANDLE);
    NEED(reached(start) && reached(end), CUDA_ERROR_NOT_READY);
    *milliseconds = (float)(end->milliseconds - start->milliseconds);
    return CUDA_SUCCESS;
}
