"""Launchers of the native expert feed-forward layer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer._layout import stored_transposed
from gossamer.cpu_kernels._native import (
    DTYPES,
    activation_form,
    empty_gradient,
    empty_huge,
    groups,
    matrix,
    pointer,
    quantized_stack,
    unit_rows,
    weights3,
)

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight
    from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward, ExpertMlpOutput

_ABSENT = (0, 0, 0, 0)
_NO_UPDATE = (_ABSENT, _ABSENT, 0, 1.0, 0)


def product(weight: Weight, s: torch.Tensor | None) -> tuple:
    """``(weight, bias, update)`` of one product, with ``s`` the update's ``x·aᵀ``, without quantised weights."""
    stored = _ABSENT if weight.quantized else weights3(weight.data)
    if weight.a is None:
        return stored, matrix(weight.bias), _NO_UPDATE
    update = weights3(weight.a), weights3(weight.b), weight.a.shape[1], weight.factor, pointer(s)
    return stored, matrix(weight.bias), update


def _layer(
    args: ExpertMlp, x: torch.Tensor, gate_up: Weight, down: Weight, preact: torch.Tensor | None, s1, s2
) -> _C.ExpertMlp:
    """The arguments that forward and backward share; the tensors given must outlive the call."""
    return _C.ExpertMlp(
        groups=groups(args.groups.slots, args.groups.offsets, args.groups.rows.shape[0]),
        sizes=(*x.shape, *down.shape[1:], args.weights.shape[1]),
        activation=activation_form(args.activation, args.interleaved),
        x=matrix(x),
        gate_up=product(gate_up, s1),
        down=product(down, s2),
        weights=matrix(args.weights),
        preact=pointer(preact),
    )


def _low_rows(args: ExpertMlp, weight: Weight) -> torch.Tensor | None:
    """Room for ``x·aᵀ (R, r)`` in the accumulator's type, if the backward pass needs it."""
    if weight.a is None or not args.save:
        return None
    wide = torch.promote_types(args.x.dtype, torch.float32)
    return torch.empty((args.groups.slots.shape[0], weight.a.shape[1]), dtype=wide)


def expert_mlp(args: ExpertMlp) -> ExpertMlpOutput:
    """``y`` and, with ``args.save``, the tensors for the backward pass, whose dropped rows are not written."""
    x = unit_rows(args.x)
    gate_up, down = args.gate_up.with_factors_in(x.dtype), args.down.with_factors_in(x.dtype)
    y = torch.empty((x.shape[0], down.shape[1]), dtype=x.dtype)
    preact = empty_huge((args.groups.slots.shape[0], gate_up.shape[1]), x.dtype) if args.save else None
    s1, s2 = _low_rows(args, gate_up), _low_rows(args, down)
    layer = _layer(args, x, gate_up, down, preact, s1, s2)
    if gate_up.quantized:
        up, out = quantized_stack(gate_up), quantized_stack(down)
        _C.quantized_expert_mlp(layer=layer, gate_up=up, down=out, y=y.data_ptr(), num_threads=torch.get_num_threads())
    else:
        _C.expert_mlp(layer=layer, y=y.data_ptr(), num_threads=torch.get_num_threads())
    return y, preact, s1, s2


def expert_mlp_backward(args: ExpertMlpBackward, overwrite: bool) -> dict[str, torch.Tensor]:
    """The gradients named in ``args.needs``; those of weights are laid out like the weights."""
    forward, needs, found = args.forward, args.needs, {}
    x, dy, preact = unit_rows(forward.x), unit_rows(args.dy), args.preact.contiguous()
    gate_up, down = forward.gate_up.with_factors_in(x.dtype), forward.down.with_factors_in(x.dtype)
    factors = [f for w in (forward.gate_up, forward.down) for f in (w.a, w.b) if f is not None]
    # The widest dtype among the factors and x; gradients in narrower dtypes are rounded at the end.
    factor_dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors), x.dtype)

    def places(name: str, weight: Weight) -> tuple:
        """Make the gradients of a weight, its bias and its factors; returns their addresses as arguments of ``_C``."""
        data, bias, a, b = f"{name}.data", f"{name}.bias", f"{name}.a", f"{name}.b"
        transposed = stored_transposed(weight.data)
        if data in needs:
            found[data] = empty_gradient(tuple(weight.data.shape), x.dtype, transposed)
        if bias in needs:
            found[bias] = torch.empty(weight.bias.shape, dtype=x.dtype)
        if a in needs:
            found[a] = torch.empty(weight.a.shape, dtype=factor_dtype)
        if b in needs:
            found[b] = torch.empty(weight.b.shape, dtype=factor_dtype)
        at_data, at_bias, at_a, at_b = [pointer(found.get(part)) for part in (data, bias, a, b)]
        return (at_data, transposed), at_bias, (at_a, at_b)

    if "x" in needs:
        found["x"] = torch.empty(x.shape, dtype=x.dtype)
    if "weights" in needs:
        # Zeros, because dropped slots get no gradient.
        found["weights"] = torch.zeros(forward.weights.shape, dtype=forward.weights.dtype)
    gate_up_places, down_places = places("gate_up", forward.gate_up), places("down", forward.down)
    if x.numel() and dy.numel():
        _C.expert_mlp_backward(
            layer=_layer(forward, x, gate_up, down, preact, args.s1, args.s2),
            dy=matrix(dy),
            dx=pointer(found.get("x")),
            gate_up=gate_up_places,
            down=down_places,
            dweights=matrix(found.get("weights")),
            factor_dtype=DTYPES[factor_dtype],
            num_threads=torch.get_num_threads(),
        )
    else:
        for gradient in found.values():
            gradient.zero_()
    if factors:
        inputs = forward.inputs()
        return {name: gradient.to(inputs[name].dtype) for name, gradient in found.items()}
    return found
