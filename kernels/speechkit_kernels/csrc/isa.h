// Instruction sets of the CPU. A source compiled once per ISA puts all it defines into namespace speechkit::SPEECHKIT_ISA;
// the build says in SPEECHKIT_ISAS(X) which of these namespaces exist for this family of processors.
#pragma once

namespace speechkit {

enum class Isa { portable, avx2, avx512, avx512bf16 };  // ascending; avx512 is F, BW, DQ, VL

Isa isa();  // the one in use: the best this machine has, unless another was asked for

}  // namespace speechkit
