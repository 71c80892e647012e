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
  const void* weight;  // [N, K], or packed: [N / 16 rounded up, K, 16]
  int64_t weight_row;  // of the former
  const float *scale, *bias;  // [N] each; null: none

  const float *norm_weight, *norm_bias;  // [K] each; null: x is not normed
  float eps;
  const float* add;  // rows of N; null: nothing is added
  int64_t add_row;
  float factor;  // of what is added to `add`
  float* out;    // [M, N]

  // x as the kernel reads it, M rows of K and some: `lay` makes it from `x`. Aligned to 64 bytes.
  float* laid;
};

// A kernel works on stretches of the result's columns: each begins at a multiple of `stretch`, the last may have less.
struct LinearStepKernel {
  int64_t stretch;
  int64_t spare;  // floats of `laid` that a row may take beyond K

  void (*lay)(const LinearStep&);
  void (*run)(const LinearStep&, int64_t first, int64_t count);
};

// The packed one is for a weight [P, K, 16], and for `rows` rows of x.
#define SPEECHKIT_DECLARE(name)                                            \
  namespace name {                                                         \
  LinearStepKernel linear_step_kernel(Weight);                             \
  LinearStepKernel linear_step_packed_kernel(Weight, int64_t rows);        \
  }
SPEECHKIT_ISAS(SPEECHKIT_DECLARE)
#undef SPEECHKIT_DECLARE

}  // namespace speechkit
