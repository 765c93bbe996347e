// Scratch memory and huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/recorder.h"

namespace gossamer {

// Hands out aligned pieces of one allocation. A layout is run once with no memory, to learn the size, then again.
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

struct AlignedDelete {
  size_t bytes = 0;

  void operator()(char* p) const {
    note_memory(-static_cast<int64_t>(bytes));
    ::operator delete(p, std::align_val_t{Arena::kAlign});
  }
};
using Scratch = std::unique_ptr<char, AlignedDelete>;

inline Scratch allocate_scratch(size_t bytes) {
  auto* data = static_cast<char*>(::operator new(bytes + Arena::kAlign, std::align_val_t{Arena::kAlign}));
  note_memory(static_cast<int64_t>(bytes));
  return Scratch(data, AlignedDelete{bytes});
}

// Asks for huge pages under a large fresh allocation, so that first touching it takes one fault for 2 MB, not for 4 KB.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace gossamer
