// The kernels of csrc/ without torch, against sums in double: for processors that torch does not run on here (NEON under an
// emulator), and for the thread sanitizer, which cannot see into torch's thread pool. Several threads share every tile and
// every product. Prints "N passed, M failed".
//     g++ -std=c++17 -O2 -pthread -I csrc tests/selftest.cpp -o selftest && ./selftest
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "gemm.h"
#include "rows.h"

namespace var_kernels {
namespace baseline {
#define VK_LANES 4
#include "vectors.inc"
#include "rows_kernels.inc"
#undef VK_LANES
}  // namespace baseline
namespace gemm {
namespace baseline {
#define VK_LANES 4
#include "vectors.inc"
#include "gemm_fma.inc"
#undef VK_LANES
}  // namespace baseline
}  // namespace gemm
}  // namespace var_kernels

using namespace var_kernels;

namespace {

// Pieces of work from one of a thread's to its next; 1 is a mistake, every thread then does all of them.
#ifndef STRIDE
#define STRIDE 3
#endif
constexpr int kThreads = 3;
int passed = 0, failed = 0;
std::mt19937 generator(0);

void check(bool good, const char* what, int64_t a, int64_t b, int64_t c, double error) {
  ++(good ? passed : failed);
  const long long sizes[] = {a, b, c};
  if (!good) std::printf("FAILED: %s %lld x %lld x %lld: error %g\n", what, sizes[0], sizes[1], sizes[2], error);
}

float random_float() { return std::normal_distribution<float>(0.0f, 1.0f)(generator); }

float of_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

uint16_t bf16_of(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// Every thread takes pieces of [0, count) in turn.
template <class Work>
void by_threads(int64_t count, const Work& work) {
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&work, count, t] {
      for (int64_t i = t; i < count; i += STRIDE) work(i);
    });
  for (std::thread& thread : threads) thread.join();
}

// Rows of `columns` logits: the statistics, then the gradient in their place, rounded to bf16 if `narrow`.
void rows(int64_t n, int64_t columns, bool narrow, bool capped) {
  std::vector<float> tile(n * columns), bias(columns), max(n, -std::numeric_limits<float>::infinity()), sumexp(n);
  std::vector<float> label_logit(n), lse(n), prob(n, -1.0f), label(n, 1.0f);
  std::vector<int64_t> ids(n);
  for (float& x : tile) x = 3 * random_float();
  for (float& x : bias) x = random_float();
  for (int64_t r = 0; r < n; ++r) ids[r] = (r * 7919) % columns;
  const double scale = 0.5, cap = capped ? 4.0 : 0.0;
  const auto logit = [&](int64_t r, int64_t c) {
    const double x = scale * (static_cast<double>(tile[r * columns + c]) + bias[c]);
    return capped ? cap * std::tanh(x / cap) : x;
  };
  std::vector<double> expected(n * columns), truth_lse(n);
  for (int64_t r = 0; r < n; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += std::exp(logit(r, c));
    truth_lse[r] = std::log(sum);
    for (int64_t c = 0; c < columns; ++c) {
      const double z = logit(r, c), slope = scale * (capped ? 1 - z * z / (cap * cap) : 1);
      expected[r * columns + c] = ((c == ids[r]) - std::exp(z - truth_lse[r])) * slope;
    }
  }
  const Tile view{reinterpret_cast<char*>(tile.data()), Storage::f32, columns * 4, columns};
  const Transform transform{reinterpret_cast<const char*>(bias.data()), Storage::f32, capped, static_cast<float>(scale),
                            static_cast<float>(cap), static_cast<float>(capped ? scale / cap : 0)};
  const Labels labels{ids.data(), 1, 0};
  const StatsJob stats{view, transform, labels, max.data(), sumexp.data(), label_logit.data(), nullptr, nullptr, nullptr};
  by_threads(n, [&](int64_t r) { baseline::kKernels.stats(stats, r); });
  double error = 0;
  for (int64_t r = 0; r < n; ++r) {
    lse[r] = max[r] + std::log(sumexp[r]);
    error = std::max(error, std::abs(lse[r] - truth_lse[r]));
  }
  check(error < 1e-5, "lse", n, columns, capped, error);
  const GradJob grad{view,         transform, labels,  lse.data(), prob.data(), label.data(), nullptr, nullptr,
                     static_cast<float>(capped ? 1 / cap : 0), narrow ? Storage::bf16 : Storage::f32};
  by_threads(n, [&](int64_t r) { baseline::kKernels.grad(grad, r); });
  error = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float* row = tile.data() + r * columns;
      const float got = narrow ? of_bf16(reinterpret_cast<const uint16_t*>(row)[c]) : row[c];
      error = std::max(error, std::abs(got - expected[r * columns + c]));
    }
  }
  check(error < (narrow ? 4e-3 : 1e-5), "gradient", n, columns, capped, error);
}

void product(int64_t m, int64_t depth, int64_t n, bool left_by_depth, bool right_by_depth, bool narrow) {
  std::vector<uint16_t> a(m * depth), b(depth * n);
  for (uint16_t& x : a) x = bf16_of(random_float());
  for (uint16_t& x : b) x = bf16_of(random_float());
  const gemm::Operand left{a.data(), m, depth, left_by_depth ? depth : 1, left_by_depth ? 1 : m};
  const gemm::Operand right{b.data(), n, depth, right_by_depth ? depth : 1, right_by_depth ? 1 : n};
  std::vector<char> out(m * n * 4);
  const gemm::Product p{left, right, out.data(), n, narrow, false};
  by_threads(gemm::ceil_div(n, 64), [&](int64_t i) {
    gemm::multiply_block(p, gemm::baseline::kKernels, 0, m, 64 * i, std::min(n, 64 * i + 64));
  });
  double error = 0, largest = 0;
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      double truth = 0;
      for (int64_t k = 0; k < depth; ++k)
        truth += static_cast<double>(of_bf16(a[r * left.lane_stride + k * left.depth_stride])) *
                 of_bf16(b[c * right.lane_stride + k * right.depth_stride]);
      const double got = narrow ? of_bf16(reinterpret_cast<const uint16_t*>(out.data())[r * n + c])
                                : reinterpret_cast<const float*>(out.data())[r * n + c];
      error = std::max(error, std::abs(got - truth));
      largest = std::max(largest, std::abs(truth));
    }
  }
  check(error <= largest * (narrow ? 0x1p-8 : 0x1p-20), "product", m, depth, n, error);
}

}  // namespace

int main() {
  for (int64_t columns : {1, 3, 17, 507, 1025, 2600})
    for (bool narrow : {false, true})
      for (bool capped : {false, true}) rows(5, columns, narrow, capped);
  for (bool left : {false, true})
    for (bool right : {false, true})
      for (bool narrow : {false, true}) {
        product(1, 1, 1, left, right, narrow);
        product(13, 71, 207, left, right, narrow);
        product(140, 33, 130, left, right, narrow);
        product(5, 2101, 70, left, right, narrow);
      }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
