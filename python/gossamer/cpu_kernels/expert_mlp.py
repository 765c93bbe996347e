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
    from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward, ExpertMlpGradients, ExpertMlpOutput

_ABSENT = (0, 0, 0, 0)
_NO_UPDATE = (_ABSENT, _ABSENT, 0, 1.0, 0)


def _product(weight: Weight, s: torch.Tensor | None) -> tuple:
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
        groups=groups(args.groups.slots, args.groups.offsets),
        sizes=(*x.shape, *down.shape[1:], args.weights.shape[1]),
        activation=activation_form(args.activation, args.interleaved),
        x=matrix(x),
        gate_up=_product(gate_up, s1),
        down=_product(down, s2),
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


def expert_mlp_backward(args: ExpertMlpBackward, overwrite: bool) -> ExpertMlpGradients:
    """The gradients named in ``args.needs``, None for others; those of weights are laid out like the weights."""
    forward, needs = args.forward, args.needs
    x, dy, preact = unit_rows(forward.x), unit_rows(args.dy), args.preact.contiguous()
    gate_up, down = forward.gate_up.with_factors_in(x.dtype), forward.down.with_factors_in(x.dtype)
    factors = [f for w in (forward.gate_up, forward.down) for f in (w.a, w.b) if f is not None]
    # The widest dtype among the factors and x; gradients in narrower dtypes are rounded at the end.
    factor_dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors), x.dtype)

    def gradients(name: str, weight: Weight) -> tuple[tuple[torch.Tensor | None, ...], tuple]:
        """Gradients of a weight, its bias and its factors, and their form as arguments of ``_C``."""
        data = bias = a = b = None
        transposed = stored_transposed(weight.data)
        if f"{name}.data" in needs:
            data = empty_gradient(tuple(weight.data.shape), x.dtype, transposed)
        if f"{name}.bias" in needs:
            bias = torch.empty(weight.bias.shape, dtype=x.dtype)
        if f"{name}.a" in needs:
            a = torch.empty(weight.a.shape, dtype=factor_dtype)
        if f"{name}.b" in needs:
            b = torch.empty(weight.b.shape, dtype=factor_dtype)
        return (data, bias, a, b), ((pointer(data), transposed), pointer(bias), (pointer(a), pointer(b)))

    dx = torch.empty(x.shape, dtype=x.dtype) if "x" in needs else None
    # Zeros, because dropped slots get no gradient.
    weights = forward.weights
    dweights = torch.zeros(weights.shape, dtype=weights.dtype) if "weights" in needs else None
    of_gate_up, gate_up_places = gradients("gate_up", forward.gate_up)
    of_down, down_places = gradients("down", forward.down)
    if x.numel() and dy.numel():
        _C.expert_mlp_backward(
            layer=_layer(forward, x, gate_up, down, preact, args.s1, args.s2),
            dy=matrix(dy),
            dx=pointer(dx),
            gate_up=gate_up_places,
            down=down_places,
            dweights=matrix(dweights),
            factor_dtype=DTYPES[factor_dtype],
            num_threads=torch.get_num_threads(),
        )
    else:
        for gradient in (dx, *of_gate_up, *of_down):
            if gradient is not None:
                gradient.zero_()

    def rounded(found: tuple, weight: Weight) -> tuple[torch.Tensor | None, ...]:
        data, bias, a, b = found
        return data, bias, a if a is None else a.to(weight.a.dtype), b if b is None else b.to(weight.b.dtype)

    return dx, dweights, *rounded(of_gate_up, forward.gate_up), *rounded(of_down, forward.down)
