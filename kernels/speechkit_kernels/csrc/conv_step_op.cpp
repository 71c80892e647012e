#include "conv_step.h"
#include "host.h"
#include "isa.h"

namespace speechkit {
Tensor conv_step(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cache,
                 const Tensor& slots, const Tensor& qlen, bool gated, const std::optional<Tensor>& norm_weight,
                 const std::optional<Tensor>& norm_bias, double eps) {
  const char* n = "?";
  switch (isa()) {
#define SPEECHKIT_CASE(name) case Isa::name: n = name::conv_step(); break;
    SPEECHKIT_ISAS(SPEECHKIT_CASE)
    default: break;
  }
  refuse("conv_step: ", n, " x must be something, but has ", x.dim(), " dimensions.");
}
}  // namespace speechkit

STABLE_TORCH_LIBRARY_IMPL(speechkit, CPU, m) { m.impl("conv_step", TORCH_BOX(&speechkit::conv_step)); }
