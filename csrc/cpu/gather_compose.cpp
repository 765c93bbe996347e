#include "cpu/gather_compose.h"

#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gossamer {

void gather_compose(const ComposeArgs& args, int num_threads) {
  GatherArgs rows{};
  rows.composed = &args;
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().tables.gather_reduce(rows, first, last); });
}

namespace {

// Elements that a piece adds up, and most pieces: their sums are added up again.
constexpr int64_t kPieceElements = int64_t{1} << 18, kMostPieces = 32;

template <class S>
void sum_pieces(const ComposeArgs& args, const FloatMatrix& dout, S* out, int32_t* rows, int num_threads) {
  const Bags& bags = args.bags;
  const int64_t cost = bag_cost(bags, bags.num_bags), columns = args.parts.columns, size = args.num_rows * columns;
  const int64_t pieces = std::clamp<int64_t>(cost * args.parts.maps.count * columns / kPieceElements, 1, kMostPieces);
  const Scratch sums = allocate_scratch(pieces * size * sizeof(S)), touched = allocate_scratch(pieces * args.num_rows);
  S* const all = reinterpret_cast<S*>(sums.get());
  auto* const flags = reinterpret_cast<uint8_t*>(touched.get());
  const auto bag_of = [&](int64_t piece) { return bag_at(bags, cost * piece / pieces); };
  std::vector<std::atomic<int64_t>> taken(num_threads * WorkQueue::kStride);
  parallel_team(static_cast<int>(std::min<int64_t>(num_threads, pieces)), [&](Team team) {
    WorkQueue queue(taken.data());
    queue.restart(team);
    team.barrier();
    queue.each(team, pieces, 1, [&](int64_t piece, int64_t) {
      const RowSums own{dout, all + piece * size, flags + piece * args.num_rows};
      std::fill_n(all + piece * size, size, S{0});
      std::fill_n(own.touched, args.num_rows, uint8_t{0});
      ComposeArgs part = args;
      part.row_sums = &own;
      GatherArgs rows_of{};
      rows_of.composed = &part;
      kernels().tables.gather_reduce(rows_of, bag_of(piece), bag_of(piece + 1));
    });
    team.barrier();
    const auto [begin, end] = team.share(args.num_rows);
    std::copy(all + begin * columns, all + end * columns, out + begin * columns);
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const S* from = all + piece * size;
      for (int64_t i = begin * columns; i < end * columns; ++i) out[i] += from[i];
    }
    for (int64_t row = begin; row < end; ++row) {
      uint8_t any = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) any |= flags[piece * args.num_rows + row];
      rows[row] = any ? static_cast<int32_t>(row) : -1;
    }
  });
}

}  // namespace

void sum_row_gradients(const ComposeArgs& args, const FloatMatrix& dout, void* sums, int32_t* rows, int num_threads) {
  if (dout.dtype == DType::kFloat64) {
    sum_pieces(args, dout, static_cast<double*>(sums), rows, num_threads);
  } else {
    sum_pieces(args, dout, static_cast<float*>(sums), rows, num_threads);
  }
}

}  // namespace gossamer
