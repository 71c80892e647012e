// speechkit::stream_attn on NVIDIA GPUs: the choice of a variant of cuda/stream_attn.cu, and its arguments.
#include "gpu.h"
#include "stream_attn_check.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace speechkit::gpu {
namespace {

const Arguments& arguments = stream_attn_arguments;
constexpr const char* names[] = {"TYPE", "WIDTH", "ROW_WARPS", "KEY_WARPS", "KEYS", "TABLE", "Q_POS", "VEC", "STAGES", nullptr};
constexpr int64_t widest = 128, reserved = 1024;  // of a head; bytes of shared memory that a block costs beside its own

int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step; }

// The constants of stream_attn.cu, which says what they are, and what they cost in a call of `frames` after `left`.
struct Choice {
  int type, width, row_warps, key_warps, keys, table, q_pos, vec, stages = 2;

  int64_t rows() const { return 16 * row_warps; }
  int64_t keys_each(int64_t seen) const { return up(seen, key_warps * keys) * keys; }  // whole stages of them

  int64_t shared_bytes(int64_t seen) const {
    const int64_t padded = up(width, 16) * 16, pitch = (padded * (type ? 2 : 4) / 16 | 1) * 16;
    const int64_t step = key_warps * keys, warps = row_warps * key_warps;
    const int64_t table_rows = table == 2 ? key_warps * (keys + rows()) : 0, sums = 16 * warps * 4 * (padded + 8);
    const int64_t stage = std::max((2 * step + table_rows) * pitch + 4 * step, sums);
    const int64_t query = (1 + q_pos) * rows() * pitch;
    const int64_t slab = table == 1 ? (up(seen, 16) * 16 + rows()) * pitch : 0;
    return stages * (stage + query) + 8 * padded + 128 * warps + slab;
  }

  // First the fewest passes over the keys, then the most warps on a processor (8 keep its memory busy), then a table
  // that stays, then long stages. None of it goes by the load: a stream gives the same bits whoever else is there.
  std::array<int64_t, 4> merit(int64_t frames, int64_t seen, int64_t limit) const {
    const int64_t blocks = (limit + reserved) / (shared_bytes(seen) + reserved);
    const int64_t warps = blocks * key_warps * std::min<int64_t>(row_warps, up(frames, 16));
    return {-up(frames, rows()), std::min<int64_t>(8, warps), -table, keys * key_warps};
  }
};

std::optional<Choice> choose(Choice choice, int64_t frames, int64_t seen, int64_t limit, bool rel) {
  std::optional<Choice> best;
  for (int row_warps : {1, 2, 4})
    for (int key_warps : {1, 2, 4})
      for (int table : {1, 2})
        for (int keys : {64, 32, 16}) {
          if (row_warps * key_warps > 4 || keys * key_warps > 64 || (table == 2 && !rel)) continue;
          choice.row_warps = row_warps, choice.key_warps = key_warps, choice.keys = keys, choice.table = rel ? table : 0;
          if (choice.shared_bytes(seen) > limit) continue;
          if (!best || choice.merit(frames, seen, limit) > best->merit(frames, seen, limit)) best = choice;
        }
  return best;
}

// ---- arguments, as cuda/args.h has them -----------------------------------------------------------------------------

int64_t stride(const Tensor& x, int64_t axis) { return x.stride(axis) * (x.scalar_type() == ScalarType::Float ? 4 : 2); }

Rows rows(const MaybeTensor& x) {
  if (!x) return {};
  return {static_cast<const char*>(x->const_data_ptr()), stride(*x, 0), stride(*x, 2), static_cast<int>(stride(*x, 1))};
}

Ring ring(const MaybeTensor& x) {
  if (!x) return {};
  const bool parts = x->dim() == 5;  // a bias has none
  char* at = static_cast<char*>(x->data_ptr());
  return {at, stride(*x, 0), parts ? stride(*x, 1) : 0, stride(*x, parts + 1), static_cast<int>(stride(*x, parts + 2))};
}

Table table(const MaybeTensor& x, int64_t zero) {
  if (!x) return {};
  return {static_cast<const char*>(x->const_data_ptr()), stride(*x, 0), stride(*x, 1), static_cast<int>(x->size(1)),
          static_cast<int>(zero)};
}

Reals reals(const MaybeTensor& x) {
  if (!x) return {};
  return {static_cast<const char*>(x->const_data_ptr()), stride(*x, 0), x->dim() == 2 ? stride(*x, 1) : 0,
          x->scalar_type() != ScalarType::Float};
}

int64_t piece_of(int64_t width_bytes, std::initializer_list<MaybeTensor> all) {
  int64_t piece = common_piece({width_bytes});
  for (const MaybeTensor& x : all)
    if (x) {
      piece = common_piece({piece, reinterpret_cast<intptr_t>(x->const_data_ptr())});
      for (int64_t axis = 0; axis + 1 < x->dim(); ++axis) piece = common_piece({piece, stride(*x, axis)});
    }
  return piece;
}

MaybeTensor dense(const MaybeTensor& x) {
  return !x || x->stride(-1) == 1 ? x : torch::stable::contiguous(*x);
}

// ---- one call -----------------------------------------------------------------------------------------------------

struct Call {
  Tensor q, k, v, cache, slots, pos, qlen;
  MaybeTensor keep, q_pos, bias_u, bias_v, rel;
  int64_t rel_zero;
  MaybeTensor cache_bias, key_bias, slopes;
  int64_t chunk, left;
  double scale;

  Tensor plainly() const {
    return plain("speechkit::plain_stream_attn", q, k, v, cache, slots, pos, qlen, keep, q_pos, bias_u, bias_v, rel,
                 rel_zero, cache_bias, key_bias, slopes, chunk, left, scale);
  }
};

void check(const Call& c, const StreamAttnSizes& n) {
  const auto expect = [&](const char* name, const MaybeTensor& x, Shape shape, std::optional<ScalarType> type) {
    if (!x) return;
    arguments.shape(name, *x, shape);
    if (type) arguments.dtype(name, *x, *type);
    arguments.device(name, *x, c.q);
  };
  const ScalarType type = c.q.scalar_type(), real = type == ScalarType::Double ? type : ScalarType::Float;
  expect("k", c.k, {n.B, n.C, n.G, n.D}, type);
  expect("v", c.v, {n.B, n.C, n.G, n.D}, type);
  expect("cache", c.cache, {-1, 2, n.G, -1, n.D}, type);
  check_stream_attn_reach(n, c.rel, c.rel_zero, c.cache_bias, c.key_bias, c.chunk, c.left);
  expect("q_pos", c.q_pos, {n.B, n.C, n.H, n.D}, type);
  expect("bias_u", c.bias_u, {n.H, n.D}, std::nullopt);
  expect("bias_v", c.bias_v, {n.H, n.D}, std::nullopt);
  expect("rel", c.rel, {n.H, -1, n.D}, type);
  expect("cache_bias", c.cache_bias, {c.cache.size(0), n.H, n.W}, real);
  expect("key_bias", c.key_bias, {n.B, n.C, n.H}, std::nullopt);
  expect("slopes", c.slopes, {n.H}, std::nullopt);
  arguments.counts("slots", c.slots, n.B, c.q);
  arguments.counts("pos", c.pos, n.B, c.q);
  arguments.counts("qlen", c.qlen, n.B, c.q);
  if (c.keep) arguments.counts("keep", *c.keep, n.B, c.q);
}

// Whatever else is left to plain PyTorch.
bool served(const Call& c, const StreamAttnSizes& n) {
  return type_number(c.q.scalar_type()) >= 0 && n.D >= 1 && n.D <= widest && c.cache.stride(4) == 1 &&
         std::max({n.W, c.left + n.C, c.chunk}) <= INT32_MAX / 2;
}

// The types and layouts that the kernel reads.
void make_readable(Call& c) {
  if (!c.rel) c.q_pos = c.bias_v = std::nullopt;
  for (Tensor* x : {&c.q, &c.k, &c.v, &c.slots, &c.pos, &c.qlen}) *x = *dense(*x);
  for (MaybeTensor* x : {&c.keep, &c.q_pos, &c.rel}) *x = dense(*x);
  const auto widen = [](MaybeTensor& x, ScalarType narrow) {
    const ScalarType type = x ? x->scalar_type() : ScalarType::Float;
    if (type != ScalarType::Float && type != narrow) x = torch::stable::to(*x, std::make_optional(ScalarType::Float));
  };
  for (MaybeTensor* x : {&c.bias_u, &c.bias_v, &c.slopes}) widen(*x, c.q.scalar_type());
  widen(c.key_bias, ScalarType::Float);
}

StreamAttnArgs described(const Call& c, const StreamAttnSizes& n, const Tensor& out, const Choice& choice) {
  return {rows(c.q), rows(c.k), rows(c.v), rows(c.q_pos), rows(out), rows(c.key_bias),
          ring(c.cache), ring(c.cache_bias), table(c.rel, c.rel_zero),
          reals(c.bias_u), reals(c.bias_v), reals(c.slopes),
          counts(c.slots), counts(c.pos), counts(c.qlen), c.keep ? counts(*c.keep) : Counts{},
          static_cast<int>(n.B), static_cast<int>(n.C), static_cast<int>(n.H / n.G), static_cast<int>(n.W),
          static_cast<int>(c.chunk), static_cast<int>(c.left), static_cast<int>(c.cache.size(0)),
          static_cast<int>(choice.keys_each(c.left + n.C)), static_cast<float>(c.scale * M_LOG2E)};
}

Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, const Tensor& slots, const Tensor& pos,
           const Tensor& qlen, const MaybeTensor& keep, const MaybeTensor& q_pos, const MaybeTensor& bias_u,
           const MaybeTensor& bias_v, const MaybeTensor& rel, int64_t rel_zero, const MaybeTensor& cache_bias,
           const MaybeTensor& key_bias, const MaybeTensor& slopes, int64_t chunk, int64_t left, double scale) {
  Call c{q, k, v, cache, slots, pos, qlen, keep, q_pos, bias_u, bias_v, rel, rel_zero, cache_bias, key_bias, slopes,
         chunk, left, scale};
  const StreamAttnSizes n = stream_attn_sizes(q, k, cache);
  check(c, n);
  if (!served(c, n)) return c.plainly();
  make_readable(c);
  Tensor out = torch::stable::new_empty(q, {n.B, n.C, n.H, n.D});
  if (n.B * n.C * n.H == 0) return out;
  const Device& device = device_of(q);
  Choice wanted{type_number(q.scalar_type()), static_cast<int>(n.D)};
  wanted.q_pos = c.q_pos.has_value();
  wanted.vec = static_cast<int>(piece_of(n.D * size_of(q.scalar_type()), {c.q, c.k, c.v, c.q_pos, c.rel, c.cache, out}));
  const std::optional<Choice> choice = choose(wanted, n.C, left + n.C, device.shared_bytes, rel.has_value());
  if (!choice) return c.plainly();
  const Choice& o = *choice;
  const Variant variant{"stream_attn", names,
                        {o.type, o.width, o.row_warps, o.key_warps, o.keys, o.table, o.q_pos, o.vec, o.stages},
                        32 * o.row_warps * o.key_warps, o.shared_bytes(left + n.C)};
  const Kernel& kernel = load(device, variant);
  // Each block serves as many streams as every other, as far as the number divides, and all blocks run at once.
  const int64_t strips = up(n.C, o.rows()), turns = up(n.B, std::max<int64_t>(1, kernel.blocks / (n.H * strips)));
  StreamAttnArgs args = described(c, n, out, o);
  launch(device, kernel, variant, {up(n.B, turns), n.H, strips}, &args);
  return out;
}

}  // namespace

const Boxed stream_attn = TORCH_BOX(&run);

}  // namespace speechkit::gpu
