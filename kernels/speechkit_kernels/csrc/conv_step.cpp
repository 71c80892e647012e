// The arithmetic of speechkit::conv_step, compiled once per instruction set.
//
// An element of the result is the same sum of products, in the same order, wherever its frame and its row stand in the
// call: so a stream's frames are equal bit for bit alone and in a batch, in chunks of any size, on any number of threads.
#include "conv_step.h"

#include "simd.h"

namespace speechkit {
namespace SPEECHKIT_ISA {
namespace {

constexpr int64_t group = 4;  // vectors of a block: a block of 64 floats keeps 94 frames in 24 KB of first-level cache

template <class T>
struct Step {
  using Vector = typename Computed<T>::Vector;
  using Scalar = typename Computed<T>::Scalar;
  static constexpr int64_t lanes = Computed<T>::width, width = group * lanes;

  const ConvStep& c;

  static const T* at(const void* data, int64_t offset) { return static_cast<const T*>(data) + offset; }
  static T* at(void* data, int64_t offset) { return static_cast<T*>(data) + offset; }

  // Channels of the vector that begins at `channel`: all lanes, or what is left of D.
  int present(int64_t channel) const { return static_cast<int>(c.D - channel < lanes ? c.D - channel : lanes); }

  int64_t vectors(int64_t first) const {
    const int64_t left = (c.D - first + lanes - 1) / lanes;
    return left < group ? left : group;
  }

  static void pack(ConvStep& c, Scalar* memory) { rearrange(c, memory); }

  static void rearrange(ConvStep& c, Scalar* memory) {
    c.taps_block = c.K * width;
    c.taps_row = width;
    c.taps = memory;
    for (int64_t first = 0; first < c.D; first += width)
      for (int64_t k = 0; k < c.K; ++k, memory += width)
        for (int64_t v = 0; v < Step{c}.vectors(first); ++v)
          store(memory + v * lanes, Step{c}.tap(first + v * lanes, k));
  }

  Vector tap(int64_t channel, int64_t k) const {
    const T* from = at(c.weight, channel * c.weight_channel + k * c.weight_tap);
    const int n = present(channel);
    if (c.weight_channel == 1) return load(from, n);
    T gathered[lanes] = {};
    for (int i = 0; i < n; ++i) gathered[i] = from[i * c.weight_channel];
    return load(gathered);
  }

  void filter(int64_t b, int64_t block, Scalar* seen, Scalar* y) const {
    const int64_t first = block * width, count = vectors(first), frames = c.qlen[b], past = c.K - 1;
    recall(b, first, count, seen);
    for (int64_t t = 0; t < frames; ++t) gate(b, t, first, count, seen + (past + t) * width);
    remember(b, first, count, seen + frames * width);
    const Scalar* taps = static_cast<const Scalar*>(c.taps) + block * c.taps_block;
    int64_t t = 0;
    for (; t + 8 <= frames; t += 8)
      for (int64_t v = 0; v < count; ++v) convolve<8, 1>(b, t, first, v, taps, seen, y);
    if (count == group) {
      for (; t + 2 <= frames; t += 2) convolve<2, group>(b, t, first, 0, taps, seen, y);
      for (; t < frames; ++t) convolve<1, group>(b, t, first, 0, taps, seen, y);
    }
    for (; t < frames; ++t)
      for (int64_t v = 0; v < count; ++v) convolve<1, 1>(b, t, first, v, taps, seen, y);
    if (!y)
      for (t = frames; t < c.C; ++t)
        for (int64_t v = 0; v < count; ++v) put(b, t, first + v * lanes, Vector{});
  }

  void recall(int64_t b, int64_t first, int64_t count, Scalar* seen) const {
    for (int64_t k = 0; k + 1 < c.K; ++k, seen += width) {
      const T* from = at(c.cache, c.slots[b] * c.cache_slot + k * c.cache_frame + first);
      for (int64_t v = 0; v < count; ++v) store(seen + v * lanes, load(from + v * lanes, present(first + v * lanes)));
    }
  }

  void remember(int64_t b, int64_t first, int64_t count, const Scalar* seen) const {
    if (c.qlen[b] == 0) return;
    for (int64_t k = 0; k + 1 < c.K; ++k, seen += width) {
      T* to = at(c.cache, c.slots[b] * c.cache_slot + k * c.cache_frame + first);
      for (int64_t v = 0; v < count; ++v) store(to + v * lanes, load(seen + v * lanes), present(first + v * lanes));
    }
  }

  // Rounded as the memory rounds it: a frame counts the same in the call that brings it and in later ones.
  void gate(int64_t b, int64_t t, int64_t first, int64_t count, Scalar* to) const {
    const T* from = at(c.x, b * c.x_row + t * c.x_frame + first);
    for (int64_t v = 0; v < count; ++v, from += lanes) {
      const int n = present(first + v * lanes);
      const Vector value = load(from, n), by = c.gated ? load(from + c.D, n) : value;
      store(to + v * lanes, rounded(value * sigmoid(by), from));
    }
  }

  // Frames t to t + T - 1, V vectors of channels from the v-th of the block on: the sums stay in registers.
  template <int Frames, int V>
  void convolve(int64_t b, int64_t t, int64_t first, int64_t v, const Scalar* taps, const Scalar* seen,
                Scalar* y) const {
    Vector sums[Frames][V];
    for (int j = 0; j < V; ++j) {
      const int64_t channel = first + (v + j) * lanes;
      const Vector start = c.bias ? load(at(c.bias, channel), present(channel)) : Vector{};
      for (int i = 0; i < Frames; ++i) sums[i][j] = start;
    }
    seen += t * width + v * lanes;
    taps += v * lanes;
    int64_t k = 0;
    for (; k + 4 <= c.K; k += 4) add<Frames, V, 4>(sums, taps + k * c.taps_row, seen + k * width);
    for (; k < c.K; ++k) add<Frames, V, 1>(sums, taps + k * c.taps_row, seen + k * width);
    for (int i = 0; i < Frames; ++i)
      for (int j = 0; j < V; ++j) {
        const int64_t channel = first + (v + j) * lanes;
        if (y)
          store(y + (t + i) * c.D + channel, sums[i][j], present(channel));
        else
          put(b, t + i, channel, sums[i][j] * sigmoid(sums[i][j]));
      }
  }

  // The products with some of the taps. Each remembered vector is read once for all of them.
  template <int Frames, int V, int Taps>
  void add(Vector (&sums)[Frames][V], const Scalar* taps, const Scalar* seen) const {
    for (int j = 0; j < V; ++j, taps += lanes, seen += lanes) {
      Vector tap[Taps];
      for (int k = 0; k < Taps; ++k) tap[k] = load(taps + k * c.taps_row);
#pragma GCC unroll 16
      for (int r = 0; r < Frames + Taps - 1; ++r) {
        const Vector frame = load(seen + r * width);
#pragma GCC unroll 4
        for (int k = 0; k < Taps; ++k)
          if (r - k >= 0 && r - k < Frames) sums[r - k][j] += tap[k] * frame;
      }
    }
  }

  void normalise(int64_t b, int64_t t, const Scalar* y) const {
    y += t * c.D;
    if (t >= c.qlen[b]) {
      for (int64_t d = 0; d < c.D; d += lanes) put(b, t, d, Vector{});
      return;
    }
    Vector total{}, squares{};
    for (int64_t d = 0; d < c.D; d += lanes) total += load(y + d, present(d));
    const Scalar mean = sum(total) / c.D;
    for (int64_t d = 0; d < c.D; d += lanes) {
      const int n = present(d);
      const Vector apart = load(y + d, n) - mean;
      squares += n < lanes ? keep_first(apart * apart, n) : apart * apart;
    }
    const Scalar scale = 1 / std::sqrt(sum(squares) / c.D + static_cast<Scalar>(c.eps));
    for (int64_t d = 0; d < c.D; d += lanes) {
      const int n = present(d);
      const Vector z = (load(y + d, n) - mean) * scale * load(at(c.norm_weight, d), n) + load(at(c.norm_bias, d), n);
      put(b, t, d, z * sigmoid(z));
    }
  }

  void put(int64_t b, int64_t t, int64_t channel, Vector x) const {
    store(at(c.out, (b * c.C + t) * c.D + channel), x, present(channel));
  }
};

// Floats that lie tap by tap, [K, D], need no packing where no vector reaches past a row.
template <>
void Step<float>::pack(ConvStep& c, float* memory) {
  if (c.weight_channel != 1 || c.D % lanes) return rearrange(c, memory);
  c.taps_block = width;
  c.taps_row = c.weight_tap;
  c.taps = c.weight;
}

template <class T>
ConvStepKernel kernel() {
  using Scalar = typename Computed<T>::Scalar;
  return {
      Step<T>::width, sizeof(Scalar), 
      [](ConvStep& c, void* memory) { Step<T>::pack(c, static_cast<Scalar*>(memory)); },
      [](const ConvStep& c, int64_t b, int64_t block, void* seen, void* y) {
        Step<T>{c}.filter(b, block, static_cast<Scalar*>(seen), static_cast<Scalar*>(y));
      },
      [](const ConvStep& c, int64_t b, int64_t t, const void* y) {
        Step<T>{c}.normalise(b, t, static_cast<const Scalar*>(y));
      }};
}

}  // namespace

ConvStepKernel conv_step_kernel(Element type) {
  switch (type) {
    case Element::bfloat16:
      return kernel<BFloat16>();
    case Element::float16:
      return kernel<Float16>();
    case Element::float64:
      return kernel<double>();
    default:
      return kernel<float>();
  }
}

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
