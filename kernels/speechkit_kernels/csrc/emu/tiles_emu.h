// tiles.h on a processor without tiles: a source compiled after this header has them in software, one set a thread.
//
// Exact, by Intel's manual (SDM volume 2, TDPBF16PS): of 32 products in a row, those of even and of odd places are summed
// apart by fused multiply-adds in ascending order, from zero; then the two sums are added, and the result to the tile.
// Everything rounds to nearest even, subnormal numbers count and come out as 0. Refused, with a sentence: shapes the
// processor refuses, tiles in use before they are configured or after their release, and loads of FORBIDDEN.
#ifndef SPEECHKIT_TILES_H
#define SPEECHKIT_TILES_H
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace emu {

constexpr uint16_t FORBIDDEN = 0x7fdb;  // a NaN that tests put where nobody may look, and nobody computes

struct Shapes {  // what LDTILECFG reads
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
struct Tile {
  alignas(64) uint8_t row[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local Shapes shapes;
inline thread_local bool configured = false;

inline void require(bool right, const std::string& sentence) {
  if (!right) throw std::runtime_error(sentence);
}

inline Tile& in_use(int tile, const char* what) {
  require(configured, std::string(what) + " of tile " + std::to_string(tile) + " while tiles are not configured");
  return tiles[tile];
}

__attribute__((noinline)) inline void multiply(Tile& sum, const Tile& a, const Tile& b, int rows, int pairs) {
  for (int m = 0; m < rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < pairs; ++k) {
      int32_t pair;
      std::memcpy(&pair, a.row[m] + 4 * k, 4);
      const __m512i left = _mm512_set1_epi32(pair), right = _mm512_load_si512(b.row[k]), high = _mm512_set1_epi32(-65536);
      even = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(left, 16), (__m512)_mm512_slli_epi32(right, 16), even);
      odd = _mm512_fmadd_ps((__m512)_mm512_and_si512(left, high), (__m512)_mm512_and_si512(right, high), odd);
    }
    _mm512_store_ps(sum.row[m], _mm512_load_ps(sum.row[m]) + (even + odd));
  }
}

}  // namespace emu

inline void tiles_configure(const void* from) {
  using namespace emu;
  Shapes wanted;
  std::memcpy(&wanted, from, sizeof wanted);
  require(!configured, "tiles are configured again before their release");
  require(wanted.palette == 1 && wanted.start_row == 0, "tiles must have palette 1 and start at row 0");
  for (uint8_t byte : wanted.reserved) require(byte == 0, "reserved bytes of the configuration must be 0");
  for (int t = 0; t < 16; ++t) {
    const int rows = wanted.rows[t], bytes = wanted.bytes[t];
    require(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (t < 8 || rows == 0),
            "tile " + std::to_string(t) + " cannot have " + std::to_string(rows) + " rows of " + std::to_string(bytes) + " bytes");
  }
  shapes = wanted, configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
inline void tiles_release() { emu::configured = false; }

template <int tile>
void tile_zero() {
  std::memset(&emu::in_use(tile, "zeroing"), 0, sizeof(emu::Tile));
}
template <int tile>
void tile_load(const void* at, int64_t step) {
  emu::Tile& t = emu::in_use(tile, "a load");
  std::memset(&t, 0, sizeof t);
  for (int r = 0; r < emu::shapes.rows[tile]; ++r) {
    std::memcpy(t.row[r], static_cast<const char*>(at) + r * step, emu::shapes.bytes[tile]);
    const __m512i row = _mm512_load_si512(t.row[r]), forbidden = _mm512_set1_epi16(emu::FORBIDDEN);
    emu::require(!_mm512_cmpeq_epi16_mask(row, forbidden), "row " + std::to_string(r) + " of a load holds what nobody may see");
  }
}
template <int tile>
void tile_store(void* at, int64_t step) {
  emu::Tile& t = emu::in_use(tile, "a store");
  for (int r = 0; r < emu::shapes.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(at) + r * step, t.row[r], emu::shapes.bytes[tile]);
}
template <int sum, int a, int b>
void tile_multiply() {
  static_assert(sum != a && sum != b && a != b, "the processor refuses a product of a tile with itself");
  const auto& rows = emu::shapes.rows;
  const auto& bytes = emu::shapes.bytes;
  emu::require(rows[sum] == rows[a] && bytes[sum] == bytes[b] && bytes[a] == 4 * rows[b] && bytes[b] % 4 == 0,
               "the shapes of three tiles do not make a product");
  const unsigned usual = _mm_getcsr();
  _mm_setcsr((usual | 0x8040) & ~0x6000u);  // subnormal in and out is 0; to nearest even
  emu::multiply(emu::in_use(sum, "a product"), emu::in_use(a, "a factor"), emu::in_use(b, "a factor"), rows[a], rows[b]);
  _mm_setcsr(usual);
}
#endif
