#include "conv_step.h"
#define STR_(x) #x
#define STR(x) STR_(x)
namespace speechkit {
namespace SPEECHKIT_ISA {
const char* conv_step() { return STR(SPEECHKIT_ISA); }
}  // namespace SPEECHKIT_ISA
}  // namespace speechkit
