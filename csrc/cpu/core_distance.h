// How far apart the cores are that a team of threads runs on.
#pragma once

namespace gossamer {

// Seconds that a cache line takes from one thread to the next and back, the mean over neighbours in a team; the least of a
// few bursts for each pair. 0 for fewer than two threads.
double core_distance(int num_threads);

}  // namespace gossamer
