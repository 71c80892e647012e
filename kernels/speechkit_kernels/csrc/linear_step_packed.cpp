// The arithmetic of speechkit::linear_step with a packed weight [P, K, 16], compiled once per instruction set.
//
// The results of 16 rows of the weight lie in the lanes of a vector, and a number of x is spread over them: so nothing
// is folded at the end, and as many rows of x share a weight as sums fit into the registers.
//
// An element of the result is a sum of runs over K, and each of these one of products, in ascending order: so a row's
// result is equal bit for bit alone and among others, wherever it stands, on any number of threads.
#include "linear_step_simd.h"

namespace speechkit {
namespace SPEECHKIT_ISA {
namespace {

constexpr int64_t columns = 16;               // of a panel, which is a weight [K, 16]
constexpr int64_t vectors = columns / lanes;  // of these columns
constexpr int64_t registers = lanes == 16 ? 32 : 16;

// Numbers of x that are summed before their sum is added to the total: sums of sums lose less to rounding than one of
// all, by a factor of 5 with K = 2048, and so many cost nothing.
constexpr int64_t most_run = 128;

// A tile is some rows of x times some panels. Its sums fit into the registers beside a vector for each of its rows or
// of those of its panels, whichever are fewer (with AVX-512 those of its panels, see below), and one more.
constexpr bool fits(int64_t rows, int64_t panels) {
  const int64_t wide = panels * vectors;
  return rows * wide + (lanes == 16 || wide < rows ? wide : rows) + 1 <= registers;
}
constexpr int64_t most_rows = lanes == 16 ? 14 : lanes == 8 ? 6 : 3;  // of two vectors, or one panel
constexpr int64_t tile_panels(int64_t rows) { return fits(rows, 8) ? 8 : fits(rows, 4) ? 4 : fits(rows, 2) ? 2 : 1; }

// How numbers of x and of a weight are multiplied and summed: `step` rows of a panel at once.
template <class T>
struct Product {
  using Sum = Floats;
  static constexpr int64_t step = 1;

  static Floats weights(const T* at) { return SPEECHKIT_ISA::weights(at); }
  static Floats last(const T* at) { return weights(at); }

  // sum + x[k] * w. AVX-512 spreads a number over a vector on its way from memory into the product, for nothing.
  // Compilers spread it into a register first, which takes a unit from the products: on Zen 4 a tenth of the time if w
  // is widened.
  static Floats plus(Floats sum, const float* x, int64_t k, Floats w) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(x[k]));
    return sum;
#else
    return sum + x[k] * w;
#endif
  }

  static void round(float*, int64_t) {}
  static Floats total(Floats sum, const float*) { return sum; }
};

#if defined(__AVX512BF16__)
// Processors with bfloat16 products multiply whole numbers of 16 bits in pairs (VNNI), twice as many a cycle as floats, and
// sum them up exactly. A run of x is rounded to such numbers, 32767 for its largest: 250 times finer than the weight was.
struct Pairs {  // where the numbers of two rows go
  int16_t places[2 * columns];
  constexpr Pairs() : places() {
    for (int i = 0; i < 2 * columns; ++i) places[i] = i / 2 + i % 2 * columns;
  }
};

template <>
struct Product<int8_t> {
  using Sum = Ints;
  static constexpr int64_t step = 2;
  static constexpr int64_t scale_at = most_run / 2;  // behind the rounded numbers, in the place of a run

  // Two rows of a panel, as pairs of what is in a column; or the last of an odd number, and zeros.
  static Ints weights(const int8_t* at) { return paired(read<__m256i>(at)); }
  static Ints last(const int8_t* at) { return paired(_mm256_zextsi128_si256(read<__m128i>(at))); }
  static Ints paired(__m256i rows) {
    static constexpr Pairs pairs;
    const __m512i wide = _mm512_maskz_cvtepi8_epi16(~0u, rows);
    return (Ints)_mm512_maskz_permutexvar_epi16(~0u, read<__m512i>(pairs.places), wide);
  }

  static Ints plus(Ints sum, const float* x, int64_t k, Ints w) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(x[k / 2]));
    return sum;
  }

  // A run of which nothing is left but zeros or numbers below 1e-30 counts as zeros. NaN and infinity make a scale of
  // which no product is finite.
  static void round(float* x, int64_t count) {
    Ints sizes{};  // bits without their sign: as whole numbers in the same order, and NaN is the largest
    for (int64_t k = 0; k < count; k += lanes) {
      const Ints size = (Ints)load(x + k) & 0x7fffffff;
      sizes = size > sizes ? size : sizes;
    }
    int32_t largest = 0;
    for (int i = 0; i < lanes; ++i) largest = sizes[i] > largest ? sizes[i] : largest;
    float most;
    std::memcpy(&most, &largest, sizeof most);
    const Floats factor = Floats{} + (most < 1e-30f ? 0 : 32767 / most);
    for (int64_t k = 0; k < count; k += lanes) {
      const __m512i whole = _mm512_maskz_cvtps_epi32(0xffff, load(x + k) * factor);
      const __m256i half = _mm512_maskz_cvtsepi32_epi16(0xffff, whole);
      std::memcpy(x + k / 2, &half, sizeof half);
    }
    x[scale_at] = most / 32767;
  }
  static Floats total(Ints sum, const float* x) { return __builtin_convertvector(sum, Floats) * x[scale_at]; }
};
#endif

template <class T>
struct Linear : Around<most_rows, most_run> {
  using Around<most_rows, most_run>::l;
  using P = Product<T>;

  void lay() const { Around<most_rows, most_run>::lay(P::round); }

  // `Rows` rows of x with the `present` panels at `weight`, of which there is at least one. While one run is summed the
  // next is fetched into second-level cache; after the last one that of the next panels, or of the weight that lies
  // behind this one: who packs many lays them in the order in which they are read.
  template <int64_t Rows>
  void tile(const float* x, const T* weight, int64_t present, float* to) const {
    constexpr int64_t panels = tile_panels(Rows), wide = panels * vectors;
    const T* at[panels];
    for (int64_t p = 0; p < panels; ++p) at[p] = weight + (p < present ? p : present - 1) * l.K * columns;
    const int64_t run = this->length();
    int64_t k = 0;
    do {
      const int64_t left = l.K - k, next = left > run ? run : panels * l.K - k;
      typename P::Sum sums[Rows][wide] = {};
      part<Rows>(x, at, left < run ? left : run, next * columns, sums);
      UNROLL for (int64_t i = 0; i < Rows; ++i)
        UNROLL for (int64_t v = 0; v < wide; ++v) {
          float* total = to + (i * wide + v) * lanes;
          const Floats sum = P::total(sums[i][v], x + i * most_run);
          store(total, k ? load(total) + sum : sum);
        }
      k += run;
      x += Rows * most_run;
      UNROLL for (int64_t p = 0; p < panels; ++p) at[p] += run * columns;
    } while (k < l.K);
  }

  // Of `count` rows of the panels `at`; meanwhile what lies `ahead` is fetched.
  template <int64_t Rows, int64_t panels, int64_t wide>
  void part(const float* x, const T* const (&at)[panels], int64_t count, int64_t ahead,
            typename P::Sum (&sums)[Rows][wide]) const {
    constexpr int64_t line = 64 / (columns * sizeof(T));  // rows of a panel in a cache line
    const auto add = [&](int64_t k, auto weights) __attribute__((always_inline)) {
      typename P::Sum w[wide];
      UNROLL for (int64_t v = 0; v < wide; ++v) w[v] = weights(at[v / vectors] + k * columns + v % vectors * lanes);
      UNROLL for (int64_t i = 0; i < Rows; ++i)
        UNROLL for (int64_t v = 0; v < wide; ++v) sums[i][v] = P::plus(sums[i][v], x + i * most_run, k, w[v]);
    };
    int64_t k = 0;
    for (; k + line <= count; k += line) {
      UNROLL for (int64_t p = 0; p < panels; ++p) __builtin_prefetch(at[p] + k * columns + ahead, 0, 2);
      UNROLL for (int64_t m = 0; m < line; m += P::step) add(k + m, P::weights);
    }
    for (; k + P::step <= count; k += P::step) add(k, P::weights);
    if (k < count) add(k, P::last);
  }

  template <int64_t Rows>
  void tiles(const Group& group, int64_t first, int64_t count) const {
    constexpr int64_t wide = tile_panels(Rows) * columns;
    float sums[Rows * wide];
    for (int64_t j = first; j < first + count; j += wide) {
      const int64_t left = first + count - j;
      tile<Rows>(this->rows(group), static_cast<const T*>(l.weight) + j * l.K, (left + columns - 1) / columns,
                 sums);
      for (int64_t i = 0; i < Rows; ++i)
        for (int64_t v = 0; v < wide && v < left; v += lanes)
          this->finish(group.row + i, j + v, static_cast<int>(left - v), sums + i * wide + v);
    }
  }

  void run(int64_t first, int64_t count) const {
    this->for_groups([&](const Group& group) {
      this->with_rows(group, [&](auto rows) { tiles<rows.value>(group, first, count); });
    });
  }
};

}  // namespace

// More groups of rows than one go through two panels each time, which a cache keeps for the next.
LinearStepKernel linear_step_packed_kernel(Weight type, int64_t rows) {
  return kernel<Linear>(type, columns * (rows > most_rows ? 2 : tile_panels(rows)), most_run);
}

}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
