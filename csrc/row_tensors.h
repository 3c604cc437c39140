// From tensors to the jobs' plain pointers, with checks: shared by the files of torch ops over rows.
#pragma once

#include <cstdint>
#include <optional>

#include "rows.h"
#include "torch_ops.h"

namespace var_kernels {

inline Storage storage_of(ScalarType dtype, const char* name) {
  if (dtype == ScalarType::Float) return Storage::f32;
  if (dtype == ScalarType::BFloat16) return Storage::bf16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, name, ": expected float32, bfloat16 or float16");
  return Storage::f16;
}

// The data of a contiguous CPU tensor of `count` elements.
template <class T>
T* vector_of(const Tensor& t, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype, name, ": expected a CPU tensor of the contract's dtype");
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), name, ": expected ", count, " contiguous elements");
  return static_cast<T*>(t.data_ptr());
}

inline float* floats_of(const Tensor& t, int64_t count, const char* name) {
  return vector_of<float>(t, ScalarType::Float, count, name);
}

inline float* floats_of(const std::optional<Tensor>& t, int64_t count, const char* name) {
  return t.has_value() ? floats_of(*t, count, name) : nullptr;
}

inline Tile tile_of(const Tensor& logits) {
  check_matrix(logits, "logits");
  const Storage storage = storage_of(logits.scalar_type(), "logits");
  const int64_t width = storage == Storage::f32 ? 4 : 2;
  return {static_cast<char*>(logits.data_ptr()), storage, logits.stride(0) * width, logits.size(1)};
}

inline Transform transform_of(const std::optional<Tensor>& bias, int64_t columns, double scale, double cap, double inner) {
  Transform t{nullptr, Storage::f32, cap != 0.0, static_cast<float>(scale), static_cast<float>(cap),
              static_cast<float>(inner)};
  if (bias.has_value()) {
    t.bias_storage = storage_of(bias->scalar_type(), "bias");
    t.bias = vector_of<const char>(*bias, bias->scalar_type(), columns, "bias");
  }
  return t;
}

}  // namespace var_kernels
