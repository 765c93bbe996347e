#include "bindings/arguments.h"
#include "bindings/hash_table_arguments.h"
#include "bindings/register.h"
#include "cpu/hash_table.h"

namespace gossamer::bindings {

void register_hash_table(py::module_& m) {
  using hash_table::Table;
  register_hash_table_view(m);
  m.def(
      "hash_table_find",
      [](const Table& table, const PyVector& keys, int64_t count, uintptr_t slots, int num_threads) {
        const IndexArray array = index_array(keys);
        py::gil_scoped_release release;
        hash_table_find(table, array, count, pointer<int64_t>(slots), num_threads);
      },
      "The slot of each key, -1 where it is absent.");
  m.def(
      "hash_table_insert",
      [](const Table& table, const PyVector& keys, int64_t count, std::string_view policy, int64_t stamp, uint32_t serial,
         uintptr_t scores, int64_t room, uintptr_t marks, int64_t mark, uintptr_t slots, uintptr_t status,
         uintptr_t victim_keys, uintptr_t victim_scores, int num_threads) {
        const HashInsertArgs args{table,
                                  batch(policy, stamp, serial, scores),
                                  results(slots, status, victim_keys, victim_scores),
                                  index_array(keys),
                                  count,
                                  room,
                                  pointer<int64_t>(marks),
                                  mark};
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
