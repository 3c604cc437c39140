// What the files of torch ops share: the stable ABI's names, the check of a matrix.
#pragma once

#include <cstdint>
#include <functional>

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

// Of gemm.cpp: an instruction set's kernels; a bf16 matrix as one side of a product, its lanes along `lane`; a product by
// torch's threads, and after it, in the same region, rows of its end (if any).
const gemm::Kernels& gemm_kernels(int64_t level);
gemm::Operand gemm_operand(const Tensor& t, int lane, const char* name);
using EndRows = std::function<void(int64_t begin, int64_t end)>;
void run_product(const gemm::Product& p, const gemm::Kernels& kernels, const EndRows& end_rows = nullptr);

// work(begin, end) on pieces of [0, count) by torch's threads, in no order; none gets less than `grain`.
template <class Work>
void in_pieces(int64_t count, int64_t grain, const Work& work) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(count, grain));
  if (threads <= 1) {
    if (count > 0) work(0, count);
    return;
  }
  Pieces pieces(count, grain);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { pieces.run(work); });
}

}  // namespace var_kernels
