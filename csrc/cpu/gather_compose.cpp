#include "cpu/gather_compose.h"

#include "cpu/isa.h"

namespace gossamer {

void gather_compose(const ComposeArgs& args, int num_threads) {
  GatherArgs rows{};
  rows.composed = &args;
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().tables.gather_reduce(rows, first, last); });
}

}  // namespace gossamer
