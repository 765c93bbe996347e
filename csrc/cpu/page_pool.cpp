#include "cpu/page_pool.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "cpu/memory.h"
#include "cpu/recorder.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace gossamer {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Number of returned blocks whose sizes are remembered, more than a training step of a few layers makes.
constexpr size_t kRemembered = 64;

size_t most_to_keep() {
#if defined(__linux__)
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  if (pages > 0 && size > 0) return static_cast<size_t>(pages) / 8 * static_cast<size_t>(size);
#endif
  return size_t{1} << 30;
}

}  // namespace

PagePool& PagePool::instance() {
  // Never destroyed: tensors may outlive every static object.
  static PagePool& pool = *new PagePool;
  return pool;
}

void* PagePool::take(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::lock_guard lock(mutex_);
  void* data = nullptr;
  // The most recent block of exactly this size: a model's layers request the same few sizes repeatedly.
  const auto found = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& b) { return b.bytes == bytes; });
  if (found != kept_.rend()) {
    data = found->data;
    kept_bytes_ -= bytes;
    kept_.erase(std::next(found).base());
  } else {
    data = std::aligned_alloc(kHugePage, bytes);
    if (!data && trim_locked(0)) data = std::aligned_alloc(kHugePage, bytes);
    if (!data) return nullptr;
    const auto known = std::find(returned_.begin(), returned_.end(), bytes);
    if (known != returned_.end()) {
      returned_.erase(known);
      learned_ += bytes;
    }
    advise_huge_pages(data, bytes);
  }
  in_use_.emplace(data, bytes);
  used_bytes_ += bytes;
  most_used_ = std::max(most_used_, used_bytes_);
  note_memory(static_cast<int64_t>(bytes));
  return data;
}

void PagePool::give_back(void* block) {
  const std::lock_guard lock(mutex_);
  const auto found = in_use_.find(block);
  kept_.push_back({block, found->second});
  note_memory(-static_cast<int64_t>(found->second));
  used_bytes_ -= found->second;
  kept_bytes_ += found->second;
  in_use_.erase(found);
  learned_ = std::min(learned_, most_used_ / 2);
  const size_t keep = std::min(most_used_ + learned_ - used_bytes_, most_to_keep());
  while (kept_bytes_ > keep) returned_.push_back(return_oldest());
  while (returned_.size() > kRemembered) returned_.pop_front();
}

size_t PagePool::trim(size_t keep) {
  const std::lock_guard lock(mutex_);
  most_used_ = used_bytes_;
  const size_t freed = trim_locked(keep);
  learned_ = 0;
  returned_.clear();
  return freed;
}

size_t PagePool::trim_locked(size_t keep) {
  size_t freed = 0;
  while (kept_bytes_ > keep) freed += return_oldest();
  return freed;
}

size_t PagePool::return_oldest() {
  const Block oldest = kept_.front();
  kept_.pop_front();
  std::free(oldest.data);
  kept_bytes_ -= oldest.bytes;
  return oldest.bytes;
}

}  // namespace gossamer
