// What stream_attn's arguments must be to each other, as far as sizes tell.
#pragma once

#include "host.h"

namespace speechkit {

inline const Arguments stream_attn_arguments("stream_attn");

struct StreamAttnSizes {
  int64_t B, C, H, G, D, W;
};

inline StreamAttnSizes stream_attn_sizes(const Tensor& q, const Tensor& k, const Tensor& cache) {
  stream_attn_arguments.shape("q", q, {-1, -1, -1, -1});
  const int64_t B = q.size(0), C = q.size(1), H = q.size(2), D = q.size(3);
  if (k.dim() != 4 || k.size(2) == 0 || H % k.size(2))
    refuse("stream_attn: k must be [", B, ", ", C, ", key heads that divide ", H, ", ", D, "], but has the shape ",
           shape_text(k.sizes()), ".");
  stream_attn_arguments.shape("cache", cache, {-1, 2, k.size(2), -1, D});
  return {B, C, H, k.size(2), D, cache.size(3)};
}

inline void check_stream_attn_reach(const StreamAttnSizes& n, const MaybeTensor& rel, int64_t rel_zero,
                                    const MaybeTensor& cache_bias, const MaybeTensor& key_bias, int64_t chunk, int64_t left) {
  constexpr int64_t endless = INT64_MAX / 4;  // times up to here add up without overflow
  if (left > n.W - n.C)
    refuse("stream_attn: cache must remember at least left + frames = ", left + n.C, ", but W is ", n.W,
           "; make it longer, or feed fewer frames a call.");
  if (chunk < 0 || left < 0)
    refuse("stream_attn: chunk and left must be 0 or more, but are ", chunk, " and ", left, ".");
  if (chunk > endless) refuse("stream_attn: chunk must be at most ", endless, ", but is ", chunk, ".");
  const int64_t back = left + (chunk ? chunk : n.C) - 1;
  if (rel && (rel->dim() != 3 || rel_zero < back || rel_zero > rel->size(1) - n.C))
    refuse("stream_attn: rel must have rows for the distances -", back, " to ", n.C - 1, " around rel_zero, ", rel_zero,
           ", but has the shape ", shape_text(rel->sizes()), ".");
  if (cache_bias.has_value() != key_bias.has_value())
    refuse("stream_attn: cache_bias and key_bias must be given together, but one is None.");
}

}  // namespace speechkit
