// The arithmetic of speechkit::stream_attn, compiled once per instruction set.
//
// A task is one head of one stream, cut into tiles of queries that see the same keys. The window of a tile is up to two
// stretches of the ring and the new frames, read where they lie; nothing read here is written by another task, because
// W >= left + frames. Two ways through a tile, by the number of its queries:
//
//   wide    A vector holds one score of each of `lanes` queries. Queries are transposed once; a key is read in its
//           natural order, one number at a time, as a broadcast. Row m of the table of positions gives a vector too,
//           whose lane i belongs to key m - (lanes - 1 - i): the band is skewed by log2(lanes) blends a key.
//   narrow  Few queries: a vector runs along the width of a key, and `lanes` dot products are summed up together.
//
// Either way scores are kept, not rescaled: a window is at most W keys. Values are then summed with vectors along their
// width, in the order of time, so that a result depends on nothing but its own stream.
#include "stream_attn.h"

#include "stream_attn_simd.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using speechkit::Array;
using speechkit::StreamAttn;
using speechkit::Type;

constexpr int kBlock = 8;     // keys whose scores are formed together: enough to hide the latency of one instruction
constexpr int kBand = 32;     // rows of the rolling band: a power of two, at least lanes + kBlock
constexpr double kLog2e = 1.4426950408889634;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));  // the exponent's bias grows by 112
  }
  static Half of(float x) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u;
    const float size = from_bits(bits & 0x7fffffffu);
    if (size != size) return {uint16_t(sign | 0x7e00u)};
    if (size >= 65520.f) return {uint16_t(sign | 0x7c00u)};
    if (size < 0x1p-14f) return {uint16_t(sign | (to_bits(size + 0.5f) - to_bits(0.5f)))};  // rounded at 2^-24
    const uint32_t whole = to_bits(size) - (112u << 23);
    return {uint16_t(sign | (whole + 0xfffu + (whole >> 13 & 1u)) >> 13)};
  }
};
struct Brain {
  uint16_t bits;
  operator float() const { return from_bits(uint32_t(bits) << 16); }
  static Brain of(float x) {
    const uint32_t bits = to_bits(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40u)};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  }
};

template <class R, class T>
void read_as(R* to, const T* from, int64_t n, int64_t step) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = R(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = R(from[i * step]);
}

// n numbers of `a`, which begin at element `offset` and lie `step` apart, as float or double
template <class R>
void read(R* to, const Array& a, int64_t offset, int64_t n, int64_t step = 1) {
  switch (a.type) {
    case Type::f32: return read_as(to, static_cast<const float*>(a.data) + offset, n, step);
    case Type::f64: return read_as(to, static_cast<const double*>(a.data) + offset, n, step);
    case Type::f16: return read_as(to, static_cast<const Half*>(a.data) + offset, n, step);
    case Type::bf16: return read_as(to, static_cast<const Brain*>(a.data) + offset, n, step);
  }
}

inline int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
inline char* place(const Array& a, int64_t offset) { return static_cast<char*>(a.data) + offset * size_of(a.type); }

// How numbers are stored, multiplied and summed. A `word` is what is broadcast: `pair` neighbouring numbers.

template <class Real_>
struct Dense {
  using Real = Real_;
  using Number = Real_;
  using S = Simd<Real>;
  using vec = typename S::vec;
  using Words = vec;
  static constexpr int pair = 1, unit = 1, narrow = 6;  // queries up to which lanes along a key pay (Zen 4)

  static Words load(const Number* at) { return S::load(at); }
  static Words splat(const Number* at) { return S::splat(*at); }
  static vec add_product(vec sum, Words a, Words b) { return sum + a * b; }

  static void read_row(Number* to, const Array& a, int64_t offset, int64_t n) { read(to, a, offset, n); }
  static void round(Number* to, const Real* from, int64_t n) { memcpy(to, from, n * sizeof(Real)); }

  template <bool>
  static void keep_weights(Real* scores, int64_t k, vec e, vec) { S::store(scores + k * S::lanes, e); }
  static void values(Words* to, const Number* v, const Number*) { to[0] = S::load(v); }
  static void store(Number* to, const vec* sum, vec inverse) { S::store(to, sum[0] * inverse); }
  static Number finite(Real x) { return x; }
};

#if defined(__AVX512BF16__)
struct Paired {  // bfloat16, multiplied in pairs and summed in float
  using Real = float;
  using Number = uint16_t;
  using S = Simd<float>;
  using vec = S::vec;
  using Words = S::ivec;
  static constexpr int pair = 2, unit = 2, narrow = 5;

  static Words load(const Number* at) { return (Words)_mm512_loadu_si512(at); }
  static Words splat(const Number* at) {
    int32_t word;
    memcpy(&word, at, 4);
    return (Words)_mm512_set1_epi32(word);
  }
  static vec add_product(vec sum, Words a, Words b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

  static void read_row(Number* to, const Array& a, int64_t offset, int64_t n) { memcpy(to, place(a, offset), 2 * n); }
  static void round(Number* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = Brain::of(from[i]).bits;
  }

  // Weights of two neighbouring keys go into one word: those of vector k and k + 1 when a vector holds one key for each
  // query, those of neighbouring lanes when it runs along the keys.
  template <bool along>
  static void keep_weights(float* scores, int64_t k, vec e0, vec e1) {
    __m512i words = (__m512i)_mm512_cvtne2ps_pbh((__m512)e1, (__m512)e0);
    if (!along) words = _mm512_permutexvar_epi16(interleave(), words);
    _mm512_storeu_si512(scores + k / 2 * S::lanes, words);
  }
  static void values(Words* to, const Number* v, const Number* next) {
    const __m512i a = _mm512_loadu_si512(v), b = next ? _mm512_loadu_si512(next) : _mm512_setzero_si512();
    to[0] = (Words)_mm512_unpacklo_epi16(a, b);
    to[1] = (Words)_mm512_unpackhi_epi16(a, b);
  }
  static void store(Number* to, const vec* sum, vec inverse) {  // unpacking took fours from each 8, in turns
    const __m512i fours = (__m512i)_mm512_cvtne2ps_pbh((__m512)(sum[1] * inverse), (__m512)(sum[0] * inverse));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), fours));
  }

 private:
  static __m512i interleave() {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = i / 2 + i % 2 * 16;
    return _mm512_load_si512(index);
  }
};
#endif

template <class Number>
struct Rows {  // rows of keys or values: row j < end[0] lies in stretch 0, and so on; there are end[2]
  const Number* at[3];
  int64_t step[3], end[3];

  int stretch(int64_t j) const { return (j >= end[0]) + (j >= end[1]); }
  const Number* operator()(int64_t j) const {
    const int s = stretch(j);
    return at[s] + j * step[s];
  }

  // Brings near a cache line, counted from their beginning, of each of rows j to j + count - 1 that there are. Always
  // inlined: GCC leaves calls of functions out that do nothing but this.
  template <int count>
  SPEECHKIT_INLINE void fetch(int64_t j, int64_t line) const {
    const int s = stretch(j);
    if (j + count <= end[2] && stretch(j + count - 1) == s) {
      const char* place = reinterpret_cast<const char*>(at[s] + j * step[s]) + 64 * line;
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r, place += step[s] * sizeof(Number)) __builtin_prefetch(place, 0, 2);
    } else {
      for (int64_t r = j; r < least(j + count, end[2]); ++r)
        __builtin_prefetch(reinterpret_cast<const char*>((*this)(r)) + 64 * line, 0, 2);
    }
  }

  // Rows j to j + count - 1, those before row 0 or after the last counted as that one.
  template <int count>
  SPEECHKIT_INLINE void lines(const Number** line, int64_t j, int64_t last) const {
    const int s = stretch(j);
    if (j >= 0 && j + count - 1 <= last && stretch(j + count - 1) == s) {
      const Number* start = at[s] + j * step[s];
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r) line[r] = start + r * step[s];
    } else {
      for (int r = 0; r < count; ++r) line[r] = (*this)(most(0, least(j + r, last)));
    }
  }
};

template <class E>
class Worker {
 protected:
  using Real = typename E::Real;
  using Number = typename E::Number;
  using Words = typename E::Words;
  using S = Simd<Real>;
  using vec = typename S::vec;
  static constexpr int L = S::lanes;
  static constexpr int kSpan = L * E::pair;  // numbers in a vector
  static constexpr int kUnits = kRegisters == 32 ? 4 / E::unit : 2;
  static constexpr int kRows = 6;

  const StreamAttn& a;
  const int64_t width;  // of a row as it is computed on
  const bool copied;    // whether rows are copied: another type, or too short or odd to be read where they lie
  Number *content, *position, *turned_content, *turned_position, *result, *key_copy, *value_copy, *table_copy;
  Real *scores, *band, *bias, *row, *shift;
  struct {
    Rows<Number> keys, values, positions;
  } next{};  // what the first tile of the next task reads
  char* free;

  template <class T>
  void take(T*& array, int64_t n) {
    array = reinterpret_cast<T*>(free);
    free += (n * sizeof(T) + 63) / 64 * 64;
  }

 public:
  Worker(const StreamAttn& a, char* scratch)
      : a(a),
        width((most(a.D, kSpan) + E::pair - 1) / E::pair * E::pair),
        copied(width != a.D || size_of(a.q.type) != sizeof(Number)),
        free(scratch) {
    take(content, L * width), take(position, L * width);
    take(turned_content, L * (width + kSpan)), take(turned_position, L * (width + kSpan));
    take(result, L * width);
    take(scores, L * (a.W + L + kBlock)), take(band, L * kBand), take(bias, a.W + L + kBlock);
    take(row, width), take(shift, width);
    const int64_t rows = copied ? a.W : 0;
    take(key_copy, rows * width), take(value_copy, rows * width), take(table_copy, (rows + (copied ? L : 0)) * width);
  }

  int64_t bytes() const { return free - static_cast<char*>(nullptr); }

  // Tasks [begin, end). Memory is far away, so while a task computes, what the next one will read is fetched.
  void tasks(int64_t begin, int64_t end) {
    look(begin);
    for (int64_t j = 0; j < most(next.keys.end[2], next.positions.end[2]); j += kBlock) fetch_keys(j);
    for (int64_t index = begin; index < end; ++index) {
      next = {};
      if (index + 1 < end) look(index + 1);
      task(index);
    }
  }

 protected:
  struct Head {
    int64_t b, g, h;
    bool first;  // of those that share its keys
  };
  Head head(int64_t index) const {
    const int64_t group = a.H / a.G, g = index / group / a.B;
    return {index / group % a.B, g, g * group + index % group, index % group == 0};
  }

  // Queries up to `stop`, which see the frames of times [low, high).
  struct Chunk {
    int64_t stop, low, high;
  };
  Chunk chunk_of(int64_t b, int64_t i) const {
    const int64_t pos = a.pos[b], frames = a.qlen[b], t = pos + i;
    const int64_t first = a.chunk ? t - t % a.chunk : pos, size = a.chunk ? a.chunk : frames;
    return {least(frames, first + size - pos), most(most(0, first - a.left), pos - (a.W - a.C)),
            least(pos + frames, first + size)};
  }

  void task(int64_t index) {
    const auto [b, g, h, first] = head(index);
    for (int64_t i = 0; i < a.qlen[b];) {
      const Chunk chunk = chunk_of(b, i);
      for (int64_t rows; i < chunk.stop; i += rows, next = {}) {
        rows = least(chunk.stop - i, L);
        tile(b, h, g, i, rows, chunk.low, chunk.high);
      }
    }
    for (int64_t i = a.qlen[b]; i < a.C; ++i) memset(out(b, i, h), 0, a.D * size_of(a.out.type));
    commit(b, h, g, first);
  }

  int64_t lines() const { return (width * sizeof(Number) + 63) / 64; }

  // Notes what the first tile of a task reads in blocks, and fetches the rest of what it reads and writes.
  void look(int64_t index) {
    const auto [b, g, h, first] = head(index);
    if (copied || a.qlen[b] == 0) return;
    const Chunk chunk = chunk_of(b, 0);
    const int64_t rows = least(chunk.stop, L), n = chunk.high - chunk.low;
    next.keys = window(a.k, 0, b, g, chunk.low, n, nullptr);
    next.values = window(a.v, 1, b, g, chunk.low, n, nullptr);
    if (a.rel) next.positions = table(h, a.rel_zero + chunk.low - a.pos[b] - (rows - 1), n + rows - 1);
    const int64_t row = a.cache.stride[3], oldest = ring(b, 0, g, a.pos[b]);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t x = 0; x < lines() * 64; x += 64) {
        __builtin_prefetch(place(a.q, at(a.q, b, i, h)) + x, 0, 2);
        __builtin_prefetch(out(b, i, h) + x, 1, 2);
        __builtin_prefetch(place(a.cache, oldest + i * row) + x, 1, 2);
        __builtin_prefetch(place(a.cache, oldest + a.cache.stride[1] + i * row) + x, 1, 2);
      }
  }

  SPEECHKIT_INLINE void fetch_keys(int64_t j) const {  // and their positions
    for (int64_t line = 0; line < lines(); ++line) {
      next.keys.template fetch<kBlock>(j, line);
      next.positions.template fetch<kBlock>(j, line);
    }
  }

  char* out(int64_t b, int64_t i, int64_t h) const { return place(a.out, ((b * a.C + i) * a.H + h) * a.D); }
  int64_t ring(int64_t b, int64_t which, int64_t g, int64_t t) const {
    const int64_t* s = a.cache.stride;
    return a.slots[b] * s[0] + which * s[1] + g * s[2] + t % a.W * s[3];
  }
  static int64_t at(const Array& x, int64_t b, int64_t i, int64_t h) {
    return b * x.stride[0] + i * x.stride[1] + h * x.stride[2];
  }

  // Queries [i, i + rows) of head h, which see the frames of times [low, high).
  void tile(int64_t b, int64_t h, int64_t g, int64_t i, int64_t rows, int64_t low, int64_t high) {
    const int64_t n = high - low, offset = low - a.pos[b];  // of key 0 from frame 0
    const bool few = rows <= E::narrow;
    queries(b, h, i, rows, few);
    if (a.key_bias) gather_bias(b, h, low, n);
    const Rows<Number> keys = window(a.k, 0, b, g, low, n, key_copy);
    const Rows<Number> positions = a.rel ? table(h, a.rel_zero + offset - i - (rows - 1), n + rows - 1) : keys;
    const Real slope = slope_of(h);
    Real inverse[L];
    if (few)
      for (int64_t r = 0; r < rows; ++r)
        inverse[r] = narrow_weights(keys, n, positions, rows - 1 - r, r, slope, offset - i - r);
    else
      wide_weights(keys, n, positions, rows, slope, offset - i, inverse);
    const Rows<Number> values = window(a.v, 1, b, g, low, n, value_copy);
    Number* to = copied ? result : reinterpret_cast<Number*>(out(b, i, h));
    const int64_t step = copied ? width : a.H * a.D;
    // words between the weights of neighbouring queries, and of neighbouring keys
    sum_values(values, n, rows, few ? strip(n) : 1, few ? 1 : L, inverse, to, step);
    if (copied)
      for (int64_t r = 0; r < rows; ++r) deliver(out(b, i + r, h), result + r * width);
  }

  void queries(int64_t b, int64_t h, int64_t i, int64_t rows, bool few) {
    query_rows(content, a.q, a.bias_u, b, h, i, rows);
    if (!few) turn(turned_content, content, rows);
    if (!a.rel) return;
    query_rows(position, a.q_pos ? a.q_pos : a.q, a.bias_v, b, h, i, rows);
    if (!few) turn(turned_position, position, rows);
  }

  void query_rows(Number* to, const Array& q, const Array& added, int64_t b, int64_t h, int64_t i, int64_t rows) {
    if (added) read(shift, added, h * added.stride[0], a.D);
    for (int64_t r = 0; r < rows; ++r, to += width) {
      read(row, q, at(q, b, i + r, h), a.D);
      if (added)
        for (int64_t d = 0; d < a.D; ++d) row[d] += shift[d];
      E::round(to, row, a.D);
      memset(to + a.D, 0, (width - a.D) * sizeof(Number));
    }
  }

  // [L, width] to [width / pair, L]: words are moved, not computed with
  void turn(Number* to, Number* from, int64_t rows) {
    memset(from + rows * width, 0, (L - rows) * width * sizeof(Number));
    const int64_t words = width / E::pair;
    const Real* source = reinterpret_cast<const Real*>(from);
    for (int64_t w = 0; w < words; w += L) {
      const int64_t start = least(w, words - L);  // the last square may overlap the one before
      vec x[L];
      for (int r = 0; r < L; ++r) x[r] = S::load(source + r * words + start);
      S::transpose(x);
      for (int r = 0; r < L; ++r) S::store(reinterpret_cast<Real*>(to) + (start + r) * L, x[r]);
    }
  }

  void gather_bias(int64_t b, int64_t h, int64_t low, int64_t n) {
    const int64_t past = most(0, least(n, a.pos[b] - low)), *s = a.cache_bias.stride;
    for (int64_t j = 0; j < past;) {
      const int64_t start = (low + j) % a.W, length = least(past - j, a.W - start);
      read(bias + j, a.cache_bias, a.slots[b] * s[0] + h * s[1] + start * s[2], length, s[2]);
      j += length;
    }
    read(bias + past, a.key_bias, at(a.key_bias, b, low + past - a.pos[b], h), n - past, a.key_bias.stride[1]);
    for (int64_t j = 0; j < n; ++j) bias[j] *= Real(kLog2e);
    memset(bias + n, 0, L * sizeof(Real));
  }

  // Where the n keys (which = 0) or values (1) from time `low` lie: two stretches of the ring, then this call's.
  Rows<Number> window(const Array& fresh, int64_t which, int64_t b, int64_t g, int64_t low, int64_t n, Number* copy) {
    const int64_t past = most(0, least(n, a.pos[b] - low)), ahead = low + past - a.pos[b];
    const int64_t turn = past ? least(past, a.W - low % a.W) : 0;
    const int64_t offset[3] = {past ? ring(b, which, g, low) : 0, ring(b, which, g, 0), at(fresh, b, ahead, g)};
    const int64_t step[3] = {a.cache.stride[3], a.cache.stride[3], fresh.stride[1]}, start[4] = {0, turn, past, n};
    Rows<Number> rows{{}, {}, {turn, past, n}};
    for (int s = 0; s < 3; ++s) {
      const Array& source = s == 2 ? fresh : a.cache;
      rows.step[s] = copied ? width : step[s];
      rows.at[s] = copied ? copy : static_cast<const Number*>(source.data) + offset[s] - start[s] * step[s];
      for (int64_t j = start[s]; copied && j < start[s + 1]; ++j)
        copy_row(copy + j * width, source, offset[s] + (j - start[s]) * step[s]);
    }
    return rows;
  }

  void copy_row(Number* to, const Array& from, int64_t offset) const {
    E::read_row(to, from, offset, a.D);
    memset(to + a.D, 0, (width - a.D) * sizeof(Number));
  }

  // Rows of the table from `first` on, n of them.
  Rows<Number> table(int64_t h, int64_t first, int64_t n) {
    const int64_t offset = h * a.rel.stride[0] + first * a.rel.stride[1];
    Rows<Number> rows{{static_cast<const Number*>(a.rel.data) + offset}, {a.rel.stride[1]}, {n, n, n}};
    if (!copied) return rows;
    for (int64_t j = 0; j < n; ++j) copy_row(table_copy + j * width, a.rel, offset + j * a.rel.stride[1]);
    return {{table_copy}, {width}, {n, n, n}};
  }

  // score[j] = scale * (...) + bias_j - slope * |distance|, in powers of two; distance = apart + lane
  vec finish(vec score, vec added, Real slope, Real apart) const {
    score = score * Real(a.scale * kLog2e) + added;
    return slope == 0 ? score : score - slope * S::magnitude(apart + S::iota());
  }
  Real slope_of(int64_t h) const {
    Real slope = 0;
    if (a.slopes) read(&slope, a.slopes, h * a.slopes.stride[0], 1);
    return slope * Real(kLog2e);
  }

  // Weights of query r at scores[r * strip], along the keys; key j is `offset + j` frames from it, and meets row
  // `above + j` of the positions.
  Real narrow_weights(const Rows<Number>& keys, int64_t n, const Rows<Number>& positions, int64_t above, int64_t r,
                      Real slope, int64_t offset) {
    Real* line = scores + r * strip(n);
    vec top = S::splat(-__builtin_inf());
    for (int64_t j = 0; j < n; j += L) {
      vec dots[L] = {};
      for (int64_t x = j; r == 0 && x < j + L; x += kBlock) fetch_keys(x);
      add_dots(dots, content + r * width, keys, j, n - 1);
      if (a.rel) add_dots(dots, position + r * width, positions, above + j, above + n - 1);
      vec score = finish(S::sums(dots), a.key_bias ? S::load(bias + j) : vec{}, slope, offset + j);
      if (n - j < L) score = S::iota() < Real(n - j) ? score : S::splat(-__builtin_inf());
      top = S::above(top, score);
      S::store(line + j, score);
    }
    return 1 / soften<true>(line, (n + L - 1) / L, S::top_everywhere(top))[0];
  }

  static int64_t strip(int64_t n) { return (n + 2 * L - 1) / (2 * L) * 2 * L; }  // an even number of vectors

  // dots[r] += products of the query with row j + r, lane by lane
  SPEECHKIT_INLINE void add_dots(vec* dots, const Number* query, const Rows<Number>& rows, int64_t j, int64_t last) const {
    const Number* line[L];
    rows.template lines<L>(line, j, last);
    for (int64_t d = 0; d + kSpan <= width; d += kSpan) {
      const Words q = E::load(query + d);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) dots[r] = E::add_product(dots[r], q, E::load(line[r] + d));
    }
    if (width % kSpan == 0) return;
    alignas(64) Number rest[kSpan] = {};  // the last vector overlaps the one before, where the query counts as 0
    memcpy(rest + kSpan - width % kSpan, query + width - width % kSpan, width % kSpan * sizeof(Number));
    const Words q = E::load(rest);
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) dots[r] = E::add_product(dots[r], q, E::load(line[r] + width - kSpan));
  }

  // Weights of key j for query i at lane i of vector j.
  virtual void wide_weights(const Rows<Number>& keys, int64_t n, const Rows<Number>& positions, int64_t rows, Real slope,
                            int64_t offset, Real* inverse) {
    constexpr int ahead = (L - 1 + kBlock - 1) / kBlock * kBlock;  // rows of the band before those of block 0
    const int64_t unused = L - rows;  // first rows of the band, which only lanes without a query would need
    auto fill = [&](int64_t m) {
      if (m + kBlock <= unused) return;
      vec x[kBlock] = {};
      add_products(x, turned_position, positions, m - unused, n + rows - 2, [&](int64_t line) __attribute__((always_inline)) {
        next.positions.template fetch<kBlock>(most(0, m - unused), line);
      });
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) S::store(band + (m % kBand + r) * L, x[r]);
    };
    if (a.rel)
      for (int64_t m = 0; m < ahead; m += kBlock) fill(m);
    vec top = S::splat(-__builtin_inf());
    for (int64_t j = 0; j < n; j += kBlock) {
      vec x[kBlock] = {};
      if (a.rel) {
        fill(j + ahead);
        skew(x, j);
      }
      add_products(x, turned_content, keys, j, n - 1, [&](int64_t line) __attribute__((always_inline)) {
        next.keys.template fetch<kBlock>(j, line);
      });
      top = settle(x, j, n, slope, offset, top);
    }
    S::store(inverse, S::splat(1) / soften<false>(scores, n, top));
  }

  // Keeps the scores of the keys from j on whose products are x; the highest so far.
  SPEECHKIT_INLINE vec settle(vec* x, int64_t j, int64_t n, Real slope, int64_t offset, vec top) {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const int64_t key = least(j + r, n - 1);
      // |t_j - t_i| is the same as |t_i - t_j|, whose lanes ascend
      x[r] = finish(x[r], a.key_bias ? S::splat(bias[key]) : vec{}, slope, -Real(offset + key));
      if (j + r < n) top = S::above(top, x[r]);  // a row of the block after the last key is nobody's score
      S::store(scores + (j + r) * L, x[r]);
    }
    return top;
  }

  // sum[r] += the products of one query a lane with row j + r, number by number. `between` is called for each cache line.
  template <class F>
  SPEECHKIT_INLINE void add_products(vec* sum, const Number* queries, const Rows<Number>& rows, int64_t j, int64_t last,
                                     F between) const {
    const Number* line[kBlock];
    rows.template lines<kBlock>(line, j, last);
    const auto add = [&](int64_t d) __attribute__((always_inline)) {
      const Words q = E::load(queries + d * L);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) sum[r] = E::add_product(sum[r], q, E::splat(line[r] + d));
    };
    constexpr int64_t count = 64 / sizeof(Number);
    int64_t d = 0;
    for (; d + count <= width; d += count) {
      between(d / count);
#pragma GCC unroll 4
      for (int64_t x = d; x < d + count; x += E::pair) add(x);
    }
    for (; d < width; d += E::pair) add(d);
  }

  // x[r] lane i = band[j + r + L - 1 - i] lane i: rows are moved down by the bits of L - 1 - i, one at a time.
  SPEECHKIT_INLINE void skew(vec* x, int64_t j) const {
    vec y[kBlock + L - 1];
#pragma GCC unroll 32
    for (int r = 0; r < kBlock + L - 1; ++r) y[r] = S::load(band + ((j + r / kBlock * kBlock) % kBand + r % kBlock) * L);
#pragma GCC unroll 4
    for (int bit = L / 2; bit; bit /= 2) {
      typename S::ivec moved;
      for (int i = 0; i < L; ++i) moved[i] = (L - 1 - i) & bit ? -1 : 0;
#pragma GCC unroll 32
      for (int r = 0; r < kBlock + bit - 1; ++r) y[r] = moved ? y[r + bit] : y[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) x[r] = y[r];
  }

  // exp2(score - top) in place of n vectors of scores, and their sums
  template <bool along>
  static vec soften(Real* line, int64_t n, vec top) {
    vec sum = {};
    for (int64_t k = 0; k < n; k += E::pair) {
      const vec e0 = exp2(S::load(line + k * L) - top);
      const vec e1 = E::pair == 2 && k + 1 < n ? exp2(S::load(line + (k + 1) * L) - top) : vec{};
      sum += E::pair == 2 ? e0 + e1 : e0;
      E::template keep_weights<along>(line, k, e0, e1);
    }
    return along ? S::sum_everywhere(sum) : sum;
  }

  struct Part {
    int64_t first, stop;
  };

  virtual void sum_values(const Rows<Number>& values, int64_t n, int64_t rows, int64_t ld, int64_t step,
                          const Real* inverse, Number* to, int64_t stride) {
    constexpr int span = L * E::unit;
    const Number* weights = reinterpret_cast<const Number*>(scores);
    const int64_t units = (width + span - 1) / span, blocks = (rows + kRows - 1) / kRows;
    const int64_t across = (units + kUnits - 1) / kUnits, turns = blocks * across;
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t count = (rows - i + blocks - block - 1) / (blocks - block);
      for (int64_t u = 0; u < units; u += kUnits) {
        int64_t start[kUnits];
        for (int64_t x = 0; x < kUnits; ++x) start[x] = least((u + x) * span, width - span);
        const int64_t turn = block * across + u / kUnits;  // which fetches its part of each row
        const Part part{turn * lines() / turns, (turn + 1) * lines() / turns};
        const int64_t wide = least(kUnits, units - u);
        pick<kRows, kUnits>(count, wide, part, values, n, weights + i * ld * E::pair, ld, step, inverse + i, to + i * stride,
                            stride, start);
      }
      i += count;
    }
  }

  // The product compiled for `count` rows and `wide` units
  template <int rows, int units, class... Rest>
  void pick(int64_t count, int64_t wide, const Rest&... rest) const {
    if constexpr (units > 1)
      if (wide < units) return pick<rows, units - 1>(count, wide, rest...);
    if constexpr (rows > 1)
      if (count < rows) return pick<rows - 1, units>(count, wide, rest...);
    product<rows, units>(rest...);
  }

  template <int rows, int units>
  void product(Part part, const Rows<Number>& values, int64_t n, const Number* weights, int64_t ld, int64_t step,
               const Real* inverse, Number* to, int64_t stride, const int64_t* start) const {
    vec sum[rows][units * E::unit] = {};
    for (int64_t j = 0; j < n; j += E::pair, weights += step * E::pair) {
      for (int64_t line = part.first; j % kBlock == 0 && line < part.stop; ++line)
        next.values.template fetch<kBlock>(j, line);
      const Number* one = values(j);
      const Number* two = j + 1 < n ? values(j + 1) : nullptr;
      Words x[units * E::unit];
#pragma GCC unroll 4
      for (int u = 0; u < units; ++u) E::values(x + u * E::unit, one + start[u], two ? two + start[u] : nullptr);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Words p = E::splat(weights + r * ld * E::pair);
#pragma GCC unroll 4
        for (int u = 0; u < units * E::unit; ++u) sum[r][u] = E::add_product(sum[r][u], p, x[u]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int u = 0; u < units; ++u) E::store(to + r * stride + start[u], sum[r] + u * E::unit, S::splat(inverse[r]));
  }

  void deliver(char* to, const Number* from) const {
    if (size_of(a.out.type) == sizeof(Number)) return void(memcpy(to, from, a.D * sizeof(Number)));
    if constexpr (std::is_same_v<Number, float>)
      for (int64_t d = 0; d < a.D; ++d) {
        const uint16_t bits = a.out.type == Type::f16 ? Half::of(from[d]).bits : Brain::of(from[d]).bits;
        memcpy(to + 2 * d, &bits, 2);
      }
  }

  void commit(int64_t b, int64_t h, int64_t g, bool keys_too) const {
    for (int64_t i = 0; i < a.keep[b]; ++i) {
      const int64_t t = a.pos[b] + i, bytes = a.D * size_of(a.k.type), *s = a.cache_bias.stride;
      if (keys_too) {
        memcpy(place(a.cache, ring(b, 0, g, t)), place(a.k, at(a.k, b, i, g)), bytes);
        memcpy(place(a.cache, ring(b, 1, g, t)), place(a.v, at(a.v, b, i, g)), bytes);
      }
      if (a.key_bias)
        read(static_cast<Real*>(a.cache_bias.data) + a.slots[b] * s[0] + h * s[1] + t % a.W * s[2], a.key_bias,
             at(a.key_bias, b, i, h), 1);
    }
  }
};

}  // namespace

#if defined(SPEECHKIT_TILES)
#include "stream_attn_amx.h"
#endif

namespace {

template <class F>
auto with_worker(Type type, F use) {
#if defined(SPEECHKIT_TILES)
  return use(static_cast<Tiled*>(nullptr));  // no other type comes here
#else
#if defined(__AVX512BF16__)
  if (type == Type::bf16) return use(static_cast<Worker<Paired>*>(nullptr));
#endif
  if (type == Type::f64) return use(static_cast<Worker<Dense<double>>*>(nullptr));
  return use(static_cast<Worker<Dense<float>>*>(nullptr));
#endif
}

}  // namespace

namespace speechkit::SPEECHKIT_ISA {

int64_t stream_attn_bytes(const StreamAttn& a) {
  return with_worker(a.q.type, [&](auto* kind) { return std::remove_pointer_t<decltype(kind)>(a, nullptr).bytes(); });
}

void stream_attn(const StreamAttn& a, int64_t begin, int64_t end, char* scratch) {
#if defined(SPEECHKIT_TILES)
  const Tiles in_use;
#endif
  with_worker(a.q.type, [&](auto* kind) {
    std::remove_pointer_t<decltype(kind)> worker(a, scratch);
    worker.tasks(begin, end);
  });
}

}  // namespace speechkit::SPEECHKIT_ISA
