// Tile registers of x86 (AMX): eight matrices of 16 rows of 64 bytes, and the product of two of bfloat16. Written as
// instructions, because the compilers' own functions want a tile's number as a literal, and older compilers lack them.
#ifndef SPEECHKIT_TILES_H
#define SPEECHKIT_TILES_H
#include <cstdint>

namespace {

inline void tiles_configure(const void* shapes) { asm volatile("ldtilecfg (%0)" ::"r"(shapes) : "memory"); }
inline void tiles_release() { asm volatile("tilerelease"); }

template <int tile>
void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// Rows of 64 bytes that begin `step` bytes apart.
template <int tile>
void tile_load(const void* at, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(step), "i"(tile) : "memory");
}
template <int tile>
void tile_store(void* at, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(step), "i"(tile) : "memory");
}

// sum[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1] over k: pairs of bfloat16 in a row of both, floats in sum.
template <int sum, int a, int b>
void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

}  // namespace
#endif
