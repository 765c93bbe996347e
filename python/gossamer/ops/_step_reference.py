"""The steps of the fused optimizers in plain torch, one formula for each rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gossamer._step_rules import StepRule


class RowSums(NamedTuple):
    """Sums over whole rows for rules that need them, when the tensors hold only some of the columns.

    Attributes:
        columns: number of columns of a whole row.
        sum_over: turns sums ``(n,)`` over the local columns into sums over whole rows; None if rows are whole.
    """

    columns: int = 0
    sum_over: Callable[[torch.Tensor], torch.Tensor] | None = None

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of each row, ``(n,)``."""
        return x.mean(1) if self.sum_over is None else self.sum_over(x.sum(1)) / self.columns

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The Euclidean norm of each row, ``(n, 1)``."""
        if self.sum_over is None:
            return x.norm(dim=1, keepdim=True)
        return self.sum_over(x.square().sum(1)).sqrt().unsqueeze(1)


WHOLE_ROWS = RowSums()


def _sgd(rule, w, grad, states, t, lr, rows):
    if not states:
        return (w - lr * grad,)
    momentum = rule.beta1 * states[0] + grad
    return w - lr * (grad + rule.beta1 * momentum if rule.nesterov else momentum), momentum


def _adagrad(rule, w, grad, states, t, lr, rows):
    total = states[0] + grad.square()
    return w - lr * grad / (total.sqrt() + rule.eps), total


def _rowwise_adagrad(rule, w, grad, states, t, lr, rows):
    total = states[0] + rows.mean(grad.square())
    return w - lr * grad / (total.sqrt() + rule.eps).unsqueeze(1), total


def _ftrl(rule, w, grad, states, t, lr, rows):
    # As a tensor: torch.where(condition, number, ...) would give float32 whatever the table's dtype.
    lr = torch.as_tensor(lr, dtype=w.dtype, device=w.device)
    steps = lr != 0
    lr = torch.where(steps, lr, 1)
    n = states[0] + grad.square()
    z = states[1] + grad - (n.sqrt() - states[0].sqrt()) / lr * w
    shrunk = -(z - z.sign() * rule.l1) / ((rule.beta1 + n.sqrt()) / lr + rule.l2)
    new = torch.where(z.abs() <= rule.l1, 0, shrunk), n, z
    return tuple(torch.where(steps, after, before) for after, before in zip(new, (w, *states), strict=True))


def _moments(rule, grad, square, states, t):
    """The moments of Adam, and m̂ / (√v̂ + ε)."""
    m = rule.beta1 * states[0] + (1 - rule.beta1) * grad
    v = rule.beta2 * states[1] + (1 - rule.beta2) * square
    correction1, correction2 = 1 - rule.beta1 ** t.double(), 1 - rule.beta2 ** t.double()
    denominator = v.sqrt() / correction2.sqrt().to(v.dtype) + rule.eps
    if v.dim() == 1:
        denominator = denominator.unsqueeze(1)
    return m / correction1.to(m.dtype) / denominator, m, v


def _adam(rule, w, grad, states, t, lr, rows):
    q, m, v = _moments(rule, grad, grad.square(), states, t)
    return w - lr * q, m, v


def _partial_rowwise_adam(rule, w, grad, states, t, lr, rows):
    q, m, v = _moments(rule, grad, rows.mean(grad.square()), states, t)
    return w - lr * q, m, v


def _lamb(rule, w, grad, states, t, lr, rows):
    q, m, v = _moments(rule, grad, grad.square(), states, t)
    q = q + rule.weight_decay * w
    norm_w, norm_q = rows.norm(w), rows.norm(q)
    return w - lr * (q * torch.where((norm_w > 0) & (norm_q > 0), norm_w / norm_q, 1)), m, v


# (rule, w, grad, states, t, lr, rows) -> (new w, *new states), by the names of gossamer._step_rules.RULES.
FORMULAS = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
    "partial_rowwise_adam": _partial_rowwise_adam,
    "lamb": _lamb,
    "ftrl": _ftrl,
}


def step_reference(
    rule: StepRule,
    w: torch.Tensor,
    grad: torch.Tensor,
    states: Sequence[torch.Tensor],
    t: torch.Tensor,
    lr: torch.Tensor | float,
    rows: RowSums = WHOLE_ROWS,
) -> tuple[torch.Tensor, ...]:
    """One step of an optimizer of :mod:`gossamer.optim` in plain torch, in the dtype of its arguments.

    Args:
        rule: the rule with its numbers.
        w: ``(n, D)`` rows.
        grad: ``(n, D)``, their summed gradients.
        states: the states' rows, ``(n, D)`` or ``(n,)``.
        t: one int64 element, the number of this step, from 1.
        lr: η.
        rows: how to sum over a whole row.

    Returns:
        The new rows and states.
    """
    # torch clamps to no number beyond the dtype's, which no gradient exceeds.
    if rule.clip_value <= torch.finfo(grad.dtype).max:
        grad = grad.clamp(-rule.clip_value, rule.clip_value)
    if math.isfinite(rule.clip_norm):
        norm = rows.norm(grad)
        grad = grad * torch.where(norm > rule.clip_norm, rule.clip_norm / norm, 1)
    if rule.decay == "weights":
        w = w * (1 - lr * rule.weight_decay)
    elif rule.decay == "gradient":
        grad = grad + rule.weight_decay * w
    return FORMULAS[rule.name](rule, w, grad, states, t, lr, rows)
