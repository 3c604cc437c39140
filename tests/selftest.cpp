// The kernels of csrc/ without torch, against sums in double: for processors that torch does not run on here (NEON under an
// emulator, AMX emulated), and for the thread sanitizer, which cannot see into torch's thread pool. Several threads share
// every tile and every product. Prints "N passed, M failed".
//     g++ -std=c++17 -O2 -pthread -I csrc tests/selftest.cpp -o selftest && ./selftest
// -include tests/amx_emulation.h: the products by csrc/gemm_x86.h's AMX kernels, nothing else.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cpu.h"
#include "gemm.h"
#include "rows.h"
#ifdef VK_EMULATE_AMX
#include "gemm_x86.h"
#endif

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

constexpr int kThreads = 3;
// Pieces of work from one of a thread's to its next; 1 is a mistake, every thread then does all of them.
int stride = kThreads;
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
      for (int64_t i = t; i < count; i += stride) work(i);
    });
  for (std::thread& thread : threads) thread.join();
}

// Rows of `columns` logits: the statistics, then the gradient in their place, rounded to bf16 if `narrow`.
void rows(int64_t n, int64_t columns, bool narrow, bool capped) {
  std::vector<float> tile(n * columns), bias(columns), max(n, -std::numeric_limits<float>::infinity()), sumexp(n);
  std::vector<float> label_logit(n), log_sum(n), prob(n, -1.0f), label(n, 1.0f);
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
    log_sum[r] = std::log(sumexp[r]);
    error = std::max(error, std::abs(max[r] + log_sum[r] - truth_lse[r]));
  }
  check(error < 1e-5, "lse", n, columns, capped, error);
  const GradJob grad{view,         transform, labels, max.data(), log_sum.data(), prob.data(), label.data(), nullptr, nullptr,
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

#ifdef VK_EMULATE_AMX
constexpr const gemm::Kernels& kProduct = gemm::kAmx;

// What another library may have left behind on this thread.
void configure_otherwise() {
  uint8_t config[64] = {1};
  config[16] = 32;
  config[48] = 8;
  amx_emulation::loadconfig(config);
}
bool released() { return !amx_emulation::state.configured; }

// One sum of TDPBF16PS onto `before`: low and high halves of pairs by 1.
float dot(float before, const std::vector<std::pair<float, float>>& pairs) {
  uint16_t left[16][32] = {}, ones[16][32];
  float sums[16][16] = {{before}};
  for (size_t k = 0; k < pairs.size(); ++k) {
    left[0][2 * k] = bf16_of(pairs[k].first);
    left[0][2 * k + 1] = bf16_of(pairs[k].second);
  }
  for (auto& row : ones) std::fill(row, row + 32, bf16_of(1.0f));
  gemm::kAmx.begin();
  amx_emulation::loadd(0, sums, 64);
  amx_emulation::loadd(4, left, 64);
  amx_emulation::loadd(6, ones, 64);
  amx_emulation::dpbf16ps(0, 4, 6);
  amx_emulation::stored(0, sums, 64);
  gemm::kAmx.end();
  return sums[0][0];
}

// Halves are summed apart, from 0, and added to what was there; denormals are 0.
void sums() {
  const auto is = [](float got, float expected, const char* what) { check(got == expected, what, 1, 1, 1, got - expected); };
  is(dot(0, {{0x1p24f, 1}, {-0x1p24f, 1}}), 2, "halves are summed apart");
  is(dot(0, {{1, -0x1p24f}, {1, 0x1p24f}}), 2, "halves are summed apart");
  is(dot(0x1p24f, {{1, 1}}), 0x1p24f + 2, "a tile's sum is added at once");
  is(dot(0, {{0x1p-127f, 0x1p-133f}}), 0, "denormal operands are 0");
  is(dot(0x1p-130f, {}), 0, "a denormal sum is 0");
  is(dot(-0x1p-125f, {{0x1.8p-126f, 0}}), 0, "a denormal result is 0");
}
#else
constexpr const gemm::Kernels& kProduct = gemm::baseline::kKernels;
void configure_otherwise() {}
bool released() { return true; }
#endif

// Whole numbers, whose products and sums are exact in any order, or any.
uint16_t operand(bool whole) {
  return bf16_of(whole ? static_cast<float>(std::uniform_int_distribution<int>(-15, 15)(generator)) : random_float());
}

// The result begins as `before` and ends 3 columns before its next row.
void product(int64_t m, int64_t depth, int64_t n, bool left_by_depth, bool right_by_depth, bool narrow, bool add,
             bool whole) {
  std::vector<uint16_t> a(m * depth), b(depth * n);
  for (uint16_t& x : a) x = operand(whole);
  for (uint16_t& x : b) x = operand(whole);
  const gemm::Operand left{a.data(), m, depth, left_by_depth ? depth : 1, left_by_depth ? 1 : m};
  const gemm::Operand right{b.data(), n, depth, right_by_depth ? depth : 1, right_by_depth ? 1 : n};
  const int64_t stride = n + 3;
  constexpr float kBefore = 7.0f;
  std::vector<float> wide(m * stride, kBefore);
  std::vector<uint16_t> rounded(m * stride, bf16_of(kBefore));
  char* out = narrow ? reinterpret_cast<char*>(rounded.data()) : reinterpret_cast<char*>(wide.data());
  const gemm::Product p{left, right, out, stride, narrow, add};
  std::atomic<bool> all_released{true};
  // Half of the threads come late, and find their shares taken.
  Shares shares = gemm::shares_of(p, kProduct, 2 * kThreads);
  by_threads(2 * kThreads, [&](int64_t thread) {
    configure_otherwise();
    const bool done = gemm::multiply(p, kProduct, shares, thread);
    if (!done || !released()) all_released = false;
  });
  double error = 0, largest = 0;
  bool beside = false;
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < stride; ++c) {
      const double got = narrow ? of_bf16(rounded[r * stride + c]) : wide[r * stride + c];
      if (c >= n) {
        beside = beside || got != kBefore;
        continue;
      }
      double truth = add ? kBefore : 0.0;
      for (int64_t k = 0; k < depth; ++k)
        truth += static_cast<double>(of_bf16(a[r * left.lane_stride + k * left.depth_stride])) *
                 of_bf16(b[c * right.lane_stride + k * right.depth_stride]);
      if (whole && narrow) truth = of_bf16(bf16_of(static_cast<float>(truth)));
      error = std::max(error, std::isfinite(got) ? std::abs(got - truth) : INFINITY);
      largest = std::max(largest, std::abs(truth));
    }
  }
  check(error <= (whole ? 0 : largest * (narrow ? 0x1p-8 : 0x1p-20)), "product", m, depth, n, error);
  check(!beside && all_released, beside ? "written beside the result" : "tiles are released", m, depth, n, 0);
}

void products() {
  for (bool left : {false, true})
    for (bool right : {false, true})
      for (int out = 0; out < 3; ++out) {
        const bool narrow = out == 1, add = out == 2, whole = left == right;
        product(1, 1, 1, left, right, narrow, add, whole);
        product(13, 71, 207, left, right, narrow, add, whole);
        product(140, 33, 130, left, right, narrow, add, whole);
        product(20, 2101, 70, left, right, narrow, add, whole);
        product(100, 2101, 40, left, right, narrow, add, whole);
      }
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) stride = 1;
#ifdef VK_EMULATE_AMX
  // Operands are packed by AVX-512.
  if (!runs_avx512()) {
    std::puts("skipped: this processor has no AVX-512, which packs for AMX");
    return 0;
  }
  sums();
#else
  for (int64_t columns : {1, 3, 17, 507, 1025, 2600})
    for (bool narrow : {false, true})
      for (bool capped : {false, true}) rows(5, columns, narrow, capped);
#endif
  products();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
