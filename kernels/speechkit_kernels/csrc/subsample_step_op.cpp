// speechkit::subsample_step on the CPU: checks, memory, threads. The arithmetic is in subsample_step.cpp, the meaning
// in plain.py.
#include "host.h"
#include "isa.h"
#include "subsample_step.h"

#include <algorithm>
#include <cstring>

namespace speechkit {
namespace {

constexpr Arguments arguments("subsample_step");
constexpr int64_t grain = 1 << 16;  // products that are worth a thread: about 10 microseconds

SubsampleStepKernel choose() {
  switch (isa()) {
#define SPEECHKIT_CASE(name) \
  case Isa::name:            \
    return name::subsample_step_kernel();
    SPEECHKIT_ISAS(SPEECHKIT_CASE)
#undef SPEECHKIT_CASE
    default:
      refuse("subsample_step: this library has no variant for the instruction set in use.");
  }
}

// Whether the bands and channels [..., F, C] of a frame lie side by side. Torch lets the stride of a size 1 be anything.
bool dense_frames(const Tensor& x) {
  const int64_t bands = x.size(2), channels = x.size(3);
  return (channels == 1 || x.stride(3) == 1) && (bands == 1 || x.stride(2) == channels);
}

void check_filters(const char* name, const Tensor& weight, const char* bias_name, const MaybeTensor& bias) {
  arguments.shape(name, weight, {-1, 3, 3});
  arguments.dtype(name, weight, ScalarType::Float);
  if (!bias) return;
  arguments.shape(bias_name, *bias, {weight.size(0)});
  arguments.dtype(bias_name, *bias, ScalarType::Float);
}

void check_tail(const char* name, const Tensor& tail, Shape shape) {
  arguments.shape(name, tail, shape);
  arguments.dtype(name, tail, ScalarType::Float);
  if (!dense_frames(tail))
    refuse("subsample_step: ", name, " must have the bands and channels of a frame side by side, but their strides ",
           "are ", tail.stride(2), " and ", tail.stride(3), "; make it contiguous.");
}

void check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& tail,
           const MaybeTensor& depthwise, const MaybeTensor& depthwise_bias, const MaybeTensor& depthwise_tail) {
  check_filters("weight", weight, "bias", bias);
  arguments.shape("x", x, {-1, -1, -1, -1});
  arguments.dtype("x", x, ScalarType::Float);
  const int64_t B = x.size(0), F = x.size(2), C = x.size(3), D = weight.size(0);
  if (C != 1 && C != D) refuse("subsample_step: x must have 1 channel or the ", D, " of weight, but has ", C, ".");
  check_tail("tail", tail, {B, -1, F, C});
  const int64_t S = tail.size(1);
  if (S != 1 && S != 2) refuse("subsample_step: tail must hold 1 or 2 frames, but holds ", S, ".");
  if (depthwise.has_value() != depthwise_tail.has_value() || (depthwise_bias && !depthwise))
    refuse("subsample_step: depthwise and depthwise_tail must be given together, and depthwise_bias only with them, ",
           "but one is None.");
  if (!depthwise) return;
  check_filters("depthwise", *depthwise, "depthwise_bias", depthwise_bias);
  arguments.shape("depthwise", *depthwise, {D, 3, 3});
  check_tail("depthwise_tail", *depthwise_tail, {B, S, (F + S) / 2, D});
}

const float* data(const MaybeTensor& x) { return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr; }

// Frames [B, frames, bands, channels] where bands and channels lie side by side.
template <class Float>
struct Frames {
  Float* at;
  int64_t row, frame, bands, channels;

  Frames(Float* data, const Tensor& x)
      : at(data), row(x.stride(0)), frame(x.stride(1)), bands(x.size(2)), channels(x.size(3)) {}
  Float* operator()(int64_t b, int64_t t) const { return at + b * row + t * frame; }
  int64_t bytes() const { return bands * channels * sizeof(float); }
};

Frames<const float> frames(const Tensor& x) { return {data(x), x}; }
Frames<float> writable(const Tensor& x) { return {static_cast<float*>(x.mutable_data_ptr()), x}; }

// As SubsampleFrame::packed says.
void pack(const Tensor& weight, const MaybeTensor& bias, int64_t width, float* to) {
  const int64_t D = weight.size(0), apart = weight.stride(0), frame = weight.stride(1), band = weight.stride(2);
  const float *taps = data(weight), *biases = data(bias);
  const int64_t bias_apart = bias ? bias->stride(0) : 0;
  for (int64_t first = 0; first < D; first += width, to += 10 * width) {
    const int64_t count = std::min(width, D - first);
    std::memset(to, 0, 10 * width * sizeof(float));
    for (int64_t k = 0; k < 9; ++k)
      for (int64_t i = 0; i < count; ++i) to[k * width + i] = taps[(first + i) * apart + k / 3 * frame + k % 3 * band];
    for (int64_t i = 0; biases && i < count; ++i) to[9 * width + i] = biases[(first + i) * bias_apart];
  }
}

struct Call {
  SubsampleStepKernel kernel;
  const std::vector<int64_t>& lengths;
  Frames<const float> x;
  Frames<float> tail, out;
  const float* packed;
  int64_t before, out_frames, channels;
  bool relu;

  // Where frame t of row b begins, counted from the first new one; null past the last.
  const float* frame(int64_t b, int64_t t) const {
    if (t < 0) return tail(b, t + before);
    return t < lengths[b] ? x(b, t) : nullptr;
  }

  // Frame t of the convolution by `weight`, some channels of it: to `to`, where bands are `apart`.
  void convolve(int64_t b, int64_t t, int64_t first, int64_t count, float* to, int64_t apart) const {
    const bool one = x.channels == 1;
    const auto heard = [&](int64_t i) {
      const float* from = frame(b, 2 * t - before + i);
      return one || !from ? from : from + first;
    };
    kernel.run({{heard(0), heard(1), heard(2)}, x.bands, x.channels, one, packed + 10 * first, before, relu, to,
                (x.bands + before) / 2, apart, count});
  }

  void clear(int64_t b, int64_t t) const { std::memset(out(b, t), 0, out.bytes()); }

  // The last frames go to the memory, in ascending order, so that none is overwritten before it is read.
  void remember(int64_t b) const {
    for (int64_t k = 0; k < before && lengths[b]; ++k)
      std::memcpy(tail(b, k), frame(b, lengths[b] + k - before), tail.bytes());
  }

  void run() const {
    const int64_t work = 1 + 9 * out.bands * channels;
    torch::stable::parallel_for(0, lengths.size() * out_frames, 1 + grain / work, [&](int64_t i, int64_t last) {
      for (; i < last; ++i) {
        const int64_t b = i / out_frames, t = i % out_frames;
        2 * t < lengths[b] ? convolve(b, t, 0, channels, out(b, t), channels) : clear(b, t);
      }
    });
  }
};

// The frames between two convolutions are made for a few channels at a time, and no more than three of them are there
// at once: so they stay in the processor's cache, and all of them would be the largest tensor of a whole step.
struct Pair {
  const Call& c;
  Frames<float> tail;
  const float* packed;

  void run() const {
    const int64_t block = 4 * c.kernel.width, blocks = (c.channels + block - 1) / block, B = c.lengths.size();
    const int64_t size = tail.bands * block, work = 1 + 45 * c.out_frames * c.out.bands * block;
    torch::stable::parallel_for(0, B * blocks, 1 + grain / work, [&](int64_t i, int64_t last) {
      thread_local Scratch scratch;
      float* memory = static_cast<float*>(scratch.get(3 * size * sizeof(float)));
      for (; i < last; ++i) {
        const int64_t b = i / blocks, first = i % blocks * block, length = (c.lengths[b] + 1) / 2;
        Block{*this, b, length, first, std::min(block, c.channels - first), block, memory}.run();
      }
    });
  }

  // Some channels of one row. Frame t between the two convolutions is kept until frame t + 3 takes its place.
  struct Block {
    const Pair& p;
    int64_t b, length, first, count, apart;
    float* memory;
    int64_t made = 0;

    void run() {
      const int64_t before = p.c.before;
      for (int64_t k = 0; k < before; ++k) copy(frame(k - before), apart, p.tail(b, k) + first, p.c.channels);
      for (int64_t u = 0; u < p.c.out_frames; ++u) 2 * u < length ? filter(u) : clear(u);
      make(length);
      for (int64_t k = 0; k < before && length; ++k)
        copy(p.tail(b, k) + first, p.c.channels, frame(length + k - before), apart);
    }

    float* frame(int64_t t) const { return memory + (t + 3) % 3 * p.tail.bands * apart; }

    void make(int64_t end) {
      for (; made < std::min(end, length); ++made) p.c.convolve(b, made, first, count, frame(made), apart);
    }

    void filter(int64_t u) {
      const int64_t t = 2 * u - p.c.before;
      make(t + 3);
      const float* last = t + 2 < length ? frame(t + 2) : nullptr;
      p.c.kernel.run({{frame(t), frame(t + 1), last}, p.tail.bands, apart, false, p.packed + 10 * first, p.c.before,
                      false, p.c.out(b, u) + first, p.c.out.bands, p.c.channels, count});
    }

    void clear(int64_t u) const {
      for (int64_t g = 0; g < p.c.out.bands; ++g)
        std::memset(p.c.out(b, u) + g * p.c.channels + first, 0, count * sizeof(float));
    }

    void copy(float* to, int64_t to_apart, const float* from, int64_t from_apart) const {
      for (int64_t f = 0; f < p.tail.bands; ++f)
        std::memcpy(to + f * to_apart, from + f * from_apart, count * sizeof(float));
    }
  };
};

Tensor subsample_step(const Tensor& given_x, const Tensor& weight, const MaybeTensor& bias, const Tensor& tail,
                      const Tensor& given_lengths, bool relu, const MaybeTensor& depthwise,
                      const MaybeTensor& depthwise_bias, const MaybeTensor& depthwise_tail) {
  check(given_x, weight, bias, tail, depthwise, depthwise_bias, depthwise_tail);
  const Tensor x = dense_frames(given_x) ? given_x : torch::stable::contiguous(given_x);
  const int64_t B = x.size(0), T = x.size(1), D = weight.size(0), before = tail.size(1);
  const std::vector<int64_t> lengths = arguments.integers("lengths", given_lengths, B, 0, T);
  int64_t out_frames = (T + 1) / 2, out_bands = (x.size(2) + before) / 2;
  if (depthwise) out_frames = (out_frames + 1) / 2, out_bands = (out_bands + before) / 2;
  Tensor out = torch::stable::new_empty(x, {B, out_frames, out_bands, D});

  const SubsampleStepKernel kernel = choose();
  thread_local Scratch scratch;
  const int64_t floats = 10 * (D + kernel.width);
  float* packed = static_cast<float*>(scratch.get(2 * floats * sizeof(float)));
  pack(weight, bias, kernel.width, packed);
  const Call call{kernel, lengths, frames(x), writable(tail), writable(out), packed, before, out_frames, D, relu};
  if (depthwise) {
    pack(*depthwise, depthwise_bias, kernel.width, packed + floats);
    Pair{call, writable(*depthwise_tail), packed + floats}.run();
  } else {
    call.run();
  }
  for (int64_t b = 0; b < B; ++b) call.remember(b);
  return out;
}

}  // namespace
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("subsample_step", TORCH_BOX(&speechkit::subsample_step)); }
