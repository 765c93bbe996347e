"""The role of an embedding table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossamer._checks import check_dtype, check_flags, check_index, check_positive, check_shape, check_strided
from gossamer.ops.gather_reduce import gather_reduce

POOLINGS = ("sum", "mean", "max")


def bytes_of(tensors) -> int:
    """Bytes of the tensors, each storage counted once."""
    found = {}
    for tensor in tensors:
        key = id(tensor) if tensor.is_meta else tensor.data_ptr()
        found[key] = max(found.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(found.values())


class Table(nn.Module):
    """A map from ids to vectors: the base of all embedding tables.

    A subclass sets :attr:`num_embeddings` and :attr:`embedding_dim` and defines :meth:`lookup`; bags, sizes, budgets
    and :meth:`freeze` are built on it. A subclass overrides them if it has a faster way or an adjustable size.
    :class:`FusedTable` is a table whose parameters are trained in the backward pass.

    The library's own tables set their common attributes by :meth:`_set_up`, pool bags in :meth:`_pool`, and find the
    knob that fits a budget by :meth:`_fit`.

    Attributes:
        num_embeddings: N, the number of ids.
        embedding_dim: D.
        mode: how :meth:`forward` pools bags: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        frozen: whether :meth:`freeze` was called.
    """

    num_embeddings: int
    embedding_dim: int
    mode: str = "sum"
    include_last_offset: bool = False
    frozen: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        """As for any module, but a frozen table takes no optimizer."""
        if name == "optimizer" and value is not None and self.frozen:
            raise ValueError(f"optimizer must be None for a frozen table, got {type(value).__name__}")
        super().__setattr__(name, value)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``, int32 or int64, differentiable in the trained parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define lookup(ids)")

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sums, means or maxima of the bags' vectors, as ``torch.nn.EmbeddingBag`` gives them.

        Args:
            ids: ``(B, J)`` int32 or int64, or ``(L,)`` with ``offsets``.
            offsets: ``(B,)``, or ``(B+1,)`` with ``include_last_offset``; None for ``(B, J)``.
            per_sample_weights: like ``ids``, for ``mode="sum"``.

        Returns:
            ``(B, D)``; empty bags are zero.

        Raises:
            TypeError: a dtype is not supported.
            ValueError: the arguments do not fit each other or the mode.
            IndexError: on the CPU, an id outside the table.
        """
        how = {"mode": self.mode, "include_last_offset": self.include_last_offset}
        return self._pool(ids, offsets, per_sample_weights, **how)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """:meth:`forward` with ``mode`` and ``include_last_offset`` in ``how``: the vectors of all ids, then bags."""
        check_mode(self.mode)
        check_lists(ids, *lists)
        rows = self.lookup(ids.reshape(-1))
        return gather_reduce(rows, torch.arange(ids.numel(), device=ids.device).view(ids.shape), *lists, **how)

    def nbytes(self) -> int:
        """Bytes that the table holds now, optimizer state included: parameters and buffers, codes, maps and scales."""
        return bytes_of([*self.parameters(), *self.buffers()])

    def inference_nbytes(self) -> int:
        """Bytes that the table holds once :meth:`freeze` was called."""
        return self.nbytes()

    def freeze(self) -> Table:
        """Convert the table in place to its serving form, which cannot be trained, and return it."""
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> Table:
        """The best table of this kind that serves N ids in at most ``nbytes`` bytes.

        The size of this kind is fixed: it fits or raises an error.

        Args:
            num_embeddings: N.
            embedding_dim: D.
            nbytes: of :meth:`inference_nbytes`.
            **options: of the class.

        Raises:
            TypeError: ``nbytes`` is not an int.
            ValueError: no table of this kind is as small; the message gives the smallest size.
        """
        check_budget(nbytes)
        needed = cls(num_embeddings, embedding_dim, **options | {"device": "meta"}).inference_nbytes()
        cls._check_fits((num_embeddings, embedding_dim), nbytes, needed)
        return cls(num_embeddings, embedding_dim, **options)

    @classmethod
    def size_within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> int:
        """Bytes that the table of :meth:`from_budget` serves, computed without making it; same arguments and errors."""
        return cls.from_budget(num_embeddings, embedding_dim, nbytes, **options | {"device": "meta"}).inference_nbytes()

    def _set_up(self, num_embeddings: int, embedding_dim: int, mode: str, include_last_offset: bool) -> None:
        """Set the attributes that all tables have, after their checks."""
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_mode(mode)
        check_flags(include_last_offset=include_last_offset)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.mode, self.include_last_offset = mode, include_last_offset

    def _repr(self, *own: str) -> str:
        """:meth:`extra_repr` with what a kind of table adds: sizes and mode, and the optimizer, if any."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}", *own, f"mode={self.mode!r}"]
        if (optimizer := getattr(self, "optimizer", None)) is not None:
            parts.append(f"optimizer={optimizer}")
        return ", ".join(parts)

    @classmethod
    def _check_fits(cls, sizes: tuple[int, int], nbytes: int, needed: int) -> None:
        """A budget must be at least what the smallest table for N ids of D columns needs."""
        if nbytes < needed:
            raise ValueError(
                f"nbytes must be at least {needed} for {cls.__name__} with {sizes[0]} embeddings of {sizes[1]}, "
                f"got {nbytes}"
            )

    @classmethod
    def _fit(cls, sizes: tuple[int, int], nbytes: int, knobs: tuple[int, int], make: Callable[..., Table]) -> Table:
        """The table of the largest knob within a range that fits a budget; tables grow with the knob.

        Args:
            sizes: N and D.
            nbytes: the budget.
            knobs: the smallest and the largest.
            make: makes the table for a knob; keyword arguments override the options.

        Raises:
            TypeError: ``nbytes`` is not an int.
            ValueError: the table of the smallest knob is larger than the budget.
        """
        return make(cls._largest(sizes, nbytes, knobs, lambda knob: make(knob, device="meta").inference_nbytes()))

    @classmethod
    def _largest(
        cls, sizes: tuple[int, int], nbytes: int, knobs: tuple[int, int], size_of: Callable[[int], int]
    ) -> int:
        """The largest knob within a range whose bytes fit a budget, as :meth:`_fit`."""
        check_budget(nbytes)
        smallest, largest = knobs
        cls._check_fits(sizes, nbytes, size_of(smallest))
        while smallest < largest:
            middle = (smallest + largest + 1) // 2
            if size_of(middle) <= nbytes:
                smallest = middle
            else:
                largest = middle - 1
        return smallest

    @classmethod
    def _fit_weights(cls, weight: torch.Tensor, nbytes: int, options: dict[str, object]) -> Table:
        """The table that a budget gives for trained weights ``(N, D)``, on their device and in their dtype."""
        check_shape("weight", weight, (None, None), "(N, D)")
        check_finite("weight", weight)
        return cls.from_budget(*weight.shape, nbytes, **{"device": weight.device, "dtype": weight.dtype} | options)


def check_mode(mode: str) -> None:
    """``mode`` must be one of :data:`POOLINGS`."""
    if mode not in POOLINGS:
        raise ValueError(f"mode must be one of {POOLINGS}, got {mode!r}")


def check_lists(ids: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None) -> None:
    """Check the shapes of bags under the names of a table's arguments; primitives check the rest, but say ``index``."""
    check_index("ids", ids)
    if ids.dim() != 1 and (ids.dim() != 2 or offsets is not None):
        wanted = "(B, J), or (L,) with offsets" if offsets is None else "(L,) with offsets"
        raise ValueError(f"ids must have shape {wanted}, got {tuple(ids.shape)}")
    if weights is not None:
        check_shape("per_sample_weights", weights, tuple(ids.shape), "that of ids")
        check_strided("per_sample_weights", weights)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Trained rows must be finite."""
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_budget(nbytes: int) -> None:
    """A budget must be a positive int."""
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"nbytes must be an int, got {type(nbytes).__name__}")
    if nbytes < 1:
        raise ValueError(f"nbytes must be at least 1, got {nbytes}")


def item_nbytes(options: dict[str, object]) -> int:
    """Bytes of a number of a table with these options."""
    check_dtype("dtype", options.get("dtype"))
    return torch.empty(0, dtype=options.get("dtype"), device="meta").element_size()
