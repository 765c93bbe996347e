// Large blocks of memory that are kept for reuse when they are handed back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

namespace gossamer {

// A C library returns large blocks to the system at once, which clears their pages anew for each training step; the
// gradient of a layer's weights is such a block every time. The pool keeps at most as many bytes as were in use at one
// time, and at most an eighth of the machine's memory.
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

  std::mutex mutex_;
  std::unordered_map<void*, size_t> in_use_;
  std::deque<Block> kept_;  // oldest first
  size_t used_bytes_ = 0, most_used_ = 0, kept_bytes_ = 0;
};

// Uninitialised memory of a call, from the pool where it is as large as its blocks.
template <class T>
class PooledArray {
 public:
  explicit PooledArray(int64_t count = 0) : pooled_(count * sizeof(T) >= PagePool::kLeast) {
    if (count == 0) return;
    data_ = static_cast<T*>(pooled_ ? PagePool::instance().take(count * sizeof(T)) : std::malloc(count * sizeof(T)));
    if (!data_) throw std::bad_alloc();
  }
  PooledArray(PooledArray&& other) noexcept : pooled_(other.pooled_), data_(std::exchange(other.data_, nullptr)) {}
  PooledArray& operator=(PooledArray&&) = delete;
  ~PooledArray() {
    if (!data_) return;
    if (pooled_) {
      PagePool::instance().give_back(data_);
    } else {
      std::free(data_);
    }
  }

  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* data() { return data_; }

 private:
  bool pooled_;
  T* data_ = nullptr;
};

}  // namespace gossamer
