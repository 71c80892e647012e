// speechkit::linear_step on the CPU: checks, memory, threads. The arithmetic is in linear_step.cpp, the meaning in
// plain.py.
#include "host.h"
#include "isa.h"
#include "linear_step.h"

namespace speechkit {
namespace {

constexpr Arguments arguments("linear_step");
constexpr int64_t columns = 16;     // of a panel of a packed weight
constexpr int64_t grain = 1 << 16;  // numbers of the weight that are worth a thread: about 10 microseconds

LinearStepKernel choose(Weight type, bool packed, int64_t rows) {
  switch (isa()) {
#define SPEECHKIT_CASE(name) \
  case Isa::name:            \
    return packed ? name::linear_step_packed_kernel(type, rows) : name::linear_step_kernel(type);
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

// Numbers of a row of the result, and of x. Where the last panel of a packed weight ends the bias alone tells.
std::pair<int64_t, int64_t> sizes(const Tensor& weight, const MaybeTensor& bias) {
  if (weight.dim() != 3) {
    arguments.shape("weight", weight, {-1, -1});
    return {weight.size(0), weight.size(1)};
  }
  arguments.shape("weight", weight, {-1, -1, columns});
  const int64_t all = weight.size(0) * columns, N = bias && bias->dim() == 1 ? bias->size(0) : all;
  if (N > all || N + columns <= all)
    refuse("linear_step: bias must have ", all - columns + 1, " to ", all,
           " numbers with a packed weight of the shape ", shape_text(weight.sizes()), ", or be None, but has ", N, ".");
  return {N, weight.size(1)};
}

std::vector<int64_t> sizes_of_result(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return sizes;
}

struct Options {
  MaybeTensor bias, scale, norm_weight, norm_bias, add;
};

void check(const Tensor& x, const Tensor& weight, int64_t N, int64_t K, const Options& options) {
  const MaybeTensor& scale = options.scale;
  arguments.dtype("x", x, ScalarType::Float);
  if (x.dim() == 0 || x.size(-1) != K)
    refuse("linear_step: x must be [..., ", K, "], but has the shape ", shape_text(x.sizes()), ".");
  if ((kind(weight) == Weight::int8) != scale.has_value())
    refuse("linear_step: scale must be given with a weight of torch.int8 and with no other, but ",
           scale ? "is given" : "is None", ".");
  if (weight.dim() == 3 && !weight.is_contiguous())
    refuse("linear_step: weight must be contiguous where it is packed; make it so, once.");
  if (weight.dim() == 2 && K > 1 && weight.stride(1) != 1)
    refuse("linear_step: weight must have the numbers of a row side by side, but their stride is ", weight.stride(1),
           "; make it contiguous, once.");
  if (options.norm_weight.has_value() != options.norm_bias.has_value())
    refuse("linear_step: norm_weight and norm_bias must be given together, but one is None.");
  const auto vector = [&](const char* name, const MaybeTensor& tensor, int64_t count) {
    if (!tensor) return;
    arguments.shape(name, *tensor, {count});
    arguments.dtype(name, *tensor, ScalarType::Float);
  };
  vector("bias", options.bias, N);
  vector("scale", scale, N);
  vector("norm_weight", options.norm_weight, K);
  vector("norm_bias", options.norm_bias, K);
  if (!options.add) return;
  const auto given = options.add->sizes();
  const std::vector<int64_t> sizes = sizes_of_result(x, N), found(given.begin(), given.end());
  if (found != sizes)
    refuse("linear_step: add must be ", shape_text(sizes), ", but has the shape ", shape_text(found), ".");
  arguments.dtype("add", *options.add, ScalarType::Float);
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

// x with its rows [..., K] at one distance from each other, and that distance.
std::pair<Tensor, int64_t> in_rows(const Tensor& x) {
  const int64_t stride = row_stride(x);
  return stride >= 0 ? std::pair(x, stride) : std::pair(torch::stable::contiguous(x), x.size(-1));
}

MaybeTensor dense(const MaybeTensor& tensor) {
  return !tensor || tensor->stride(0) == 1 ? tensor : torch::stable::contiguous(*tensor);
}

const float* data(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Tensor linear_step(const Tensor& given_x, const Tensor& weight, const MaybeTensor& given_bias,
                   const MaybeTensor& given_scale, bool silu, const MaybeTensor& given_norm_weight,
                   const MaybeTensor& given_norm_bias, double eps, const MaybeTensor& given_add, double factor) {
  const auto [N, K] = sizes(weight, given_bias);
  check(given_x, weight, N, K, {given_bias, given_scale, given_norm_weight, given_norm_bias, given_add});
  const auto [x, x_row] = in_rows(given_x);
  const MaybeTensor bias = dense(given_bias), scale = dense(given_scale);
  const MaybeTensor norm_weight = dense(given_norm_weight), norm_bias = dense(given_norm_bias);
  Tensor out = torch::stable::new_empty(x, sizes_of_result(x, N));
  if (out.numel() == 0) return out;

  LinearStep l{out.numel() / N, N, K, silu};
  const LinearStepKernel kernel = choose(kind(weight), weight.dim() == 3, l.M);
  l.x = data(x);
  l.x_row = x_row;
  l.weight = weight.const_data_ptr();
  l.weight_row = weight.stride(0);
  l.scale = data(scale);
  l.bias = data(bias);
  l.norm_weight = data(norm_weight);
  l.norm_bias = data(norm_bias);
  l.eps = static_cast<float>(eps);
  l.factor = static_cast<float>(factor);
  std::optional<std::pair<Tensor, int64_t>> add;
  if (given_add) {
    add = in_rows(*given_add);
    l.add = data(add->first);
    l.add_row = add->second;
  }
  l.out = static_cast<float*>(out.mutable_data_ptr());
  thread_local Scratch laid;
  l.laid = static_cast<float*>(laid.get(l.M * (K + kernel.spare) * sizeof(float)));
  kernel.lay(l);
  const int64_t stretch = kernel.stretch, stretches = (N + stretch - 1) / stretch;
  torch::stable::parallel_for(0, stretches, 1 + grain / (stretch * K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * stretch, left = l.N - first;
      kernel.run(l, first, left < stretch ? left : stretch);
    }
  });
  return out;
}

}  // namespace
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("linear_step", TORCH_BOX(&speechkit::linear_step)); }
