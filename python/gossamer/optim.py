"""Optimizers of embedding tables: frozen descriptions of the step that the backward pass takes on the touched rows."""

from __future__ import annotations

import math
import numbers
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch

from gossamer._checks import as_float, check_device, check_dtype, check_fits, check_seed, check_sizes, shown
from gossamer._step_rules import RULES, StepRule


def _check(name: str, value: Any, low: float, high: float = math.inf, *, below: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    inside = low <= value < high if below else low <= value <= high
    if not inside:
        interval = f"[{low:g}, {high:g}" + (")" if below or math.isinf(high) else "]")
        raise ValueError(f"{name} must be in {interval}, got {shown(value)}")
    as_float(name, value)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


@dataclass(frozen=True)
class Optimizer:
    """The base of all optimizers. In their formulas ``G`` is a touched row's gradient, summed over duplicates, then
    clipped.

    A row that a batch does not touch keeps its weights and its state: its moments do not decay. ``t`` counts the steps
    taken with a state, whichever rows they touched.

    Args:
        lr: learning rate η, a float or a one-element floating tensor on the table's device, which is never read on the
            host: scheduling it costs no synchronisation and no recompilation.
        weight_decay: λ; each subclass says where it enters.
        clip_value: clamp every element of the summed gradient to ``[−clip_value, clip_value]``.
        clip_norm: then scale a row's gradient by ``min(1, clip_norm/‖G‖)``.
        stochastic_rounding: round the new rows of float16 and bfloat16 tables, and of tables of codes, up or down with
            the probability that makes the result right on average; tables of 32 and 64 bits are not rounded at all.
        seed: seed of the rounding, in ``[0, 2⁶³)``; the random bits depend only on (seed, step, row, column).

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

    # The rule's key in gossamer._step_rules.RULES.
    rule: ClassVar[str]
    decoupled: ClassVar[bool] = False

    def __post_init__(self):
        """Check all numbers and build the rule that kernels take."""
        if isinstance(self.lr, torch.Tensor):
            if self.lr.numel() != 1 or not self.lr.is_floating_point() or self.lr.layout is not torch.strided:
                raise TypeError(
                    f"lr must be a number or a floating tensor of one element, got {self.lr.dtype} "
                    f"{tuple(self.lr.shape)}"
                )
        elif isinstance(self.lr, numbers.Real) and not isinstance(self.lr, bool):
            _check("lr", self.lr, 0)
        else:
            raise TypeError(f"lr must be a number or a floating tensor of one element, got {type(self.lr).__name__}")
        _check("weight_decay", self.weight_decay, 0)
        for name in ("clip_value", "clip_norm"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 0)
        _check_flag("stochastic_rounding", self.stochastic_rounding)
        check_seed(self.seed)
        self._check_numbers()
        object.__setattr__(self, "_step_rule", self._rule_with_numbers())

    def _check_numbers(self) -> None:
        """Check the numbers that only this optimizer has."""

    def _numbers(self) -> dict[str, float | bool]:
        """The numbers that the rule's entry in RULES names, read from this optimizer's attributes of the same names."""
        return {name: getattr(self, name) for name in RULES[self.rule].numbers}

    def _rule_with_numbers(self) -> StepRule:
        own = {name: value if isinstance(value, bool) else float(value) for name, value in self._numbers().items()}
        decay = "weights" if self.decoupled else "gradient"
        return StepRule(
            self.rule,
            lr=0.0 if isinstance(self.lr, torch.Tensor) else float(self.lr),
            weight_decay=float(self.weight_decay),
            decay="formula" if RULES[self.rule].own_decay else decay,
            clip_value=math.inf if self.clip_value is None else float(self.clip_value),
            clip_norm=math.inf if self.clip_norm is None else float(self.clip_norm),
            stochastic_rounding=self.stochastic_rounding,
            seed=self.seed,
            **own,
        )

    def step_rule(self) -> StepRule:
        """The rule and its numbers, as passed to kernels."""
        return self._step_rule

    @property
    def algorithm(self) -> int:
        """The number that stands for this optimizer in checkpoints."""
        return tuple(RULES).index(self.rule)

    def state_kinds(self) -> dict[str, str]:
        """State tensors other than ``"step"``, in the order that kernels take them: ``"full"`` (N, D) or ``"row"``
        (N,).
        """
        return RULES[self.rule].states

    def reads_rows(self) -> bool:
        """Whether the step of an element depends on more than the element: on its whole row or its column's index."""
        row_states = "row" in self.state_kinds().values()
        return row_states or self.rule == "lamb" or self.clip_norm is not None or self.stochastic_rounding

    def initial_value(self) -> float:
        """The initial value of state tensors."""
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
            device: the table's device.
            dtype: float32; float64 for a float64 table. An ``initial_accumulator`` must fit it.

        Returns:
            ``"step"``, ``(1,)`` int64, and the tensors that :meth:`state_kinds` names. Each of the latter may be
            replaced by a view with another row stride, so that rows of a larger storage can hold weights and state side
            by side.
        """
        check_sizes(num_rows=num_rows, dim=dim)
        check_device("device", device)
        check_dtype("dtype", dtype)
        # The only initial value that is not 0.
        check_fits("initial_accumulator", self.initial_value(), dtype or torch.get_default_dtype())
        shapes = {"full": (num_rows, dim), "row": (num_rows,)}
        state = {"step": torch.zeros(1, dtype=torch.int64, device=device)}
        for name, kind in self.state_kinds().items():
            state[name] = torch.full(shapes[kind], self.initial_value(), dtype=dtype, device=device)
        return state


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

    rule = "sgd"

    def _check_numbers(self) -> None:
        _check("momentum", self.momentum, 0, 1, below=True)
        _check_flag("nesterov", self.nesterov)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0, got momentum=0")

    def _numbers(self) -> dict[str, float | bool]:
        return {"beta1": self.momentum, "nesterov": self.nesterov}

    def state_kinds(self) -> dict[str, str]:
        """The momentum, if there is one."""
        return super().state_kinds() if self.momentum else {}


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer, 2011): with ``g = G + λw``, ``s ← s + g²`` and ``w ← w − η·g/(√s + ε)``.

    Args:
        eps: ε.
        initial_accumulator: the initial value of s.
    """

    eps: float = 1e-10
    initial_accumulator: float = 0.0

    rule = "adagrad"

    def _check_numbers(self) -> None:
        _check("eps", self.eps, 0)
        _check("initial_accumulator", self.initial_accumulator, 0)

    def initial_value(self) -> float:
        """The accumulator's initial value."""
        return float(self.initial_accumulator)


@dataclass(frozen=True)
class RowwiseAdagrad(Adagrad):
    """Adagrad with one accumulator per row (as in DLRM): ``s ← s + mean_j(g²)`` and ``w ← w − η·g/(√s + ε)``.

    ``g = G + λw``; with ``decoupled``, ``g = G`` and ``w ← (1 − ηλ)·w`` beforehand.

    Args:
        eps: ε.
        decoupled: whether weight decay is decoupled from the gradient, as above.
    """

    eps: float = 1e-8
    decoupled: bool = False

    rule = "rowwise_adagrad"

    def _check_numbers(self) -> None:
        super()._check_numbers()
        _check_flag("decoupled", self.decoupled)


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

    rule = "adam"

    def _check_numbers(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, got {self.betas!r}")
        _check("betas[0]", self.betas[0], 0, 1, below=True)
        _check("betas[1]", self.betas[1], 0, 1, below=True)
        _check("eps", self.eps, 0)

    def _numbers(self) -> dict[str, float | bool]:
        return {"beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps}


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): ``w ← (1 − ηλ)·w`` first, and ``g = G``."""

    weight_decay: float = 1e-2

    decoupled = True


@dataclass(frozen=True)
class PartialRowwiseAdam(Adam):
    """Adam with one second moment per row, ``v ← β2·v + (1−β2)·mean_j(G²)``, and decoupled weight decay."""

    rule = "partial_rowwise_adam"
    decoupled = True


@dataclass(frozen=True)
class LAMB(Adam):
    """LAMB (You et al., 2020) with the trust ratio of each row: ``q = m̂/(√v̂ + ε) + λw``, ``w ← w − η·(‖w‖/‖q‖)·q``.

    The moments are those of Adam with ``g = G``. The ratio is 1 if either norm is zero.
    """

    eps: float = 1e-6

    rule = "lamb"


@dataclass(frozen=True)
class FTRL(Optimizer):
    """FTRL-proximal (McMahan et al., 2013), per element.

    ``n' = n + G²``, ``z ← z + G − (√n' − √n)/η·w``, and ``w ← 0`` where ``|z| ≤ λ1``, else
    ``w ← −(z − sign(z)·λ1)/((β + √n')/η + λ2)``. Weights are a function of the state (n, z), so a table should start at
    zero: with β > 0 the first touch replaces other values. With η = 0 nothing changes, neither weights nor state.
    ``weight_decay`` must be 0, since λ2 takes its place.

    Args:
        beta: β.
        l1: λ1.
        l2: λ2.
    """

    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    rule = "ftrl"

    def _check_numbers(self) -> None:
        for name in ("beta", "l1", "l2"):
            _check(name, getattr(self, name), 0)
        if self.weight_decay:
            raise ValueError(f"weight_decay must be 0 for FTRL, whose l2 does its work, got {self.weight_decay}")

    def _numbers(self) -> dict[str, float | bool]:
        return {"beta1": self.beta, "l1": self.l1, "l2": self.l2}
