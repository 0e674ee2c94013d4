// What compiled code says of a kernel: the parameters it takes, its registers, its shared memory, the largest block.
#include "stub.h"

#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WRAPPER = 0x466243b1, FAT_BINARY = 0xba55ed50, ELF_KIND = 2, ARCHITECTURE = 90, LARGEST = 64 << 20 };
// Attributes of .nv.info that are read here.
enum { SIZED = 4, PARAMETER = 0x17, REGISTERS = 0x2f, MOST_THREADS = 0x05 };

// An entry of a fat binary: one architecture's code.
typedef struct {
    uint16_t kind, version;
    uint32_t header;
    uint64_t size;
    uint32_t compressed, options;
    uint16_t minor, major;
    uint32_t architecture, name, name_size;
    uint64_t flags, zero, whole;
} Entry;

static bool is_elf(const void* data) { return !memcmp(data, ELFMAG, SELFMAG); }

// Return the code of an entry of a fat binary, or NULL where it is packed in a way that nothing here unpacks.
static const void* unpacked(const Entry* entry) {
    const void* code = (const char*)entry + entry->header;
    if (is_elf(code)) return code;
    static size_t (*unpack)(void*, size_t, const void*, size_t);
    if (!unpack) {
        void* library = dlopen("libzstd.so.1", RTLD_NOW);
        if (library) *(void**)&unpack = dlsym(library, "ZSTD_decompress");
    }
    if (!unpack || !entry->compressed || entry->whole > LARGEST) return NULL;
    char* image = malloc(entry->whole);
    if (unpack(image, entry->whole, code, entry->compressed) == entry->whole && is_elf(image)) return image;
    free(image);
    return NULL;
}

const void* image_of(const void* data) {
    if (is_elf(data)) return data;
    if (*(const uint32_t*)data == WRAPPER) data = ((const void* const*)data)[1];
    const struct { uint32_t magic; uint16_t version, header; uint64_t size; }* fat = data;
    if (fat->magic != FAT_BINARY) return NULL;
    const char *place = (const char*)data + fat->header, *end = place + fat->size;
    while (place < end) {
        const Entry* entry = (const Entry*)place;
        if (entry->kind == ELF_KIND && entry->architecture == ARCHITECTURE) return unpacked(entry);
        place += entry->header + entry->size;
    }
    return NULL;
}

static const Elf64_Shdr* section(const char* image, const char* prefix, const char* name) {
    const Elf64_Ehdr* head = (const Elf64_Ehdr*)image;
    const Elf64_Shdr* all = (const Elf64_Shdr*)(image + head->e_shoff);
    const char* names = image + all[head->e_shstrndx].sh_offset;
    for (int i = 0; i < head->e_shnum; i++) {
        const char* here = names + all[i].sh_name;
        if (!strncmp(here, prefix, strlen(prefix)) && !strcmp(here + strlen(prefix), name)) return &all[i];
    }
    return NULL;
}

// Call `take` with each attribute of a section of .nv.info.
static void each_attribute(const char* image, const Elf64_Shdr* info, void (*take)(int, const uint32_t*, const char*, Kernel*), Kernel* kernel) {
    if (!info) return;
    const unsigned char *place = (const unsigned char*)image + info->sh_offset, *end = place + info->sh_size;
    while (place + 4 <= end) {
        if (place[0] == SIZED) take(place[1], (const uint32_t*)(place + 4), image, kernel);
        place += 4 + (place[0] == SIZED ? *(const uint16_t*)(place + 2) : 0);
    }
}

static void take_own(int attribute, const uint32_t* words, const char* image, Kernel* kernel) {
    (void)image;
    if (attribute == MOST_THREADS) kernel->most_threads = (int)words[0];
    if (attribute != PARAMETER) return;
    int ordinal = words[1] & 0xffff;
    if (ordinal >= MOST_PARAMETERS) return;
    kernel->offsets[ordinal] = (int)(words[1] >> 16);
    kernel->sizes[ordinal] = (int)(words[2] >> 18);
    if (ordinal >= kernel->parameters) kernel->parameters = ordinal + 1;
}

static const Elf64_Sym* symbols_of(const char* image, size_t* count, const char** names) {
    const Elf64_Shdr *table = section(image, ".symtab", ""), *strings = section(image, ".strtab", "");
    *count = table && strings ? table->sh_size / sizeof(Elf64_Sym) : 0;
    *names = strings ? image + strings->sh_offset : NULL;
    return table ? (const Elf64_Sym*)(image + table->sh_offset) : NULL;
}

static void take_common(int attribute, const uint32_t* words, const char* image, Kernel* kernel) {
    size_t count;
    const char* names;
    const Elf64_Sym* symbols = symbols_of(image, &count, &names);
    if (attribute == REGISTERS && words[0] < count && !strcmp(names + symbols[words[0]].st_name, kernel->name)) kernel->registers = (int)words[1];
}

bool describe_kernel(const void* image, Kernel* kernel) {
    kernel->parameters = -1, kernel->registers = 32, kernel->most_threads = 1024;
    if (!image) return true;
    if (!section(image, ".text.", kernel->name)) return false;
    const Elf64_Shdr* shared = section(image, ".nv.shared.", kernel->name);
    kernel->parameters = 0;
    // The section holds what the system reserves too, which counts against no limit of a block.
    int reserved = device_attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK), found = shared ? (int)shared->sh_size : 0;
    kernel->static_shared = found > reserved ? found - reserved : 0;
    each_attribute(image, section(image, ".nv.info.", kernel->name), take_own, kernel);
    each_attribute(image, section(image, ".nv.info", ""), take_common, kernel);
    return true;
}

size_t size_of_symbol(const void* image, const char* name) {
    size_t count;
    const char* names;
    const Elf64_Sym* symbols = image ? symbols_of(image, &count, &names) : NULL;
    for (size_t i = 0; symbols && i < count; i++)
        if (!strcmp(names + symbols[i].st_name, name)) return symbols[i].st_size;
    return 0;
}

size_t size_of_elf(const void* image) {
    const Elf64_Ehdr* head = image;
    size_t end = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize, programs = head->e_phoff + (size_t)head->e_phnum * head->e_phentsize;
    const Elf64_Shdr* all = (const Elf64_Shdr*)((const char*)image + head->e_shoff);
    for (int i = 0; i < head->e_shnum; i++)
        if (all[i].sh_type != SHT_NOBITS && all[i].sh_offset + all[i].sh_size > end) end = all[i].sh_offset + all[i].sh_size;
    return end > programs ? end : programs;
}
