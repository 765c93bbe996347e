// Runs a kernel in a team of threads with shared buffers.
#pragma once

#include "cpu/grouped_matmul.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gossamer {

// Lays out Buffers<P> for `args`, where P is the packed type of its dtype, and calls kernel(args, shared, threads, team) in each
// thread. The team's size depends on the number of `multiplications`.
template <template <class> class Buffers, class Args, class Kernel>
void run_team(const Args& args, double multiplications, int num_threads, Kernel kernel) {
  visit_packed(args.dtype, kernels().pairs, [&](auto tag) {
    const int threads = useful_threads(multiplications, num_threads);
    Arena plan;
    Buffers<typename decltype(tag)::type>(plan, args, threads);
    const Scratch scratch = allocate_scratch(plan.used());
    parallel_team(threads, [&](Team team) { kernel(args, scratch.get(), threads, team); });
  });
}

}  // namespace gossamer
