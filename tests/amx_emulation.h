// AMX in plain C++, for processors without it: stands in for the intrinsics that csrc/gemm_x86.h uses, when it is included
// before every other file (gcc's -include). What the instructions do, and when they fault, is the Intel SDM's, volume 2
// (LDTILECFG, TILELOADD, TDPBF16PS ...): what would fault ends the program. VCVTNEPS2BF16 too, which AVX-512 has only
// beside BF16.
#pragma once
#ifdef __x86_64__
#define VK_EMULATE_AMX 1

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;  // of palette 1

struct Tile {
  int rows = 0, bytes = 0;  // 0: not configured
  char data[kMaxRows][kMaxBytes] = {};
};

// Each thread's own, as the registers are.
struct State {
  bool configured = false;
  Tile tiles[kTiles];
};
inline thread_local State state;

inline void require(bool good, const char* instruction, const char* what) {
  if (good) return;
  std::fprintf(stderr, "AMX: %s: %s\n", instruction, what);
  std::abort();
}

inline Tile& tile(int index, const char* instruction) {
  require(state.configured, instruction, "no tile is configured");
  require(index >= 0 && index < kTiles, instruction, "no such tile");
  require(state.tiles[index].rows > 0, instruction, "this tile is not configured");
  require(state.tiles[index].bytes % 4 == 0, instruction, "columns of this tile are no whole words");
  return state.tiles[index];
}

inline void loadconfig(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  state = State{};
  if (config[0] == 0) return;
  require(config[0] == 1, "LDTILECFG", "no such palette");
  require(config[1] == 0, "LDTILECFG", "a first row is for interrupted loads");
  for (int i = 2; i < 64; ++i)
    if (i < 16 || (i >= 32 && i < 48) || i >= 56) require(config[i] == 0, "LDTILECFG", "reserved bytes are not 0");
  for (int i = 0; i < kTiles; ++i) {
    Tile& t = state.tiles[i];
    t.bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
    t.rows = config[48 + i];
    require(t.bytes <= kMaxBytes && t.rows <= kMaxRows, "LDTILECFG", "a tile larger than the palette's");
    require((t.bytes == 0) == (t.rows == 0), "LDTILECFG", "rows without columns");
  }
  state.configured = true;
}

inline void release() { state = State{}; }

inline void zero(int to) {
  Tile& t = tile(to, "TILEZERO");
  std::memset(t.data, 0, sizeof t.data);
}

inline void loadd(int to, const void* base, int64_t stride) {
  Tile& t = tile(to, "TILELOADD");
  std::memset(t.data, 0, sizeof t.data);
  for (int row = 0; row < t.rows; ++row) std::memcpy(t.data[row], static_cast<const char*>(base) + row * stride, t.bytes);
}

inline void stored(int from, void* base, int64_t stride) {
  const Tile& t = tile(from, "TILESTORED");
  for (int row = 0; row < t.rows; ++row) std::memcpy(static_cast<char*>(base) + row * stride, t.data[row], t.bytes);
}

inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The low (0) or high (1) halves of a tile's words; denormals are 0.
struct Halves {
  float of[kMaxRows][kMaxBytes / 4];
  Halves(const Tile& t, int high) {
    for (int row = 0; row < kMaxRows; ++row) {
      for (int column = 0; column < kMaxBytes / 4; ++column) {
        uint32_t bits;
        std::memcpy(&bits, t.data[row] + 4 * column, sizeof bits);
        bits = high ? bits & 0xffff0000u : bits << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        of[row][column] = flushed(x);
      }
    }
  }
};

// The low and the high products are summed apart, from 0, one fused multiply-add after the other, then together, then onto
// the result; each rounding flushes denormals. What is not configured of a tile is 0.
inline __attribute__((target("fma"))) void dpbf16ps(int to, int left, int right) {
  const char* name = "TDPBF16PS";
  require(to != left && to != right && left != right, name, "one tile in two places");
  Tile& c = tile(to, name);
  const Tile &a = tile(left, name), &b = tile(right, name);
  require(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, name, "tiles that do not fit");
  constexpr int kColumns = kMaxBytes / 4;
  const Halves lows[2] = {{a, 0}, {b, 0}}, highs[2] = {{a, 1}, {b, 1}};
  for (int m = 0; m < c.rows; ++m) {
    float low[kColumns] = {}, high[kColumns] = {}, result[kColumns];
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < kColumns; ++n) {
        low[n] = flushed(std::fma(lows[0].of[m][k], lows[1].of[k][n], low[n]));
        high[n] = flushed(std::fma(highs[0].of[m][k], highs[1].of[k][n], high[n]));
      }
    }
    std::memcpy(result, c.data[m], sizeof result);
    for (int n = 0; n < kColumns; ++n) result[n] = flushed(flushed(result[n]) + flushed(low[n] + high[n]));
    std::memcpy(c.data[m], result, c.bytes);
  }
}

// Denormals become 0, NaN quiet; the others are rounded to nearest, ties to even.
inline __attribute__((target("avx512f,avx512vl,avx512bf16"))) __m256bh cvtneps_pbh(__m512 from) {
  float x[16];
  uint16_t rounded[16];
  std::memcpy(x, &from, sizeof x);
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    const float value = flushed(x[i]);
    std::memcpy(&bits, &value, sizeof bits);
    rounded[i] = static_cast<uint16_t>((value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u) >> 16);
  }
  __m256bh result;
  std::memcpy(&result, rounded, sizeof result);
  return result;
}

}  // namespace amx_emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::loadconfig
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::loadd
#define _tile_stored amx_emulation::stored
#define _tile_dpbf16ps amx_emulation::dpbf16ps
#define _mm512_cvtneps_pbh amx_emulation::cvtneps_pbh
#endif
