// speechkit::stream_attn on the CPU: what the arguments must be, and the choice of an instruction set.
#include "stream_attn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace speechkit {

#if defined(__x86_64__)
extern const Variant stream_attn_avx512bf16, stream_attn_avx512, stream_attn_avx2;
#endif
extern const Variant stream_attn_portable;

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
constexpr int64_t any = -1;  // a size that is not checked

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "stream_attn: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class Sizes>
std::string list(const Sizes& sizes) {
  std::ostringstream text;
  const char* before = "[";
  for (int64_t size : sizes) text << before << size, before = ", ";
  return text.str() + (sizes.size() ? "]" : "[]");
}

bool is_real(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: return Type::f32;
  }
}

// A tensor that must have these sizes, this type (any real one unless given) and neighbours along the last of `dense`.
Array array(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type,
            bool dense) {
  const auto is = x.sizes();
  bool fits = is.size() == sizes.size();
  for (size_t n = 0; fits && n < sizes.size(); ++n) fits = sizes.begin()[n] == any || sizes.begin()[n] == is[n];
  if (!fits) fail(name, " must be ", list(sizes), ", but has the shape ", list(is), ".");
  const ScalarType has = x.scalar_type();
  if (type && has != *type) fail(name, " must be ", toString(*type), ", but is ", toString(has), ".");
  if (!is_real(has)) fail(name, " must be of floating point, but is ", toString(has), ".");
  if (!x.is_cpu()) fail(name, " must be on the cpu like q; move it there.");
  Array a;
  a.data = x.data_ptr(), a.type = type_of(has);
  const auto strides = x.strides();
  std::copy(strides.begin(), strides.end(), a.stride);
  if (dense && is[is.size() - 1] > 1 && a.stride[is.size() - 1] != 1)
    fail(name, " must have neighbours along its last axis, but its strides are ", list(strides), "; make it contiguous.");
  return a;
}

Array array(const char* name, const Maybe& x, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type,
            bool dense) {
  return x ? array(name, *x, sizes, type, dense) : Array();
}

// Integers of each row, which must lie in [least, most].
std::vector<int64_t> integers(const char* name, const Tensor& x, int64_t B, int64_t least, int64_t most) {
  if (x.dim() != 1 || x.size(0) != B) fail(name, " must be [", B, "], but has the shape ", list(x.sizes()), ".");
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long)
    fail(name, " must be int32 or int64, but is ", toString(type), ".");
  if (!x.is_cpu()) fail(name, " must be on the cpu like q; move it there.");
  std::vector<int64_t> values(B);
  const void* data = x.const_data_ptr();
  const int64_t step = B ? x.stride(0) : 0;
  for (int64_t b = 0; b < B; ++b) {
    values[b] = type == ScalarType::Int ? static_cast<const int32_t*>(data)[b * step]
                                        : static_cast<const int64_t*>(data)[b * step];
    if (values[b] < least || values[b] > most)
      fail(name, " must be from ", least, " to ", most, ", but is ", values[b], " in row ", b, ".");
  }
  return values;
}

const Variant& best_variant() {
  std::vector<const Variant*> all;
#if defined(__x86_64__)
  all = {&stream_attn_avx512bf16, &stream_attn_avx512, &stream_attn_avx2};
#endif
  all.push_back(&stream_attn_portable);
  const char* wanted = std::getenv("SPEECHKIT_CPU");
  std::string names;
  for (const Variant* variant : all) {
    if (!variant->supported()) continue;
    if (!wanted || !*wanted || std::string(wanted) == variant->name) return *variant;
    names += std::string(names.empty() ? "" : ", ") + variant->name;
  }
  throw std::runtime_error("SPEECHKIT_CPU must be one of what this machine has, " + names + ", but is " + wanted +
                           "; unset it to choose the best.");
}

void no_slot_twice(std::vector<int64_t> slots) {
  std::sort(slots.begin(), slots.end());
  const auto twice = std::adjacent_find(slots.begin(), slots.end());
  if (twice != slots.end()) fail("slots must name each row of the cache once, but name ", *twice, " twice.");
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

Tensor stream_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, const Tensor& slots,
                   const Tensor& pos, const Tensor& qlen, const Maybe& keep, const Maybe& q_pos, const Maybe& bias_u,
                   const Maybe& bias_v, const Maybe& rel, int64_t rel_zero, const Maybe& cache_bias,
                   const Maybe& key_bias, const Maybe& slopes, int64_t chunk, int64_t left, double scale) {
  static const Variant& variant = best_variant();
  static const bool debug = [] {
    const char* set = std::getenv("SPEECHKIT_DEBUG");
    return set && std::string(set) == "1";
  }();
  if (q.dim() != 4) fail("q must be [batch, frames, heads, width], but has the shape ", list(q.sizes()), ".");
  const auto sizes = q.sizes();
  StreamAttn a;
  a.B = sizes[0], a.C = sizes[1], a.H = sizes[2], a.D = sizes[3];
  if (k.dim() != 4 || k.size(0) != a.B || k.size(1) != a.C || k.size(3) != a.D || k.size(2) == 0 || a.H % k.size(2))
    fail("k must be [", a.B, ", ", a.C, ", key heads that divide ", a.H, ", ", a.D, "], but has the shape ",
         list(k.sizes()), ".");
  a.G = k.size(2);
  const auto type = q.scalar_type();
  if (cache.dim() != 5 || cache.size(1) != 2 || cache.size(2) != a.G || cache.size(4) != a.D)
    fail("cache must be [slots, 2, ", a.G, ", W, ", a.D, "], but has the shape ", list(cache.sizes()), ".");
  const int64_t S = cache.size(0);
  a.W = cache.size(3);
  if (chunk < 0 || left < 0) fail("chunk and left must be 0 or more, but are ", chunk, " and ", left, ".");
  if (left + a.C > a.W)
    fail("cache must remember at least left + frames = ", left + a.C, ", but W is ", a.W,
         "; make it longer, or feed fewer frames a call.");
  const int64_t back = left + (chunk ? chunk : a.C) - 1;
  a.rel_rows = rel && rel->dim() == 3 ? rel->size(1) : 0;
  if (rel && (rel_zero < back || rel_zero + a.C > a.rel_rows))
    fail("rel must have rows for the distances -", back, " to ", a.C - 1, " around rel_zero, ", rel_zero,
         ", but has the shape ", list(rel->sizes()), ".");
  if (cache_bias.has_value() != key_bias.has_value())
    fail("cache_bias and key_bias must be given together, but one is None.");
  a.q = array("q", q, {any, any, any, any}, std::nullopt, true);
  a.k = array("k", k, {any, any, any, any}, type, true);
  a.cache = array("cache", cache, {any, any, any, any, any}, type, true);
  a.v = array("v", v, {a.B, a.C, a.G, a.D}, type, true);
  a.q_pos = array("q_pos", q_pos, {a.B, a.C, a.H, a.D}, type, true);
  a.bias_u = array("bias_u", bias_u, {a.H, a.D}, std::nullopt, true);
  a.bias_v = array("bias_v", bias_v, {a.H, a.D}, std::nullopt, true);
  a.rel = array("rel", rel, {a.H, any, a.D}, type, true);
  const auto real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  a.cache_bias = array("cache_bias", cache_bias, {S, a.H, a.W}, real, false);
  a.key_bias = array("key_bias", key_bias, {a.B, a.C, a.H}, std::nullopt, false);
  a.slopes = array("slopes", slopes, {a.H}, std::nullopt, false);
  const auto rows = integers("slots", slots, a.B, 0, S - 1);
  const auto starts = integers("pos", pos, a.B, 0, INT64_MAX / 2);
  const auto lengths = integers("qlen", qlen, a.B, 0, a.C);
  const auto kept = keep ? integers("keep", *keep, a.B, 0, a.C) : lengths;
  if (debug) no_slot_twice(rows);
  a.slots = rows.data(), a.pos = starts.data(), a.qlen = lengths.data(), a.keep = kept.data();
  a.rel_zero = rel_zero, a.chunk = chunk, a.left = left, a.scale = scale;
  Tensor out = empty({a.B, a.C, a.H, a.D}, type);
  a.out.data = out.data_ptr(), a.out.type = a.q.type;
  const int64_t tasks = out.numel() ? a.B * a.H : 0;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    variant.run(a, begin, end, thread_scratch(variant.scratch_bytes(a)));
  });
  return out;
}

}  // namespace
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("stream_attn", TORCH_BOX(&speechkit::stream_attn)); }
