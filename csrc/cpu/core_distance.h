// How far apart the cores are that a team of threads runs on.
#pragma once

namespace gossamer {

// Seconds that a cache line takes from one thread to its neighbour and back, the mean over a team's pairs of threads, which
// measure at once; the least of a few bursts for each. 0 for fewer than two threads.
double core_distance(int num_threads);

}  // namespace gossamer
