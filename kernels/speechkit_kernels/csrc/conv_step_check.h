// What conv_step's arguments must be, as far as shapes and types tell.
#pragma once

#include "host.h"

namespace speechkit {

constexpr Arguments conv_step_arguments("conv_step");

inline void check_conv_step(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& cache, bool gated,
                            const MaybeTensor& norm_weight, const MaybeTensor& norm_bias) {
  conv_step_arguments.shape("weight", weight, {-1, -1});
  const int64_t D = weight.size(0), K = weight.size(1);
  conv_step_arguments.shape("x", x, {-1, -1, gated ? 2 * D : D});
  conv_step_arguments.shape("cache", cache, {-1, K - 1, D});
  if (norm_weight.has_value() != norm_bias.has_value())
    refuse("conv_step: norm_weight and norm_bias must be given together, but one is None.");
  const auto same = [&](const char* name, const MaybeTensor& tensor) {
    if (!tensor) return;
    conv_step_arguments.shape(name, *tensor, {D});
    conv_step_arguments.dtype(name, *tensor, x.scalar_type());
  };
  same("bias", bias);
  same("norm_weight", norm_weight);
  same("norm_bias", norm_bias);
  conv_step_arguments.dtype("weight", weight, x.scalar_type());
  conv_step_arguments.dtype("cache", cache, x.scalar_type());
  if (D > 1 && cache.stride(2) != 1)
    refuse("conv_step: cache must have its channels side by side, but their stride is ", cache.stride(2), ".");
}

// Rows side by side, which is how the kernel reads them.
inline MaybeTensor dense(const MaybeTensor& tensor) {
  return !tensor || tensor->stride(-1) == 1 ? tensor : torch::stable::contiguous(*tensor);
}

}  // namespace speechkit
