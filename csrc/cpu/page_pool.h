// Large blocks of memory that are kept for reuse when they are handed back.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <unordered_map>

namespace gossamer {

// A C library returns large blocks to the system at once, which clears their pages anew for each training step; the
// gradient of a layer's weights is such a block every time. With those in use, the pool holds at most as many bytes as were
// in use at one time, and keeps at most an eighth of the machine's memory. Where a size comes back that was returned to make
// room, as in a step that needs different sizes at different times, it learns to hold more: half as much again at most.
class PagePool {
 public:
  static PagePool& instance();

  // Smaller blocks are not worth a huge page.
  static constexpr size_t kLeast = size_t{1} << 20;

  // At least `bytes` bytes on huge pages where the system has them, uninitialised; null when there is no memory.
  void* take(size_t bytes);
  void give_back(void* block);

  // Returns all kept blocks to the system; says how many bytes they were.
  size_t trim(size_t keep = 0);

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  size_t trim_locked(size_t keep);
  size_t return_oldest();

  std::mutex mutex_;
  std::unordered_map<void*, size_t> in_use_;
  std::deque<Block> kept_;  // oldest first
  std::deque<size_t> returned_;  // sizes of the last blocks returned to make room, oldest first
  size_t used_bytes_ = 0, most_used_ = 0, kept_bytes_ = 0;
  size_t learned_ = 0;  // bytes to hold beyond those that were in use at one time
};

}  // namespace gossamer
