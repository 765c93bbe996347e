#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/hash_table.h"
#include "cuda/hash_table.cuh"

namespace gossamer::bindings {

namespace {

cuda::HashKeys hash_keys(const IndexArray& keys, int64_t count) { return {keys.base, keys.stride, keys.wide, count}; }
cuda::HashKeys hash_keys(const PyVector& keys, int64_t count) { return hash_keys(index_array(keys), count); }

void raise_table(const char* error) { raise_cuda("hash table", error); }

}  // namespace

void register_hash_table_cuda(py::module_& m) {
  using hash_table::Table;
  m.def(
      "cuda_hash_table_partitions",
      [](const Table& table, const PyVector& keys, int64_t count, uintptr_t partitions, int device, uintptr_t stream) {
        raise_table(cuda::hash_table_partitions(table, hash_keys(keys, count), pointer<int32_t>(partitions), device,
                                                pointer<void>(stream)));
      },
      "The partition of each key.");
  m.def(
      "cuda_hash_table_find",
      [](const Table& table, const PyVector& keys, int64_t count, uintptr_t slots, int device, uintptr_t stream) {
        raise_table(
            cuda::hash_table_find(table, hash_keys(keys, count), pointer<int64_t>(slots), device, pointer<void>(stream)));
      },
      "The slot of each key, -1 where it is absent.");
  m.def(
      "cuda_hash_table_stamp",
      [](const Table& table, const HashBatchArgs& batch, const hash_table::Results& results, uintptr_t partitions, int device,
         uintptr_t stream) {
        raise_table(cuda::hash_table_stamp(table, hash_keys(batch.keys, batch.count), batch.batch, results,
                                           pointer<int32_t>(partitions), device, pointer<void>(stream)));
      },
      "Serve the keys of a batch that are in the table, where no order matters; the partition of each other key.");
  m.def(
      "cuda_hash_table_insert",
      [](const Table& table, const HashBatchArgs& batch, const hash_table::Results& results, uintptr_t order, uintptr_t begins,
         uintptr_t leaving, bool missing, int device, uintptr_t stream) {
        const cuda::HashBatch all{hash_keys(batch.keys, batch.count),
                                  pointer<const int64_t>(order),
                                  pointer<const int64_t>(begins),
                                  batch.batch,
                                  results,
                                  pointer<int32_t>(leaving)};
        const auto serve = missing ? &cuda::hash_table_missing : &cuda::hash_table_present;
        raise_table(serve(table, all, device, pointer<void>(stream)));
      },
      "Serve the keys of a sorted batch that are in the table or, in a second call, those that were not.");
  m.def(
      "cuda_gather_rows",
      [](uintptr_t table, int64_t row_bytes, uintptr_t slots, int64_t count, uintptr_t out, int device, uintptr_t stream) {
        raise_table(cuda::gather_rows(pointer<const char>(table), row_bytes, pointer<const int64_t>(slots), count,
                                      pointer<char>(out), device, pointer<void>(stream)));
      },
      "out[i] = table[slots[i]], zeros for -1.");
  m.def(
      "cuda_start_rows",
      [](uintptr_t table, int64_t row_bytes, uintptr_t slots, uintptr_t status, int64_t count, uintptr_t rows, int device,
         uintptr_t stream) {
        raise_table(cuda::start_rows(pointer<char>(table), row_bytes, pointer<const int64_t>(slots),
                                     pointer<const uint8_t>(status), count, pointer<const char>(rows), device,
                                     pointer<void>(stream)));
      },
      "table[slots[i]] = rows[i], or zeros for no rows, where position i made its row.");
  m.def(
      "cuda_mark_slots",
      [](uintptr_t array, int64_t item_bytes, int64_t size, uintptr_t slots, int64_t count, int64_t value, int device,
         uintptr_t stream) {
        raise_table(cuda::mark_slots(pointer<void>(array), item_bytes, size, pointer<const int64_t>(slots), count, value,
                                     device, pointer<void>(stream)));
      },
      "array[slots[i]] = value, slots outside skipped, for `size` items of 8 bytes or 1.");
  m.def(
      "cuda_scatter_rows",
      [](uintptr_t table, int64_t row_bytes, uintptr_t slots, uintptr_t order, int64_t count, uintptr_t rows, int device,
         uintptr_t stream) {
        raise_table(cuda::scatter_rows(pointer<char>(table), row_bytes, pointer<const int64_t>(slots),
                                       pointer<const int64_t>(order), count, pointer<const char>(rows), device,
                                       pointer<void>(stream)));
      },
      "table[slots[i]] = rows[order[i]] for the last of each run of equal ascending slots.");
}

}  // namespace gossamer::bindings
