#include "cpu/memory.h"

#include <new>

#include "cpu/page_pool.h"
#include "cpu/recorder.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gossamer {

void ScratchDelete::operator()(char* p) const {
  if (bytes >= PagePool::kLeast) return PagePool::instance().give_back(p);
  note_memory(-static_cast<int64_t>(bytes));
  ::operator delete(p, std::align_val_t{Arena::kAlign});
}

Scratch allocate_scratch(size_t bytes) {
  if (bytes >= PagePool::kLeast) {
    auto* data = static_cast<char*>(PagePool::instance().take(bytes + Arena::kAlign));
    if (!data) throw std::bad_alloc();
    return Scratch(data, ScratchDelete{bytes});
  }
  auto* data = static_cast<char*>(::operator new(bytes + Arena::kAlign, std::align_val_t{Arena::kAlign}));
  note_memory(static_cast<int64_t>(bytes));
  return Scratch(data, ScratchDelete{bytes});
}

namespace {

// Gives the kernel advice about the whole huge pages of a range. Only advice: if the kernel refuses, small pages work too.
void advise([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes, [[maybe_unused]] int advice) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#endif
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  advise(data, bytes, MADV_HUGEPAGE);
#endif
}

void collapse_huge_pages(void* data, size_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which many headers lack
  advise(data, bytes, kCollapse);
}

}  // namespace gossamer
