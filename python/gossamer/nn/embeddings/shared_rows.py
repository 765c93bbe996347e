"""The base of tables whose vectors are composed of rows that several ids share."""

from __future__ import annotations

import torch

from gossamer._checks import check_index, check_positive, check_same_device
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.ops.composed_rows import OPERATIONS, Parts, composed_rows
from gossamer.optim import Optimizer


class SharedRowsTable(FusedTable):
    """A table of M rows where an id's vector is composed of H of them: ``e(x) = ω_h weight[addresses(x)_h]``.

    ω is the sum, the product or the concatenation, for which rows have D/H columns. A subclass defines the rows by
    :meth:`parts`, which kernels decode as they read ids, or by :meth:`addresses` if an id has one row. Rows that
    several ids share get the sum of their gradients, and an optimizer steps each once.

    Args:
        num_embeddings: N, the number of ids.
        embedding_dim: D.
        num_rows: M.
        rows_per_id: H.
        operation: ω: ``"add"``, ``"mul"`` or ``"concat"``.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the table.
        dtype: of the table.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step into the backward pass.

    Attributes:
        weight: ``(M, D)``, or ``(M, D/H)`` with ``"concat"``, the parameter. It starts uniform around zero, so that the
            entries of ``e(x)`` have the variance of numbers uniform in ``±1/√N``.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, the mode or operation is unknown, or D is not a multiple of H for ``"concat"``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_rows: int,
        rows_per_id: int = 1,
        *,
        operation: str = "add",
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_positive(num_rows=num_rows)
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {OPERATIONS}, got {operation!r}")
        if operation == "concat" and embedding_dim % rows_per_id:
            raise ValueError(
                f"embedding_dim must be a multiple of {rows_per_id}, the number of rows that are joined, got "
                f"{embedding_dim}"
            )
        self.num_rows, self.rows_per_id, self.operation = num_rows, rows_per_id, operation
        columns = embedding_dim // rows_per_id if operation == "concat" else embedding_dim
        factory = factory_of(device, dtype)
        self.weight = new_parameter(num_rows, columns, **factory)
        self.reset_parameters()
        self.attach(optimizer)

    #: Whether :meth:`addresses` reads or maps ids in one operator.
    quick_addresses = False

    def reset_parameters(self) -> None:
        """Redraw the rows and reset the optimizer."""
        variance = 1 / (3 * self.num_embeddings)
        if self.operation == "add":
            variance /= self.rows_per_id
        elif self.operation == "mul":
            # The variance of a product is the product of its factors' variances.
            variance **= 1 / self.rows_per_id
        bound = (3 * variance) ** 0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        self._reset_state()

    def parts(self) -> Parts | None:
        """How the H rows of an id are found; None if a subclass gives the single row by :meth:`addresses`."""
        return None

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows ``(*ids.shape, H)`` of ``ids``; ``ids.shape`` where H is 1."""
        parts = self.parts()
        if parts is None:
            raise NotImplementedError(f"{type(self).__name__} must define parts() or addresses(ids)")
        rows = composed_rows(ids, parts, self.num_rows)
        return rows.squeeze(-1) if self.rows_per_id == 1 else rows

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id outside the table.
        """
        check_index("ids", ids)
        check_same_device(weight=self.weight, ids=ids)
        if (parts := self.parts()) is None:
            return self.rows("weight", self.addresses(ids))
        return self.composed("weight", ids.reshape(-1), parts).view(*ids.shape, self.embedding_dim)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Find, combine and pool rows as ids are read; only maxima of combined rows store the vectors."""
        check_index("ids", ids)
        check_same_device(weight=self.weight, ids=ids)
        parts, one = self.parts(), self.rows_per_id == 1
        steps = self.optimizer is not None and torch.is_grad_enabled()
        # The step needs the row numbers again: storing them takes less time than computing them twice.
        if parts is None or (one and (self.mode == "max" or (steps and self.quick_addresses))):
            return self.bags("weight", self.addresses(ids), *lists, **how)
        if self.mode == "max":
            return super()._pool(ids, *lists, **how)
        return self.composed("weight", ids, parts, *lists, **how)

    def extra_repr(self) -> str:
        """Sizes and mode, and the optimizer, if any."""
        return self._repr(f"num_rows={self.num_rows}")

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> SharedRowsTable:
        """The table with the most rows, at most N, that fits ``nbytes`` bytes; raises the errors of
        :meth:`Table.from_budget`.
        """

        def make(rows: int, **more: object) -> SharedRowsTable:
            return cls(num_embeddings, embedding_dim, rows, **options | more)

        return cls._fit((num_embeddings, embedding_dim), nbytes, (1, num_embeddings), make)
