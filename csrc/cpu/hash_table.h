// The hash table on the host: batches of keys to slots, and rows of its value storage copied by slot.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/gather_reduce.h"
#include "hash_table_core.h"

namespace gossamer {

struct HashFindArgs {
  hash_table::Table table;
  IndexArray keys;
  int64_t* slots;              // of each key, or -1
  bool scores;                 // whether the caller reads or writes the scores of what is found
  const int64_t* beside;       // (slots,) or null: another array that it does so with
  const char* rows = nullptr;  // or null: (slots,) rows of row_bytes that the caller reads next
  int64_t row_bytes = 0;
};

// slots[i] of key i, or -1.
void hash_table_find(const hash_table::Table& table, IndexArray keys, int64_t count, int64_t* slots, int num_threads);

// gather_reduce() of the rows that belong to keys, one for each position of its bags; absent keys contribute nothing. The bags' index
// is `slots`, which is written.
void hash_table_reduce(const hash_table::Table& table, IndexArray keys, int64_t* slots, const GatherArgs& args,
                       int num_threads);

struct HashBatchArgs {
  hash_table::Batch batch;
  IndexArray keys;
  int64_t count;
  int64_t room;    // number of new keys allowed if nothing is evicted
  int64_t* marks;  // (slots,) or null: set to `mark` at the batch's rows
  int64_t mark;
};

struct HashInsertArgs : HashBatchArgs {
  hash_table::Table table;
  hash_table::Results results;
};

struct HashInsertCounts {
  // The number of distinct new keys if it exceeds the room, in which case nothing is inserted; else -1.
  int64_t too_many = -1;
  // Positions.
  int64_t inserted = 0, evicted = 0, refused = 0;
};

// Finds or inserts each key: first the present keys, then the others in the order of the batch. If any key was evicted, victims
// are written, with zeros at positions that evicted none.
HashInsertCounts hash_table_insert(const HashInsertArgs& args, int num_threads);

// out[i] = table[slots[i]], zeros for -1; rows are bytes.
void gather_rows(const char* table, int64_t row_bytes, const int64_t* slots, int64_t count, char* out, int num_threads);

// table[slots[i]] = rows[i], or zeros for null rows, for positions i that created their row.
void start_rows(char* table, int64_t row_bytes, const int64_t* slots, const uint8_t* status, int64_t count, const char* rows,
                int num_threads);

// table[slots[i]] = a row of `dim` values in (-bound, bound) that depend only on keys[i], the column and the seed, as in
// ops/_rounding.py for step 0.
void uniform_rows(void* table, DType dtype, int64_t dim, const int64_t* slots, IndexArray keys, int64_t count, uint64_t seed,
                  double bound, int num_threads);

// array[slots[i]] = value, -1 skipped.
void mark_slots(int64_t* array, const int64_t* slots, int64_t count, int64_t value, int num_threads);
void mark_slots(uint8_t* array, const int64_t* slots, int64_t count, uint8_t value, int num_threads);

// table[slots[i]] = rows[i], skipping -1; of equal slots the last position wins.
void scatter_rows(char* table, int64_t row_bytes, const int64_t* slots, int64_t count, const char* rows, int num_threads);

}  // namespace gossamer
