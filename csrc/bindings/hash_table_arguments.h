// A hash table and a batch of keys as Python passes them.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/arguments.h"
#include "hash_table_core.h"

namespace gossamer::bindings {

// The policy with this name in ops/_hash_table_storage.py; "none" for None.
inline hash_table::Evict evict(std::string_view name) {
  using hash_table::Evict;
  constexpr std::pair<std::string_view, Evict> kPolicies[] = {
      {"none", Evict::kNone},          {"lru", Evict::kLru},    {"lfu", Evict::kLfu}, {"epoch_lru", Evict::kEpochLru},
      {"epoch_lfu", Evict::kEpochLfu}, {"score", Evict::kScore}};
  for (const auto& [known, policy] : kPolicies) {
    if (known == name) return policy;
  }
  throw std::invalid_argument("evict is not a known policy: " + std::string(name));
}

inline hash_table::Batch batch(std::string_view policy, int64_t stamp, uint32_t serial, uintptr_t scores) {
  return {evict(policy), stamp, serial, pointer<const int64_t>(scores)};
}

inline hash_table::Results results(uintptr_t slots, uintptr_t status, uintptr_t victim_keys, uintptr_t victim_scores) {
  return {pointer<int64_t>(slots), pointer<uint8_t>(status), pointer<int64_t>(victim_keys), pointer<int64_t>(victim_scores)};
}

inline void register_hash_table_view(py::module_& m) {
  py::class_<hash_table::Table>(m, "HashTableView", py::module_local(), "The arrays of a hash table.")
      .def(py::init([](uintptr_t digests, uintptr_t keys, uintptr_t scores, uintptr_t buckets, uintptr_t fill, uintptr_t quota,
                       int64_t num_partitions, int64_t partition_buckets) {
        return hash_table::Table{pointer<uint8_t>(digests),
                                 pointer<int64_t>(keys),
                                 pointer<int64_t>(scores),
                                 pointer<hash_table::Bucket>(buckets),
                                 pointer<int32_t>(fill),
                                 pointer<const int32_t>(quota),
                                 num_partitions,
                                 partition_buckets};
      }));
}

}  // namespace gossamer::bindings
