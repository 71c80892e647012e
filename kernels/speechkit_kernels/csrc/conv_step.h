// The convolution step of one call: what to read and write, and the parts that a kernel consists of. No header of torch's
// or of the C++ library's is included, see build.py.
#pragma once

#include <cstdint>

namespace speechkit {

enum class Element { float32, bfloat16, float16, float64 };

// All pointers are to `Element`s, but for what says otherwise; channels lie side by side, other strides count elements.
struct ConvStep {
  int64_t B, C, D, K;
  bool gated;
  double eps;

  const void* x;
  int64_t x_row, x_frame;
  const void* weight;
  int64_t weight_channel, weight_tap;
  const void* bias;  // null: none
  void* cache;
  int64_t cache_slot, cache_frame;
  const int64_t *slots, *qlen;
  const void *norm_weight, *norm_bias;  // null: none
  void* out;                            // [B, C, D]

  // Tap k of the channels of a block, in the type of the computation, is at block * taps_block + k * taps_row.
  const void* taps;
  int64_t taps_block, taps_row;
};

// A kernel works on blocks of `width` channels. Scratch memory is aligned to 64 bytes.
struct ConvStepKernel {
  int64_t width;
  int64_t bytes;  // of an element while it is computed with

  // Sets the taps: where `weight` is, if it can be read as it lies, or in `memory` for [blocks, K, width].
  void (*pack)(ConvStep&, void* memory);

  // Gates the new frames of row b, filters them and moves the memory on, for one block of channels. `seen` is scratch
  // for [K - 1 + C, width]; the filtered frames go to `y`, [C, D], or through SiLU to `out` where that is null.
  void (*filter)(const ConvStep&, int64_t b, int64_t block, void* seen, void* y);

  // Layer norm and SiLU of frame t of row b, from its place in `y` to `out`.
  void (*normalise)(const ConvStep&, int64_t b, int64_t t, const void* y);
};

#define SPEECHKIT_DECLARE(name)              \
  namespace name {                           \
  ConvStepKernel conv_step_kernel(Element);  \
  }
SPEECHKIT_ISAS(SPEECHKIT_DECLARE)
#undef SPEECHKIT_DECLARE

}  // namespace speechkit
