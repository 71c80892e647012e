// speechkit::conv_step on NVIDIA GPUs: the choice of a variant of cuda/conv_step.cu, and its arguments.
#include "conv_step_check.h"
#include "gpu.h"

#include <algorithm>

namespace speechkit::gpu {
namespace {

constexpr const Arguments& arguments = conv_step_arguments;
constexpr const char* names[] = {"TYPE", "TAPS", "GATED", "NORM", "EACH", "FRAMES", "THREADS", nullptr};

// Of 65536 registers on a processor and 255 a thread; 32 for all but what the kernel keeps of its channels, as counted
// in what nvcc makes of it.
bool fits(int64_t each, int64_t taps, int64_t frames, int64_t threads) {
  return each * (taps - 1 + 3 * frames) + 32 <= std::min<int64_t>(255, 65536 / threads);
}

int64_t threads_for(int64_t channels, int64_t each, bool norm) {
  const int64_t whole = (channels / each + 31) / 32 * 32;
  return norm ? whole : std::min<int64_t>(whole, 128);
}

// Channels a thread and threads a block go by the model alone, since a norm's sums go by them; where no number of them
// fits, 0. One access of 4 bytes is preferred: threads enough hide the memory's latency.
int64_t channels_each(int64_t D, int64_t K, bool norm, int64_t size, int64_t piece) {
  for (const int64_t bytes : {4, 8, 16, 2}) {
    const int64_t each = bytes / size;
    if (each == 0 || D % each || piece % bytes) continue;
    const int64_t threads = threads_for(D, each, norm);
    if (threads <= 1024 && fits(each, K, 1, threads)) return each;
  }
  return 0;
}

int64_t frames_at_once(int64_t C, int64_t K, int64_t each, int64_t threads) {
  int64_t frames = 1;
  while (frames < 16 && frames < C && fits(each, K, 2 * frames, threads)) frames *= 2;
  return frames;
}

Frames frames(const Tensor& x) {
  const int64_t size = size_of(x.scalar_type());
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * size, x.stride(1) * size};
}

Channels channels(const MaybeTensor& x) {
  if (!x) return {};
  const int64_t size = size_of(x->scalar_type());
  return {static_cast<const char*>(x->const_data_ptr()), x->stride(0) * size, x->dim() > 1 ? x->stride(1) * size : 0};
}

int64_t piece_of(std::initializer_list<Frames> all) {
  int64_t piece = 16;
  for (const Frames& x : all) piece = common_piece({piece, reinterpret_cast<intptr_t>(x.at), x.row, x.frame});
  return piece;
}

void check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& cache, const Tensor& slots,
           const Tensor& qlen, bool gated, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias) {
  check_conv_step(x, weight, bias, cache, gated, norm_weight, norm_bias);
  arguments.device("weight", weight, x);
  arguments.device("cache", cache, x);
  if (bias) arguments.device("bias", *bias, x);
  if (norm_weight) arguments.device("norm_weight", *norm_weight, x), arguments.device("norm_bias", *norm_bias, x);
  arguments.counts("slots", slots, x.size(0), x);
  arguments.counts("qlen", qlen, x.size(0), x);
}

Tensor run(const Tensor& given_x, const Tensor& weight, const MaybeTensor& bias, const Tensor& cache,
           const Tensor& given_slots, const Tensor& given_qlen, bool gated, const MaybeTensor& norm_weight,
           const MaybeTensor& norm_bias, double eps) {
  check(given_x, weight, bias, cache, given_slots, given_qlen, gated, norm_weight, norm_bias);
  const int64_t B = given_x.size(0), C = given_x.size(1), D = weight.size(0), K = weight.size(1);
  const int type = type_number(given_x.scalar_type());
  const bool norm = norm_weight.has_value();
  if (type < 0 || K < 1)
    return plain("speechkit::plain_conv_step", given_x, weight, bias, cache, given_slots, given_qlen, gated, norm_weight,
                 norm_bias, eps);
  const Tensor x = *dense(given_x), slots = *dense(given_slots), qlen = *dense(given_qlen);
  Tensor out = torch::stable::new_empty(x, {B, C, D});
  if (B * C * D == 0) return out;
  const ConvStepArgs args{frames(x), frames(cache), frames(out), channels(weight), channels(bias), channels(norm_weight),
                          channels(norm_bias), counts(slots), counts(qlen), static_cast<int>(C), static_cast<int>(D),
                          static_cast<int>(cache.size(0)), static_cast<float>(eps)};
  const int64_t each = channels_each(D, K, norm, size_of(x.scalar_type()), piece_of({args.x, args.cache, args.out}));
  if (each == 0)
    return plain("speechkit::plain_conv_step", x, weight, bias, cache, slots, qlen, gated, norm_weight, norm_bias, eps);
  const int64_t threads = threads_for(D, each, norm), at_once = frames_at_once(C, K, each, threads);
  const Variant variant{"conv_step", names,
                        {type, static_cast<int>(K), gated, norm, static_cast<int>(each), static_cast<int>(at_once),
                         static_cast<int>(threads)},
                        static_cast<int>(threads), norm ? 2 * threads / 32 * at_once * 4 : 0};
  const Device& device = device_of(x);
  const int64_t slabs = (D / each + threads - 1) / threads;
  launch(device, load(device, variant), variant, {B, slabs, 1}, const_cast<ConvStepArgs*>(&args));
  return out;
}

}  // namespace

const Boxed conv_step = TORCH_BOX(&run);

}  // namespace speechkit::gpu
