// Floats to bf16, to nearest, by VCVTNEPS2BF16: a tenth of the instructions of tile.inc's own. Denormals become 0.
#pragma once

#include <cstdint>

#include "cpu.h"

#ifdef VK_X86_TARGETS
#include <immintrin.h>

// gcc warns of its own intrinsics (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#ifdef VK_BF16_TARGETS
namespace var_kernels {

inline bool rounds_bf16() {
  static const bool runs = runs_avx512_bf16();
  return runs;
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")
inline void round_bf16(const float* from, int64_t count, char* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
    _mm256_mask_storeu_epi16(to + 2 * i, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i)));
  }
}
#pragma GCC pop_options

}  // namespace var_kernels
#endif
