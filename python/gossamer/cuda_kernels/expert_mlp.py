"""Launchers of the expert feed-forward layer on Hopper GPUs.

The products are in ``gossamer._C``. Sums over the rows of a token or of an expert are bound by memory, and are left to
Triton, as is the whole layer if its weights have low-rank updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C, _backend
from gossamer.cpu_kernels._native import activation_form
from gossamer.cuda_kernels._hopper import Operands, routing, with_depth
from gossamer.cuda_kernels.grouped_matmul import rows_times_weight, weight_gradient
from gossamer.triton_kernels import expert_mlp as triton_forward
from gossamer.triton_kernels import expert_mlp_backward as triton_backward
from gossamer.triton_kernels.gather_reduce import sum_slots

if TYPE_CHECKING:
    from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward, ExpertMlpOutput


def _up_projection(args: ExpertMlp) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activation ``(R, I)`` of sorted rows and, if saved, the pre-activation ``(R, 2I)``."""
    num_rows, wide = args.groups.slots.shape[0], args.gate_up.shape[1]
    inner = wide // args.activation.halves
    act = torch.empty(num_rows, inner, dtype=args.x.dtype, device=args.x.device)
    preact = torch.empty(num_rows, wide, dtype=args.x.dtype, device=args.x.device) if args.save else None
    if act.numel() == 0:
        return act, preact
    x, gate_up = with_depth(args.x, args.gate_up.data)
    operands = Operands(x)
    _C.hopper_expert_up(
        bfloat16=operands.bfloat16,
        routing=routing(args.groups),
        inner=inner,
        c=x.shape[1],
        x=operands.rows(x, args.weights.shape[1]),
        gate_up=operands.weight(gate_up),
        bias=operands.pointer(args.gate_up.bias),
        activation=activation_form(args.activation, args.interleaved),
        act=act.data_ptr(),
        preact=0 if preact is None else preact.data_ptr(),
        where=operands.where(),
    )
    return act, preact


def _updated(args: ExpertMlp) -> bool:
    return args.gate_up.a is not None or args.down.a is not None


def expert_mlp(args: ExpertMlp) -> ExpertMlpOutput:
    """``y`` and, with ``args.save``, the tensors for the backward pass.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    x, groups, top_k = args.x, args.groups, args.weights.shape[1]
    _backend.check_served("expert_mlp", "cuda", x)
    if _updated(args):
        return triton_forward.expert_mlp(args)
    if x.numel() == 0:
        preact = x.new_empty(groups.slots.shape[0], args.gate_up.shape[1]) if args.save else None
        return x.new_zeros(x.shape[0], args.down.shape[1]), preact, None, None
    act, preact = _up_projection(args)
    out = rows_times_weight(act, args.down.data, args.down.bias, groups, 0, False, False)
    y = sum_slots(out, groups.rows, groups.offsets, top_k, args.weights)
    return y, preact, None, None


def _down_backward(
    args: ExpertMlpBackward, wants: tuple[bool, bool, bool], overwrite: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As :func:`gossamer.triton_kernels.expert_mlp_backward.down_backward`."""
    forward, preact = args.forward, args.preact.contiguous()
    down, weights = forward.down.data, forward.weights
    num_rows, inner, device = forward.groups.slots.shape[0], down.shape[2], args.dy.device
    want_dpreact, want_act, want_partial = wants
    dpreact = (preact if overwrite else torch.empty_like(preact)) if want_dpreact else None
    act = torch.empty(num_rows, inner, dtype=args.dy.dtype, device=device) if want_act else None
    columns = _C.hopper_expert_down_backward_columns(inner)
    partial = torch.empty(columns, num_rows, dtype=torch.float32, device=device) if want_partial else None
    if inner == 0:
        return dpreact, act, partial
    dy, weight = with_depth(args.dy, down.transpose(1, 2))
    operands = Operands(dy)
    _C.hopper_expert_down_backward(
        bfloat16=operands.bfloat16,
        routing=routing(forward.groups),
        inner=inner,
        c=dy.shape[1],
        dy=operands.rows(dy, weights.shape[1]),
        down=operands.weight(weight),
        activation=activation_form(forward.activation, forward.interleaved),
        preact=preact.data_ptr(),
        dpreact=0 if dpreact is None else dpreact.data_ptr(),
        act=0 if act is None else act.data_ptr(),
        partial=0 if partial is None else partial.data_ptr(),
        weights=operands.pointer(weights),
        weights_float32=weights.dtype == torch.float32,
        where=operands.where(),
    )
    return dpreact, act, partial


_PRODUCTS = triton_backward.Products(_down_backward, rows_times_weight, weight_gradient)


def expert_mlp_backward(args: ExpertMlpBackward, overwrite: bool) -> dict[str, torch.Tensor]:
    """As :func:`gossamer.triton_kernels.expert_mlp_backward.expert_mlp_backward`, with the products here.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    _backend.check_served("expert_mlp", "cuda", args.forward.x)
    products = None if _updated(args.forward) else _PRODUCTS
    return triton_backward.expert_mlp_backward(args, overwrite, products)
