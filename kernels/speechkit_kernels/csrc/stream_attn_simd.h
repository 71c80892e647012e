// What stream_attn needs of vectors: as wide as the instruction set this file is compiled for, in the vector extensions of g++ and clang++.
// Everything has internal linkage: code of one instruction set must never be merged with that of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define SPEECHKIT_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRegisters = 16;
#else
constexpr int kBytes = 16, kRegisters = 16;
#endif

template <class R>  // float or double
struct Simd {
  static constexpr int lanes = kBytes / sizeof(R);
  using Int = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  typedef R vec __attribute__((vector_size(kBytes)));
  typedef Int ivec __attribute__((vector_size(kBytes)));
  typedef R loose __attribute__((vector_size(kBytes), aligned(sizeof(R)), may_alias));

  static vec load(const R* at) { return *reinterpret_cast<const loose*>(at); }
  static void store(R* at, vec x) { *reinterpret_cast<loose*>(at) = x; }
  static vec splat(R x) { return x - vec{}; }  // minus, because 0 + -0 is not -0

  static vec iota() {
    vec x{};
    for (int i = 0; i < lanes; ++i) x[i] = i;
    return x;
  }

  // NaN in either argument of these two is not lost: b is returned wherever a > b is not true.
  static vec above(vec a, vec b) { return a > b ? a : b; }
  static vec magnitude(vec x) { return x < 0 ? -x : x; }

  template <class F, int... I>
  static vec shuffled(vec a, vec b, F from, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, from(I)...);
#else
    return __builtin_shuffle(a, b, ivec{from(I)...});
#endif
  }
  template <class F>
  static vec shuffled(vec a, vec b, F from) {  // lane i is lane from(i) of a, or from(i) - lanes of b
    return shuffled(a, b, from, std::make_integer_sequence<int, lanes>());
  }

  // The sums over each of `lanes` vectors, as one vector: adding neighbours halves the number of vectors each time.
  static vec sums(vec* x) {
#pragma GCC unroll 8
    for (int half = lanes / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int r = 0; r < half; ++r)
        x[r] = shuffled(x[2 * r], x[2 * r + 1], [](int i) { return 2 * i; }) +
               shuffled(x[2 * r], x[2 * r + 1], [](int i) { return 2 * i + 1; });
    return x[0];
  }

  // Zipping x[r] with x[r + lanes / 2], log2(lanes) times, transposes a square.
  static void transpose(vec* x) {
#pragma GCC unroll 8
    for (int n = 1; n < lanes; n *= 2) {
      vec y[lanes];
#pragma GCC unroll 8
      for (int r = 0; r < lanes / 2; ++r) {
        y[2 * r] = shuffled(x[r], x[r + lanes / 2], [](int i) { return i / 2 + i % 2 * lanes; });
        y[2 * r + 1] = shuffled(x[r], x[r + lanes / 2], [](int i) { return (i + lanes) / 2 + i % 2 * lanes; });
      }
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) x[r] = y[r];
    }
  }

  static vec sum_everywhere(vec x) {
    for (int i = 1; i < lanes; ++i) x[0] += x[i];
    return splat(x[0]);
  }
  static vec top_everywhere(vec x) {
    for (int i = 1; i < lanes; ++i) x[0] = x[0] > x[i] ? x[0] : x[i];
    return splat(x[0]);
  }
};

// 2^x for x <= 0: a minimax polynomial of relative error 2e-9 on [-1/2, 1/2], times a power of two made of bits.
// Below -127 the power is 0, so minus infinity gives exactly 0; NaN stays NaN.
SPEECHKIT_INLINE Simd<float>::vec exp2(Simd<float>::vec x) {
  using S = Simd<float>;
  const S::vec shift = S::splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  x = S::above(S::splat(-127.f), x);
  const S::vec t = x + shift, r = x - (t - shift);
  S::vec p = 1.534581200e-4f * r + 1.339993121e-3f;
  p = p * r + 9.618488957e-3f;
  p = p * r + 5.550328777e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.931472057e-1f;
  p = p * r + 1.f;
  const S::ivec power = (reinterpret_cast<S::ivec>(t) + 127) << 23;
  return p * reinterpret_cast<S::vec>(power);
}
inline Simd<double>::vec exp2(Simd<double>::vec x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

}  // namespace
