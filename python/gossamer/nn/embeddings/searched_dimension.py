"""Tables whose width is searched during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer._checks import check_flags, check_index, check_number, check_positive, check_sequence, check_sizes
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.narrow_rows import NarrowRowsTable, fit_narrow, narrow_nbytes
from gossamer.nn.embeddings.table import check_budget
from gossamer.optim import Optimizer


class SearchedDimensionEmbedding(NarrowRowsTable):
    """AutoDim: tables of several widths, mixed with trained shares; in the end the best one is kept.

    During the search, ``e(x) = Σ_j p_j·BN(A_j·W_j[x])`` over the candidates, where ``W_j`` has ``d_j`` columns, ``A_j``
    is ``(D, d_j)``, BN normalises over the ids of a call with their repetitions, without scale and shift, and ``p =
    softmax((ln α + g)/τ)`` with Gumbel noise g in training. Train :attr:`alpha` on validation batches and everything
    else on training batches, and lower :attr:`temperature` with :meth:`temperature_at`.

    :meth:`choose` keeps the candidate with the largest α: from then on ``e(x) = A·W[x] + b``, with a table that starts
    from new values, as in the paper, or continues from the searched one. A table with a :attr:`budget` keeps as many
    columns as fit, the last one for some rows only; :func:`choose_widths` divides the budgets of several tables among
    them by the results of their searches. The search holds the bytes of all candidates: it gives a small table, but
    does not save memory in training.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        candidates: the widths ``d_j``, at most D.
        temperature: initial τ.
        norm: whether candidates are batch-normalised.
        noise: whether shares are perturbed by noise in training.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the parameters.
        dtype: of the parameters.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step on the tables into the backward pass.

    Attributes:
        alpha: ``(C,)``, a parameter: ln α, which starts at 0; None once a candidate is chosen.
        chosen: the width that was chosen, or None.
        budget: bytes to serve, of a table of :meth:`from_budget`; else None.
        tables: names of the tables, ``weight_<width>``; only the chosen rows afterwards.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, ``candidates`` are empty, repeated or above D, ``temperature`` is not
            positive, or the mode is unknown.

    Source: Zhao et al., "AutoDim: Field-aware Embedding Dimension Search in Recommender Systems", WWW 2021.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        candidates: Sequence[int] = (2, 4, 8, 16),
        *,
        temperature: float = 1.0,
        norm: bool = True,
        noise: bool = True,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_sequence("candidates", candidates)
        check_number("temperature", temperature, above=0, finite=True)
        check_flags(norm=norm, noise=noise)
        candidates = tuple(candidates)
        check_positive(**{f"candidates[{i}]": width for i, width in enumerate(candidates)})
        if not candidates or len(set(candidates)) < len(candidates) or max(candidates) > embedding_dim:
            raise ValueError(f"candidates must be different widths up to {embedding_dim}, got {candidates}")
        self.candidates, self.temperature, self.norm, self.noise = candidates, temperature, norm, noise
        self.chosen: int | None = None
        self.budget: int | None = None
        factory = factory_of(device, dtype)
        self.tables = tuple(f"weight_{width}" for width in candidates)
        for width, name in zip(candidates, self.tables, strict=True):
            setattr(self, name, new_parameter(num_embeddings, width, **factory))
            projection = new_parameter(embedding_dim, width, **factory)
            self.register_parameter(f"projection_{width}", projection)
        self.alpha = new_parameter(len(candidates), **factory)
        self.norms = None
        if norm:
            norms = [torch.nn.BatchNorm1d(embedding_dim, affine=False, **factory) for _ in candidates]
            self.norms = torch.nn.ModuleList(norms)
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Redraw tables and projections, and start shares, statistics and the optimizer again."""
        bound = self.num_embeddings**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                torch.nn.init.uniform_(parameter, -bound, bound)
            elif name.startswith("projection"):
                torch.nn.init.uniform_(parameter, -((3 / parameter.shape[1]) ** 0.5), (3 / parameter.shape[1]) ** 0.5)
            else:
                torch.nn.init.zeros_(parameter)
        for norm in self.norms or ():
            norm.reset_running_stats()
        self._reset_state()

    @staticmethod
    def temperature_at(step: int, batch_size: int) -> float:
        """The published τ at a step: ``max(0.01, 1 − 5·10⁻⁵·step·batch_size/2000)``."""
        return max(0.01, 1 - 5e-5 * step * batch_size / 2000)

    def shares(self) -> torch.Tensor:
        """``p (C,)``: with noise in training where :attr:`noise` is set.

        Raises:
            ValueError: a candidate was chosen.
        """
        if self.alpha is None:
            raise ValueError(f"shares are for a table that searches, got one that chose the width {self.chosen}")
        scores = self.alpha
        if self.noise and self.training:
            uniform = torch.rand_like(scores).clamp_(torch.finfo(scores.dtype).tiny, 1 - torch.finfo(scores.dtype).eps)
            scores = scores - (-uniform.log()).log()
        return (scores / self.temperature).softmax(0)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            ValueError: candidates are normalised over one id in training.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        check_index("ids", ids)
        flat = ids.reshape(-1)
        linear = torch.nn.functional.linear
        if self.chosen is not None:
            return self._vectors(flat).view(*ids.shape, self.embedding_dim)
        if self.norms is not None and self.training and flat.numel() == 1:
            raise ValueError("ids must be at least two in training with norm=True, which normalises over them, got 1")
        total = 0
        for j, (width, name, share) in enumerate(zip(self.candidates, self.tables, self.shares(), strict=True)):
            part = linear(self.rows(name, flat), getattr(self, f"projection_{width}"))
            if self.norms is not None and flat.numel():
                part = self.norms[j](part)
            total = total + share * part
        return total.view(*ids.shape, self.embedding_dim)

    def _best(self) -> tuple[int, int]:
        """The columns, and the rows of one more, that :meth:`choose` would keep now; on meta the first candidate."""
        if self.budget is None:
            return self.candidates[0 if self.alpha.is_meta else int(self.alpha.argmax())], 0
        return self._fitting(self.budget)

    def _fitting(self, nbytes: int) -> tuple[int, int]:
        """The most columns within a budget, and the number of rows with one more."""
        most, itemsize = max(self.candidates), self.alpha.element_size()
        sizes = self.num_embeddings, self.embedding_dim
        self._check_fits(sizes, nbytes, self.size_of(1))
        width, wide_rows = fit_narrow(sizes, nbytes, itemsize, most, bias=True)
        return width, wide_rows if width < most else 0

    def size_of(self, width: int, wide_rows: int = 0) -> int:
        """Bytes served with ``width`` columns and one more in ``wide_rows`` rows."""
        itemsize = (self.alpha if self.chosen is None else self.weight).element_size()
        return narrow_nbytes(self.num_embeddings, self.embedding_dim, width, wide_rows, itemsize, bias=True)

    def choose(self, width: int | None = None, *, wide_rows: int = 0, restart: bool = True) -> int:
        """Keep one width and drop the candidates; returns the width.

        Args:
            width: one of the candidates, by default that of the largest α. With a :attr:`budget` any width up to the
                widest candidate, by default what the budget holds.
            wide_rows: number of ids, from the first, with one column more; only for a given ``width`` and a budget.
            restart: whether the table is redrawn, as in the paper. Otherwise it continues from the first columns of the
                narrowest candidate that has as many. The projection continues in either case, and the bias starts at 0.

        Raises:
            ValueError: a width was chosen before, or ``width`` or ``wide_rows`` does not fit.
        """
        if self.chosen is not None:
            raise ValueError(f"choose is for a table that searches, got one that chose the width {self.chosen}")
        if width is None:
            width, wide_rows = self._best()
        check_positive(width=width)
        check_sizes(wide_rows=wide_rows)
        if self.budget is None and (width not in self.candidates or wide_rows):
            got = f"{width}" + (f" with wide_rows={wide_rows}" if wide_rows else "")
            raise ValueError(f"width must be one of the candidates {self.candidates} without a budget, got {got}")
        columns, most = width + (wide_rows > 0), max(self.candidates)
        if columns > most or wide_rows > self.num_embeddings:
            raise ValueError(
                f"width and wide_rows must be at most {most} columns, of at most {self.num_embeddings} rows, got "
                f"{width} and {wide_rows}"
            )
        source = min(candidate for candidate in self.candidates if candidate >= columns)
        weight, projection = getattr(self, f"weight_{source}").detach(), getattr(self, f"projection_{source}").detach()
        optimizer = self.optimizer
        self.detach_optimizer()
        for candidate in self.candidates:
            delattr(self, f"weight_{candidate}")
            delattr(self, f"projection_{candidate}")
        self.alpha, self.norms, self.chosen = None, None, width
        if restart:
            bound = self.num_embeddings**-0.5
            weight.uniform_(-bound, bound)
        rows, extra = weight[:, :width], weight[:wide_rows, width:columns] if wide_rows else None
        if columns < source or extra is not None:
            # A view would keep the storage of all columns.
            rows, extra, projection = (t if t is None else t.clone() for t in (rows, extra, projection[:, :columns]))
        self._set_rows(rows, extra, projection, projection.new_zeros(self.embedding_dim))
        self.attach(optimizer)
        return width

    def inference_nbytes(self) -> int:
        """Bytes of what was chosen, or of what would be chosen now."""
        return super().inference_nbytes() if self.chosen is not None else self.size_of(*self._best())

    def freeze(self) -> SearchedDimensionEmbedding:
        """As for any table; a table that still searches first chooses its width, and keeps what it has learnt."""
        if self.chosen is None:
            self.choose(restart=False)
        return super().freeze()

    def extra_repr(self) -> str:
        """Sizes, candidates and mode, and the optimizer, if any."""
        widths = f"candidates={self.candidates}" if self.chosen is None else f"chosen={self.chosen}"
        wide = [f"wide_rows={self.wide_rows}"] if self.wide_rows else []
        return self._repr(widths, *wide)

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> SearchedDimensionEmbedding:
        """The table that searches among candidates and serves ``nbytes`` bytes, its :attr:`budget`.

        ``candidates`` are by default the powers of two below D, and D. Some may exceed the budget, because
        :func:`choose_widths` can give a table more than its own share. Raises the errors of :meth:`Table.from_budget`.
        """
        check_budget(nbytes)
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        widths = options.pop("candidates", None)
        if widths is None:
            widths = [2**power for power in range(1, (embedding_dim - 1).bit_length())] + [embedding_dim]
        made = cls(num_embeddings, embedding_dim, widths, **options | {"device": "meta"})
        made._fitting(nbytes)
        if torch.device(options.get("device") or torch.get_default_device()).type != "meta":
            made = cls(num_embeddings, embedding_dim, widths, **options)
        made.budget = nbytes
        return made


def choose_widths(
    tables: Sequence[SearchedDimensionEmbedding], nbytes: int | None = None, *, restart: bool = True
) -> list[int]:
    """Choose the widths of searching tables under one budget, and return them.

    Every table starts with one column. Then the wider candidate with the largest gain per byte,
    ``(ln α_wider − ln α)/Δbytes``, is taken as long as any fits. The remaining bytes go into columns between the
    candidates, and into one column more for some rows, in the order of these gains.

    Args:
        tables: the searching tables of a model.
        nbytes: what all of them serve together; by default the sum of their budgets.
        restart: as in :meth:`SearchedDimensionEmbedding.choose`.

    Raises:
        TypeError: ``nbytes`` is not an int.
        ValueError: there is no table, a table does not search, ``nbytes`` is None and a table has no budget, or one
            column of each table is larger than ``nbytes``.

    Source: as :class:`SearchedDimensionEmbedding`; the paper has no budget.
    """
    if not tables:
        raise ValueError("tables must be at least one, got none")
    for table in tables:
        if table.chosen is not None:
            raise ValueError(f"tables must search, got one that chose the width {table.chosen}")
    if nbytes is None:
        if any(table.budget is None for table in tables):
            raise ValueError("nbytes must be given where a table has no budget, got None")
        nbytes = sum(table.budget for table in tables)
    check_budget(nbytes)
    # A single column gets the score of the narrowest candidate.
    scores = []
    for table in tables:
        own = dict(zip(table.candidates, table.alpha.tolist(), strict=True))
        scores.append({1: own[min(own)]} | own)
    widths = [1] * len(tables)
    left = nbytes - sum(table.size_of(1) for table in tables)
    if left < 0:
        raise ValueError(f"nbytes must be at least {nbytes - left} for one column of each table, got {nbytes}")

    def gain(place: int, width: int) -> float:
        now = widths[place]
        return (scores[place][width] - scores[place][now]) / (tables[place].size_of(width) - size(place))

    def size(place: int) -> int:
        return tables[place].size_of(widths[place])

    def wider(fits: bool) -> list[tuple[float, int, int]]:
        """``(−gain, width, table)`` of the wider candidates, or only those that fit, the largest gain first."""
        found = [
            (-gain(place, width), width, place)
            for place, table in enumerate(tables)
            for width in scores[place]
            if width > widths[place] and (not fits or table.size_of(width) - size(place) <= left)
        ]
        return sorted(found)

    while found := wider(fits=True):
        _, width, place = found[0]
        left -= tables[place].size_of(width) - size(place)
        widths[place] = width
    chosen = [(width, 0) for width in widths]
    for place in dict.fromkeys(place for _, _, place in wider(fits=False)):
        own = size(place)
        chosen[place] = tables[place]._fitting(own + left)
        left -= tables[place].size_of(*chosen[place]) - own
    for table, (width, wide_rows) in zip(tables, chosen, strict=True):
        table.budget = table.size_of(width, wide_rows)
        table.choose(width, wide_rows=wide_rows, restart=restart)
    return [width for width, _ in chosen]
