/* Capturing a stream into a graph, and running graphs. */
#include "driver.h"

#include <stdlib.h>

long live_graphs, live_execs;

static Graph *new_graph(void) {
    Graph *graph = calloc(1, sizeof *graph);
    graph->tag = GRAPH;
    live_graphs++;
    return graph;
}

/* Without the lock, because what is destroyed may be a Python object. */
static void drop_user(UserObject *object, long users) {
    object->users -= users;
    if (object->users > 0) return;
    object->tag = DESTROYED;
    pthread_mutex_unlock(&driver_lock);
    object->destroy(object->data);
    pthread_mutex_lock(&driver_lock);
}

static void hold(Graph *graph, UserObject *object, long users) {
    int i = 0;
    while (i < graph->n_held && graph->held[i].object != object) i++;
    if (i == graph->n_held) graph->held[graph->n_held++].object = object;
    graph->held[i].users += users;
}

/* The graph's own bytes stay, so that a handle of it is recognized as destroyed. */
static void drop_graph(Graph *graph) {
    graph->tag = DESTROYED;
    live_graphs--;
    while (graph->work.first) {
        Work *work = graph->work.first;
        graph->work.first = work->next;
        free(work);
    }
    for (int i = 0; i < graph->n_held; i++)
        if (graph->held[i].users > 0) drop_user(graph->held[i].object, graph->held[i].users);
}

void drop_exec_user(Exec *exec) {
    if (--exec->users) return;
    exec->tag = DESTROYED;
    live_execs--;
    drop_graph(exec->graph);
}

API(cuStreamBeginCapture, CUstream stream, CUstreamCaptureMode mode) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(stream, STREAM);
    NEED(!stream->graph, CUDA_ERROR_ILLEGAL_STATE);
    stream->graph = new_graph();
    stream->mode = mode;
    stream->capturing_thread = pthread_self();
    stream->broken = false;
    return CUDA_SUCCESS;
}

API(cuStreamEndCapture, CUstream stream, CUgraph *graph) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(stream, STREAM);
    NEED(stream->graph, CUDA_ERROR_ILLEGAL_STATE);
    NEED(pthread_equal(stream->capturing_thread, pthread_self()), CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    Graph *captured = stream->graph;
    stream->graph = NULL;
    if (graph) *graph = stream->broken ? NULL : captured;
    NEED(stream->broken, CUDA_SUCCESS);
    drop_graph(captured);
    return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}

static CUstreamCaptureStatus capture_status(const Stream *stream) {
    if (!stream->graph) return CU_STREAM_CAPTURE_STATUS_NONE;
    return stream->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

API(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status) {
    LOCKED;
    NEED_HANDLE(stream, STREAM);
    *status = capture_status(stream);
    return CUDA_SUCCESS;
}

API(cuStreamGetCaptureInfo, CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
    const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count) {
    LOCKED;
    NEED_HANDLE(stream, STREAM);
    *status = capture_status(stream);
    if (id) *id = (cuuint64_t)(uintptr_t)stream->graph;
    if (graph) *graph = stream->graph;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return CUDA_SUCCESS;
}

API(cuGraphDestroy, CUgraph graph) {
    LOCKED;
    NEED_HANDLE(graph, GRAPH);
    drop_graph(graph);
    return CUDA_SUCCESS;
}

API(cuGraphInstantiateWithParams, CUgraphExec *exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *params) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(graph, GRAPH);
    Graph *copy = new_graph();
    for (Work *work = graph->work.first; work; work = work->next) append(&copy->work, *work);
    for (int i = 0; i < graph->n_held; i++) {
        if (graph->held[i].users < 1) continue;
        graph->held[i].object->users++;
        hold(copy, graph->held[i].object, 1);
    }
    *exec = calloc(1, sizeof **exec);
    **exec = (Exec){EXEC, copy, 1};
    live_execs++;
    params->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
    params->hErrNode_out = NULL;
    return CUDA_SUCCESS;
}

API(cuGraphLaunch, CUgraphExec exec, CUstream stream) {
    LOCKED;
    NEED_CONTEXT;
    NEED_HANDLE(exec, EXEC);
    NEED_HANDLE(stream, STREAM);
    NEED(!stream->graph, CUDA_ERROR_NOT_SUPPORTED); /* a graph within a graph */
    exec->users++;
    return enqueue(stream, (Work){.kind = LAUNCH, .exec = exec});
}

API(cuGraphExecDestroy, CUgraphExec exec) {
    LOCKED;
    NEED_HANDLE(exec, EXEC);
    drop_exec_user(exec);
    return CUDA_SUCCESS;
}

API(cuUserObjectCreate, CUuserObject *object, void *data, CUhostFn destroy, unsigned users, unsigned flags) {
    LOCKED;
    (void)flags;
    *object = calloc(1, sizeof **object);
    **object = (UserObject){USER_OBJECT, data, destroy, users};
    return CUDA_SUCCESS;
}

API(cuUserObjectRelease, CUuserObject object, unsigned users) {
    LOCKED;
    NEED_HANDLE(object, USER_OBJECT);
    drop_user(object, users);
    return CUDA_SUCCESS;
}

API(cuGraphRetainUserObject, CUgraph graph, CUuserObject object, unsigned users, unsigned flags) {
    LOCKED;
    NEED_HANDLE(graph, GRAPH);
    NEED_HANDLE(object, USER_OBJECT);
    NEED(graph->n_held < (int)(sizeof graph->held / sizeof *graph->held), CUDA_ERROR_NOT_SUPPORTED);
    if (!(flags & CU_GRAPH_USER_OBJECT_MOVE)) object->users += users;
    hold(graph, object, users);
    return CUDA_SUCCESS;
}

API(cuGraphReleaseUserObject, CUgraph graph, CUuserObject object, unsigned users) {
    LOCKED;
    NEED_HANDLE(graph, GRAPH);
    NEED_HANDLE(object, USER_OBJECT);
    hold(graph, object, -(long)users);
    drop_user(object, users);
    return CUDA_SUCCESS;
}
