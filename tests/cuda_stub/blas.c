// The calls of cuBLAS that PyTorch's matrix products make: taken, written down and not computed. NVIDIA's own starts on a genuine driver alone.
#include "stub.h"

#include <string.h>

static char something;
static __thread int math, mode;
static __thread CUstream current;

// All return cublasStatus_t, of which 0 is success.
static int give(void** out) { return *out = &something, 0; }
EXPORT int cublasCreate_v2(void** handle) { return give(handle); }
EXPORT int cublasDestroy_v2(void* handle) { return (void)handle, 0; }
EXPORT int cublasSetStream_v2(void* handle, CUstream stream) { return (void)handle, current = stream, 0; }
EXPORT int cublasSetWorkspace_v2(void* handle, void* space, size_t bytes) { return (void)handle, (void)space, (void)bytes, 0; }
EXPORT int cublasSetMathMode(void* handle, int wanted) { return (void)handle, math = wanted, 0; }
EXPORT int cublasGetMathMode(void* handle, int* out) { return (void)handle, *out = math, 0; }
EXPORT int cublasSetPointerMode_v2(void* handle, int wanted) { return (void)handle, mode = wanted, 0; }
EXPORT int cublasGetPointerMode_v2(void* handle, int* out) { return (void)handle, *out = mode, 0; }
EXPORT size_t cublasLtGetVersion(void) { return 130000; }
EXPORT int cublasLtMatmulDescCreate(void** out) { return give(out); }
EXPORT int cublasLtMatmulDescDestroy(void* in) { return (void)in, 0; }
EXPORT int cublasLtMatmulDescSetAttribute(void* in) { return (void)in, 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void** out) { return give(out); }
EXPORT int cublasLtMatmulPreferenceDestroy(void* in) { return (void)in, 0; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void* in) { return (void)in, 0; }
EXPORT int cublasLtMatrixLayoutCreate(void** out) { return give(out); }
EXPORT int cublasLtMatrixLayoutDestroy(void* in) { return (void)in, 0; }
EXPORT int cublasLtMatrixLayoutSetAttribute(void* in) { return (void)in, 0; }
// One algorithm: cublasLtMatmulHeuristicResult_t has 96 bytes, and zeros in them say success.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void* product, void* a, void* b, void* c, void* d, void* wish, int most, void* results, int* count) {
    (void)handle, (void)product, (void)a, (void)b, (void)c, (void)d, (void)wish;
    if (most < 1) return *count = 0, 0;
    return memset(results, 0, 96), *count = 1, 0;
}

static int took(const char* line) {
    if (!graph_takes(stream_of(current), line)) log_line(line);
    return 0;
}
#define PRODUCT(name) \
    EXPORT int name(void) { return took("{\"product\": \"" #name "\"}"); }
PRODUCT(cublasLtMatmul)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
