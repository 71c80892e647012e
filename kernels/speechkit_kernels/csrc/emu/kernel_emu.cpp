// A kernel as a host library. Compile with the variant's constants, -I of csrc/cuda and csrc/emu, KERNEL_NAME its name and
// KERNEL_SOURCE its file.
#include "prim_emu.h"
#include KERNEL_SOURCE

// What the launcher allocates itself.
inline emu::Range output(const StreamAttnArgs& a, const int*) { return {a.out.at, a.streams * a.out.batch, true}; }
inline emu::Range output(const ConvStepArgs& a, const int* grid) { return {a.out.at, grid[0] * a.out.row, true}; }

#ifdef STAGES
constexpr int MORE = (STAGES - 2) * (STAGE + QUERY);  // the launcher counts two
#else
constexpr int MORE = 0;
#endif

// What went wrong, or an empty string.
extern "C" const char* emulated(const void* args, const int* grid, int threads, int shared_bytes, unsigned seed,
                                const emu::Range* tensors, int count) {
    if (threads != THREADS) return "the launch and the kernel differ in their threads";
    std::vector<emu::Range> all(tensors, tensors + count);
    all.push_back(output(*static_cast<const Args*>(args), grid));
    const auto run = [](const void* args) { KERNEL_NAME(*static_cast<const Args*>(args)); };
    return emu::launch(run, args, grid, threads, shared_bytes + MORE, seed, all.data(), int(all.size()));
}
