// What stream_attn_op.cpp calls, over the library that tiles_kernel_emu.cpp became: the one `emulate` named last.
#include "isa.h"
#include "stream_attn.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace speechkit {
namespace {
std::mutex one;
std::string trouble;
int64_t (*bytes)(const StreamAttn&);
const char* (*run)(const StreamAttn&, int64_t, int64_t, char*);
}  // namespace

Isa isa(Isa most) {
  if (most != Isa::amx) throw std::invalid_argument("stream_attn: q must be torch.bfloat16 for tiles.");
  return most;
}

namespace amx {
int64_t stream_attn_bytes(const StreamAttn& a) { return bytes(a); }
void stream_attn(const StreamAttn& a, int64_t begin, int64_t end, char* scratch) {
  const char* what = run(a, begin, end, scratch);
  if (!*what) return;
  const std::lock_guard<std::mutex> lock(one);
  throw std::runtime_error(trouble = what);
}
}  // namespace amx
}  // namespace speechkit

#define SHOWN extern "C" __attribute__((visibility("default")))

// What went wrong last: torch's parallel loop keeps it to itself.
SHOWN const char* emulated_trouble() { return speechkit::trouble.c_str(); }

SHOWN int emulate(const char* library) {
  using namespace speechkit;
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) return 1;
  bytes = reinterpret_cast<decltype(bytes)>(dlsym(opened, "emulated_bytes"));
  run = reinterpret_cast<decltype(run)>(dlsym(opened, "emulated"));
  return !bytes || !run;
}
