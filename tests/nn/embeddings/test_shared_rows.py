"""Tables whose ids share rows: hashes, complementary partitions, frequent ids and clusters."""

import functools
import math

import pytest
import torch
from contracts import TrainedTableContract, assert_gradients, assert_near, functional, parameters

import gossamer
from gossamer.nn import (
    ClusteredEmbedding,
    CompositionalEmbedding,
    DoubleHashEmbedding,
    EmbeddingBag,
    FrequencyEmbedding,
    HashEmbedding,
)


def case(kind, more=lambda n: {}):
    """A case of the contract with the arguments ``more(N)``, which its ``from_budget`` is given too but for sizes."""

    def make(num_embeddings, embedding_dim, **options):
        return kind(num_embeddings, embedding_dim, **more(num_embeddings) | options)

    def from_budget(num_embeddings, embedding_dim, nbytes, **options):
        given = {k: v for k, v in more(num_embeddings).items() if k not in ("num_rows", "moduli", "own")}
        return kind.from_budget(num_embeddings, embedding_dim, nbytes, **given | options)

    make.from_budget = from_budget
    return make


def frequencies(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(2))


def clusters(n):
    return torch.randint(0, max(n // 4, 1), (n,), generator=torch.Generator().manual_seed(3))


class TestHashed(
    TrainedTableContract.over(
        {
            "hash": case(HashEmbedding, lambda n: {"num_rows": -(-n // 3)}),
            "double hash": case(DoubleHashEmbedding, lambda n: {"num_rows": -(-n // 3), "mode": "mean"}),
        }
    )
):
    any_ids = True


COMPOSED = {
    "quotient and remainder": {},
    "summed": {"operation": "add"},
    "joined": {"operation": "concat", "mode": "mean", "include_last_offset": True},
    "mixed radix": {"partition": "mixed_radix"},
    "chinese remainder": {"partition": "chinese_remainder", "operation": "add"},
}

TestComposed = TrainedTableContract.over(
    {name: case(CompositionalEmbedding, lambda n, how=how: how) for name, how in COMPOSED.items()}
)

TestRemapped = TrainedTableContract.over(
    {
        "frequency": case(FrequencyEmbedding, lambda n: {"num_rows": -(-n // 2), "frequencies": frequencies(n)}),
        "clusters": case(ClusteredEmbedding, lambda n: {"clusters": clusters(n)}),
        "clusters and a hash": case(ClusteredEmbedding, lambda n: {"clusters": clusters(n), "double": True}),
    }
)


def test_hash_is_the_dense_table_below_its_rows(device):
    """For x < M the remainder is x itself."""
    table = HashEmbedding(50, 4, 50, device=device)
    bag = EmbeddingBag(50, 4, mode="sum", _weight=table.weight.detach().clone(), device=device)
    ids, offsets = torch.tensor([3, 49, 3, 0], device=device), torch.tensor([0, 1, 1], device=device)
    assert torch.equal(table(ids, offsets), bag(ids, offsets))
    assert torch.equal(table.lookup(ids + 50 * 10**12), table.lookup(ids))


@pytest.mark.parametrize("kind", [HashEmbedding, DoubleHashEmbedding])
def test_every_id_counts_in_a_mean(kind, device):
    """−1 too, which is not padding."""
    table = kind(10, 4, num_rows=3, mode="mean", device=device)
    ids, offsets = torch.tensor([0, -1, -1, 5, -1], device=device), torch.tensor([0, 3], device=device)
    with torch.no_grad():
        rows = table.lookup(ids).double()
        found = table(ids, offsets)
    torch.testing.assert_close(found.double(), torch.stack([rows[:3].mean(0), rows[3:].mean(0)]), rtol=1e-6, atol=0)


def test_hashes_spread_ids():
    """Universal hashes fill rows as random ones would: (1 − 1/M)^N of them stay empty."""
    n = m = 20_000
    table = DoubleHashEmbedding(n, 1, m, seed=4)
    filled = torch.stack([(h.bincount(minlength=m) > 0).double().mean() for h in table.addresses(torch.arange(n)).T])
    expected = 1 - (1 - 1 / m) ** n
    assert bool(((filled - expected).abs() < 5 * (expected * (1 - expected) / m) ** 0.5).all())
    apart = table.addresses(torch.arange(n)).long() @ torch.tensor([m, 1])
    assert len(apart.unique()) >= n - 10


def test_one_row_twice_gets_twice_the_gradient():
    """Where both hashes of an id meet, and of an id that is twice in a bag."""
    table = DoubleHashEmbedding(10, 3, 1, dtype=torch.float64)
    table(torch.tensor([[4, 4]])).sum().backward()
    assert torch.equal(table.weight.grad, torch.full((1, 3), 4.0, dtype=torch.float64))
    fused = DoubleHashEmbedding(10, 3, 1, optimizer=gossamer.optim.Adagrad(lr=1.0, eps=0.0))
    before = fused.weight.clone()
    fused(torch.tensor([[4, 4]])).sum().backward()
    # One step on the summed gradient, which Adagrad's first makes one of 1.
    assert_near(fused.weight, before - 1)


@pytest.mark.parametrize("kind", [DoubleHashEmbedding, functools.partial(ClusteredEmbedding, double=True)])
def test_the_state_holds_the_hashes(kind):
    sizes = (40, 4, torch.arange(40) % 8) if isinstance(kind, functools.partial) else (40, 4, 8)
    first, second = kind(*sizes, seed=1), kind(*sizes, seed=2)
    ids = torch.arange(40)
    second.weight.data.copy_(first.weight)
    assert not torch.equal(first.lookup(ids), second.lookup(ids))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.lookup(ids), second.lookup(ids))
    with torch.device("meta"):
        empty = kind(*sizes, seed=1)
    empty.to_empty(device="cpu").reset_parameters()
    assert int(empty.seed) == 1
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\), got -1"):
        kind(*sizes, seed=-1)


def test_quotients_and_remainders():
    """Ten ids in parts of 4 and 3: (remainder, quotient) as by hand, and the product of both rows."""
    table = CompositionalEmbedding(10, 2, [4, 3])
    pairs = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2)]
    assert (table.addresses(torch.arange(10)) - torch.tensor([0, 4])).tolist() == [list(pair) for pair in pairs]
    expected = torch.stack([table.weight[r] * table.weight[4 + q] for r, q in pairs])
    assert torch.equal(table.lookup(torch.arange(10)), expected)
    joined = CompositionalEmbedding(10, 4, [4, 3], operation="concat")
    expected = torch.stack([torch.cat([joined.weight[r], joined.weight[4 + q]]) for r, q in pairs])
    assert torch.equal(joined.lookup(torch.arange(10)), expected)


def test_digits_and_remainders():
    radix = CompositionalEmbedding(12, 2, [3, 2, 2], partition="mixed_radix")
    digits = radix.addresses(torch.arange(12)) - torch.tensor([0, 3, 5])
    assert digits[7].tolist() == [1, 0, 1] and len(digits.unique(dim=0)) == 12
    chinese = CompositionalEmbedding(15, 2, [3, 5], partition="chinese_remainder")
    remainders = chinese.addresses(torch.arange(15)) - torch.tensor([0, 3])
    assert remainders[7].tolist() == [1, 2] and len(remainders.unique(dim=0)) == 15


@pytest.mark.parametrize("n", [1, 2, 10, 97, 1000])
@pytest.mark.parametrize("how", COMPOSED.values(), ids=COMPOSED)
def test_all_ids_are_told_apart(n, how):
    table = CompositionalEmbedding(n, 4, **{k: v for k, v in how.items() if k != "mode"})
    assert len(table.addresses(torch.arange(n)).unique(dim=0)) == n
    assert len(table.lookup(torch.arange(n)).unique(dim=0)) == n


class TestPath:
    """Networks a class over rows, trained as ordinary parameters beside a fused step of the rows."""

    def make(self, **options):
        return CompositionalEmbedding(30, 4, [10, 3], partition="path", path_width=5, **options)

    def test_formula(self):
        table = self.make(dtype=torch.float64)
        ids = torch.tensor([[0, 29], [13, 13]])
        for place in ids.reshape(-1).unique():
            row, c, p = table.weight[place % 10], int(place) // 10, table.paths
            hidden = torch.relu(p.up_proj[c] @ row + p.up_proj_bias[c])
            expected = p.down_proj[c] @ hidden + p.down_proj_bias[c]
            assert_near(table.lookup(place.view(1))[0], expected)
        assert table.lookup(ids).shape == (2, 2, 4)
        assert_near(table(ids), table.lookup(ids).sum(1))

    def test_gradients(self):
        table = self.make(dtype=torch.float64)
        ids = torch.tensor([[0, 29, 3], [13, 13, 23]])
        factors = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
        assert_gradients(functional(table, lambda forward: (forward(ids) * factors).sum()), parameters(table))

    def test_fused_step_of_the_rows(self):
        table = self.make(optimizer=gossamer.optim.SGD(lr=1.0))
        before = table.weight.clone()
        table(torch.tensor([[0, 12]])).sum().backward()
        assert table.weight.grad is None and table.paths.up_proj.grad is not None
        assert (table.weight != before).any(1).nonzero().flatten().tolist() in ([0, 2], [0], [2])

    def test_budget(self):
        table = CompositionalEmbedding.from_budget(3000, 8, 30_000, partition="path")
        assert 29_000 < table.inference_nbytes() <= 30_000
        with pytest.raises(ValueError, match="nbytes must be at least"):
            CompositionalEmbedding.from_budget(3000, 8, 2000, partition="path")


def test_frequent_ids_have_rows_of_their_own():
    table = FrequencyEmbedding(10, 3, 3, frequencies=torch.tensor([1, 5, 1, 1, 1, 1, 1, 9, 1, 1]), own=1)
    rows = table.addresses(torch.arange(10)).tolist()
    assert rows == [1, 2, 1, 2, 1, 2, 1, 0, 1, 2]
    assert table.inference_nbytes() == 3 * 3 * 4 + 10 * 4
    with pytest.raises(ValueError, match=r"own must be in \[0, 3\], and below that unless all ids have a row, got 3"):
        FrequencyEmbedding(10, 3, 3, frequencies=torch.ones(10), own=3)
    with pytest.raises(ValueError, match=r"frequencies must have shape \(N,\) = \(10\), got \(9,\)"):
        FrequencyEmbedding(10, 3, 3, frequencies=torch.ones(9))
    with pytest.raises(ValueError, match="frequencies must be finite and at least 0"):
        FrequencyEmbedding(2, 3, 2, frequencies=torch.tensor([1.0, math.nan]))


def test_clusters_share_rows():
    given = torch.tensor([2, 0, 2, 1])
    table = ClusteredEmbedding(4, 3, given)
    assert torch.equal(table.lookup(torch.arange(4)), table.weight[given])
    together = ClusteredEmbedding(4, 3, torch.zeros(4, dtype=torch.int32))
    assert together.weight.shape == (1, 3)
    with pytest.raises(ValueError, match="clusters must be at least 0, got -1"):
        ClusteredEmbedding(2, 3, torch.tensor([0, -1]))


DENSE = 5000 * 8 * 4
BUDGETED = {
    "hash": (HashEmbedding, {}),
    "double hash": (DoubleHashEmbedding, {}),
    "frequency": (FrequencyEmbedding, {"frequencies": frequencies(5000)}),
    "quotient and remainder": (CompositionalEmbedding, {}),
    "mixed radix": (CompositionalEmbedding, {"partition": "mixed_radix"}),
    "chinese remainder": (CompositionalEmbedding, {"partition": "chinese_remainder"}),
    "joined": (CompositionalEmbedding, {"operation": "concat"}),
    "path": (CompositionalEmbedding, {"partition": "path"}),
}


@pytest.mark.parametrize("share", [0.5, 0.25, 0.15])
@pytest.mark.parametrize(("kind", "options"), BUDGETED.values(), ids=BUDGETED)
def test_budgets_are_spent(kind, options, share):
    """A table fills all but less than a hundredth of its budget."""
    if "path" in options.values() and share < 0.2:
        share = 0.3  # a network a class is never smaller
    table = kind.from_budget(5000, 8, int(share * DENSE), **options)
    assert 0.99 * int(share * DENSE) < table.inference_nbytes() <= int(share * DENSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moduli": [3, 3]}, r"moduli must have a product of at least 10, the number of ids, got \[3, 3\] with 9"),
        ({"moduli": [4, 6], "partition": "chinese_remainder"}, "moduli must be coprime, got 4 and 6, .* factor 2"),
        ({"moduli": [2, 2, 3]}, r"moduli must be two for partition='quotient_remainder', got \[2, 2, 3\]"),
        ({"moduli": [0, 99]}, r"moduli\[0\] must be at least 1, got 0"),
        ({"partition": "halves"}, "partition must be one of .*, got 'halves'"),
        ({"operation": "max"}, "operation must be one of .*, got 'max'"),
        ({"operation": "add", "partition": "path"}, "operation must be None with partition='path', got 'add'"),
        ({"operation": "concat"}, "embedding_dim must be a multiple of 2, the number of rows that are joined, got 3"),
        ({"mode": "median"}, "mode must be one of .*, got 'median'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompositionalEmbedding(10, 3, **arguments)


def test_two_hashes_tell_more_ids_apart():
    """One hash of 1,000 ids into 400 rows gives 400 different vectors; two hashes give nearly 1,000."""
    ids = torch.arange(1000)
    assert len(HashEmbedding(1000, 4, 400).lookup(ids).unique(dim=0)) == 400
    assert len(DoubleHashEmbedding(1000, 4, 400, seed=1).lookup(ids).unique(dim=0)) > 980
