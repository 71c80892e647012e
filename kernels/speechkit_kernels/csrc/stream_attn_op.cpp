// speechkit::stream_attn on the CPU: what the arguments must be, and the choice of an instruction set.
#include "isa.h"
#include "stream_attn.h"
#include "stream_attn_check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace speechkit {
namespace {

const Arguments& arguments = stream_attn_arguments;
constexpr int64_t endless = INT64_MAX / 4;  // times up to here add up without overflow

Type type_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: refuse("stream_attn: ", name, " must be of floating point, but is ", dtype_text(type), ".");
  }
}

// A tensor of this shape and type (any of floating point unless given), rows of which are contiguous where `dense`.
Array array(const char* name, const Tensor& x, Shape shape, std::optional<ScalarType> type, bool dense) {
  arguments.shape(name, x, shape);
  if (type) arguments.dtype(name, x, *type);
  if (!x.is_cpu()) refuse("stream_attn: ", name, " must be on cpu, but is not; move it to where q is.");
  Array a;
  a.data = x.data_ptr(), a.type = type_of(name, x.scalar_type());
  const auto strides = x.strides();
  std::copy(strides.begin(), strides.end(), a.stride);
  const size_t last = strides.size() - 1;
  if (dense && strides[last] != 1 && x.sizes()[last] > 1)
    refuse("stream_attn: ", name, " must have the stride 1 along its last axis, but has ", strides[last],
           "; pass ", name, ".contiguous().");
  return a;
}

Array array(const char* name, const MaybeTensor& x, Shape shape, std::optional<ScalarType> type, bool dense) {
  return x ? array(name, *x, shape, type, dense) : Array();
}

std::vector<int64_t> integers(const char* name, const Tensor& x, int64_t B, int64_t most) {
  if (!x.is_cpu()) refuse("stream_attn: ", name, " must be on cpu, but is not; move it to where q is.");
  return arguments.integers(name, x, B, 0, most);
}

void no_slot_twice(std::vector<int64_t> slots) {
  std::sort(slots.begin(), slots.end());
  const auto twice = std::adjacent_find(slots.begin(), slots.end());
  if (twice != slots.end()) refuse("stream_attn: slots must name each row of the cache once, but name ", *twice, " twice.");
}

char* thread_scratch(int64_t bytes) {
  static thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 63) memory.resize(bytes + 63);
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4];
  for (int64_t n = 3, step = 1; n >= 0; --n) strides[n] = step, step *= sizes.begin()[n];
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.begin(), strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// The arguments every call has. Whatever could make a kernel touch foreign memory is refused here.
StreamAttn described(const StreamAttnSizes& n, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache) {
  StreamAttn a;
  a.B = n.B, a.C = n.C, a.H = n.H, a.G = n.G, a.D = n.D, a.W = n.W;
  const auto type = q.scalar_type();
  a.q = array("q", q, {a.B, a.C, a.H, a.D}, type, true);
  a.k = array("k", k, {a.B, a.C, a.G, a.D}, type, true);
  a.v = array("v", v, {a.B, a.C, a.G, a.D}, type, true);
  a.cache = array("cache", cache, {-1, 2, a.G, -1, a.D}, type, true);
  return a;
}

template <int64_t (*bytes)(const StreamAttn&), void (*kernel)(const StreamAttn&, int64_t, int64_t, char*)>
void run(const StreamAttn& a) {
  const int64_t tasks = a.C && a.D ? a.B * a.H : 0;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, thread_scratch(bytes(a)));
  });
}

Tensor stream_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, const Tensor& slots,
                   const Tensor& pos, const Tensor& qlen, const MaybeTensor& keep, const MaybeTensor& q_pos, const MaybeTensor& bias_u,
                   const MaybeTensor& bias_v, const MaybeTensor& rel, int64_t rel_zero, const MaybeTensor& cache_bias,
                   const MaybeTensor& key_bias, const MaybeTensor& slopes, int64_t chunk, int64_t left, double scale) {
  const StreamAttnSizes sizes = stream_attn_sizes(q, k, cache);
  StreamAttn a = described(sizes, q, k, v, cache);
  check_stream_attn_reach(sizes, rel, rel_zero, cache_bias, key_bias, chunk, left);
  const auto type = q.scalar_type(), real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  a.q_pos = array("q_pos", q_pos, {a.B, a.C, a.H, a.D}, type, true);
  a.bias_u = array("bias_u", bias_u, {a.H, a.D}, std::nullopt, true);
  a.bias_v = array("bias_v", bias_v, {a.H, a.D}, std::nullopt, true);
  a.rel = array("rel", rel, {a.H, -1, a.D}, type, true);
  a.cache_bias = array("cache_bias", cache_bias, {cache.size(0), a.H, a.W}, real, false);
  a.key_bias = array("key_bias", key_bias, {a.B, a.C, a.H}, std::nullopt, false);
  a.slopes = array("slopes", slopes, {a.H}, std::nullopt, false);
  const auto rows = integers("slots", slots, a.B, cache.size(0) - 1);
  const auto starts = integers("pos", pos, a.B, endless);
  const auto lengths = integers("qlen", qlen, a.B, a.C);
  const auto kept = keep ? integers("keep", *keep, a.B, a.C) : lengths;
  const char* debug = std::getenv("SPEECHKIT_DEBUG");
  if (debug && !std::strcmp(debug, "1")) no_slot_twice(rows);
  a.slots = rows.data(), a.pos = starts.data(), a.qlen = lengths.data(), a.keep = kept.data();
  a.rel_zero = rel_zero, a.chunk = chunk, a.left = left, a.scale = scale;
  Tensor out = empty({a.B, a.C, a.H, a.D}, type);
  a.out.data = out.data_ptr(), a.out.type = a.q.type;
  switch (isa(a.q.type == Type::bf16 ? Isa::amx : Isa::avx512bf16)) {
#define SPEECHKIT_CASE(name) \
  case Isa::name: run<name::stream_attn_bytes, name::stream_attn>(a); break;
    SPEECHKIT_ISAS(SPEECHKIT_CASE)
#undef SPEECHKIT_CASE
    default: break;
  }
  return out;
}

}  // namespace
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("stream_attn", TORCH_BOX(&speechkit::stream_attn)); }
