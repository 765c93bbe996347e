#include "cpu/parallel.h"

namespace gossamer {

void Team::barrier() const {
  if (size > 1) {
#pragma omp barrier
  }
}

}  // namespace gossamer
