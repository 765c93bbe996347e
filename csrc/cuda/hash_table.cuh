// The hash table on a GPU. Calls queue work on a stream and return null, or a CUDA error's text.
#pragma once

#include <cstdint>

#include "hash_table_core.h"

namespace gossamer::cuda {

struct HashKeys {
  const void* base;
  int64_t stride;
  bool wide;
  int64_t count;
};

// A batch sorted by partition, in order within one: `order` holds positions, partition p those from begins[p] on.
struct HashBatch {
  HashKeys keys;
  const int64_t* order;
  const int64_t* begins;
  hash_table::Batch batch;
  hash_table::Results results;
  int32_t* leaving;  // number of positions that could not be served within their partition
};

// partitions[i] of key i.
const char* hash_table_partitions(const hash_table::Table& table, const HashKeys& keys, int32_t* partitions, int device,
                                  void* stream);
// slots[i] of key i, or -1.
const char* hash_table_find(const hash_table::Table& table, const HashKeys& keys, int64_t* slots, int device, void* stream);
// For the recency policies and without eviction, where the order of touches does not matter: serves the keys that are in the table.
// partitions[i] is the number of partitions for these, and the partition of each other key, whose status is kRefused.
const char* hash_table_stamp(const hash_table::Table& table, const HashKeys& keys, const hash_table::Batch& batch,
                             const hash_table::Results& results, int32_t* partitions, int device, void* stream);
// Processes the keys that are in the table; afterwards the others have status kRefused.
const char* hash_table_present(const hash_table::Table& table, const HashBatch& batch, int device, void* stream);
// Processes the other keys, one warp per partition, and then those whose search leaves its partition.
const char* hash_table_missing(const hash_table::Table& table, const HashBatch& batch, int device, void* stream);
// out[i] = table[slots[i]], zeros for -1; rows are bytes.
const char* gather_rows(const char* table, int64_t row_bytes, const int64_t* slots, int64_t count, char* out, int device,
                        void* stream);
// table[slots[i]] = rows[i], or zeros for null rows, for positions i that created their row.
const char* start_rows(char* table, int64_t row_bytes, const int64_t* slots, const uint8_t* status, int64_t count,
                       const char* rows, int device, void* stream);
// array[slots[i]] = value for `size` items of 8 bytes or 1; slots outside skipped.
const char* mark_slots(void* array, int64_t item_bytes, int64_t size, const int64_t* slots, int64_t count, int64_t value,
                       int device, void* stream);
// table[slots[i]] = rows[order[i]] for the last i of each run of equal ascending slots; -1 skipped.
const char* scatter_rows(char* table, int64_t row_bytes, const int64_t* slots, const int64_t* order, int64_t count,
                         const char* rows, int device, void* stream);

}  // namespace gossamer::cuda
