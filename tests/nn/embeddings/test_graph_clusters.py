"""Clusters of users and items by whom they meet."""

import pytest
import torch
from scipy import sparse

from gossamer.nn import ClusteredEmbedding, graph_clusters, resize_clusters
from gossamer.nn.embeddings.graph_clusters import _modularity

ROWS = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1]])


def clusters(resolution):
    users, items = ROWS.nonzero(as_tuple=True)
    return graph_clusters(users, items, 3, 3, resolution=resolution)


def test_published_graph():
    """Two users who share two items, and a third: four partitions, and what is found at γ = 1 and 2."""
    values = {((0, 0, 0), (0, 0, 0)): (0, -1), ((0, 0, 1), (0, 0, 1)): (2 / 9, -7 / 18)}
    values |= {((0, 0, 1), (0, 1, 1)): (2 / 9, -2 / 9), ((0, 1, 2), (0, 1, 2)): (1 / 6, -1 / 6)}
    matrix = sparse.coo_matrix(ROWS.double().numpy())
    for (rows, columns), expected in values.items():
        labels = torch.tensor(rows), torch.tensor(columns)
        assert [_modularity(matrix, *labels, gamma) for gamma in (1, 2)] == pytest.approx(expected)
    coarse, fine = clusters(1.0), clusters(2.0)
    assert coarse.modularity == pytest.approx(2 / 9) and fine.modularity >= -1 / 6
    assert coarse.users[0] == coarse.users[1] != coarse.users[2]
    assert fine.num_clusters > coarse.num_clusters


def planted(groups=6, size=30, noise=0.03):
    """Interactions mostly within groups, and ids 0 to 9 of either side without any."""
    generator = torch.Generator().manual_seed(0)
    count = groups * size
    group = torch.arange(count) % groups
    chance = torch.where(group.unsqueeze(1) == group, 0.4, noise)
    met = torch.rand(count, count, generator=generator) < chance
    met[:10], met[:, :10] = False, False
    return group, *met.nonzero(as_tuple=True)


def test_finds_planted_groups():
    group, users, items = planted()
    found = graph_clusters(users, items, 180, 180)
    for side in (found.users, found.items):
        assert len(torch.stack([side[10:], group[10:]], 1).unique(dim=0)) == 6
        assert len(side[:10].unique()) == 1 and side.unique().tolist() == list(range(7))
    again = graph_clusters(users, items, 180, 180)
    assert torch.equal(found.users, again.users) and torch.equal(found.items, again.items)
    table = ClusteredEmbedding(180, 4, found.users)
    assert table.weight.shape == (7, 4)


def test_seeks_a_resolution_for_a_budget():
    _, users, items = planted()
    many = graph_clusters(users, items, 180, 180, resolution=20.0)
    found = graph_clusters(users, items, 180, 180, resolution=20.0, max_clusters=60)
    assert 14 <= found.num_clusters <= 60 < many.num_clusters and found.resolution < 20
    with pytest.raises(ValueError, match=r"max_clusters must be at least \d+ for this graph, got 1"):
        graph_clusters(users, items, 180, 180, max_clusters=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"users": torch.zeros(0, dtype=torch.int64), "items": torch.zeros(0, dtype=torch.int64)}, ValueError, "got 0"),
        ({"items": torch.tensor([0])}, ValueError, r"items must have shape \(L,\), as users = \(2\), got \(1,\)"),
        ({"users": torch.tensor([0, 3])}, IndexError, r"users must be in \[0, 3\), got 3"),
        ({"items": torch.tensor([0, -1])}, IndexError, r"items must be in \[0, 3\), got -1"),
        ({"resolution": 0.0}, ValueError, r"resolution must be positive and finite, got 0\.0"),
        ({"tolerance": -1.0}, ValueError, r"tolerance must be at least 0, got -1\.0"),
        ({"num_users": 2**62}, ValueError, f"num_users must be at most {2**60}, got {2**62}"),
        ({"users": torch.tensor([0.5, 1])}, TypeError, "users must be int32 or int64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    given = {"users": torch.tensor([0, 1]), "items": torch.tensor([0, 1]), "num_users": 3, "num_items": 3} | arguments
    with pytest.raises(error, match=message):
        graph_clusters(**given)


def test_another_number_of_clusters():
    """The smallest join the others in turn; the largest are cut, and their ids take turns."""
    given = torch.tensor([0, 1, 1, 5, 3, 3])
    assert resize_clusters(given, 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert resize_clusters(given, 4).tolist() == [0, 1, 1, 3, 2, 2]
    one = resize_clusters(torch.tensor([7, 7, 7, 7, 2, 7, 7]), 3)
    assert one.tolist() == [1, 2, 1, 2, 0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    many = torch.randint(0, 40, (1000,), generator=generator) ** 2
    for count in (1, 17, 40, 41, 333, 700, 1000):
        resized = resize_clusters(many, count)
        assert resized.unique().tolist() == list(range(count))
        if count >= 40:
            # No new cluster has ids of two old ones, and none is more than one larger than needed.
            pairs = torch.stack([resized, many]).unique(dim=1)
            assert pairs.shape[1] == count
            sizes, pieces = (torch.bincount(t) for t in (many, pairs[1]))
            assert resized.bincount().max() <= (sizes[sizes > 0] / pieces[pieces > 0]).ceil().max()
    with pytest.raises(ValueError, match="count must be at most the number of ids, 6, got 7"):
        resize_clusters(given, 7)
    with pytest.raises(ValueError, match="clusters must be at least 0, got -1"):
        resize_clusters(torch.tensor([0, -1]), 1)
