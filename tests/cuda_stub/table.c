// What libraries look up by name. A function that is not here is found all the same,
// and its call is noted and refused: the log says what a run wanted and did not get.
#include "stub.h"

#include <cudaProfiler.h>

#include <string.h>

// cuda.h renames a function to its latest version, and the lookup asks for the plain name.
#define E(name) {#name, (void*)name}
static const struct { const char* name; void* call; } TABLE[] = {
    E(cuGetExportTable), E(cuGetErrorName), E(cuGetErrorString),
    E(cuCtxCreate), E(cuCtxDestroy), E(cuCtxDisablePeerAccess), E(cuCtxEnablePeerAccess), E(cuCtxGetApiVersion),
    E(cuCtxGetCacheConfig), E(cuCtxGetCurrent), E(cuCtxGetDevice), E(cuCtxGetFlags), E(cuCtxGetId), E(cuCtxGetLimit),
    E(cuCtxGetStreamPriorityRange), E(cuCtxPopCurrent), E(cuCtxPushCurrent), E(cuCtxResetPersistingL2Cache),
    E(cuCtxSetCacheConfig), E(cuCtxSetCurrent), E(cuCtxSetFlags), E(cuCtxSetLimit), E(cuCtxSynchronize),
    E(cuDeviceCanAccessPeer), E(cuDeviceGet), E(cuDeviceGetAttribute), E(cuDeviceGetByPCIBusId), E(cuDeviceGetCount),
    E(cuDeviceGetDefaultMemPool), E(cuDeviceGetExecAffinitySupport), E(cuDeviceGetLuid), E(cuDeviceGetMemPool),
    E(cuDeviceGetName), E(cuDeviceGetP2PAttribute), E(cuDeviceGetPCIBusId), E(cuDeviceGetUuid),
    E(cuDeviceGraphMemTrim), E(cuDevicePrimaryCtxGetState), E(cuDevicePrimaryCtxRelease), E(cuDevicePrimaryCtxReset),
    E(cuDevicePrimaryCtxRetain), E(cuDevicePrimaryCtxSetFlags), E(cuDeviceSetMemPool), E(cuDeviceTotalMem),
    E(cuDriverGetVersion), E(cuEventCreate), E(cuEventDestroy), E(cuEventElapsedTime), E(cuEventQuery),
    E(cuEventRecord), E(cuEventRecordWithFlags), E(cuEventSynchronize), E(cuFuncGetAttribute), E(cuFuncGetModule),
    E(cuFuncGetName), E(cuFuncGetParamInfo), E(cuFuncIsLoaded), E(cuFuncLoad), E(cuFuncSetAttribute),
    E(cuFuncSetCacheConfig), E(cuGraphDestroy), E(cuGraphExecDestroy), E(cuGraphGetNodes),
    E(cuGraphInstantiateWithFlags), E(cuGraphLaunch), E(cuGraphUpload), E(cuInit), E(cuKernelGetAttribute),
    E(cuKernelGetFunction), E(cuKernelGetLibrary), E(cuKernelGetName), E(cuKernelGetParamInfo),
    E(cuKernelSetAttribute), E(cuKernelSetCacheConfig), E(cuLaunchCooperativeKernel), E(cuLaunchHostFunc),
    E(cuLaunchKernel), E(cuLaunchKernelEx), E(cuLibraryGetGlobal), E(cuLibraryGetKernel), E(cuLibraryGetManaged),
    E(cuLibraryGetModule), E(cuLibraryLoadData), E(cuLibraryLoadFromFile), E(cuLibraryUnload), E(cuMemAddressFree),
    E(cuMemAddressReserve), E(cuMemAlloc), E(cuMemAllocAsync), E(cuMemAllocFromPoolAsync), E(cuMemAllocHost),
    E(cuMemAllocManaged), E(cuMemAllocPitch), E(cuMemCreate), E(cuMemFree), E(cuMemFreeAsync), E(cuMemFreeHost),
    E(cuMemGetAddressRange), E(cuMemGetAllocationGranularity), E(cuMemGetInfo), E(cuMemHostAlloc),
    E(cuMemHostGetDevicePointer), E(cuMemHostGetFlags), E(cuMemHostRegister), E(cuMemHostUnregister), E(cuMemMap),
    E(cuMemPoolCreate), E(cuMemPoolDestroy), E(cuMemPoolGetAccess), E(cuMemPoolGetAttribute), E(cuMemPoolSetAccess),
    E(cuMemPoolSetAttribute), E(cuMemPoolTrimTo), E(cuMemRelease), E(cuMemSetAccess), E(cuMemUnmap), E(cuMemcpy),
    E(cuMemcpy2D), E(cuMemcpy2DAsync), E(cuMemcpy2DUnaligned), E(cuMemcpyAsync), E(cuMemcpyDtoD),
    E(cuMemcpyDtoDAsync), E(cuMemcpyDtoH), E(cuMemcpyDtoHAsync), E(cuMemcpyHtoD), E(cuMemcpyHtoDAsync),
    E(cuMemcpyPeer), E(cuMemcpyPeerAsync), E(cuMemsetD16), E(cuMemsetD16Async), E(cuMemsetD2D8), E(cuMemsetD2D8Async),
    E(cuMemsetD32), E(cuMemsetD32Async), E(cuMemsetD8), E(cuMemsetD8Async), E(cuModuleGetFunction),
    E(cuModuleGetGlobal), E(cuModuleGetLoadingMode), E(cuModuleLoad), E(cuModuleLoadData), E(cuModuleLoadDataEx),
    E(cuModuleLoadFatBinary), E(cuModuleUnload), E(cuOccupancyAvailableDynamicSMemPerBlock),
    E(cuOccupancyMaxActiveBlocksPerMultiprocessor), E(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags),
    E(cuOccupancyMaxActiveClusters), E(cuOccupancyMaxPotentialBlockSize),
    E(cuOccupancyMaxPotentialBlockSizeWithFlags), E(cuOccupancyMaxPotentialClusterSize), E(cuPointerGetAttribute),
    E(cuPointerGetAttributes), E(cuPointerSetAttribute), E(cuProfilerStart), E(cuProfilerStop),
    E(cuStreamAddCallback), E(cuStreamBeginCapture), E(cuStreamCopyAttributes), E(cuStreamCreate),
    E(cuStreamCreateWithPriority), E(cuStreamDestroy), E(cuStreamEndCapture), E(cuStreamGetAttribute),
    E(cuStreamGetCaptureInfo), E(cuStreamGetCtx), E(cuStreamGetDevice), E(cuStreamGetFlags), E(cuStreamGetId),
    E(cuStreamGetPriority), E(cuStreamIsCapturing), E(cuStreamQuery), E(cuStreamSetAttribute), E(cuStreamSynchronize),
    E(cuStreamWaitEvent), E(cuThreadExchangeStreamCaptureMode),
};
#undef E

static void* find(const char* name) {
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++)
        if (!strcmp(TABLE[i].name, name)) return TABLE[i].call;
    return NULL;
}

// Functions of the driver that the stub does not have: each name that is looked up gets one of these, which says so when it is called.
enum { MOST_ABSENT = 512 };
static char* absent[MOST_ABSENT];
static int absents;

static CUresult call_of_absent(int place) { return refuse(CUDA_ERROR_NOT_SUPPORTED, "call of %s", absent[place]); }

#define ONE(n) static CUresult absent_##n(void) { return call_of_absent(0x##n); }
#define SIXTEEN(X, n) X(n##0) X(n##1) X(n##2) X(n##3) X(n##4) X(n##5) X(n##6) X(n##7) X(n##8) X(n##9) X(n##a) X(n##b) X(n##c) X(n##d) X(n##e) X(n##f)
#define ROWS(X, n) SIXTEEN(X, n##0) SIXTEEN(X, n##1) SIXTEEN(X, n##2) SIXTEEN(X, n##3) SIXTEEN(X, n##4) SIXTEEN(X, n##5) SIXTEEN(X, n##6) SIXTEEN(X, n##7) \
    SIXTEEN(X, n##8) SIXTEEN(X, n##9) SIXTEEN(X, n##a) SIXTEEN(X, n##b) SIXTEEN(X, n##c) SIXTEEN(X, n##d) SIXTEEN(X, n##e) SIXTEEN(X, n##f)
ROWS(ONE, 0)
ROWS(ONE, 1)
#define NAME(n) absent_##n,
static CUresult (*const ABSENT[MOST_ABSENT])(void) = {ROWS(NAME, 0) ROWS(NAME, 1)};

static void* absent_call(const char* name) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    int place = 0;
    while (place < absents && strcmp(absent[place], name)) place++;
    if (place == absents && absents < MOST_ABSENT) absent[absents++] = strdup(name);
    pthread_mutex_unlock(&lock);
    return place < MOST_ABSENT ? (void*)ABSENT[place] : NULL;
}

EXPORT CUresult cuGetExportTable(const void** table, const CUuuid* id) {
    const unsigned char* b = (const unsigned char*)id->bytes;
    *table = NULL;
    return refuse(CUDA_ERROR_NOT_FOUND, "export table %02x%02x%02x%02x-%02x%02x-%02x%02x", b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]);
}

// Two earlier forms of this function take other arguments, and the runtime asks for all three.
static CUresult capture_of_10(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id) {
    return cuStreamGetCaptureInfo(stream, status, id, NULL, NULL, NULL, NULL);
}
static CUresult capture_of_11(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph, const CUgraphNode** nodes, size_t* count) {
    return cuStreamGetCaptureInfo(stream, status, id, graph, nodes, NULL, count);
}

#undef cuGetProcAddress
EXPORT CUresult cuGetProcAddress(const char* name, void** call, int version, cuuint64_t flags);
EXPORT CUresult cuGetProcAddress_v2(const char* name, void** call, int version, cuuint64_t flags, CUdriverProcAddressQueryResult* result) {
    (void)flags;
    *call = find(name);
    if (!strcmp(name, "cuGetProcAddress")) *call = version >= 12000 ? (void*)cuGetProcAddress_v2 : (void*)cuGetProcAddress;
    if (!strcmp(name, "cuStreamGetCaptureInfo") && version < 12030) *call = version < 11030 ? (void*)capture_of_10 : (void*)capture_of_11;
    if (!*call && !strncmp(name, "cu", 2)) *call = absent_call(name);
    if (result) *result = *call ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *call ? CUDA_SUCCESS : refuse(CUDA_ERROR_NOT_FOUND, "lookup of %s", name);
}
EXPORT CUresult cuGetProcAddress(const char* name, void** call, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, call, version, flags, NULL);
}

static const struct { CUresult code; const char *name, *text; } ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
};
static const char* text_of(CUresult code, bool name) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return name ? ERRORS[i].name : ERRORS[i].text;
    return name ? "CUDA_ERROR_OF_THE_STUB" : "an error that the stub has no text for";
}
EXPORT CUresult cuGetErrorName(CUresult code, const char** text) { return *text = text_of(code, true), CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult code, const char** text) { return *text = text_of(code, false), CUDA_SUCCESS; }
