#include "cpu/hash_table.h"

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/bags.h"
#include "bindings/register.h"

namespace gossamer::bindings {

namespace {

// The policy with this name in ops/_hash_table_storage.py; "none" for None.
hash_table::Evict evict(std::string_view name) {
  using hash_table::Evict;
  constexpr std::pair<std::string_view, Evict> kPolicies[] = {
      {"none", Evict::kNone},          {"lru", Evict::kLru},    {"lfu", Evict::kLfu}, {"epoch_lru", Evict::kEpochLru},
      {"epoch_lfu", Evict::kEpochLfu}, {"score", Evict::kScore}};
  for (const auto& [known, policy] : kPolicies) {
    if (known == name) return policy;
  }
  throw std::invalid_argument("evict is not a known policy: " + std::string(name));
}

void register_structs(py::module_& m) {
  py::class_<hash_table::Table>(m, "HashTableView", "The arrays of a hash table.")
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
  py::class_<HashBatchArgs>(m, "HashBatch", "Keys to find or insert, and how scores are set.")
      .def(py::init([](const PyVector& keys, int64_t count, uintptr_t scores, std::string_view policy, int64_t stamp,
                       uint32_t serial, int64_t room, uintptr_t marks, int64_t mark) {
        return HashBatchArgs{.batch = {evict(policy), stamp, serial, pointer<const int64_t>(scores)},
                             .keys = index_array(keys),
                             .count = count,
                             .room = room,
                             .marks = pointer<int64_t>(marks),
                             .mark = mark};
      }));
  py::class_<hash_table::Results>(m, "HashResults", "Where the report of a batch goes.")
      .def(py::init([](uintptr_t slots, uintptr_t status, uintptr_t victim_keys, uintptr_t victim_scores) {
        return hash_table::Results{pointer<int64_t>(slots), pointer<uint8_t>(status), pointer<int64_t>(victim_keys),
                                   pointer<int64_t>(victim_scores)};
      }));
}

}  // namespace

void register_hash_table(py::module_& m) {
  using hash_table::Table;
  register_structs(m);
  m.def(
      "hash_table_find",
      [](const Table& table, const PyVector& keys, int64_t count, uintptr_t slots, int num_threads) {
        const IndexArray array = index_array(keys);
        py::gil_scoped_release release;
        hash_table_find(table, array, count, pointer<int64_t>(slots), num_threads);
      },
      "The slot of each key, -1 where it is absent.");
  m.def(
      "hash_table_reduce",
      [](const Table& table, const PyVector& keys, const PyMatrix& values, int64_t num_rows, int64_t dim, const Bags& bags,
         uintptr_t slots, const PyMatrix& out, int num_threads) {
        raise_bad_bags(bags, num_rows, false, false, num_threads);
        const GatherArgs args{.table = matrix(values),
                              .num_rows = num_rows,
                              .dim = dim,
                              .scales = {},
                              .bags = bags,
                              .out = matrix(out),
                              .suspect = nullptr};
        const IndexArray array = index_array(keys);
        py::gil_scoped_release release;
        hash_table_reduce(table, array, pointer<int64_t>(slots), args, num_threads);
      },
      "out[b] = sum or mean over the present keys of bag b of weight · values[slot]; slots, the bags' index, are written.");
  m.def(
      "hash_table_insert",
      [](const Table& table, const HashBatchArgs& batch, const hash_table::Results& results, int num_threads) {
        const HashInsertArgs args{batch, table, results};
        HashInsertCounts counts;
        {
          py::gil_scoped_release release;
          counts = hash_table_insert(args, num_threads);
        }
        return std::make_tuple(counts.too_many, counts.inserted, counts.evicted, counts.refused);
      },
      "Find or insert each key; returns -1, or how many new keys there are when that is more than there is room for, and "
      "how many positions inserted, evicted and were refused.");
  m.def(
      "gather_rows",
      [](uintptr_t table, int64_t row_bytes, uintptr_t slots, int64_t count, uintptr_t out, int num_threads) {
        py::gil_scoped_release release;
        gather_rows(pointer<const char>(table), row_bytes, pointer<const int64_t>(slots), count, pointer<char>(out),
                    num_threads);
      },
      "out[i] = table[slots[i]], zeros for -1.");
  m.def(
      "start_rows",
      [](uintptr_t table, int64_t row_bytes, uintptr_t slots, uintptr_t status, int64_t count, uintptr_t rows,
         int num_threads) {
        py::gil_scoped_release release;
        start_rows(pointer<char>(table), row_bytes, pointer<const int64_t>(slots), pointer<const uint8_t>(status), count,
                   pointer<const char>(rows), num_threads);
      },
      "table[slots[i]] = rows[i], or zeros for no rows, where position i made its row.");
  m.def(
      "uniform_rows",
      [](uintptr_t table, int dtype, int64_t dim, uintptr_t slots, const PyVector& keys, int64_t count, uint64_t seed,
         double bound, int num_threads) {
        const IndexArray array = index_array(keys);
        py::gil_scoped_release release;
        uniform_rows(pointer<void>(table), static_cast<DType>(dtype), dim, pointer<const int64_t>(slots), array, count, seed,
                     bound, num_threads);
      },
      "table[slots[i]] = values in (-bound, bound) that follow from key, column and seed.");
  m.def(
      "mark_slots",
      [](uintptr_t array, int64_t item_bytes, uintptr_t slots, int64_t count, int64_t value, int num_threads) {
        py::gil_scoped_release release;
        if (item_bytes == 8) {
          mark_slots(pointer<int64_t>(array), pointer<const int64_t>(slots), count, value, num_threads);
        } else {
          mark_slots(pointer<uint8_t>(array), pointer<const int64_t>(slots), count, static_cast<uint8_t>(value), num_threads);
        }
      },
      "array[slots[i]] = value, -1 skipped, for items of 8 bytes or 1.");
  m.def(
      "scatter_rows",
      [](uintptr_t table, int64_t row_bytes, uintptr_t slots, int64_t count, uintptr_t rows, int num_threads) {
        py::gil_scoped_release release;
        scatter_rows(pointer<char>(table), row_bytes, pointer<const int64_t>(slots), count, pointer<const char>(rows),
                     num_threads);
      },
      "table[slots[i]] = rows[i], -1 skipped, the last of equal slots.");
}

}  // namespace gossamer::bindings
