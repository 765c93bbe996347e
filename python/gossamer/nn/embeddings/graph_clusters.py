"""Clusters of ids with the same interaction partners, for tables that share one row per cluster."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gossamer._checks import (
    check_has_numbers,
    check_index,
    check_lengths,
    check_number,
    check_positive,
    check_seed,
    check_shape,
)


class GraphClusters(NamedTuple):
    """Clusters of the two sides of a graph of interactions.

    Attributes:
        users: ``(U,)`` int64, the cluster of each user, numbered from 0 without gaps.
        items: ``(I,)`` int64, the cluster of each item, numbered separately.
        modularity: modularity of the clusters that users and items have in common.
        resolution: the γ with which they were found.
    """

    users: torch.Tensor
    items: torch.Tensor
    modularity: float
    resolution: float

    @property
    def num_clusters(self) -> int:
        """Number of clusters of both sides: the rows of both tables."""
        return sum(int(side.max()) + 1 if len(side) else 0 for side in (self.users, self.items))


def graph_clusters(
    users: torch.Tensor,
    items: torch.Tensor,
    num_users: int,
    num_items: int,
    *,
    resolution: float = 1.0,
    max_clusters: int | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> GraphClusters:
    """Clusters of users and items by the Louvain algorithm on the graph of their interactions.

    They maximise ``Q = (1/w)·Σ_ui (A_ui − γ·d_u·d_i/w)·1[c_u = c_i]``, the modularity of a bipartite graph, with A the
    interactions, w their number and d the degrees. A larger γ gives more clusters. Ids without an interaction share one
    cluster. The implementation is scikit-network's.

    Args:
        users: ``(L,)`` int32 or int64, the user of each interaction; repeated interactions weigh more.
        items: ``(L,)``, its item.
        num_users: U.
        num_items: I.
        resolution: γ, positive.
        max_clusters: maximum number of clusters of both sides; the largest γ up to ``resolution`` that satisfies it is
            used.
        tolerance: minimum increase of Q for another level of the algorithm.
        seed: seed of the order in which ids are visited.

    Returns:
        :class:`GraphClusters`, for :class:`gossamer.nn.ClusteredEmbedding`.

    Raises:
        ImportError: scikit-network is not installed: ``pip install 'gossamer[graphs]'``.
        TypeError: ids are not int32 or int64.
        ValueError: numbers of users and items differ, there is no interaction, ``resolution`` is not positive, or even
            one cluster per connected component exceeds ``max_clusters``.
        IndexError: an id is out of range.

    Source: Wu et al., "GraphHash: Graph Clustering Enables Parameter Efficiency in Recommender Systems", WWW 2025;
    Barber, "Modularity and community detection in bipartite networks", Physical Review E 76, 2007.
    """
    try:
        from scipy import sparse
        from sknetwork.clustering import Louvain
    except ImportError as error:
        raise ImportError("graph_clusters needs scikit-network: pip install 'gossamer[graphs]'") from error
    check_positive(num_users=num_users, num_items=num_items)
    check_lengths(num_users=num_users, num_items=num_items)
    check_index("users", users)
    check_shape("users", users, (None,), "(L,)")
    check_index("items", items)
    check_shape("items", items, tuple(users.shape), "(L,), as users")
    if not len(users):
        raise ValueError("users must hold at least one interaction, got 0")
    if users.is_meta or items.is_meta:
        raise ValueError("users and items must hold values, got tensors on meta")
    check_number("resolution", resolution, above=0, finite=True)
    check_number("tolerance", tolerance, least=0)
    check_seed(seed)
    if max_clusters is not None:
        check_positive(max_clusters=max_clusters)
    for name, ids, count in (("users", users, num_users), ("items", items, num_items)):
        lowest, highest = (int(number) for number in ids.aminmax())
        if lowest < 0 or highest >= count:
            raise IndexError(f"{name} must be in [0, {count}), got {lowest if lowest < 0 else highest}")
    ones = torch.ones(len(users)).numpy()
    matrix = sparse.csr_matrix((ones, (users.cpu().numpy(), items.cpu().numpy())), shape=(num_users, num_items))

    def find(gamma: float) -> GraphClusters:
        louvain = Louvain(resolution=gamma, modularity="dugue", tol_optimization=tolerance, random_state=seed)
        louvain.fit(matrix, force_bipartite=True)
        rows, columns = torch.from_numpy(louvain.labels_row_).long(), torch.from_numpy(louvain.labels_col_).long()
        met = torch.from_numpy(matrix.getnnz(1) > 0), torch.from_numpy(matrix.getnnz(0) > 0)
        sides = [_renumbered(labels, live) for labels, live in zip((rows, columns), met, strict=True)]
        return GraphClusters(*sides, _modularity(matrix.tocoo(), rows, columns, gamma), gamma)

    found = find(resolution)
    if max_clusters is None or found.num_clusters <= max_clusters:
        return found
    low, high = 0.0, resolution
    best = find(resolution * 1e-6)
    if best.num_clusters > max_clusters:
        raise ValueError(f"max_clusters must be at least {best.num_clusters} for this graph, got {max_clusters}")
    for _ in range(20):
        middle = (low + high) / 2
        found = find(middle)
        if found.num_clusters <= max_clusters:
            low = middle
            best = max(best, found, key=lambda clusters: clusters.num_clusters)
        else:
            high = middle
    return best


def resize_clusters(clusters: torch.Tensor, count: int) -> torch.Tensor:
    """Merge or split clusters so that there are ``count`` of them, numbered from 0 without gaps: ``(N,)`` int64.

    If there are more, the smallest beyond ``count`` are merged into the others, one each in turn. If there are fewer,
    the largest are split into pieces of about one size and their ids assigned to the pieces in turn. Ids that nothing
    tells apart, such as those without an interaction, then share rows as under a hash.

    Args:
        clusters: ``(N,)`` int32 or int64, at least 0.
        count: at most N.

    Raises:
        TypeError: ``clusters`` is not an integer tensor, or ``count`` no int.
        ValueError: ``clusters`` is not 1-D, is empty or negative, or ``count`` is not in [1, N].
    """
    check_index("clusters", clusters)
    check_shape("clusters", clusters, (None,), "(N,)")
    check_has_numbers("clusters", clusters)
    check_positive(count=count)
    n = len(clusters)
    if count > n:
        raise ValueError(f"count must be at most the number of ids, {n}, got {count}")
    if int(clusters.min()) < 0:
        raise ValueError(f"clusters must be at least 0, got {int(clusters.min())}")
    _, numbers, sizes = clusters.unique(return_inverse=True, return_counts=True)
    if len(sizes) > count:
        order = sizes.argsort(descending=True, stable=True)
        turns = torch.arange(len(sizes), device=order.device) % count
        return torch.empty_like(order).scatter_(0, order, turns)[numbers]
    # The smallest size of a piece that gives at most ``count`` pieces.
    low, high = 1, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int((-(-sizes // middle)).sum()) <= count else (middle + 1, high)
    pieces = -(-sizes // low)
    if low > 1:
        # Pieces smaller by one would be too many, so only the largest clusters are split into them until ``count`` is
        # reached.
        order = sizes.argsort(descending=True, stable=True)
        room = (-(-sizes // (low - 1)) - pieces)[order]
        before = room.cumsum(0) - room
        pieces[order] += (count - pieces.sum() - before).clamp(min=0).minimum(room)
    order = numbers.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=order.device) - (sizes.cumsum(0) - sizes)[numbers[order]]
    return (pieces.cumsum(0) - pieces)[numbers] + place % pieces[numbers]


def _renumbered(labels: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Labels renumbered from 0 in the order of their values; ids without an interaction come last."""
    numbers = torch.empty_like(labels)
    _, numbers[live] = labels[live].unique(return_inverse=True)
    numbers[~live] = numbers[live].max() + 1 if bool(live.any()) else 0
    return numbers


def _modularity(matrix, rows: torch.Tensor, columns: torch.Tensor, gamma: float) -> float:
    """Q for the labels of both sides."""
    weight = float(matrix.data.sum())
    row, column = torch.from_numpy(matrix.row).long(), torch.from_numpy(matrix.col).long()
    data = torch.from_numpy(matrix.data).double()
    inside = data[rows[row] == columns[column]].sum() / weight
    count = int(max(rows.max(), columns.max())) + 1
    of_rows = torch.zeros(count, dtype=torch.float64).index_add(0, rows[row], data)
    of_columns = torch.zeros(count, dtype=torch.float64).index_add(0, columns[column], data)
    return float(inside - gamma * (of_rows @ of_columns) / weight**2)
