// logits = hidden W^T, bf16 operands to an fp32 result: products are exact, sums are fp32 in a fixed order, so a logit's
// bits depend neither on the tile that it is computed in nor on the threads. One instruction set: AVX-512 BF16.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VK_BF16_DOT 1
#include <immintrin.h>
#endif

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Product {
  const uint16_t* hidden;  // (n, D) bf16, D even, rows hidden_stride elements apart
  const uint16_t* weight;  // (C, D) bf16
  float* logits;           // (n, C)
  int64_t n, d, columns, hidden_stride, weight_stride, logits_stride;
};

#ifdef VK_BF16_DOT
// Columns of a panel, pairs of D in a panel (64 KiB in all), rows of hidden that stay in the second-level cache.
constexpr int64_t kPanel = 64, kPairs = 256, kRowBlock = 768;

// gcc warns of its own intrinsics (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")

// 16 x 16 words.
inline __attribute__((always_inline)) void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// panel[pair][column] = the pair's two elements of the column's row of W; 0 beyond the last column.
void pack(const Product& p, int64_t column, int64_t pair, int64_t pairs, uint32_t* panel) {
  for (int64_t group = 0; group < kPanel; group += 16) {
    for (int64_t first = 0; first < pairs; first += 16) {
      const int64_t count = std::min<int64_t>(16, pairs - first);
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t v = column + group + i;
        r[i] = v < p.columns ? _mm512_maskz_loadu_epi32(mask, p.weight + v * p.weight_stride + 2 * (pair + first))
                             : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t i = 0; i < count; ++i) _mm512_store_si512(panel + (first + i) * kPanel + group, r[i]);
    }
  }
}

// Rows x one panel: out = or += hidden panel, for kPanel columns. What is added to comes last, which keeps the chain of
// roundings as short as a panel.
template <int Rows>
void multiply(const uint16_t* hidden, int64_t hidden_stride, const uint32_t* panel, int64_t pairs, float* out,
              int64_t out_stride, bool add) {
  __m512 sum[Rows][4];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh w[4];
    for (int c = 0; c < 4; ++c) w[c] = (__m512bh)_mm512_load_si512(panel + k * kPanel + 16 * c);
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, hidden + r * hidden_stride + 2 * k, sizeof pair);
      const __m512bh h = (__m512bh)_mm512_set1_epi32(pair);
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], h, w[c]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < 4; ++c) {
      float* to = out + r * out_stride + 16 * c;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][c]) : sum[r][c]);
    }
  }
}

using Multiply = void (*)(const uint16_t*, int64_t, const uint32_t*, int64_t, float*, int64_t, bool);
constexpr int64_t kRows = 6;
constexpr Multiply kMultiply[kRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                           multiply<4>, multiply<5>, multiply<6>};

void multiply_panel(const Product& p, int64_t row_begin, int64_t row_end, int64_t column) {
  alignas(64) uint32_t panel[kPairs * kPanel];
  alignas(64) float edge[kRows * kPanel];
  const int64_t width = std::min(kPanel, p.columns - column);
  for (int64_t pair = 0; pair < p.d / 2; pair += kPairs) {
    const int64_t pairs = std::min(kPairs, p.d / 2 - pair);
    const bool add = pair > 0;
    pack(p, column, pair, pairs, panel);
    for (int64_t row = row_begin; row < row_end; row += kRows) {
      const int64_t rows = std::min(kRows, row_end - row);
      const uint16_t* hidden = p.hidden + row * p.hidden_stride + 2 * pair;
      float* out = p.logits + row * p.logits_stride + column;
      if (width == kPanel) {
        kMultiply[rows](hidden, p.hidden_stride, panel, pairs, out, p.logits_stride, add);
        continue;
      }
      for (int64_t r = 0; add && r < rows; ++r) std::memcpy(edge + r * kPanel, out + r * p.logits_stride, width * 4);
      kMultiply[rows](hidden, p.hidden_stride, panel, pairs, edge, kPanel, add);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * p.logits_stride, edge + r * kPanel, width * 4);
    }
  }
}
#pragma GCC pop_options
#endif

bool has_bf16_dot() {
#ifdef VK_BF16_DOT
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void check_matrix(const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == dtype, name, ": expected a CPU matrix, bf16 operands "
                  "and an fp32 result");
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, ": expected ", rows, " x ", columns);
  STD_TORCH_CHECK(columns < 2 || t.stride(1) == 1, name, ": expected columns next to each other");
}

void logits_into(Tensor logits, Tensor hidden, Tensor weight) {
  STD_TORCH_CHECK(has_bf16_dot(), "logits_into: this machine has no AVX-512 BF16");
  const int64_t n = hidden.size(0), d = hidden.size(1), columns = weight.size(0);
  STD_TORCH_CHECK(d % 2 == 0, "hidden: expected an even number of columns, got ", d);
  check_matrix(hidden, ScalarType::BFloat16, n, d, "hidden");
  check_matrix(weight, ScalarType::BFloat16, columns, d, "weight");
  check_matrix(logits, ScalarType::Float, n, columns, "logits");
#ifdef VK_BF16_DOT
  const Product p{static_cast<const uint16_t*>(hidden.const_data_ptr()),
                  static_cast<const uint16_t*>(weight.const_data_ptr()),
                  static_cast<float*>(logits.mutable_data_ptr()),
                  n, d, columns, hidden.stride(0), weight.stride(0), logits.stride(0)};
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const int64_t end = std::min(n, begin + kRowBlock);
    torch::stable::parallel_for(0, (columns + kPanel - 1) / kPanel, 1, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) multiply_panel(p, begin, end, panel * kPanel);
    });
  }
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(var_kernels_native, m) {
  m.def("has_bf16_dot() -> bool");
  m.def("logits_into(Tensor(a!) logits, Tensor hidden, Tensor weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("has_bf16_dot", TORCH_BOX(&has_bf16_dot));
}

STABLE_TORCH_LIBRARY_IMPL(var_kernels_native, CPU, m) {
  m.impl("logits_into", TORCH_BOX(&logits_into));
}

}  // namespace var_kernels
