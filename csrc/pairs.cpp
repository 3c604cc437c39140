// torch ops over the pair kernels: statistics, divergence and gradient of two models' logits. Stable ABI only.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu.h"
#include "pairs.h"
#include "round_x86.h"
#include "row_tensors.h"

namespace var_kernels {

#define VK_KERNELS "pairs_kernels.inc"
#include "targets.inc"

namespace {

// Elements that are worth a thread of their own.
constexpr int64_t kGrainElements = 1 << 15;

const PairKernels& pair_kernels(int64_t level) {
#ifdef VK_X86_TARGETS
  STD_TORCH_CHECK(level >= 0 && level <= (runs_avx512() ? 2 : runs_avx2() ? 1 : 0), "level: this machine has no ", level);
  if (level == 2) return avx512::kPairKernels;
  if (level == 1) return avx2::kPairKernels;
#else
  STD_TORCH_CHECK(level == 0, "level: this machine has no ", level);
#endif
  return baseline::kPairKernels;
}

enum Stage : int64_t { kStats = 1, kMixture = 2, kGrad = 4 };

// Stages of each row, one after the other while the row is in the cache; each row by one thread.
void pair_rows(Tensor z, Tensor w, Tensor state, int64_t divergence, double beta, int64_t stages,
               std::optional<Tensor> bias_z, double scale_z, double cap_z, double inner_z, std::optional<Tensor> bias_w,
               double scale_w, double cap_w, double inner_w, std::optional<Tensor> upstream, double cap_slope,
               ScalarType out_dtype, std::optional<Tensor> out, int64_t level) {
  const Tile tile_z = tile_of(z), tile_w = tile_of(w);
  const int64_t n = z.size(0), columns = tile_z.columns;
  STD_TORCH_CHECK(w.size(0) == n && tile_w.columns == columns, "w: expected the shape of z");
  STD_TORCH_CHECK(divergence >= 0 && divergence <= 2, "divergence: expected 0, 1 or 2, got ", divergence);
  STD_TORCH_CHECK(state.is_cpu() && state.scalar_type() == ScalarType::Double && state.dim() == 2 && state.size(0) == 6 &&
                      state.size(1) == n && (n < 2 || state.stride(1) == 1),
                  "state: expected 6 rows of ", n, " adjacent doubles");
  STD_TORCH_CHECK(!(stages & kGrad) || upstream.has_value(), "upstream: expected with a gradient");
  Tile to = tile_z;
  to.storage = storage_of(out_dtype, "out_dtype");
  if (out.has_value()) {
    to = tile_of(*out);
    STD_TORCH_CHECK(out->size(0) == n && to.columns == columns, "out: expected the shape of z");
  } else {
    STD_TORCH_CHECK(to.storage != Storage::f32 || tile_z.storage == Storage::f32, "out_dtype: does not fit into the tile");
  }
  const PairJob job{
      tile_z,
      tile_w,
      transform_of(bias_z, columns, scale_z, cap_z, inner_z),
      transform_of(bias_w, columns, scale_w, cap_w, inner_w),
      static_cast<Divergence>(divergence),
      static_cast<float>(beta),
      static_cast<double*>(state.data_ptr()),
      state.stride(0),
      floats_of(upstream, n, "upstream"),
      static_cast<float>(cap_slope),
      to.data,
      to.row_bytes,
      to.storage,
  };
  const PairKernels& kernels = pair_kernels(level);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
  in_pieces(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (stages & kStats) kernels.stats(job, row);
      if (stages & kMixture) kernels.mixture(job, row);
      if (stages & kGrad) kernels.grad(job, row);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(var_kernels_native, m) {
  m.def(
      "pair_rows(Tensor(a!) z, Tensor w, Tensor(b!) state, int divergence, float beta, int stages, Tensor? bias_z, "
      "float scale_z, float cap_z, float inner_z, Tensor? bias_w, float scale_w, float cap_w, float inner_w, "
      "Tensor? upstream, float cap_slope, ScalarType out_dtype, Tensor(c!)? out, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CPU, m) { m.impl("pair_rows", TORCH_BOX(&pair_rows)); }

}  // namespace var_kernels
