// torch ops over the bf16 GEMM: checks, choice of the instruction set, blocks in parallel. Stable ABI only.

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define VK_BF16_GEMM 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm_x86.h"
#endif

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef VK_BF16_GEMM
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The kernel gives a process the tiles' registers on request (arch_prctl ARCH_REQ_XCOMP_PERM, state 18).
bool has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

// 0: none, 1: AVX-512 BF16, 2: AMX. The highest that this machine runs.
int64_t best_gemm_level() {
#ifdef VK_BF16_GEMM
  static const int64_t best = has_avx512_bf16() ? 1 + has_amx_bf16() : 0;
  return best;
#else
  return 0;
#endif
}

void check_operand(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::BFloat16, name,
                  ": expected a CPU matrix in bf16");
  STD_TORCH_CHECK(t.stride(0) == 1 || t.stride(1) == 1 || t.size(0) < 2 || t.size(1) < 2, name,
                  ": expected rows or columns of adjacent elements");
}

#ifdef VK_BF16_GEMM
gemm::Operand operand_of(const Tensor& t, int lane) {
  const int deep = 1 - lane;
  gemm::Operand o{static_cast<const uint16_t*>(t.const_data_ptr()), t.size(lane), t.size(deep), t.stride(lane),
                  t.stride(deep)};
  if (o.depth == 1) o.depth_stride = 1;
  return o;
}
#endif

// out = or += left right: (m, k) (k, c), fp32 sums.
void product_into(Tensor out, Tensor left, Tensor right, bool add, int64_t level) {
  STD_TORCH_CHECK(level >= 1 && level <= best_gemm_level(), "level: expected 1 to ", best_gemm_level(),
                  " on this machine, got ", level);
  check_operand(left, "left");
  check_operand(right, "right");
  STD_TORCH_CHECK(left.size(1) == right.size(0), "right: expected ", left.size(1), " rows, got ", right.size(0));
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(0) == left.size(0) && out.size(1) == right.size(1),
                  "out: expected a CPU matrix of ", left.size(0), " x ", right.size(1));
  STD_TORCH_CHECK(out.size(1) < 2 || out.stride(1) == 1, "out: expected columns next to each other");
  const bool narrow = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || out.scalar_type() == ScalarType::Float, "out: expected float32 or bfloat16");
#ifdef VK_BF16_GEMM
  STD_TORCH_CHECK(!narrow || (!add && left.size(1) <= gemm::kMaxDepth), "out: bfloat16 takes one product of a depth of ",
                  gemm::kMaxDepth, " at most");
  const gemm::Product p{operand_of(left, 0), operand_of(right, 1), static_cast<char*>(out.mutable_data_ptr()),
                        out.stride(0), narrow, add};
  const gemm::Kernels& kernels = level == 2 ? gemm::kAmx : gemm::kAvx512;
  const int64_t rows = p.left.lanes, columns = p.right.lanes;
  if (rows == 0 || columns == 0) return;
  const bool by_columns = columns >= rows;
  const int64_t total = by_columns ? columns : rows, threads = torch::stable::get_num_threads();
  const int64_t step = gemm::ceil_div(gemm::ceil_div(total, threads), 32) * 32;
  torch::stable::parallel_for(0, gemm::ceil_div(total, step), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * step, end = std::min(total, last * step);
    if (by_columns)
      gemm::multiply_block(p, kernels, 0, rows, begin, end);
    else
      gemm::multiply_block(p, kernels, begin, end, 0, columns);
  });
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(var_kernels_native, m) {
  m.def("best_gemm_level() -> int");
  m.def("product_into(Tensor(a!) out, Tensor left, Tensor right, bool add, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("best_gemm_level", TORCH_BOX(&best_gemm_level));
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CPU, m) {
  m.impl("product_into", TORCH_BOX(&product_into));
}

}  // namespace var_kernels
