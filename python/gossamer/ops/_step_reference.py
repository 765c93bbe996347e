"""The steps of the fused optimizers in plain torch, one formula for each rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gossamer._step_rules import StepRule


def _sgd(rule, w, grad, states, t, lr):
    if not states:
        return (w - lr * grad,)
    momentum = rule.beta1 * states[0] + grad
    return w - lr * (grad + rule.beta1 * momentum if rule.nesterov else momentum), momentum


def _adagrad(rule, w, grad, states, t, lr):
    total = states[0] + grad.square()
    return w - lr * grad / (total.sqrt() + rule.eps), total


def _rowwise_adagrad(rule, w, grad, states, t, lr):
    total = states[0] + grad.square().mean(1)
    return w - lr * grad / (total.sqrt() + rule.eps).unsqueeze(1), total


def _ftrl(rule, w, grad, states, t, lr):
    # A number would become float32 beside a condition, whatever the table's dtype.
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


def _adam(rule, w, grad, states, t, lr):
    q, m, v = _moments(rule, grad, grad.square(), states, t)
    return w - lr * q, m, v


def _partial_rowwise_adam(rule, w, grad, states, t, lr):
    q, m, v = _moments(rule, grad, grad.square().mean(1), states, t)
    return w - lr * q, m, v


def _lamb(rule, w, grad, states, t, lr):
    q, m, v = _moments(rule, grad, grad.square(), states, t)
    q = q + rule.weight_decay * w
    norm_w, norm_q = w.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    return w - lr * (q * torch.where((norm_w > 0) & (norm_q > 0), norm_w / norm_q, 1)), m, v


# (rule, w, grad, states, t, lr) -> (new w, *new states), by the names of gossamer._step_rules.RULES.
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
) -> tuple[torch.Tensor, ...]:
    """One step of an optimizer of :mod:`gossamer.optim` in plain torch, in the dtype of its arguments.

    Args:
        rule: the rule with its numbers.
        w: ``(n, D)`` rows.
        grad: ``(n, D)``, their summed gradients.
        states: the states' rows, ``(n, D)`` or ``(n,)``.
        t: one int64 element, the number of this step, from 1.
        lr: η.

    Returns:
        The new rows and states.
    """
    if math.isfinite(rule.clip_value):
        grad = grad.clamp(-rule.clip_value, rule.clip_value)
    if math.isfinite(rule.clip_norm):
        norm = grad.norm(dim=1, keepdim=True)
        grad = grad * torch.where(norm > rule.clip_norm, rule.clip_norm / norm, 1)
    if rule.decay == "weights":
        w = w * (1 - lr * rule.weight_decay)
    elif rule.decay == "gradient":
        grad = grad + rule.weight_decay * w
    return FORMULAS[rule.name](rule, w, grad, states, t, lr)
