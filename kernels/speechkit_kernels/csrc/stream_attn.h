// One call of stream_attn, as pointers and strides: no header of torch's, see build.py.
#pragma once

#include <cstdint>

namespace speechkit {

enum class Type { f32, f64, f16, bf16 };

struct Array {  // a tensor of up to five axes; strides are in elements
  void* data = nullptr;
  Type type = Type::f32;
  int64_t stride[5] = {};

  explicit operator bool() const { return data != nullptr; }
};

struct StreamAttn {
  int64_t B, C, H, G, D, W;
  Array q, k, v, cache, q_pos, bias_u, bias_v, rel, cache_bias, key_bias, slopes, out;
  const int64_t *slots, *pos, *qlen, *keep;  // [B], checked
  int64_t rel_zero, chunk, left;
  double scale;
};

// Tasks are (key head, batch, head of the group) in this order, so that neighbours share a table of positions or a window
// of keys. `stream_attn` does tasks [begin, end) with `stream_attn_bytes` of memory, aligned to 64 bytes.
#define SPEECHKIT_DECLARE(name)                                                             \
  namespace name {                                                                          \
  int64_t stream_attn_bytes(const StreamAttn&);                                             \
  void stream_attn(const StreamAttn&, int64_t begin, int64_t end, char* scratch);           \
  }
SPEECHKIT_ISAS(SPEECHKIT_DECLARE)
#undef SPEECHKIT_DECLARE

}  // namespace speechkit
