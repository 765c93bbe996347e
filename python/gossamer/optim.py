"""Optimizers of embedding tables: frozen descriptions of the step that the backward pass takes on the touched rows."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

import torch

# Codes shared with csrc/cpu/sparse_update.h and the Triton kernels.
SGD_RULE, ADAGRAD, ROWWISE_ADAGRAD, ADAM, PARTIAL_ROWWISE_ADAM, LAMB_RULE, FTRL_RULE = range(7)


class Hyper(NamedTuple):
    """The numbers of a step as kernels take them, in this order.

    Attributes:
        lr: learning rate; unused where a tensor gives it.
        weight_decay: λ.
        decoupled: 1 where λ shrinks the row by ``1 − lr·λ`` rather than adding ``λ·w`` to the gradient.
        beta1: momentum of SGD, β1 of Adam and its relatives, β of FTRL.
        beta2: β2.
        eps: ε.
        nesterov: 1 for Nesterov's momentum.
        l1: λ1 of FTRL.
        l2: λ2 of FTRL.
        clip_value: largest magnitude of a gradient element; infinity for none.
        clip_norm: largest norm of a row's gradient; infinity for none.
        stochastic_rounding: 1 where float16 and bfloat16 rows are rounded stochastically.
    """

    lr: float = 0.0
    weight_decay: float = 0.0
    decoupled: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    clip_value: float = math.inf
    clip_norm: float = math.inf
    stochastic_rounding: float = 0.0


def _check(name: str, value: float, low: float, high: float = math.inf, *, below: bool = False) -> None:
    inside = low <= value < high if below else low <= value <= high
    if not inside:
        interval = f"[{low:g}, {high:g}" + (")" if below or math.isinf(high) else "]")
        raise ValueError(f"{name} must be in {interval}, got {value}")


@dataclass(frozen=True)
class Optimizer:
    """What every optimizer has. ``G`` below is a touched row's gradient, summed over its duplicates and then clipped.

    Rows that a batch does not touch change neither in weights nor in state: moments do not decay without a touch. ``t``
    counts the steps taken with a state, whichever rows they touched.

    Args:
        lr: learning rate η, a float or a one-element floating tensor on the table's device, which is never read on the
            host: scheduling it costs no synchronisation and no recompilation.
        weight_decay: λ; the subclass says where it enters.
        clip_value: clamp every element of the summed gradient to ``[−clip_value, clip_value]``.
        clip_norm: then scale a row's gradient by ``min(1, clip_norm/‖G‖)``.
        stochastic_rounding: round the new rows of float16 and bfloat16 tables up or down with the probability that
            makes the result right on average; tables of 32 and 64 bits are not rounded at all.
        seed: of the rounding: the bits depend on (seed, step, row, column) alone. In ``[0, 2⁶³)``.

    Raises:
        ValueError: a number lies outside its range.
        TypeError: ``lr`` is neither a number nor a floating tensor of one element.
    """

    lr: float | torch.Tensor
    _: KW_ONLY
    weight_decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    algorithm: ClassVar[int]

    def __post_init__(self):
        """Check every number."""
        if isinstance(self.lr, torch.Tensor):
            if self.lr.numel() != 1 or not self.lr.is_floating_point():
                raise TypeError(
                    f"lr must be a number or a floating tensor of one element, got {self.lr.dtype} "
                    f"{tuple(self.lr.shape)}"
                )
        elif isinstance(self.lr, (int, float)):
            _check("lr", self.lr, 0)
        else:
            raise TypeError(f"lr must be a number or a floating tensor of one element, got {type(self.lr).__name__}")
        _check("weight_decay", self.weight_decay, 0)
        for name in ("clip_value", "clip_norm"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 0)
        _check("seed", self.seed, 0, 2**63, below=True)

    def state_kinds(self) -> dict[str, str]:
        """State tensors beside ``"step"``, in the order kernels take them: ``"full"`` (N, D) or ``"row"`` (N,)."""
        return {}

    def initial_value(self) -> float:
        """What state tensors start at."""
        return 0.0

    def state(
        self,
        num_rows: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, torch.Tensor]:
        """Fresh state for a table of ``(num_rows, dim)``.

        Args:
            num_rows: N.
            dim: D.
            device: that of the table.
            dtype: float32; float64 for a float64 table.

        Returns:
            ``"step"``, ``(1,)`` int64, and what :meth:`state_kinds` names. Any of the latter may be replaced by a view
            with other row strides, so that rows of a larger storage can hold weights and state side by side.
        """
        shapes = {"full": (num_rows, dim), "row": (num_rows,)}
        state = {"step": torch.zeros(1, dtype=torch.int64, device=device)}
        for name, kind in self.state_kinds().items():
            state[name] = torch.full(shapes[kind], self.initial_value(), dtype=dtype, device=device)
        return state

    def hyper(self) -> Hyper:
        """The numbers that kernels take."""
        return Hyper(
            lr=0.0 if isinstance(self.lr, torch.Tensor) else float(self.lr),
            weight_decay=float(self.weight_decay),
            clip_value=math.inf if self.clip_value is None else float(self.clip_value),
            clip_norm=math.inf if self.clip_norm is None else float(self.clip_norm),
            stochastic_rounding=float(self.stochastic_rounding),
        )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent: ``w ← w − η·(G + λw)``.

    With momentum μ: ``m ← μm + G + λw`` and ``w ← w − ηm``, or, with ``nesterov``, ``w ← w − η(G + λw + μm)``.

    Args:
        momentum: μ in [0, 1).
        nesterov: Nesterov's momentum; needs ``momentum > 0``.
    """

    momentum: float = 0.0
    nesterov: bool = False

    algorithm = SGD_RULE

    def __post_init__(self):
        """Check every number."""
        super().__post_init__()
        _check("momentum", self.momentum, 0, 1, below=True)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0, got momentum=0")

    def state_kinds(self) -> dict[str, str]:
        """The momentum, where there is one."""
        return {"momentum_buffer": "full"} if self.momentum else {}

    def hyper(self) -> Hyper:
        """The numbers that kernels take."""
        return super().hyper()._replace(beta1=float(self.momentum), nesterov=float(self.nesterov))


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer, 2011): with ``g = G + λw``, ``s ← s + g²`` and ``w ← w − η·g/(√s + ε)``.

    Args:
        eps: ε.
        initial_accumulator: what s starts at.
    """

    eps: float = 1e-10
    initial_accumulator: float = 0.0

    algorithm = ADAGRAD

    def __post_init__(self):
        """Check every number."""
        super().__post_init__()
        _check("eps", self.eps, 0)
        _check("initial_accumulator", self.initial_accumulator, 0)

    def state_kinds(self) -> dict[str, str]:
        """The sum of squares of each element."""
        return {"sum": "full"}

    def initial_value(self) -> float:
        """The accumulator's first value."""
        return float(self.initial_accumulator)

    def hyper(self) -> Hyper:
        """The numbers that kernels take."""
        return super().hyper()._replace(eps=float(self.eps))


@dataclass(frozen=True)
class RowwiseAdagrad(Adagrad):
    """Adagrad with one accumulator a row (as in DLRM): ``s ← s + mean_j(g²)`` and ``w ← w − η·g/(√s + ε)``.

    ``g = G + λw``; with ``decoupled``, ``g = G`` and ``w ← (1 − ηλ)·w`` beforehand.

    Args:
        eps: ε.
        decoupled: how λ enters.
    """

    eps: float = 1e-8
    decoupled: bool = False

    algorithm = ROWWISE_ADAGRAD

    def state_kinds(self) -> dict[str, str]:
        """The sum of mean squares of each row."""
        return {"sum": "row"}

    def hyper(self) -> Hyper:
        """The numbers that kernels take."""
        return super().hyper()._replace(decoupled=float(self.decoupled))


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015) on the touched rows.

    With ``g = G + λw``: ``m ← β1·m + (1−β1)·g``, ``v ← β2·v + (1−β2)·g²`` and
    ``w ← w − η·m̂/(√v̂ + ε)``, where ``m̂ = m/(1−β1ᵗ)`` and ``v̂ = v/(1−β2ᵗ)``.

    Args:
        betas: (β1, β2), each in [0, 1).
        eps: ε.
    """

    lr: float | torch.Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    algorithm = ADAM
    decoupled: ClassVar[bool] = False

    def __post_init__(self):
        """Check every number."""
        super().__post_init__()
        _check("betas[0]", self.betas[0], 0, 1, below=True)
        _check("betas[1]", self.betas[1], 0, 1, below=True)
        _check("eps", self.eps, 0)

    def state_kinds(self) -> dict[str, str]:
        """Both moments of each element."""
        return {"exp_avg": "full", "exp_avg_sq": "full"}

    def hyper(self) -> Hyper:
        """The numbers that kernels take."""
        return (
            super()
            .hyper()
            ._replace(
                beta1=float(self.betas[0]),
                beta2=float(self.betas[1]),
                eps=float(self.eps),
                decoupled=float(self.decoupled),
            )
        )


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): ``w ← (1 − ηλ)·w`` first, and ``g = G``."""

    weight_decay: float = 1e-2

    decoupled = True


@dataclass(frozen=True)
class PartialRowwiseAdam(Adam):
    """Adam with one second moment a row, ``v ← β2·v + (1−β2)·mean_j(G²)``, and decoupled weight decay."""

    algorithm = PARTIAL_ROWWISE_ADAM
    decoupled = True

    def state_kinds(self) -> dict[str, str]:
        """The first moment of each element, the second of each row."""
        return {"exp_avg": "full", "exp_avg_sq": "row"}


@dataclass(frozen=True)
class LAMB(Adam):
    """LAMB (You et al., 2020) with the trust ratio of each row: ``q = m̂/(√v̂ + ε) + λw``, ``w ← w − η·(‖w‖/‖q‖)·q``.

    Moments are those of Adam with ``g = G``. The ratio is 1 where either norm is zero.
    """

    eps: float = 1e-6

    algorithm = LAMB_RULE


@dataclass(frozen=True)
class FTRL(Optimizer):
    """FTRL-proximal (McMahan et al., 2013), per element.

    ``n' = n + G²``, ``z ← z + G − (√n' − √n)/η·w``, and ``w ← 0`` where ``|z| ≤ λ1``, else
    ``w ← −(z − sign(z)·λ1)/((β + √n')/η + λ2)``. Weights are a function of the state (n, z), so a table should start at
    zero: with β > 0 the first touch replaces other values. With η = 0 nothing changes, neither weights nor state.
    ``weight_decay`` must be 0: λ2 is it.

    Args:
        beta: β.
        l1: λ1.
        l2: λ2.
    """

    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    algorithm = FTRL_RULE

    def __post_init__(self):
        """Check every number."""
        super().__post_init__()
        for name in ("beta", "l1", "l2"):
            _check(name, getattr(self, name), 0)
        if self.weight_decay:
            raise ValueError(f"weight_decay must be 0 for FTRL, whose l2 does its work, got {self.weight_decay}")

    def state_kinds(self) -> dict[str, str]:
        """Both n and z of each element."""
        return {"accumulator": "full", "linear": "full"}

    def hyper(self) -> Hyper:
        """The numbers that kernels take."""
        return super().hyper()._replace(beta1=float(self.beta), l1=float(self.l1), l2=float(self.l2))
