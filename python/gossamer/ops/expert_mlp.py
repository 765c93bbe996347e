"""The whole expert feed-forward layer as one operator: gather, GEMM with GLU, GEMM, weighted sum back to tokens."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer._activation import Activation, activate_reference, as_activation, check_interleaved
from gossamer._autocast import autocast
from gossamer._checks import (
    check_float,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_shape,
    check_tensor,
)
from gossamer.ops._composed_experts import composed_expert_mlp
from gossamer.ops._overwrite import may_overwrite
from gossamer.ops._registration import register, register_autograd
from gossamer.ops._weights import as_weight
from gossamer.ops.dispatch import Dispatch, check_dispatch
from gossamer.ops.expert_mlp_lora import LowRankFactors, check_factors, empty_gradients, expert_mlp_lora
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.quantized_experts import quantized_expert_mlp

_ROUTING = "Tensor slots, Tensor rows, Tensor offsets, Tensor weights"
_FORM = "str activation, float alpha, float limit, bool interleaved"


def expert_mlp_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor | QuantizedExpertWeight,
    down: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    gate_up_lora: LowRankFactors | None = None,
    down_lora: LowRankFactors | None = None,
    lora_scale: float = 1.0,
) -> torch.Tensor:
    """:func:`expert_mlp` as a loop over experts in plain torch, differentiable, in any floating dtype."""
    activation = as_activation(activation)
    gate_up, down = (w.dequantize(x.dtype) if isinstance(w, QuantizedExpertWeight) else w for w in (gate_up, down))
    slots = dispatch.slots.long()
    offsets = dispatch.offsets.tolist()
    flat_weights = weights.reshape(-1)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=accumulate, device=x.device)
    for e in range(dispatch.num_experts):
        mine = slots[offsets[e] : offsets[e + 1]]
        token = mine // dispatch.top_k
        rows = x.index_select(0, token)
        hidden = rows @ gate_up[e].T
        if gate_up_lora is not None:
            hidden = hidden + lora_scale * (rows @ gate_up_lora[0][e].T.to(x.dtype) @ gate_up_lora[1][e].T.to(x.dtype))
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias[e]
        act = activate_reference(hidden, activation, interleaved)
        out = act @ down[e].T
        if down_lora is not None:
            out = out + lora_scale * (act @ down_lora[0][e].T.to(x.dtype) @ down_lora[1][e].T.to(x.dtype))
        if down_bias is not None:
            out = out + down_bias[e]
        y = y.index_add(0, token, out.to(accumulate) * flat_weights[mine].to(accumulate).unsqueeze(1))
    return y.to(x.dtype)


def _forward(
    x,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    slots,
    rows,
    offsets,
    weights,
    activation,
    alpha,
    limit,
    interleaved,
    save_preact,
    backend,
):
    return _backend.kernels(backend, "expert_mlp").expert_mlp(
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        slots,
        rows,
        offsets,
        weights,
        Activation(activation, alpha, limit),
        interleaved,
        save_preact,
    )


def _forward_fake(
    x,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    slots,
    rows,
    offsets,
    weights,
    activation,
    alpha,
    limit,
    interleaved,
    save_preact,
    backend,
):
    preact = x.new_empty((slots.shape[0], gate_up.shape[1]) if save_preact else (0,))
    return x.new_empty(x.shape), preact


# preact (R, 2I) is sorted by expert, its columns in the order of gate_up's rows; empty unless save_preact.
_expert_mlp = register(
    "expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
    f"{_ROUTING}, {_FORM}, bool save_preact, str backend) -> (Tensor y, Tensor preact)",
    _forward,
    _forward_fake,
)


def _call_backward(
    dy, x, gate_up, down, gate_up_bias, down_bias, slots, rows, offsets, weights, preact, *rest, overwrite
):
    name, alpha, limit, interleaved, needs, backend = rest
    return _backend.kernels(backend, "expert_mlp").expert_mlp_backward(
        dy,
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        slots,
        rows,
        offsets,
        weights,
        preact,
        Activation(name, alpha, limit),
        interleaved,
        needs,
        overwrite,
    )


def _backward_kernel(*args):
    return _call_backward(*args, overwrite=False)


def _backward_overwriting_kernel(*args):
    return _call_backward(*args, overwrite=True)


def _backward_fake(dy, x, gate_up, down, gate_up_bias, down_bias, slots, rows, offsets, weights, preact, *rest):
    return empty_gradients(x, (x, gate_up, down, weights, gate_up_bias, down_bias), rest[4])


def _backward_schema(name: str, preact: str) -> str:
    return (
        f"{name}(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
        f"{_ROUTING}, {preact} preact, {_FORM}, bool[6] needs, str backend) -> "
        "(Tensor dx, Tensor dgate_up, Tensor ddown, Tensor dweights, Tensor dgate_up_bias, Tensor ddown_bias)"
    )


# needs, and the results, are in the order x, gate_up, down, weights, gate_up_bias, down_bias; others are empty.
_expert_mlp_backward = register(_backward_schema("expert_mlp_backward", "Tensor"), _backward_kernel, _backward_fake)
# The same with d(preact) written over preact, which is as large as all other activations together.
_expert_mlp_backward_ = register(
    _backward_schema("expert_mlp_backward_", "Tensor(a!)"), _backward_overwriting_kernel, _backward_fake
)


def _setup_context(ctx, inputs, output):
    x, gate_up, down, gate_up_bias, down_bias, slots, rows, offsets, weights, *form, save_preact, ctx.backend = inputs
    ctx.form = form
    _, preact = output
    if not save_preact:
        raise RuntimeError("gossamer::expert_mlp needs save_preact=True where a gradient is wanted")
    ctx.mark_non_differentiable(preact)
    # Else the backward pass would be handed (R, 2I) zeros as the gradient of preact.
    ctx.set_materialize_grads(False)
    # A detached alias, so that the count of its storage's users tells whether someone else still holds preact.
    preact = preact.detach()
    ctx.save_for_backward(x, gate_up, down, gate_up_bias, down_bias, slots, rows, offsets, weights, preact)


def _backward(ctx, dy, _dpreact):
    if dy is None:
        return (None,) * 15
    n = ctx.needs_input_grad
    needs = [n[0], n[1], n[2], n[8], n[3], n[4]]
    saved = ctx.saved_tensors
    op = _expert_mlp_backward_ if may_overwrite(saved[-1]) else _expert_mlp_backward
    grads = op(dy, *saved, *ctx.form, needs, ctx.backend)
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return dx, dgate_up, ddown, dgate_up_bias, ddown_bias, None, None, None, dweights, *[None] * 6


register_autograd("expert_mlp", _backward, _setup_context)


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor | QuantizedExpertWeight,
    down: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    gate_up_lora: LowRankFactors | None = None,
    down_lora: LowRankFactors | None = None,
    lora_scale: float = 1.0,
) -> torch.Tensor:
    """The feed-forward layer of every token's experts: ``y[t] = Σ_k weights[t,k]·(act(x[t]·W1ᵀ + b1)·W2ᵀ + b2)``.

    W1, b1, W2 and b2 are those of expert ``expert_ids[t,k]``. The backward pass keeps ``x``, the pre-activation
    ``(R, 2I)`` and the routing, and recomputes the rest, after SonicMoE (Guo et al., 2025); the routing-weight gradient
    is ``⟨dy·W2, act⟩``, so the expert outputs are not kept. Dropped slots add nothing and get zero gradient.

    With low-rank factors (LoRA, Hu et al., 2021) the product ``v·W1ᵀ`` becomes ``v·W1ᵀ + lora_scale·(v·A1ᵀ)·B1ᵀ`` with
    the factors of the same expert, and ``v·W2ᵀ`` likewise; no expert's ``B·A`` is ever formed.

    Args:
        x: ``(T, H)``.
        gate_up: ``(E, 2I, H)``, or ``(E, I, H)`` for an ungated activation. Transposed storage ``(E, H, 2I)`` is given
            as ``gate_up.transpose(1, 2)`` and is not copied; so too for ``down``.
        down: ``(E, H, I)``. Either may be a frozen :class:`gossamer.QuantizedExpertWeight` of that shape, dequantised
            inside the kernels. Where a gradient of another argument is wanted beside one, the layer is a composition
            of :func:`gossamer.grouped_matmul` that keeps the pre-activation and the activation.
        dispatch: from :func:`gossamer.dispatch`, with the same T and E.
        weights: ``(T, K)`` routing weights; the dtype of ``x``, or float32.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        gate_up_bias: ``(E, 2I)`` or ``(E, I)``, or None.
        down_bias: ``(E, H)`` or None.
        interleaved: whether gate and up alternate along 2I (gate even, up odd) instead of lying one after the other.
        gate_up_lora: ``(A1, B1)``, ``A1 (E, r, H)`` and ``B1 (E, 2I, r)`` or ``(E, I, r)``, or None; the dtype of
            ``x``, or float32, which is rounded to it for the products while its gradient is not.
        down_lora: ``(A2, B2)``, ``A2 (E, r, I)`` and ``B2 (E, H, r)``, or None; its rank may differ.
        lora_scale: the factor of both low-rank updates.

    Returns:
        ``(T, H)`` in the dtype of ``x``. Accumulated in float32 (float64 for float64). Under ``torch.autocast`` all but
        the routing weights are taken in its dtype.

    Raises:
        TypeError: an argument is no tensor, no dispatch or no bool, a dtype is not supported, or dtypes differ.
        ValueError: the activation is unknown, or ``interleaved`` without a gate; shapes or devices do not fit each
            other or the dispatch, a rank is 0 or beyond its matrix, a part of a quantised weight requires a gradient,
            or ``lora_scale`` is a tensor that requires one, has several elements or lies on a GPU.
    """
    activation = as_activation(activation)
    check_interleaved(interleaved, activation)
    check_tensor("x", x)
    check_dispatch(dispatch)
    backend = _backend.resolve("expert_mlp", x)
    e, t, k = dispatch.num_experts, dispatch.num_tokens, dispatch.top_k
    check_shape("x", x, (t, None), "(T, H)")
    h = x.shape[1]
    down_operand = as_weight("down", down, (e, h, None), "(E, H, I)")
    wide = activation.halves * down.shape[2]
    gate_up_operand = as_weight("gate_up", gate_up, (e, wide, h), f"(E, {'2I' if activation.gated else 'I'}, H)")
    check_tensor("weights", weights)
    check_shape("weights", weights, (t, k), "(T, K)")
    if gate_up_bias is not None:
        check_shape("gate_up_bias", gate_up_bias, (e, wide), f"(E, {'2I' if activation.gated else 'I'})")
    if down_bias is not None:
        check_shape("down_bias", down_bias, (e, h), "(E, H)")
    quantized = [isinstance(weight, QuantizedExpertWeight) for weight in (gate_up, down)]
    dense = [None if few_bits else w for few_bits, w in zip(quantized, (gate_up, down), strict=True)]
    x, *dense, gate_up_bias, down_bias = autocast(x, *dense, gate_up_bias, down_bias)
    gate_up, down = (w if few_bits else d for few_bits, w, d in zip(quantized, (gate_up, down), dense, strict=True))
    gate_up_lora = check_factors("gate_up_lora", gate_up_lora, x, gate_up)
    down_lora = check_factors("down_lora", down_lora, x, down)
    lora_scale = check_scale("lora_scale", lora_scale)
    check_float("x", x, backend)
    _backend.check_served("expert_mlp", backend, x, any(quantized))
    check_same_dtype(x=x, gate_up=dense[0], down=dense[1], gate_up_bias=gate_up_bias, down_bias=down_bias)
    if weights.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weights must have the dtype of x, {x.dtype}, or torch.float32, got {weights.dtype}")
    check_same_device(
        x=x,
        gate_up=gate_up_operand.data,
        down=down_operand.data,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        weights=weights,
        dispatch=dispatch.slots,
    )
    if backend == "reference":
        return expert_mlp_reference(
            x,
            gate_up,
            down,
            dispatch,
            weights,
            activation=activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            interleaved=interleaved,
            gate_up_lora=gate_up_lora,
            down_lora=down_lora,
            lora_scale=lora_scale,
        )
    differentiable = (x, *dense, gate_up_bias, down_bias, weights)
    save_preact = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in differentiable)
    plain = gate_up_lora is None and down_lora is None
    if plain and all(quantized) and not save_preact:
        return quantized_expert_mlp(
            x, gate_up, down, dispatch, weights, activation, gate_up_bias, down_bias, interleaved, backend
        )
    if any(quantized):
        return composed_expert_mlp(
            x,
            gate_up,
            down,
            dispatch,
            weights,
            activation,
            gate_up_bias,
            down_bias,
            interleaved,
            gate_up_lora,
            down_lora,
            lora_scale,
        )
    if not plain:
        return expert_mlp_lora(
            x,
            gate_up,
            down,
            gate_up_bias,
            down_bias,
            gate_up_lora,
            down_lora,
            dispatch,
            weights,
            activation,
            interleaved,
            lora_scale,
            backend,
        )
    y, _ = _expert_mlp(
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        dispatch.row_slots,
        dispatch.rows,
        dispatch.offsets,
        weights,
        activation.name,
        activation.alpha,
        activation.limit,
        interleaved,
        save_preact,
        backend,
    )
    return y
