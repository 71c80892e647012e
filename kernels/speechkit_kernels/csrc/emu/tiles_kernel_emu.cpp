// stream_attn for AMX as a library for any processor with AVX-512. Compile for the instruction set amx, with KERNEL_SOURCE
// its file.
#include "tiles_emu.h"
#include KERNEL_SOURCE

extern "C" int64_t emulated_bytes(const speechkit::StreamAttn& a) { return speechkit::amx::stream_attn_bytes(a); }

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
