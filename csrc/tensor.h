// SPDX-License-Identifier: BSD-3-Clause
// The tensor operations of ops.cpp that torch's stable headers do not wrap. All go through torch's dispatcher, below
// autograd, on the device of their arguments.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "pages.h"

// Weak: torch 2.10 to 2.12 lack it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Raises RuntimeError with the parts as its message, without the source line that STD_TORCH_CHECK puts before it.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A call into torch failed: hands on what torch said of it, where this torch can be asked (2.13).
inline void check_torch(AOTITorchError error) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  check(false, what ? what : "fastrnn: a call into torch failed; torch printed why to the standard error");
}

template <typename Result = Tensor, typename... Args>
Result call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max<size_t>(sizeof...(Args), 1)> stack{torch::stable::detail::from(args)...};
  check_torch(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

// The types of torch by their numbers: Tensor::scalar_type tries one after another.
inline int32_t dtype_number(const Tensor& t) {
  int32_t number = 0;
  check_torch(aoti_torch_get_dtype(t.get(), &number));
  return number;
}
inline int32_t dtype_number(ScalarType t) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(t)); }

constexpr size_t kMostDims = 4;  // of what this library makes; arrays on the stack cost nothing

struct Contiguous {
  int64_t dims, size[kMostDims], stride[kMostDims];

  template <typename Sizes>
  explicit Contiguous(const Sizes& sizes) : dims(static_cast<int64_t>(sizes.size())) {
    std::copy(sizes.begin(), sizes.end(), size);
    int64_t count = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      stride[i] = count;
      count *= size[i] > 0 ? size[i] : 1;
    }
  }
};

// An uninitialised contiguous tensor on the device of `like`.
template <typename Sizes = std::initializer_list<int64_t>>
Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  const Contiguous at(sizes);
  int32_t device_type = 0, device_index = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type));
  check_torch(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  check_torch(
      aoti_torch_empty_strided(at.dims, at.size, at.stride, dtype_number(dtype), device_type, device_index, &handle));
  const Tensor made(handle);
  if (made.is_cpu()) ask_for_large_pages(made.data_ptr(), static_cast<size_t>(made.numel()) * made.element_size());
  return made;
}

// A contiguous tensor over memory of the CPU that outlives it.
inline Tensor over(void* memory, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const Contiguous at(sizes);
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_create_tensor_from_blob(memory, at.dims, at.size, at.stride, 0, dtype_number(dtype),
                                                 aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : call("aten::contiguous", "", t, torch::headeronly::MemoryFormat::Contiguous);
}
inline MaybeTensor dense(const MaybeTensor& t) { return t ? MaybeTensor(dense(*t)) : std::nullopt; }
inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return dtype_number(t) == dtype_number(dtype)
             ? t
             : call("aten::to", "dtype", t, dtype, false, false, std::optional<torch::headeronly::MemoryFormat>());
}
inline MaybeTensor to_dtype(const MaybeTensor& t, ScalarType dtype) {
  return t ? MaybeTensor(to_dtype(*t, dtype)) : std::nullopt;
}
// Rows [begin, begin + count). Loops over time take several at each step: narrow would dispatch three operators.
inline Tensor rows(const Tensor& t, int64_t begin, int64_t count) {
  if (begin == 0 && count == t.size(0)) return t;
  int64_t *sizes = nullptr, *strides = nullptr, size[kMostDims];
  check_torch(aoti_torch_get_sizes(t.get(), &sizes));
  check_torch(aoti_torch_get_strides(t.get(), &strides));
  std::copy_n(sizes, t.dim(), size);
  size[0] = count;
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(t.get(), t.dim(), size, strides, t.storage_offset() + begin * strides[0],
                                             &handle));
  return Tensor(handle);
}
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
// [.., K] as [rows, K].
inline Tensor flat(const Tensor& t, int64_t row_count) {
  return torch::stable::reshape(t, {row_count, t.size(t.dim() - 1)});
}

inline Tensor mm(const Tensor& a, const Tensor& b) { return call("aten::mm", "", a, b); }
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) { call("aten::mm", "out", a, b, out); }
inline Tensor linear(const Tensor& x, const Tensor& w, const MaybeTensor& b) {
  return call("aten::linear", "", x, w, b);
}
inline Tensor cat_rows(const Tensor& a, const Tensor& b) {
  return call("aten::cat", "", std::vector<Tensor>{a, b}, int64_t{0});
}
// a + b. The stable interface passes no Scalar through the dispatcher, and of the sums only this one around it.
inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }
inline void copy_to(const Tensor& to, const Tensor& from) {
  auto target = to;
  torch::stable::copy_(target, from);
}
inline void set_zero(const Tensor& t) {
  auto target = t;
  torch::stable::zero_(target);
}
inline Tensor sum_rows(const Tensor& t) {
  const std::vector<int64_t> dims{0};
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(dims.data(), dims.size()));
}

}  // namespace fastrnn
