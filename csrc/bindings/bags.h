// The lists of ids as Python hands them over, and the errors in them.
#pragma once

#include "bindings/arguments.h"
#include "cpu/gather_reduce.h"

namespace gossamer::bindings {

// Checks the lists with the lock released, and raises what is wrong with them.
void raise_bad_bags(const Bags& bags, int64_t num_rows, bool check_ids, bool check_weights, int num_threads);

}  // namespace gossamer::bindings
