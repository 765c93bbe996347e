// The lists of blocks of an expert layer's hidden activation, and the positions of rows in it.
#pragma once

#include <cstdint>

namespace gossamer {

// The matrix has `rows` block rows of bm rows, and `wide` block columns per expert. Expert e, whose sorted rows are offsets[e]
// .. offsets[e+1], has the blocks of its own columns in as many block rows as its rows fill, one expert after the other. Unused
// entries are marked with block row `rows` and block column experts · wide.
struct ExpertTopologyArgs {
  const int32_t* offsets;  // (E+1,)
  int64_t experts, rows, wide, bm;
  // Row by row: (rows+1,) and (rows · wide,) each.
  int32_t *row_offsets, *column_indices, *row_indices;
  // Column by column: (E · wide + 1,) and (rows · wide,) each.
  int32_t *column_offsets, *row_indices_t, *column_indices_t, *order_t;
  // From the longest list to the shortest: (rows,) and (E · wide,).
  int32_t *row_schedule, *column_schedule;
  int32_t* live_rows;       // (rows,), rows of each block row that are not padding
  int32_t* padded_offsets;  // (E+1,), where the rows of each expert begin
};

// Returns false without writing if offsets decrease or the experts' rows need more than `rows` block rows.
bool expert_topology(const ExpertTopologyArgs& args, int num_threads);

struct ExpertPlacesArgs {
  const int32_t *offsets, *padded_offsets;  // (E+1,)
  const int32_t* slots;                     // (num_slots,), the slot of each sorted row
  int64_t experts, num_slots, padded_rows;
  int32_t* slots_of_rows;  // (padded_rows,), num_slots for padding
  int32_t* rows_of_slots;  // (num_slots,), padded_rows for a dropped one
};

// Returns -1, or the first expert whose rows exceed its room in padded_offsets or are outside the dispatch (then nothing is
// written), or -2 for invalid slots.
int64_t expert_places(const ExpertPlacesArgs& args, int num_threads);

}  // namespace gossamer
