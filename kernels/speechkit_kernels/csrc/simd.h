// Vectors of floats, as wide as the instruction set this file is compiled for, by the vector extensions of GCC and clang:
// + - * / and comparisons are the compiler's, which also fuses a * b + c where the machine can. An intrinsic takes these
// types as they are. Everything is in the ISA's own namespace, see build.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace speechkit {
namespace SPEECHKIT_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * lanes)));

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline Floats as_floats(Words bits) { return (Floats)bits; }
inline Words as_words(Floats x) { return (Words)x; }

template <class Vector, class T>
Vector read(const T* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats widen(Floats x, const float*) { return x; }

inline Floats widen(Shorts bits, const BFloat16*) { return as_floats(__builtin_convertvector(bits, Words) << 16); }

// The exponent of a half is 112 too small for a float's: a product with 2^112 sets it right, also for subnormal numbers.
inline Floats widen(Shorts bits, const Float16*) {
  const Words word = __builtin_convertvector(bits, Words), size = word & 0x7fff;
  const Words endless = size >= 0x7c00 ? (Words{} + 0x7f800000) : Words{};
  return as_floats(as_words(as_floats(size << 13) * 0x1p112f) | endless | (word & 0x8000) << 16);
}

inline Floats narrow(Floats x, const float*) { return x; }

// To the nearest, ties to even; NaN stays NaN. The lower half of a word is no part of the result.
inline Words bfloat16_above(Floats x) {
  const Words word = as_words(x), rounded = word + 0x7fff + (word >> 16 & 1);
  return x == x ? rounded : (Words{} + 0x7fc00000);
}

inline Shorts narrow(Floats x, const BFloat16*) { return __builtin_convertvector(bfloat16_above(x) >> 16, Shorts); }

// To the nearest, ties to even. What is to be subnormal is rounded by the sum with 0.5, whose last bit is the least half.
inline Shorts narrow(Floats x, const Float16*) {
  const Words sign = as_words(x) & 0x80000000, size = as_words(x) ^ sign;
  const Words normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  const Words tiny = as_words(as_floats(size) + 0.5f) - 0x3f000000;
  Words half = size < (113u << 23) ? tiny : normal;
  half = size >= (143u << 23) ? (Words{} + 0x7c00) : half;
  half = size > 0x7f800000 ? (Words{} + 0x7e00) : half;
  return __builtin_convertvector(half | sign >> 16, Shorts);
}

// The vector an element type is computed in; float64 is served, not hurried.
template <class T>
struct Computed {
  using Vector = Floats;
  using Scalar = float;
  using Stored = Shorts;
  static constexpr int width = lanes;
};
template <>
struct Computed<float> : Computed<void> {
  using Stored = Floats;
};
template <>
struct Computed<double> {
  using Vector = double;
  using Scalar = double;
  using Stored = double;
  static constexpr int width = 1;
};

inline double widen(double x, const double*) { return x; }
inline double narrow(double x, const double*) { return x; }

template <class T>
typename Computed<T>::Vector load(const T* from) {
  return widen(read<typename Computed<T>::Stored>(from), from);
}

// The first n; zeros after them.
template <class T>
typename Computed<T>::Vector load(const T* from, int n) {
  if (n >= Computed<T>::width) return load(from);
  typename Computed<T>::Stored x{};
  std::memcpy(&x, from, n * sizeof(T));
  return widen(x, from);
}

template <class T, class Vector>
void store(T* to, Vector x) {
  const auto stored = narrow(x, to);
  std::memcpy(to, &stored, sizeof stored);
}

template <class T, class Vector>
void store(T* to, Vector x, int n) {
  if (n >= Computed<T>::width) return store(to, x);
  const auto stored = narrow(x, to);
  std::memcpy(to, &stored, n * sizeof(T));
}

// As a T keeps it.
template <class T, class Vector>
Vector rounded(Vector x, const T* type) {
  return widen(narrow(x, type), type);
}
inline Floats rounded(Floats x, const BFloat16*) { return as_floats(bfloat16_above(x) & 0xffff0000); }

// x within two bounds; NaN stays NaN, because x86 returns the second operand where the two cannot be compared. The
// compiler has to be told: it sees no minimum in a comparison of vectors.
inline Floats between(Floats x, float least, float most) {
  const Floats low = Floats{} + least, high = Floats{} + most;
#if defined(__AVX512F__)
  return _mm512_max_ps(low, _mm512_min_ps(high, x));
#elif defined(__AVX2__)
  return _mm256_max_ps(low, _mm256_min_ps(high, x));
#elif defined(__x86_64__)
  return _mm_max_ps(low, _mm_min_ps(high, x));
#else
  x = x > high ? high : x;
  return x < low ? low : x;
#endif
}

// The first n lanes, and zeros.
inline Floats keep_first(Floats x, int n) {
  Floats kept{};
  std::memcpy(&kept, &x, n * sizeof(float));
  return kept;
}
inline double keep_first(double x, int) { return x; }

inline float sum(Floats x) {
  float values[lanes], total = 0;
  std::memcpy(values, &x, sizeof x);
  for (int step = lanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) values[i] += values[i + step];
  return total + values[0];
}
inline double sum(double x) { return x; }

// 1 / (1 + e^-x), within 3e-7 of itself wherever it is a normal number; 0, 1 and NaN where they belong.
//
// e^y = 2^n e^r with n = round(y / ln 2), |r| <= ln 2 / 2; the polynomial is within 1.1e-7 of e^r.
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. n reaches 128, which no float's exponent does:
// half of 2^n is multiplied first, then 2, so that e^y can overflow to infinity and the result to 0.
inline Floats sigmoid(Floats x) {
  const Floats y = between(-x, -87.0f, 89.0f);
  const Floats shifted = y * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Floats r = (y - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first times n exact
  Floats p = r * 0.00831250101f + 0.0418903306f;
  p = p * r + 0.166671157f;
  p = p * r + 0.499992311f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats half = as_floats((as_words(shifted) << 23) + (126u << 23));
  return 1.0f / (p * half * 2.0f + 1.0f);
}
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
