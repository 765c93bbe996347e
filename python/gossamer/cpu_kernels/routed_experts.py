"""Launchers of a whole expert layer in one call: dispatch and experts, with or without a router's choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer._activation import Activation
from gossamer.cpu_kernels._native import activation_form, groups, matrix, pointer, quantized_stack, unit_rows
from gossamer.cpu_kernels.expert_mlp import product

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight
    from gossamer.ops.dispatch import Dispatch
    from gossamer.ops.routed_experts import Prepared


def prepare(gate_up: Weight, down: Weight, activation: Activation, interleaved: bool) -> _C.PreparedExperts:
    """The arguments that stay the same from call to call; the tensors must outlive the result."""
    num_experts, wide, hidden = gate_up.shape
    layer = _C.ExpertMlp(
        groups=(0, 0, 0, num_experts, 0),
        sizes=(0, hidden, down.shape[1], wide // activation.halves, 0),
        activation=activation_form(activation, interleaved),
        x=matrix(None),
        gate_up=product(gate_up, None),
        down=product(down, None),
        weights=matrix(None),
        preact=0,
    )
    codes = [quantized_stack(weight) if weight.quantized else None for weight in (gate_up, down)]
    return _C.PreparedExperts(layer=layer, num_experts=num_experts, gate_up=codes[0], down=codes[1])


def run(prepared: Prepared, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """``y (T, O)``, or None if a logit is NaN or +inf, or the bias NaN."""
    x, logits = unit_rows(x), unit_rows(logits)
    y = torch.empty(x.shape[0], prepared.output_size, dtype=x.dtype)
    top_k, sigmoid, renormalize, n_group, topk_group, scale, bias = prepared.choice
    router = logits.data_ptr(), logits.stride(0), *logits.shape, top_k, sigmoid, renormalize, scale
    done = prepared.layer.routed(
        router, n_group, topk_group, pointer(bias), matrix(x), y.data_ptr(), torch.get_num_threads()
    )
    return y if done else None


def run_chosen(
    prepared: Prepared, expert_ids: torch.Tensor, weights: torch.Tensor, x: torch.Tensor
) -> torch.Tensor | None:
    """``y (T, O)``, or None if an id is negative."""
    x = unit_rows(x)
    y = torch.empty(x.shape[0], prepared.output_size, dtype=x.dtype)
    done = prepared.layer.chosen(
        matrix(expert_ids), tuple(expert_ids.shape), matrix(weights), matrix(x), y.data_ptr(), torch.get_num_threads()
    )
    return y if done else None


def run_dispatched(prepared: Prepared, dispatch: Dispatch, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``y (T, O)``."""
    x = unit_rows(x)
    y = torch.empty(x.shape[0], prepared.output_size, dtype=x.dtype)
    prepared.layer.dispatched(
        groups(dispatch.row_slots, dispatch.offsets, dispatch.num_rows),
        (dispatch.num_tokens, dispatch.top_k),
        matrix(weights),
        matrix(x),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
