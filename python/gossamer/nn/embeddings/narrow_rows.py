"""Tables whose rows have fewer columns than the vectors they stand for."""

from __future__ import annotations

import torch

from gossamer.nn.embeddings.fused_step import FusedTable

# Rows of two widths cost a second read, so they are used only if whole columns leave more than this share of a budget
# unused.
_LEFT_OVER = 0.005


class NarrowRowsTable(FusedTable):
    """A table whose rows have d columns, or d + 1 for the first ids, and are projected to D columns.

    ``e(x) = (weight[x], extra[x])·projectionᵀ + bias``, where only ids below :attr:`wide_rows` have an ``extra``.
    A column added to all N rows changes the size by a large step. Added to some rows only, it meets a byte budget to
    within a row.

    A subclass sets its parameters by :meth:`_set_rows`, looks vectors up by :meth:`_vectors` and pools bags by
    :meth:`_bags`.

    Attributes:
        weight: ``(N, d)``, a parameter.
        extra: ``(wide_rows, 1)``, a parameter, or None.
        projection: ``(D, d)``, or ``(D, d + 1)`` with ``extra``, a parameter; None if rows have D columns.
        bias: ``(D,)``, a parameter, or None.
        wide_rows: number of ids, from the first, whose rows have one more column.
    """

    wide_rows: int = 0

    def _set_rows(
        self,
        weight: torch.Tensor,
        extra: torch.Tensor | None,
        projection: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Register these as the parameters, and the rows as :attr:`tables`."""
        self.wide_rows = 0 if extra is None else extra.shape[0]
        self.tables = ("weight", "extra") if self.wide_rows else ("weight",)
        for name, value in (("weight", weight), ("extra", extra), ("projection", projection), ("bias", bias)):
            self.register_parameter(name, None if value is None else torch.nn.Parameter(value))

    def _projected(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.projection is None else torch.nn.functional.linear(rows, self.projection, self.bias)

    def _wide(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids that have the additional column; −1, which lookups drop, for all others."""
        return ids.masked_fill(ids >= self.wide_rows, -1)

    def _vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``."""
        rows = self.rows("weight", ids)
        if self.wide_rows:
            more = self.bags("extra", self._wide(ids).reshape(-1, 1), bounds="drop")
            rows = torch.cat([rows, more.view(*ids.shape, 1)], -1)
        return self._projected(rows)

    def _bags(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Sums or means ``(B, D)`` of bags, projected once a bag."""
        pooled = self.bags("weight", ids, *lists, **how)
        if self.wide_rows:
            more = self.bags("extra", self._wide(ids), *lists, **how | {"mode": "sum", "bounds": "drop"})
            if how["mode"] == "mean":
                # A mean is over all ids of a bag, also those without the column.
                more = (more / _lengths(ids, lists[0], how["include_last_offset"])).to(pooled.dtype)
            pooled = torch.cat([pooled, more], 1)
        return self._projected(pooled)


def _lengths(ids: torch.Tensor, offsets: torch.Tensor | None, include_last_offset: bool) -> torch.Tensor | int:
    """The number of ids of each bag, ``(B, 1)``, at least 1."""
    if offsets is None:
        return max(ids.shape[1], 1)
    if not include_last_offset:
        offsets = torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])
    return offsets.diff().clamp(min=1).unsqueeze(1)


def narrow_nbytes(
    num_embeddings: int, embedding_dim: int, row_dim: int, wide_rows: int, itemsize: int, bias: bool = False
) -> int:
    """Bytes of rows of ``row_dim`` columns, one more in ``wide_rows`` of them, of the projection and the bias."""
    projection = embedding_dim * (row_dim + (wide_rows > 0) + bias)
    return itemsize * (num_embeddings * row_dim + wide_rows + projection)


def fit_narrow(sizes: tuple[int, int], nbytes: int, itemsize: int, most: int, bias: bool = False) -> tuple[int, int]:
    """The number of columns, ``most`` at most, that fits a budget, and of rows with one more in the remaining bytes.

    One column must fit.
    """
    num_embeddings, embedding_dim = sizes
    one = narrow_nbytes(*sizes, 1, 0, itemsize, bias)
    width = min(most, 1 + (nbytes - one) // (itemsize * (num_embeddings + embedding_dim)))
    left = nbytes - narrow_nbytes(*sizes, width, 0, itemsize, bias)
    if width == embedding_dim or left <= _LEFT_OVER * nbytes:
        return width, 0
    return width, max(0, min(num_embeddings, left // itemsize - embedding_dim))
