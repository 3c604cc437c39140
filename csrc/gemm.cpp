// torch ops over the bf16 GEMM: checks, choice of the instruction set, threads. Stable ABI only.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu.h"
#include "gemm.h"
#include "torch_ops.h"

#ifdef VK_BF16_TARGETS
#include "gemm_x86.h"
#endif

namespace var_kernels {
namespace gemm {

#define VK_KERNELS "gemm_fma.inc"
#include "targets.inc"

}  // namespace gemm

namespace {

enum Level : int64_t { kTorch, kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

bool has_level(int64_t level) {
  if (level == kBaseline) return true;
  if (level == kAvx2) return runs_avx2();
  if (level == kAvx512) return runs_avx512();
  if (level == kAvx512Bf16) return runs_avx512_bf16();
  if (level != kAmx) return false;
  static const bool amx = runs_amx();
  return amx;
}

int64_t best_gemm_level() {
  static const int64_t best = has_level(kAmx)      ? kAmx
                              : prefers_bf16()     ? kAvx512Bf16
                              : has_level(kAvx512) ? kAvx512
                              : has_level(kAvx2)   ? kAvx2
                                                   : kBaseline;
  return best;
}

// Multiply-adds that are worth a thread of their own.
constexpr int64_t kGrainProducts = 1 << 22;

void check_operand(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::BFloat16, name,
                  ": expected a CPU matrix in bf16");
  STD_TORCH_CHECK(t.stride(0) == 1 || t.stride(1) == 1 || t.size(0) < 2 || t.size(1) < 2, name,
                  ": expected rows or columns of adjacent elements");
}

// out = or += left right: (m, k) (k, c), fp32 sums.
void product_into(Tensor out, Tensor left, Tensor right, bool add, int64_t level) {
  const gemm::Kernels& kernels = gemm_kernels(level);
  const gemm::Operand a = gemm_operand(left, 0, "left"), b = gemm_operand(right, 1, "right");
  STD_TORCH_CHECK(left.size(1) == right.size(0), "right: expected ", left.size(1), " rows, got ", right.size(0));
  check_matrix(out, "out");
  STD_TORCH_CHECK(out.size(0) == left.size(0) && out.size(1) == right.size(1), "out: expected ", left.size(0), " x ",
                  right.size(1));
  const bool narrow = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || out.scalar_type() == ScalarType::Float, "out: expected float32 or bfloat16");
  STD_TORCH_CHECK(!narrow || (!add && left.size(1) <= gemm::kMaxDepth), "out: bfloat16 takes one product of a depth of ",
                  gemm::kMaxDepth, " at most");
  run_product({a, b, static_cast<char*>(out.mutable_data_ptr()), out.stride(0), narrow, add, nullptr}, kernels);
}

}  // namespace

const gemm::Kernels& gemm_kernels(int64_t level) {
  STD_TORCH_CHECK(has_level(level), "level: this machine does not run the instructions of level ", level);
#ifdef VK_BF16_TARGETS
  if (level == kAmx) return gemm::kAmx;
  if (level == kAvx512Bf16) return gemm::kAvx512Bf16;
#endif
#ifdef VK_X86_TARGETS
  if (level == kAvx512) return gemm::avx512::kKernels;
  if (level == kAvx2) return gemm::avx2::kKernels;
#endif
  return gemm::baseline::kKernels;
}

gemm::Operand gemm_operand(const Tensor& t, int lane, const char* name) {
  check_operand(t, name);
  const int deep = 1 - lane;
  gemm::Operand o{static_cast<const uint16_t*>(t.const_data_ptr()), t.size(lane), t.size(deep), t.stride(lane),
                  t.stride(deep)};
  if (o.depth == 1) o.depth_stride = 1;
  return o;
}

void run_product(const gemm::Product& p, const gemm::Kernels& kernels, const EndRows& end_rows) {
  if (p.left.lanes == 0 || p.right.lanes == 0) return;
  const int64_t size = p.left.lanes * p.right.lanes * std::max<int64_t>(1, p.left.depth);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(size, kGrainProducts));
  Shares shares = gemm::shares_of(p, kernels, threads);
  Pieces rows(end_rows ? p.left.lanes : 0, ceil_div(p.left.lanes, 8 * threads));
  std::atomic<bool> done{true};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      if (!gemm::multiply(p, kernels, shares, thread)) done = false;
      // Multiplied by all threads by now.
      if (done && end_rows) rows.run(end_rows);
    }
  });
  STD_TORCH_CHECK(done, "out of memory: operands are packed into ", gemm::Scratch::kBytes >> 10, " KiB a thread");
}

STABLE_TORCH_LIBRARY_FRAGMENT(var_kernels_native, m) {
  m.def("best_gemm_level() -> int");
  m.def("has_gemm_level(int level) -> bool");
  m.def("product_into(Tensor(a!) out, Tensor left, Tensor right, bool add, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("best_gemm_level", TORCH_BOX(&best_gemm_level));
  m.impl("has_gemm_level", TORCH_BOX(&has_level));
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CPU, m) {
  m.impl("product_into", TORCH_BOX(&product_into));
}

}  // namespace var_kernels
