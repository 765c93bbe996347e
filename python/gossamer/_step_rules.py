"""The rules of fused optimizer steps: the name, state and numbers of each.

The reference in Python, the native kernels and the Triton kernels each have one formula per rule, under its name.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """An entry of :data:`RULES`.

    Attributes:
        states: the state tensors by name, at most two: ``"full"`` for a value per element, ``(N, D)``, or ``"row"`` for
            a value per row, ``(N,)``.
        numbers: the fields of :class:`StepRule` that its formula reads in addition to ``lr``.
        own_decay: True if the formula itself handles weight decay, or has none; False if the decay is applied before
            the formula.
    """

    states: dict[str, str]
    numbers: tuple[str, ...]
    own_decay: bool = False


# Checkpoints hold positions in this table, so new rules go to the end.
RULES: dict[str, Rule] = {
    "sgd": Rule({"momentum_buffer": "full"}, ("beta1", "nesterov")),
    "adagrad": Rule({"sum": "full"}, ("eps",)),
    "rowwise_adagrad": Rule({"sum": "row"}, ("eps",)),
    "adam": Rule({"exp_avg": "full", "exp_avg_sq": "full"}, ("beta1", "beta2", "eps")),
    "partial_rowwise_adam": Rule({"exp_avg": "full", "exp_avg_sq": "row"}, ("beta1", "beta2", "eps")),
    "lamb": Rule({"exp_avg": "full", "exp_avg_sq": "full"}, ("beta1", "beta2", "eps"), own_decay=True),
    "ftrl": Rule({"accumulator": "full", "linear": "full"}, ("beta1", "l1", "l2"), own_decay=True),
}
# The three ways in which weight decay λ enters: λ·w is added to the gradient; w is multiplied by 1 − lr·λ before the
# step; or the rule's own formula has it.
DECAYS = ("gradient", "weights", "formula")


class StepRule(NamedTuple):
    """A rule with its numbers, as passed to kernels; numbers that the rule does not read keep their defaults.

    Attributes:
        name: a key of :data:`RULES`.
        lr: learning rate; not read if a tensor holds it.
        weight_decay: λ.
        decay: a member of :data:`DECAYS`.
        beta1: momentum of SGD, β1 of Adam and its relatives, β of FTRL.
        beta2: β2.
        eps: ε.
        nesterov: whether the momentum is Nesterov's.
        l1: λ1 of FTRL.
        l2: λ2 of FTRL.
        clip_value: largest magnitude of a gradient element; infinity for none.
        clip_norm: largest norm of a row's gradient; infinity for none.
        stochastic_rounding: whether rows of 16-bit floats and of codes are rounded stochastically.
        seed: seed of the rounding.
    """

    name: str
    lr: float = 0.0
    weight_decay: float = 0.0
    decay: str = "gradient"
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: bool = False
    l1: float = 0.0
    l2: float = 0.0
    clip_value: float = math.inf
    clip_norm: float = math.inf
    stochastic_rounding: bool = False
    seed: int = 0

    @property
    def row_states(self) -> tuple[bool, bool]:
        """Whether the first, and whether the second, state tensor holds a value per row."""
        kinds = [*RULES[self.name].states.values(), None, None]
        return kinds[0] == "row", kinds[1] == "row"

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether new rows of a table of ``dtype`` are rounded stochastically."""
        return self.stochastic_rounding and dtype in (torch.float16, torch.bfloat16, torch.int8, torch.int16)
