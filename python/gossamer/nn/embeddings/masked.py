"""Tables that learn which rows to keep and how wide a field must be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from gossamer._checks import check_index, check_number, check_positive, check_same_device, check_seed, check_sequence
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import check_budget, item_nbytes
from gossamer.ops.embedding import with_loss
from gossamer.optim import Optimizer


class MaskedEmbedding(FusedTable):
    """OptEmbed: rows below a trained norm are dropped, and only the first columns of a field are kept.

    ``ê(x) = e(x)·1[‖e(x)‖₁ > t]``, with the first ``width`` columns kept and the others zero. To train ``t``, the
    derivative of the step function at ``u = ‖e‖₁ − t`` is defined as ``2 − 4|u|`` up to |u| = 0.4, 0.4 up to 1, and 0
    beyond; a backward pass adds the gradient of ``regularization·exp(−t)``, which raises ``t``. With
    :attr:`sample_widths` each id of a call in training gets a random width, so that the table works with all widths in
    :func:`search_widths`.

    :meth:`freeze` stores the remaining rows in ``width`` columns, and 4 bytes per id for their positions. A table of
    :meth:`from_budget` ignores its threshold then and stores the :attr:`num_kept` rows with the largest norms;
    :meth:`keep_largest` sets the threshold to match.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        width: number of kept columns; D by default. The attribute can be changed at any time.
        regularization: coefficient of the threshold's regularisation; 10⁻⁵ in the paper.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the parameters.
        dtype: of the parameters.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step on the table into the backward pass. The threshold is
            an ordinary parameter.

    Attributes:
        weight: ``(N, D)``, the parameter; ``(kept, width)`` once frozen. It starts uniform in ``±1/√N``.
        threshold: ``t (1,)``, a parameter that starts at 0; None once frozen.
        row_of_id: ``(N,)`` int32, the stored row of each id, −1 for those dropped, once frozen; else None.
        sample_widths: whether widths are sampled in training.
        num_kept: number of rows that a table of :meth:`from_budget` serves; else None.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, ``width`` is above D, ``regularization`` is negative, or the mode is unknown.

    Source: Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction", CIKM 2022.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        width: int | None = None,
        *,
        regularization: float = 1e-5,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        width = embedding_dim if width is None else width
        check_positive(width=width)
        if width > embedding_dim:
            raise ValueError(f"width must be at most embedding_dim, {embedding_dim}, got {width}")
        check_number("regularization", regularization, least=0)
        self.width, self.regularization, self.sample_widths = width, regularization, False
        self.num_kept: int | None = None
        factory = factory_of(device, dtype)
        self.weight = new_parameter(num_embeddings, embedding_dim, **factory)
        self.threshold = new_parameter(1, **factory)
        self.register_buffer("row_of_id", None)
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Redraw the table, set the threshold back, and reset the optimizer."""
        bound = self.num_embeddings**-0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        torch.nn.init.zeros_(self.threshold)
        self._reset_state()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``ê (..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        check_index("ids", ids)
        flat = ids.reshape(-1)
        if self.frozen:
            check_same_device(table=self.weight, ids=ids)
            stored = self.row_of_id.index_select(0, flat)
            # Dropped ids read the first row, and the result is set to zero.
            rows = torch.nn.functional.embedding(stored.clamp(min=0), self.weight) if len(self.weight) else None
            if rows is None:
                return self.weight.new_zeros((*ids.shape, self.embedding_dim))
            rows = rows.masked_fill((stored < 0).unsqueeze(1), 0)
            rows = torch.nn.functional.pad(rows, (0, self.embedding_dim - rows.shape[1]))
            return rows.view(*ids.shape, self.embedding_dim)
        rows = self.rows("weight", flat)
        rows = rows * step_above(rows.abs().sum(1) - self.threshold).unsqueeze(1)
        columns = torch.arange(self.embedding_dim, device=ids.device)
        if self.training and self.sample_widths:
            widths = torch.randint(1, self.embedding_dim + 1, (flat.numel(), 1), device=ids.device)
            rows = rows * (columns < widths)
        elif self.width < self.embedding_dim:
            rows = rows * (columns < self.width)
        if self.regularization and self.training and torch.is_grad_enabled() and self.threshold.requires_grad:
            rows = with_loss(rows, self.regularization * (-self.threshold).exp().sum())
        return rows.view(*ids.shape, self.embedding_dim)

    def kept(self) -> torch.Tensor:
        """Which rows are currently above the threshold, ``(N,)`` bool."""
        if self.frozen:
            return self.row_of_id >= 0
        return self.weight.detach().abs().sum(1) > self.threshold.detach()

    @torch.no_grad()
    def set_share(self, share: float) -> None:
        """Set the threshold so that about this share of the rows, those with the largest norms, is kept.

        Raises:
            ValueError: ``share`` is not in (0, 1], or the table is frozen.
        """
        check_number("share", share)
        if not 0 < share <= 1 or self.frozen:
            form = "a frozen table" if self.frozen else f"{share}"
            raise ValueError(f"share must be in (0, 1], of a table in training, got {form}")
        self.keep_largest(max(1, int(share * self.num_embeddings)))

    @torch.no_grad()
    def keep_largest(self, count: int) -> None:
        """Set the threshold so that ``count`` rows, those of the largest norms, are kept; fewer if norms are equal.

        Raises:
            ValueError: ``count`` is not in [1, N], or the table is frozen.
        """
        check_positive(count=count)
        if count > self.num_embeddings or self.frozen:
            form = "a frozen table" if self.frozen else f"{count}"
            raise ValueError(f"count must be at most {self.num_embeddings}, of a table in training, got {form}")
        norms, dropped = self.weight.abs().sum(1), self.num_embeddings - count
        self.threshold.fill_(norms.kthvalue(dropped).values if dropped else norms.min() - 1)

    def inference_nbytes(self) -> int:
        """Bytes of the kept rows in :attr:`width` columns, and of their positions."""
        if self.frozen:
            return self.nbytes()
        rows = self.num_kept
        if rows is None:
            rows = self.num_embeddings if self.weight.is_meta else int(self.kept().sum())
        return rows * self.width * self.weight.element_size() + 4 * self.num_embeddings

    def freeze(self) -> MaskedEmbedding:
        """Keep only the rows above the threshold, in :attr:`width` columns."""
        if not self.frozen:
            if self.num_kept is not None:
                self.keep_largest(self.num_kept)
            kept = self.kept()
            rows = torch.where(kept, kept.cumsum(0) - 1, -1).int()
            self.detach_optimizer()
            stored = self.weight.detach()[kept, : self.width].clone()
            self.tables, self.threshold = (), None
            self.weight = torch.nn.Parameter(stored, requires_grad=False)
            self.row_of_id = rows
            self.frozen = True
        return self.eval()

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> MaskedEmbedding:
        """The narrowest table whose rows fill ``nbytes`` bytes, with a threshold that drops rows that do not fit.

        Raises the errors of :meth:`Table.from_budget`.
        """
        width, kept = cls._within(num_embeddings, embedding_dim, nbytes, options)
        made = cls(num_embeddings, embedding_dim, width, **options)
        made.num_kept = kept
        if not made.weight.is_meta:
            made.keep_largest(kept)
        return made

    @classmethod
    def size_within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> int:
        """As :meth:`Table.size_within`."""
        width, kept = cls._within(num_embeddings, embedding_dim, nbytes, options)
        return 4 * num_embeddings + kept * width * item_nbytes(options)

    @classmethod
    def _within(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, options: dict[str, object]
    ) -> tuple[int, int]:
        """The fewest columns whose rows fill a budget, and the number of rows that fit it."""
        check_budget(nbytes)
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        itemsize = item_nbytes(options)
        cls._check_fits((num_embeddings, embedding_dim), nbytes, 4 * num_embeddings + itemsize)
        left = (nbytes - 4 * num_embeddings) // itemsize
        width = min(embedding_dim, -(-left // num_embeddings))
        return width, min(num_embeddings, left // width)

    @classmethod
    def from_table(cls, weight: torch.Tensor, *, nbytes: int, **options: object) -> MaskedEmbedding:
        """The table for a budget, starting from trained weights ``(N, D)``."""
        made = cls._fit_weights(weight, nbytes, options)
        with torch.no_grad():
            made.weight.copy_(weight)
            if not made.weight.is_meta:
                made.keep_largest(made.num_kept)
                # Rows of equal norms are dropped together.
                made.num_kept = int(made.kept().sum())
        return made


class _StepAbove(torch.autograd.Function):
    """1 above 0 and 0 elsewhere, with OptEmbed's long-tailed derivative."""

    @staticmethod
    def forward(u: torch.Tensor) -> torch.Tensor:
        return (u > 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (u,) = ctx.saved_tensors
        distance = u.abs()
        slope = torch.where(distance <= 0.4, 2 - 4 * distance, torch.where(distance <= 1, 0.4, 0.0))
        return gradient * slope


def step_above(u: torch.Tensor) -> torch.Tensor:
    """``1[u > 0]`` with the derivative ``2 − 4|u|`` up to 0.4, 0.4 up to 1 and 0 beyond."""
    return _StepAbove.apply(u)


def search_widths(
    tables: Sequence[MaskedEmbedding],
    score: Callable[[], float],
    *,
    rounds: int = 30,
    keep: int = 15,
    mutations: int = 10,
    crossovers: int = 10,
    mutation_probability: float = 0.1,
    nbytes: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Search the widths of a model's tables by evolution, and set them.

    A generation consists of the ``keep`` best settings so far, mutants of them, in which each table draws a new width
    with ``mutation_probability``, and crossovers of two, which take the tables up to a random one from the first.

    Args:
        tables: the tables of a model that was trained with sampled widths.
        score: returns the model's score with the tables' current widths, on validation data; larger is better.
        rounds: number of generations.
        keep: number of survivors of a generation.
        mutations: number of mutants per generation.
        crossovers: number of crossovers per generation.
        mutation_probability: probability that a table's width mutates.
        nbytes: bound on the served bytes of all tables; None for no bound.
        seed: seed of all draws.

    Returns:
        The best widths found.

    Raises:
        TypeError: ``tables`` are not :class:`MaskedEmbedding`, ``score`` is not callable or gives no number, or an
            argument is not a number.
        ValueError: there is no table, a number is below 1, ``mutation_probability`` is not in [0, 1], or even one
            column of each table is larger than ``nbytes``.

    Source: as in :class:`MaskedEmbedding`.
    """
    check_sequence("tables", tables)
    if not tables:
        raise ValueError("tables must be at least one, got none")
    for table in tables:
        if not isinstance(table, MaskedEmbedding):
            raise TypeError(f"tables must be of gossamer.nn.MaskedEmbedding, got {type(table).__name__}")
    if not callable(score):
        raise TypeError(f"score must be callable, got {type(score).__name__}")
    if nbytes is not None:
        check_budget(nbytes)
    check_positive(rounds=rounds, keep=keep, mutations=mutations, crossovers=crossovers)
    check_number("mutation_probability", mutation_probability, least=0, most=1)
    check_seed(seed)
    draw = random.Random(seed)
    scored: dict[tuple[int, ...], float] = {}

    def place(widths: Sequence[int]) -> int:
        for table, width in zip(tables, widths, strict=True):
            table.width = width
        return sum(table.inference_nbytes() for table in tables)

    def consider(widths: tuple[int, ...]) -> None:
        if widths not in scored and (place(widths) <= nbytes if nbytes is not None else place(widths) >= 0):
            scored[widths] = score()
            check_number("score", scored[widths])

    before, least = [table.width for table in tables], (1,) * len(tables)
    if nbytes is not None and (needed := place(least)) > nbytes:
        place(before)
        raise ValueError(f"nbytes must be at least {needed} for one column of each table, got {nbytes}")
    consider(least)
    for _ in range(keep):
        consider(tuple(draw.randint(1, table.embedding_dim) for table in tables))
    for _ in range(rounds):
        best = sorted(scored, key=lambda widths: (-scored[widths], widths))[:keep]
        for _ in range(mutations):
            parent = draw.choice(best)
            consider(
                tuple(
                    draw.randint(1, table.embedding_dim) if draw.random() < mutation_probability else width
                    for table, width in zip(tables, parent, strict=True)
                )
            )
        for _ in range(crossovers):
            left, right = draw.choice(best), draw.choice(best)
            cut = draw.randint(0, len(tables))
            consider(left[:cut] + right[cut:])
    found = min(scored, key=lambda widths: (-scored[widths], widths))
    place(found)
    return list(found)
