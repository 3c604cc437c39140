// What the files of torch ops share: the stable ABI's names, the instruction sets of this machine, the check of a matrix.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// Kernels are compiled for x86's vectors beside the compiler's baseline (targets.inc).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VK_X86_TARGETS 1
#endif

namespace var_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool runs_avx2() {
#ifdef VK_X86_TARGETS
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

inline bool runs_avx512() {
#ifdef VK_X86_TARGETS
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

// A CPU matrix with columns next to each other.
inline void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, ": expected a CPU tensor of 2 dimensions");
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1, name, ": expected columns next to each other");
}

}  // namespace var_kernels
