// stream_attn in bfloat16 where the processor multiplies tiles (AMX): the wide way of stream_attn.cpp with its products
// made by tiles of 16 x 32 numbers. What a tile multiplies is a matrix in natural order by one whose rows hold pairs:
//
//   scores    [16 keys, 32 dims] x [16 pairs of dims, 16 queries]    keys as they lie in the ring, queries turned once
//   band      the same with rows of the table in the place of keys
//   values    [16 queries, 32 keys] x [16 pairs of keys, 16 dims]    weights turned, rows of values interleaved
//
// A query stays in its lane from the scores to the weights, so bias, masks, skew and softmax are those of every
// instruction set. Scores with queries as rows would make the skew a store with a longer step, but keys and table would
// have to be turned: 512 shuffles for 32 keys of width 64, against 172 blends and the 64 shuffles that turn the weights.
// Values and not weights could be the left factor, but that turns 4 squares of values instead of one of weights.
#pragma once

#include "tiles.h"

namespace {

struct TileShapes {  // what LDTILECFG reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {  // ready while this lives; other code never finds them in use
  Tiles() {
    const TileShapes shapes;
    tiles_configure(&shapes);
  }
  ~Tiles() { tiles_release(); }
};

// For 32 keys of width 64 a query of the narrow way takes about 300 instructions of vectors, 192 of them products; up to 16
// of the wide way together take about 900, beside 12 products of tiles. Counted, not measured.
struct TilePaired : Paired {
  static constexpr int narrow = 2;
};

class Tiled : public Worker<TilePaired> {
  using Base = Worker<TilePaired>;
  static constexpr int kSlice = 32;                   // numbers in a row of a tile
  static constexpr int64_t kRow = 64, kTile = L * L;  // bytes, words
  static_assert(L == 16 && kBand >= 2 * L, "a tile is 16 keys by 16 queries, and the band of one reaches into the next");

  const int64_t slices;
  Number* gathered;  // [L, width]
  Real *pairs, *sums;  // [keys / 32, slices, 2] tiles of values; 4 tiles
  Rows<Number> held;   // whose values they are
  int64_t held_count = 0;

 public:
  Tiled(const StreamAttn& a, char* scratch) : Base(a, scratch), slices((width + kSlice - 1) / kSlice) {
    take(gathered, L * width), take(pairs, (a.W + kSlice) * slices * L), take(sums, 4 * kTile);
  }

 private:
  void wide_weights(const Rows<Number>& keys, int64_t n, const Rows<Number>& positions, int64_t rows, Real slope,
                    int64_t offset, Real* inverse) override {
    align(turned_content);
    if (a.rel) align(turned_position);
    auto fill = [&](int64_t m) {
      products<0>(band + m % kBand * L, turned_position, positions, m - (L - rows), n + rows - 2);
    };
    if (a.rel) fill(0);
    vec top = S::splat(-__builtin_inf());
    for (int64_t j = 0; j < n; j += L) {
      if (a.rel) fill(j + L);
      products<3>(scores + j * L, turned_content, keys, j, n - 1);
      for (int64_t half = j; half < j + L; half += kBlock) {
        vec x[kBlock] = {};
        if (a.rel) skew(x, half);
        for (int r = 0; r < kBlock; ++r) x[r] += S::load(scores + (half + r) * L);
        top = settle(x, half, n, slope, offset, top);
      }
    }
    S::store(inverse, S::splat(1) / soften<false>(scores, n, top));
  }

  // Where the width is no multiple of a slice, the last slice of a row begins earlier, among numbers of the one before:
  // for the queries these are 0.
  void align(Number* turned) const {
    const int64_t rest = width % kSlice;
    if (!rest) return;
    Number* last = turned + (width - rest) * L;
    memmove(last + (kSlice - rest) * L, last, rest * L * sizeof(Number));
    memset(last, 0, (kSlice - rest) * L * sizeof(Number));
  }

  int64_t start(int64_t slice) const { return least(slice * kSlice, width - kSlice); }

  // to[r] = the products of row first + r with the query of each lane, in three tiles from t on: other tiles, other sums
  // that need not wait
  template <int t>
  void products(Real* to, const Number* queries, const Rows<Number>& rows, int64_t first, int64_t last) {
    const int s = rows.stretch(first);
    const bool whole = first >= 0 && first + L - 1 <= last && rows.stretch(first + L - 1) == s;
    const Number* from = whole ? rows.at[s] + first * rows.step[s] : gather(rows, first, last);
    const int64_t step = (whole ? rows.step[s] : width) * sizeof(Number);
    tile_zero<t>();
    for (int64_t u = 0; u < slices; ++u) {
      tile_load<t + 1>(from + start(u), step);
      tile_load<t + 2>(queries + u * kSlice * L, kRow);
      tile_multiply<t, t + 1, t + 2>();
    }
    tile_store<t>(to, kRow);
  }

  // Rows that lie in several stretches, or end before the tile does, side by side.
  const Number* gather(const Rows<Number>& rows, int64_t first, int64_t last) {
    const Number* line[L];
    rows.template lines<L>(line, first, last);
    for (int r = 0; r < L; ++r) memcpy(gathered + r * width, line[r], width * sizeof(Number));
    return gathered;
  }

  void sum_values(const Rows<Number>& values, int64_t n, int64_t rows, int64_t ld, int64_t step, const Real* inverse,
                  Number* to, int64_t stride) override {
    if (ld != 1) return Base::sum_values(values, n, rows, ld, step, inverse, to, stride);
    const int64_t blocks = (n + kSlice - 1) / kSlice;
    turn_weights(n, blocks);
    interleave(values, n, blocks);
    for (int64_t u = 0; u < slices; u += 2) {
      const int64_t wide = least(2, slices - u);
      if (wide == 2)
        weigh(u, blocks, std::make_integer_sequence<int, 4>());
      else
        weigh(u, blocks, std::make_integer_sequence<int, 2>());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t x = 0; x < wide; ++x) {
          const vec sum[2] = {S::load(sums + (2 * x * L + r) * L), S::load(sums + ((2 * x + 1) * L + r) * L)};
          Paired::store(to + r * stride + start(u + x), sum, S::splat(inverse[r]));
        }
    }
  }

  // From [keys / 2, queries] words to [keys / 32] tiles [queries, keys / 2], in place; no key after the last one counts.
  void turn_weights(int64_t n, int64_t blocks) {
    const int64_t words = (n + 1) / 2;
    memset(scores + words * L, 0, (blocks * L - words) * kRow);
    for (Real* square = scores; square < scores + blocks * kTile; square += kTile) {
      vec x[L];
      for (int r = 0; r < L; ++r) x[r] = S::load(square + r * L);
      S::transpose(x);
      for (int r = 0; r < L; ++r) S::store(square + r * L, x[r]);
    }
  }

  // Once for all tiles of queries, and heads, that see the same values where they lie.
  void interleave(const Rows<Number>& values, int64_t n, int64_t blocks) {
    if (!copied && n == held_count && !memcmp(&held, &values, sizeof held)) return;
    held = values, held_count = n;
    for (int64_t j = 0; j < blocks * kSlice; j += 2) {
      const Number *one = values(least(j, n - 1)), *two = j + 1 < n ? values(j + 1) : nullptr;
      for (int64_t u = 0; u < slices; ++u) {
        Words both[2] = {};
        if (j < n) Paired::values(both, one + start(u), two ? two + start(u) : nullptr);
        Real* row = pairs + (j / kSlice * slices + u) * 2 * kTile + j % kSlice / 2 * L;
        S::store(row, (vec)both[0]);
        S::store(row + kTile, (vec)both[1]);
      }
    }
  }

  // sums[t] = all weights by tile t of the values from slice u on; sums of one tile wait for each other, so four run at once
  template <int... t>
  void weigh(int64_t u, int64_t blocks, std::integer_sequence<int, t...>) {
    (tile_zero<t>(), ...);
    for (int64_t k = 0; k < blocks; ++k) {
      const Real* v = pairs + (k * slices + u) * 2 * kTile;
      tile_load<7>(scores + k * kTile, kRow);
      ((tile_load<4 + t % 3>(v + t * kTile, kRow), tile_multiply<t, 7, 4 + t % 3>()), ...);
    }
    (tile_store<t>(sums + t * kTile, kRow), ...);
  }
};

}  // namespace
