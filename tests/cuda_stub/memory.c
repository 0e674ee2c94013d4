// Device memory is pages of the host that nobody has touched: readable by its address, and free until written.
#define _GNU_SOURCE
#include "stub.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// All of it lies in one range, whose addresses no two small integers side by side look like: what points into it and at nothing live is stray.
static const CUdeviceptr RANGE = 0x6a0000000000, RANGE_END = 0x6c0000000000;
// An address is given out again only when the whole range was: a freed tensor's stays dead.
static CUdeviceptr following = 0x6a0000000000;
static const size_t PAGE = 4096, MEMORY = 80ull << 30;

typedef struct Block { CUdeviceptr begin; size_t bytes; bool host; struct Block* next; } Block;
static Block* blocks;
static size_t taken;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Block* find(CUdeviceptr address) {
    for (Block* block = blocks; block; block = block->next)
        if (address >= block->begin && address < block->begin + block->bytes) return block;
    return NULL;
}

bool memory_is_live(CUdeviceptr address) {
    pthread_mutex_lock(&lock);
    // Where a block ends too: nothing is read of what has no bytes.
    bool found = find(address) || find(address - 1);
    pthread_mutex_unlock(&lock);
    return found;
}

bool memory_is_stray(CUdeviceptr address) { return address >= RANGE && address < RANGE_END && !memory_is_live(address); }

// Map fresh pages behind the last ones.
static void* pages_of(size_t bytes) {
    for (int tries = 0; tries < 1 << 20; tries++) {
        if (following + bytes + PAGE > RANGE_END) following = RANGE;
        void* pages = mmap((void*)following, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        // One page stays between two blocks, so that the end of one is not the begin of another.
        following += ((pages == MAP_FAILED ? 0 : bytes) + 2 * PAGE - 1) / PAGE * PAGE;
        if (pages != MAP_FAILED) return pages;
    }
    return MAP_FAILED;
}

static CUresult take(CUdeviceptr* address, size_t bytes, bool host) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    void* pages = !host && taken + bytes > MEMORY ? MAP_FAILED : pages_of(bytes);
    if (pages != MAP_FAILED) {
        Block* block = malloc(sizeof *block);
        *block = (Block){(CUdeviceptr)pages, bytes, host, blocks};
        blocks = block;
        taken += host ? 0 : bytes;
        *address = block->begin;
    }
    pthread_mutex_unlock(&lock);
    return pages == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUdeviceptr memory_take(size_t bytes) {
    CUdeviceptr address = 0;
    take(&address, bytes, false);
    return address;
}

static CUresult give_back(CUdeviceptr address) {
    if (!address) return CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    Block** place = &blocks;
    while (*place && (*place)->begin != address) place = &(*place)->next;
    Block* block = *place;
    if (block) {
        *place = block->next;
        taken -= block->host ? 0 : block->bytes;
        munmap((void*)block->begin, block->bytes);
        free(block);
    }
    pthread_mutex_unlock(&lock);
    return block ? CUDA_SUCCESS : refuse(CUDA_ERROR_INVALID_VALUE, "free of %p, which is not allocated", (void*)address);
}

EXPORT CUresult cuMemGetInfo(size_t* left, size_t* total) { return *left = MEMORY - taken, *total = MEMORY, CUDA_SUCCESS; }
EXPORT CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) { return take(address, bytes, false); }
EXPORT CUresult cuMemAllocPitch(CUdeviceptr* address, size_t* pitch, size_t width, size_t height, unsigned element) {
    (void)element;
    return *pitch = (width + 511) / 512 * 512, take(address, *pitch * height, false);
}
EXPORT CUresult cuMemAllocManaged(CUdeviceptr* address, size_t bytes, unsigned flags) { return (void)flags, take(address, bytes, false); }
EXPORT CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) { return (void)stream, take(address, bytes, false); }
EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, CUmemoryPool pool, CUstream stream) {
    return (void)pool, (void)stream, take(address, bytes, false);
}
EXPORT CUresult cuMemFree(CUdeviceptr address) { return give_back(address); }
EXPORT CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) { return (void)stream, give_back(address); }
EXPORT CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned flags) { return (void)flags, take((CUdeviceptr*)address, bytes, true); }
EXPORT CUresult cuMemAllocHost(void** address, size_t bytes) { return take((CUdeviceptr*)address, bytes, true); }
EXPORT CUresult cuMemFreeHost(void* address) { return give_back((CUdeviceptr)address); }
EXPORT CUresult cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned flags) { return (void)flags, *device = (CUdeviceptr)host, CUDA_SUCCESS; }
EXPORT CUresult cuMemHostGetFlags(unsigned* flags, void* host) { return (void)host, *flags = 0, CUDA_SUCCESS; }
EXPORT CUresult cuMemHostRegister(void* address, size_t bytes, unsigned flags) { return (void)address, (void)bytes, (void)flags, CUDA_SUCCESS; }
EXPORT CUresult cuMemHostUnregister(void* address) { return (void)address, CUDA_SUCCESS; }
EXPORT CUresult cuMemGetAddressRange(CUdeviceptr* begin, size_t* bytes, CUdeviceptr address) {
    pthread_mutex_lock(&lock);
    Block* block = find(address);
    if (block && begin) *begin = block->begin;
    if (block && bytes) *bytes = block->bytes;
    pthread_mutex_unlock(&lock);
    return block ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

static bool is_host(CUdeviceptr address, bool* known) {
    pthread_mutex_lock(&lock);
    Block* block = find(address);
    bool host = block && block->host;
    *known = block;
    pthread_mutex_unlock(&lock);
    return host;
}

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    bool known, host = is_host(address, &known);
    if (!known) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: return cuCtxGetCurrent(value);
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: return *(unsigned*)value = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE, CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        case CU_POINTER_ATTRIBUTE_HOST_POINTER: return *(CUdeviceptr*)value = address, CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID: return *(unsigned long long*)value = address, CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: return *(int*)value = 0, CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: return cuMemGetAddressRange(value, NULL, address);
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: return cuMemGetAddressRange(NULL, value, address);
        case CU_POINTER_ATTRIBUTE_MAPPED: return *(bool*)value = true, CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: return *(bool*)value = false, CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: return *(void**)value = NULL, CUDA_SUCCESS;
        default: return refuse(CUDA_ERROR_NOT_SUPPORTED, "cuPointerGetAttribute of attribute %d", attribute);
    }
}
EXPORT CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values, CUdeviceptr address) {
    bool known, host = is_host(address, &known);
    (void)host;
    for (unsigned i = 0; i < count; i++) {
        if (known) {
            CUresult result = cuPointerGetAttribute(values[i], attributes[i], address);
            if (result) return result;
        } else if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
            *(int*)values[i] = -2;
        } else if (attributes[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
            *(unsigned*)values[i] = 0;
        } else if (attributes[i] == CU_POINTER_ATTRIBUTE_IS_MANAGED || attributes[i] == CU_POINTER_ATTRIBUTE_MAPPED) {
            *(bool*)values[i] = false;
        } else {
            *(void**)values[i] = NULL;
        }
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerSetAttribute(const void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    return (void)value, (void)attribute, (void)address, CUDA_SUCCESS;
}

// Pools: there is one a device, and it keeps nothing.
static char pool;
EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* out, CUdevice device) { return (void)device, *out = (CUmemoryPool)&pool, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool* out, CUdevice device) { return (void)device, *out = (CUmemoryPool)&pool, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool in) { return (void)device, (void)in, CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolCreate(CUmemoryPool* out, const CUmemPoolProps* props) { return (void)props, *out = (CUmemoryPool)&pool, CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolDestroy(CUmemoryPool in) { return (void)in, CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool in, size_t bytes) { return (void)in, (void)bytes, CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool in, CUmemPool_attribute attribute, void* value) {
    return (void)in, (void)attribute, (void)value, CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolGetAttribute(CUmemoryPool in, CUmemPool_attribute attribute, void* value) {
    (void)in;
    if (attribute <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES) return *(int*)value = 1, CUDA_SUCCESS;
    return *(cuuint64_t*)value = 0, CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolSetAccess(CUmemoryPool in, const CUmemAccessDesc* access, size_t count) {
    return (void)in, (void)access, (void)count, CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolGetAccess(CUmemAccess_flags* flags, CUmemoryPool in, CUmemLocation* place) {
    return (void)in, (void)place, *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CUDA_SUCCESS;
}

// Reserved addresses are allocated at once; handles are sizes.
EXPORT CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* prop, CUmemAllocationGranularity_flags option) {
    return (void)prop, (void)option, *bytes = 2 << 20, CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t alignment, CUdeviceptr wish, unsigned long long flags) {
    (void)alignment, (void)wish, (void)flags;
    return take(address, bytes, true);
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) { return (void)bytes, give_back(address); }
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* prop, unsigned long long flags) {
    return (void)prop, (void)flags, *handle = bytes, CUDA_SUCCESS;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { return (void)handle, CUDA_SUCCESS; }
EXPORT CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    return (void)bytes, (void)offset, (void)handle, (void)flags, memory_is_live(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) { return (void)address, (void)bytes, CUDA_SUCCESS; }
EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc* access, size_t count) {
    return (void)address, (void)bytes, (void)access, (void)count, CUDA_SUCCESS;
}
