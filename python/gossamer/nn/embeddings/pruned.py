"""Tables with mostly zero entries: trained dense, served as their nonzero entries."""

from __future__ import annotations

import torch

from gossamer._checks import (
    check_id_range,
    check_index,
    check_number,
    check_positive,
    check_same_device,
    check_shape,
)
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import check_budget, item_nbytes
from gossamer.optim import Optimizer

CRITERIA = ("magnitude", "group_scales", "thresholds")
SHAPES = ("table", "column", "row", "entry")


class SparseRows(torch.nn.Module):
    """Rows with few kept entries, stored in buffers.

    Args:
        kept: ``(N, D)`` bool, the entries to keep.
        dense: ``(N, D)``, the values.
        by_row: whether to store the first entry of each row, 4 bytes per row, instead of the row of each entry, 4 bytes
            per entry: see :func:`kept_entries`.

    Attributes:
        values: ``(K,)``, row by row.
        columns: ``(K,)`` uint8 for D up to 256, else int32.
        rows: ``(N+1,)`` int32, the first entry of each row, or ``(K,)`` int32, the row of each entry.
    """

    def __init__(self, kept: torch.Tensor, dense: torch.Tensor, by_row: bool) -> None:
        super().__init__()
        (self.num_rows, self.num_columns), self.by_row = dense.shape, by_row
        row, column = kept.nonzero(as_tuple=True)
        counts = kept.sum(1)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        self.register_buffer("values", dense[row, column].clone())
        self.register_buffer("columns", column.to(torch.uint8 if self.num_columns <= 256 else torch.int32))
        self.register_buffer("rows", starts if by_row else row.int())
        self.widest = self._widest()

    def _widest(self) -> int:
        """The largest number of entries of a row."""
        counts = self.rows.diff() if self.by_row else self.rows.bincount()
        return int(counts.max()) if counts.numel() else 0

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.widest = self._widest()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Dense rows ``(L, D)`` of ``ids (L,)``."""
        if self.by_row:
            first, last = self.rows[:-1].index_select(0, ids), self.rows[1:].index_select(0, ids)
        else:
            check_id_range("ids", ids, self.num_rows, "N")
            wanted = ids.int()
            first, last = torch.searchsorted(self.rows, wanted), torch.searchsorted(self.rows, wanted, right=True)
        places = first.unsqueeze(1) + torch.arange(self.widest, device=ids.device)
        live = places < last.unsqueeze(1)
        places = places.masked_fill(~live, 0).flatten()
        if not self.values.numel():
            return self.values.new_zeros(ids.shape[0], self.num_columns)
        values = self.values.index_select(0, places).view(live.shape)
        # Positions beyond a row's last entry go to an extra column, which is dropped.
        columns = self.columns.index_select(0, places).long().view(live.shape).masked_fill(~live, self.num_columns)
        wide = values.new_zeros(ids.shape[0], self.num_columns + 1)
        return wide.scatter(1, columns, values)[:, :-1]


def kept_entries(num_embeddings: int, embedding_dim: int, nbytes: int, itemsize: int) -> tuple[int, bool]:
    """The most entries that fit a budget, and whether storing row starts, not a row per entry, reaches that number."""
    entry = itemsize + (1 if embedding_dim <= 256 else 4)
    by_row, by_entry = (nbytes - 4 * (num_embeddings + 1)) // entry, nbytes // (entry + 4)
    most = num_embeddings * embedding_dim
    return min(max(by_row, by_entry), most), by_row >= by_entry


def _sparse_nbytes(num_embeddings: int, embedding_dim: int, kept: int, itemsize: int) -> int:
    entry = itemsize + (1 if embedding_dim <= 256 else 4)
    return kept * entry + 4 * min(num_embeddings + 1, kept)


class PrunedEmbedding(FusedTable):
    """A dense table in training whose largest entries are served.

    The looked-up values in training depend on the criterion:

    - ``"magnitude"``: ``ê = e``. :meth:`prune` sets the smallest entries to zero during training, a share of ``R·(1 −
      0.99^(t/100))`` of all entries at step t with ``R = 1 − density``; they may grow again until the next call
      (DeepLight).
    - ``"group_scales"``: ``ê = α_g ⊙ e`` with a vector ``α_g`` for each of G groups of ids with similar frequency.
      Train :attr:`scales` on validation data, with :meth:`clip_scales` after each step (AutoSrh).
    - ``"thresholds"``: ``ê = sign(e)·relu(|e| − σ(s))`` with trained ``s``, one per table, column, row or entry (PEP).

    :meth:`sparsify` then keeps the share ``density`` of entries with the largest ``|ê|``, and training continues with
    only these. :meth:`freeze` stores the kept entries with their columns, and either row starts or, if few entries per
    row remain, each entry's row; lookups read this form.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        density: share of the N·D entries that are served, in (0, 1].
        criterion: one of these names.
        frequencies: ``(N,)``, number of occurrences of each id, for ``"group_scales"``; None if ids are in descending
            order of frequency.
        num_groups: G.
        threshold_shape: ``"table"``, ``"column"``, ``"row"`` or ``"entry"``.
        initial_threshold: initial ``s``. σ(−15) is 3·10⁻⁷; for much smaller values its gradient vanishes.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the parameters.
        dtype: of the parameters.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step on the table, and on thresholds of rows or entries,
            into the backward pass.

    Attributes:
        weight: ``(N, D)``, the parameter until it is frozen. It starts uniform in ``±1/√N``.
        scales: ``(G, D)``, a parameter that starts at 1, or None.
        thresholds: ``s``, a parameter ``(1, 1)``, ``(1, D)``, ``(N, 1)`` or ``(N, D)``, or None.
        mask: ``(N, D)`` bool once :meth:`sparsify` was called, a buffer, else None.
        served: :class:`SparseRows` once it is frozen, else None.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, ``density`` is not in (0, 1], a name is unknown, or ``frequencies`` have another
            shape.

    Source: Deng et al., "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in Ad
    Serving", WSDM 2021; Kong et al., "AutoSrh: An Embedding Dimensionality Search Framework for Tabular Data
    Prediction", TKDE 2022; Liu et al., "Learnable Embedding Sizes for Recommender Systems", ICLR 2021.
    """

    tables = ("weight",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        density: float,
        *,
        criterion: str = "magnitude",
        frequencies: torch.Tensor | None = None,
        num_groups: int = 6,
        threshold_shape: str = "row",
        initial_threshold: float = -15.0,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_positive(num_groups=num_groups)
        check_number("density", density)
        check_number("initial_threshold", initial_threshold)
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        for name, value, known in (("criterion", criterion, CRITERIA), ("threshold_shape", threshold_shape, SHAPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        self.density, self.criterion = density, criterion
        self.num_groups, self.initial_threshold = num_groups, initial_threshold
        factory = factory_of(device, dtype)
        self.weight = new_parameter(num_embeddings, embedding_dim, **factory)
        scales = thresholds = groups = None
        if criterion == "group_scales":
            scales = new_parameter(num_groups, embedding_dim, **factory)
            groups = _groups(num_embeddings, num_groups, frequencies).to(self.weight.device)
        elif criterion == "thresholds":
            shape = {"table": (1, 1), "column": (1, embedding_dim), "row": (num_embeddings, 1)}
            thresholds = new_parameter(*shape.get(threshold_shape, self.weight.shape), **factory)
            if threshold_shape in ("row", "entry"):
                self.tables = ("weight", "thresholds")
        self.register_parameter("scales", scales)
        self.register_parameter("thresholds", thresholds)
        self.register_buffer("group_of_id", groups)
        self.register_buffer("mask", None)
        self.served: SparseRows | None = None
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Redraw the table, set scales and thresholds back, forget the mask, and reset the optimizer."""
        bound = self.num_embeddings**-0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.scales is not None:
            torch.nn.init.ones_(self.scales)
        if self.thresholds is not None:
            torch.nn.init.constant_(self.thresholds, self.initial_threshold)
        self.mask = None
        self._reset_state()

    @property
    def num_kept(self) -> int:
        """Number of served entries."""
        return max(1, int(self.density * self.num_embeddings * self.embedding_dim))

    def _judged(self, rows: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """``ê`` of the table's ``rows``, which are those of ``ids (L,)``, or all rows if ``ids`` is None."""
        if self.scales is not None:
            groups = self.group_of_id if ids is None else self.group_of_id.index_select(0, ids)
            rows = rows * self.scales[groups.long()]
        if self.thresholds is not None:
            is_by_id = ids is not None and "thresholds" in self.tables
            thresholds = self.rows("thresholds", ids) if is_by_id else self.thresholds
            rows = rows.sign() * (rows.abs() - thresholds.sigmoid()).relu()
        if self.mask is not None:
            rows = rows * (self.mask if ids is None else self.mask.index_select(0, ids))
        return rows

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``ê (..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        check_index("ids", ids)
        flat = ids.reshape(-1)
        if self.served is not None:
            check_same_device(table=self.served.values, ids=ids)
            return self.served.lookup(flat).view(*ids.shape, self.embedding_dim)
        return self._judged(self.rows("weight", flat), flat).view(*ids.shape, self.embedding_dim)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Pool rows as they are read if they are the vectors: with ``"magnitude"``, before :meth:`sparsify`."""
        if self.served is None and self.mask is None and self.criterion == "magnitude":
            return self.bags("weight", ids, *lists, **how)
        return super()._pool(ids, *lists, **how)

    def sparsity(self, step: int) -> float:
        """The share of zeros that :meth:`prune` leaves at a step: ``(1 − density)·(1 − 0.99^(step/100))``."""
        return (1 - self.density) * (1 - 0.99 ** (step / 100))

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Set the smallest entries to zero, as many as :meth:`sparsity` gives for the step.

        Raises:
            ValueError: the criterion is not ``"magnitude"``, or the table is frozen.
        """
        if self.criterion != "magnitude" or self.frozen:
            raise ValueError(f"prune is for tables in training by 'magnitude', got {self._form()}")
        zeros = int(self.sparsity(step) * self.weight.numel())
        self.weight.mul_(_largest(self.weight.abs(), self.weight.numel() - zeros))

    @torch.no_grad()
    def clip_scales(self) -> None:
        """Clamp scales to [0, 1].

        Raises:
            ValueError: the criterion is not ``"group_scales"``.
        """
        if self.scales is None:
            raise ValueError(f"clip_scales is for criterion='group_scales', got {self._form()}")
        self.scales.clamp_(0, 1)

    @torch.no_grad()
    def sparsify(self, restart_from: torch.Tensor | None = None) -> None:
        """Keep the share ``density`` of the largest entries of ``ê``, and train only these from now on.

        Scales and thresholds are folded into the table and dropped.

        Args:
            restart_from: ``(N, D)``, values to which the kept entries are reset, such as the table's initial values.

        Raises:
            ValueError: ``restart_from`` has another shape, or the table is frozen.
        """
        if self.frozen:
            raise ValueError("sparsify is for tables in training, got a frozen one")
        judged = self._judged(self.weight, None)
        mask = _largest(judged.abs(), self.num_kept)
        if restart_from is not None:
            check_shape("restart_from", restart_from, tuple(self.weight.shape), "(N, D)")
            judged = restart_from
        self.weight.copy_(judged * mask)
        self.mask = mask
        optimizer = self.optimizer
        self.detach_optimizer()
        self.tables, self.scales, self.thresholds, self.group_of_id = ("weight",), None, None, None
        self.criterion = "magnitude"
        self.attach(optimizer)

    def _form(self) -> str:
        return "a frozen one" if self.frozen else f"criterion={self.criterion!r}"

    def inference_nbytes(self) -> int:
        """Bytes of the kept entries with their positions."""
        if self.served is not None:
            return self.nbytes()
        return _sparse_nbytes(self.num_embeddings, self.embedding_dim, self.num_kept, self.weight.element_size())

    def freeze(self) -> PrunedEmbedding:
        """Keep only the served entries; calls :meth:`sparsify` first if it was not called."""
        if self.served is None:
            if self.mask is None:
                self.sparsify()
            self.detach_optimizer()
            by_row = self.num_kept >= self.num_embeddings + 1
            self.served = SparseRows(self.mask, self.weight.detach() * self.mask, by_row)
            self.tables, self.weight, self.mask = (), None, None
        self.frozen = True
        return self.eval()

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> PrunedEmbedding:
        """The table with the most entries that fits ``nbytes`` bytes when served; raises the errors of
        :meth:`Table.from_budget`.
        """
        check_budget(nbytes)
        sizes, itemsize = (num_embeddings, embedding_dim), item_nbytes(options)
        cls._check_fits(sizes, nbytes, _sparse_nbytes(*sizes, 1, itemsize))
        kept, _ = kept_entries(*sizes, nbytes, itemsize)
        # Half an entry is added, so that rounding the share down gives this number again.
        most = num_embeddings * embedding_dim
        return cls(num_embeddings, embedding_dim, min(1.0, (kept + 0.5) / most), **options)

    @classmethod
    def from_table(cls, weight: torch.Tensor, *, nbytes: int, **options: object) -> PrunedEmbedding:
        """The table that a budget gives, starting from trained weights ``(N, D)``."""
        made = cls._fit_weights(weight, nbytes, options)
        with torch.no_grad():
            made.weight.copy_(weight)
        return made


def _largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the ``count`` largest entries; among equal entries the first."""
    flat = magnitudes.reshape(-1)
    if count >= flat.numel():
        return torch.ones_like(magnitudes, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    least = flat.kthvalue(flat.numel() - count + 1).values
    above = flat > least
    ties = flat == least
    wanted = count - above.sum()
    return (above | (ties & (ties.cumsum(0) <= wanted))).view_as(magnitudes)


def _groups(num_embeddings: int, num_groups: int, frequencies: torch.Tensor | None) -> torch.Tensor:
    """The group of each id, uint8: G parts of about one size by descending frequency."""
    check_positive(num_groups=num_groups)
    if num_groups > 256:
        raise ValueError(f"num_groups must be at most 256, got {num_groups}")
    rank = torch.arange(num_embeddings, device="cpu")
    if frequencies is not None:
        check_shape("frequencies", frequencies, (num_embeddings,), "(N,)")
        order = frequencies.cpu().argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, rank)
    return (rank * num_groups // num_embeddings).to(torch.uint8)
