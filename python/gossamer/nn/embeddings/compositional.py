"""Tables that compose the vector of an id from rows of several small tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from gossamer._checks import check_index, check_positive, check_sequence
from gossamer.nn.embeddings.shared_rows import SharedRowsTable
from gossamer.nn.embeddings.table import Table
from gossamer.nn.moe.experts.grouped import Experts
from gossamer.ops.composed_rows import Parts
from gossamer.ops.map_ids import IdMaps, map_ids, radix_maps

PARTITIONS = ("quotient_remainder", "mixed_radix", "chinese_remainder", "path")


class CompositionalEmbedding(SharedRowsTable):
    """The vector of an id is composed of one row from each of k small tables; together they distinguish all ids.

    A partition maps id x to class ``p_j(x)`` of ``m_j``, for j = 1 .. k, such that no two ids share all classes:

    - ``"quotient_remainder"``, two parts: ``x mod m_1`` and ``x div m_1``;
    - ``"mixed_radix"``: the digits of x, ``x div ∏_{i<j} m_i mod m_j``;
    - ``"chinese_remainder"``: ``x mod m_j`` for coprime moduli.

    ``e(x)`` is the sum, the product or the concatenation of the rows ``W_j[p_j(x)]``, which have D/k columns for
    concatenation. Sums and products of different ids differ for almost all values of the rows, concatenations whenever
    the rows of each table differ.

    With ``"path"`` there are two parts as for quotient and remainder, and the second part is one small network per
    class: ``e(x) = V_c·relu(U_c·W[x mod m_1] + a_c) + b_c`` with ``c = x div m_1``. The networks are ordinary
    parameters, which ``optimizer`` does not step.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        moduli: ``m_1 .. m_k``; by default of about equal size, two of them, three for ``"mixed_radix"``.
        partition: one of the four names.
        operation: ``"mul"``, which is the default, ``"add"`` or ``"concat"``; not with ``"path"``.
        path_width: hidden width of the networks of ``"path"``.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: the k tables, stacked: ``(Σm_j, D)``; ``(Σm_j, D/k)`` with ``"concat"``, ``(m_1, D)`` with ``"path"``.
            The entries of ``e(x)`` start with the variance of numbers uniform in ``±1/√N``.
        moduli: the sizes of the tables.
        paths: the networks of ``"path"``, :class:`gossamer.nn.Experts`.

    Raises:
        TypeError: a modulus is not an int.
        ValueError: an argument is unknown or does not fit; ``moduli`` do not distinguish N ids: their product is below
            N, or those of ``"chinese_remainder"`` share a factor; D is not a multiple of k for ``"concat"``.

    Source: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
    Systems", KDD 2020.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        moduli: Sequence[int] | None = None,
        *,
        partition: str = "quotient_remainder",
        operation: str | None = None,
        path_width: int = 16,
        **options: object,
    ) -> None:
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim, path_width=path_width)
        operation = _checked_operation(partition, operation)
        if moduli is None:
            moduli = _moduli(num_embeddings, partition, _balanced(num_embeddings, partition))
        _check_moduli(num_embeddings, partition, moduli)
        self.moduli, self.partition = tuple(moduli), partition
        rows, parts = (moduli[0], 1) if partition == "path" else (sum(moduli), len(moduli))
        super().__init__(num_embeddings, embedding_dim, rows, parts, operation=operation, **options)
        if partition == "path":
            factory = {name: options.get(name) for name in ("device", "dtype")}
            self.paths = Experts(moduli[1], embedding_dim, path_width, activation="relu", bias=True, **factory)
        if partition == "chinese_remainder":
            bases = [0, *itertools.accumulate(moduli)][:-1]
            self._maps = IdMaps.of(moduli, bases=bases, limit=num_embeddings)
        else:
            self._maps = radix_maps(moduli, limit=num_embeddings)

    def parts(self) -> Parts:
        """A row of :attr:`weight` for each of the k classes of an id."""
        return Parts.of(self.embedding_dim, self.operation, self._maps)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``; raises the errors of :meth:`Table.forward`."""
        if self.partition != "path":
            return super().lookup(ids)
        check_index("ids", ids)
        row, network = map_ids(ids, self._maps).unbind(-1)
        rows = self.rows("weight", row)
        return self.paths(rows, (network - self.moduli[0]).reshape(-1, 1), rows.new_ones(ids.numel(), 1))

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Pool rows as they are read; for ``"path"``, whose networks need them, compute all vectors first."""
        kind = Table if self.partition == "path" else SharedRowsTable
        return kind._pool(self, ids, *lists, **how)

    def extra_repr(self) -> str:
        """Sizes, partition and mode, and the optimizer, if any."""
        how = f"partition={self.partition!r}" + (f", operation={self.operation!r}" if self.partition != "path" else "")
        return self._repr(f"{list(self.moduli)}", how)

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        nbytes: int,
        *,
        partition: str = "quotient_remainder",
        **options: object,
    ) -> CompositionalEmbedding:
        """The table with the largest first part that fits ``nbytes`` bytes; raises the errors of
        :meth:`Table.from_budget`.
        """
        if partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {PARTITIONS}, got {partition!r}")

        def make(first: int, **more: object) -> CompositionalEmbedding:
            moduli = _moduli(num_embeddings, partition, first)
            return cls(num_embeddings, embedding_dim, moduli, partition=partition, **options | more)

        first = _balanced(num_embeddings, partition)
        if partition == "path":
            # A network is larger than a row, so the smallest table has the fewest networks.
            costs = make(num_embeddings, device="meta")
            network = costs.inference_nbytes() - num_embeddings * embedding_dim * costs.weight.element_size()
            row = embedding_dim * costs.weight.element_size()
            first = min(num_embeddings, math.ceil(math.sqrt(num_embeddings * network / row)))
        return cls._fit((num_embeddings, embedding_dim), nbytes, (first, num_embeddings), make)


def _checked_operation(partition: str, operation: str | None) -> str:
    if partition not in PARTITIONS:
        raise ValueError(f"partition must be one of {PARTITIONS}, got {partition!r}")
    if partition != "path":
        return "mul" if operation is None else operation
    if operation is not None:
        raise ValueError(f"operation must be None with partition='path', got {operation!r}")
    return "add"


def _check_moduli(num_embeddings: int, partition: str, moduli: Sequence[int]) -> None:
    check_sequence("moduli", moduli)
    check_positive(**{f"moduli[{i}]": m for i, m in enumerate(moduli)})
    pairs = partition in ("quotient_remainder", "path")
    if pairs and len(moduli) != 2:
        raise ValueError(f"moduli must be two for partition={partition!r}, got {list(moduli)}")
    if math.prod(moduli) < num_embeddings:
        raise ValueError(
            f"moduli must have a product of at least {num_embeddings}, the number of ids, got {list(moduli)} with "
            f"{math.prod(moduli)}"
        )
    if partition == "chinese_remainder":
        for a, b in itertools.combinations(moduli, 2):
            if math.gcd(a, b) > 1:
                raise ValueError(f"moduli must be coprime, got {a} and {b}, which share the factor {math.gcd(a, b)}")


def _root(value: int, degree: int) -> int:
    """The smallest integer whose ``degree``-th power is at least ``value``."""
    root = max(1, round(value ** (1 / degree)))
    while root**degree < value:
        root += 1
    while root > 1 and (root - 1) ** degree >= value:
        root -= 1
    return root


def _balanced(num_embeddings: int, partition: str) -> int:
    """The first modulus if all moduli are about equal."""
    return _root(num_embeddings, 3 if partition == "mixed_radix" else 2)


def _moduli(num_embeddings: int, partition: str, first: int) -> list[int]:
    """Moduli that distinguish N ids, given the first one, with the fewest rows in the others."""
    rest = -(-num_embeddings // first)
    if partition == "mixed_radix":
        second = _root(rest, 2)
        return [first, second, -(-rest // second)]
    if partition == "chinese_remainder":
        while math.gcd(first, rest) > 1:
            rest += 1
    return [first, rest]
