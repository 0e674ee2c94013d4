// Kernels that nvcc compiled into a library: what its start-up code registers, and launches by the address of the host's function.
#include "stub.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

// A host's function or variable -> the name that the fat binary has for it, and the module, which is loaded when it is first asked for.
typedef struct { const void* host; const char* name; CUlibrary* library; const void* code; Kernel* kernel; } Entry;
typedef struct { CUlibrary library; const void* code; } Binary;
static Entry* entries;
static size_t places, used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Entry* place_of(const void* host) {
    size_t at = ((uintptr_t)host >> 2) * 0x9e3779b97f4a7c15ull >> 20;
    while (entries[at & (places - 1)].host && entries[at & (places - 1)].host != host) at++;
    return &entries[at & (places - 1)];
}

static void keep(Binary* binary, const void* host, const char* name) {
    pthread_mutex_lock(&lock);
    if (2 * used >= places) {
        Entry* before = entries;
        size_t count = places;
        places = places ? 2 * places : 1024;
        entries = calloc(places, sizeof *entries);
        for (size_t i = 0; i < count; i++)
            if (before[i].host) *place_of(before[i].host) = before[i];
        free(before);
    }
    Entry* entry = place_of(host);
    used += !entry->host;
    *entry = (Entry){host, name, &binary->library, binary->code, NULL};
    pthread_mutex_unlock(&lock);
}

static Entry* entry_of(const void* host) {
    pthread_mutex_lock(&lock);
    Entry* entry = places ? place_of(host) : NULL;
    if (entry && !entry->host) entry = NULL;
    if (entry && !*entry->library) cuLibraryLoadData(entry->library, entry->code, NULL, NULL, 0, NULL, NULL, 0);
    pthread_mutex_unlock(&lock);
    return entry;
}

static Kernel* kernel_at(const void* host) {
    Entry* entry = entry_of(host);
    // What is no registered function may be a kernel that a library was asked for.
    if (!entry) return (Kernel*)host;
    if (!entry->kernel) cuLibraryGetKernel((CUkernel*)&entry->kernel, *entry->library, entry->name);
    return entry->kernel;
}

EXPORT void** __cudaRegisterFatBinary(void* code) {
    Binary* binary = calloc(1, sizeof *binary);
    binary->code = code;
    return (void**)binary;
}
EXPORT void __cudaRegisterFatBinaryEnd(void** binary) { (void)binary; }
EXPORT void __cudaUnregisterFatBinary(void** binary) { (void)binary; }
EXPORT char __cudaInitModule(void** binary) { return (void)binary, 1; }
EXPORT void __cudaRegisterFunction(void** binary, const char* host, char* there, const char* name, int limit, void* tid, void* bid, void* block, void* grid,
                                   int* warp) {
    (void)there, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    keep((Binary*)binary, host, name);
}
EXPORT void __cudaRegisterVar(void** binary, char* host, char* there, const char* name, int outside, size_t size, int constant, int global) {
    (void)there, (void)outside, (void)size, (void)constant, (void)global;
    keep((Binary*)binary, host, name);
}

static CUresult symbol(CUdeviceptr* address, const void* host) {
    Entry* entry = entry_of(host);
    return entry ? cuLibraryGetGlobal(address, NULL, *entry->library, entry->name) : CUDA_ERROR_NOT_FOUND;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void* host) { return (cudaError_t)symbol((CUdeviceptr*)address, host); }
EXPORT cudaError_t cudaMemcpyToSymbol(const void* host, const void* from, size_t count, size_t offset, enum cudaMemcpyKind kind) {
    CUdeviceptr address;
    CUresult result = symbol(&address, host);
    if (!result) memcpy((void*)(address + offset), from, count);
    return (void)kind, (cudaError_t)result;
}

// What <<<...>>> pushes and the compiled stub of the kernel pops.
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
    return *(cudaStream_t*)stream = pushed.stream, cudaSuccess;
}

static cudaError_t launch(Kernel* kernel, const CUlaunchConfig* config, void** args) {
    CUresult result = ready();
    return after(result ? result : cuLaunchKernelEx(config, (CUfunction)kernel, args, NULL));
}
static CUlaunchConfig plain(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    return (CUlaunchConfig){grid.x, grid.y, grid.z, block.x, block.y, block.z, (unsigned)shared, stream, NULL, 0};
}
EXPORT cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
    CUlaunchConfig config = plain(grid, block, shared, stream);
    return launch(kernel_at(host), &config, args);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    return *kernel = (cudaKernel_t)kernel_at(host), *kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
    CUlaunchConfig config = plain(grid, block, shared, stream);
    return launch((Kernel*)kernel, &config, args);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel(host, grid, block, args, shared, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** args) {
    CUlaunchConfig config = plain(c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
    // The runtime's attributes are laid out as the driver's.
    config.attrs = (CUlaunchAttribute*)c->attrs, config.numAttrs = c->numAttrs;
    return launch(kernel_at(host), &config, args);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* host, enum cudaFuncAttribute attribute, int value) {
    return after(cuFuncSetAttribute((CUfunction)kernel_at(host), (CUfunction_attribute)attribute, value));
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* out, const void* host) {
    const Kernel* kernel = kernel_at(host);
    memset(out, 0, sizeof *out);
    if (!kernel) return after(CUDA_ERROR_INVALID_HANDLE);
    out->sharedSizeBytes = kernel->static_shared, out->maxThreadsPerBlock = kernel->most_threads, out->numRegs = kernel->registers;
    out->ptxVersion = out->binaryVersion = 90, out->maxDynamicSharedSizeBytes = allowed_shared(kernel);
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads, size_t shared, unsigned flags) {
    return (void)flags, after(cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, (CUfunction)kernel_at(host), threads, shared));
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}
