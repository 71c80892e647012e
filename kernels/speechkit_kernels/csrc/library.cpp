// Which instruction set the kernels use.
#include "isa.h"

#include <cstring>

namespace speechkit {
namespace {

struct Name {
  Isa isa;
  const char* text;
};

#define SPEECHKIT_NAME(name) {Isa::name, #name},
constexpr Name names[] = {SPEECHKIT_ISAS(SPEECHKIT_NAME)};

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx512bf16)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && has(Isa::avx512);
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has(Isa::avx2);
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

const Name* best() {
  const Name* found = nullptr;
  for (const Name& name : names)
    if (has(name.isa) && (!found || name.isa > found->isa)) found = &name;
  return found;
}

const Name* current = best();

}  // namespace

Isa isa() { return current->isa; }

}  // namespace speechkit

// Name of the ISA in use; where `wanted` names one that this machine has, that is used from now on.
extern "C" __attribute__((visibility("default"))) const char* speechkit_isa(const char* wanted) {
  using namespace speechkit;
  for (const Name& name : names)
    if (wanted && !std::strcmp(name.text, wanted) && has(name.isa)) current = &name;
  return current->text;
}
