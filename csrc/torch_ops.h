// What the files of torch ops share: the stable ABI's names, the check of a matrix.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "gemm.h"

namespace var_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A CPU matrix with columns next to each other.
inline void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, ": expected a CPU tensor of 2 dimensions");
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1, name, ": expected columns next to each other");
}

// Of gemm.cpp: an instruction set's kernels; a bf16 matrix as one side of a product, its lanes along `lane`.
const gemm::Kernels& gemm_kernels(int64_t level);
gemm::Operand gemm_operand(const Tensor& t, int lane, const char* name);

}  // namespace var_kernels
