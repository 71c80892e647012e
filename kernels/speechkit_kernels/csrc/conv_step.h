// The convolution step of one call, as pointers and strides: no header of torch's, see build.py.
#pragma once

#include <cstdint>

namespace speechkit {

struct ConvStep {
  const float* x;
};

#define SPEECHKIT_DECLARE(name)     \
  namespace name {                  \
  const char* conv_step();          \
  }
SPEECHKIT_ISAS(SPEECHKIT_DECLARE)
#undef SPEECHKIT_DECLARE

}  // namespace speechkit
