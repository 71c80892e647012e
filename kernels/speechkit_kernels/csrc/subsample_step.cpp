// The arithmetic of speechkit::subsample_step, compiled once per instruction set.
//
// An element of the result is the bias and then the products of the taps that are there, in one order wherever its
// frame and its row stand: so a row's result is equal bit for bit alone and among others, on any number of threads.
#include "subsample_step.h"

#include "simd.h"

namespace speechkit {
namespace SPEECHKIT_ISA {
namespace {

constexpr int together = lanes == 16 ? 2 : 1;  // neighbouring bands whose sums and factors the registers hold

template <bool OneChannel>
struct Step {
  const SubsampleFrame& s;

  void run() const {
    for (int64_t g = 0; g < s.out_bands;) {
      const int64_t band = 2 * g - s.before, following = s.frames[2] && band >= 0 ? (s.bands - band - 1) / 2 : 0;
      float* out = s.out + g * s.out_band;
      const bool several = following >= together;
      if (several)
        inside<together>(band, out);
      else if (following)
        inside<1>(band, out);
      else
        edge(band, out);
      g += several ? together : 1;
    }
  }

  // `Bands` neighbouring output bands, the first of which begins at `band` of the input, where all taps are there.
  template <int Bands>
  void inside(int64_t band, float* out) const {
    constexpr int columns = 2 * Bands + 1;
    const int64_t apart = s.band;
    const float* x[3] = {s.frames[0] + band * apart, s.frames[1] + band * apart, s.frames[2] + band * apart};
    Floats same[3][columns];
    if (OneChannel)
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < columns; ++j) same[i][j] = Floats{} + x[i][j * apart];
    vectors([&](int64_t channel, const float* w, int n) {
      Floats sums[Bands];
      for (int b = 0; b < Bands; ++b) sums[b] = load(w + 9 * lanes);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i)
#pragma GCC unroll 5
        for (int j = 0; j < columns; ++j) {
          const Floats value = OneChannel ? same[i][j] : load(x[i] + j * apart + channel, n);
#pragma GCC unroll 2
          for (int b = 0; b < Bands; ++b)
            if (j >= 2 * b && j < 2 * b + 3) sums[b] += load(w + (3 * i + j - 2 * b) * lanes) * value;
        }
      for (int b = 0; b < Bands; ++b) put(sums[b], out + b * s.out_band + channel, n);
    });
  }

  // One output band, where taps are missing.
  void edge(int64_t band, float* out) const {
    vectors([&](int64_t channel, const float* w, int n) {
      Floats sum = load(w + 9 * lanes);
      for (int i = 0; i < 3 && s.frames[i]; ++i)
        for (int64_t j = band < 0 ? -band : 0; j < 3 && band + j < s.bands; ++j) {
          const float* x = s.frames[i] + (band + j) * s.band;
          sum += load(w + (3 * i + j) * lanes) * (OneChannel ? Floats{} + *x : load(x + channel, n));
        }
      put(sum, out + channel, n);
    });
  }

  // NaN stays NaN.
  void put(Floats x, float* to, int n) const { store(to, s.relu ? (x < 0.0f ? Floats{} : x) : x, n); }

  // For each vector of output channels: where it begins, its taps and bias, and how many there are.
  template <class Do>
  void vectors(Do what) const {
    const float* w = s.packed;
    int64_t channel = 0;
    for (; channel + lanes <= s.channels; channel += lanes, w += 10 * lanes) what(channel, w, lanes);
    if (channel < s.channels) what(channel, w, static_cast<int>(s.channels - channel));
  }
};

void run(const SubsampleFrame& s) { s.one_channel ? Step<true>{s}.run() : Step<false>{s}.run(); }

}  // namespace

SubsampleStepKernel subsample_step_kernel() { return {lanes, run}; }

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
