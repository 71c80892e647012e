// The linear map of one call: what to read and write, and the parts that a kernel consists of. No header of torch's or
// of the C++ library's is included, see build.py.
#pragma once

#include <cstdint>

namespace speechkit {

enum class Weight { float32, bfloat16, int8 };

// Numbers of a row lie side by side in all of these; rows are apart by `x_row`, `weight_row` and `add_row`
// elements.
struct LinearStep {
  int64_t M, N, K;  // rows of x, rows of the weight, what both are long
  bool silu;

  const float* x;
  int64_t x_row;
  const void* weight;
  int64_t weight_row;
  const float *scale, *bias;  // [N] each; null: none

  const float *norm_weight, *norm_bias;  // [K] each; null: x is not normed
  float eps;
  const float* add;  // rows of N; null: nothing is added
  int64_t add_row;
  float factor;  // of what is added to `add`
  float* out;    // [M, N]

  // x as the kernel reads it, M rows of K rounded up to whole vectors: `pack` makes it from `x`. Aligned to 64 bytes.
  float* packed;
};

// A kernel works on panels, `panel` rows of the weight; the last one may have less.
struct LinearStepKernel {
  int64_t panel;
  int64_t width;  // floats of a vector

  void (*pack)(const LinearStep&);
  void (*run)(const LinearStep&, int64_t panel);
};

#define SPEECHKIT_DECLARE(name)                  \
  namespace name {                               \
  LinearStepKernel linear_step_kernel(Weight);   \
  }
SPEECHKIT_ISAS(SPEECHKIT_DECLARE)
#undef SPEECHKIT_DECLARE

}  // namespace speechkit
