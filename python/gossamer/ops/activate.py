"""The activation of expert layers as one operator: gate, up and their product in one pass over the pre-activation."""

from __future__ import annotations

import math

import torch

from gossamer import _backend
from gossamer._activation import Activation, activate_reference, as_activation, check_interleaved
from gossamer._checks import check_float, check_tensor
from gossamer.ops._registration import register, register_autograd

_FORM = "str activation, float alpha, float limit, bool interleaved, str backend"


def _kernel(preact, activation, alpha, limit, interleaved, backend) -> torch.Tensor:
    module = _backend.kernels(backend, "activate")
    return module.activate(preact, Activation(activation, alpha, limit), interleaved)


def _fake(preact, activation, alpha, limit, interleaved, backend) -> torch.Tensor:
    return preact.new_empty(preact.shape[0], preact.shape[1] // Activation(activation, alpha, limit).halves)


# preact (R, 2I), or (R, I) when not gated.
_activate = register(f"activate(Tensor preact, {_FORM}) -> Tensor", _kernel, _fake)


def _backward_kernel(dact, preact, activation, alpha, limit, interleaved, backend) -> torch.Tensor:
    module = _backend.kernels(backend, "activate")
    return module.activate_backward(dact, preact, Activation(activation, alpha, limit), interleaved)


def _backward_fake(dact, preact, activation, alpha, limit, interleaved, backend) -> torch.Tensor:
    return preact.new_empty(preact.shape)


_activate_backward = register(
    f"activate_backward(Tensor dact, Tensor preact, {_FORM}) -> Tensor", _backward_kernel, _backward_fake
)


def _setup_context(ctx, inputs, output):
    preact, *ctx.form = inputs
    ctx.save_for_backward(preact)


def _backward(ctx, dact):
    (preact,) = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 6
    if torch.is_grad_enabled():
        # A gradient of this gradient is wanted, which plain torch knows.
        name, alpha, limit, interleaved, _ = ctx.form
        act = activate_reference(preact, Activation(name, alpha, limit), interleaved)
        (dpreact,) = torch.autograd.grad(act, preact, dact, create_graph=True)
    else:
        dpreact = _activate_backward(dact, preact, *ctx.form)
    return dpreact, *[None] * 5


register_autograd("activate", _backward, _setup_context)


def activate(
    preact: torch.Tensor, activation: str | Activation = "swiglu", *, interleaved: bool = False
) -> torch.Tensor:
    """The activation of an expert layer by itself: ``act(g)·u`` of the gate and up halves, or ``act(g)``.

    One pass over the pre-activation each way; the backward pass keeps it and nothing else. The formulas are those of
    :class:`gossamer.Activation`, computed in float32 (float64 for float64) and rounded once.

    Args:
        preact: ``(..., 2I)`` float, or ``(..., I)`` for an ungated activation.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        interleaved: whether gate and up alternate along 2I (gate even, up odd) instead of lying one after the other.

    Returns:
        ``(..., I)`` in the dtype of ``preact``. Differentiable, twice where it is asked for.

    Raises:
        TypeError: ``preact`` is no tensor, its dtype is not supported, or ``interleaved`` is no bool.
        ValueError: the activation is unknown, or ``interleaved`` without a gate; ``preact`` has no dimension, or its
            last size is odd for a gated activation.
    """
    activation = as_activation(activation)
    check_interleaved(interleaved, activation)
    check_tensor("preact", preact)
    # The activation goes with the expert layer, whose CUDA kernels have Triton's beside them here.
    backend = _backend.resolve("expert_mlp", preact)
    check_float("preact", preact, backend)
    if preact.dim() == 0 or preact.shape[-1] % activation.halves:
        wanted = "(..., 2I)" if activation.gated else "(..., I)"
        raise ValueError(f"preact must have shape {wanted} for {activation.name!r}, got {tuple(preact.shape)}")
    if backend == "reference":
        return activate_reference(preact, activation, interleaved)
    form = (activation.name, activation.alpha, activation.limit, interleaved, backend)
    if preact.dim() == 2:
        return _activate(preact, *form)
    *leading, wide = preact.shape
    return _activate(preact.reshape(math.prod(leading), wide), *form).view(*leading, wide // activation.halves)
