// Streams and events, on which nothing is ever waited for, and the capture of graphs: refused, or recorded with STUB_CUDA_CAPTURE=record.
#include "stub.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct Event { struct timespec at; bool recorded, timed; } Event;
// What a capture recorded: the lines of its launches. It serves as CUgraph and as CUgraphExec.
typedef struct Graph { char** lines; size_t count; unsigned long long id; } Graph;

static Stream legacy = {.id = 0};
// Streams stay where they are once made, as PyTorch's do: a handle is known by its address.
static Stream* streams = &legacy;
static unsigned long long graphs;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

Stream* stream_of(CUstream stream) {
    if (!stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD) return &legacy;
    Stream* found = streams;
    while (found && found != (Stream*)stream) found = found->next;
    return found;
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
    Stream* stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&lock);
    *stream = (Stream){.id = streams->id + 1, .flags = flags, .priority = priority, .next = streams};
    streams = stream;
    pthread_mutex_unlock(&lock);
    return *out = (CUstream)stream, CUDA_SUCCESS;
}
EXPORT CUresult cuStreamCreate(CUstream* out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
EXPORT CUresult cuStreamDestroy(CUstream stream) { return stream_of(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
EXPORT CUresult cuStreamQuery(CUstream stream) { return stream_of(stream)->capture ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS; }
EXPORT CUresult cuStreamSynchronize(CUstream stream) { return cuStreamQuery(stream); }
EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) { return (void)stream, (void)event, (void)flags, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetPriority(CUstream stream, int* priority) { return *priority = stream_of(stream)->priority, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetFlags(CUstream stream, unsigned* flags) { return *flags = stream_of(stream)->flags, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetId(CUstream stream, unsigned long long* id) { return *id = stream_of(stream)->id, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) { return (void)stream, cuCtxGetCurrent(context); }
EXPORT CUresult cuStreamGetDevice(CUstream stream, CUdevice* device) { return (void)stream, cuCtxGetDevice(device); }
EXPORT CUresult cuStreamCopyAttributes(CUstream to, CUstream from) { return (void)to, (void)from, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetAttribute(CUstream stream, CUstreamAttrID attribute, CUstreamAttrValue* value) {
    return (void)stream, (void)attribute, memset(value, 0, sizeof *value), CUDA_SUCCESS;
}
EXPORT CUresult cuStreamSetAttribute(CUstream stream, CUstreamAttrID attribute, const CUstreamAttrValue* value) {
    return (void)stream, (void)attribute, (void)value, CUDA_SUCCESS;
}
EXPORT CUresult cuStreamAddCallback(CUstream stream, CUstreamCallback call, void* data, unsigned flags) {
    return (void)flags, call(stream, CUDA_SUCCESS, data), CUDA_SUCCESS;
}

EXPORT CUresult cuEventCreate(CUevent* out, unsigned flags) {
    Event* event = calloc(1, sizeof *event);
    event->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    return *out = (CUevent)event, CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    (void)stream;
    ((Event*)event)->recorded = true;
    return clock_gettime(CLOCK_MONOTONIC, &((Event*)event)->at), CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) { return (void)flags, cuEventRecord(event, stream); }
EXPORT CUresult cuEventQuery(CUevent event) { return (void)event, CUDA_SUCCESS; }
EXPORT CUresult cuEventSynchronize(CUevent event) { return (void)event, CUDA_SUCCESS; }
EXPORT CUresult cuEventDestroy(CUevent event) { return free(event), CUDA_SUCCESS; }
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    const Event *begin = (const Event*)from, *end = (const Event*)to;
    if (!begin->recorded || !end->recorded || !begin->timed || !end->timed) return CUDA_ERROR_INVALID_HANDLE;
    double passed = (double)(end->at.tv_sec - begin->at.tv_sec) * 1e3 + (double)(end->at.tv_nsec - begin->at.tv_nsec) * 1e-6;
    return *milliseconds = (float)passed, CUDA_SUCCESS;
}

bool graph_takes(Stream* stream, const char* line) {
    Graph* graph = stream->capture;
    if (!graph) return false;
    graph->lines = realloc(graph->lines, (graph->count + 1) * sizeof *graph->lines);
    graph->lines[graph->count++] = strdup(line);
    return true;
}

EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) { return (void)mode, CUDA_SUCCESS; }
EXPORT CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    (void)mode;
    const char* wanted = getenv("STUB_CUDA_CAPTURE");
    if (!wanted || strcmp(wanted, "record")) return refuse(CUDA_ERROR_NOT_SUPPORTED, "capture of a graph");
    Stream* here = stream_of(stream);
    if (here == &legacy || here->capture) return CUDA_ERROR_ILLEGAL_STATE;
    here->capture = calloc(1, sizeof *here->capture);
    here->capture->id = __sync_add_and_fetch(&graphs, 1);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    Stream* here = stream_of(stream);
    *graph = (CUgraph)here->capture;
    here->capture = NULL;
    return *graph ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_STATE;
}
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    *status = stream_of(stream)->capture ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCaptureInfo(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph, const CUgraphNode** nodes,
                                       const CUgraphEdgeData** edges, size_t* count) {
    Graph* here = stream_of(stream)->capture;
    cuStreamIsCapturing(stream, status);
    if (here && id) *id = here->id;
    if (here && graph) *graph = (CUgraph)here;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long flags) {
    return (void)flags, *out = (CUgraphExec)graph, CUDA_SUCCESS;
}
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    return (void)nodes, *count = ((Graph*)graph)->count, CUDA_SUCCESS;
}
EXPORT CUresult cuGraphUpload(CUgraphExec graph, CUstream stream) { return (void)graph, (void)stream, CUDA_SUCCESS; }
EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    (void)stream;
    for (size_t i = 0; i < ((Graph*)exec)->count; i++) log_line(((Graph*)exec)->lines[i]);
    return CUDA_SUCCESS;
}
// Graph and executable are one object, which stays: captures of a test are few.
EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) { return (void)exec, CUDA_SUCCESS; }
EXPORT CUresult cuGraphDestroy(CUgraph graph) { return (void)graph, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGraphMemTrim(CUdevice device) { return (void)device, CUDA_SUCCESS; }
EXPORT CUresult cuProfilerStart(void) { return CUDA_SUCCESS; }
EXPORT CUresult cuProfilerStop(void) { return CUDA_SUCCESS; }
