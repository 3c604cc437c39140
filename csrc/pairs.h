// Jobs of the pair kernels: two models' logits over one vocabulary, z of the policy p and w of the reference q.
#pragma once

#include "rows.h"

namespace var_kernels {

// KL(p||q), KL(q||p), or the Jensen-Shannon divergence beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p.
enum class Divergence { reverse, forward, mixture };

struct PairJob {
  Tile z, w;
  Transform of_z, of_w;
  Divergence divergence;
  float beta;
  // (6, n): maximum and sum of exp(z - maximum) of z, those of w, then two sums:
  // reverse: sum exp(z - max_z) t, t = (z - max_z) - (w - max_w), and nothing; forward: with the roles changed;
  // mixture: KL(p||m), KL(q||m).
  double* state;
  int64_t state_stride;
  const float* upstream;  // (n,), of the gradient
  float cap_slope;        // tanh = cap_slope z
  char* out;              // (n, C) of the gradient, or z's own storage: then narrower or as wide
  int64_t out_bytes;      // of a row's stride
  Storage out_storage;
};

struct PairKernels {
  void (*stats)(const PairJob&, int64_t row);    // merges maxima and sums, and the first of the last two for the KLs
  void (*mixture)(const PairJob&, int64_t row);  // adds to KL(p||m) and KL(q||m), once maxima and sums are complete
  void (*grad)(const PairJob&, int64_t row);
};

}  // namespace var_kernels
