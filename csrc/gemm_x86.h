// The bf16 GEMM by instructions that multiply pairs of bf16: AMX (TDPBF16PS) or AVX-512 BF16 (VDPBF16PS). Both take
// denormals for 0 and round to nearest whatever MXCSR says. A tile is 1 KiB: A's have a lane's pairs next to each other, B's
// a pair's lanes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "gemm.h"

namespace var_kernels {
namespace gemm {

// gcc warns of its own intrinsics (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
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

inline __mmask32 first(int64_t count) { return count >= 32 ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1; }

// PairMajor: B's order.
template <bool PairMajor>
inline __attribute__((always_inline)) void pack_by_depth(const Operand& from, int64_t lane, int64_t depth, uint16_t* to) {
  __m512i r[16];
  const int64_t lanes = from.lanes - lane;
  const __mmask32 mask = first(from.depth - depth);
  const uint16_t* data = from.data + lane * from.lane_stride + depth;
  for (int64_t i = 0; i < 16; ++i)
    r[i] = i < lanes ? _mm512_maskz_loadu_epi16(mask, data + i * from.lane_stride) : _mm512_setzero_si512();
  if (PairMajor) transpose(r);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * i, r[i]);
}

template <bool PairMajor>
inline __attribute__((always_inline)) void pack_by_lanes(const Operand& from, int64_t lane, int64_t depth, uint16_t* to,
                                                         uint16_t* next) {
  // Pairs of lanes 0 to 3, 8 to 11, 16 to 19 and 24 to 27, and of the others.
  __m512i low[16], high[16];
  const int64_t deep = from.depth - depth;
  const __mmask32 mask = first(from.lanes - lane);
  const uint16_t* data = from.data + lane + depth * from.depth_stride;
  const auto row = [&](int64_t k) {
    return k < deep ? _mm512_maskz_loadu_epi16(mask, data + k * from.depth_stride) : _mm512_setzero_si512();
  };
  for (int64_t pair = 0; pair < 16; ++pair) {
    const __m512i even = row(2 * pair), odd = row(2 * pair + 1);
    low[pair] = _mm512_unpacklo_epi16(even, odd);
    high[pair] = _mm512_unpackhi_epi16(even, odd);
  }
  if (PairMajor) {
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int64_t i = 0; i < 16; ++i) {
      _mm512_store_si512(to + 32 * i, _mm512_permutex2var_epi64(low[i], front, high[i]));
      if (next) _mm512_store_si512(next + 32 * i, _mm512_permutex2var_epi64(low[i], back, high[i]));
    }
  } else {
    transpose(low);
    transpose(high);
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t at = 32 * (i / 4 * 8 + i % 4);
      _mm512_store_si512(to + at, low[i]);
      _mm512_store_si512(to + at + 4 * 32, high[i]);
      if (!next) continue;
      _mm512_store_si512(next + at, low[8 + i]);
      _mm512_store_si512(next + at + 4 * 32, high[8 + i]);
    }
  }
}

#include "gemm_pack.inc"

// 8 rows by one or two column tiles in registers.
template <int RowTiles, int ColumnTiles>
void micro_avx512(const char* left_bytes, int64_t left_panel, const char* right_bytes, int64_t right_panel, int64_t tiles,
                  float* sums, int64_t sum_stride, bool fresh) {
  constexpr int kRows = 8;
  const uint16_t* left = reinterpret_cast<const uint16_t*>(left_bytes);
  const uint16_t* right = reinterpret_cast<const uint16_t*>(right_bytes);
  for (int row = 0; row < RowTiles * 16; row += kRows) {
    const uint16_t* a = left + row / 16 * (left_panel / 2) + row % 16 * kDeep;
    float* out = sums + row / 16 * sum_stride + row % 16 * kLane;
    __m512 sum[kRows][ColumnTiles];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < ColumnTiles; ++c)
        sum[r][c] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(out + c * kLane * kLane + r * kLane);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int pair = 0; pair < 16; ++pair) {
        __m512bh b[ColumnTiles];
        for (int c = 0; c < ColumnTiles; ++c)
          b[c] = (__m512bh)_mm512_load_si512(right + c * (right_panel / 2) + t * kTile + pair * kDeep);
        for (int r = 0; r < kRows; ++r) {
          int32_t word;
          std::memcpy(&word, a + t * kTile + r * kDeep + 2 * pair, sizeof word);
          const __m512bh h = (__m512bh)_mm512_set1_epi32(word);
          for (int c = 0; c < ColumnTiles; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], h, b[c]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < ColumnTiles; ++c) _mm512_store_ps(out + c * kLane * kLane + r * kLane, sum[r][c]);
  }
}

inline void write_out(const Product& p, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      bool add) {
  const int64_t column_tiles = ceil_div(columns, kLane);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r / kLane * column_tiles * kLane * kLane + r % kLane * kLane;
    const int64_t at = (row + r) * p.out_stride + column;
    for (int64_t c = 0; c < columns; c += kLane) {
      const __mmask16 mask = static_cast<__mmask16>(first(std::min(columns - c, kLane)));
      __m512 x = _mm512_load_ps(from + c * kLane);
      if (p.narrow) {
        _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(p.out) + at + c, mask, (__m256i)_mm512_cvtneps_pbh(x));
      } else {
        float* to = reinterpret_cast<float*>(p.out) + at + c;
        if (add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to));
        _mm512_mask_storeu_ps(to, mask, x);
      }
    }
  }
}

constexpr Kernels kAvx512Bf16 = {pack<uint16_t, false>, pack<uint16_t, true>,
                                 {{micro_avx512<1, 1>, micro_avx512<1, 2>}, {micro_avx512<2, 1>, micro_avx512<2, 2>}},
                                 write_out, nothing, nothing, 2, 8, 1 << 21, 1024};
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
template <int RowTiles, int ColumnTiles>
void micro_amx(const char* left, int64_t left_panel, const char* right, int64_t right_panel, int64_t tiles, float* sums,
               int64_t sum_stride, bool fresh) {
  constexpr int kRow = 64;
  // gcc does not know that tile loads read memory.
  __asm__ volatile("" ::: "memory");
  float* below = sums + sum_stride;
  if (fresh) {
    _tile_zero(0);
    if (ColumnTiles > 1) _tile_zero(1);
    if (RowTiles > 1) _tile_zero(2);
    if (RowTiles > 1 && ColumnTiles > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRow);
    if (ColumnTiles > 1) _tile_loadd(1, sums + kLane * kLane, kRow);
    if (RowTiles > 1) _tile_loadd(2, below, kRow);
    if (RowTiles > 1 && ColumnTiles > 1) _tile_loadd(3, below + kLane * kLane, kRow);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const char *a = left + 2 * t * kTile, *b = right + 2 * t * kTile;
    _tile_loadd(4, a, kRow);
    _tile_loadd(6, b, kRow);
    _tile_dpbf16ps(0, 4, 6);
    if (ColumnTiles > 1) {
      _tile_loadd(7, b + right_panel, kRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (RowTiles > 1) {
      _tile_loadd(5, a + left_panel, kRow);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (RowTiles > 1 && ColumnTiles > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kRow);
  if (ColumnTiles > 1) _tile_stored(1, sums + kLane * kLane, kRow);
  if (RowTiles > 1) _tile_stored(2, below, kRow);
  if (RowTiles > 1 && ColumnTiles > 1) _tile_stored(3, below + kLane * kLane, kRow);
}

// All eight tiles: 16 rows of 64 bytes.
alignas(64) constexpr uint8_t kTileConfig[64] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0,
                                                 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
inline void configure_tiles() { _tile_loadconfig(kTileConfig); }
inline void release_tiles() { _tile_release(); }
constexpr Kernels kAmx = {pack<uint16_t, false>, pack<uint16_t, true>,
                          {{micro_amx<1, 1>, micro_amx<1, 2>}, {micro_amx<2, 1>, micro_amx<2, 2>}},
                          write_out, configure_tiles, release_tiles, 2, 8, 1 << 20, 512};
#pragma GCC pop_options

}  // namespace gemm
}  // namespace var_kernels
