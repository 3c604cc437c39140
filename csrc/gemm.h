// out = or += A B for bf16 operands of any layout: blocks of both are packed into panels of 16 lanes, multiplied by an
// instruction set's own kernels (gemm_fma.inc, gemm_x86.h) and summed in fp32. Products are exact; an element's sum runs
// over its depth in an order that depends on the depth, the result's dtype and the instructions alone, so its bits depend
// neither on the block that it is computed in nor on threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "shares.h"

namespace var_kernels {
namespace gemm {

// One side of the product: lanes are rows of A or columns of B, depth is what is summed over; one stride of the two is 1.
struct Operand {
  const uint16_t* data;
  int64_t lanes, depth, lane_stride, depth_stride;
};

// Takes finished sums in place of a result. They lie in 16 x 16 blocks, ceil(columns / 16) of them for 16 rows.
struct Epilogue {
  void (*run)(const Epilogue& self, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns);
};

struct Product {
  Operand left, right;
  char* out;           // (left.lanes, right.lanes) fp32 or bf16, columns next to each other
  int64_t out_stride;  // in elements
  bool narrow;         // bf16; then the depth is at most kMaxDepth and nothing is added to
  bool add;
  const Epilogue* epilogue;  // or null; then the depth is at most kMaxDepth
  bool at_once() const { return narrow || epilogue; }
};

// A tile: 16 lanes by 32 of depth. A panel: the tiles of 16 lanes, along the depth.
constexpr int64_t kLane = 16, kDeep = 32, kTile = kLane * kDeep;
// Depth of a packed block; of a product that is rounded as soon as it is summed.
constexpr int64_t kBlockDepth = 2048, kMaxDepth = 4096;
// Rows of a block of A, and its bytes.
constexpr int64_t kHigh = 128, kLeftBytes = 1 << 18;

// What an instruction set brings.
struct Kernels {
  // Lanes [lane, lane + lanes) and [depth, depth + deep) into panels, zeros beyond the operand.
  using Pack = void (*)(const Operand& from, int64_t lane, int64_t lanes, int64_t depth, int64_t deep, char* to);
  // Multiplies panels of A by panels of B (1 or 2 of each, so many bytes apart) over `tiles` of depth; the sums of two
  // column panels are next to each other, those of two row panels sum_stride floats apart. `fresh`: from 0.
  using Micro = void (*)(const char* left, int64_t left_panel, const char* right, int64_t right_panel, int64_t tiles,
                         float* sums, int64_t sum_stride, bool fresh);
  // Rows [row, row + rows) by columns [column, column + columns) of the sums into the result.
  using Write = void (*)(const Product& p, const float* sums, int64_t row, int64_t rows, int64_t column,
                         int64_t columns, bool add);

  Pack pack_left, pack_right;
  Micro micro[2][2];  // [row panels - 1][column panels - 1]
  Write write;
  void (*begin)();  // before and after a thread's calls
  void (*end)();
  int64_t element_bytes;  // of a packed element
  int64_t panel_tiles;    // of depth that a micro-kernel sums up before it stores: its panels fit the first-level cache
  int64_t right_bytes;    // of a packed block of B, at most kRightBytes
  int64_t wide;           // columns of such a block, at most kWide: A is packed again for each
};

// The sums are 16 x 16 blocks.
constexpr int64_t kRightBytes = 1 << 22, kWide = 1024, kSumElements = kWide * kHigh;

inline void nothing() {}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Kept by each thread: fresh pages cost more than their contents here.
struct Scratch {
  std::unique_ptr<char, Free> memory;
  static constexpr int64_t kBytes = kRightBytes + kLeftBytes + 4 * kSumElements;
  bool allocate() {
    if (!memory) memory.reset(static_cast<char*>(std::aligned_alloc(4096, kBytes)));
    return memory != nullptr;
  }
  char* right() const { return memory.get(); }
  char* left() const { return right() + kRightBytes; }
  float* sums() const { return reinterpret_cast<float*>(left() + kLeftBytes); }
};

// Columns that are packed at a time, of a product that is summed at once.
inline int64_t block_columns(const Kernels& kernels, int64_t depth) {
  const int64_t panel = std::max<int64_t>(1, ceil_div(depth, kDeep)) * kTile * kernels.element_bytes;
  return std::min(kernels.right_bytes / panel, kernels.wide / kLane) / 2 * 2 * kLane;
}

inline Shares shares_of(const Product& p, const Kernels& kernels, int64_t threads) {
  const int64_t wide = block_columns(kernels, p.at_once() ? p.left.depth : std::min(p.left.depth, kBlockDepth));
  // What an epilogue takes does not depend on the threads.
  return Shares(p.left.lanes, p.right.lanes, wide, kHigh, p.epilogue ? wide : 2 * kLane, threads);
}

// One thread's part. False: there is no memory for Scratch.
[[nodiscard]] inline bool multiply(const Product& p, const Kernels& kernels, Shares& shares, int64_t thread) {
  thread_local Scratch scratch;
  if (!scratch.allocate()) {
    shares.stop();
    return false;
  }
  kernels.begin();
  const int64_t depth = p.left.depth, block_depth = p.at_once() ? std::max(depth, kDeep) : kBlockDepth;
  const int64_t tile_bytes = kTile * kernels.element_bytes, left_tiles = kLeftBytes / tile_bytes / (kHigh / kLane);
  Shares::Block block;
  Shares::Rows taken;
  while (shares.take_block(thread, &block)) {
    const int64_t column = block.column, columns = block.columns, column_panels = ceil_div(columns, kLane);
    for (int64_t k = block.depth; (k < depth || k == 0) && shares.begin_depth(thread, k); k += block_depth) {
      const int64_t deep = std::min(block_depth, depth - k), tiles = ceil_div(deep, kDeep);
      const int64_t right_panel = tiles * tile_bytes, sum_stride = column_panels * kLane * kLane;
      kernels.pack_right(p.right, column, columns, k, deep, scratch.right());
      while (shares.take_rows(thread, &taken)) {
        const int64_t row = taken.row, rows = taken.rows, row_panels = ceil_div(rows, kLane);
        for (int64_t first = 0; first < tiles || first == 0; first += left_tiles) {
          const int64_t count = std::min(left_tiles, tiles - first), left_panel = count * tile_bytes;
          kernels.pack_left(p.left, row, rows, k + first * kDeep, std::min(count * kDeep, deep - first * kDeep),
                            scratch.left());
          for (int64_t t = 0; t < count || t == 0; t += kernels.panel_tiles) {
            for (int64_t c = 0; c < column_panels; c += 2) {
              for (int64_t r = 0; r < row_panels; r += 2) {
                const Kernels::Micro micro = kernels.micro[r + 1 < row_panels][c + 1 < column_panels];
                micro(scratch.left() + r * left_panel + t * tile_bytes, left_panel,
                      scratch.right() + c * right_panel + (first + t) * tile_bytes, right_panel,
                      std::min(kernels.panel_tiles, count - t), scratch.sums() + r * sum_stride + c * kLane * kLane,
                      sum_stride, first + t == 0);
              }
            }
          }
        }
        if (p.epilogue)
          p.epilogue->run(*p.epilogue, scratch.sums(), row, rows, column, columns);
        else
          kernels.write(p, scratch.sums(), row, rows, column, columns, p.add || k > 0);
      }
    }
  }
  kernels.end();
  return true;
}

}  // namespace gemm
}  // namespace var_kernels
