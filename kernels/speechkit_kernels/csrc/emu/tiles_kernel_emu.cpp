// stream_attn for AMX as a library for any processor with AVX-512. Compile for the instruction set amx, with KERNEL_SOURCE
// its file.
#include "tiles_emu.h"
#include KERNEL_SOURCE

extern "C" int64_t emulated_bytes(const speechkit::StreamAttn& a) { return speechkit::amx::stream_attn_bytes(a); }

// One product of tiles: sum [16][16] += a [16][32] by b [16 pairs][16][2].
extern "C" void emulated_product(float* sum, const uint16_t* a, const uint16_t* b) {
  const Tiles in_use;
  tile_load<0>(sum, 64);
  tile_load<1>(a, 64);
  tile_load<2>(b, 64);
  tile_multiply<0, 1, 2>();
  tile_store<0>(sum, 64);
}

// What went wrong, or an empty string.
extern "C" const char* emulated(const speechkit::StreamAttn& a, int64_t begin, int64_t end, char* scratch) {
  static thread_local std::string trouble;
  trouble.clear();
  const uint16_t nothing = emu::FORBIDDEN;
  for (int64_t at = 0; at < emulated_bytes(a); at += 2) std::memcpy(scratch + at, &nothing, 2);
  try {
    speechkit::amx::stream_attn(a, begin, end, scratch);
    emu::require(!emu::configured, "tiles are left in use at the end of a call");
  } catch (const std::exception& error) {
    trouble = error.what();
  }
  emu::configured = false;
  return trouble.c_str();
}
