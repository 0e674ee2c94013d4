// A launch is checked as a driver checks it, written down with the words of its parameters, and not run.
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int smaller(int one, int other) { return one < other ? one : other; }

int allowed_shared(const Kernel* kernel) {
    int plain = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK) - kernel->static_shared;
    return kernel->dynamic_shared > plain ? kernel->dynamic_shared : plain;
}

// Return why a driver would refuse these sizes, or NULL.
static const char* fault(const Kernel* kernel, const CUlaunchConfig* c) {
    const char* named = getenv("STUB_CUDA_REFUSE");
    if (named && *named && strstr(kernel->name, named)) return "STUB_CUDA_REFUSE names it";
    if (!known_context()) return "no current context";
    if (!c->gridDimX || !c->gridDimY || !c->gridDimZ) return "a grid of nothing";
    if (c->gridDimX > 2147483647u || c->gridDimY > 65535 || c->gridDimZ > 65535) return "a grid beyond 2147483647 x 65535 x 65535";
    if (!c->blockDimX || !c->blockDimY || !c->blockDimZ) return "a block of nothing";
    if (c->blockDimX > 1024 || c->blockDimY > 1024 || c->blockDimZ > 64) return "a block beyond 1024 x 1024 x 64";
    unsigned long long threads = (unsigned long long)c->blockDimX * c->blockDimY * c->blockDimZ;
    if (threads > (unsigned)kernel->most_threads) return "more threads than the kernel was compiled for";
    if (threads * kernel->registers > 65536) return "more registers than a multiprocessor has";
    if (c->sharedMemBytes > (unsigned)allowed_shared(kernel)) return "more dynamic shared memory than was asked for before";
    return NULL;
}

// The cluster's and the programmatic launch's attributes as numbers, for the record.
static int cluster_of(const CUlaunchConfig* c) {
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            return (int)(c->attrs[i].value.clusterDim.x * c->attrs[i].value.clusterDim.y * c->attrs[i].value.clusterDim.z);
    return 1;
}

// Count the addresses of live memory among the parameters, and list where, in bytes from the first one, addresses stand that point where memory was or,
// alone in a parameter, at no memory.
static int count_addresses(const Kernel* kernel, void** params, int* stray, int most, int* strays) {
    int live = 0, first = 0;
    *strays = 0;
    for (int i = 0; params && i < kernel->parameters; first += kernel->sizes[i++])
        for (int at = 0; at + 8 <= kernel->sizes[i]; at += 8) {
            CUdeviceptr word;
            memcpy(&word, (char*)params[i] + at, 8);
            bool found = memory_is_live(word), address = kernel->sizes[i] == 8 && word >> 40 && word < 1ull << 47;
            live += found;
            if (!found && (address || memory_is_stray(word)) && *strays < most) stray[(*strays)++] = first + at;
        }
    return live;
}

// Return the launch as a line of JSON, which the caller frees. Parameters are their bytes in hexadecimal, or null where the code does not tell sizes.
static char* line_of(const Kernel* kernel, const CUlaunchConfig* c, void** params, const char* why) {
    enum { MOST_STRAYS = 16 };
    size_t bytes = 0;
    int stray[MOST_STRAYS], strays, live = count_addresses(kernel, params, stray, MOST_STRAYS, &strays);
    for (int i = 0; i < kernel->parameters; i++) bytes += kernel->sizes[i];
    char *line = malloc(1024 + strlen(kernel->name) + 2 * bytes + 8 * MOST_PARAMETERS), *end = line;
    end += sprintf(end, "{\"launch\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], ", kernel->name, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
                   c->blockDimY, c->blockDimZ);
    end += sprintf(end, "\"shared\": %u, \"static_shared\": %d, \"cluster\": %d, ", c->sharedMemBytes, kernel->static_shared, cluster_of(c));
    const Stream* stream = stream_of(c->hStream);
    end += sprintf(end, "\"stream\": %lld, \"bytes\": %zu, \"live\": %d, \"stray\": [", stream ? (long long)stream->id : -1, bytes, live);
    for (int i = 0; i < strays; i++) end += sprintf(end, i ? ", %d" : "%d", stray[i]);
    end += sprintf(end, "], \"refused\": ");
    end += why ? sprintf(end, "\"%s\", \"parameters\": ", why) : sprintf(end, "null, \"parameters\": ");
    if (kernel->parameters < 0 || !params || getenv("STUB_CUDA_BRIEF")) return memcpy(end, "null}", 6), line;
    *end++ = '[';
    for (int i = 0; i < kernel->parameters; i++) {
        end += sprintf(end, i ? ", \"" : "\"");
        for (int k = 0; k < kernel->sizes[i]; k++) end += sprintf(end, "%02x", ((unsigned char*)params[i])[k]);
        *end++ = '"';
    }
    return memcpy(end, "]}", 3), line;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
    (void)extra;
    if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, "launch of no kernel");
    const Kernel* kernel = (const Kernel*)function;
    const char* why = stream_of(config->hStream) ? fault(kernel, config) : "no such stream";
    char* line = line_of(kernel, config, params, why);
    if (why || !graph_takes(stream_of(config->hStream), line)) log_line(line);
    free(line);
    return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                               CUstream stream, void** params, void** extra) {
    CUlaunchConfig config = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&config, function, params, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                          unsigned shared, CUstream stream, void** params) {
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, params, NULL);
}
EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn call, void* data) { return (void)stream, call(data), CUDA_SUCCESS; }

// How many blocks a multiprocessor holds, by threads, registers and shared memory.
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared) {
    const Kernel* kernel = (const Kernel*)function;
    if (!kernel || threads < 1) return CUDA_ERROR_INVALID_VALUE;
    int warps = (threads + 31) / 32, memory = (int)shared + kernel->static_shared + device_attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
    int registers = (kernel->registers + 7) / 8 * 8 * warps * 32;
    *blocks = smaller(smaller(32, 64 / warps), smaller(registers ? 65536 / registers : 32, 233472 / memory));
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction kernel, int threads, size_t shared, unsigned flags) {
    return (void)flags, cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function, CUoccupancyB2DSize shared, size_t bytes, int most) {
    *block = smaller(most ? most : 1024, ((const Kernel*)function)->most_threads);
    int blocks = 0;
    CUresult result = cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, *block, shared ? shared(*block) : bytes);
    return *grid = blocks * 132, result;
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction kernel, CUoccupancyB2DSize shared, size_t bytes, int most,
                                                          unsigned flags) {
    return (void)flags, cuOccupancyMaxPotentialBlockSize(grid, block, kernel, shared, bytes, most);
}
EXPORT CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction kernel, int blocks, int threads) {
    return (void)kernel, (void)threads, *bytes = 233472 / (blocks ? blocks : 1) - 1024, CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction kernel, const CUlaunchConfig* config) {
    return (void)kernel, *clusters = 132 / cluster_of(config), CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxPotentialClusterSize(int* size, CUfunction kernel, const CUlaunchConfig* config) {
    return (void)kernel, (void)config, *size = 8, CUDA_SUCCESS;
}
