"""Embedding tables as ``torch.nn`` has them, optionally trained by a step fused into their backward pass."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from gossamer._checks import check_flags, check_index, check_number, check_sizes, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer._parameters import factory_of
from gossamer.nn.embeddings.fused_step import FusedStep
from gossamer.nn.embeddings.table import Table
from gossamer.ops.embedding import (
    advise_huge_pages,
    embedding,
    graft,
    inverse_frequency,
    renorm_,
    scale_gradient_by_frequency,
)
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.gather_reduce_step import gather_reduce_step
from gossamer.optim import Optimizer


def _check_table(
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    weight: object,
    **flags: object,
) -> None:
    """Checks that torch's constructor does not make."""
    check_flags(**flags)
    if weight is not None:
        check_tensor("_weight", weight)
    check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    check_number("max_norm", max_norm, optional=True)
    check_number("norm_type", norm_type)
    if padding_idx is not None and (not isinstance(padding_idx, int) or isinstance(padding_idx, bool)):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")


def _check_fused(optimizer: Optimizer | None, sparse: bool) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one of gossamer.optim, got {type(optimizer).__name__}")
    if sparse:
        raise ValueError("sparse=True gives a gradient, which a table with an optimizer does not have")


def _lookup(layer: Embedding | EmbeddingBag, input: torch.Tensor) -> torch.Tensor:
    """``torch.nn.Embedding``'s lookup, for both layers."""
    check_index("input", input)
    if layer.max_norm is not None:
        renorm_(layer.weight, input, layer.max_norm, layer.norm_type)
    plain = {"padding_idx": layer.padding_idx, "scale_grad_by_freq": layer.scale_grad_by_freq}
    if layer.optimizer is None:
        return embedding(layer.weight, input, sparse_grad=layer.sparse, **plain)
    flat = input.reshape(-1)
    weights = None
    if layer.scale_grad_by_freq:
        weights = inverse_frequency(flat, layer.num_embeddings, accumulation_dtype(layer.weight.dtype))
    rows = gather_reduce_step(layer.weight, flat, None, weights, padding_idx=layer.padding_idx, **layer._step())
    rows = rows.view(*input.shape, layer.embedding_dim)
    if layer.scale_grad_by_freq:
        return graft(embedding(layer.weight, input), rows)
    if layer.padding_idx is None:
        return rows
    # A bag would skip the padding row; a lookup reads it like any other.
    return torch.where((input == layer.padding_idx).unsqueeze(-1), layer.weight[layer.padding_idx], rows)


def _from_pretrained(cls, embeddings: torch.Tensor, freeze: bool | None = None, *args, optimizer=None, **kwargs):
    """As in torch; with ``optimizer`` the table is trained, and ``freeze`` must not be given.

    Raises:
        ValueError: both ``freeze`` and ``optimizer`` are given.
        AssertionError: ``embeddings`` is not 2-dimensional.
    """
    torchs = super(FusedStep, cls).from_pretrained
    if optimizer is None:
        return torchs(embeddings, freeze is None or freeze, *args, **kwargs)
    if freeze:
        raise ValueError("a frozen table takes no step: give either an optimizer or freeze")
    made = torchs(embeddings, False, *args, **kwargs)
    _check_fused(optimizer, made.sparse)
    made.attach(optimizer)
    return made


def _reset_parameters(self) -> None:
    """As in torch; the optimizer's state is reset too."""
    advise_huge_pages(self.weight)
    super(FusedStep, self).reset_parameters()
    self._reset_state()


def _extra_repr(self) -> str:
    """As in torch, with the optimizer."""
    return super(FusedStep, self).extra_repr() + (f", optimizer={self.optimizer}" if self.optimizer else "")


class Embedding(FusedStep, torch.nn.Embedding, Table):
    """``torch.nn.Embedding`` over :func:`gossamer.gather_reduce`: the same arguments, parameters and answers.

    With ``optimizer``, ``loss.backward()`` takes the step on the rows that were looked up; no gradient of the table's
    size is ever allocated. ``weight`` then requires no gradient, so other optimizers ignore it; set ``optimizer`` to
    None to freeze the table. Looking the table up twice before a backward pass takes two steps, one after the other.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        padding_idx: a row that starts at zero and gets no gradient.
        max_norm: rows of larger norm are scaled down to it, in place, when they are looked up.
        norm_type: p of that norm.
        scale_grad_by_freq: divide a row's gradient by how often the batch lists the row.
        sparse: return a sparse gradient.
        _weight: ``(N, D)``, the table to start from.
        _freeze: whether ``weight`` requires no gradient.
        device: of the table.
        dtype: of the table.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step into the backward pass.

    Raises:
        TypeError: ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: ``optimizer`` with ``sparse`` or ``_freeze``.
        AssertionError: ``padding_idx`` or ``_weight`` does not fit, as in torch.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
        *,
        optimizer: Optimizer | None = None,
    ) -> None:
        flags = {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse, "_freeze": _freeze}
        _check_table(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, _weight, **flags)
        _check_fused(optimizer, sparse)
        if optimizer is not None and _freeze:
            raise ValueError("a frozen table takes no step: give either an optimizer or freeze")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            **factory_of(device, dtype),
        )
        self.attach(optimizer)

    from_pretrained = classmethod(_from_pretrained)
    reset_parameters = _reset_parameters
    extra_repr = _extra_repr

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the table.

        Args:
            input: int32 or int64 of any shape.

        Returns:
            ``(*input.shape, D)``.

        Raises:
            TypeError: ``input`` is not int32 or int64.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        return _lookup(self, input)

    lookup = forward


class EmbeddingBag(FusedStep, torch.nn.EmbeddingBag, Table):
    """``torch.nn.EmbeddingBag`` over :func:`gossamer.gather_reduce`: the same arguments, parameters and answers.

    ``scale_grad_by_freq`` divides a row's gradient by how often the batch lists the row, as torch documents it. With
    ``optimizer`` the step is taken in the backward pass; see :class:`Embedding`.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        max_norm: rows of larger norm are scaled down to it, in place, when they are looked up.
        norm_type: p of that norm.
        scale_grad_by_freq: divide a row's gradient by how often the batch lists the row; not with ``mode="max"``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        sparse: return a sparse gradient; not with ``mode="max"``.
        _weight: ``(N, D)``, the table to start from.
        include_last_offset: whether ``offsets`` ends with the number of ids.
        padding_idx: a row that starts at zero, adds nothing, does not count in a mean, and gets no gradient.
        device: of the table.
        dtype: of the table.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step into the backward pass.

    Raises:
        TypeError: ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: ``optimizer`` with ``sparse``.
        AssertionError: ``padding_idx`` or ``_weight`` does not fit, as in torch.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        optimizer: Optimizer | None = None,
    ) -> None:
        flags = {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        flags["include_last_offset"] = include_last_offset
        _check_table(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, _weight, **flags)
        _check_fused(optimizer, sparse)
        super().__init__(
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            **factory_of(device, dtype),
        )
        self.attach(optimizer)

    from_pretrained = classmethod(_from_pretrained)
    reset_parameters = _reset_parameters
    extra_repr = _extra_repr

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``, as :class:`Embedding` gives them."""
        return _lookup(self, ids)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sums, means or maxima of the bags' rows.

        Args:
            input: ``(B, J)`` int32 or int64, ``(L,)`` with ``offsets``, or a nested tensor of B bags.
            offsets: ``(B,)``, or ``(B+1,)`` with ``include_last_offset``; None for ``(B, J)`` and nested tensors.
            per_sample_weights: like ``input``, for ``mode="sum"``.

        Returns:
            ``(B, D)``; empty bags are zero. With ``include_last_offset`` the last bag ends at the last offset in every
            mode; in torch it does so only in sums without ``padding_idx``, and otherwise runs to the end of ``input``.

        Raises:
            TypeError: a dtype is not supported, or the weights have another dtype than the table (16-bit tables also
                take float32 weights).
            ValueError: the arguments do not fit each other or the mode; in eager mode on the CPU, offsets that do not
                begin at 0.
            NotImplementedError: ``per_sample_weights`` with another mode than ``"sum"``.
            IndexError: on the CPU, an id outside ``[0, N)``, where torch raises RuntimeError.
        """
        index, offsets, weights, last = bag_lists(self, input, offsets, per_sample_weights)
        if self.max_norm is not None:
            renorm_(self.weight, index, self.max_norm, self.norm_type)
        lists = (index, offsets)
        how = {"mode": self.mode, "padding_idx": self.padding_idx, "include_last_offset": last}
        if self.optimizer is None:
            table = scale_gradient_by_frequency(self.weight, index) if self.scale_grad_by_freq else self.weight
            return gather_reduce(table, *lists, weights, sparse_grad=self.sparse, **how)
        if not self.scale_grad_by_freq:
            return gather_reduce_step(self.weight, *lists, weights, **how, **self._step())
        scaled = inverse_frequency(index, self.num_embeddings, accumulation_dtype(self.weight.dtype))
        if weights is not None:
            scaled = scaled * weights.detach()
        stepping = gather_reduce_step(self.weight, *lists, scaled, **how, **self._step())
        return graft(gather_reduce(self.weight, *lists, weights, **how), stepping)


def bag_lists(layer: EmbeddingBag, input, offsets, weights):
    """Index, offsets, weights, and whether offsets include the last one, after the same checks as in torch."""
    check_index("input", input.values() if isinstance(input, torch.Tensor) and input.is_nested else input)
    if offsets is not None:
        check_index("offsets", offsets)
    if weights is not None:
        check_tensor("per_sample_weights", weights)
        narrow = layer.weight.dtype in (torch.float16, torch.bfloat16)
        if weights.dtype != layer.weight.dtype and not (narrow and weights.dtype == torch.float32):
            wanted = f"the dtype of the table, {layer.weight.dtype}{', or float32' if narrow else ''}"
            raise TypeError(f"per_sample_weights must have {wanted}, got {weights.dtype}")
    if weights is not None and weights.size() != input.size():
        raise ValueError(
            f"per_sample_weights must have the shape of input, {tuple(input.size())}, got {tuple(weights.size())}"
        )
    if layer.mode not in ("sum", "mean", "max"):
        raise ValueError(f"mode has to be one of sum, mean or max, got {layer.mode!r}")
    if layer.mode == "max" and layer.scale_grad_by_freq:
        raise ValueError("max mode does not support scaling the gradient by the frequency")
    if layer.mode == "max" and layer.sparse:
        raise ValueError("max mode does not support sparse weights")
    if weights is not None and layer.mode != "sum":
        raise NotImplementedError(f"per_sample_weights is only supported for mode='sum', got mode={layer.mode!r}")
    if input.dim() == 2 and offsets is not None:
        raise ValueError("if input is 2D, then offsets has to be None, as its rows are the bags")
    if input.is_nested:
        if weights is not None and not weights.is_nested:
            raise ValueError("If input is nested, then per_sample_weights must be nested if specified")
        return input.values(), input.offsets(), None if weights is None else weights.values(), True
    if input.dim() == 1 and (offsets is None or offsets.dim() != 1):
        raise ValueError("offsets has to be a 1D Tensor" + (" but got None" if offsets is None else ""))
    if input.dim() not in (1, 2):
        raise ValueError(f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}")
    if offsets is not None and offsets.is_cpu and offsets.numel() and not is_compiling():
        first = offsets[0]
        if type(first) is torch.Tensor and (start := first.item()):
            raise ValueError(f"offsets must begin at 0, where the first bag does, got {start}")
    return input, offsets, weights, layer.include_last_offset
