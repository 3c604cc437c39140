// How the threads of a parallel region divide its work. One that is done takes over what another has not begun, and sleeps
// where there is nothing to take, until all are done: they arrive together at the region's end, where OpenMP's threads spin,
// also on a machine whose processors other processes use.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace var_kernels {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Between one look for work and the next.
inline void rest(int64_t looks) {
  if (looks < 32)
    std::this_thread::yield();
  else
    std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// [0, count) in pieces of `grain`.
class Pieces {
 public:
  Pieces(int64_t count, int64_t grain) : count_(count), grain_(grain) {}

  // Runs work(begin, end) on pieces until none is left, then waits for those of other threads.
  template <class Work>
  void run(const Work& work) {
    for (int64_t begin; (begin = next_.fetch_add(grain_)) < count_;) {
      const Piece piece{done_, begin, std::min(begin + grain_, count_)};
      work(piece.begin, piece.end);
    }
    for (int64_t looks = 0; done_ < count_; ++looks) rest(looks);
  }

 private:
  struct Piece {
    std::atomic<int64_t>& done;
    const int64_t begin, end;
    // Nobody waits for one that failed.
    ~Piece() { done += end - begin; }
  };
  const int64_t count_, grain_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// The rows and columns of a product. A thread walks over blocks of columns, in each over blocks of depth, in each over its
// rows. Another takes half of the blocks that it has not begun, or of the rows, from the depth that it has reached.
class Shares {
 public:
  struct Block {
    int64_t column, columns, depth;
  };
  struct Rows {
    int64_t row, rows;
  };

  // Of blocks of `wide` columns, `high` rows at a time. The longer side is split, at multiples of `unit`.
  Shares(int64_t rows, int64_t columns, int64_t wide, int64_t high, int64_t unit, int64_t threads)
      : wide_(wide), high_(high), shares_(threads) {
    const int64_t longer = std::max(rows, columns), step = ceil_div(ceil_div(longer, unit), threads) * unit;
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t first = std::min(t * step, longer), last = std::min(first + step, longer);
      Share& share = shares_[t];
      share.row_end = rows;
      share.column_end = columns;
      (columns >= rows ? share.column : share.row) = first;
      (columns >= rows ? share.column_end : share.row_end) = last;
    }
  }

  // The thread's next block, from this depth on. False: all are done.
  bool take_block(int64_t thread, Block* block) {
    Share& mine = shares_[thread];
    for (int64_t looks = 0;; ++looks) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        working_ -= mine.works;
        mine.works = false;
        if (stopped_) return false;
        if (mine.untouched() || take_over(&mine)) {
          *block = {mine.column, std::min(wide_, mine.column_end - mine.column), mine.depth};
          mine.block = *block;
          mine.column += block->columns;
          mine.next = mine.row;
          mine.depth = 0;
          mine.works = true;
          ++working_;
          return true;
        }
        if (working_ == 0) return false;
      }
      rest(looks);
    }
  }

  // Before the block's rows at a depth. False: others have taken all of them.
  bool begin_depth(int64_t thread, int64_t depth) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Share& mine = shares_[thread];
    mine.block.depth = depth;
    mine.next = mine.row;
    return mine.row < mine.row_end;
  }

  // The block's next rows at this depth. False: there are none.
  bool take_rows(int64_t thread, Rows* taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Share& mine = shares_[thread];
    int64_t high = high_;
    // Of few rows few at a time: the others can be taken over.
    if (shares_.size() > 1) high = std::min(high, std::max(kRows, (mine.row_end - mine.row) / 4 / kRows * kRows));
    *taken = {mine.next, std::min(high, mine.row_end - mine.next)};
    mine.next += taken->rows;
    return taken->rows > 0;
  }

  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }

 private:
  // Rows change hands in multiples of these.
  static constexpr int64_t kRows = 32;

  struct Share {
    int64_t row = 0, row_end = 0;
    int64_t column = 0, column_end = 0;  // of blocks that are not begun
    int64_t depth = 0;                   // where the first of them begins
    Block block{0, 0, 0};                // the one at hand, at this depth
    int64_t next = 0;                    // its first row that is not begun
    bool works = false;
    int64_t untouched() const { return (row_end - row) * (column_end - column); }
    int64_t idle_rows() const { return works ? row_end - next : 0; }
  };

  template <class Size>
  Share* largest(const Size& size) {
    return &*std::max_element(shares_.begin(), shares_.end(),
                              [&](const Share& a, const Share& b) { return size(a) < size(b); });
  }

  bool take_over(Share* mine) {
    Share* from = largest([](const Share& share) { return share.untouched(); });
    if (from->untouched()) {
      const int64_t blocks = ceil_div(from->column_end - from->column, wide_), kept = blocks / 2 * wide_;
      mine->row = from->row;
      mine->row_end = from->row_end;
      mine->depth = kept ? 0 : from->depth;
      mine->column = from->column + kept;
      mine->column_end = from->column_end;
      from->column_end = mine->column;
      return true;
    }
    from = largest([](const Share& share) { return share.idle_rows(); });
    if (from->idle_rows() == 0) return false;
    mine->row = from->next + from->idle_rows() / 2 / kRows * kRows;
    mine->row_end = from->row_end;
    mine->depth = from->block.depth;
    mine->column = from->block.column;
    mine->column_end = from->block.column + from->block.columns;
    from->row_end = mine->row;
    return true;
  }

  const int64_t wide_, high_;
  std::mutex mutex_;
  std::vector<Share> shares_;
  int64_t working_ = 0;
  bool stopped_ = false;
};

}  // namespace var_kernels
