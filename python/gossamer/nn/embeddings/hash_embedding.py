"""Tables with fewer rows than ids, in which ids share rows by hashes."""

from __future__ import annotations

import torch

from gossamer.nn.embeddings.seeded import SeededMaps
from gossamer.nn.embeddings.shared_rows import SharedRowsTable
from gossamer.ops.composed_rows import Parts
from gossamer.ops.map_ids import IdMaps, map_ids


class HashEmbedding(SharedRowsTable):
    """The vector of id x is row ``x mod M`` of M rows: ids with the same remainder share a row.

    With M at least N it is the dense table. Any 64-bit id is valid, also above ``num_embeddings``, which only sets the
    scale of the initial rows; a negative id x is treated as x + 2⁶⁴.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        num_rows: M.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(M, D)``, the parameter.

    Raises:
        TypeError: as for the options.
        ValueError: a size is below 1, or an option does not fit.

    Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009.
    """

    quick_addresses = True

    def __init__(self, num_embeddings: int, embedding_dim: int, num_rows: int, **options: object) -> None:
        super().__init__(num_embeddings, embedding_dim, num_rows, **options)
        self._maps = IdMaps.of([num_rows])

    def parts(self) -> Parts:
        """The row ``x mod M``."""
        return Parts.of(self.embedding_dim, self.operation, self._maps)

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids mod M``."""
        return map_ids(ids, self._maps).squeeze(-1)


class DoubleHashEmbedding(SeededMaps, SharedRowsTable):
    """The vector of id x is ``weight[h1(x)] + weight[h2(x)]``, with two universal hashes into the same M rows.

    ``h(x) = ((a·mix(x) + b) mod (2⁶¹−1)) mod M``, as drawn by :meth:`gossamer.IdMaps.universal`. Two ids share their
    vector only if they have both rows in common: about N²/M² pairs of N ids, compared with N²/2M for one hash. If both
    hashes of an id give the same row, it counts twice. Any 64-bit id is valid, as in :class:`HashEmbedding`.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        num_rows: M.
        seed: seed of a and b of both hashes; part of the state.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(M, D)``, the parameter.

    Raises:
        TypeError: as for the options.
        ValueError: a size is below 1, or an option does not fit.

    Source: Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems", RecSys
    2020.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, num_rows: int, *, seed: int = 0, **options: object
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, num_rows, 2, **options)
        self._keep_seed(seed, self.weight.device)

    def _draw_maps(self, seed: int) -> None:
        self._maps = IdMaps.universal([self.num_rows] * 2, seed=seed)

    def parts(self) -> Parts:
        """Both hashes."""
        return Parts.of(self.embedding_dim, self.operation, self._maps)
