// speechkit::linear_step on the CPU: checks, memory, threads. The arithmetic is in linear_step.cpp, the meaning in
// plain.py.
#include "host.h"
#include "isa.h"
#include "linear_step.h"

namespace speechkit {
namespace {

constexpr Arguments arguments("linear_step");
constexpr int64_t grain = 1 << 16;  // numbers of the weight that are worth a thread: about 10 microseconds

LinearStepKernel choose(Weight type) {
  switch (isa()) {
#define SPEECHKIT_CASE(name) \
  case Isa::name:            \
    return name::linear_step_kernel(type);
    SPEECHKIT_ISAS(SPEECHKIT_CASE)
#undef SPEECHKIT_CASE
    default:
      refuse("linear_step: this library has no variant for the instruction set in use.");
  }
}

Weight kind(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return Weight::float32;
    case ScalarType::BFloat16:
      return Weight::bfloat16;
    case ScalarType::Char:
      return Weight::int8;
    default:
      refuse("linear_step: weight must be torch.float32, torch.bfloat16 or torch.int8, but is ",
             dtype_text(weight.scalar_type()), ".");
  }
}

void check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& scale) {
  arguments.shape("weight", weight, {-1, -1});
  const int64_t N = weight.size(0), K = weight.size(1);
  arguments.dtype("x", x, ScalarType::Float);
  if (x.dim() == 0 || x.size(-1) != K)
    refuse("linear_step: x must be [..., ", K, "], but has the shape ", shape_text(x.sizes()), ".");
  if ((kind(weight) == Weight::int8) != scale.has_value())
    refuse("linear_step: scale must be given with a weight of torch.int8 and with no other, but ",
           scale ? "is given" : "is None", ".");
  if (K > 1 && weight.stride(1) != 1)
    refuse("linear_step: weight must have the numbers of a row side by side, but their stride is ", weight.stride(1),
           "; make it contiguous, once.");
  const auto per_row = [&](const char* name, const MaybeTensor& tensor) {
    if (!tensor) return;
    arguments.shape(name, *tensor, {N});
    arguments.dtype(name, *tensor, ScalarType::Float);
  };
  per_row("bias", bias);
  per_row("scale", scale);
}

// How far apart the rows [..., K] of x are, if that is one number and a row's numbers lie side by side; else -1.
// Dimensions of size 1 have no say: torch lets their strides be anything.
int64_t row_stride(const Tensor& x) {
  int64_t stride = 0, rows = 1;
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) stride = x.stride(d);
    if (x.stride(d) != rows * stride) return -1;
    rows *= x.size(d);
  }
  return x.size(-1) == 1 || x.stride(-1) == 1 ? stride : -1;
}

MaybeTensor dense(const MaybeTensor& tensor) {
  return !tensor || tensor->stride(0) == 1 ? tensor : torch::stable::contiguous(*tensor);
}

const float* data(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Tensor linear_step(const Tensor& given_x, const Tensor& weight, const MaybeTensor& given_bias,
                   const MaybeTensor& given_scale, bool silu) {
  check(given_x, weight, given_bias, given_scale);
  const bool in_rows = row_stride(given_x) >= 0;
  const Tensor x = in_rows ? given_x : torch::stable::contiguous(given_x);
  const MaybeTensor bias = dense(given_bias), scale = dense(given_scale);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t N = weight.size(0), K = weight.size(1);
  sizes.back() = N;
  Tensor out = torch::stable::new_empty(x, sizes);
  if (out.numel() == 0) return out;

  const LinearStepKernel kernel = choose(kind(weight));
  LinearStep l{out.numel() / N, N, K, silu};
  l.x = data(x);
  l.x_row = in_rows ? row_stride(x) : K;
  l.weight = weight.const_data_ptr();
  l.weight_row = weight.stride(0);
  l.scale = data(scale);
  l.bias = data(bias);
  l.out = static_cast<float*>(out.mutable_data_ptr());
  thread_local Scratch packed;
  l.packed = static_cast<float*>(packed.get(l.M * (K + kernel.width) * sizeof(float)));
  kernel.pack(l);
  const int64_t panels = (N + kernel.panel - 1) / kernel.panel;
  torch::stable::parallel_for(0, panels, 1 + grain / (kernel.panel * K + 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernel.run(l, i);
  });
  return out;
}

}  // namespace
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("linear_step", TORCH_BOX(&speechkit::linear_step)); }
