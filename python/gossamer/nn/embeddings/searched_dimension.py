"""Tables whose width is searched during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer._checks import check_flags, check_index, check_number, check_positive, check_sequence
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import check_budget, item_nbytes
from gossamer.optim import Optimizer


class SearchedDimensionEmbedding(FusedTable):
    """AutoDim: tables of several widths, mixed with trained shares; in the end the best one is kept.

    During the search, ``e(x) = Σ_j p_j·BN(A_j·W_j[x])`` over the candidates, where ``W_j`` has ``d_j`` columns, ``A_j``
    is ``(D, d_j)``, BN normalises over the ids of a call with their repetitions, without scale and shift, and ``p =
    softmax((ln α + g)/τ)`` with Gumbel noise g in training. Train :attr:`alpha` on validation batches and everything
    else on training batches, and lower :attr:`temperature` with :meth:`temperature_at`.

    :meth:`choose` keeps the candidate with the largest α: from then on ``e(x) = A·W[x] + b``, with a table that starts
    from new values, as in the paper, or continues from the searched one. The search holds the bytes of all candidates:
    it gives a small table, but does not save memory in training.

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
        tables: names of the tables, ``weight_<width>``; only ``weight`` once a width is chosen.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, ``candidates`` are none, not distinct or above D, ``temperature`` is not
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
        factory = {"device": device, "dtype": dtype}
        self.tables = tuple(f"weight_{width}" for width in candidates)
        for width, name in zip(candidates, self.tables, strict=True):
            setattr(self, name, torch.nn.Parameter(torch.empty(num_embeddings, width, **factory)))
            projection = torch.nn.Parameter(torch.empty(embedding_dim, width, **factory))
            self.register_parameter(f"projection_{width}", projection)
        self.alpha = torch.nn.Parameter(torch.empty(len(candidates), **factory))
        self.register_parameter("bias", None)
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
            return linear(self.rows("weight", flat), self.projection, self.bias).view(*ids.shape, self.embedding_dim)
        total = 0
        for j, (width, name, share) in enumerate(zip(self.candidates, self.tables, self.shares(), strict=True)):
            part = linear(self.rows(name, flat), getattr(self, f"projection_{width}"))
            if self.norms is not None and flat.numel():
                part = self.norms[j](part)
            total = total + share * part
        return total.view(*ids.shape, self.embedding_dim)

    def _best(self) -> int:
        """The width of the largest α; the first candidate's where there are no values."""
        return self.candidates[0 if self.alpha.is_meta else int(self.alpha.argmax())]

    def choose(self, width: int | None = None, *, restart: bool = True) -> int:
        """Keep one candidate, by default the one with the largest α, and drop the others; return its width.

        Args:
            width: one of the candidates.
            restart: whether its table is initialised again, as in the paper; otherwise it continues from the searched
                one. Its projection continues in either case, and the bias starts at 0.

        Raises:
            ValueError: a candidate was chosen before, or ``width`` is none of them.
        """
        if self.chosen is not None:
            raise ValueError(f"choose is for a table that searches, got one that chose the width {self.chosen}")
        width = self._best() if width is None else width
        if width not in self.candidates:
            raise ValueError(f"width must be one of the candidates {self.candidates}, got {width}")
        weight, projection = getattr(self, f"weight_{width}").detach(), getattr(self, f"projection_{width}").detach()
        optimizer = self.optimizer
        self.detach_optimizer()
        for candidate in self.candidates:
            delattr(self, f"weight_{candidate}")
            delattr(self, f"projection_{candidate}")
        self.tables, self.alpha, self.norms, self.chosen = ("weight",), None, None, width
        if restart:
            bound = self.num_embeddings**-0.5
            weight.uniform_(-bound, bound)
        self.weight, self.projection = torch.nn.Parameter(weight), torch.nn.Parameter(projection)
        self.bias = torch.nn.Parameter(projection.new_zeros(self.embedding_dim))
        self.attach(optimizer)
        return width

    def inference_nbytes(self) -> int:
        """Bytes of the chosen candidate, or of the one that would currently be chosen."""
        if self.chosen is not None:
            return super().inference_nbytes()
        width = self._best()
        numbers = self.num_embeddings * width + self.embedding_dim * (width + 1)
        return numbers * self.alpha.element_size()

    def freeze(self) -> SearchedDimensionEmbedding:
        """As for any table; if the search is not finished, the currently best candidate is kept first."""
        if self.chosen is None:
            self.choose(restart=False)
        return super().freeze()

    def extra_repr(self) -> str:
        """Sizes, candidates and mode, and the optimizer, if any."""
        return self._repr(f"candidates={self.candidates}" if self.chosen is None else f"chosen={self.chosen}")

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> SearchedDimensionEmbedding:
        """The table that searches among the candidates that fit ``nbytes`` bytes when served.

        Initially the widest of them would be chosen. Raises the errors of :meth:`Table.from_budget`.
        """
        check_budget(nbytes)
        widths = options.pop("candidates", None) or [w for w in (2, 4, 8, 16) if w <= embedding_dim] or [embedding_dim]
        itemsize = item_nbytes(options)

        def size_of(width: int) -> int:
            return itemsize * (num_embeddings * width + embedding_dim * (width + 1))

        cls._check_fits((num_embeddings, embedding_dim), nbytes, min(map(size_of, widths)))
        fitting = sorted((width for width in widths if size_of(width) <= nbytes), reverse=True)
        return cls(num_embeddings, embedding_dim, fitting, **options)
