// speechkit::conv_step on the CPU: checks, memory, threads. The arithmetic is in conv_step.cpp, the meaning in plain.py.
#include "conv_step.h"
#include "conv_step_check.h"
#include "isa.h"

#include <algorithm>

namespace speechkit {
namespace {

constexpr const Arguments& arguments = conv_step_arguments;
constexpr int64_t grain = 1 << 15;  // products that are worth a thread: about 10 microseconds

ConvStepKernel choose(Element type) {
  switch (isa()) {
#define SPEECHKIT_CASE(name) \
  case Isa::name:            \
    return name::conv_step_kernel(type);
    SPEECHKIT_ISAS(SPEECHKIT_CASE)
#undef SPEECHKIT_CASE
    default:
      refuse("conv_step: this library has no variant for the instruction set in use.");
  }
}

Element element(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    case ScalarType::Double:
      return Element::float64;
    default:
      refuse("conv_step: x must be float32, bfloat16, float16 or float64, but is ", dtype_text(x.scalar_type()), ".");
  }
}

const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

void run(const ConvStep& c, const ConvStepKernel& kernel, void* filtered) {
  thread_local Scratch scratch;
  const int64_t blocks = (c.D + kernel.width - 1) / kernel.width, work = c.C * c.D * (c.K + 16);
  const int64_t seen = (c.K - 1 + c.C) * kernel.width * kernel.bytes;
  const auto y = [&](int64_t b) {
    return filtered ? static_cast<char*>(filtered) + b * c.C * c.D * kernel.bytes : nullptr;
  };
  const auto filter = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernel.filter(c, i / blocks, i % blocks, scratch.get(seen), y(i / blocks));
  };
  const auto normalise = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernel.normalise(c, i / c.C, i % c.C, y(i / c.C));
  };
  if (c.B >= torch::stable::get_num_threads()) {  // a row's frames are normalised while they are near
    torch::stable::parallel_for(0, c.B, 1 + grain / work, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        filter(b * blocks, (b + 1) * blocks);
        if (filtered) normalise(b * c.C, (b + 1) * c.C);
      }
    });
  } else {
    torch::stable::parallel_for(0, c.B * blocks, 1 + grain * blocks / work, filter);
    if (filtered) torch::stable::parallel_for(0, c.B * c.C, 1 + grain / (16 * c.D), normalise);
  }
}

Tensor conv_step(const Tensor& given_x, const Tensor& weight, const MaybeTensor& given_bias, const Tensor& cache,
                 const Tensor& slots, const Tensor& qlen, bool gated, const MaybeTensor& given_norm_weight,
                 const MaybeTensor& given_norm_bias, double eps) {
  check_conv_step(given_x, weight, given_bias, cache, gated, given_norm_weight, given_norm_bias);
  const Tensor x = *dense(given_x);
  const MaybeTensor bias = dense(given_bias), norm_weight = dense(given_norm_weight), norm_bias = dense(given_norm_bias);
  const int64_t B = x.size(0), C = x.size(1), D = weight.size(0), K = weight.size(1);
  const std::vector<int64_t> slot = arguments.integers("slots", slots, B, 0, cache.size(0) - 1);
  const std::vector<int64_t> length = arguments.integers("qlen", qlen, B, 0, C);
  const ConvStepKernel kernel = choose(element(x));
  Tensor out = torch::stable::new_empty(x, {B, C, D});
  if (B * C * D == 0) return out;

  thread_local Scratch taps, filtered;
  ConvStep c{B, C, D, K, gated, eps};
  c.x = x.const_data_ptr();
  c.x_row = x.stride(0);
  c.x_frame = x.stride(1);
  c.weight = weight.const_data_ptr();
  c.weight_channel = weight.stride(0);
  c.weight_tap = weight.stride(1);
  c.bias = data(bias);
  c.cache = cache.mutable_data_ptr();
  c.cache_slot = cache.stride(0);
  c.cache_frame = cache.stride(1);
  c.slots = slot.data();
  c.qlen = length.data();
  c.norm_weight = data(norm_weight);
  c.norm_bias = data(norm_bias);
  c.out = out.mutable_data_ptr();
  kernel.pack(c, taps.get((D + kernel.width - 1) / kernel.width * kernel.width * K * kernel.bytes));
  run(c, kernel, norm_weight ? filtered.get(B * C * D * kernel.bytes) : nullptr);
  return out;
}

}  // namespace
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("conv_step", TORCH_BOX(&speechkit::conv_step)); }
