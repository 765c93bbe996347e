"""Layers with a low-rank update: LoRA on linear layers and embedding tables, with its relatives rsLoRA and DoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._checks import (
    FLOAT_DTYPES,
    check_flags,
    check_id_range,
    check_index,
    check_input,
    check_padding_idx,
    check_positive,
    check_same_device,
    check_widths,
)
from gossamer._parameters import factory_of
from gossamer.nn.linear.lora_factors import (
    add_low_rank_,
    check_dropout,
    check_init,
    check_rank,
    checked_alpha,
    draw_factors_,
    lora_scale,
    row_norms,
    spectral_split_,
)
from gossamer.ops.low_rank import low_rank_linear


class _Mergeable(nn.Module):
    """Folds the update into ``weight`` and takes it out again, bit for bit; a saved state is the unmerged one."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._unmerged: torch.Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the update."""
        return self._unmerged is not None

    def _add_update_(self, weight: torch.Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into ``weight``, summed in float32 and rounded once; the old weight is kept.

        Raises:
            ValueError: the layer is merged already.
        """
        if self._unmerged is not None:
            raise ValueError("merge needs an unmerged layer, got one that is merged already")
        before = self.weight.detach().clone()
        self._add_update_(self.weight)
        self._unmerged = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight from before :meth:`merge`.

        Raises:
            ValueError: the layer is not merged.
        """
        if self._unmerged is None:
            raise ValueError("unmerge needs a merged layer, got one that is not merged")
        self.weight.copy_(self._unmerged)
        self._unmerged = None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            destination[prefix + "weight"] = self._unmerged

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        if self._unmerged is not None:
            raise ValueError("load_state_dict needs an unmerged layer, got a merged one: call unmerge() first")
        super()._load_from_state_dict(*args, **kwargs)


class LoRALinear(_Mergeable):
    """A linear layer with a low-rank update: ``y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ`` (LoRA, Hu et al., 2021).

    ``scale`` is α/r, or α/√r with ``rank_stabilized`` (rsLoRA, Kalajdzievski, 2023). With ``dora`` the rows of the
    updated weight have trained norms (DoRA, Liu et al., 2024): ``y = g ⊙ (x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ) + bias`` with
    ``g[o] = magnitude[o] / ‖(W + scale·B·A)[o]‖``, whose denominator is a constant in the backward pass, as in the
    paper. W and the bias are frozen unless you set them to train.

    Args:
        in_features: I.
        out_features: O.
        rank: r, in ``[1, min(I, O)]``.
        alpha: α; ``rank`` when None, so that the scale of LoRA is 1.
        dropout: the probability with which elements of x are dropped before A, in training.
        rank_stabilized: whether the scale is α/√r.
        dora: whether there is a ``magnitude``.
        init: ``"kaiming"`` or ``"gaussian"``: A is random and B zero; ``"spectral"``: both are the principal part of W,
            which keeps the rest (PiSSA, Meng et al., 2024).
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(O, I)``, frozen.
        bias: ``(O,)``, frozen, or None.
        lora_A: ``(r, I)``.
        lora_B: ``(O, r)``.
        lora_magnitude: ``(O,)`` or None.

    Raises:
        TypeError: a size or the rank is not an int.
        ValueError: a size below 1, a rank outside its range, a dropout outside ``[0, 1)``, or an unknown init.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_widths(in_features=in_features, out_features=out_features)
        check_flags(bias=bias)
        base = nn.Linear(in_features, out_features, bias=bias, **factory_of(device, dtype))
        super().__init__()
        self._setup(base, rank, alpha, dropout, rank_stabilized, dora, init)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, **options: object) -> LoRALinear:
        """A layer over the weight and bias of ``linear``, which are shared with it (not with ``init="spectral"``).

        Args:
            linear: an ``nn.Linear``; its parameters are frozen.
            rank: r.
            **options: ``alpha``, ``dropout``, ``rank_stabilized``, ``dora``, ``init`` of the class.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or its weight is of a dtype without kernels.
            ValueError: as the class does; its weight or bias is parametrised.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if hasattr(linear, "parametrizations"):
            raise ValueError(
                "linear must hold weight and bias itself, as after torch.nn.utils.parametrize.remove_parametrizations, "
                f"got one with parametrizations of {', '.join(linear.parametrizations)}"
            )
        if linear.weight.dtype not in (*FLOAT_DTYPES, torch.float64) or linear.weight.shape != (
            linear.out_features,
            linear.in_features,
        ):
            raise TypeError(
                "linear must have a float64, float32, bfloat16 or float16 weight of shape (O, I), got "
                f"{linear.weight.dtype} {tuple(linear.weight.shape)} in a {type(linear).__name__}"
            )
        defaults = {"alpha": None, "dropout": 0.0, "rank_stabilized": False, "dora": False, "init": "kaiming"}
        if unknown := options.keys() - defaults.keys():
            raise TypeError(f"options must be among {sorted(defaults)}, got {sorted(unknown)}")
        layer = cls.__new__(cls)
        _Mergeable.__init__(layer)
        layer._setup(linear, rank, **(defaults | options))
        return layer

    def _setup(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None,
        dropout: float,
        rank_stabilized: bool,
        dora: bool,
        init: str,
    ) -> None:
        check_rank(rank, base.out_features, base.in_features)
        check_flags(rank_stabilized=rank_stabilized, dora=dora)
        check_dropout(dropout)
        check_init(init)
        self.in_features, self.out_features, self.rank = base.in_features, base.out_features, rank
        self.alpha = checked_alpha(alpha, rank)
        self.dropout, self.rank_stabilized, self.init = dropout, rank_stabilized, init
        weight = base.weight
        self.weight = nn.Parameter(weight.detach().clone()) if init == "spectral" else weight
        self.bias = base.bias
        self.lora_A = nn.Parameter(weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(weight.new_empty(self.out_features, rank))
        self.register_parameter("lora_magnitude", nn.Parameter(weight.new_empty(self.out_features)) if dora else None)
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.reset_lora_parameters()

    @property
    def scale(self) -> float:
        """α/r, or α/√r when rank-stabilised."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialise the update again; ``init="spectral"`` moves the weight's principal part into it each time."""
        if self.init == "spectral":
            spectral_split_(self.weight, self.lora_A, self.lora_B, self.scale)
        else:
            draw_factors_(self.lora_A, self.lora_B, self.init)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(row_norms(self.weight, self.lora_A, self.lora_B, self.scale))

    def _gain(self) -> torch.Tensor:
        """``magnitude / ‖W + scale·B·A‖`` by rows, in float32; the gradient is the magnitude's alone."""
        return self.lora_magnitude / row_norms(self.weight, self.lora_A, self.lora_B, self.scale)

    def _add_update_(self, weight: torch.Tensor) -> None:
        gain = None if self.lora_magnitude is None else self._gain()
        add_low_rank_(weight, self.lora_A, self.lora_B, self.scale, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output ``(..., O)`` for ``x (..., I)``, in its dtype or autocast's."""
        if self.merged:
            check_input(x, self.in_features, self.weight)
            return F.linear(x, self.weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        fixed = self.bias if self.lora_magnitude is None else None
        y = low_rank_linear(x, self.weight, self.lora_A, self.lora_B, scale=self.scale, bias=fixed, dropout=dropout)
        if self.lora_magnitude is None:
            return y
        y = y * self._gain().to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the update folded in; this layer is not changed."""
        bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, self.weight.device, self.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if not self.merged:
                self._add_update_(linear.weight)
            if bias:
                linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha:g}, bias={self.bias is not None}" + _options(self)
        )


class LoRAEmbedding(_Mergeable):
    """An embedding table with a low-rank update: ``y = W[ids] + scale·A[ids]·Bᵀ``.

    With ``dora`` the columns of the updated table have trained norms: ``y = g ⊙ (W[ids] + scale·A[ids]·Bᵀ)`` with
    ``g[d] = magnitude[d] / ‖(W + scale·A·Bᵀ)[:, d]‖``. The update starts at zero with A zero and B drawn from N(0, 1),
    as in LoRA for tables; there is no dropout.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        rank: r, in ``[1, min(N, D)]``.
        alpha: α; ``rank`` when None.
        rank_stabilized: whether the scale is α/√r.
        dora: whether there is a ``magnitude``.
        init: ``"zero"``, or ``"spectral"``: A and B are the principal part of the table, which keeps the rest.
        padding_idx: an id whose rows of W and A get no gradient.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(N, D)``, frozen.
        lora_embedding_A: ``(N, r)``, so that an id reads adjacent elements; PEFT stores its transpose.
        lora_embedding_B: ``(D, r)``.
        lora_magnitude: ``(D,)`` or None.

    Raises:
        TypeError: a size or the rank is not an int.
        ValueError: a size below 1, a rank outside its range, or an unknown init.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        dora: bool = False,
        init: str = "zero",
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_padding_idx(padding_idx, num_embeddings)
        base = nn.Embedding(num_embeddings, embedding_dim, padding_idx, **factory_of(device, dtype))
        super().__init__()
        self._setup(base, rank, alpha, rank_stabilized, dora, init)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, rank: int, **options: object) -> LoRAEmbedding:
        """A layer over the table of ``embedding``, which is shared with it (not with ``init="spectral"``).

        Args:
            embedding: an ``nn.Embedding``; its table is frozen.
            rank: r.
            **options: ``alpha``, ``rank_stabilized``, ``dora``, ``init`` of the class.

        Raises:
            TypeError: ``embedding`` is not a plain ``nn.Embedding``, or an option is unknown.
            ValueError: as the class does, or ``embedding`` has ``max_norm``, ``scale_grad_by_freq`` or ``sparse``.
        """
        if type(embedding) is not nn.Embedding:
            raise TypeError(f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}")
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, name):
                raise ValueError(f"embedding must not have {name}, got {getattr(embedding, name)}")
        defaults = {"alpha": None, "rank_stabilized": False, "dora": False, "init": "zero"}
        if unknown := options.keys() - defaults.keys():
            raise TypeError(f"options must be among {sorted(defaults)}, got {sorted(unknown)}")
        layer = cls.__new__(cls)
        _Mergeable.__init__(layer)
        layer._setup(embedding, rank, **(defaults | options))
        return layer

    def _setup(
        self, base: nn.Embedding, rank: int, alpha: float | None, rank_stabilized: bool, dora: bool, init: str
    ) -> None:
        check_rank(rank, base.num_embeddings, base.embedding_dim)
        check_flags(rank_stabilized=rank_stabilized, dora=dora)
        if init not in ("zero", "spectral"):
            raise ValueError(f"init must be 'zero' or 'spectral', got {init!r}")
        self.num_embeddings, self.embedding_dim, self.rank = base.num_embeddings, base.embedding_dim, rank
        self.padding_idx = base.padding_idx
        self.alpha = checked_alpha(alpha, rank)
        self.rank_stabilized, self.init = rank_stabilized, init
        weight = base.weight
        self.weight = nn.Parameter(weight.detach().clone()) if init == "spectral" else weight
        self.weight.requires_grad_(False)
        self.lora_embedding_A = nn.Parameter(weight.new_empty(self.num_embeddings, rank))
        self.lora_embedding_B = nn.Parameter(weight.new_empty(self.embedding_dim, rank))
        self.register_parameter("lora_magnitude", nn.Parameter(weight.new_empty(self.embedding_dim)) if dora else None)
        self.reset_lora_parameters()

    @property
    def scale(self) -> float:
        """α/r, or α/√r when rank-stabilised."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialise the update again; ``init="spectral"`` moves the table's principal part into it each time."""
        if self.init == "spectral":
            # The table is the transpose of a linear layer's weight, so A and B are swapped.
            spectral_split_(self.weight, self.lora_embedding_B.T, self.lora_embedding_A, self.scale)
        else:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self._norms())

    def _norms(self) -> torch.Tensor:
        return row_norms(self.weight.T, self.lora_embedding_A.T, self.lora_embedding_B, self.scale)

    def _add_update_(self, weight: torch.Tensor) -> None:
        gain = None if self.lora_magnitude is None else self.lora_magnitude / self._norms()
        add_low_rank_(weight.T, self.lora_embedding_A.T, self.lora_embedding_B, self.scale, gain)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows ``(..., D)`` of int ``ids (...)``."""
        check_index("ids", ids)
        check_same_device(weight=self.weight, ids=ids)
        check_id_range("ids", ids, self.num_embeddings, "N")
        y = F.embedding(ids, self.weight, self.padding_idx)
        if self.merged:
            return y
        rows = F.embedding(ids, self.lora_embedding_A, self.padding_idx)
        y = y + (rows @ self.lora_embedding_B.T).to(y.dtype) * self.scale
        if self.lora_magnitude is None:
            return y
        return y * (self.lora_magnitude / self._norms()).to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, rank={self.rank}, "
            f"alpha={self.alpha:g}" + _options(self)
        )


def _options(layer: nn.Module) -> str:
    values = {
        "dropout": getattr(layer, "dropout", 0.0),
        "rank_stabilized": layer.rank_stabilized,
        "dora": layer.lora_magnitude is not None,
    }
    return "".join(f", {name}={value}" for name, value in values.items() if value)
