// Large blocks of memory that are kept for reuse when they are handed back.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <unordered_map>

namespace gossamer {

// The C library returns large blocks to the system when they are freed, and the system clears their pages again at the next
// allocation: once per training step for the gradient of a layer's weights. The pool keeps such blocks. Together with the blocks in
// use it holds at most the peak number of bytes that were in use at one time, and it keeps at most an eighth of the machine's
// memory. If a size is requested that was returned to make room, as in steps that need different sizes at different times, the
// pool grows its limit, by half at most.
class PagePool {
 public:
  static PagePool& instance();

  // Smaller blocks are not worth a huge page.
  static constexpr size_t kLeast = size_t{1} << 20;

  // Returns at least `bytes` uninitialised bytes, on huge pages where the system has them; null when memory is exhausted.
  void* take(size_t bytes);
  void give_back(void* block);

  // Returns all kept blocks to the system, and the number of their bytes.
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
  std::deque<Block> kept_;       // oldest first
  std::deque<size_t> returned_;  // sizes of the last blocks returned to make room, oldest first
  size_t used_bytes_ = 0, most_used_ = 0, kept_bytes_ = 0;
  size_t learned_ = 0;  // bytes to hold beyond those that were in use at one time
};

// Moves memory that is in use to huge pages, such as what the C library had kept on small ones.
void collapse_huge_pages(void* data, size_t bytes);

}  // namespace gossamer
