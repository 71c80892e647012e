// NVIDIA's driver, as far as gpu.cpp calls it, over kernels that kernel_emu.cpp made libraries of: a cubin is such a
// library's path. Also torch's current stream. What a test sets and sees is in `machine`.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace {
struct Range { const char* from; long long bytes; int writable; };
using Emulated = const char* (*)(const void*, const int*, int, int, unsigned, const Range*, int);
struct Function { Emulated run; int shared_bytes = 48 << 10; };  // unless more is asked for

thread_local int inside = 0;  // contexts pushed and not popped
std::string trouble;
enum { FINE = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, LAUNCH_FAILED = 719 };
}  // namespace

extern "C" {
struct Machine {
    int arch, processors, blocks, shared_bytes;          // blocks: on a processor at a time
    int capturing, broken, idle, unchecked;              // broken: no device; idle: launches are noted and not run;
                                                         // unchecked: a kernel may touch all of the memory
    unsigned seed;
    const Range* tensors;                                // what a kernel may touch beside its output
    int count;
    int launches, loads, grid[3], threads, asked_bytes;  // of the last launch
    const void* stream;
} machine;

int cuInit(unsigned) { return machine.broken ? 100 : FINE; }
int cuGetErrorName(int status, const char** name) {
    *name = status == LAUNCH_FAILED ? trouble.c_str() : status == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR";
    return FINE;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, FINE; }
int cuDeviceGetAttribute(int* value, int which, int) {
    switch (which) {
        case 16: return *value = machine.processors, FINE;
        case 75: return *value = machine.arch / 10, FINE;
        case 76: return *value = machine.arch % 10, FINE;
        case 97: return *value = machine.shared_bytes, FINE;
        default: return INVALID_VALUE;
    }
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &machine, FINE; }
int cuCtxPushCurrent_v2(void* context) { return context == &machine ? ++inside, FINE : INVALID_CONTEXT; }
int cuCtxPopCurrent_v2(void**) { return inside-- > 0 ? FINE : INVALID_CONTEXT; }
int cuStreamIsCapturing(void*, int* status) { return *status = machine.capturing, FINE; }
int cuModuleLoadData(void** module, const void* cubin) {
    if (!inside) return INVALID_CONTEXT;
    machine.loads++;
    return (*module = dlopen(static_cast<const char*>(cubin), RTLD_NOW | RTLD_LOCAL)) ? FINE : INVALID_IMAGE;
}
int cuModuleGetFunction(void** function, void* module, const char*) {
    *function = new Function{reinterpret_cast<Emulated>(dlsym(module, "emulated"))};
    return FINE;
}
int cuFuncSetAttribute(void* function, int which, int bytes) {
    if (which != 8 || bytes > machine.shared_bytes) return INVALID_VALUE;
    static_cast<Function*>(function)->shared_bytes = bytes;
    return FINE;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { return *blocks = machine.blocks, FINE; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    if (!inside) return INVALID_CONTEXT;
    const Function& f = *static_cast<Function*>(function);
    if (extra || threads_y != 1 || threads_z != 1 || int(shared_bytes) > f.shared_bytes) return INVALID_VALUE;
    machine.launches++, machine.threads = threads, machine.asked_bytes = shared_bytes, machine.stream = stream;
    machine.grid[0] = x, machine.grid[1] = y, machine.grid[2] = z;
    const Range all{nullptr, PTRDIFF_MAX, true};
    const Range* tensors = machine.unchecked ? &all : machine.tensors;
    trouble = machine.idle ? "" : f.run(parameters[0], machine.grid, threads, shared_bytes, machine.seed, tensors, machine.unchecked ? 1 : machine.count);
    return trouble.empty() ? FINE : LAUNCH_FAILED;
}

int aoti_torch_get_current_cuda_stream(int device, void** stream) {
    return *stream = reinterpret_cast<void*>(size_t(0x5000 + device)), 0;
}
}
