// Launching on an NVIDIA GPU, with neither CUDA's headers nor its libraries where this is compiled: the driver is opened
// when it is asked for, and a kernel comes as a cubin from whoever compiles it, once for each of its variants.
#pragma once

#include "cuda/args.h"
#include "host.h"

#include <array>

namespace speechkit::gpu {

struct Device {
  int index;
  void* context;  // torch's own: the device's primary one
  int arch;       // 90 for compute capability 9.0
  int processors;
  int shared_bytes;  // that a block may ask for
};

// A kernel's source and the constants it is compiled with, in the order of their names, which end with a null.
struct Variant {
  const char* kernel;
  const char* const* names;
  std::array<int, 10> values;
  int threads;
  int64_t shared_bytes;
};

struct Kernel {
  void* function;
  int blocks;  // that the device runs at a time
};

const Device& device_of(const Tensor& x);

// Loaded at first use, which a CUDA graph cannot capture.
const Kernel& load(const Device& device, const Variant& variant);

// On torch's current stream of the device.
void launch(const Device& device, const Kernel& kernel, const Variant& variant, std::array<int64_t, 3> grid, void* args);

// The kernels' numbers for a type, or -1 where they have none.
int type_number(ScalarType type);
int64_t size_of(ScalarType type);

// The most bytes, 16 at most, that divide all these.
int64_t common_piece(std::initializer_list<int64_t> numbers);

Counts counts(const Tensor& x);

// Each operator with the boxed function that serves it.
using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
extern const Boxed stream_attn, conv_step;

// What a kernel does not serve goes to plain PyTorch, which has a name of its own for it.
template <class... Values>
Tensor plain(const char* operator_name, const Values&... values) {
  std::array<StableIValue, sizeof...(Values)> stack{torch::stable::detail::from(values)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(operator_name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace speechkit::gpu
