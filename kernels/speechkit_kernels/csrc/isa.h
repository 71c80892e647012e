// Instruction sets of the CPU. A source compiled once per ISA puts all it defines into namespace speechkit::SPEECHKIT_ISA;
// the build says in SPEECHKIT_ISAS(X) which of these namespaces exist. One of amx is there for stream_attn alone.
#pragma once

namespace speechkit {

enum class Isa { portable, avx2, avx512, avx512bf16, amx };  // ascending; avx512 is F, BW, DQ, VL

// The one in use, which is the best this machine has unless another was asked for; `most` where it is better than that.
Isa isa(Isa most = Isa::avx512bf16);

}  // namespace speechkit
