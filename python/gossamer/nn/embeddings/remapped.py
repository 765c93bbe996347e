"""Tables that map ids to rows by a stored list: separate rows for frequent ids, or one row per cluster."""

from __future__ import annotations

import torch

from gossamer._checks import (
    check_flag,
    check_has_numbers,
    check_index,
    check_positive,
    check_same_device,
    check_shape,
    check_sizes,
)
from gossamer.nn.embeddings.graph_clusters import resize_clusters
from gossamer.nn.embeddings.seeded import SeededMaps
from gossamer.nn.embeddings.shared_rows import SharedRowsTable
from gossamer.nn.embeddings.table import item_nbytes
from gossamer.ops.composed_rows import Parts
from gossamer.ops.map_ids import IdMaps


class FrequencyEmbedding(SharedRowsTable):
    """Frequent ids have their own rows, and the others share the remaining ones: row ``own + x mod (M − own)``.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        num_rows: M.
        frequencies: ``(N,)``, number of occurrences of each id. The most frequent ids get their own rows; among equal
            ones the lower ids.
        own: number of ids with their own rows; by default a tenth of N, but at most M/2.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(M, D)``, the parameter: rows of frequent ids by descending frequency, then shared rows.
        row_of_id: ``(N,)`` int32, a buffer.

    Raises:
        TypeError: as for the options.
        ValueError: a size is below 1, ``frequencies`` have another shape, are negative or not finite, or ``own`` is not
            in ``[0, M]``, or is M while some ids have no row of their own.

    Source: the adaptive embedding of Zhang et al., "Experimental Analysis of Large-scale Learnable Vector Storage
    Compression", VLDB 2024.
    """

    quick_addresses = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_rows: int,
        *,
        frequencies: torch.Tensor,
        own: int | None = None,
        **options: object,
    ) -> None:
        check_positive(num_embeddings=num_embeddings, num_rows=num_rows)
        check_shape("frequencies", frequencies, (num_embeddings,), "(N,)")
        if frequencies.is_meta or frequencies.layout is not torch.strided:
            raise ValueError(f"frequencies must have dense numbers, got {frequencies.layout} on {frequencies.device}")
        if own is not None:
            check_sizes(own=own)
        if not bool((frequencies >= 0).all() & frequencies.isfinite().all()):
            raise ValueError("frequencies must be finite and at least 0")
        if own is None:
            own = min(num_embeddings // 10, num_rows // 2) if num_rows < num_embeddings else num_embeddings
        shared = num_rows - own
        if own < 0 or shared < 0 or (shared == 0 and own < num_embeddings):
            raise ValueError(f"own must be in [0, {num_rows}], and below that unless all ids have a row, got {own}")
        super().__init__(num_embeddings, embedding_dim, num_rows, **options)
        self.own, self._maps = own, IdMaps.of([num_rows])
        if self.weight.is_meta:
            rows = self.weight.new_empty(num_embeddings, dtype=torch.int32)
        else:
            frequent = frequencies.cpu().argsort(descending=True, stable=True)[:own]
            rows = own + torch.arange(num_embeddings) % max(shared, 1)
            rows[frequent] = torch.arange(own)
        self.register_buffer("row_of_id", rows.int().to(self.weight.device))

    def parts(self) -> Parts:
        """The row that is listed for an id."""
        return Parts.of(self.embedding_dim, self.operation, self._maps, **listed_row(self.row_of_id))

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """:attr:`row_of_id` at ``ids``."""
        return rows_at(self.row_of_id, ids)


class ClusteredEmbedding(SeededMaps, SharedRowsTable):
    """Ids of one cluster share a row: ``e(x) = weight[cluster(x)]``, or with a second row that a hash chooses.

    With ``double`` the vector is ``weight[cluster(x)] + weight[h(x)]``; the hash, as in :class:`DoubleHashEmbedding`,
    distinguishes the ids of a cluster.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        clusters: ``(N,)`` int32 or int64 in ``[0, M)``, the cluster of each id.
        double: whether to add a second, hashed row.
        seed: seed of the second row's hash; part of the state.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(M, D)``, the parameter, where M is the largest cluster id plus one.
        row_of_id: ``(N,)`` int32, a buffer.

    Raises:
        TypeError: ``clusters`` is not an integer tensor; as for the options.
        ValueError: a size is below 1, or ``clusters`` has another shape or negative numbers.

    Source: Wu et al., "GraphHash: Graph Clustering Enables Parameter Efficiency in Recommender Systems", WWW 2025.
    """

    quick_addresses = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        clusters: torch.Tensor,
        *,
        double: bool = False,
        seed: int = 0,
        **options: object,
    ) -> None:
        check_positive(num_embeddings=num_embeddings)
        check_shape("clusters", clusters, (num_embeddings,), "(N,)")
        check_index("clusters", clusters)
        check_has_numbers("clusters", clusters)
        check_flag("double", double)
        lowest, highest = (int(number) for number in clusters.aminmax())
        if lowest < 0:
            raise ValueError(f"clusters must be at least 0, got {lowest}")
        super().__init__(num_embeddings, embedding_dim, highest + 1, 2 if double else 1, **options)
        self.register_buffer("row_of_id", clusters.int().to(self.weight.device))
        self._keep_seed(seed, self.weight.device)

    def _draw_maps(self, seed: int) -> None:
        if self.rows_per_id == 1:
            self._maps = IdMaps.of([self.num_rows])
            return
        hashed = IdMaps.universal([self.num_rows], seed=seed)
        # The first part is read from the clusters.
        numbers = {"multipliers": [1, *hashed.multipliers], "addends": [0, *hashed.addends]}
        self._maps = IdMaps.of([self.num_rows] * 2, **numbers, prime=hashed.prime, mixed=hashed.mixed)

    def parts(self) -> Parts:
        """The row of an id's cluster and, with ``double``, the hashed row."""
        return Parts.of(self.embedding_dim, self.operation, self._maps, **listed_row(self.row_of_id))

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """:attr:`row_of_id` at ``ids`` and, with ``double``, the hashed rows."""
        return rows_at(self.row_of_id, ids) if self.rows_per_id == 1 else super().addresses(ids)

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> ClusteredEmbedding:
        """The table of the most rows, N at most, that fits ``nbytes`` bytes, for the given ``clusters``.

        :func:`resize_clusters` merges or splits them to that number. Raises the errors of :meth:`Table.from_budget`.
        """
        rows = cls._rows_within(num_embeddings, embedding_dim, nbytes, options)
        clusters = options.pop("clusters")
        check_shape("clusters", clusters, (num_embeddings,), "(N,)")
        return cls(num_embeddings, embedding_dim, resize_clusters(clusters, rows), **options)

    @classmethod
    def size_within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> int:
        """As :meth:`Table.size_within`."""
        rows = cls._rows_within(num_embeddings, embedding_dim, nbytes, options)
        return _clustered_nbytes(num_embeddings, embedding_dim, rows, options)

    @classmethod
    def _rows_within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, options: dict[str, object]) -> int:
        sizes = num_embeddings, embedding_dim
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        return cls._largest(sizes, nbytes, (1, num_embeddings), lambda rows: _clustered_nbytes(*sizes, rows, options))


def _clustered_nbytes(num_embeddings: int, embedding_dim: int, rows: int, options: dict[str, object]) -> int:
    """Bytes of the rows, the map and the seed of a clustered table."""
    return rows * embedding_dim * item_nbytes(options) + 4 * num_embeddings + 8


def listed_row(row_of_id: torch.Tensor) -> dict[str, object]:
    """The arguments of :class:`Parts` for a first part whose rows are the entries of a map ``(N,)``."""
    return {"coded": 1, "codes": row_of_id.unsqueeze(1), "bits": [32]}


def rows_at(row_of_id: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The entries of a map ``(N,)`` at ``ids (...)``; IndexError for an id outside it."""
    check_index("ids", ids)
    check_same_device(row_of_id=row_of_id, ids=ids)
    return row_of_id.index_select(0, ids.reshape(-1)).view(ids.shape)
