// A driver of CUDA that takes every launch and runs none: what its parts share. README.md says what
// it is for.
#pragma once

#include <cuda.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { MOST_PARAMETERS = 256 };

// A kernel of a loaded module; it serves as CUfunction and as CUkernel.
typedef struct Kernel {
    char* name;
    struct Module* module;
    // Offsets and sizes of the parameters; -1 where the code's description was not found.
    int parameters, offsets[MOST_PARAMETERS], sizes[MOST_PARAMETERS];
    int static_shared, registers, most_threads;
    // What cuFuncSetAttribute allowed.
    int dynamic_shared;
    struct Kernel* next;
} Kernel;

// A loaded module; it serves as CUmodule and as CUlibrary.
typedef struct Module {
    const void *data, *image;
    bool looked;
    Kernel* kernels;
    struct Global* globals;
    pthread_mutex_t lock;
} Module;

typedef struct Stream {
    unsigned long long id;
    unsigned flags;
    int priority;
    struct Stream* next;
    struct Graph* capture;
} Stream;

// memory.c
bool memory_is_live(CUdeviceptr address);
bool memory_is_stray(CUdeviceptr address);
CUdeviceptr memory_take(size_t bytes);
// elf.c: the cubin for this device in a cubin or a fat binary, NULL where it cannot be unpacked;
// what it says of a kernel, false where it has none.
const void* image_of(const void* data);
bool describe_kernel(const void* image, Kernel* kernel);
size_t size_of_symbol(const void* image, const char* name);
size_t size_of_elf(const void* image);
// launch.c
int allowed_shared(const Kernel* kernel);
// streams.c: NULL for a handle that is no stream.
Stream* stream_of(CUstream stream);
bool graph_takes(Stream* stream, const char* line);
// log.c
void note(const char* format, ...) __attribute__((format(printf, 1, 2)));
void log_line(const char* line);
// Say that something unlikely was asked for, and refuse it.
CUresult refuse(CUresult result, const char* format, ...) __attribute__((format(printf, 2, 3)));
// device.c
int device_attribute(CUdevice_attribute attribute);
int device_count(void);
bool known_context(void);
// runtime.c: make a context current; keep an error as the runtime's last one.
CUresult ready(void);
int after(CUresult result);
