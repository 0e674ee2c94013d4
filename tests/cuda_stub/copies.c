// Copies and fills are done at once, on whatever stream: the stub's memory is the host's, and nothing is ever on its way.
#include "stub.h"

#include <string.h>

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return memmove((void*)to, (void*)from, bytes), CUDA_SUCCESS; }

EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy(to, from, bytes); }
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) { return (void)stream, copy(to, from, bytes); }
EXPORT CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) { return copy(to, (CUdeviceptr)from, bytes); }
EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return (void)stream, copy(to, (CUdeviceptr)from, bytes);
}
EXPORT CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) { return copy((CUdeviceptr)to, from, bytes); }
EXPORT CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) { return (void)stream, copy((CUdeviceptr)to, from, bytes); }
EXPORT CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy(to, from, bytes); }
EXPORT CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) { return (void)stream, copy(to, from, bytes); }
EXPORT CUresult cuMemcpyPeer(CUdeviceptr to, CUcontext there, CUdeviceptr from, CUcontext here, size_t bytes) {
    return (void)there, (void)here, copy(to, from, bytes);
}
EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext there, CUdeviceptr from, CUcontext here, size_t bytes, CUstream stream) {
    return (void)there, (void)here, (void)stream, copy(to, from, bytes);
}

static CUdeviceptr end_of(CUmemorytype type, const void* host, CUdeviceptr device) { return type == CU_MEMORYTYPE_HOST ? (CUdeviceptr)host : device; }

EXPORT CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D* c) {
    CUdeviceptr to = end_of(c->dstMemoryType, c->dstHost, c->dstDevice), from = end_of(c->srcMemoryType, c->srcHost, c->srcDevice);
    for (size_t row = 0; row < c->Height; row++)
        copy(to + (c->dstY + row) * c->dstPitch + c->dstXInBytes, from + (c->srcY + row) * c->srcPitch + c->srcXInBytes, c->WidthInBytes);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemcpy2D(const CUDA_MEMCPY2D* c) { return cuMemcpy2DUnaligned(c); }
EXPORT CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* c, CUstream stream) { return (void)stream, cuMemcpy2DUnaligned(c); }

EXPORT CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) { return memset((void*)to, value, count), CUDA_SUCCESS; }
EXPORT CUresult cuMemsetD16(CUdeviceptr to, unsigned short value, size_t count) {
    for (size_t i = 0; i < count; i++) ((unsigned short*)to)[i] = value;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemsetD32(CUdeviceptr to, unsigned value, size_t count) {
    for (size_t i = 0; i < count; i++) ((unsigned*)to)[i] = value;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) { return (void)stream, cuMemsetD8(to, value, count); }
EXPORT CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) { return (void)stream, cuMemsetD16(to, value, count); }
EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) { return (void)stream, cuMemsetD32(to, value, count); }
EXPORT CUresult cuMemsetD2D8(CUdeviceptr to, size_t pitch, unsigned char value, size_t width, size_t height) {
    for (size_t row = 0; row < height; row++) memset((void*)(to + row * pitch), value, width);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemsetD2D8Async(CUdeviceptr to, size_t pitch, unsigned char value, size_t width, size_t height, CUstream stream) {
    return (void)stream, cuMemsetD2D8(to, pitch, value, width, height);
}
