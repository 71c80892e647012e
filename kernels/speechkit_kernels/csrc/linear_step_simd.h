// What both kernels of linear_step have in common: numbers of the weight as floats, and what happens to x on its way in
// and to the result on its way out.
#pragma once

#include "linear_step.h"

#include "simd.h"

#define UNROLL _Pragma("GCC unroll 16")  // completely: sums in an array stay in registers if all their places are known

namespace speechkit {
namespace SPEECHKIT_ISA {

typedef int8_t Bytes __attribute__((vector_size(lanes)));
inline Floats weights(const float* from) { return load(from); }

// One instruction where compilers make many. With a mask, of all lanes: GCC 12 warns of the plain forms without reason.
#if defined(__AVX512F__)
inline Ints extended(const BFloat16* from) {
  return (Ints)_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(from));
}
inline Ints extended(const int8_t* from) { return (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, read<__m128i>(from)); }
#elif defined(__AVX2__)
inline Ints extended(const BFloat16* from) { return (Ints)_mm256_cvtepu16_epi32(read<__m128i>(from)); }
inline Ints extended(const int8_t* from) {
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#else
inline Ints extended(const BFloat16* from) { return __builtin_convertvector(read<Shorts>(from), Ints); }
inline Ints extended(const int8_t* from) { return __builtin_convertvector(read<Bytes>(from), Ints); }
#endif

inline Floats weights(const BFloat16* from) { return (Floats)(extended(from) << 16); }
inline Floats weights(const int8_t* from) { return __builtin_convertvector(extended(from), Floats); }

// A group of rows of x, and which of all groups it is.
struct Group {
  int64_t row, rows;
  int64_t turn, turns;
};

template <int64_t N>
struct Constant {
  static constexpr int64_t value = N;
};

// What is around the product of a kernel that takes up to `most_rows` rows of x at once, and of each in turn a run of
// its numbers: whole vectors, `most_run` numbers or less, so that runs are about equally long.
template <int64_t most_rows, int64_t most_run>
struct Around {
  const LinearStep& l;

  // Groups of rows that are as large as a tile can be, and about equally large.
  template <class Do>
  void for_groups(Do what) const {
    const int64_t groups = (l.M + most_rows - 1) / most_rows;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t row = i * l.M / groups;
      what(Group{row, (i + 1) * l.M / groups - row, i, groups});
    }
  }

  // Calls `what` with how many rows a group has, as a constant.
  template <int64_t Rows = most_rows, class Do>
  static void with_rows(const Group& group, Do what) {
    if constexpr (Rows > 1)
      if (group.rows < Rows) return with_rows<Rows - 1>(group, what);
    what(Constant<Rows>());
  }

  int64_t runs() const { return (l.K - 1) / most_run + 1; }
  int64_t length() const { return (l.K / runs() + lanes - 1 + (l.K % runs() > 0)) / lanes * lanes; }

  // Where a group's rows begin in `laid`, in which a run has the place of the longest.
  const float* rows(const Group& group) const { return l.laid + group.row * runs() * most_run; }

  // Runs of a group's rows in turn, which is how a tile reads them. `done` is called with each, and how many numbers it
  // has: whole vectors, of which the last may end with zeros.
  template <class Do>
  void lay(Do done) const {
    float* to = l.laid;
    for_groups([&](const Group& group) {
      Moments moments[most_rows];
      if (l.norm_weight)
        for (int64_t i = 0; i < group.rows; ++i) moments[i] = moments_of(l.x + (group.row + i) * l.x_row);
      for (int64_t first = 0; first < l.K; first += length())
        for (int64_t i = 0; i < group.rows; ++i, to += most_run) {
          int64_t k = first;
          for (; k < l.K && k < first + length(); k += lanes) {
            const int n = static_cast<int>(l.K - k);
            Floats x = load(l.x + (group.row + i) * l.x_row + k, n);
            if (l.norm_weight)
              x = (x - moments[i].mean) * moments[i].scale * load(l.norm_weight + k, n) + load(l.norm_bias + k, n);
            store(to + k - first, x);
          }
          done(to, k - first);
        }
    });
  }
  void lay() const {
    lay([](float*, int64_t) {});
  }

  // Of a row, for its layer norm.
  struct Moments {
    float mean, scale;
  };

  Moments moments_of(const float* x) const {
    Floats total{}, squares{};
    for (int64_t k = 0; k < l.K; k += lanes) total += load(x + k, static_cast<int>(l.K - k));
    const float mean = sum(total) / l.K;
    for (int64_t k = 0; k < l.K; k += lanes) {
      const int n = static_cast<int>(l.K - k);
      const Floats apart = load(x + k, n) - mean;
      squares += n < lanes ? keep_first(apart * apart, n) : apart * apart;
    }
    return {mean, 1 / std::sqrt(sum(squares) / l.K + l.eps)};
  }

  void finish(int64_t row, int64_t column, int n, const float* sums) const {
    Floats y = load(sums);
    if (l.scale) y *= load(l.scale + column, n);
    if (l.bias) y += load(l.bias + column, n);
    y = (l.silu ? y * sigmoid(y) : y) * l.factor;
    if (l.add) y += load(l.add + row * l.add_row + column, n);
    store(l.out + row * l.N + column, y, n);
  }
};

template <class Linear>
LinearStepKernel kernel(int64_t stretch, int64_t spare) {
  return {stretch, spare, [](const LinearStep& l) { Linear{l}.lay(); },
          [](const LinearStep& l, int64_t first, int64_t count) { Linear{l}.run(first, count); }};
}

template <template <class> class Linear>
LinearStepKernel kernel(Weight type, int64_t stretch, int64_t spare) {
  switch (type) {
    case Weight::bfloat16:
      return kernel<Linear<BFloat16>>(stretch, spare);
    case Weight::int8:
      return kernel<Linear<int8_t>>(stretch, spare);
    default:
      return kernel<Linear<float>>(stretch, spare);
  }
}

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
