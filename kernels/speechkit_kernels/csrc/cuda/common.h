// What the kernels share beside prim.h.
#ifndef SPEECHKIT_COMMON
#define SPEECHKIT_COMMON
#include "args.h"

#define UNROLLED _Pragma("unroll")  // where an array must stay in registers
constexpr float LOG2E = 1.4426950408889634f;

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int most(int a, int b) { return a > b ? a : b; }
DEVICE float most(float a, float b) { return a > b ? a : b; }

DEVICE long long count(const Counts& counts, int b) {
    return counts.wide ? load_global<long long>(counts.at + 8ll * b) : load_global<int>(counts.at + 4ll * b);
}
#endif
