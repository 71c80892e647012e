// One output frame of a subsampling step: what to read and write, and the kernel. No header of torch's or of the C++
// library's is included, see build.py.
#pragma once

#include <cstdint>

namespace speechkit {

// Channels lie side by side, bands are apart by so many floats.
struct SubsampleFrame {
  const float* frames[3];  // null: zeros, then those after it are null too
  int64_t bands, band;
  bool one_channel;  // of the input, which every output channel hears; else each hears its own

  // For each vector of output channels, nine taps (frame by frame, band by band) and the bias; zeros past the last
  // channel.
  const float* packed;
  int64_t before;  // zeros before the first band
  bool relu;

  float* out;
  int64_t out_bands, out_band, channels;
};

struct SubsampleStepKernel {
  int64_t width;  // floats of a vector
  void (*run)(const SubsampleFrame&);
};

#define SPEECHKIT_DECLARE(name)                \
  namespace name {                             \
  SubsampleStepKernel subsample_step_kernel(); \
  }
SPEECHKIT_ISAS(SPEECHKIT_DECLARE)
#undef SPEECHKIT_DECLARE

}  // namespace speechkit
