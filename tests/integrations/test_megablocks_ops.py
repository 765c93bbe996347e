"""Operators of code written against MegaBlocks, by hand and against loops."""

import pytest
import torch
from helpers import check, randn

from gossamer.integrations.megablocks import ops
from gossamer.testing import random_expert_ids

T, H, E, K = 30, 24, 5, 2


class TestOps:
    def test_topology_by_hand(self, device):
        """Three experts with 5, 0 and 2 rows, blocks of 4 rows, two block columns an expert."""
        counts = torch.tensor([5, 0, 2], dtype=torch.int32, device=device)
        padded = ops.round_up(counts, 4)
        assert padded.tolist() == [8, 0, 4]
        padded_bins = ops.inclusive_cumsum(padded, 0)
        assert padded_bins.tolist() == [8, 8, 12] and padded_bins.dtype == torch.int32
        assert ops.exclusive_cumsum(padded, 0).tolist() == [0, 8, 8]
        columns = ops.topology(padded_bins, 4, 3, 2)
        assert columns.tolist() == [0, 1, 0, 1, 4, 5]
        _, order = ops.sort(columns, 3)
        assert order.tolist() == [0, 2, 1, 3, 4, 5]
        rows = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
        assert rows[order.long()].tolist() == [0, 1, 0, 1, 2, 2]
        assert ops.inclusive_cumsum(ops.histogram(columns, 6), 0).tolist() == [2, 4, 4, 4, 5, 6]

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
    @pytest.mark.parametrize("end_bit", [None, 3, 14])
    def test_sort(self, device, dtype, end_bit):
        x = torch.randint(8, (100,), generator=torch.Generator().manual_seed(0)).to(device, dtype)
        values, order = ops.sort(x, end_bit)
        expected, at = torch.sort(x, stable=True)
        assert torch.equal(values, expected) and torch.equal(order.long(), at) and order.dtype == dtype
        # Higher bits are not looked at, but are kept.
        values, order = ops.sort(torch.tensor([8, 1, 16], device=device, dtype=dtype), 3)
        assert values.tolist() == [8, 16, 1] and order.tolist() == [0, 2, 1]

    def test_counts_and_copies(self, device):
        x = torch.tensor([[2, 0, 2, 9], [1, 1, -1, 1]], device=device)
        assert ops.histogram(x, 3).tolist() == [[1, 0, 2], [0, 3, 0]]
        assert ops.histogram(x[0], 3).tolist() == [1, 0, 2] and ops.histogram(x, 3).dtype == torch.int32
        assert ops.inclusive_cumsum(x, 1).tolist() == [[2, 2, 4, 13], [1, 2, 1, 2]]
        bins = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
        ids = torch.tensor([[7, 8, 9]], dtype=torch.int32, device=device)
        assert ops.replicate(ids, bins, 6).tolist() == [[7, 7, 9, 9, 9, 0]]
        values = randn(2, 3, device=device).requires_grad_()
        out = ops.replicate(values, bins, 6)
        assert torch.equal(out, values[:, [0, 0, 2, 2, 2, 2]] * torch.tensor([1.0] * 5 + [0.0], device=device))
        out.backward(torch.arange(12.0, device=device).view(2, 6))
        assert values.grad.tolist() == [[1.0, 0.0, 9.0], [13.0, 0.0, 27.0]]
        assert ops.repeat(x, (2, 1)).shape == (4, 4) and ops.repeat(x, (1, 1)) is x
        assert ops.sum(x).tolist() == [3, 1, 1, 10] and ops.sum(x[:1]).tolist() == x[0].tolist()

    def routed(self, device, skew="zipf"):
        ids = random_expert_ids(T, E, K, skew=skew, device=device).int().flatten()
        bin_ids, indices = ops.sort(ids, 3)
        counts = ops.histogram(ids, E)
        bins = ops.inclusive_cumsum(counts, 0)
        return ids, indices, bin_ids, bins, ops.inclusive_cumsum(ops.round_up(counts, 8), 0)

    @pytest.mark.parametrize("skew", ["zipf", "few"])
    def test_padded_rows(self, device, skew):
        """Gathering pads each expert with zeros to multiples of 8, scattering undoes it; both with gradients."""
        ids, indices, bin_ids, bins, padded_bins = self.routed(device, skew)
        starts = [0, *padded_bins.tolist()]

        def gathered(x):
            out, ranks = [x.new_zeros(H)] * starts[-1], [0] * E
            for slot, e in enumerate(ids.tolist()):
                out[starts[e] + ranks[e]] = x[slot // K]
                ranks[e] += 1
            return torch.stack(out)

        def scattered(x, weights):
            out, ranks = [], [0] * E
            for slot, e in enumerate(ids.tolist()):
                out.append(x[starts[e] + ranks[e]] * weights[slot])
                ranks[e] += 1
            return torch.stack(out).view(T, K, H).sum(1)

        x = {"x": randn(T, H, device=device)}
        check(lambda x: ops.padded_gather(x, indices, bin_ids, bins, padded_bins, K), gathered, x)
        given = {"x": randn(starts[-1], H, device=device), "weights": randn(T * K, seed=1, device=device)}
        check(
            lambda x, weights: ops.padded_scatter(x, indices, bin_ids, weights, bins, padded_bins, K), scattered, given
        )
        check(
            lambda x: ops.padded_scatter(x, indices, bin_ids, None, bins, padded_bins, K),
            lambda x: scattered(x, [1.0] * T * K),
            {"x": given["x"]},
        )
        room = ops.padded_gather(x["x"], indices, bin_ids, bins, padded_bins, K, output_rows=200)
        assert torch.equal(room[: starts[-1]], gathered(x["x"])) and not room[starts[-1] :].any()

    def test_rows_without_padding(self, device):
        _, indices, bin_ids, bins, _ = self.routed(device)
        slots = indices.long()
        check(
            lambda x: ops.gather(x, indices, bin_ids, bins, K),
            lambda x: x[slots // K],
            {"x": randn(T, H, device=device)},
        )
        check(
            lambda x, weights: ops.scatter(x, indices, bin_ids, weights, bins, K),
            lambda x, weights: (x[slots.argsort()] * weights.unsqueeze(1)).view(T, K, H).sum(1),
            {"x": randn(T * K, H, device=device), "weights": randn(T * K, seed=1, device=device)},
        )

    @pytest.mark.parametrize("size", [4, 40])
    def test_bins(self, device, size):
        """An expert's first rows are in its bin, the rest is lost both ways."""
        ids, indices, _, bins, _ = self.routed(device)
        places = []
        for slot, e in enumerate(ids.tolist()):
            rank = int((ids[:slot] == e).sum())
            places.append((e, rank) if rank < size else None)

        def gathered(x):
            rows = {place: x[slot // K] for slot, place in enumerate(places) if place}
            zero = x.new_zeros(H)
            return torch.stack([torch.stack([rows.get((e, i), zero) for i in range(size)]) for e in range(E)])

        def scattered(x, weights):
            rows = [x[p] * weights[slot] if p else x.new_zeros(H) for slot, p in enumerate(places)]
            return torch.stack(rows).view(T, K, H).sum(1)

        assert (None in places) == (size == 4)
        check(lambda x: ops.binned_gather(x, indices, bins, size, K), gathered, {"x": randn(T, H, device=device)})
        given = {"x": randn(E, size, H, device=device), "weights": randn(T * K, seed=1, device=device)}
        check(lambda x, weights: ops.binned_scatter(x, indices, weights, bins, K), scattered, given)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda r: ops.sort(torch.zeros(3)), TypeError, "x must be int16, int32 or int64, got torch.float32"),
            (
                lambda r: ops.sort(torch.zeros(40000, dtype=torch.int16)),
                ValueError,
                "x must have at most 32767 elements",
            ),
            (lambda r: ops.histogram(r[0], 0), ValueError, "max_val at least 1"),
            (lambda r: ops.round_up(r[0].long(), 4), TypeError, "x must be int32"),
            (
                lambda r: ops.gather(torch.zeros(3, H), *r[1:4], K),
                ValueError,
                r"x must have shape \(T, D\) = \(30, any\)",
            ),
            (lambda r: ops.gather(torch.zeros(T, H), *r[1:4], 7), ValueError, "top_k must be an int that divides"),
            (
                lambda r: ops.scatter(torch.zeros(T * K, H), *r[1:3], torch.zeros(3), r[3], K),
                ValueError,
                r"weights must have shape \(R,\) = \(60\)",
            ),
        ],
    )
    def test_bad_arguments(self, call, error, message):
        with pytest.raises(error, match=message):
            call(self.routed("cpu"))
