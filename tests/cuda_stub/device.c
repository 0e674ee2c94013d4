// The device: an H100 in numbers, its contexts, and what libraries ask before they start.
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t MEMORY = 80ull << 30;
static int contexts[16];
static __thread CUcontext current;

int device_count(void) {
    const char* named = getenv("STUB_CUDA_DEVICES");
    int count = named ? atoi(named) : 1;
    return count < 0 ? 0 : count > 16 ? 16 : count;
}

bool known_context(void) { return current != NULL; }

// Limits of compute capability 9.0 in NVIDIA's programming guide, and the SXM part's sizes. What is not named here is 0: not supported.
static const struct { CUdevice_attribute attribute; int value; } ATTRIBUTES[] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64}, {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647}, {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535}, {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536}, {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32}, {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536}, {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000}, {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132}, {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1}, {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
    {CU_DEVICE_ATTRIBUTE_ECC_ENABLED, 1}, {CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, 1}, {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120}, {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 52428800},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048}, {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1}, {CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT, 32}, {CU_DEVICE_ATTRIBUTE_SURFACE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9}, {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED, 1}, {CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472}, {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1}, {CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO, 2},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, 1}, {CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1}, {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448}, {CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1024}, {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, 1}, {CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE, 32768000}, {CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE, 134217728},
};

int device_attribute(CUdevice_attribute attribute) {
    for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
        if (ATTRIBUTES[i].attribute == attribute) return ATTRIBUTES[i].value;
    return 0;
}

static bool is_device(CUdevice device) { return device >= 0 && device < device_count(); }

EXPORT CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : device_count() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* count) { return *count = device_count(), CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return *device = ordinal, is_device(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
    return snprintf(name, size, "stub of an H100"), is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    memset(uuid, 0x5b, sizeof *uuid);
    return uuid->bytes[15] = (char)device, CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetLuid(char* luid, unsigned* mask, CUdevice device) {
    (void)device;
    return memset(luid, 0, 8), *mask = 0, CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) { return *bytes = MEMORY, is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = device_attribute(attribute) + (attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID ? device : 0);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetPCIBusId(char* name, int size, CUdevice device) {
    return snprintf(name, size, "0000:%02X:00.0", 1 + device), CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* name) {
    unsigned bus = 0;
    if (sscanf(name, "%*x:%x:", &bus) != 1) return CUDA_ERROR_INVALID_VALUE;
    return cuDeviceGet(device, (int)bus - 1);
}
EXPORT CUresult cuDeviceCanAccessPeer(int* can, CUdevice one, CUdevice other) { return *can = one != other, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute attribute, CUdevice one, CUdevice other) {
    (void)attribute;
    return *value = one != other, CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetExecAffinitySupport(int* value, CUexecAffinityType type, CUdevice device) {
    (void)type, (void)device;
    return *value = 0, CUDA_SUCCESS;
}

// A context is its device's place in the table: there is one a device.
static CUcontext context_of(CUdevice device) { return (CUcontext)&contexts[device]; }
static CUdevice device_of(CUcontext context) { return (CUdevice)((int*)context - contexts); }

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    contexts[device]++;
    return *context = context_of(device), CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return contexts[device]--, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxReset(CUdevice device) { return contexts[device] = 0, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned flags) { return (void)device, (void)flags, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return *flags = 0, *active = contexts[device] > 0, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxCreate(CUcontext* context, CUctxCreateParams* params, unsigned flags, CUdevice device) {
    (void)params, (void)flags;
    return *context = current = context_of(device), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxDestroy(CUcontext context) { return (void)context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
static __thread CUcontext stack[16];
static __thread int depth;
EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
    if (depth == 16) return CUDA_ERROR_INVALID_CONTEXT;
    return stack[depth++] = current, current = context, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent(CUcontext* context) {
    if (context) *context = current;
    return current = depth ? stack[--depth] : NULL, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    return *device = device_of(current), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetFlags(unsigned* flags) { return *flags = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetFlags(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long* id) { return *id = 1 + device_of(context ? context : current), CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned* version) { return (void)context, *version = 13000, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSynchronize(void) { return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = limit == CU_LIMIT_STACK_SIZE ? 1024 : 8 << 20, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCacheConfig(CUfunc_cache* config) { return *config = CU_FUNC_CACHE_PREFER_NONE, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCacheConfig(CUfunc_cache config) { return (void)config, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, CUDA_SUCCESS; }
EXPORT CUresult cuCtxResetPersistingL2Cache(void) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) { return (void)peer, (void)flags, CUDA_SUCCESS; }
EXPORT CUresult cuCtxDisablePeerAccess(CUcontext peer) { return (void)peer, CUDA_SUCCESS; }
