// Scratch memory and huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace gossamer {

// Hands out aligned pieces of one allocation. A layout runs twice: without memory to learn the size, then with it.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

  static constexpr size_t kAlign = 64;

 private:
  char* base_;
  size_t used_ = 0;
};

struct ScratchDelete {
  size_t bytes = 0;

  void operator()(char* p) const;
};
using Scratch = std::unique_ptr<char, ScratchDelete>;

// Uninitialised memory for one call. Large pieces come from the page pool, since fresh pages would be cleared in every call.
Scratch allocate_scratch(size_t bytes);

// Requests huge pages for a large fresh allocation, so that it takes one page fault per 2 MB instead of one per 4 KB.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace gossamer
