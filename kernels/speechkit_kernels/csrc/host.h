// What the host side of every operator shares, over torch's stable ABI: checks whose errors are one sentence.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace speechkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;  // -1: any size

// ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* between = "[";
  for (int64_t size : sizes) text << std::exchange(between, ", ") << (size < 0 ? "any" : std::to_string(size));
  text << (sizes.size() ? "]" : "[]");
  return text.str();
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return std::string("torch ") + torch::headeronly::toString(dtype);
  }
}

inline std::string device_text(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another kind of device";
}

// The arguments of one call of an operator, which its checks name.
class Arguments {
 public:
  explicit constexpr Arguments(const char* name) : name_(name) {}

  void shape(const char* argument, const Tensor& tensor, Shape expected) const {
    const auto sizes = tensor.sizes();
    bool equal = sizes.size() == expected.size();
    for (size_t i = 0; equal && i < expected.size(); ++i)
      equal = expected.begin()[i] < 0 || expected.begin()[i] == sizes[i];
    if (!equal)
      refuse(name_, ": ", argument, " must be ", shape_text(expected), ", but has the shape ", shape_text(sizes), ".");
  }

  void dtype(const char* argument, const Tensor& tensor, ScalarType expected) const {
    const ScalarType found = tensor.scalar_type();
    if (found != expected)
      refuse(name_, ": ", argument, " must be ", dtype_text(expected), ", but is ", dtype_text(found), ".");
  }

  // Where another argument is.
  void device(const char* argument, const Tensor& tensor, const Tensor& like) const {
    if (device_text(tensor) != device_text(like))
      refuse(name_, ": ", argument, " must be on ", device_text(like), ", but is on ", device_text(tensor), ".");
  }

  // A [B] argument of integers that lie where the host cannot read them.
  void counts(const char* argument, const Tensor& tensor, int64_t count, const Tensor& like) const {
    shape(argument, tensor, {count});
    integer(argument, tensor.scalar_type());
    device(argument, tensor, like);
  }

  // The `count` integers of a [B] argument, each from `least` to `most`.
  std::vector<int64_t> integers(const char* argument, const Tensor& tensor, int64_t count, int64_t least,
                                int64_t most) const {
    shape(argument, tensor, {count});
    const ScalarType type = tensor.scalar_type();
    integer(argument, type);
    const void* data = tensor.const_data_ptr();
    const int64_t stride = count ? tensor.stride(0) : 0;
    std::vector<int64_t> values(count);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = type == ScalarType::Int ? static_cast<const int32_t*>(data)[i * stride]
                                          : static_cast<const int64_t*>(data)[i * stride];
      if (values[i] < least || values[i] > most)
        refuse(name_, ": ", argument, " must be from ", least, " to ", most, ", but holds ", values[i], ".");
    }
    return values;
  }

 private:
  void integer(const char* argument, ScalarType type) const {
    if (type != ScalarType::Int && type != ScalarType::Long)
      refuse(name_, ": ", argument, " must be int32 or int64, but is ", dtype_text(type), ".");
  }

  const char* name_;
};

// Memory that a thread keeps from call to call.
class Scratch {
 public:
  void* get(int64_t bytes) {
    if (static_cast<int64_t>(memory_.size()) < bytes + 64) memory_.resize(bytes + 64);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<char> memory_;
};

}  // namespace speechkit
