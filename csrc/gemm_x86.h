// out = or += A B for bf16 operands of any layout: blocks of both are packed into tiles of 1 KiB, multiplied by AMX
// (TDPBF16PS) or AVX-512 BF16 (VDPBF16PS), summed in fp32. Products are exact; an element's sum runs over its depth in an
// order that depends on the depth alone, so its bits depend neither on the block that it is computed in nor on threads.
// Both instructions take denormals for 0 and round to nearest whatever MXCSR says.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace var_kernels {
namespace gemm {

// One side of the product: lanes are rows of A or columns of B, depth is what is summed over; one stride of the two is 1.
struct Operand {
  const uint16_t* data;
  int64_t lanes, depth, lane_stride, depth_stride;
};

struct Product {
  Operand left, right;
  char* out;           // (left.lanes, right.lanes) fp32 or bf16, columns next to each other
  int64_t out_stride;  // in elements
  bool narrow;         // bf16; then the depth is at most kMaxDepth and nothing is added to
  bool add;
};

// A tile: 16 lanes by 32 of depth, 1 KiB, depth in pairs. A's tiles have a lane's pairs next to each other, B's a pair's
// lanes.
constexpr int64_t kLane = 16, kDeep = 32, kTile = kLane * kDeep;
// Depth between roundings to memory in a micro-kernel (its panels fit the first-level cache), and of a packed block.
constexpr int64_t kPanelTiles = 8, kBlockDepth = 2048, kMaxDepth = 4096;
// Elements of the packed blocks of B and A, and of the sums: 1 MiB, 256 KiB, 256 KiB.
constexpr int64_t kRightElements = 1 << 19, kLeftElements = 1 << 17, kSumElements = 1 << 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Kept by each thread: fresh pages cost more than their contents here.
struct Scratch {
  std::unique_ptr<char, Free> memory{static_cast<char*>(std::aligned_alloc(4096, kBytes))};
  static constexpr int64_t kBytes = 2 * (kRightElements + kLeftElements) + 4 * kSumElements;
  uint16_t* right() const { return reinterpret_cast<uint16_t*>(memory.get()); }
  uint16_t* left() const { return right() + kRightElements; }
  float* sums() const { return reinterpret_cast<float*>(left() + kLeftElements); }
};

// Multiplies row tiles by column tiles (1 or 2 of each) over `tiles` of depth; sums are 16 x 16 blocks, the two of a row
// of blocks next to each other, the rows sum_stride floats apart. `fresh`: from 0.
using Micro = void (*)(const uint16_t* left, int64_t left_panel, const uint16_t* right, int64_t right_panel,
                       int64_t tiles, float* sums, int64_t sum_stride, bool fresh);

struct Kernels {
  Micro micro[2][2];  // [row tiles - 1][column tiles - 1]
  void (*begin)();    // before and after a thread's calls
  void (*end)();
};

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

// One tile, zeros beyond the operand. PairMajor: B's order.
template <bool PairMajor>
inline __attribute__((always_inline)) void pack_tile(const Operand& from, int64_t lane, int64_t depth, uint16_t* to) {
  __m512i r[16];
  const int64_t lanes = from.lanes - lane, deep = from.depth - depth;
  const uint16_t* data = from.data + lane * from.lane_stride + depth * from.depth_stride;
  if (from.depth_stride == 1) {
    const __mmask32 mask = first(deep);
    for (int64_t i = 0; i < 16; ++i)
      r[i] = i < lanes ? _mm512_maskz_loadu_epi16(mask, data + i * from.lane_stride) : _mm512_setzero_si512();
  } else {
    const __mmask16 mask = static_cast<__mmask16>(first(lanes));
    for (int64_t pair = 0; pair < 16; ++pair) {
      const uint16_t* even = data + 2 * pair * from.depth_stride;
      const __m256i zero = _mm256_setzero_si256();
      const __m256i low = 2 * pair < deep ? _mm256_maskz_loadu_epi16(mask, even) : zero;
      const __m256i high = 2 * pair + 1 < deep ? _mm256_maskz_loadu_epi16(mask, even + from.depth_stride) : zero;
      r[pair] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    }
  }
  if ((from.depth_stride != 1) != PairMajor) transpose(r);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * i, r[i]);
}

// Panels of 16 lanes, each a column of tiles along the depth.
template <bool PairMajor>
void pack(const Operand& from, int64_t lane, int64_t lanes, int64_t depth, int64_t deep, uint16_t* to) {
  const int64_t tiles = ceil_div(deep, kDeep);
  const auto pack_one = [&](int64_t l, int64_t t) {
    pack_tile<PairMajor>(from, lane + l, depth + t * kDeep, to + (l / kLane * tiles + t) * kTile);
  };
  if (from.depth_stride == 1) {
    for (int64_t l = 0; l < lanes; l += kLane)
      for (int64_t t = 0; t < tiles; ++t) pack_one(l, t);
  } else {
    const int64_t width = std::min(lanes, from.lanes - lane);
    for (int64_t t = 0; t < tiles; ++t) {
      // The next tiles' lines are too far apart for the hardware to fetch them ahead.
      const int64_t next = depth + (t + 1) * kDeep, last = std::min(next + kDeep, from.depth);
      for (int64_t k = next; k < last; ++k)
        for (int64_t l = 0; l < width; l += 32)
          _mm_prefetch(reinterpret_cast<const char*>(from.data + lane + l + k * from.depth_stride), _MM_HINT_T0);
      for (int64_t l = 0; l < lanes; l += kLane) pack_one(l, t);
    }
  }
}

// 8 rows by one or two column tiles in registers.
template <int RowTiles, int ColumnTiles>
void micro_avx512(const uint16_t* left, int64_t left_panel, const uint16_t* right, int64_t right_panel, int64_t tiles,
                  float* sums, int64_t sum_stride, bool fresh) {
  constexpr int kRows = 8;
  for (int row = 0; row < RowTiles * 16; row += kRows) {
    const uint16_t* a = left + row / 16 * left_panel + row % 16 * kDeep;
    float* out = sums + row / 16 * sum_stride + row % 16 * kLane;
    __m512 sum[kRows][ColumnTiles];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < ColumnTiles; ++c)
        sum[r][c] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(out + c * kLane * kLane + r * kLane);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int pair = 0; pair < 16; ++pair) {
        __m512bh b[ColumnTiles];
        for (int c = 0; c < ColumnTiles; ++c)
          b[c] = (__m512bh)_mm512_load_si512(right + c * right_panel + t * kTile + pair * kDeep);
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

inline void nothing() {}
constexpr Kernels kAvx512 = {{{micro_avx512<1, 1>, micro_avx512<1, 2>}, {micro_avx512<2, 1>, micro_avx512<2, 2>}},
                             nothing, nothing};

// Rows [row, row + rows) by columns [column, column + columns) of the sums into the result.
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

// Rows [row_begin, row_end) by columns [column_begin, column_end), by one thread.
inline void multiply_block(const Product& p, const Kernels& kernels, int64_t row_begin, int64_t row_end,
                           int64_t column_begin, int64_t column_end) {
  thread_local const Scratch scratch;
  if (!scratch.memory) throw std::bad_alloc();
  kernels.begin();
  const int64_t depth = p.left.depth, block_depth = p.narrow ? std::max(depth, kDeep) : kBlockDepth;
  for (int64_t k = 0; k < depth || k == 0; k += block_depth) {
    const int64_t deep = std::min(block_depth, depth - k), tiles = ceil_div(deep, kDeep);
    const int64_t padded = std::max<int64_t>(tiles, 1) * kDeep;
    const int64_t wide = std::min<int64_t>(kRightElements / padded / 32 * 32, 512);
    for (int64_t column = column_begin; column < column_end; column += wide) {
      const int64_t columns = std::min(wide, column_end - column), column_tiles = ceil_div(columns, kLane);
      pack<true>(p.right, column, columns, k, deep, scratch.right());
      const int64_t high = std::min(kLeftElements / padded, kSumElements / (column_tiles * kLane)) / 32 * 32;
      for (int64_t row = row_begin; row < row_end; row += high) {
        const int64_t rows = std::min(high, row_end - row), row_tiles = ceil_div(rows, kLane);
        pack<false>(p.left, row, rows, k, deep, scratch.left());
        const int64_t panel = tiles * kTile, sum_stride = column_tiles * kLane * kLane;
        for (int64_t t = 0; t < tiles || t == 0; t += kPanelTiles) {
          const int64_t count = std::min(kPanelTiles, tiles - t);
          for (int64_t c = 0; c < column_tiles; c += 2) {
            for (int64_t r = 0; r < row_tiles; r += 2) {
              const Micro micro = kernels.micro[r + 1 < row_tiles][c + 1 < column_tiles];
              micro(scratch.left() + r * panel + t * kTile, panel, scratch.right() + c * panel + t * kTile, panel,
                    count, scratch.sums() + r * sum_stride + c * kLane * kLane, sum_stride, t == 0);
            }
          }
        }
        write_out(p, scratch.sums(), row, rows, column, columns, p.add || k > 0);
      }
    }
  }
  kernels.end();
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
template <int RowTiles, int ColumnTiles>
void micro_amx(const uint16_t* left, int64_t left_panel, const uint16_t* right, int64_t right_panel, int64_t tiles,
               float* sums, int64_t sum_stride, bool fresh) {
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
    const uint16_t *a = left + t * kTile, *b = right + t * kTile;
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
constexpr Kernels kAmx = {{{micro_amx<1, 1>, micro_amx<1, 2>}, {micro_amx<2, 1>, micro_amx<2, 2>}}, configure_tiles,
                          release_tiles};
#pragma GCC pop_options

}  // namespace gemm
}  // namespace var_kernels
