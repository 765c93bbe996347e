"""Narrow tables with a projection to the model's width, and the rule that chooses their widths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gossamer._checks import (
    MAX_SIZE,
    check_flag,
    check_index,
    check_number,
    check_positive,
    check_sequence,
    check_sizes,
)
from gossamer._parameters import factory_of
from gossamer.nn.embeddings.narrow_rows import NarrowRowsTable, fit_narrow, narrow_nbytes
from gossamer.nn.embeddings.table import check_budget, item_nbytes
from gossamer.optim import Optimizer


class MixedDimensionEmbedding(NarrowRowsTable):
    """Rows of d columns, projected to D: ``e(x) = weight[x]·projectionᵀ``.

    The first ``wide_rows`` ids may have one column more, ``e(x) = (weight[x], extra[x])·projectionᵀ``. With ids
    sorted by descending frequency these are the paper's blocks of rows of different widths; a byte budget is met to
    within a row. Bags are pooled before they are projected, so a bag costs one projection. With d = D there is no
    projection.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        row_dim: d, at most D. :func:`mixed_dimensions` chooses it for the tables of a model.
        wide_rows: number of ids, from the first, with one column more; 0 if d is D.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the parameters.
        dtype: of the parameters.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step on the rows into the backward pass. The projection is
            an ordinary parameter.

    Attributes:
        weight: ``(N, d)``. It starts uniform in ``±1/√N``.
        extra: ``(wide_rows, 1)``, which starts as ``weight`` does, or None.
        projection: ``(D, d)``, ``(D, d + 1)`` with ``extra``, or None if d is D. It starts uniform with variance one
            over its number of columns, which keeps the variance of the rows.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, ``row_dim`` is above D, ``wide_rows`` is above N or given with d = D, or the mode
            is unknown.

    Source: Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems",
    ISIT 2021.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        row_dim: int,
        *,
        wide_rows: int = 0,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_positive(row_dim=row_dim)
        check_sizes(wide_rows=wide_rows)
        if row_dim > embedding_dim:
            raise ValueError(f"row_dim must be at most embedding_dim, {embedding_dim}, got {row_dim}")
        if wide_rows > (most := num_embeddings if row_dim < embedding_dim else 0):
            raise ValueError(f"wide_rows must be at most {most} with row_dim={row_dim}, got {wide_rows}")
        self.row_dim = row_dim
        factory = factory_of(device, dtype)
        self._set_rows(
            torch.empty(num_embeddings, row_dim, **factory),
            torch.empty(wide_rows, 1, **factory) if wide_rows else None,
            torch.empty(embedding_dim, row_dim + (wide_rows > 0), **factory) if row_dim < embedding_dim else None,
        )
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Redraw the parameters and reset the optimizer."""
        bound = self.num_embeddings**-0.5
        for name in self.tables:
            torch.nn.init.uniform_(getattr(self, name), -bound, bound)
        if self.projection is not None:
            bound = (3 / self.projection.shape[1]) ** 0.5
            torch.nn.init.uniform_(self.projection, -bound, bound)
        self._reset_state()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``; raises the errors of :meth:`Table.forward`."""
        check_index("ids", ids)
        return self._vectors(ids)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Pool first and project each sum or mean once; maxima need the projected vectors."""
        if self.mode == "max" and self.projection is not None:
            return super()._pool(ids, *lists, **how)
        return self._bags(ids, *lists, **how)

    def extra_repr(self) -> str:
        """Sizes and mode, and the optimizer, if any."""
        wide = [f"wide_rows={self.wide_rows}"] if self.wide_rows else []
        return self._repr(f"row_dim={self.row_dim}", *wide)

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> MixedDimensionEmbedding:
        """The table with the widest rows, at most D, that fits ``nbytes`` bytes; raises the errors of
        :meth:`Table.from_budget`.

        The bytes that whole columns leave over give the first rows one column more.
        """
        check_budget(nbytes)
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        sizes, itemsize = (num_embeddings, embedding_dim), item_nbytes(options)
        # Without its projection the full width may be smaller than one column less.
        full = itemsize * num_embeddings * embedding_dim
        if full <= nbytes:
            return cls(*sizes, embedding_dim, **options)
        cls._check_fits(sizes, nbytes, min(full, narrow_nbytes(*sizes, 1, 0, itemsize)))
        width, wide_rows = fit_narrow(sizes, nbytes, itemsize, embedding_dim - 1)
        return cls(*sizes, width, **{"wide_rows": wide_rows} | options)


def mixed_dimensions(
    num_embeddings: Sequence[int], *, base_dim: float, alpha: float = 0.3, most: int | None = None, powers: bool = False
) -> list[int]:
    """Widths of the tables of a model by the power rule: ``d_f = max(1, round(λ·n_f^−α))`` with ``λ = d_0·min(n)^α``.

    Args:
        num_embeddings: n_f, the rows of each table.
        base_dim: d_0, the width of the smallest table.
        alpha: α, the temperature: 0 gives all tables one width.
        most: upper bound on the widths.
        powers: whether widths are rounded to powers of two.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a size or ``base_dim`` is not positive, or ``alpha`` is negative.

    Source: as :class:`MixedDimensionEmbedding`.
    """
    check_sequence("num_embeddings", num_embeddings)
    check_positive(**{f"num_embeddings[{i}]": n for i, n in enumerate(num_embeddings)})
    check_number("base_dim", base_dim)
    check_number("alpha", alpha)
    check_flag("powers", powers)
    if most is not None:
        check_positive(most=most)
    for name, number in (("base_dim", base_dim), ("alpha", alpha)):
        if not number < math.inf:
            raise ValueError(f"{name} must be finite, got {number}")
    if not 0 < base_dim <= MAX_SIZE:
        raise ValueError(f"base_dim must be positive and at most {MAX_SIZE}, got {base_dim}")
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    least = min(num_embeddings, default=1)
    widths = []
    for n in num_embeddings:
        width = max(1, round(base_dim * (least / n) ** float(alpha)))
        if powers:
            width = 2 ** round(torch.tensor(float(width)).log2().item())
        widths.append(width if most is None else min(width, most))
    return widths
