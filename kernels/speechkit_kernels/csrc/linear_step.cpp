// The arithmetic of speechkit::linear_step, compiled once per instruction set.
//
// With few rows of x the time is that of reading the weight from memory, so that is read once, while what comes next is
// fetched; x, which is small, is read again for every few rows of it.
//
// x may pass a layer norm on its way into the layout that is read, and the result be added to something on its way out.
//
// An element of the result is one vector of sums over K, in ascending order, and then the sum of its lanes in a fixed
// order: so a row's result is equal bit for bit alone and among others, wherever it stands, on any number of threads.
#include "linear_step.h"

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 8")  // completely: sums in an array stay in registers if all their places are known

namespace speechkit {
namespace SPEECHKIT_ISA {
namespace {

typedef int8_t Bytes __attribute__((vector_size(lanes)));
typedef float Quad __attribute__((vector_size(16)));

// A tile is some rows of x times some of the weight. Its sums and a vector of each of these fit into the registers, 32
// with AVX-512, else 16; and there are at least 8 sums, for an addition takes 4 cycles, in which 8 are begun.
constexpr int64_t most_rows = lanes == 16 ? 6 : 2;
constexpr int64_t tile_width(int64_t rows) { return rows * 8 <= (lanes == 16 ? 24 : 8) ? 8 : 4; }
constexpr int64_t panel = 48;  // whole vectors and whole tiles

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

// Halves are added until four lanes are left: the sums of every fourth lane, from the first, second, third, fourth on.
inline Quad folded(Floats x) {
  Quad quads[lanes / 4];
  std::memcpy(quads, &x, sizeof x);
  for (int step = lanes / 8; step; step /= 2)
    for (int i = 0; i < step; ++i) quads[i] += quads[i + step];
  return quads[0];
}

// Which lanes of two vectors a shuffle takes, of every four: the first two or the last two of both, in turns (`Step` 1)
// or together (2).
template <int Step>
struct Order {
  int32_t low[lanes], high[lanes];
  constexpr Order() : low(), high() {
    for (int i = 0; i < lanes; ++i) {
      const int n = i % 4, of = Step == 1 ? n % 2 : n / 2, lane = Step == 1 ? n / 2 : n % 2;
      low[i] = i - n + lane + of * lanes;
      high[i] = low[i] + 2;
    }
  }
};

template <int Step>
inline Floats halves(Floats a, Floats b) {
  static constexpr Order<Step> order;
  return __builtin_shuffle(a, b, read<Ints>(order.low)) + __builtin_shuffle(a, b, read<Ints>(order.high));
}

// The sums of the lanes of four vectors: of every four lanes first, which makes one vector of them, then of all fours.
inline Quad totals(Floats w, Floats x, Floats y, Floats z) {
  return folded(halves<2>(halves<1>(w, x), halves<1>(y, z)));
}

// A group of rows of x, and which of all groups it is.
struct Group {
  int64_t row, rows;
  int64_t turn, turns;
};

template <class T>
struct Linear {
  const LinearStep& l;

  // `Rows` rows of x with every `apart`th of the `present` rows at `weight`, of which there is at least one. They are
  // far apart where they come from memory, which gives more of several pages at once than of one, and else neighbours,
  // whose results are written together.
  template <int64_t Rows>
  void tile(const float* x, const T* weight, int64_t present, int64_t apart, const Group& group, float* to) const {
    constexpr int64_t width = tile_width(Rows);
    constexpr int64_t line = 64 / sizeof(T) > lanes ? 64 / sizeof(T) : lanes;  // elements of a cache line
    const T* rows[width];
    for (int64_t j = 0; j < width; ++j)
      rows[j] = weight + (j * apart < present ? j * apart : present - 1) * l.weight_row;
    Floats sums[Rows][width] = {};
    const auto add = [&](int64_t k) {
      Floats w[width];
      UNROLL for (int64_t j = 0; j < width; ++j) w[j] = weights(rows[j] + k);
      UNROLL for (int64_t i = 0; i < Rows; ++i, x += lanes) {
        const Floats value = load(x);
        UNROLL for (int64_t j = 0; j < width; ++j) sums[i][j] += value * w[j];
      }
    };

    // Every group goes through the panel, and on its way fetches an equal share of the next one into the second-level
    // cache, evenly: so memory is never idle, and never asked for more at once than it can give.
    int64_t k = 0, ahead = (panel * l.weight_row + group.turn * l.K / group.turns) * sizeof(T);
    for (; k + line <= l.K; k += line, ahead += 64 / group.turns) {
      UNROLL for (int64_t j = 0; j < width; ++j)
        __builtin_prefetch(reinterpret_cast<const char*>(rows[j]) + ahead, 0, 2);
      for (int64_t v = 0; v < line; v += lanes) add(k + v);
    }
    for (; k + lanes <= l.K; k += lanes) add(k);
    if (k < l.K) {
      T rest[width][lanes] = {};
      for (int64_t j = 0; j < width; ++j) {
        std::memcpy(rest[j], rows[j] + k, (l.K - k) * sizeof(T));
        rows[j] = rest[j];
      }
      add(0);
    }
    UNROLL for (int64_t i = 0; i < Rows; ++i, to += panel)
      UNROLL for (int64_t j = 0; j < width; j += 4) {
        const Quad four = totals(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
        if (apart == 1)
          std::memcpy(to + j, &four, sizeof four);
        else
          UNROLL for (int64_t n = 0; n < 4; ++n) to[(j + n) * apart] = four[n];
      }
  }

  template <int64_t Rows>
  void tiles(const Group& group, int64_t first, int64_t count) const {
    float sums[Rows * panel];
    const float* x = l.packed + group.row * padded();
    const T* weight = static_cast<const T*>(l.weight) + first * l.weight_row;
    const int64_t width = tile_width(Rows), tiles = (count + width - 1) / width;
    const bool spread = group.turns < 4;  // later groups find the weight in a cache
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j = spread ? t : t * width;
      tile<Rows>(x, weight + j * l.weight_row, count - j, spread ? tiles : 1, group, sums + j);
    }
    for (int64_t i = 0; i < Rows; ++i)
      for (int64_t j = 0; j < count; j += lanes)
        finish(group.row + i, first + j, static_cast<int>(count - j), sums + i * panel + j);
  }

  void finish(int64_t row, int64_t column, int n, const float* sums) const {
    Floats y = load(sums);
    if (l.scale) y *= load(l.scale + column, n);
    if (l.bias) y += load(l.bias + column, n);
    y = (l.silu ? y * sigmoid(y) : y) * l.factor;
    if (l.add) y += load(l.add + row * l.add_row + column, n);
    store(l.out + row * l.N + column, y, n);
  }

  void run(int64_t index) const {
    const int64_t first = index * panel, left = l.N - first, count = left < panel ? left : panel;
    for_groups([&](const Group& group) { choose<most_rows>(group, first, count); });
  }

  template <int64_t Rows>
  void choose(const Group& group, int64_t first, int64_t count) const {
    if constexpr (Rows > 1)
      if (group.rows < Rows) return choose<Rows - 1>(group, first, count);
    tiles<Rows>(group, first, count);
  }

  // Groups of rows that are as large as a tile can be, and about equally large.
  template <class Do>
  void for_groups(Do what) const {
    const int64_t groups = (l.M + most_rows - 1) / most_rows;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t row = i * l.M / groups;
      what(Group{row, (i + 1) * l.M / groups - row, i, groups});
    }
  }

  int64_t padded() const { return (l.K + lanes - 1) / lanes * lanes; }

  // Vectors of a group's rows in turn, which is how a tile reads them.
  void pack() const {
    float* to = l.packed;
    for_groups([&](const Group& group) {
      Moments moments[most_rows];
      if (l.norm_weight)
        for (int64_t i = 0; i < group.rows; ++i) moments[i] = moments_of(l.x + (group.row + i) * l.x_row);
      for (int64_t k = 0; k < l.K; k += lanes) {
        const int n = static_cast<int>(l.K - k);
        for (int64_t i = 0; i < group.rows; ++i, to += lanes) {
          Floats x = load(l.x + (group.row + i) * l.x_row + k, n);
          if (l.norm_weight)
            x = (x - moments[i].mean) * moments[i].scale * load(l.norm_weight + k, n) + load(l.norm_bias + k, n);
          store(to, x);
        }
      }
    });
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
};

template <class T>
LinearStepKernel kernel() {
  return {panel, lanes, [](const LinearStep& l) { Linear<T>{l}.pack(); },
          [](const LinearStep& l, int64_t index) { Linear<T>{l}.run(index); }};
}

}  // namespace

LinearStepKernel linear_step_kernel(Weight type) {
  switch (type) {
    case Weight::bfloat16:
      return kernel<BFloat16>();
    case Weight::int8:
      return kernel<int8_t>();
    default:
      return kernel<float>();
  }
}

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
