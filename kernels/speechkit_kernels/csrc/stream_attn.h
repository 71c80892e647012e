// What one call of stream_attn is made of, and the entry of each instruction set. No torch here: the kernels are
// compiled with flags that no shared inline function may be compiled with.
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
  int64_t rel_zero, rel_rows, chunk, left;
  double scale;
};

// Rows of work are (key head, batch, head of the group) in this order, so that neighbours share a table of positions
// or a window of keys. `run` does rows [begin, end) with `scratch_bytes` of memory that is aligned to 64 bytes.
struct Variant {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const StreamAttn&);
  void (*run)(const StreamAttn&, int64_t begin, int64_t end, char* scratch);
};

}  // namespace speechkit
