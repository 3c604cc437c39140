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
  const float* lse;         // (n,)
  const float* prob;        // (n,)
  const float* label;       // (n, K)
  const float* logp_slope;  // (n,) or null
  const float* constant;    // (n,) or null
  float cap_slope;          // tanh = cap_slope z
  Storage out;              // as wide as the tile's storage or narrower; written from the start of each row
};

// One instruction set's kernels.
struct RowKernels {
  void (*stats)(const StatsJob&, int64_t row);
  void (*grad)(const GradJob&, int64_t row);
  void (*exp)(const float* x, float* y, int64_t count);
};

}  // namespace var_kernels
