// The part of CUDA's runtime that PyTorch and compiled kernels call, over the stub's driver. NVIDIA's own starts on a genuine driver alone.
#include "stub.h"

#include <cudaProfiler.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread int device;
static __thread cudaError_t last;

// The numbers of the runtime's errors are the driver's.
static cudaError_t kept(CUresult result) {
    if (result) last = (cudaError_t)result;
    return (cudaError_t)result;
}
int after(CUresult result) { return (int)kept(result); }

CUresult ready(void) {
    CUcontext context;
    CUresult result = cuInit(0);
    cuCtxGetCurrent(&context);
    if (result || context) return result;
    result = cuDevicePrimaryCtxRetain(&context, device);
    return result ? result : cuCtxSetCurrent(context);
}

// Define a function of the runtime by a call of the driver, with a context.
#define RUNTIME(name, parameters, ...) \
    EXPORT cudaError_t name parameters { \
        CUresult result = ready(); \
        return kept(result ? result : (CUresult)(__VA_ARGS__)); \
    }
#define ADDRESS(pointer) ((CUdeviceptr)(pointer))

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    return last = cudaSuccess, error;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return last; }
EXPORT const char* cudaGetErrorName(cudaError_t error) {
    const char* text;
    return cuGetErrorName((CUresult)error, &text), text;
}
EXPORT const char* cudaGetErrorString(cudaError_t error) {
    const char* text;
    return cuGetErrorString((CUresult)error, &text), text;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return kept(cuDriverGetVersion(version)); }
EXPORT cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return kept(*count ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE);
}
EXPORT cudaError_t cudaGetDevice(int* out) { return *out = device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int wanted) {
    CUcontext context;
    CUresult result = cuDevicePrimaryCtxRetain(&context, wanted);
    if (!result) device = wanted, cuCtxSetCurrent(context);
    return kept(result);
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** call, unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult* found) {
    return kept(cuGetProcAddress(name, call, (int)version, flags, (CUdriverProcAddressQueryResult*)found));
}

static CUresult properties(struct cudaDeviceProp* p, int which) {
#define FILL(field, attribute) p->field = device_attribute(CU_DEVICE_ATTRIBUTE_##attribute)
    memset(p, 0, sizeof *p);
    cuDeviceGetName(p->name, sizeof p->name, which);
    cuDeviceGetUuid((CUuuid*)&p->uuid, which);
    cuDeviceTotalMem(&p->totalGlobalMem, which);
    FILL(major, COMPUTE_CAPABILITY_MAJOR), FILL(multiProcessorCount, MULTIPROCESSOR_COUNT), FILL(warpSize, WARP_SIZE);
    FILL(sharedMemPerBlock, MAX_SHARED_MEMORY_PER_BLOCK), FILL(sharedMemPerBlockOptin, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    FILL(sharedMemPerMultiprocessor, MAX_SHARED_MEMORY_PER_MULTIPROCESSOR), FILL(reservedSharedMemPerBlock, RESERVED_SHARED_MEMORY_PER_BLOCK);
    FILL(regsPerBlock, MAX_REGISTERS_PER_BLOCK), FILL(regsPerMultiprocessor, MAX_REGISTERS_PER_MULTIPROCESSOR);
    FILL(maxThreadsPerBlock, MAX_THREADS_PER_BLOCK), FILL(maxThreadsPerMultiProcessor, MAX_THREADS_PER_MULTIPROCESSOR);
    FILL(maxBlocksPerMultiProcessor, MAX_BLOCKS_PER_MULTIPROCESSOR), FILL(l2CacheSize, L2_CACHE_SIZE), FILL(memPitch, MAX_PITCH);
    FILL(maxThreadsDim[0], MAX_BLOCK_DIM_X), FILL(maxThreadsDim[1], MAX_BLOCK_DIM_Y), FILL(maxThreadsDim[2], MAX_BLOCK_DIM_Z);
    FILL(maxGridSize[0], MAX_GRID_DIM_X), FILL(maxGridSize[1], MAX_GRID_DIM_Y), FILL(maxGridSize[2], MAX_GRID_DIM_Z);
    FILL(memoryBusWidth, GLOBAL_MEMORY_BUS_WIDTH), FILL(totalConstMem, TOTAL_CONSTANT_MEMORY), FILL(unifiedAddressing, UNIFIED_ADDRESSING);
    FILL(concurrentKernels, CONCURRENT_KERNELS), FILL(cooperativeLaunch, COOPERATIVE_LAUNCH), FILL(ECCEnabled, ECC_ENABLED);
    FILL(memoryPoolsSupported, MEMORY_POOLS_SUPPORTED), FILL(canMapHostMemory, CAN_MAP_HOST_MEMORY), FILL(asyncEngineCount, ASYNC_ENGINE_COUNT);
    FILL(pciBusID, PCI_BUS_ID), FILL(textureAlignment, TEXTURE_ALIGNMENT), FILL(clusterLaunch, CLUSTER_LAUNCH);
    return which < device_count() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int which) { return kept(properties(p, which)); }
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int which) {
    return kept(cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, which));
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int which) { return kept(cuDeviceGetPCIBusId(name, size, which)); }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int one, int other) { return kept(cuDeviceCanAccessPeer(can, one, other)); }
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return (void)peer, (void)flags, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int which) { return kept(cuDeviceGetDefaultMemPool((CUmemoryPool*)pool, which)); }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return kept(cuCtxGetStreamPriorityRange(least, greatest)); }
EXPORT cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
RUNTIME(cudaDeviceSynchronize, (void), cuCtxSynchronize())

// Nothing is allocated for no bytes, which the driver's function refuses.
RUNTIME(cudaMalloc, (void** p, size_t bytes), bytes ? cuMemAlloc((CUdeviceptr*)p, bytes) : (*p = NULL, CUDA_SUCCESS))
RUNTIME(cudaMallocAsync, (void** p, size_t bytes, cudaStream_t s), cuMemAllocAsync((CUdeviceptr*)p, bytes, s))
RUNTIME(cudaHostAlloc, (void** p, size_t bytes, unsigned flags), cuMemHostAlloc(p, bytes, flags))
RUNTIME(cudaHostRegister, (void* p, size_t bytes, unsigned flags), cuMemHostRegister(p, bytes, flags))
RUNTIME(cudaHostUnregister, (void* p), cuMemHostUnregister(p))
RUNTIME(cudaFree, (void* p), cuMemFree(ADDRESS(p)))
RUNTIME(cudaFreeAsync, (void* p, cudaStream_t s), cuMemFreeAsync(ADDRESS(p), s))
RUNTIME(cudaFreeHost, (void* p), cuMemFreeHost(p))
RUNTIME(cudaMemGetInfo, (size_t* left, size_t* total), cuMemGetInfo(left, total))
RUNTIME(cudaMemPoolGetAttribute, (cudaMemPool_t pool, enum cudaMemPoolAttr a, void* v), cuMemPoolGetAttribute(pool, (CUmemPool_attribute)a, v))
RUNTIME(cudaMemPoolSetAttribute, (cudaMemPool_t pool, enum cudaMemPoolAttr a, void* v), cuMemPoolSetAttribute(pool, (CUmemPool_attribute)a, v))
RUNTIME(cudaMemPoolSetAccess, (cudaMemPool_t pool, const struct cudaMemAccessDesc* d, size_t count), (void)d, cuMemPoolSetAccess(pool, NULL, count))
RUNTIME(cudaMemPoolTrimTo, (cudaMemPool_t pool, size_t bytes), cuMemPoolTrimTo(pool, bytes))
RUNTIME(cudaMemcpy, (void* to, const void* from, size_t n, enum cudaMemcpyKind kind), (void)kind, cuMemcpy(ADDRESS(to), ADDRESS(from), n))
RUNTIME(cudaMemcpyAsync, (void* to, const void* from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s),
        (void)kind, cuMemcpyAsync(ADDRESS(to), ADDRESS(from), n, s))
RUNTIME(cudaMemcpyPeerAsync, (void* to, int there, const void* from, int here, size_t n, cudaStream_t s),
        (void)there, (void)here, cuMemcpyAsync(ADDRESS(to), ADDRESS(from), n, s))
RUNTIME(cudaMemset, (void* p, int value, size_t n), cuMemsetD8(ADDRESS(p), (unsigned char)value, n))
RUNTIME(cudaMemsetAsync, (void* p, int value, size_t n, cudaStream_t s), cuMemsetD8Async(ADDRESS(p), (unsigned char)value, n, s))
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind,
                                     cudaStream_t stream) {
    (void)kind, (void)stream;
    for (size_t row = 0; row < height; row++) memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
    return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* out, const void* p) {
    unsigned type = 0;
    bool known = cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, ADDRESS(p)) == CUDA_SUCCESS;
    memset(out, 0, sizeof *out);
    out->device = known ? 0 : -2;
    if (!known) return cudaSuccess;
    out->type = type == CU_MEMORYTYPE_HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    return out->devicePointer = (void*)p, out->hostPointer = type == CU_MEMORYTYPE_HOST ? (void*)p : NULL, cudaSuccess;
}

RUNTIME(cudaStreamCreate, (cudaStream_t* s), cuStreamCreate(s, 0))
RUNTIME(cudaStreamCreateWithPriority, (cudaStream_t* s, unsigned flags, int priority), cuStreamCreateWithPriority(s, flags, priority))
RUNTIME(cudaStreamDestroy, (cudaStream_t s), cuStreamDestroy(s))
RUNTIME(cudaStreamGetPriority, (cudaStream_t s, int* priority), cuStreamGetPriority(s, priority))
RUNTIME(cudaStreamQuery, (cudaStream_t s), cuStreamQuery(s))
RUNTIME(cudaStreamSynchronize, (cudaStream_t s), cuStreamSynchronize(s))
RUNTIME(cudaStreamWaitEvent, (cudaStream_t s, cudaEvent_t e, unsigned flags), cuStreamWaitEvent(s, e, flags))
RUNTIME(cudaStreamAddCallback, (cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned flags), cuStreamAddCallback(s, (CUstreamCallback)f, data, flags))
RUNTIME(cudaLaunchHostFunc, (cudaStream_t s, cudaHostFn_t f, void* data), cuLaunchHostFunc(s, f, data))
RUNTIME(cudaStreamBeginCapture, (cudaStream_t s, enum cudaStreamCaptureMode mode), cuStreamBeginCapture(s, (CUstreamCaptureMode)mode))
RUNTIME(cudaStreamEndCapture, (cudaStream_t s, cudaGraph_t* graph), cuStreamEndCapture(s, graph))
RUNTIME(cudaStreamIsCapturing, (cudaStream_t s, enum cudaStreamCaptureStatus* status), cuStreamIsCapturing(s, (CUstreamCaptureStatus*)status))
RUNTIME(cudaStreamGetCaptureInfo, (cudaStream_t s, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
        const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count),
        cuStreamGetCaptureInfo(s, (CUstreamCaptureStatus*)status, (cuuint64_t*)id, graph, nodes, (const CUgraphEdgeData**)edges, count))
RUNTIME(cudaThreadExchangeStreamCaptureMode, (enum cudaStreamCaptureMode* mode), cuThreadExchangeStreamCaptureMode((CUstreamCaptureMode*)mode))
RUNTIME(cudaEventCreate, (cudaEvent_t* e), cuEventCreate(e, 0))
RUNTIME(cudaEventCreateWithFlags, (cudaEvent_t* e, unsigned flags), cuEventCreate(e, flags))
RUNTIME(cudaEventDestroy, (cudaEvent_t e), cuEventDestroy(e))
RUNTIME(cudaEventQuery, (cudaEvent_t e), cuEventQuery(e))
RUNTIME(cudaEventRecord, (cudaEvent_t e, cudaStream_t s), cuEventRecord(e, s))
RUNTIME(cudaEventRecordWithFlags, (cudaEvent_t e, cudaStream_t s, unsigned flags), cuEventRecordWithFlags(e, s, flags))
RUNTIME(cudaEventSynchronize, (cudaEvent_t e), cuEventSynchronize(e))
RUNTIME(cudaEventElapsedTime, (float* ms, cudaEvent_t from, cudaEvent_t to), cuEventElapsedTime(ms, from, to))
RUNTIME(cudaGraphInstantiateWithFlags, (cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags), cuGraphInstantiateWithFlags(exec, graph, flags))
RUNTIME(cudaGraphLaunch, (cudaGraphExec_t exec, cudaStream_t s), cuGraphLaunch(exec, s))
RUNTIME(cudaGraphGetNodes, (cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count), cuGraphGetNodes(graph, nodes, count))
RUNTIME(cudaGraphExecDestroy, (cudaGraphExec_t exec), cuGraphExecDestroy(exec))
RUNTIME(cudaGraphDestroy, (cudaGraph_t graph), cuGraphDestroy(graph))
