"""The activation of expert layers as one operator: gate, up and their product in one pass over the pre-activation."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._activation import Activation, activate_reference, as_activation, check_interleaved
from gossamer._checks import check_float, check_tensor
from gossamer.ops._records import define


class Activate(NamedTuple):
    """Arguments of the activation of rows.

    Attributes:
        preact: ``(R, 2I)``, or ``(R, I)`` when not gated.
        activation: the activation with its constants.
        interleaved: whether gate and up alternate along 2I.
    """

    preact: torch.Tensor
    activation: Activation
    interleaved: bool


class ActivateBackward(NamedTuple):
    """Arguments of the backward pass: those of :class:`Activate`, and ``dact (R, I)``, the gradient of the result."""

    dact: torch.Tensor
    forward: Activate


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import activate
    else:
        from gossamer.triton_kernels import activate
    return activate


def _forward(args: Activate, backend: str) -> torch.Tensor:
    return _kernels(backend).activate(args)


def _forward_fake(args: Activate) -> torch.Tensor:
    rows, wide = args.preact.shape
    return args.preact.new_empty(rows, wide // args.activation.halves)


_activate = define("activate", Activate, kernel=_forward, fake=_forward_fake, returns="Tensor")


def _backward(args: ActivateBackward, backend: str) -> torch.Tensor:
    return _kernels(backend).activate_backward(args)


def _backward_fake(args: ActivateBackward) -> torch.Tensor:
    return args.forward.preact.new_empty(args.forward.preact.shape)


_activate_backward = define(
    "activate_backward", ActivateBackward, kernel=_backward, fake=_backward_fake, returns="Tensor"
)


def _save(ctx, args: Activate, output: torch.Tensor):
    return (args,)


def _differentiate(ctx, args: Activate, tensors, dact: torch.Tensor):
    if "preact" not in ctx.needs:
        return {}
    if torch.is_grad_enabled():
        # Second derivatives are computed in plain torch.
        act = activate_reference(args.preact, args.activation, args.interleaved)
        (dpreact,) = torch.autograd.grad(act, args.preact, dact, create_graph=True)
    else:
        dpreact = _activate_backward(ActivateBackward(dact, args), ctx.backend)
    return {"preact": dpreact}


_activate.differentiate(_save, _differentiate)


def activate(
    preact: torch.Tensor, activation: str | Activation = "swiglu", *, interleaved: bool = False
) -> torch.Tensor:
    """The activation of an expert layer by itself: ``act(g)·u`` of the gate and up halves, or ``act(g)``.

    Forward and backward each take one pass over the pre-activation, which is all that is saved for the backward pass.
    The formulas are those of :class:`gossamer.Activation`, computed in float32 (float64 for float64) and rounded once.

    Args:
        preact: ``(..., 2I)`` float, or ``(..., I)`` for an ungated activation.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        interleaved: whether gate and up alternate along 2I (gate even, up odd) instead of lying one after the other.

    Returns:
        ``(..., I)`` in the dtype of ``preact``. Differentiable, also twice.

    Raises:
        TypeError: ``preact`` is not a tensor, its dtype is not supported, or ``interleaved`` is not a bool.
        ValueError: the activation is unknown, or ``interleaved`` without a gate; ``preact`` has no dimension, or its
            last size is odd for a gated activation.
    """
    activation = as_activation(activation)
    check_interleaved(interleaved, activation)
    check_tensor("preact", preact)
    backend = _backend.resolve("activate", preact)
    check_float("preact", preact, backend)
    if preact.dim() == 0 or preact.shape[-1] % activation.halves:
        wanted = "(..., 2I)" if activation.gated else "(..., I)"
        raise ValueError(f"preact must have shape {wanted} for {activation.name!r}, got {tuple(preact.shape)}")
    if backend == "reference":
        return activate_reference(preact, activation, interleaved)
    if preact.dim() == 2:
        return _activate(Activate(preact, activation, interleaved), backend)
    *leading, wide = preact.shape
    rows = Activate(preact.reshape(math.prod(leading), wide), activation, interleaved)
    return _activate(rows, backend).view(*leading, wide // activation.halves)
