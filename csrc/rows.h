// The row kernels' jobs, as plain pointers: what rows.cpp reads out of the tensors and rows_kernels.inc computes.
// Dimensions: n rows, C columns of this vocabulary slice, K labels a row.
#pragma once

#include <cstdint>

namespace var_kernels {

enum class Storage { f32, bf16, f16 };

struct Tile {
  char* data;          // (n, C), columns next to each other
  Storage storage;
  int64_t row_bytes;
  int64_t columns;
};

// z = scale (x + b), or cap tanh(inner (x + b)) where there is a cap.
struct Transform {
  const char* bias;    // (C,) or null
  Storage bias_storage;
  bool has_cap;
  float scale, cap, inner;
};

struct Labels {
  const int64_t* ids;  // (n, K)
  int64_t per_row;
  int64_t v_start;     // id of column 0
};

struct StatsJob {
  Tile tile;
  Transform transform;
  Labels labels;
  float* max;          // (n,), as are the others; null where nobody asked
  float* sumexp;
  float* label_logit;  // (n, K)
  float* shifted_sum;
  float* logit_sum;
  int64_t* argmax;
};

struct GradJob {
  Tile tile;
  Transform transform;
  Labels labels;
  const float* max;         // (n,)
  const float* log_sum;     // (n,), of exp(z - max)
  const float* prob;        // (n,)
  const float* label;       // (n, K)
  const float* logp_slope;  // (n,) or null
  const float* constant;    // (n,) or null
  float cap_slope;          // tanh = cap_slope z
  Storage out;              // as wide as the tile's storage or narrower; written from the start of each row
};

// A row's pivot is raised where a sum of its exponentials exceeds this (kernels/rows.py's LARGEST_SUM).
constexpr double kLargestSum = 1e17;

// exp(z - pivot), 0 at the label, times the softcap's own slope, and their sums without that.
struct ExpJob {
  Tile tile;
  Transform transform;
  Labels labels;       // one a row
  float* pivot;        // (n,), as are the others; null where nobody asked; -infinity: the row's own maximum
  float* others;
  float* logit_sum;
  int64_t* argmax;
  float* top;
  float cap_slope;     // tanh = cap_slope z
  Storage storage;     // of what is stored
  char* out;           // (n, C) or null
  int64_t out_bytes;   // of a row's stride
  char* earlier;       // (n, earlier_columns) or null: scaled as the pivot is raised
  int64_t earlier_bytes, earlier_columns;
};

// The same of a product's sums (gemm.h's Epilogue), block of columns by block: each has a pivot and a sum of its own, which
// `end` merges row by row in the blocks' order.
struct ExpBlocks {
  ExpJob job;          // columns and out of the whole product; pivot and others as they stand before it; tile.data unused
  int64_t block, blocks;
  float* pivots;       // (n, blocks)
  double* sums;
};

// One instruction set's kernels.
struct RowKernels {
  void (*stats)(const StatsJob&, int64_t row);
  void (*grad)(const GradJob&, int64_t row);
  void (*store_exp)(const ExpJob&, int64_t row);
  void (*exp_of_sums)(const ExpBlocks&, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns);
  void (*end_blocks)(const ExpBlocks&, int64_t row);
  void (*exp)(const float* x, float* y, int64_t count);
};

}  // namespace var_kernels
