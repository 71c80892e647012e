#include "gpu.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <tuple>

namespace speechkit::gpu {
namespace {

// What is called of the driver; its CUresult and CUdevice are ints, its handles pointers.
#define SPEECHKIT_DRIVER(X)                                                                                          \
  X(cuInit, unsigned)                                                                                                \
  X(cuGetErrorName, int, const char**)                                                                               \
  X(cuDeviceGet, int*, int)                                                                                          \
  X(cuDeviceGetAttribute, int*, int, int)                                                                            \
  X(cuDevicePrimaryCtxRetain, void**, int)                                                                           \
  X(cuCtxPushCurrent_v2, void*)                                                                                      \
  X(cuCtxPopCurrent_v2, void**)                                                                                      \
  X(cuStreamIsCapturing, void*, int*)                                                                                \
  X(cuModuleLoadData, void**, const void*)                                                                           \
  X(cuModuleGetFunction, void**, void*, const char*)                                                                 \
  X(cuFuncSetAttribute, void*, int, int)                                                                             \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, int*, void*, int, size_t)                                           \
  X(cuLaunchKernel, void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**)

enum { PROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_BYTES = 97 };  // CUdevice_attribute
enum { DYNAMIC_SHARED_BYTES = 8 };                                    // CUfunction_attribute

// The cubin of a kernel, or why there is none: whoever is asked calls `give(to, bytes, how many, whether it is one)`.
using Give = void (*)(void* to, const char* data, int64_t size, int is_cubin);
using Compile = void (*)(const char* kernel, const char* constants, int arch, void* to, Give give);

struct Driver {
#define SPEECHKIT_MEMBER(name, ...) int (*name)(__VA_ARGS__) = nullptr;
  SPEECHKIT_DRIVER(SPEECHKIT_MEMBER)
#undef SPEECHKIT_MEMBER
  int32_t (*current_stream)(int32_t device, void** stream) = nullptr;  // torch's
  Compile compile = nullptr;

  std::mutex mutex;  // of the two below, whose entries stay where they are
  std::map<int, Device> devices;
  std::map<std::tuple<std::string, int, std::array<int, 10>, int64_t>, Kernel> kernels;
};

std::unique_ptr<Driver> driver;

void* open(const char* library) {
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) throw std::runtime_error(dlerror());
  return opened;
}

void* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) throw std::runtime_error(dlerror());
  return found;
}

void check(const char* function, int status) {
  if (status == 0) return;
  const char* name = nullptr;
  if (driver->cuGetErrorName(status, &name) != 0 || !name) name = "an error without a name";
  throw std::runtime_error(std::string("speechkit kernels: ") + function + " must succeed, but answers " + name + ".");
}
#define SPEECHKIT_CALL(name, ...) check(#name, driver->name(__VA_ARGS__))

// Torch's thread may have another device's context, or none yet.
class InContext {
 public:
  explicit InContext(void* context) { SPEECHKIT_CALL(cuCtxPushCurrent_v2, context); }
  ~InContext() {
    void* popped;
    driver->cuCtxPopCurrent_v2(&popped);
  }
};

void* stream_of(const Device& device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(driver->current_stream(device.index, &stream));
  return stream;
}

int attribute(int which, int device) {
  int value = 0;
  SPEECHKIT_CALL(cuDeviceGetAttribute, &value, which, device);
  return value;
}

Device described(int index) {
  int device = 0;
  void* context = nullptr;
  SPEECHKIT_CALL(cuDeviceGet, &device, index);
  SPEECHKIT_CALL(cuDevicePrimaryCtxRetain, &context, device);
  return {index, context, 10 * attribute(MAJOR, device) + attribute(MINOR, device), attribute(PROCESSORS, device),
          attribute(SHARED_BYTES, device)};
}

struct Cubin {
  std::string bytes;
  bool is_cubin = false;
};

std::string cubin_of(const Variant& variant, int arch) {
  std::ostringstream constants;
  for (size_t i = 0; variant.names[i]; ++i) constants << (i ? " " : "") << variant.names[i] << "=" << variant.values[i];
  Cubin got;
  driver->compile(variant.kernel, constants.str().c_str(), arch, &got, [](void* to, const char* data, int64_t size, int is_cubin) {
    *static_cast<Cubin*>(to) = {std::string(data, size), is_cubin != 0};
  });
  if (!got.is_cubin) throw std::runtime_error(got.bytes);
  return got.bytes;
}

Kernel loaded(const Device& device, const Variant& variant) {
  const InContext here(device.context);
  int capturing = 0;
  if (driver->cuStreamIsCapturing(stream_of(device), &capturing) != 0 || capturing)
    throw std::runtime_error(std::string(variant.kernel) +
                             ": a variant of the kernel must be loaded before a CUDA graph captures it, but this one "
                             "is not; run the step once before the capture.");
  const std::string cubin = cubin_of(variant, device.arch);
  void* module = nullptr;
  Kernel kernel{};
  SPEECHKIT_CALL(cuModuleLoadData, &module, cubin.data());
  SPEECHKIT_CALL(cuModuleGetFunction, &kernel.function, module, variant.kernel);
  SPEECHKIT_CALL(cuFuncSetAttribute, kernel.function, DYNAMIC_SHARED_BYTES, static_cast<int>(variant.shared_bytes));
  int each = 0;
  SPEECHKIT_CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor, &each, kernel.function, variant.threads,
                 static_cast<size_t>(variant.shared_bytes));
  kernel.blocks = each * device.processors;
  return kernel;
}

std::unique_ptr<Driver> opened(const char* library, const char* torch_library, Compile compile) {
  auto made = std::make_unique<Driver>();
  void* from = open(library);
#define SPEECHKIT_FIND(name, ...) made->name = reinterpret_cast<decltype(made->name)>(find(from, #name));
  SPEECHKIT_DRIVER(SPEECHKIT_FIND)
#undef SPEECHKIT_FIND
  made->current_stream = reinterpret_cast<decltype(made->current_stream)>(
      find(open(torch_library), "aoti_torch_get_current_cuda_stream"));
  made->compile = compile;
  return made;
}

void serve(const char* library, const char* key) {
  static std::set<std::pair<std::string, std::string>> served;
  if (!served.emplace(library, key).second) return;
  using torch::stable::detail::StableLibrary;
  static std::vector<std::unique_ptr<StableLibrary>> kept;  // the operators are served as long as it lives
  kept.push_back(std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, library, key, __FILE__, __LINE__));
  kept.back()->impl("stream_attn", stream_attn).impl("conv_step", conv_step);
}

}  // namespace

const Device& device_of(const Tensor& x) {
  const int index = x.is_cuda() ? x.get_device_index() : 0;
  const std::lock_guard<std::mutex> lock(driver->mutex);
  const auto found = driver->devices.find(index);
  return found != driver->devices.end() ? found->second : driver->devices.emplace(index, described(index)).first->second;
}

// Not locked while it is compiled: whoever compiles may wait for what another thread holds that waits here.
const Kernel& load(const Device& device, const Variant& variant) {
  const auto key = std::make_tuple(std::string(variant.kernel), device.index, variant.values, variant.shared_bytes);
  {
    const std::lock_guard<std::mutex> lock(driver->mutex);
    const auto found = driver->kernels.find(key);
    if (found != driver->kernels.end()) return found->second;
  }
  const Kernel kernel = loaded(device, variant);
  const std::lock_guard<std::mutex> lock(driver->mutex);
  return driver->kernels.emplace(key, kernel).first->second;
}

void launch(const Device& device, const Kernel& kernel, const Variant& variant, std::array<int64_t, 3> grid, void* args) {
  const InContext here(device.context);
  void* parameters[] = {args};
  SPEECHKIT_CALL(cuLaunchKernel, kernel.function, grid[0], grid[1], grid[2], variant.threads, 1, 1,
                 variant.shared_bytes, stream_of(device), parameters, nullptr);
}

int type_number(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    default:
      return -1;
  }
}

int64_t size_of(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

int64_t common_piece(std::initializer_list<int64_t> numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), int64_t{16}, [](int64_t a, int64_t b) { return std::gcd(a, b); });
}

Counts counts(const Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()), x.scalar_type() == ScalarType::Long};
}

}  // namespace speechkit::gpu

// From now on the operators of `library` run the CUDA kernels on tensors of `key`: "speechkit" and "CUDA", but in tests.
// Null, or why that cannot be.
extern "C" __attribute__((visibility("default"))) const char* speechkit_cuda(
    const char* driver_library, const char* torch_library, speechkit::gpu::Compile compile, const char* library,
    const char* key) {
  using namespace speechkit::gpu;
  static std::string trouble;
  try {
    driver = opened(driver_library, torch_library, compile);
    SPEECHKIT_CALL(cuInit, 0);
    serve(library, key);
    return nullptr;
  } catch (const std::exception& error) {
    trouble = error.what();
    return trouble.c_str();
  }
}
