"""Low-rank updates of an expert layer's two products."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer._activation import Activation
from gossamer._autocast import autocast
from gossamer._checks import check_same_device, check_shape
from gossamer._layout import stored_transposed
from gossamer.ops._overwrite import may_overwrite
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.low_rank import check_factor_dtype, check_rank

LowRankFactors = tuple[torch.Tensor, torch.Tensor]


def check_factors(
    name: str, factors: LowRankFactors | None, x: torch.Tensor, weight: torch.Tensor
) -> LowRankFactors | None:
    """Hold ``factors`` against ``weight (E, N, C)``: ``(a (E, r, C), b (E, N, r))``, in autocast's dtype if any."""
    if factors is None:
        return None
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise TypeError(f"{name} must be a pair (a, b) of tensors, got {type(factors).__name__}")
    a, b = factors
    e, n, c = weight.shape
    check_shape(f"{name}[0]", a, (e, None, c), "(E, r, C)")
    rank = a.shape[1]
    check_shape(f"{name}[1]", b, (e, n, rank), "(E, N, r)")
    check_rank(rank, n, c)
    a, b = autocast(a, b)
    check_factor_dtype(x, a, b)
    check_same_device(**{"x": x, f"{name}[0]": a, f"{name}[1]": b})
    return a, b


def empty_gradients(
    x: torch.Tensor, inputs: tuple[torch.Tensor | None, ...], needs: list[bool]
) -> tuple[torch.Tensor, ...]:
    """Room for the gradients of inputs, laid out like the weights among them; ``(0,)`` where not needed."""
    grads = []
    for need, t in zip(needs, inputs, strict=True):
        if not need:
            grads.append(x.new_empty(0))
        elif t.dim() == 3 and stored_transposed(t):
            grads.append(t.new_empty(t.shape[0], t.shape[2], t.shape[1]).transpose(1, 2))
        else:
            grads.append(t.new_empty(t.shape))
    return tuple(grads)


_PRODUCTS = "Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_FACTORS = "Tensor? a1, Tensor? b1, Tensor? a2, Tensor? b2"
_ROUTING = "Tensor slots, Tensor rows, Tensor offsets, Tensor weights"
_FORM = "str activation, float alpha, float limit, bool interleaved, float scale"


def _forward(x, gate_up, down, gate_up_bias, down_bias, a1, b1, a2, b2, slots, rows, offsets, weights, name, *form):
    alpha, limit, interleaved, scale, save, backend = form
    return _backend.kernels(backend, "expert_mlp_lora").expert_mlp_lora(
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        (a1, b1, a2, b2),
        slots,
        rows,
        offsets,
        weights,
        Activation(name, alpha, limit),
        interleaved,
        scale,
        save,
    )


def _forward_fake(x, gate_up, down, gate_up_bias, down_bias, a1, b1, a2, b2, slots, rows, offsets, weights, *form):
    save, wide = form[-2], torch.promote_types(x.dtype, torch.float32)
    preact = x.new_empty((slots.shape[0], gate_up.shape[1]) if save else (0,))
    low = (x.new_empty((slots.shape[0], a.shape[1]) if save and a is not None else (0,), dtype=wide) for a in (a1, a2))
    return x.new_empty(x.shape), preact, *low


# For the backward pass, empty unless save: preact (R, 2I) as of expert_mlp, and s1 = x·a1ᵀ and s2 = act·a2ᵀ (R, r).
_expert_mlp_lora = register(
    f"expert_mlp_lora({_PRODUCTS}, {_FACTORS}, {_ROUTING}, {_FORM}, bool save, str backend) -> "
    "(Tensor y, Tensor preact, Tensor s1, Tensor s2)",
    _forward,
    _forward_fake,
)


def _call_backward(
    dy,
    x,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    a1,
    b1,
    a2,
    b2,
    slots,
    rows,
    offsets,
    weights,
    s1,
    s2,
    preact,
    *rest,
    overwrite,
):
    name, alpha, limit, interleaved, scale, needs, backend = rest
    return _backend.kernels(backend, "expert_mlp_lora").expert_mlp_lora_backward(
        dy,
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        (a1, b1, a2, b2),
        slots,
        rows,
        offsets,
        weights,
        preact,
        (s1, s2),
        Activation(name, alpha, limit),
        interleaved,
        scale,
        needs,
        overwrite,
    )


def _backward_kernel(*args):
    return _call_backward(*args, overwrite=False)


def _backward_overwriting_kernel(*args):
    return _call_backward(*args, overwrite=True)


def _backward_fake(dy, x, gate_up, down, gate_up_bias, down_bias, a1, b1, a2, b2, slots, rows, offsets, weights, *rest):
    inputs = (x, gate_up, down, weights, gate_up_bias, down_bias)
    factors = tuple(
        t.new_empty(t.shape) if need else x.new_empty(0, dtype=x.dtype if t is None else t.dtype)
        for need, t in zip(rest[8][6:], (a1, b1, a2, b2), strict=True)
    )
    return *empty_gradients(x, inputs, rest[8][:6]), *factors


def _backward_schema(name: str, preact: str) -> str:
    return (
        f"{name}(Tensor dy, {_PRODUCTS}, {_FACTORS}, {_ROUTING}, Tensor s1, Tensor s2, {preact} preact, {_FORM}, "
        "bool[10] needs, str backend) -> (Tensor dx, Tensor dgate_up, Tensor ddown, Tensor dweights, "
        "Tensor dgate_up_bias, Tensor ddown_bias, Tensor da1, Tensor db1, Tensor da2, Tensor db2)"
    )


# needs, and the results, are in the order x, gate_up, down, weights, gate_up_bias, down_bias, a1, b1, a2, b2.
_expert_mlp_lora_backward = register(
    _backward_schema("expert_mlp_lora_backward", "Tensor"), _backward_kernel, _backward_fake
)
# The same with d(preact) written over preact.
_expert_mlp_lora_backward_ = register(
    _backward_schema("expert_mlp_lora_backward_", "Tensor(a!)"), _backward_overwriting_kernel, _backward_fake
)


def _setup_context(ctx, inputs, output):
    *tensors, name, alpha, limit, interleaved, scale, save, ctx.backend = inputs
    ctx.form = name, alpha, limit, interleaved, scale
    _, preact, s1, s2 = output
    if not save:
        raise RuntimeError("gossamer::expert_mlp_lora needs save=True where a gradient is wanted")
    ctx.mark_non_differentiable(preact, s1, s2)
    ctx.set_materialize_grads(False)
    # A detached alias of preact, so that the count of its storage's users tells whether someone else still holds it.
    ctx.save_for_backward(*tensors, s1.detach(), s2.detach(), preact.detach())


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 20
    n = ctx.needs_input_grad
    needs = [n[0], n[1], n[2], n[12], n[3], n[4], *n[5:9]]
    saved = ctx.saved_tensors
    op = _expert_mlp_lora_backward_ if may_overwrite(saved[-1]) else _expert_mlp_lora_backward
    grads = op(dy, *saved, *ctx.form, needs, ctx.backend)
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias, *dfactors = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return dx, dgate_up, ddown, dgate_up_bias, ddown_bias, *dfactors, None, None, None, dweights, *[None] * 7


register_autograd("expert_mlp_lora", _backward, _setup_context)


def expert_mlp_lora(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_lora: LowRankFactors | None,
    down_lora: LowRankFactors | None,
    dispatch: Dispatch,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    scale: float,
    backend: str,
) -> torch.Tensor:
    """:func:`gossamer.expert_mlp` with low-rank factors, inside the layer's own products."""
    inputs = (x, gate_up, down, gate_up_bias, down_bias, *(gate_up_lora or (None,) * 2), *(down_lora or (None,) * 2))
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, weights))
    y, *_ = _expert_mlp_lora(
        *inputs,
        dispatch.row_slots,
        dispatch.rows,
        dispatch.offsets,
        weights,
        activation.name,
        activation.alpha,
        activation.limit,
        interleaved,
        scale,
        save,
        backend,
    )
    return y
