"""What tables have in common whose vectors are sums of rows that several ids share."""

from __future__ import annotations

import torch

from gossamer._checks import check_index, check_positive
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import POOLINGS, Table, fit_budget
from gossamer.optim import Optimizer


class SharedRowsTable(FusedTable):
    """A table of M rows where an id's vector is the sum of H of them: ``e(x) = Σ_h weight[addresses(x)_h]``.

    A subclass says which rows by :meth:`addresses`. Rows that several ids share get the sum of their gradients, and an
    optimizer steps each once.

    Args:
        num_embeddings: N, the number of ids.
        embedding_dim: D.
        num_rows: M.
        rows_per_id: H.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the table.
        dtype: of the table.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step into the backward pass.

    Attributes:
        weight: ``(M, D)``, the parameter. It starts uniform in ``±1/√N``, divided by √H.

    Raises:
        TypeError: a size is no int, or ``optimizer`` none of :mod:`gossamer.optim`.
        ValueError: a size is below 1, or the mode is unknown.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_rows: int,
        rows_per_id: int = 1,
        *,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_rows=num_rows)
        if mode not in POOLINGS:
            raise ValueError(f"mode must be one of {POOLINGS}, got {mode!r}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.num_rows, self.rows_per_id = num_rows, rows_per_id
        self.mode, self.include_last_offset = mode, include_last_offset
        self.weight = torch.nn.Parameter(torch.empty(num_rows, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Draw the rows anew, and start the optimizer anew."""
        bound = (self.num_embeddings * self.rows_per_id) ** -0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        self._reset_state()

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows ``(*ids.shape, H)`` of ``ids``; ``ids.shape`` where H is 1."""
        raise NotImplementedError(f"{type(self).__name__} must define addresses(ids)")

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id that the table does not know.
        """
        check_index("ids", ids)
        rows = self.addresses(ids)
        if self.rows_per_id == 1:
            return self.rows("weight", rows)
        found = self.bags("weight", rows.reshape(-1, self.rows_per_id))
        return found.view(*ids.shape, self.embedding_dim)

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bags, as :meth:`Table.forward`; the vectors are summed as they are read, none is stored."""
        check_index("ids", ids)
        times = self.rows_per_id
        if times > 1 and self.mode == "max":
            return Table.forward(self, ids, offsets, per_sample_weights)
        rows = self.addresses(ids)
        how = {"mode": self.mode, "include_last_offset": self.include_last_offset}
        if times == 1:
            return self.bags("weight", rows, offsets, per_sample_weights, **how)
        # A bag lists the H rows of each of its ids, so the mean of a bag of ids is H times that of its rows.
        weights = None if per_sample_weights is None else per_sample_weights.repeat_interleave(times, -1)
        ends = None if offsets is None else offsets * times
        pooled = self.bags("weight", rows.flatten(-2), ends, weights, **how)
        return pooled * times if self.mode == "mean" else pooled

    def extra_repr(self) -> str:
        """Sizes and mode, and the optimizer where there is one."""
        sizes = f"{self.num_embeddings}, {self.embedding_dim}, num_rows={self.num_rows}, mode={self.mode!r}"
        return sizes + (f", optimizer={self.optimizer}" if self.optimizer else "")

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> SharedRowsTable:
        """The table of the most rows, N at most, that fits ``nbytes`` bytes; raises as :meth:`Table.from_budget`."""

        def size_of(rows: int) -> int:
            return cls(num_embeddings, embedding_dim, rows, **options | {"device": "meta"}).inference_nbytes()

        name = f"{cls.__name__} with {num_embeddings} embeddings of {embedding_dim}"
        return cls(num_embeddings, embedding_dim, fit_budget(nbytes, 1, num_embeddings, size_of, name), **options)
