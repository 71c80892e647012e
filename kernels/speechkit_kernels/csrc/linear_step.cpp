// The arithmetic of speechkit::linear_step with a weight [N, K], compiled once per instruction set.
//
// With few rows of x the time is that of reading the weight from memory, so that is read once, while what comes next is
// fetched; x, which is small, is read again for every few rows of it.
//
// An element of the result is one vector of sums over K, in ascending order, and then the sum of its lanes in a fixed
// order: so a row's result is equal bit for bit alone and among others, wherever it stands, on any number of threads.
#include "linear_step_simd.h"

namespace speechkit {
namespace SPEECHKIT_ISA {
namespace {

typedef float Quad __attribute__((vector_size(16)));

// A tile is some rows of x times some of the weight. Its sums and a vector of each of these fit into the registers, 32
// with AVX-512, else 16; and there are at least 8 sums, for an addition takes 4 cycles, in which 8 are begun.
constexpr int64_t most_rows = lanes == 16 ? 6 : 2;
constexpr int64_t tile_width(int64_t rows) { return rows * 8 <= (lanes == 16 ? 24 : 8) ? 8 : 4; }
constexpr int64_t panel = 48;  // whole vectors and whole tiles

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

template <class T>
struct Linear : Around<most_rows, lanes> {
  using Around<most_rows, lanes>::l;

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
    const float* x = this->rows(group);
    const T* weight = static_cast<const T*>(l.weight) + first * l.weight_row;
    const int64_t width = tile_width(Rows), tiles = (count + width - 1) / width;
    const bool spread = group.turns < 4;  // later groups find the weight in a cache
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j = spread ? t : t * width;
      tile<Rows>(x, weight + j * l.weight_row, count - j, spread ? tiles : 1, group, sums + j);
    }
    for (int64_t i = 0; i < Rows; ++i)
      for (int64_t j = 0; j < count; j += lanes)
        this->finish(group.row + i, first + j, static_cast<int>(count - j), sums + i * panel + j);
  }

  void run(int64_t first, int64_t count) const {
    this->for_groups([&](const Group& group) {
      this->with_rows(group, [&](auto rows) { tiles<rows.value>(group, first, count); });
    });
  }
};

}  // namespace

LinearStepKernel linear_step_kernel(Weight type) { return kernel<Linear>(type, panel, lanes); }

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
