// Which instruction set the kernels use.
#include "isa.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace speechkit {
namespace {

struct Name {
  Isa isa;
  const char* text;
};

#define SPEECHKIT_NAME(name) {Isa::name, #name},
constexpr Name names[] = {SPEECHKIT_ISAS(SPEECHKIT_NAME)};

#if defined(__x86_64__)
// The processor multiplies tiles of bfloat16, the system keeps them from thread to thread (XCR0), and Linux, since 5.16,
// lets this process use them: ARCH_REQ_XCOMP_PERM for XTILEDATA, which makes room in its signal frames.
bool has_tiles() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, states = 3u << 17;
  constexpr long ask = 0x1023, data = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (bf16 | tile)) != (bf16 | tile)) return false;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & states) == states && !syscall(SYS_arch_prctl, ask, data);
}
#endif

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::amx) return has(Isa::avx512bf16) && has_tiles();
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

Isa isa(Isa most) { return current->isa < most ? current->isa : most; }

}  // namespace speechkit

// Name of the ISA in use; where `wanted` names one that this machine has, that is used from now on.
extern "C" __attribute__((visibility("default"))) const char* speechkit_isa(const char* wanted) {
  using namespace speechkit;
  for (const Name& name : names)
    if (wanted && !std::strcmp(name.text, wanted) && has(name.isa)) current = &name;
  return current->text;
}
