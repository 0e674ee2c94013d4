// What was asked of the stub goes to the file that STUB_CUDA_LOG names, a line of JSON each.
#include "stub.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int file = -1;

__attribute__((constructor)) static void open_log(void) {
    const char* path = getenv("STUB_CUDA_LOG");
    // Several processes write to one file: appended lines do not mix.
    if (path && *path) file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

void log_line(const char* line) {
    if (file < 0) return;
    size_t size = strlen(line);
    char* whole = malloc(size + 1);
    memcpy(whole, line, size);
    whole[size] = '\n';
    if (write(file, whole, size + 1) < 0) perror("STUB_CUDA_LOG");
    free(whole);
}

static void say(const char* kind, const char* format, va_list values) {
    char text[512], line[600];
    vsnprintf(text, sizeof text, format, values);
    snprintf(line, sizeof line, "{\"%s\": \"%s\"}", kind, text);
    log_line(line);
}

void note(const char* format, ...) {
    va_list values;
    va_start(values, format);
    say("note", format, values);
    va_end(values);
}

CUresult refuse(CUresult result, const char* format, ...) {
    va_list values;
    va_start(values, format);
    say("refused", format, values);
    va_end(values);
    return result;
}
