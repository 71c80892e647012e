// stream_attn.cu as a host library. Compile with the variant's constants, -I of csrc/cuda and csrc/emu.
#include "prim_emu.h"
#include "stream_attn.cu"

extern "C" const char* stream_attn_emulated(const Args* args, const int* grid, int shared_bytes, unsigned seed,
                                            const emu::Range* tensors, int count) {
    return emu::launch([](const void* args) { stream_attn(*static_cast<const Args*>(args)); }, args, grid, THREADS, shared_bytes, seed, tensors, count);
}
