// The distance between the cores that a team of threads runs on.
#pragma once

namespace gossamer {

// Returns the seconds that a cache line takes from one thread to its neighbour and back: the least of a few bursts for each pair of
// threads, averaged over the pairs, which measure concurrently. 0 for fewer than two threads.
double core_distance(int num_threads);

}  // namespace gossamer
