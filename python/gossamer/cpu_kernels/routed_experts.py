"""Launcher of a router's choice, the dispatch and the experts of one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import activation_form, matrix, pointer, quantized_stack, unit_rows
from gossamer.cpu_kernels.expert_mlp import product

if TYPE_CHECKING:
    from gossamer.ops.routed_experts import ExpertChoice, ExpertStack


def prepare(choice: ExpertChoice, experts: ExpertStack) -> _C.RoutedExperts:
    """What stays the same from call to call; the tensors given must outlive its calls."""
    gate_up, down = experts.gate_up, experts.down
    num_experts, wide, hidden = gate_up.shape
    sizes = (0, hidden, down.shape[1], wide // experts.activation.halves, choice.top_k)
    layer = _C.ExpertMlp(
        groups=(0, 0, 0, num_experts),
        sizes=sizes,
        activation=activation_form(experts.activation, experts.interleaved),
        x=matrix(None),
        gate_up=product(gate_up, None),
        down=product(down, None),
        weights=matrix(None),
        preact=0,
    )
    router = (0, 0, 0, num_experts, choice.top_k, choice.sigmoid, choice.renormalize, choice.scale)
    return _C.RoutedExperts(
        router=router,
        n_group=choice.n_group,
        topk_group=choice.topk_group,
        bias=pointer(choice.bias),
        layer=layer,
        gate_up=quantized_stack(gate_up) if gate_up.quantized else None,
        down=quantized_stack(down) if down.quantized else None,
    )


def run(prepared: _C.RoutedExperts, logits: torch.Tensor, x: torch.Tensor, output_size: int) -> torch.Tensor | None:
    """``y (T, O)``, or None if a logit is NaN or +inf, or the bias NaN."""
    x = unit_rows(x)
    y = torch.empty(x.shape[0], output_size, dtype=x.dtype)
    done = prepared(logits.data_ptr(), x.shape[0], matrix(x), y.data_ptr(), torch.get_num_threads())
    return y if done else None
