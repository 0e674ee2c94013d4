// Modules and libraries, which are one thing here, and the kernels in them: loaded is what says its name.
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Global { char* name; CUdeviceptr address; size_t bytes; struct Global* next; } Global;

static CUresult load(Module** out, const void* data) {
    Module* module = calloc(1, sizeof *module);
    pthread_mutex_init(&module->lock, NULL);
    // A cubin is copied: its caller may free it at once. A fat binary is part of a loaded library.
    if (!memcmp(data, "\177ELF", 4)) {
        size_t size = size_of_elf(data);
        data = memcpy(malloc(size), data, size);
    }
    module->data = data;
    return *out = module, CUDA_SUCCESS;
}

static CUresult load_file(Module** out, const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char* data = malloc(size + 64);
    bool whole = fread(data, 1, size, file) == (size_t)size;
    fclose(file);
    return whole ? load(out, data) : CUDA_ERROR_INVALID_IMAGE;
}

static const void* image(Module* module) {
    if (!module->looked) module->image = image_of(module->data), module->looked = true;
    return module->image;
}

static CUresult kernel_of(Kernel** out, Module* module, const char* name) {
    pthread_mutex_lock(&module->lock);
    Kernel* kernel = module->kernels;
    while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
    if (!kernel) {
        kernel = calloc(1, sizeof *kernel);
        kernel->name = strdup(name), kernel->module = module;
        if (describe_kernel(image(module), kernel)) {
            kernel->next = module->kernels, module->kernels = kernel;
        } else {
            free(kernel->name), free(kernel);
            kernel = NULL;
        }
    }
    pthread_mutex_unlock(&module->lock);
    return *out = kernel, kernel ? CUDA_SUCCESS : refuse(CUDA_ERROR_NOT_FOUND, "kernel %s, which its module does not hold", name);
}

static CUresult global_of(CUdeviceptr* address, size_t* bytes, Module* module, const char* name) {
    pthread_mutex_lock(&module->lock);
    Global* global = module->globals;
    while (global && strcmp(global->name, name)) global = global->next;
    size_t size = global ? global->bytes : size_of_symbol(image(module), name);
    if (!global && size) {
        global = calloc(1, sizeof *global);
        *global = (Global){strdup(name), memory_take(size), size, module->globals};
        module->globals = global;
    }
    pthread_mutex_unlock(&module->lock);
    if (!global) return refuse(CUDA_ERROR_NOT_FOUND, "global %s, whose module does not say its size", name);
    if (address) *address = global->address;
    if (bytes) *bytes = global->bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoad(CUmodule* out, const char* path) { return load_file((Module**)out, path); }
EXPORT CUresult cuModuleLoadData(CUmodule* out, const void* data) { return load((Module**)out, data); }
EXPORT CUresult cuModuleLoadFatBinary(CUmodule* out, const void* data) { return load((Module**)out, data); }
EXPORT CUresult cuModuleLoadDataEx(CUmodule* out, const void* data, unsigned count, CUjit_option* options, void** values) {
    return (void)count, (void)options, (void)values, load((Module**)out, data);
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) { return *mode = CU_MODULE_LAZY_LOADING, CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) { return kernel_of((Kernel**)out, (Module*)module, name); }
EXPORT CUresult cuModuleGetGlobal(CUdeviceptr* address, size_t* bytes, CUmodule module, const char* name) {
    return global_of(address, bytes, (Module*)module, name);
}
EXPORT CUresult cuLibraryLoadData(CUlibrary* out, const void* data, CUjit_option* jit, void** jit_values, unsigned jit_count, CUlibraryOption* options,
                                  void** values, unsigned count) {
    (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    return load((Module**)out, data);
}
EXPORT CUresult cuLibraryLoadFromFile(CUlibrary* out, const char* path, CUjit_option* jit, void** jit_values, unsigned jit_count,
                                      CUlibraryOption* options, void** values, unsigned count) {
    (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    return load_file((Module**)out, path);
}
EXPORT CUresult cuLibraryUnload(CUlibrary library) { return (void)library, CUDA_SUCCESS; }
EXPORT CUresult cuLibraryGetKernel(CUkernel* out, CUlibrary library, const char* name) { return kernel_of((Kernel**)out, (Module*)library, name); }
EXPORT CUresult cuLibraryGetModule(CUmodule* out, CUlibrary library) { return *out = (CUmodule)library, CUDA_SUCCESS; }
EXPORT CUresult cuLibraryGetGlobal(CUdeviceptr* address, size_t* bytes, CUlibrary library, const char* name) {
    return global_of(address, bytes, (Module*)library, name);
}
EXPORT CUresult cuLibraryGetManaged(CUdeviceptr* address, size_t* bytes, CUlibrary library, const char* name) {
    return global_of(address, bytes, (Module*)library, name);
}
EXPORT CUresult cuKernelGetFunction(CUfunction* out, CUkernel kernel) { return *out = (CUfunction)kernel, CUDA_SUCCESS; }
EXPORT CUresult cuKernelGetLibrary(CUlibrary* out, CUkernel kernel) { return *out = (CUlibrary)((Kernel*)kernel)->module, CUDA_SUCCESS; }
EXPORT CUresult cuKernelGetName(const char** name, CUkernel kernel) { return *name = ((Kernel*)kernel)->name, CUDA_SUCCESS; }
EXPORT CUresult cuFuncGetName(const char** name, CUfunction kernel) { return *name = ((Kernel*)kernel)->name, CUDA_SUCCESS; }
EXPORT CUresult cuFuncGetModule(CUmodule* out, CUfunction kernel) { return *out = (CUmodule)((Kernel*)kernel)->module, CUDA_SUCCESS; }
EXPORT CUresult cuFuncIsLoaded(CUfunctionLoadingState* state, CUfunction kernel) {
    return (void)kernel, *state = CU_FUNCTION_LOADING_STATE_LOADED, CUDA_SUCCESS;
}
EXPORT CUresult cuFuncLoad(CUfunction kernel) { return (void)kernel, CUDA_SUCCESS; }
EXPORT CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
    Kernel* kernel = (Kernel*)function;
    if ((int)index >= kernel->parameters) return CUDA_ERROR_INVALID_VALUE;
    if (size) *size = kernel->sizes[index];
    return *offset = kernel->offsets[index], CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetParamInfo(CUkernel kernel, size_t index, size_t* offset, size_t* size) {
    return cuFuncGetParamInfo((CUfunction)kernel, index, offset, size);
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    Kernel* kernel = (Kernel*)function;
    if (!kernel) return CUDA_ERROR_INVALID_HANDLE;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return *value = kernel->most_threads, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: return *value = kernel->static_shared, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: return *value = kernel->registers, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: return *value = 90, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: return *value = allowed_shared(kernel), CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return *value = -1, CUDA_SUCCESS;
        default: return *value = 0, CUDA_SUCCESS;
    }
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    Kernel* kernel = (Kernel*)function;
    if (!kernel) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    int most = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) - kernel->static_shared;
    if (value < 0 || value > most) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of dynamic shared memory of at most %d", kernel->name, value, most);
    return kernel->dynamic_shared = value, CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache config) { return (void)kernel, (void)config, CUDA_SUCCESS; }
EXPORT CUresult cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device) {
    return (void)device, cuFuncGetAttribute(value, attribute, (CUfunction)kernel);
}
EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
    return (void)device, cuFuncSetAttribute((CUfunction)kernel, attribute, value);
}
EXPORT CUresult cuKernelSetCacheConfig(CUkernel kernel, CUfunc_cache config, CUdevice device) { return (void)kernel, (void)config, (void)device, CUDA_SUCCESS; }
