// torch ops over the row kernels: checks, choice of the instruction set, rows in parallel. Stable ABI only, so that one
// binary serves several versions of torch and of Python.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "cpu.h"
#include "round_x86.h"
#include "rows.h"
#include "row_tensors.h"

namespace var_kernels {

#define VK_KERNELS "rows_kernels.inc"
#include "targets.inc"

namespace {

// Elements that are worth a thread of their own.
constexpr int64_t kGrainElements = 1 << 15;

// 0: baseline, 1: AVX2, 2: AVX-512. The highest that this machine runs.
int64_t best_level() { return runs_avx512() ? 2 : runs_avx2() ? 1 : 0; }

const RowKernels& kernels(int64_t level) {
  static const int64_t best = best_level();
  STD_TORCH_CHECK(level >= 0 && level <= best, "level: expected 0 to ", best, " on this machine, got ", level);
#ifdef VK_X86_TARGETS
  if (level == 2) return avx512::kKernels;
  if (level == 1) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

Labels labels_of(const Tensor& labels, int64_t n, int64_t v_start) {
  STD_TORCH_CHECK(labels.dim() == 2 && labels.size(0) == n, "labels: expected ", n, " rows of ids");
  return {vector_of<const int64_t>(labels, ScalarType::Long, labels.numel(), "labels"), labels.size(1), v_start};
}

// Each row by one thread: the result has the same bits for every number of threads.
template <class Job>
void each_row(void (*kernel)(const Job&, int64_t), const Job& job, int64_t n) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, job.tile.columns));
  in_pieces(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernel(job, row);
  });
}

void row_stats(Tensor logits, Tensor labels, Tensor max, Tensor sumexp, Tensor label_logit,
               std::optional<Tensor> shifted_sum, std::optional<Tensor> logit_sum, std::optional<Tensor> argmax,
               int64_t v_start, std::optional<Tensor> bias, double scale, double cap, double inner, int64_t level) {
  const Tile tile = tile_of(logits);
  const int64_t n = logits.size(0);
  const Labels ids = labels_of(labels, n, v_start);
  const StatsJob job{
      tile,
      transform_of(bias, tile.columns, scale, cap, inner),
      ids,
      floats_of(max, n, "max"),
      floats_of(sumexp, n, "sumexp"),
      floats_of(label_logit, n * ids.per_row, "label_logit"),
      floats_of(shifted_sum, n, "shifted_sum"),
      floats_of(logit_sum, n, "logit_sum"),
      argmax.has_value() ? vector_of<int64_t>(*argmax, ScalarType::Long, n, "argmax") : nullptr,
  };
  each_row(kernels(level).stats, job, n);
}

void row_grad(Tensor logits, Tensor labels, Tensor norms, Tensor prob, Tensor label, std::optional<Tensor> logp_slope,
              std::optional<Tensor> constant, int64_t v_start, std::optional<Tensor> bias, double scale, double cap,
              double inner, double cap_slope, ScalarType out_dtype, int64_t level) {
  const Tile tile = tile_of(logits);
  const int64_t n = logits.size(0);
  const Labels ids = labels_of(labels, n, v_start);
  const Storage out = storage_of(out_dtype, "out_dtype");
  STD_TORCH_CHECK(out != Storage::f32 || tile.storage == Storage::f32, "out_dtype: does not fit into the tile");
  const float* norms_data = floats_of(norms, 2 * n, "norms");
  const GradJob job{
      tile,
      transform_of(bias, tile.columns, scale, cap, inner),
      ids,
      norms_data,
      norms_data + n,
      floats_of(prob, n, "prob"),
      floats_of(label, n * ids.per_row, "label"),
      floats_of(logp_slope, n, "logp_slope"),
      floats_of(constant, n, "constant"),
      static_cast<float>(cap_slope),
      out,
  };
  each_row(kernels(level).grad, job, n);
}

// The data of a matrix of the tile's shape, or of its rows, that is stored beside it.
char* stored_of(const std::optional<Tensor>& t, int64_t n, Storage storage, const char* name) {
  if (!t.has_value()) return nullptr;
  check_matrix(*t, name);
  STD_TORCH_CHECK(t->size(0) == n && storage_of(t->scalar_type(), name) == storage, name, ": expected ", n,
                  " rows of the contract's dtype");
  return static_cast<char*>(t->data_ptr());
}

// A job over `columns` columns; tile.data is left to the caller.
ExpJob exp_job(int64_t n, int64_t columns, const Tensor& labels, const Tensor& pivot, const Tensor& others,
               int64_t v_start, const std::optional<Tensor>& bias, double scale, double cap, double inner,
               double cap_slope, const std::optional<Tensor>& out, const std::optional<Tensor>& earlier) {
  const Labels ids = labels_of(labels, n, v_start);
  STD_TORCH_CHECK(ids.per_row == 1, "labels: expected one a row");
  STD_TORCH_CHECK(!out.has_value() || out->size(1) == columns, "out: expected ", columns, " columns");
  const Storage storage = out.has_value()       ? storage_of(out->scalar_type(), "out")
                          : earlier.has_value() ? storage_of(earlier->scalar_type(), "earlier")
                                                : Storage::f32;
  const int64_t width = storage == Storage::f32 ? 4 : 2;
  return {
      {nullptr, Storage::f32, 0, columns},
      transform_of(bias, columns, scale, cap, inner),
      ids,
      floats_of(pivot, n, "pivot"),
      floats_of(others, n, "others"),
      nullptr,
      nullptr,
      nullptr,
      static_cast<float>(cap_slope),
      storage,
      stored_of(out, n, storage, "out"),
      out.has_value() ? out->stride(0) * width : 0,
      stored_of(earlier, n, storage, "earlier"),
      earlier.has_value() ? earlier->stride(0) * width : 0,
      earlier.has_value() ? earlier->size(1) : 0,
  };
}

void row_exp(Tensor logits, Tensor labels, Tensor pivot, Tensor others, std::optional<Tensor> logit_sum,
             std::optional<Tensor> argmax, std::optional<Tensor> top, int64_t v_start, std::optional<Tensor> bias,
             double scale, double cap, double inner, double cap_slope, std::optional<Tensor> out,
             std::optional<Tensor> earlier, int64_t level) {
  const Tile tile = tile_of(logits);
  const int64_t n = logits.size(0);
  ExpJob job = exp_job(n, tile.columns, labels, pivot, others, v_start, bias, scale, cap, inner, cap_slope, out, earlier);
  STD_TORCH_CHECK(argmax.has_value() == top.has_value(), "top: expected beside argmax");
  job.tile = tile;
  job.logit_sum = floats_of(logit_sum, n, "logit_sum");
  job.argmax = argmax.has_value() ? vector_of<int64_t>(*argmax, ScalarType::Long, n, "argmax") : nullptr;
  job.top = floats_of(top, n, "top");
  each_row(kernels(level).store_exp, job, n);
}

struct ExpEpilogue : gemm::Epilogue {
  const RowKernels* kernels;
  const ExpBlocks* blocks;
};

void run_exp(const gemm::Epilogue& self, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const auto& exp = static_cast<const ExpEpilogue&>(self);
  exp.kernels->exp_of_sums(*exp.blocks, sums, row, rows, column, columns);
}

// row_exp of the logits hidden W^T, which are never written: (n, d) and (columns, d) in bf16. Each block of columns has
// statistics of its own, so that the bits do not depend on the threads.
void product_exp(Tensor hidden, Tensor weight, Tensor labels, Tensor pivot, Tensor others, int64_t v_start,
                 std::optional<Tensor> bias, double scale, double cap, double inner, double cap_slope,
                 std::optional<Tensor> out, std::optional<Tensor> earlier, int64_t gemm_level, int64_t level) {
  const int64_t n = hidden.size(0), columns = weight.size(0), depth = hidden.size(1);
  STD_TORCH_CHECK(weight.size(1) == depth, "weight: expected ", depth, " columns, got ", weight.size(1));
  STD_TORCH_CHECK(depth <= gemm::kMaxDepth, "hidden: expected at most ", gemm::kMaxDepth, " columns, got ", depth);
  ExpBlocks blocks{exp_job(n, columns, labels, pivot, others, v_start, bias, scale, cap, inner, cap_slope, out, earlier),
                   0, 0, nullptr, nullptr};
  if (n == 0 || columns == 0) return;
  const gemm::Kernels& multiply = gemm_kernels(gemm_level);
  const RowKernels& rows = kernels(level);
  blocks.block = gemm::block_columns(multiply, depth);
  blocks.blocks = ceil_div(columns, blocks.block);
  std::vector<float> pivots(n * blocks.blocks);
  std::vector<double> sums(n * blocks.blocks);
  blocks.pivots = pivots.data();
  blocks.sums = sums.data();
  ExpEpilogue epilogue;
  epilogue.run = run_exp;
  epilogue.kernels = &rows;
  epilogue.blocks = &blocks;
  run_product({gemm_operand(hidden, 0, "hidden"), gemm_operand(weight, 0, "weight"), nullptr, 0, false, false, &epilogue},
              multiply, [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row) rows.end_blocks(blocks, row);
              });
}

// For the test of its error bound.
void exp_into(Tensor x, Tensor y, int64_t level) {
  const int64_t count = x.numel();
  kernels(level).exp(floats_of(x, count, "x"), floats_of(y, count, "y"), count);
}

}  // namespace

STABLE_TORCH_LIBRARY(var_kernels_native, m) {
  m.def("best_level() -> int");
  m.def(
      "row_stats(Tensor logits, Tensor labels, Tensor(a!) max, Tensor(b!) sumexp, Tensor(c!) label_logit, "
      "Tensor(d!)? shifted_sum, Tensor(e!)? logit_sum, Tensor(f!)? argmax, int v_start, Tensor? bias, float scale, "
      "float cap, float inner, int level) -> ()");
  m.def(
      "row_grad(Tensor(a!) logits, Tensor labels, Tensor norms, Tensor prob, Tensor label, Tensor? logp_slope, "
      "Tensor? constant, int v_start, Tensor? bias, float scale, float cap, float inner, float cap_slope, "
      "ScalarType out_dtype, int level) -> ()");
  m.def(
      "row_exp(Tensor logits, Tensor labels, Tensor(a!) pivot, Tensor(b!) others, Tensor(c!)? logit_sum, "
      "Tensor(d!)? argmax, Tensor(e!)? top, int v_start, Tensor? bias, float scale, float cap, float inner, "
      "float cap_slope, Tensor(f!)? out, Tensor(g!)? earlier, int level) -> ()");
  m.def(
      "product_exp(Tensor hidden, Tensor weight, Tensor labels, Tensor(a!) pivot, Tensor(b!) others, int v_start, "
      "Tensor? bias, float scale, float cap, float inner, float cap_slope, Tensor(c!)? out, Tensor(d!)? earlier, "
      "int gemm_level, int level) -> ()");
  m.def("exp_into(Tensor x, Tensor(a!) y, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("best_level", TORCH_BOX(&best_level));
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("row_grad", TORCH_BOX(&row_grad));
  m.impl("row_exp", TORCH_BOX(&row_exp));
  m.impl("product_exp", TORCH_BOX(&product_exp));
  m.impl("exp_into", TORCH_BOX(&exp_into));
}

}  // namespace var_kernels
